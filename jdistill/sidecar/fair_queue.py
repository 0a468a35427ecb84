"""Queues admitted calls fairly between clients, and refuses a call when the queue is full.

A call consists of pieces (runs of its sequences). Waiting tokens are bounded over all clients, and so are running ones.
The client that has been served least goes next (start-time fair queueing: a client's tag grows by the tokens it is
given; a client that was away joins at the present virtual time, without credit for its absence), and within a client
the oldest call. The next piece waits for room rather than letting a smaller one pass, so a large one never starves.

A fair order does not help a client that never enters: while one client is being refused by a full queue, no other may
hold more than an equal share of it.
"""

from __future__ import annotations

import asyncio
import collections
import copy
import math
from collections.abc import Callable, Sequence

from jdistill.wire.errors import DeadlineError, OverloadedError, TeacherError, UnavailableError

MIN_RETRY_S, MAX_RETRY_S = 0.05, 10.0
UNKNOWN_RETRY_S = 0.5  # before anything has been measured
RATE_HALF_LIFE_S = 5.0  # of the estimate of tokens per second; counts only time in which the engine works
# How long a refused client counts as waiting outside, beyond its retry delay.
KNOCK_S = 2.0
MAX_KNOCKING = 256  # bounds memory: clients choose their names


class Entry:
    """One call in the queue. Its pieces start in order: await `turn`, report `scored`, end each with `done`."""

    def __init__(self, queue: FairQueue, client: str, sizes: Sequence[int]):
        self._queue = queue
        self._turns: list[asyncio.Future[None]] = [asyncio.get_running_loop().create_future() for _ in sizes]
        self.client = client
        self.waiting = collections.deque(sizes)  # tokens of the pieces that have not started
        self.running: dict[int, int] = {}  # piece -> its tokens still in the engine
        self.held = False
        self.deadline = math.inf
        self.timer: asyncio.TimerHandle | None = None

    @property
    def started(self) -> bool:
        """Whether its first piece has reached the engine."""
        return len(self.waiting) < len(self._turns)

    async def turn(self, piece: int) -> None:
        """Waits until piece `piece` may enter the engine; it counts as running from then on.

        Raises:
            DeadlineError: the call's deadline passed first.
            UnavailableError: the lifecycle has refused waiting calls (sleep, shutdown).
        """
        await self._turns[piece]

    def scored(self, piece: int, num_tokens: int) -> None:
        """Reports that a sequence of `num_tokens` tokens of a running piece has been scored."""
        self.running[piece] -= num_tokens
        self._queue._finished(num_tokens)

    def done(self, piece: int) -> None:
        """Reports that a piece has left the engine, for whatever reason; idempotent."""
        if (num_tokens := self.running.pop(piece, None)) is not None:
            self._queue._ended(self, num_tokens)

    def hold(self, held: bool) -> None:
        """Sets whether its next piece, and its client's later calls, stay in the queue."""
        self.held = held
        if not held:
            self._queue._start()

    def leave(self) -> None:
        """Removes a call that is over: waiting pieces will not start, running ones are ended; idempotent."""
        self._queue._remove(self)
        for piece in list(self.running):
            self.done(piece)

    def _start_next(self) -> None:
        piece, size = len(self._turns) - len(self.waiting), self.waiting.popleft()
        self.running[piece] = size
        if not self._turns[piece].done():
            self._turns[piece].set_result(None)

    def _give_up(self, error: TeacherError | None) -> int:
        """Ends the wait of unstarted pieces with `error` or by cancellation; returns their tokens."""
        for turn in self._turns[len(self._turns) - len(self.waiting) :]:
            if turn.done():
                continue
            if error is None:
                turn.cancel()
            else:
                turn.set_exception(copy.copy(error))  # a shared error would keep the frames of every raiser
                turn.exception()  # marked as retrieved: later pieces never ask for it
        num_tokens = sum(self.waiting)
        self.waiting.clear()
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        return num_tokens


