"""One call from admission to its log record: pieces into the engine, checked scores out in messages, cancellation.

Scores arrive from the engine piece by piece (`_pump`) and wait in the Call until `_send` has written them. A slow
reader holds back its own next pieces only.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import copy
import dataclasses
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc

from jdistill.sidecar.engines.base import Engine
from jdistill.sidecar.fair_queue import Entry, FairQueue
from jdistill.sidecar.metrics import Metrics
from jdistill.sidecar.results import EngineResultError, ResultChecker
from jdistill.wire import codec
from jdistill.wire.errors import EngineDeadError, OverloadedError, TeacherError, UnavailableError
from jdistill.wire.status import to_status
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores

logger = logging.getLogger(__name__)

# How long a finished sequence waits for others to share its message: short compared with any forward pass, long
# compared with the microseconds between the sequences of one batch.
FLUSH_S = 0.0015
MAX_CHUNK_BYTES = 16 << 20  # upper bound on the client's max_chunk_bytes: a message must stay far below gRPC's limit
# Scores waiting for a slow reader; above this, the call's next piece stays in the queue. 64 x 32k tokens with top-64
# are 1 GB.
MAX_UNSENT_BYTES = 64 << 20
# A client's deadline expires slightly earlier at the client than here, so what arrives is its cancellation.
DEADLINE_SLACK_S = 0.05
CLIENT_KEY = "jdistill-client"  # metadata: the name under which a client shares the queue; default: the peer's address
MAX_NAME_CHARS = 64  # of a client name or request id in logs


def client_of(context: grpc.aio.ServicerContext) -> str:
    """Returns the client's name from the metadata, or the peer's address without its port."""
    for key, value in context.invocation_metadata() or ():
        if key == CLIENT_KEY and value:
            return str(value)[:MAX_NAME_CHARS]
    return context.peer().rpartition(":")[0] or context.peer()


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What an admitted call asks of the engine; `pieces` are the runs of `sequences` that enter it one by one."""

    engine: Engine
    info: ModelInfo
    sequences: list[SequenceToScore]
    options: codec.RequestOptions
    pieces: list[range]


# (index of the sequence, its scores, their size in bytes), an error, or the end.
_Item = tuple[int, TokenScores, int] | Exception | None


