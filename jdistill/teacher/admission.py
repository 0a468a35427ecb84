"""Who may use the engine next: a queue bounded by tokens, shared fairly between clients.

A call comes as pieces (runs of its sequences). What waits is bounded over all clients, and so is what runs; the client
that has been served least goes next (start-time fair queueing: a client's tag grows by the tokens it is given, and
one that was away joins at the present time, without credit for its absence), and within a client the oldest call. The
piece whose turn it is waits for room rather than letting a smaller one pass, so a large one is never starved.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable, Sequence

from jdistill.wire.errors import OverloadedError, UnavailableError

MIN_RETRY_S, MAX_RETRY_S = 0.05, 10.0
RATE_HALF_LIFE_S = 5.0  # of the estimate of tokens per second


class Entry:
    """One call in the queue: its pieces are started in order, by `turn`, and ended by `done` or `leave`."""

    def __init__(self, admission: Admission, client: str, sizes: Sequence[int]):
        self._admission = admission
        self.client = client
        self.queued_at = time.monotonic()
        self.waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()
        self._turns: list[asyncio.Future[None]] = []
        self._running: dict[int, int] = {}  # piece -> tokens
        self._sizes = list(sizes)
        loop = asyncio.get_running_loop()
        for size in sizes:
            turn: asyncio.Future[None] = loop.create_future()
            self.waiting.append((size, turn))
            self._turns.append(turn)

    async def turn(self, piece: int) -> None:
        """Waits until piece number `piece` may enter the engine.

        Raises:
            UnavailableError: the queue was given up (sleep, shutdown).
        """
        await self._turns[piece]

    def start(self, size: int) -> None:
        """The head of `waiting` runs from now on (called by Admission)."""
        self._running[len(self._sizes) - len(self.waiting)] = size
        _, turn = self.waiting.popleft()
        if not turn.done():
            turn.set_result(None)

    def done(self, piece: int) -> None:
        """Piece number `piece` has left the engine."""
        size = self._running.pop(piece, 0)
        if size:
            self._admission.released(size, finished=True)

    def leave(self) -> None:
        """The call is over, however it ended: what waits will not start, what runs has been ended; idempotent."""
        self._admission.remove(self)
        for size in self._running.values():
            self._admission.released(size, finished=False)
        self._running.clear()


class Admission:
    """The queue before one engine.

    Args:
        max_running_tokens: tokens in the engine at once; a larger piece runs alone.
        max_queued_tokens: tokens that wait, over all clients; a call that finds nothing waiting is always taken.
    """

    def __init__(self, *, max_running_tokens: int, max_queued_tokens: int, clock: Callable[[], float] = time.monotonic):
        self._max_running_tokens = max_running_tokens
        self._max_queued_tokens = max_queued_tokens
        self._clock = clock
        self._clients: dict[str, collections.deque[Entry]] = {}  # only those with something waiting
        self._tags: dict[str, float] = {}  # tokens given, in virtual time; forgotten once it lies in the past
        self._now = 0.0  # virtual: the tag of the piece that started last
        self._paused = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.queued_tokens = 0
        self.running_tokens = 0
        self._rate = 0.0  # tokens per second
        self._rate_at: float | None = None
        self._finished_since = 0

    def cut(self, sizes: Sequence[int]) -> list[range]:
        """Cuts a call of sequences of these sizes into pieces: one, unless it is more than may run at once.

        Depends on the sizes alone: the same call gives the engine the same work, so that its rounding is the same.
        """
        if sum(sizes) <= self._max_running_tokens:
            return [range(len(sizes))]
        room = max(1, self._max_running_tokens // 2)  # two pieces fit, so that the engine need not run dry between them
        pieces, start, total = [], 0, 0
        for i, size in enumerate(sizes):
            if i > start and total + size > room:
                pieces.append(range(start, i))
                start, total = i, 0
            total += size
        pieces.append(range(start, len(sizes)))
        return pieces

    def enter(self, client: str, sizes: Sequence[int]) -> Entry:
        """Queues a call of pieces of these sizes (tokens).

        Raises:
            OverloadedError: the queue is full; `retry_after_s` of the error says when there should be room.
        """
        size = sum(sizes)
        if self.queued_tokens and self.queued_tokens + size > self._max_queued_tokens:
            error = OverloadedError(
                f"{self.queued_tokens} tokens wait for the engine already, this call has {size} and the limit is "
                f"{self._max_queued_tokens} (--max-queued-tokens); come back later, or add replicas"
            )
            error.retry_after_s = self._retry_after_s(self.queued_tokens + size - self._max_queued_tokens)
            raise error
        entry = Entry(self, client, sizes)
        if client not in self._clients:
            self._clients[client] = collections.deque()
            self._tags[client] = max(self._now, self._tags.get(client, 0.0))
        self._clients[client].append(entry)
        self.queued_tokens += size
        self._idle.clear()
        self._start()
        return entry

    def pause(self) -> None:
        """Nothing more enters the engine until `resume`."""
        self._paused = True

    def resume(self) -> None:
        """Ends `pause`."""
        self._paused = False
        self._start()

    async def wait_until_nothing_runs(self) -> None:
        """Returns when the engine is empty; what waits does not matter."""
        while self.running_tokens:
            self._idle.clear()
            await self._idle.wait()

    def fail_waiting(self, error: UnavailableError) -> None:
        """Ends the wait of everything that has not started."""
        for entry in [entry for entries in self._clients.values() for entry in entries]:
            for _, turn in entry.waiting:
                if not turn.done():
                    turn.set_exception(error)
                    turn.exception()  # a later piece's is never asked for: asyncio would call it lost
            self.remove(entry)

    def remove(self, entry: Entry) -> None:
        """Takes what `entry` has waiting out of the queue (called by Entry)."""
        if not entry.waiting:
            return
        self.queued_tokens -= sum(size for size, _ in entry.waiting)
        for _, turn in entry.waiting:
            turn.cancel()
        entry.waiting.clear()
        entries = self._clients[entry.client]
        entries.remove(entry)
        if not entries:
            del self._clients[entry.client]
        self._start()  # it may have stood before smaller ones

    def released(self, size: int, *, finished: bool) -> None:
        """A running piece has ended (called by Entry)."""
        self.running_tokens -= size
        if finished:
            self._measure(size)
        if not self.running_tokens:
            self._idle.set()
        self._start()

    def _start(self) -> None:
        while self._clients and not self._paused:
            client = min(self._clients, key=lambda name: self._tags[name])  # ties: who came first
            entries = self._clients[client]
            entry = entries[0]
            size = entry.waiting[0][0]
            if self.running_tokens and self.running_tokens + size > self._max_running_tokens:
                return
            self._now = self._tags[client]
            self._tags[client] += size
            self.queued_tokens -= size
            self.running_tokens += size
            entry.start(size)
            if not entry.waiting:
                entries.popleft()
                if not entries:
                    del self._clients[client]
        if len(self._tags) > 2 * len(self._clients) + 16:
            # Who has had no more than its share need not be remembered.
            self._tags = {name: tag for name, tag in self._tags.items() if tag > self._now}

    def _measure(self, size: int) -> None:
        now = self._clock()
        if self._rate_at is None:
            self._rate_at = now
            return
        self._finished_since += size
        passed_s = now - self._rate_at
        if passed_s < 0.1:
            return
        weight = 0.5 ** (passed_s / RATE_HALF_LIFE_S)
        measured = self._finished_since / passed_s
        self._rate = measured if not self._rate else weight * self._rate + (1 - weight) * measured
        self._rate_at, self._finished_since = now, 0

    def _retry_after_s(self, excess_tokens: int) -> float:
        if not self._rate:
            return 0.5
        return min(MAX_RETRY_S, max(MIN_RETRY_S, excess_tokens / self._rate))