class FairQueue:
    """The queue in front of one engine. Not thread-safe: it belongs to one event loop and uses its time.

    Args:
        max_running_tokens: tokens in the engine at once; a larger piece runs alone.
        max_queued_tokens: waiting tokens over all clients; a call that finds the queue empty is always accepted.
        clock: seconds; default: the running loop's time, in which deadlines are given.
    """

    def __init__(
        self, *, max_running_tokens: int, max_queued_tokens: int, clock: Callable[[], float] | None = None
    ) -> None:
        self._max_running_tokens = max_running_tokens
        self._max_queued_tokens = max_queued_tokens
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._clients: dict[str, collections.deque[Entry]] = {}  # only clients with waiting calls
        self._queued_of: dict[str, int] = {}  # waiting tokens of each of these clients
        self._tags: dict[str, float] = {}  # tokens given, in virtual time; dropped once in the past
        self._now = 0.0  # virtual: the tag of the piece that started last
        self._knocking: dict[str, float] = {}  # recently refused client -> end of its time outside
        self._paused = False
        self._open: set[Entry] = set()  # started, not yet finished
        self._nothing_open = asyncio.Event()
        self._nothing_open.set()
        self.queued_tokens = 0
        self.running_tokens = 0
        # Throughput: tokens finished, and seconds in which the engine was busy; both decay.
        self._busy_tokens = self._busy_s = 0.0
        self._measured_at = 0.0

    def cut(self, sizes: Sequence[int]) -> list[range]:
        """Cuts a call of sequences of these sizes into pieces: one, unless it exceeds max_running_tokens.

        Depends on the sizes alone: the same call gives the engine the same work, and so the same rounding.
        """
        if sum(sizes) <= self._max_running_tokens:
            return [range(len(sizes))]
        room = max(1, self._max_running_tokens // 2)  # two pieces fit, so the engine does not run dry between them
        pieces, start, total = [], 0, 0
        for i, size in enumerate(sizes):
            if i > start and total + size > room:
                pieces.append(range(start, i))
                start, total = i, 0
            total += size
        pieces.append(range(start, len(sizes)))
        return pieces

    def enter(self, client: str, sizes: Sequence[int], *, deadline: float | None = None) -> Entry:
        """Queues a call with pieces of these sizes (tokens); unstarted pieces leave the queue at `deadline`.

        Raises:
            OverloadedError: the queue is full; its `retry_after_s` estimates when there will be room.
        """
        assert sizes, "a call without pieces would block its client's queue forever"
        size = sum(sizes)
        if self.queued_tokens:
            self._check_room(client, size)
        self._knocking.pop(client, None)
        entry = Entry(self, client, sizes)
        if client not in self._clients:
            self._clients[client] = collections.deque()
            self._queued_of[client] = 0
            self._tags[client] = max(self._now, self._tags.get(client, 0.0))
        self._clients[client].append(entry)
        self._count_queued(client, size)
        self._start()
        if entry.waiting and deadline is not None:
            entry.deadline = deadline
            entry.timer = asyncio.get_running_loop().call_at(deadline, self._remove, entry, _expired())
        return entry

    def pause(self) -> None:
        """Starts no further call until `resume`; a call whose first piece has started continues."""
        self._paused = True

    def resume(self) -> None:
        """Ends `pause`."""
        self._paused = False
        self._start()

    async def wait_until_nothing_runs(self) -> None:
        """Waits until the engine is empty and no call is half done; call `pause` first."""
        await self._nothing_open.wait()

    def fail_waiting(self, error: UnavailableError) -> None:
        """Ends every call that has not started with `error`."""
        for entry in [entry for entries in self._clients.values() for entry in entries if not entry.started]:
            self._drop(entry, error)
        self._start()

    def _check_room(self, client: str, size: int) -> None:
        """Raises OverloadedError, and remembers the client, if a call of this size does not fit."""
        now = self._clock()
        self._knocking = {name: until for name, until in self._knocking.items() if until > now}
        own = self._queued_of.get(client, 0)
        num_rivals = len((self._clients.keys() | self._knocking.keys()) - {client})
        excess = self.queued_tokens + size - self._max_queued_tokens
        if own and self._knocking.keys() - {client}:
            # Of every num_rivals + 1 tokens that leave the queue, only one is this client's.
            share = self._max_queued_tokens // (num_rivals + 1)
            excess = max(excess, (own + size - share) * (num_rivals + 1))
        if excess <= 0:
            return
        error = OverloadedError(
            f"{self.queued_tokens} tokens wait for the engine, {own} of them from client {client!r}; this call has "
            f"{size} and the limit is {self._max_queued_tokens} for all {num_rivals + 1} clients "
            "(--max-queued-tokens); retry later, or add replicas"
        )
        error.retry_after_s = self._retry_after_s(min(excess, self.queued_tokens))
        self._knocking.pop(client, None)
        if len(self._knocking) == MAX_KNOCKING:
            del self._knocking[next(iter(self._knocking))]
        self._knocking[client] = now + error.retry_after_s + KNOCK_S
        raise error

    def _count_queued(self, client: str, num_tokens: int) -> None:
        self.queued_tokens += num_tokens
        self._queued_of[client] += num_tokens

    def _remove(self, entry: Entry, error: TeacherError | None = None) -> None:
        """Removes the waiting pieces of `entry`; they may have blocked smaller ones."""
        self._drop(entry, error)
        self._start()

    def _drop(self, entry: Entry, error: TeacherError | None) -> None:
        if entry.waiting:
            self._count_queued(entry.client, -entry._give_up(error))
            self._clients[entry.client].remove(entry)
            self._forget_if_empty(entry.client)
            self._close_if_through(entry)

    def _forget_if_empty(self, client: str) -> None:
        if not self._clients[client]:
            del self._clients[client], self._queued_of[client]

    def _finished(self, num_tokens: int) -> None:
        """Accounts for scored tokens."""
        self.running_tokens -= num_tokens
        self._busy_tokens += num_tokens
        now = self._clock()
        passed_s = now - self._measured_at
        if passed_s > 0.01 or not self.running_tokens:  # only for the first sequence of a batch
            fade = 0.5 ** (passed_s / RATE_HALF_LIFE_S)
            self._busy_tokens *= fade
            self._busy_s = self._busy_s * fade + passed_s
            self._measured_at = now
        if self._clients:
            self._start()

    def _ended(self, entry: Entry, num_tokens: int) -> None:
        """Accounts for a piece that ended with `num_tokens` unscored tokens."""
        self.running_tokens -= num_tokens
        self._close_if_through(entry)
        self._start()

    def _close_if_through(self, entry: Entry) -> None:
        if not entry.waiting and not entry.running:
            self._open.discard(entry)
            if not self._open:
                self._nothing_open.set()

    def _may_start(self, entry: Entry) -> bool:
        return not entry.held and (not self._paused or entry.started)

    def _start(self) -> None:
        while self._clients:
            ready = [name for name, entries in self._clients.items() if self._may_start(entries[0])]
            if not ready:
                break
            client = min(ready, key=self._tags.__getitem__)  # ties: first come
            entries = self._clients[client]
            entry, size = entries[0], entries[0].waiting[0]
            if self._clock() >= entry.deadline:  # its timer is late
                self._drop(entry, _expired())
                continue
            if self.running_tokens and self.running_tokens + size > self._max_running_tokens:
                break
            if not self.running_tokens:
                self._measured_at = self._clock()  # idle time does not count towards the engine's speed
            self._now = self._tags[client]
            self._tags[client] += size
            self._count_queued(client, -size)
            self.running_tokens += size
            self._open.add(entry)
            self._nothing_open.clear()
            entry._start_next()
            if not entry.waiting:
                entry._give_up(None)  # its timer
                entries.popleft()
                self._forget_if_empty(client)
        if not self._clients and not self._open:
            self._tags.clear()  # idle: all clients start equal again
        elif len(self._tags) > 2 * len(self._clients) + 16:
            # A client that has had no more than its share need not be remembered.
            self._tags = {name: tag for name, tag in self._tags.items() if tag > self._now or name in self._clients}

    def _retry_after_s(self, num_tokens: int) -> float:
        """Estimates how long the engine takes for `num_tokens` tokens."""
        if not self._busy_s or not self._busy_tokens:
            return UNKNOWN_RETRY_S
        return min(MAX_RETRY_S, max(MIN_RETRY_S, num_tokens * self._busy_s / self._busy_tokens))


def _expired() -> DeadlineError:
    return DeadlineError("the deadline passed before the request reached the engine")
