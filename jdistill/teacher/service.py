"""The gRPC services: requests are validated and admitted before the engine sees them, results checked before they go.

The handlers take and give bytes (the codec's), so that a request that is not one is answered as INVALID_ARGUMENT, and
arrays go out without a copy in between. Token ids and bearer tokens are never logged.

Dimension key: P scored positions of one sequence, K teacher top-k, C candidates.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from google.protobuf import message

import jdistill
from jdistill.config import TeacherServerConfig
from jdistill.teacher.admission import Admission, Entry
from jdistill.teacher.engines.base import Engine
from jdistill.teacher.metrics import Metrics
from jdistill.wire import channel, codec
from jdistill.wire.errors import (
    DeadlineError,
    EngineDeadError,
    FingerprintMismatchError,
    InvalidRequestError,
    ModelNotFoundError,
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
CHECK_EVERY_S = 1.0  # between two looks at whether the engine lives
CLIENT_KEY = "jdistill-client"  # metadata: who shares the queue with others; without it, the peer's address


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
        self._transition = asyncio.Lock()  # one change between sleep and wake at a time
        self._tasks: set[asyncio.Task[None]] = set()
        self.state = ServerState.LOADING
        self.dead = asyncio.Event()

    async def serve(self, engine: Engine) -> None:
        """From now on calls are answered by `engine`."""
        self._engine = engine
        self._models = {engine.info.model: engine.info, **engine.adapters}
        self._refusal = None
        await self._enter(ServerState.SERVING)
        self._spawn(self._watch())

    async def refuse(self, error: UnavailableError) -> None:
        """From now on new calls end with `error`; those that run go on."""
        self._refusal = error
        await self._enter(ServerState.DRAINING)
        if self._admission.queued_tokens and not self._admission.running_tokens:
            self._admission.fail_waiting(error)  # they wait for an engine that sleeps

    async def wait_until_idle(self) -> None:
        """Returns when no call runs."""
        await self._idle.wait()

    @property
    def num_calls(self) -> int:
        """Scoring calls that run or wait now."""
        return len(self._calls)

    def fail_running(self, error: UnavailableError) -> None:
        """Ends every call with `error`; what it has already been sent stays sent."""
        self._admission.fail_waiting(error)
        for call in self._calls:
            call.put(error)

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

    # ---- state ----

    def _serving_engine(self) -> Engine:
        if self._refusal is not None:
            raise self._refusal
        assert self._engine is not None
        return self._engine

    async def _enter(self, state: ServerState) -> None:
        if state is not self.state:
            self.state = state
            self._metrics.state_changed(state)
            await self._on_state(state)

    async def _die(self, error: EngineDeadError) -> None:
        if not self.dead.is_set():
            self._metrics.engine_failed(error.reason)
            self._refusal = error
            self.dead.set()
            self.fail_running(error)
            await self._enter(ServerState.DRAINING)

    async def _watch(self) -> None:
        """Finds out that the engine has died while nobody scores."""
        while not self.dead.is_set():
            await asyncio.sleep(CHECK_EVERY_S)
            if self.state is not ServerState.SERVING:
                continue
            try:
                await self._serving_engine().check()
            except EngineDeadError as e:
                logger.error("the engine is dead: %s", e)
                await self._die(e)
            except UnavailableError:
                continue  # we shut down
            except Exception:  # what a check cannot find out is no reason to end
                logger.exception("the check of the engine failed")

    async def _change(self, to: ServerState) -> None:
        """Sleep or wake; does nothing if it is so already."""
        async with self._transition:
            engine = self._serving_engine()
            if not engine.can_sleep:
                raise UnsupportedError(
                    f"the {engine.name} engine ({engine.version}) of teacher {self._model!r} cannot sleep here; start "
                    "it with --offload, if that engine can on this platform"
                )
            if self.state is to:
                return
            if to is ServerState.SLEEPING:
                self._admission.pause()
                try:
                    await self._admission.wait_until_nothing_runs()
                    self._serving_engine()  # it may have died, or we shut down meanwhile
                    begin = time.monotonic()
                    await engine.sleep()
                except EngineDeadError as e:
                    await self._die(e)
                    raise
                except BaseException:
                    self._admission.resume()
                    raise
                await self._enter(ServerState.SLEEPING)
                logger.info("asleep, in %.1f s", time.monotonic() - begin)
                if self._admission.queued_tokens:
                    self._called_in_sleep()
                return
            begin = time.monotonic()
            expected = {name: info.fingerprint for name, info in self._models.items()}
            try:
                await engine.wake()
                got = {info.model: info.fingerprint for info in (engine.info, *engine.adapters.values())}
                if got != expected:
                    raise EngineDeadError(
                        f"teacher {self._model!r} woke with other weights than it fell asleep with: its checkpoint was "
                        "changed. It ends, so that clients see another teacher rather than other numbers"
                    )
            except EngineDeadError as e:
                await self._die(e)
                raise
            except Exception as e:
                error = EngineDeadError(f"teacher {self._model!r} could not wake: {type(e).__name__}: {e}")
                await self._die(error)
                raise error from e
            await self._enter(ServerState.SERVING)
            logger.info("awake, in %.1f s", time.monotonic() - begin)
            self._admission.resume()

    def _called_in_sleep(self) -> None:
        """Something waits for an engine that sleeps."""
        if self._config.on_sleep == "wake":
            self._spawn(self._wake_for_scores())
        else:
            self._admission.fail_waiting(self._asleep())

    async def _wake_for_scores(self) -> None:
        try:
            await self._change(ServerState.SERVING)
        except TeacherError as e:
            logger.error("a score arrived in sleep, and the engine did not wake: %s", e)
            self._admission.fail_waiting(e if isinstance(e, UnavailableError) else UnavailableError(str(e)))

    def _asleep(self) -> UnavailableError:
        return UnavailableError(
            f"teacher {self._model!r} is asleep, and --on-sleep is refuse: call Wake (TeacherClient.wake()) first"
        )

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Ends the tasks of its own."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- methods ----

    async def _unary(
        self,
        method: str,
        request: bytes,
        kind: type[message.Message],
        context: grpc.aio.ServicerContext,
        answer: Callable[[], Awaitable[bytes]],
    ) -> bytes:
        began = time.monotonic()
        try:
            try:
                kind.FromString(request)
            except message.DecodeError as e:
                raise InvalidRequestError(f"not a {kind.DESCRIPTOR.full_name}: {e}") from None
            reply = await answer()
        except Exception as e:
            self._log_failure(method, "", e)
            status = to_status(e)
            self._metrics.call_ended(method, status[0].name, time.monotonic() - began)
            await context.abort(*status)
            raise AssertionError("abort() raises") from e
        self._metrics.call_ended(method, "OK", time.monotonic() - began)
        return reply

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
            await self._change(ServerState.SLEEPING)
            return teacher_pb2.SleepResponse(state=self.state).SerializeToString()

        return await self._unary("Sleep", request, teacher_pb2.SleepRequest, context, answer)

    async def _wake(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async def answer() -> bytes:
            await self._change(ServerState.SERVING)
            return teacher_pb2.WakeResponse(state=self.state).SerializeToString()

        return await self._unary("Wake", request, teacher_pb2.WakeRequest, context, answer)

    async def _score_sequences(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        # A coroutine that writes rather than an async generator: a cancellation lands in this frame wherever we are, so
        # the engine's iterator is closed at once and not when the garbage collector finds it.
        call = _Call(client_of(context))
        self._calls.add(call)
        self._idle.clear()
        code = "OK"
        try:
            await self._score(request, context, call)
        except Exception as e:
            if isinstance(e, EngineDeadError):
                await self._die(e)
            elif isinstance(e, EngineResultError) or not isinstance(e, TeacherError):
                reason = e.reason if isinstance(e, TeacherError) else "INTERNAL"
                self._metrics.engine_failed(reason)
            self._log_failure("ScoreSequences", call.request_id, e)
            status = to_status(e)
            code = status[0].name
            await context.abort(*status)
        except asyncio.CancelledError:  # the client gave up or is gone, or its deadline has passed
            code = "CANCELLED"
            self._metrics.call_cancelled()
            raise
        finally:
            total_s = time.monotonic() - call.began
            self._metrics.call_ended("ScoreSequences", code, total_s)
            logger.log(
                logging.INFO if code == "OK" else logging.DEBUG,
                "request %r of %s: %s, %d sequences, %d tokens, %d positions, %.3f s, %.3f s of them in the queue",
                call.request_id[:64],
                call.client,
                code,
                call.sequences,
                call.tokens,
                call.positions,
                total_s,
                call.queue_s,
                extra={
                    "request_id": call.request_id[:64],
                    "client": call.client,
                    "code": code,
                    "model": call.model,
                    "sequences": call.sequences,
                    "tokens": call.tokens,
                    "positions": call.positions,
                    "queue_s": round(call.queue_s, 6),
                    "total_s": round(total_s, 6),
                },
            )
            self._calls.discard(call)
            if not self._calls:
                self._idle.set()

    def _model_info(self, name: str) -> ModelInfo:
        info = self._models.get(name or self._serving_engine().info.model)
        if info is None:
            raise ModelNotFoundError(
                f"no model {name!r} here; this teacher serves {', '.join(map(repr, self._models))}", field="model"
            )
        return info

    async def _score(self, request: bytes, context: grpc.aio.ServicerContext, call: _Call) -> None:
        engine = self._serving_engine()
        sequences, options = codec.decode_request(request)
        call.request_id = options.request_id
        info = self._model_info(options.model)
        call.model = info.model
        if options.expected_fingerprint and options.expected_fingerprint != info.fingerprint:
            raise FingerprintMismatchError(
                f"expected the model with fingerprint {options.expected_fingerprint[:16]}..., teacher {info.model!r} "
                f"has {info.fingerprint[:16]}...: it serves other weights, or another dtype, than when the run began"
            )
        validate_request(sequences, info=info, top_k=options.top_k, temperature=options.temperature)
        sequences = [sequence.as_scored() for sequence in sequences]
        remaining_s = context.time_remaining()
        if remaining_s is not None and remaining_s <= 0:
            raise DeadlineError("the deadline passed before the request reached the engine")
        if self.state is ServerState.SLEEPING and self._config.on_sleep == "refuse":
            raise self._asleep()
        sizes = [len(sequence.token_ids) for sequence in sequences]
        call.sequences, call.tokens = len(sequences), sum(sizes)
        pieces = self._admission.cut(sizes) if sequences else []
        entry = self._admission.enter(call.client, [sum(sizes[i] for i in piece) for piece in pieces])
        try:
            if self.state is ServerState.SLEEPING and self._admission.queued_tokens:
                self._called_in_sleep()
            adapter = info.model if info.base_model else ""
            deadline = None if remaining_s is None else time.monotonic() + remaining_s
            await self._answer(context, call, engine, info, sequences, options, entry, pieces, adapter, deadline)
        finally:
            entry.leave()

    async def _answer(
        self,
        context: grpc.aio.ServicerContext,
        call: _Call,
        engine: Engine,
        info: ModelInfo,
        sequences: list[SequenceToScore],
        options: codec.RequestOptions,
        entry: Entry,
        pieces: Sequence[range],
        adapter: str,
        deadline: float | None,
    ) -> None:
        """Scores the pieces as their turns come, and writes what has been scored."""
        chunk_bytes = min(options.max_chunk_bytes or codec.DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES)
        call.num_unfinished = len(pieces)
        if not pieces:
            call.put(None)
        pumps = []
        for number, piece in enumerate(pieces):
            part = sequences[piece.start : piece.stop] if len(pieces) > 1 else sequences
            pumps.append(
                asyncio.create_task(
                    _pump(
                        engine, part, piece.start, options, info, adapter, call, entry, number, deadline, self._metrics
                    )
                )
            )
        pending: list[tuple[int, int, TokenScores]] = []
        pending_bytes = 0

        async def flush() -> None:
            nonlocal pending, pending_bytes
            if pending:
                runs, pending, pending_bytes = pending, [], 0
                data = codec.encode_response(runs, info=info, temperature=options.temperature)
                self._metrics.bytes_sent(len(data))
                await context.write(data)

        try:
            while True:
                if not await call.wait(FLUSH_S if pending else None):
                    await flush()  # nothing else has finished in time
                    continue
                item = call.get()
                if item is None:
                    break
                if isinstance(item, Exception):
                    raise item
                index, scores = item
                call.positions += len(scores.logprobs)
                self._metrics.sequence_scored(len(sequences[index].token_ids), len(scores.logprobs))
                num_bytes = codec.response_bytes(scores)
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
        finally:
            for pump in pumps:
                pump.cancel()
            # Waits until the engine's iterators are closed: the work that is left is cancelled when the call is over.
            await asyncio.gather(*pumps, return_exceptions=True)

    def _log_failure(self, method: str, request_id: str, error: Exception) -> None:
        """One line for what we answer on purpose, a traceback for what nobody expected; no content of the request."""
        expected = isinstance(error, TeacherError)
        trace = "" if expected else "\n" + "".join(traceback.format_exception(error))
        reason = error.reason if expected else "INTERNAL"
        logger.log(
            logging.WARNING if expected else logging.ERROR,
            "%s request %r failed: %s%s",
            method,
            request_id[:64],
            reason,
            trace,
            extra={"request_id": request_id[:64], "method": method, "reason": reason},
        )


def client_of(context: grpc.aio.ServicerContext) -> str:
    """Who shares the queue with others: the metadata's name, or the peer's address without its port."""
    metadata: Mapping[str, Any] = dict(context.invocation_metadata() or ())
    if name := metadata.get(CLIENT_KEY):
        return str(name)[:64]
    return context.peer().rpartition(":")[0] or context.peer()


class _Call:
    """What one call waits for: results, an error or the end (None). Never blocks the one who puts."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.began = time.monotonic()
        self.request_id = self.model = ""
        self.sequences = self.tokens = self.positions = 0
        self.queue_s = 0.0
        self.num_unfinished = 0  # pieces
        self._items: collections.deque[tuple[int, TokenScores] | Exception | None] = collections.deque()
        self._arrived = asyncio.Event()

    def put(self, item: tuple[int, TokenScores] | Exception | None) -> None:
        if isinstance(item, Exception):
            self._items.clear()  # what is not yet sent is of no use in a call that fails
        self._items.append(item)
        self._arrived.set()

    def get(self) -> Any:
        item = self._items.popleft()
        if not self._items:
            self._arrived.clear()
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


