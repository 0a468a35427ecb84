"""The gRPC service: requests are validated before the engine sees them, results are checked before they leave.

The handlers take and give bytes (the codec's), so that a request that is not one is answered as INVALID_ARGUMENT, and
arrays go out without a copy in between. Token ids are never logged.

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
from typing import Any

import grpc
import numpy as np
from google.protobuf import message

import jdistill
from jdistill.teacher.engines.base import Engine
from jdistill.wire import channel, codec
from jdistill.wire.errors import (
    DeadlineError,
    EngineDeadError,
    FingerprintMismatchError,
    InvalidRequestError,
    ModelNotFoundError,
    TeacherError,
    UnavailableError,
)
from jdistill.wire.status import to_status
from jdistill.wire.types import ModelInfo, SequenceToScore, ServerInfo, TokenScores
from jdistill.wire.v1 import teacher_pb2
from jdistill.wire.validate import validate_request

logger = logging.getLogger(__name__)

# How long a finished sequence waits for another one to share its message: short beside any forward pass, long beside
# the microseconds between the sequences of one batch.
FLUSH_S = 0.0015
MAX_CHUNK_BYTES = 16 << 20  # whatever the client asks: a message must stay far below its limit on one


class TeacherService:
    """ScoreSequences and GetServerInfo over one engine.

    It refuses calls with UNAVAILABLE until `serve(engine)`, and again from `refuse(...)` on. `dead` is set when the
    engine has died for good.
    """

    def __init__(self, model: str):
        self._engine: Engine | None = None
        self._refusal: UnavailableError | None = UnavailableError(f"teacher {model!r} is loading; try again")
        self._instance_id = uuid.uuid4().hex
        self._calls: set[_Call] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.dead = asyncio.Event()

    def serve(self, engine: Engine) -> None:
        """From now on calls are answered by `engine`."""
        self._engine = engine
        self._refusal = None

    def refuse(self, error: UnavailableError) -> None:
        """From now on new calls end with `error`; those that run go on."""
        self._refusal = error

    async def wait_until_idle(self) -> None:
        """Returns when no call runs."""
        await self._idle.wait()

    @property
    def num_calls(self) -> int:
        """Scoring calls that run now."""
        return len(self._calls)

    def fail_running(self, error: UnavailableError) -> None:
        """Ends every running call with `error`; what it has already been sent stays sent."""
        for call in self._calls:
            call.put(error)

    def handler(self) -> grpc.GenericRpcHandler:
        """To be given to `grpc.aio.Server.add_generic_rpc_handlers`."""
        methods = {
            "ScoreSequences": grpc.unary_stream_rpc_method_handler(self._score_sequences),
            "GetServerInfo": grpc.unary_unary_rpc_method_handler(self._get_server_info),
        }
        return grpc.method_handlers_generic_handler(codec.SERVICE, methods)

    def _serving_engine(self) -> Engine:
        if self._refusal is not None:
            raise self._refusal
        assert self._engine is not None
        return self._engine

    async def _get_server_info(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            try:
                teacher_pb2.GetServerInfoRequest.FromString(request)
            except message.DecodeError as e:
                raise InvalidRequestError(f"not a jdistill.wire.v1.GetServerInfoRequest: {e}") from None
            engine = self._serving_engine()
            return codec.encode_server_info(
                ServerInfo(
                    server_version=jdistill.__version__,
                    instance_id=self._instance_id,
                    engine=engine.name,
                    engine_version=engine.version,
                    models=(engine.info, *engine.adapters.values()),
                    max_request_bytes=channel.MAX_MESSAGE_BYTES,
                )
            )
        except Exception as e:
            _log_failure("GetServerInfo", "", e)
            await context.abort(*to_status(e))
            raise AssertionError("abort() raises") from e

    async def _score_sequences(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        # A coroutine that writes rather than an async generator: a cancellation lands in this frame wherever we are, so
        # the engine's iterator is closed at once and not when the garbage collector finds it.
        call = _Call()
        self._calls.add(call)
        self._idle.clear()
        try:
            await self._score(request, context, call)
        except Exception as e:
            if isinstance(e, EngineDeadError):
                self.refuse(e)
                self.dead.set()
            _log_failure("ScoreSequences", call.request_id, e)
            await context.abort(*to_status(e))
        finally:
            self._calls.discard(call)
            if not self._calls:
                self._idle.set()

    async def _score(self, request: bytes, context: grpc.aio.ServicerContext, call: _Call) -> None:
        begin = time.monotonic()
        engine = self._serving_engine()
        sequences, options = codec.decode_request(request)
        call.request_id = options.request_id
        info = engine.info
        if options.model and options.model != info.model:
            raise ModelNotFoundError(
                f"no model {options.model!r} here; this teacher serves {info.model!r}", field="model"
            )
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

        chunk_bytes = min(options.max_chunk_bytes or codec.DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES)
        pump = asyncio.create_task(_pump(engine, sequences, options, call))
        pending: list[tuple[int, int, TokenScores]] = []
        pending_bytes = 0

        async def flush() -> None:
            nonlocal pending, pending_bytes
            if pending:
                runs, pending, pending_bytes = pending, [], 0
                await context.write(codec.encode_response(runs, info=info, temperature=options.temperature))

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
            pump.cancel()
            # Waits until the engine's iterator is closed: the work that is left is cancelled when the call is over.
            await asyncio.gather(pump, return_exceptions=True)
        logger.debug(
            "request %r: %d sequences, %d scored positions in %.3f s",
            options.request_id[:64],
            len(sequences),
            sum(sequence.num_scored for sequence in sequences),
            time.monotonic() - begin,
        )


class _Call:
    """What one call waits for: results, an error or the end (None). Never blocks the one who puts."""

    def __init__(self) -> None:
        self.request_id = ""
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


async def _pump(engine: Engine, sequences: list[SequenceToScore], options: codec.RequestOptions, call: _Call) -> None:
    """Moves checked results from the engine to the call; closes the engine's iterator however it ends."""
    unscored = set(range(len(sequences)))
    try:
        results = engine.score(sequences, top_k=options.top_k, temperature=options.temperature)
        async with contextlib.aclosing(results):  # type: ignore[type-var]
            async for index, scores in results:
                if index not in unscored:
                    raise EngineResultError(
                        f"the {engine.name} engine scored sequence {index} twice, or has no such one"
                    )
                unscored.remove(index)
                check_scores(sequences[index], scores, top_k=options.top_k, info=engine.info, index=index)
                call.put((index, scores))
        if unscored:
            raise EngineResultError(
                f"the {engine.name} engine left {len(unscored)} of {len(sequences)} sequences unscored"
            )
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


def _log_failure(method: str, request_id: str, error: Exception) -> None:
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
    )