class Call:
    """One call: the facts for its log record, and the items that wait to be sent: results, an error, or None (end)."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.began = time.monotonic()
        self.request = b""
        self.request_id = self.model = ""
        self.num_sequences = self.num_tokens = self.num_scored = 0
        self._unreported = [0, 0, 0]  # sequences, tokens, positions scored since the last `report`
        self.queue_s: float | None = None  # None: nothing of this call has reached the engine
        self.num_unfinished = 0  # pieces
        self.is_answered = False  # gRPC has all scores, or is being handed the last of them
        self.entry: Entry | None = None
        self._unsent_bytes = 0
        self._items: collections.deque[_Item] = collections.deque()
        self._arrived = asyncio.Event()

    def count_scored(self, num_tokens: int, num_scored: int) -> None:
        """Counts one scored sequence."""
        self.num_scored += num_scored
        self._unreported[0] += 1
        self._unreported[1] += num_tokens
        self._unreported[2] += num_scored

    def report(self, metrics: Metrics) -> None:
        """Adds what was scored to the metrics; once for many sequences, because a counter costs as much as the rest."""
        if self._unreported[0]:
            metrics.sequences_scored(*self._unreported)
            self._unreported = [0, 0, 0]

    def put(self, item: _Item) -> None:
        """Adds an item without blocking."""
        if isinstance(item, tuple):
            self._count_unsent(item[2])
        elif item is not None:
            self._items.clear()  # a call that fails has no use for unsent scores
        self._items.append(item)
        self._arrived.set()

    def get(self) -> _Item:
        """Removes the oldest item; `wait` must have returned True."""
        item = self._items.popleft()
        if not self._items:
            self._arrived.clear()
        if isinstance(item, tuple):
            self._count_unsent(-item[2])
        return item

    async def wait(self, timeout_s: float | None) -> bool:
        """Waits for an item; returns whether there is one within `timeout_s`."""
        if self._items:
            return True
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout_s)
        except TimeoutError:
            return bool(self._items)
        return True

    def _count_unsent(self, num_bytes: int) -> None:
        self._unsent_bytes += num_bytes
        entry = self.entry
        assert entry is not None
        if entry.held != (self._unsent_bytes > MAX_UNSENT_BYTES):
            entry.hold(not entry.held)

    def log(self, method: str, code: str, total_s: float, error: Exception | None) -> None:
        """Writes one record: a traceback only for unexpected errors, and nothing of the request's content."""
        fields: dict[str, Any] = {"method": method, "client": self.client, "code": code, "total_s": round(total_s, 6)}
        text = f"{method} of {self.client}: {code} after {total_s:.3f} s"
        if method == "ScoreSequences":
            queue_s = self.queue_s if self.queue_s is not None else total_s if self.entry is not None else 0.0
            fields |= {
                "request_id": self.request_id,
                "model": self.model,
                "sequences": self.num_sequences,
                "tokens": self.num_tokens,
                "scored": self.num_scored,
                "queue_s": round(queue_s, 6),
            }
            text += f" ({queue_s:.3f} s in the queue), request {self.request_id!r}, model {self.model!r}, "
            text += f"{self.num_sequences} sequences, {self.num_tokens} tokens, {self.num_scored} positions scored"
        unexpected = error if not isinstance(error, TeacherError) else None
        if isinstance(error, TeacherError):
            fields["reason"] = error.reason
            text += f": {error.reason}"
        if unexpected is not None:
            level = logging.ERROR
        elif error is not None and not isinstance(error, OverloadedError):
            level = logging.WARNING
        elif method == "GetServerInfo" or error is not None:
            level = logging.DEBUG  # an overloaded client returns several times a second
        else:
            level = logging.INFO
        logger.log(level, "%s", text, exc_info=unexpected, extra=fields)


class OpenCalls:
    """The scoring calls that are running or waiting."""

    def __init__(self) -> None:
        self._calls: set[Call] = set()
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._calls)

    @contextlib.contextmanager
    def holding(self, call: Call) -> Iterator[None]:
        """Counts `call` as open inside the block."""
        self._calls.add(call)
        self._none.clear()
        try:
            yield
        finally:
            self._calls.discard(call)
            if not self._calls:
                self._none.set()

    def fail(self, error: UnavailableError) -> None:
        """Ends every open call with `error`; scores that were already sent stay sent."""
        for call in self._calls:
            call.put(copy.copy(error))

    async def wait_until_none(self) -> None:
        """Waits until no call is open."""
        await self._none.wait()


@contextlib.asynccontextmanager
async def answering(
    method: str,
    context: grpc.aio.ServicerContext,
    call: Call,
    *,
    metrics: Metrics,
    on_engine_dead: Callable[[EngineDeadError], Awaitable[None]],
) -> AsyncIterator[None]:
    """Turns exceptions into gRPC statuses; writes the call's log record and metrics."""
    code, error = "OK", None
    try:
        yield
    except Exception as e:
        error = e
        # The frames would keep the sequences of a refused call in memory for as long as gRPC keeps the error.
        traceback.clear_frames(e.__traceback__)
        if isinstance(e, EngineDeadError):
            await on_engine_dead(e)
        elif isinstance(e, EngineResultError) or not isinstance(e, TeacherError):
            metrics.engine_failed(e.reason if isinstance(e, TeacherError) else "INTERNAL")
        status = to_status(e)
        code = status[0].name
        await context.abort(*status)
    except asyncio.CancelledError:  # the client gave up or vanished, or its deadline has passed
        remaining_s = context.time_remaining()
        if call.is_answered:
            code = "OK"  # a client that has all of its scores need not wait for the end of the stream
        elif remaining_s is not None and remaining_s <= DEADLINE_SLACK_S:
            code = "DEADLINE_EXCEEDED"
        else:
            code = "CANCELLED"
            metrics.call_cancelled()
        raise
    finally:
        total_s = time.monotonic() - call.began
        metrics.call_ended(method, code, total_s)
        call.log(method, code, total_s, error)
        call.request = b""