async def _pump(
    engine: Engine,
    sequences: list[SequenceToScore],
    first: int,
    options: codec.RequestOptions,
    info: ModelInfo,
    adapter: str,
    call: _Call,
    entry: Entry,
    piece: int,
    deadline: float | None,
    metrics: Metrics,
) -> None:
    """Moves checked results of one piece from the engine to the call; closes the engine's iterator however it ends."""
    unscored = set(range(len(sequences)))
    try:
        await entry.turn(piece)
        if piece == 0:
            call.queue_s = time.monotonic() - entry.queued_at
            metrics.call_left_queue(call.queue_s)
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlineError("the deadline passed before the request reached the engine")
        results = engine.score(sequences, top_k=options.top_k, temperature=options.temperature, adapter=adapter)
        async with contextlib.aclosing(results):  # type: ignore[type-var]
            async for index, scores in results:
                if index not in unscored:
                    raise EngineResultError(
                        f"the {engine.name} engine scored sequence {first + index} twice, or has no such one"
                    )
                unscored.remove(index)
                check_scores(sequences[index], scores, top_k=options.top_k, info=info, index=first + index)
                call.put((first + index, scores))
        if unscored:
            raise EngineResultError(
                f"the {engine.name} engine left {len(unscored)} of {len(sequences)} sequences unscored"
            )
        entry.done(piece)
        call.num_unfinished -= 1
        if not call.num_unfinished:
            call.put(None)
    except Exception as e:
        call.put(e)


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
        # Written so that NaN fails too: every comparison with it is false.
        elif not (np.isfinite(values).all() and (values <= 0).all()):
            raise EngineResultError(f"the engine returned {name} for sequence {index} that are not finite or above 0")
