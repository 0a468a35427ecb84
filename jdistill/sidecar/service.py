"""The gRPC methods, each a few lines: what they call stands in admission.py, call.py and lifecycle.py.

The handlers take and return bytes (see wire/codec.py): a request that does not parse is answered with INVALID_ARGUMENT,
and arrays are sent without a copy in between. Token ids and bearer tokens are never logged.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import grpc
from google.protobuf import message

import jdistill
from jdistill.config import TeacherServerConfig
from jdistill.sidecar import call as calls
from jdistill.sidecar.admission import admit
from jdistill.sidecar.call import Call, OpenCalls
from jdistill.sidecar.fair_queue import FairQueue
from jdistill.sidecar.lifecycle import Lifecycle
from jdistill.sidecar.metrics import Metrics
from jdistill.wire import channel, codec
from jdistill.wire.errors import InvalidRequestError
from jdistill.wire.types import ServerInfo, ServerState
from jdistill.wire.v1 import teacher_pb2


class TeacherService:
    """TeacherService and TeacherControlService over one engine; `lifecycle` decides what is answered.

    Args:
        model: the served name, for messages.
        config: limits, and what a score does that arrives while the engine sleeps.
        metrics: kept up to date.
        on_state: awaited at each change of the lifecycle's state.
    """

    def __init__(
        self,
        model: str,
        config: TeacherServerConfig,
        *,
        metrics: Metrics,
        on_state: Callable[[ServerState], Awaitable[None]],
    ):
        self._config = config
        self._instance_id = uuid.uuid4().hex
        self.metrics = metrics
        self.open_calls = OpenCalls()
        self.queue = FairQueue(max_running_tokens=config.max_running_tokens, max_queued_tokens=config.max_queued_tokens)
        self.lifecycle = Lifecycle(
            model, config, calls=self.open_calls, queue=self.queue, metrics=metrics, on_state=on_state
        )
        metrics.watch(
            queued_tokens=lambda: self.queue.queued_tokens,
            running_tokens=lambda: self.queue.running_tokens,
            open_calls=lambda: len(self.open_calls),
        )

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """Returns the handlers for `grpc.aio.Server.add_generic_rpc_handlers`."""
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

    async def _score_sequences(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        # A coroutine that writes rather than an async generator: a cancellation lands in this frame wherever it is, so
        # the engine's iterator is closed at once and not when the garbage collector finds it.
        call = Call(calls.client_of(context))
        call.request = request
        del request  # gRPC keeps this frame of an aborted call until the next garbage collection (measured)
        with self.open_calls.holding(call):
            async with self._answering("ScoreSequences", context, call):
                await self._score(context, call)

    async def _score(self, context: grpc.aio.ServicerContext, call: Call) -> None:
        lifecycle, queue = self.lifecycle, self.queue
        work = admit(call, context.time_remaining(), lifecycle=lifecycle, queue=queue)
        if work is None:
            return

        def on_queued() -> None:
            if lifecycle.state is ServerState.SLEEPING:
                lifecycle.wake_for_scores()

        await calls.score(call, work, context, queue=queue, metrics=self.metrics, on_queued=on_queued)

    async def _get_server_info(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async def answer() -> bytes:
            engine = self.lifecycle.engine
            return codec.encode_server_info(
                ServerInfo(
                    server_version=jdistill.__version__,
                    instance_id=self._instance_id,
                    engine=self._config.engine,
                    engine_version="" if engine is None else engine.version,
                    models=tuple(self.lifecycle.models.values()),
                    max_request_bytes=channel.MAX_MESSAGE_BYTES,
                    # A teacher that is told to stop while it loads has no model to name.
                    state=ServerState.LOADING if engine is None else self.lifecycle.state,
                    can_sleep=engine is not None and engine.can_sleep,
                    wake_on_score=self._config.on_sleep == "wake",
                    max_queued_tokens=self._config.max_queued_tokens,
                )
            )

        return await self._unary("GetServerInfo", request, teacher_pb2.GetServerInfoRequest, context, answer)

    async def _sleep(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async def answer() -> bytes:
            await self.lifecycle.sleep()
            return teacher_pb2.SleepResponse(state=ServerState.SLEEPING).SerializeToString()

        return await self._unary("Sleep", request, teacher_pb2.SleepRequest, context, answer)

    async def _wake(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        async def answer() -> bytes:
            await self.lifecycle.wake()
            return teacher_pb2.WakeResponse(state=ServerState.SERVING).SerializeToString()

        return await self._unary("Wake", request, teacher_pb2.WakeRequest, context, answer)

    async def _unary(
        self,
        method: str,
        request: bytes,
        kind: type[message.Message],
        context: grpc.aio.ServicerContext,
        answer: Callable[[], Awaitable[bytes]],
    ) -> bytes:
        async with self._answering(method, context, Call(calls.client_of(context))):
            try:
                kind.FromString(request)
            except message.DecodeError as e:
                raise InvalidRequestError(f"not a {kind.DESCRIPTOR.full_name}: {e}") from None
            return await answer()
        raise AssertionError("abort() raises")

    def _answering(
        self, method: str, context: grpc.aio.ServicerContext, call: Call
    ) -> AbstractAsyncContextManager[None]:
        return calls.answering(method, context, call, metrics=self.metrics, on_engine_dead=self.lifecycle.die)