async def score(
    call: Call,
    work: Work,
    context: grpc.aio.ServicerContext,
    *,
    queue: FairQueue,
    metrics: Metrics,
    on_queued: Callable[[], None],
) -> None:
    """Queues an admitted call, scores it and writes the scores to `context`.

    Args:
        on_queued: called once the call stands in the queue.

    Raises:
        OverloadedError: the queue is full.
        DeadlineError: the call's deadline passed in the queue.
        TeacherError: the engine failed, or returned an impossible result.
    """
    sizes = [len(sequence.token_ids) for sequence in work.sequences]
    remaining_s = context.time_remaining()
    call.entry = queue.enter(
        call.client,
        [sum(sizes[piece.start : piece.stop]) for piece in work.pieces],
        deadline=None if remaining_s is None else asyncio.get_running_loop().time() + remaining_s,
    )
    on_queued()
    call.num_unfinished = len(work.pieces)
    pumps = [asyncio.create_task(_pump(work, call, number, metrics)) for number in range(len(work.pieces))]
    try:
        await _send(context, call, work, metrics)
    finally:
        for pump in pumps:
            pump.cancel()
        # Wait until the engine's iterators are closed: when a call is over, its remaining work has been cancelled.
        await asyncio.gather(*pumps, return_exceptions=True)
        call.entry.leave()
        call.report(metrics)


async def _send(context: grpc.aio.ServicerContext, call: Call, work: Work, metrics: Metrics) -> None:
    """Writes scores as they arrive, until all are written."""
    options = work.options
    chunk_bytes = min(options.max_chunk_bytes or codec.DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES)
    pending: list[tuple[int, int, TokenScores]] = []
    pending_bytes = 0

    async def flush() -> None:
        nonlocal pending, pending_bytes
        if pending:
            runs, pending, pending_bytes = pending, [], 0
            data = codec.encode_response(runs, info=work.info, temperature=options.temperature)
            await context.write(data)
            metrics.bytes_sent(len(data))
            call.report(metrics)

    while True:
        if not await call.wait(FLUSH_S if pending else None):
            await flush()  # nothing else has finished in time
            continue
        item = call.get()
        if item is None:
            call.is_answered = True
            break
        if isinstance(item, Exception):
            raise item
        index, scores, num_bytes = item
        if pending_bytes + num_bytes > chunk_bytes:
            await flush()
        if num_bytes > chunk_bytes:
            for first, part in codec.split_scores(scores, chunk_bytes):
                pending = [(index, first, part)]
                await flush()
        else:
            pending.append((index, 0, scores))
            pending_bytes += num_bytes
    await flush()


async def _pump(work: Work, call: Call, number: int, metrics: Metrics) -> None:
    """Moves the checked results of one piece from the engine to the call; always closes the engine's iterator."""
    assert call.entry is not None
    try:
        await call.entry.turn(number)
        if number == 0:
            call.queue_s = time.monotonic() - call.began
            metrics.call_left_queue(call.queue_s)
        await _score_piece(work, call, number)
        call.num_unfinished -= 1
        if not call.num_unfinished:
            call.put(None)
    except Exception as e:
        call.put(e)


async def _score_piece(work: Work, call: Call, number: int) -> None:
    engine, info, options, piece = work.engine, work.info, work.options, work.pieces[number]
    assert call.entry is not None
    sequences = work.sequences[piece.start : piece.stop]
    checker = ResultChecker(engine.name, sequences, piece, top_k=options.top_k, info=info)
    try:
        results = engine.score(
            sequences,
            top_k=options.top_k,
            temperature=options.temperature,
            adapter=info.model if info.base_model else "",
        )
        async with contextlib.aclosing(results):  # type: ignore[type-var]
            async for index, scores in results:
                checker.check(index, scores)
                num_tokens = len(sequences[index].token_ids)
                call.count_scored(num_tokens, len(scores.logprobs))
                call.put((piece[index], scores, codec.response_bytes(scores)))
                call.entry.scored(number, num_tokens)
    finally:
        call.entry.done(number)  # after the iterator is closed: work that has stopped makes room for others
    checker.check_complete()
