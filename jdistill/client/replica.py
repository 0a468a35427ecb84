"""One sidecar as the client sees it: its channel, its state, its pace, and how many calls it gets.

The channel does not use gRPC's health checks: GetServerInfo says more (loading, asleep, draining) and answers in every
state, and a sleeping server that is not "serving" can still be woken.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from jdistill.client import agreement
from jdistill.client.identity import Identity
from jdistill.client.token import BearerToken
from jdistill.wire import codec, credentials, status
from jdistill.wire.channel import client_options, service_config
from jdistill.wire.endpoint import Endpoint
from jdistill.wire.errors import TeacherError, UnauthenticatedError, UnavailableError, UnsupportedError
from jdistill.wire.types import ModelInfo, ServerInfo

MAX_BACKOFF_S = 3.0  # between two probes of a dead replica; a probe is cheap, an idle trainer is not
MAX_CALL_BYTES = 1 << 20  # token ids, spans and candidates of one call of several sequences; below every server's limit
MAX_PAUSE_S = 300.0  # for a replica that hangs: the longest time until the client notices that it works again
ONE_ADDRESS_S = 2.0  # for GetServerInfo when the server's identity is checked
PACE_DECAY = 0.8  # per call: about the last five calls count
REQUEST_OVERHEAD_BYTES = 4096  # names, fingerprint, field tags

_SLEEP_METHOD = f"/{codec.CONTROL_SERVICE}/Sleep"
_WAKE_METHOD = f"/{codec.CONTROL_SERVICE}/Wake"


class HopelessError(TeacherError):
    """Wrong TLS credentials: waiting cannot help."""


class Pace:
    """Usual seconds per token of a replica's calls, including the time in its queue.

    A ratio of sums, so that small calls, which are mostly overhead, have little weight.
    """

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    def add(self, seconds: float, num_tokens: int) -> None:
        """Records a call that took `seconds` with `num_tokens` outstanding at its replica, its own included."""
        self._seconds = PACE_DECAY * self._seconds + seconds
        self._tokens = PACE_DECAY * self._tokens + num_tokens

    @property
    def s_per_token(self) -> float | None:
        """Seconds per token; None: no call has ended yet."""
        return self._seconds / self._tokens if self._tokens else None


class Replica:
    """One endpoint of one teacher; see TeacherClient for the arguments. Adapts how many calls may be in flight."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        model: str,
        tls: grpc.ChannelCredentials | None,
        token: BearerToken | None,
        client_id: str,
        max_in_flight: int,
    ):
        self.endpoint = endpoint.text
        self._address = endpoint
        self._identity = Identity(endpoint)
        self._tls = tls
        self.channel = self._open(endpoint.target, _options())
        self._model_name = model
        self._token = token
        self._metadata = (("jdistill-client", client_id),)  # the server's fairness is per client
        # Without serializers gRPC passes bytes through; the codec reads them.
        self._score = self.channel.unary_stream(codec.SCORE_METHOD)
        self._info = self.channel.unary_unary(codec.INFO_METHOD)
        self._sleep = self.channel.unary_unary(_SLEEP_METHOD)
        self._wake = self.channel.unary_unary(_WAKE_METHOD)
        self.info: ServerInfo | None = None  # from its last answer
        self.ready = False
        self.refused: TeacherError | None = None  # it answers, but as another model, or it rejects our token
        self.lost = asyncio.Event()
        self.failures = 0  # in a row
        self.error = "not tried yet"
        self.paused_until = 0.0  # loop time; an overloaded or hung server gets no calls until then
        self.calls = 0
        self.outstanding_tokens = 0
        self.pace = Pace()
        self.message_at = 0.0  # loop time of the last message in any call
        self.stalls = 0  # in a row
        self._max_in_flight = max_in_flight
        self._limit = float(max_in_flight)
        self._reduced_at = 0.0

    # ---- requests ----

    def score(self, request: bytes, token: str | None, timeout_s: float) -> Any:
        """Starts a ScoreSequences call; returns an asynchronous iterator of its messages."""
        return self._score(request, timeout=timeout_s, metadata=self._headers(token))

    async def look(self, timeout_s: float) -> ServerInfo:
        """Calls GetServerInfo, whatever state the server is in.

        Raises:
            TeacherError: the call fails.
            SeveralServersError: the endpoint means several servers.
        """
        info = await self._ask_info(timeout_s)
        await self._identity.check(info.instance_id, self._instance_id, self._instance_at)
        self.info = info
        return info

    async def _ask_info(self, timeout_s: float) -> ServerInfo:
        data = await self._unary(self._info, timeout_s)
        if data is None:  # gRPC returns None if the reply was lost on the way but the end of the call was not
            raise UnavailableError(f"{self.endpoint}: GetServerInfo ended without a reply")
        return codec.decode_server_info(data)

    async def _instance_id(self) -> str:
        return (await self._ask_info(ONE_ADDRESS_S)).instance_id

    async def _instance_at(self, target: str) -> str | None:
        """Instance id of the server at one address of the endpoint's name; None if it does not answer."""
        name = f"{self._address.host}:{self._address.port}"
        options = (("grpc.ssl_target_name_override", self._address.host), ("grpc.default_authority", name))
        token = await self._token.get() if self._token is not None else None
        async with self._open(target, (*_options(), *options)) as channel:
            try:
                data = await channel.unary_unary(codec.INFO_METHOD)(
                    b"", timeout=ONE_ADDRESS_S, metadata=self._headers(token)
                )
            except grpc.aio.AioRpcError:
                return None
        return None if data is None else codec.decode_server_info(data).instance_id

    async def ask(self, timeout_s: float) -> ServerInfo:
        """Calls GetServerInfo; raises TeacherError if that fails or the server would not accept a score now."""
        info = await self.look(timeout_s)
        try:
            agreement.check_up(info, self.endpoint)
        except TeacherError as e:
            self.error = str(e)
            raise
        return info

    async def sleep(self, timeout_s: float) -> None:
        """Frees the server's accelerator memory; raises UnsupportedError if it cannot."""
        self.check_can_sleep()
        await self._unary(self._sleep, timeout_s)

    async def wake(self, timeout_s: float) -> None:
        """Brings the server's model back; raises UnsupportedError if it cannot."""
        self.check_can_sleep()
        await self._unary(self._wake, timeout_s)

    def check_can_sleep(self) -> None:
        """Raises UnsupportedError if the replica reported that it cannot sleep; unknown replicas pass."""
        if self.info is not None and not self.info.can_sleep:
            raise UnsupportedError(
                f"{self.endpoint}: this teacher (engine {self.info.engine} {self.info.engine_version}) cannot sleep; "
                "start it with --offload on an engine that can, or set teacher.offload: false"
            )

    def model(self, info: ServerInfo) -> ModelInfo:
        """The model that scores for this teacher; raises ModelNotFoundError if the server does not serve it."""
        return agreement.pick_model(info, self._model_name, self.endpoint)

    # ---- load ----

    def is_available(self, now: float) -> bool:
        """Whether the replica is up and not paused."""
        return self.ready and self.paused_until <= now

    @property
    def has_room(self) -> bool:
        """Whether another call may begin."""
        return self.calls < int(self._limit)

    @property
    def max_request_bytes(self) -> float:
        """The server's limit on one request."""
        limit = 0 if self.info is None else self.info.max_request_bytes
        return limit or float("inf")

    @property
    def max_queued_tokens(self) -> float:
        """The server's limit on waiting tokens: it could never admit a larger call."""
        limit = 0 if self.info is None else self.info.max_queued_tokens
        return limit or float("inf")

    def succeeded(self) -> None:
        """Records a call that ended well; a full round of them allows one more in flight, up to max_in_flight."""
        self.failures = self.stalls = 0
        self._limit = min(float(self._max_in_flight), self._limit + 1 / self._limit)

    def overloaded(self, now: float, started_at: float, retry_after_s: float | None) -> None:
        """Records that the server had no room for a call begun at `started_at`: fewer calls, and a pause.

        Args:
            retry_after_s: the server's own estimate of the pause; None if it gave none.
        """
        if self.slow_down(now, started_at):
            self.failures += 1
        # The server knows when it has room: with an exponential backoff instead, ten clients left its engine idle for
        # two thirds of the time. The jitter only adds, so that calls refused together do not return together, and only
        # a little, since the server reserves a place for a while.
        wait_s = self.backoff_s() if retry_after_s is None else retry_after_s * random.uniform(1.0, 1.15)
        self.paused_until = max(self.paused_until, now + wait_s)

    def left_behind(self, now: float, silent_s: float) -> None:
        """Pauses a replica that was silent for `silent_s` while others are up, then allows it a single call.

        Each pause is twice as long as the one before: a server that hangs still answers keepalive and GetServerInfo, so
        only a scoring call can tell, and that call waits in vain.
        """
        self._limit = 1.0
        self.paused_until = max(self.paused_until, now + min(MAX_PAUSE_S, silent_s * 2 ** min(self.stalls, 10)))
        self.stalls += 1

    def slow_down(self, now: float, started_at: float) -> bool:
        """Halves the calls allowed in flight, once for all calls in flight at that moment; returns whether it did."""
        if started_at < self._reduced_at:
            return False
        self._limit = max(1.0, min(self._limit, self.calls + 1.0) / 2)
        self._reduced_at = now
        return True

    def backoff_s(self) -> float:
        """Exponential backoff with jitter: replicas that died together must not be probed in step forever."""
        return min(MAX_BACKOFF_S, 0.1 * 2 ** min(self.failures, 10)) * random.uniform(0.5, 1.0)

    # ---- internals ----

    async def _unary(self, method: Any, timeout_s: float) -> bytes | None:
        token = await self._token.get() if self._token is not None else None
        try:
            return await method(b"", timeout=timeout_s, metadata=self._headers(token))
        except grpc.aio.AioRpcError as e:
            failed = e
        if failed.code() is grpc.StatusCode.UNAUTHENTICATED and self._token is not None:
            if await self._token.renew(token):
                try:
                    return await method(b"", timeout=timeout_s, metadata=self._headers(await self._token.get()))
                except grpc.aio.AioRpcError as e:
                    failed = e
        error = status.from_rpc_error(failed, self.endpoint)
        self.error = str(error)
        if isinstance(error, UnauthenticatedError):
            raise with_remedy(error)
        if remedy := await self._tls_mistake(failed, error):
            raise HopelessError(f"{error}; {remedy}")
        raise error

    async def _tls_mistake(self, failed: grpc.aio.AioRpcError, error: TeacherError) -> str | None:
        """Remedy if TLS is to blame: gRPC reports that as UNAVAILABLE, like a server that is not up yet."""
        if not isinstance(error, UnavailableError):
            return None
        if remedy := credentials.handshake_remedy(failed.details() or ""):
            return remedy
        if self.info is not None or error.reason != UnavailableError.reason:
            return None  # it has answered before, so TLS works
        return await asyncio.to_thread(credentials.why_closed, self.endpoint, tls=self._tls is not None)

    def _open(self, target: str, options: Sequence[tuple[str, int | str]]) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(target, options)
        return grpc.aio.secure_channel(target, self._tls, options)

    def _headers(self, token: str | None) -> tuple[tuple[str, str], ...]:
        return self._metadata if token is None else (*self._metadata, ("authorization", f"Bearer {token}"))


def with_remedy(error: UnauthenticatedError) -> UnauthenticatedError:
    """Adds the remedy to the error."""
    return UnauthenticatedError(
        f"{error}; is the token right, and not expired? For a rotated token, pass TeacherClient a function as `token`: "
        "it is called again when a server refuses the last token"
    )


def _options() -> tuple[tuple[str, int | str], ...]:
    config = json.loads(service_config())
    del config["healthCheckConfig"]  # see the module's docstring
    del config["loadBalancingConfig"]  # one server per endpoint, so that Sleep reaches the server that scores
    options = {**dict(client_options()), "grpc.service_config": json.dumps(config)}
    # http_proxy and similar variables are meant for the internet; a teacher is in the same network.
    return (*options.items(), ("grpc.enable_http_proxy", 0))
