"""The gRPC services: requests are validated and admitted before the engine sees them, results checked before they go.

The handlers take and give bytes (the codec's), so that a request that is not one is answered as INVALID_ARGUMENT, and
arrays go out without a copy in between. Token ids and bearer tokens are never logged.

Dimension key: P scored positions of one sequence, K teacher top-k, C candidates.
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
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import grpc
import numpy as np
from google.protobuf import message

import jdistill
from jdistill.config import TeacherServerConfig
from jdistill.sidecar.admission import Admission, Entry
from jdistill.sidecar.engines.base import Engine
from jdistill.sidecar.metrics import Metrics
from jdistill.wire import channel, codec
from jdistill.wire.errors import (
    DeadlineError,
    EngineDeadError,
    FingerprintMismatchError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    TeacherError,
    UnavailableError,
    UnsupportedError,
)
from jdistill.wire.status import to_status
from jdistill.wire.types import ModelInfo, SequenceToScore, ServerInfo, ServerState, TokenScores
from jdistill.wire.v1 import teacher_pb2
from jdistill.wire.validate import validate_request

logger = logging.getLogger(__name__)

# How long a finished sequence waits for another one to share its message: short beside any forward pass, long beside
# the microseconds between the sequences of one batch.
FLUSH_S = 0.0015
MAX_CHUNK_BYTES = 16 << 20  # whatever the client asks: a message must stay far below its limit on one
# Scores that wait for a client that reads slowly; above that its next piece stays in the queue. 64 x 32k tokens with
# top-64 are 1 GB.
MAX_UNSENT_BYTES = 64 << 20
CHECK_EVERY_S = 1.0  # between two looks at whether the engine lives
ASLEEP_RETRY_S = 2.0  # a training step that leaves the teacher asleep takes seconds to minutes
# A client's deadline is up there a moment earlier than here, so that its cancellation is what arrives.
DEADLINE_SLACK_S = 0.05
CLIENT_KEY = "jdistill-client"  # metadata: who shares the queue with others; without it, the peer's address
MAX_NAME_CHARS = 64  # of a client or a request id, in logs


class TeacherService:
    """TeacherService and TeacherControlService over one engine.

    It refuses to score with UNAVAILABLE until `serve(engine)`, and again from `refuse(...)` on. `dead` is set when the
    engine has died for good.

    Args:
        model: the name to be served, for messages while nothing is.
        config: limits, and what a score does that arrives in sleep.
        metrics: is kept up to date.
        on_state: awaited at each change of `state`.
    """

    def __init__(
        self,
        model: str,
        config: TeacherServerConfig,
        *,
        metrics: Metrics,
        on_state: Callable[[ServerState], Awaitable[None]],
    ):
        self._model = model
        self._config = config
        self._metrics = metrics
        self._on_state = on_state
        self._engine: Engine | None = None
        self._models: dict[str, ModelInfo] = {}
        self._refusal: UnavailableError | None = UnavailableError(f"teacher {model!r} is loading; try again")
        self._instance_id = uuid.uuid4().hex
        self._calls: set[_Call] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._admission = Admission(
            max_running_tokens=config.max_running_tokens, max_queued_tokens=config.max_queued_tokens
        )
        metrics.watch(
            queued_tokens=lambda: self._admission.queued_tokens,
            running_tokens=lambda: self._admission.running_tokens,
            open_calls=lambda: len(self._calls),
        )
        metrics.state_changed(ServerState.LOADING)
        self._telling = asyncio.Lock()  # on_state hears of one change at a time
        self._transition = asyncio.Lock()  # one change between sleep and wake at a time
        self._falling_asleep = False
        self._waking: asyncio.Task[None] | None = None  # for scores that wait
        self._draining = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.state = ServerState.LOADING
        self.dead = asyncio.Event()

    async def serve(self, engine: Engine) -> None:
        """From now on calls are answered by `engine`."""
        self._engine = engine
        self._models = _models_of(engine)
        self._refusal = None
        self._draining.clear()
        await self._enter(ServerState.SERVING)
        self._spawn(self._watch(engine))

    async def refuse(self, error: UnavailableError) -> None:
        """From now on new calls end with `error`; those that run or wait go on, unless the engine sleeps."""
        self._refusal = error
        self._draining.set()
        if self.state is ServerState.SLEEPING:
            self._admission.fail_waiting(error)  # nobody will wake it for them
        await self._enter(ServerState.DRAINING)

    async def wait_until_idle(self) -> None:
        """Returns when no call runs or waits."""
        await self._idle.wait()

    @property
    def num_calls(self) -> int:
        """Scoring calls that run or wait now."""
        return len(self._calls)

    def fail_running(self, error: UnavailableError) -> None:
        """Ends every call with `error`; what it has already been sent stays sent."""
        for call in self._calls:
            call.put(copy.copy(error))

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """To be given to `grpc.aio.Server.add_generic_rpc_handlers`."""
        methods = {
            "ScoreSequences": grpc.unary_stream_rpc_method_handler(self._score_sequences),
            "GetServerInfo": grpc.unary_unary_rpc_method_handler(self._get_server_info),
        }
        control = {
            "Sleep": grpc.unary_unary_rpc_method_handler(self._sleep),
            "Wake": grpc.unary_unary_rpc_method_handler(self._wake),
        }
        return [
            grpc.method_handlers_generic_handler(codec.SERVICE, methods),
            grpc.method_handlers_generic_handler(codec.CONTROL_SERVICE, control),
        ]

    async def close(self) -> None:
        """Ends the tasks of its own; before the engine is closed."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- state ----

    def _serving_engine(self) -> Engine:
        if self._refusal is not None:
            # A copy: a shared error would keep the frames, and the request, of everyone that raises it.
            raise copy.copy(self._refusal)
        assert self._engine is not None
        return self._engine

    async def _enter(self, state: ServerState) -> None:
        """Changes the state, but never back from DRAINING."""
        if state is self.state or (self._refusal is not None and state is not ServerState.DRAINING):
            return
        self.state = state
        self._metrics.state_changed(state)
        async with self._telling:
            await self._on_state(self.state)

    async def _die(self, error: EngineDeadError) -> None:
        """The engine is gone: everything that runs or waits ends now, and so does the process (see `dead`)."""
        if not self.dead.is_set():
            self.dead.set()
            self._metrics.engine_failed(error.reason)
            self.fail_running(error)
            await self.refuse(error)

    async def _watch(self, engine: Engine) -> None:
        """Finds out that the engine has died while nobody scores: in sleep, or with calls that hang."""
        failing = False
        while not self.dead.is_set():
            await asyncio.sleep(CHECK_EVERY_S)
            try:
                await engine.check()
                failing = False
            except EngineDeadError as e:
                logger.error("the engine is dead: %s", e)
                await self._die(e)
            except Exception:  # what a check cannot find out is no reason to end
                if not failing:
                    logger.exception("the check of the engine failed")
                failing = True

    async def _control(self, to: ServerState) -> None:
        # In a task of its own: a client that gives up must not leave an engine that is half asleep.
        await asyncio.shield(self._spawn(self._change(to)))

    async def _change(self, to: ServerState) -> None:
        """Sleep or wake; does nothing if it is so already."""
        async with self._transition:
            engine = self._serving_engine()
            if not engine.can_sleep:
                raise UnsupportedError(
                    f"the {engine.name} engine ({engine.version}) of teacher {self._model!r} cannot sleep here; start "
                    "it with --offload, if that engine can on this platform"
                )
            if self.state is not to:
                begin = time.monotonic()
                await (self._fall_asleep(engine) if to is ServerState.SLEEPING else self._wake_up(engine))
                logger.info("%s after %.1f s", to.name.lower(), time.monotonic() - begin)

    async def _fall_asleep(self, engine: Engine) -> None:
        self._falling_asleep = True
        self._admission.pause()
        try:
            if self._config.on_sleep == "refuse":
                self._admission.fail_waiting(self._asleep())
            if not await self._engine_is_free():
                self._admission.resume()
                self._serving_engine()  # raises why
            try:
                await engine.sleep()
            except Exception as e:
                raise await self._failed(e, "fall asleep") from None
            await self._enter(ServerState.SLEEPING)
        finally:
            self._falling_asleep = False
        if self._refusal is not None:
            self._admission.fail_waiting(self._refusal)
            self._serving_engine()
        if self._admission.queued_tokens:
            self._wake_for_scores()

    async def _engine_is_free(self) -> bool:
        """Waits until nothing runs; False if the server began to shut down before that."""
        free = asyncio.ensure_future(self._admission.wait_until_nothing_runs())
        draining = asyncio.ensure_future(self._draining.wait())
        try:
            await asyncio.wait({free, draining}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            free.cancel()
            draining.cancel()
        return not self._draining.is_set()

    async def _wake_up(self, engine: Engine) -> None:
        try:
            await engine.wake()
        except Exception as e:
            raise await self._failed(e, "wake") from None
        expected = {name: info.fingerprint for name, info in self._models.items()}
        got = {name: info.fingerprint for name, info in _models_of(engine).items()}
        if got != expected:
            changed = ", ".join(repr(name) for name in expected if got.get(name) != expected[name])
            error = FingerprintMismatchError(
                f"teacher {self._model!r} woke with other weights than it fell asleep with ({changed}): was its "
                "checkpoint changed? It ends, so that nobody gets scores of two models"
            )
            await self._die(EngineDeadError(str(error)))
            raise error
        await self._enter(ServerState.SERVING)
        self._admission.resume()

    async def _failed(self, error: Exception, to_do: str) -> EngineDeadError:
        """The error to raise when the engine could not sleep or wake: what is left of it is not to be trusted."""
        if not isinstance(error, EngineDeadError):
            logger.error("the engine could not %s", to_do, exc_info=error)
            error = EngineDeadError(
                f"the engine of teacher {self._model!r} could not {to_do} ({type(error).__name__}; see its log)"
            )
        await self._die(error)
        return error

    def _wake_for_scores(self) -> None:
        """Something waits for an engine that sleeps: wakes it, once for all that wait."""
        if self._waking is None or self._waking.done():
            self._waking = self._spawn(self._change(ServerState.SERVING))

    def _asleep(self) -> UnavailableError:
        error = UnavailableError(
            f"teacher {self._model!r} is asleep, and --on-sleep is refuse: call Wake (TeacherClient.wake()) first"
        )
        error.retry_after_s = ASLEEP_RETRY_S
        return error

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # who waited for it has it; where nobody did, `_die` has told everyone

    # ---- methods ----

    @contextlib.asynccontextmanager
    async def _answering(self, method: str, context: grpc.aio.ServicerContext, call: _Call) -> Any:
        """Turns failures into statuses, and leaves one log record and the metrics of each call."""
        code, error = "OK", None
        try:
            yield
        except Exception as e:
            error = e
            # Else the frames keep the sequences of a call that is turned away as long as gRPC keeps the error.
            traceback.clear_frames(e.__traceback__)
            if isinstance(e, EngineDeadError):
                await self._die(e)
            elif isinstance(e, EngineResultError) or not isinstance(e, TeacherError):
                self._metrics.engine_failed(e.reason if isinstance(e, TeacherError) else "INTERNAL")
            status = to_status(e)
            code = status[0].name
            await context.abort(*status)
        except asyncio.CancelledError:  # the client gave up or is gone, or its deadline has passed
            remaining_s = context.time_remaining()
            if call.is_answered:
                code = "OK"  # a client that has all of its scores need not wait for the end of the stream
            elif remaining_s is not None and remaining_s <= DEADLINE_SLACK_S:
                code = "DEADLINE_EXCEEDED"
            else:
                code = "CANCELLED"
                self._metrics.call_cancelled()
            raise
        finally:
            total_s = time.monotonic() - call.began
            self._metrics.call_ended(method, code, total_s)
            call.log(method, code, total_s, error)
            call.request = b""

    async def _unary(
        self,
        method: str,
        request: bytes,
        kind: type[message.Message],
        context: grpc.aio.ServicerContext,
        answer: Callable[[], Awaitable[bytes]],
    ) -> bytes:
        async with self._answering(method, context, _Call(client_of(context))):
            try:
                kind.FromString(request)
            except message.DecodeError as e:
                raise InvalidRequestError(f"not a {kind.DESCRIPTOR.full_name}: {e}") from None
            return await answer()
        raise AssertionError("abort() raises")

    async def _get_server_info(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async def answer() -> bytes:
            engine = self._engine
            return codec.encode_server_info(
                ServerInfo(
                    server_version=jdistill.__version__,
                    instance_id=self._instance_id,
                    engine=self._config.engine,
                    engine_version="" if engine is None else engine.version,
                    models=tuple(self._models.values()),
                    max_request_bytes=channel.MAX_MESSAGE_BYTES,
                    # A teacher that is told to stop while it loads has no model to name.
                    state=ServerState.LOADING if engine is None else self.state,
                    can_sleep=engine is not None and engine.can_sleep,
                    wake_on_score=self._config.on_sleep == "wake",
                    max_queued_tokens=self._config.max_queued_tokens,
                )
            )

        return await self._unary("GetServerInfo", request, teacher_pb2.GetServerInfoRequest, context, answer)

    async def _sleep(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async def answer() -> bytes:
            await self._control(ServerState.SLEEPING)
            return teacher_pb2.SleepResponse(state=ServerState.SLEEPING).SerializeToString()

        return await self._unary("Sleep", request, teacher_pb2.SleepRequest, context, answer)

    async def _wake(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async def answer() -> bytes:
            await self._control(ServerState.SERVING)
            return teacher_pb2.WakeResponse(state=ServerState.SERVING).SerializeToString()

        return await self._unary("Wake", request, teacher_pb2.WakeRequest, context, answer)

    async def _score_sequences(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        # A coroutine that writes rather than an async generator: a cancellation lands in this frame wherever we are, so
        # the engine's iterator is closed at once and not when the garbage collector finds it.
        call = _Call(client_of(context))
        call.request = request
        del request  # gRPC keeps this frame, of a call that is aborted, until the next garbage collection (measured)
        self._calls.add(call)
        self._idle.clear()
        try:
            async with self._answering("ScoreSequences", context, call):
                await self._score(context, call)
        finally:
            self._calls.discard(call)
            if not self._calls:
                self._idle.set()

    def _model_info(self, name: str) -> ModelInfo:
        info = self._models.get(name) if name else self._serving_engine().info
        if info is None:
            raise ModelNotFoundError(
                f"no model {name!r} here; this teacher serves {', '.join(map(repr, self._models))}", field="model"
            )
        return info

    async def _score(self, context: grpc.aio.ServicerContext, call: _Call) -> None:
        engine = self._serving_engine()
        sequences, options = codec.decode_request(call.request)
        call.request = b""
        call.request_id = options.request_id[:MAX_NAME_CHARS]
        info = self._model_info(options.model)
        call.model = info.model
        if options.expected_fingerprint and options.expected_fingerprint != info.fingerprint:
            raise FingerprintMismatchError(
                f"expected the model with fingerprint {options.expected_fingerprint[:16]}..., teacher {info.model!r} "
                f"has {info.fingerprint[:16]}...: it serves other weights, or another dtype, than when the run began"
            )
        validate_request(sequences, info=info, top_k=options.top_k, temperature=options.temperature)
        if not sequences:
            return
        sequences = [sequence.as_scored() for sequence in sequences]
        remaining_s = context.time_remaining()
        if remaining_s is not None and remaining_s <= 0:
            raise DeadlineError("the deadline passed before the request reached the engine")
        asleep = self.state is ServerState.SLEEPING
        if self._config.on_sleep == "refuse" and (asleep or self._falling_asleep):
            raise self._asleep()
        sizes = [len(sequence.token_ids) for sequence in sequences]
        call.num_sequences, call.num_tokens = len(sequences), sum(sizes)
        work = _Work(engine, info, sequences, options, self._admission.cut(sizes))
        call.entry = self._admission.enter(
            call.client,
            [sum(sizes[piece.start : piece.stop]) for piece in work.pieces],
            deadline=None if remaining_s is None else asyncio.get_running_loop().time() + remaining_s,
        )
        if asleep:
            self._wake_for_scores()
        call.num_unfinished = len(work.pieces)
        pumps = [asyncio.create_task(self._pump(work, call, number)) for number in range(len(work.pieces))]
        try:
            await self._send(context, call, work)
        finally:
            for pump in pumps:
                pump.cancel()
            # Waits until the engine's iterators are closed: the work that is left is cancelled when the call is over.
            await asyncio.gather(*pumps, return_exceptions=True)
            call.entry.leave()
            call.tell(self._metrics)

    async def _send(self, context: grpc.aio.ServicerContext, call: _Call, work: _Work) -> None:
        """Writes what has been scored, until all is."""
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
                self._metrics.bytes_sent(len(data))
                call.tell(self._metrics)

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

    async def _pump(self, work: _Work, call: _Call, number: int) -> None:
        """Moves checked results of one piece from the engine to the call; closes its iterator however it ends."""
        engine, info, options, piece = work.engine, work.info, work.options, work.pieces[number]
        assert call.entry is not None
        try:
            await call.entry.turn(number)
            if number == 0:
                call.queue_s = time.monotonic() - call.began
                self._metrics.call_left_queue(call.queue_s)
            sequences = work.sequences[piece.start : piece.stop]
            unscored = set(range(len(sequences)))
            try:
                results = engine.score(
                    sequences,
                    top_k=options.top_k,
                    temperature=options.temperature,
                    adapter=info.model if info.base_model else "",
                )
                async with contextlib.aclosing(results):  # type: ignore[type-var]
                    async for index, scores in results:
                        place = piece.start + index
                        if index not in unscored:
                            raise EngineResultError(
                                f"the {engine.name} engine scored sequence {place} twice, or has no such one"
                            )
                        unscored.remove(index)
                        sequence = sequences[index]
                        check_scores(sequence, scores, top_k=options.top_k, info=info, index=place)
                        num_tokens = len(sequence.token_ids)
                        call.count_scored(num_tokens, len(scores.logprobs))
                        call.put((place, scores, codec.response_bytes(scores)))
                        call.entry.scored(number, num_tokens)
            finally:
                call.entry.done(number)  # after the iterator is closed: what runs no more makes room for others
            if unscored:
                raise EngineResultError(
                    f"the {engine.name} engine left {len(unscored)} of {len(sequences)} sequences unscored"
                )
            call.num_unfinished -= 1
            if not call.num_unfinished:
                call.put(None)
        except Exception as e:
            call.put(e)


def client_of(context: grpc.aio.ServicerContext) -> str:
    """Who shares the queue with others: the metadata's name, or the peer's address without its port."""
    for key, value in context.invocation_metadata() or ():
        if key == CLIENT_KEY and value:
            return str(value)[:MAX_NAME_CHARS]
    return context.peer().rpartition(":")[0] or context.peer()


def _models_of(engine: Engine) -> dict[str, ModelInfo]:
    return {engine.info.model: engine.info, **engine.adapters}


@dataclasses.dataclass(frozen=True, slots=True)
class _Work:
    """What a call wants of the engine."""

    engine: Engine
    info: ModelInfo
    sequences: list[SequenceToScore]
    options: codec.RequestOptions
    pieces: list[range]


# (index of the sequence, its scores, their bytes), an error, or the end.
_Item = tuple[int, TokenScores, int] | Exception | None


class _Call:
    """One call: what is logged of it, and what it waits for: results, an error or the end (None)."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.began = time.monotonic()
        self.request = b""
        self.request_id = self.model = ""
        self.num_sequences = self.num_tokens = self.num_scored = 0
        self._untold = [0, 0, 0]  # sequences, tokens, positions that were scored since `tell`
        self.queue_s: float | None = None  # None: the engine has got nothing of it
        self.num_unfinished = 0  # pieces
        self.is_answered = False  # gRPC has all scores, or is just getting the last of them
        self.entry: Entry | None = None
        self._unsent_bytes = 0
        self._items: collections.deque[_Item] = collections.deque()
        self._arrived = asyncio.Event()

    def count_scored(self, num_tokens: int, num_scored: int) -> None:
        """The engine has scored one sequence."""
        self.num_scored += num_scored
        untold = self._untold
        untold[0] += 1
        untold[1] += num_tokens
        untold[2] += num_scored

    def tell(self, metrics: Metrics) -> None:
        """Reports what was scored; once for many sequences, since a counter costs as much as the rest of one."""
        if self._untold[0]:
            metrics.sequences_scored(*self._untold)
            self._untold = [0, 0, 0]

    def put(self, item: _Item) -> None:
        """Never blocks."""
        if isinstance(item, tuple):
            self._count_unsent(item[2])
        elif item is not None:
            self._items.clear()  # what is not yet sent is of no use in a call that fails
        self._items.append(item)
        self._arrived.set()

    def get(self) -> Any:
        item = self._items.popleft()
        if not self._items:
            self._arrived.clear()
        if isinstance(item, tuple):
            self._count_unsent(-item[2])
        return item

    async def wait(self, timeout_s: float | None) -> bool:
        """Whether there is something to get, within `timeout_s`."""
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
        """One record: a traceback for what nobody expected, and nothing of the request's content."""
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
            level = logging.DEBUG  # who is turned away comes back several times a second
        else:
            level = logging.INFO
        logger.log(level, "%s", text, exc_info=unexpected, extra=fields)


class EngineResultError(TeacherError):
    """The engine returned what cannot be true; the request may be tried again, the engine is to be mistrusted."""

    reason = "ENGINE_RESULT"


def check_scores(sequence: SequenceToScore, scores: TokenScores, *, top_k: int, info: ModelInfo, index: int) -> None:
    """Checks what an engine says of one sequence: every number there, finite, not above 0; ids in the vocabulary.

    Raises:
        EngineResultError: names the field and the sequence (`index`).
    """
    num_scored = sequence.num_scored
    num_candidates = 0 if sequence.candidate_ids is None else sequence.candidate_ids.shape[1]
    expected: dict[str, tuple[int, ...] | None] = {
        "logprobs": (num_scored,),
        "top_ids": (num_scored, top_k) if top_k else None,
        "top_logprobs": (num_scored, top_k) if top_k else None,
        "candidate_logprobs": (num_scored, num_candidates) if num_candidates else None,
    }
    for name, shape in expected.items():
        values = getattr(scores, name)
        got = None if values is None else values.shape
        if got != shape:
            raise EngineResultError(f"the engine returned {name} of shape {got} for sequence {index}, expected {shape}")
        if values is None:
            continue
        if name == "top_ids":
            if values.min() < 0 or values.max() >= info.vocab_size:
                raise EngineResultError(f"the engine returned {name} outside the vocabulary for sequence {index}")
        # Written so that NaN fails too: it is its array's minimum and maximum, and every comparison with it is false.
        elif not (values.min() > -np.inf and values.max() <= 0):
            raise EngineResultError(f"the engine returned {name} for sequence {index} that are not finite or above 0")
