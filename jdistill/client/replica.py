"""One sidecar as the client sees it: its channel, what is known of it, and what it has to do.

Its channel does without gRPC's health checks: GetServerInfo says more (loading, asleep, draining), in every state, and
a sleeping server that is not "serving" can still be woken.
"""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import grpc
import grpc.aio

from jdistill.client import agreement
from jdistill.client.token import BearerToken
from jdistill.wire import codec, credentials, status
from jdistill.wire.channel import client_options, service_config
from jdistill.wire.errors import TeacherError, UnauthenticatedError, UnavailableError, UnsupportedError
from jdistill.wire.types import ModelInfo, ServerInfo

MAX_BACKOFF_S = 3.0  # between two probes of a dead replica; a probe is cheap, an idle trainer is not
MAX_CALL_BYTES = 1 << 20  # of token ids, spans and candidates in one call of several sequences; below anybody's limit
MAX_PAUSE_S = 300.0  # of a replica that hangs: so long does it take at most to notice that it works again
REQUEST_OVERHEAD_BYTES = 4096  # names, fingerprint, field tags

_DECAY = 0.8  # of a Pace at each call: about the last five count
_SLEEP_METHOD = f"/{codec.CONTROL_SERVICE}/Sleep"
_WAKE_METHOD = f"/{codec.CONTROL_SERVICE}/Wake"


class HopelessError(TeacherError):
    """Waiting cannot help: wrong TLS credentials."""


class Pace:
    """Usual seconds a token of a replica's calls, queues included.

    A ratio of sums, so that small calls, which are mostly overhead, weigh little.
    """

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    def add(self, seconds: float, num_tokens: int) -> None:
        """A call took so long while so many tokens were outstanding at its replica, its own included."""
        self._seconds = _DECAY * self._seconds + seconds
        self._tokens = _DECAY * self._tokens + num_tokens

    @property
    def s_per_token(self) -> float | None:
        """None: no call has ended yet."""
        return self._seconds / self._tokens if self._tokens else None


class Replica:
    """One endpoint of one teacher; see TeacherClient for the arguments. `limit` of its calls may be under way."""

    def __init__(
        self,
        endpoint: str,
        *,
        model: str,
        tls: grpc.ChannelCredentials | None,
        token: BearerToken | None,
        client_id: str,
        max_in_flight: int,
    ):
        self.endpoint = endpoint
        self._tls = tls is not None
        if tls is None:
            self.channel = grpc.aio.insecure_channel(endpoint, _options())
        else:
            self.channel = grpc.aio.secure_channel(endpoint, tls, _options())
        self._model_name = model
        self._token = token
        self._metadata = (("jdistill-client", client_id),)  # by which the server is fair
        # Without serializers gRPC hands bytes through: the codec reads them.
        self._score = self.channel.unary_stream(codec.SCORE_METHOD)
        self._info = self.channel.unary_unary(codec.INFO_METHOD)
        self._sleep = self.channel.unary_unary(_SLEEP_METHOD)
        self._wake = self.channel.unary_unary(_WAKE_METHOD)
        self.info: ServerInfo | None = None  # as of the last answer
        self.ready = False
        self.refused: TeacherError | None = None  # it answers, but not as the teacher of this run, or not to us
        self.lost = asyncio.Event()
        self.failures = 0  # in a row
        self.error = "not tried yet"
        self.paused_until = 0.0  # loop time; an overloaded or hung server is left alone until then
        self.calls = 0
        self.outstanding_tokens = 0
        self.pace = Pace()
        self.message_at = 0.0  # loop time of the last message of any call
        self.stalls = 0  # in a row
        self._max_in_flight = max_in_flight
        self._limit = float(max_in_flight)
        self._reduced_at = 0.0

    # ---- what it is asked ----

    def score(self, request: bytes, token: str | None, timeout_s: float) -> Any:
        """Starts a call; an asynchronous iterator of messages."""
        return self._score(request, timeout=timeout_s, metadata=self._headers(token))

    async def look(self, timeout_s: float) -> ServerInfo:
        """GetServerInfo, in any state; a TeacherError if it fails."""
        data = await self._unary(self._info, timeout_s)
        if data is None:  # gRPC's, when the reply was lost on its way but its end was not
            raise UnavailableError(f"{self.endpoint}: GetServerInfo ended without a reply")
        self.info = codec.decode_server_info(data)
        return self.info

    async def ask(self, timeout_s: float) -> ServerInfo:
        """GetServerInfo of a server that would take a score now; a TeacherError if it fails or would not."""
        info = await self.look(timeout_s)
        try:
            agreement.check_up(info, self.endpoint)
        except TeacherError as e:
            self.error = str(e)
            raise
        return info

    async def sleep(self, timeout_s: float) -> None:
        """Frees its memory; UnsupportedError where it cannot."""
        self.check_can_sleep()
        await self._unary(self._sleep, timeout_s)

    async def wake(self, timeout_s: float) -> None:
        """Brings its model back; UnsupportedError where it cannot."""
        self.check_can_sleep()
        await self._unary(self._wake, timeout_s)

    def check_can_sleep(self) -> None:
        """Raises UnsupportedError if it has said that it cannot; what has not answered yet may."""
        if self.info is not None and not self.info.can_sleep:
            raise UnsupportedError(
                f"{self.endpoint}: this teacher (engine {self.info.engine} {self.info.engine_version}) cannot sleep; "
                "start it with --offload on an engine that can, or set teacher.offload: false"
            )

    def model(self, info: ServerInfo) -> ModelInfo:
        """The model that this teacher's scores are asked of; ModelNotFoundError if it has no such."""
        return agreement.pick_model(info, self._model_name, self.endpoint)

    # ---- how much it gets ----

    @property
    def has_room(self) -> bool:
        """Whether another call may begin."""
        return self.calls < int(self._limit)

    @property
    def max_request_bytes(self) -> float:
        """Of a request, as far as the server is concerned."""
        limit = 0 if self.info is None else self.info.max_request_bytes
        return limit or float("inf")

    @property
    def max_queued_tokens(self) -> float:
        """What the server lets wait: a larger call could never be admitted."""
        limit = 0 if self.info is None else self.info.max_queued_tokens
        return limit or float("inf")

    def succeeded(self) -> None:
        """A call ended well: as many more calls as go well in a row, one by one, up to max_in_flight."""
        self.failures = self.stalls = 0
        self._limit = min(float(self._max_in_flight), self._limit + 1 / self._limit)

    def overloaded(self, now: float, started_at: float, retry_after_s: float | None) -> None:
        """The server had no room for a call that began at `started_at`: fewer at a time, and not before it says."""
        if self.slow_down(now, started_at):
            self.failures += 1
        # The server knows when it has room: with an exponential backoff instead, ten clients left its engine idle for
        # two thirds of the time. Jitter upwards, so that who was refused together does not come back together; and only
        # a little, since the server keeps a place for a while.
        wait_s = self.backoff_s() if retry_after_s is None else retry_after_s * random.uniform(1.0, 1.15)
        self.paused_until = max(self.paused_until, now + wait_s)

    def left_behind(self, now: float, silent_s: float) -> None:
        """It has said nothing for `silent_s`, and others are there. It is tried with one call after a pause.

        Each pause is twice as long as the last one: a server that hangs still answers its keepalive and GetServerInfo,
        so only work can tell, and that work waits for nothing.
        """
        self._limit = 1.0
        self.paused_until = max(self.paused_until, now + min(MAX_PAUSE_S, silent_s * 2 ** min(self.stalls, 10)))
        self.stalls += 1

    def slow_down(self, now: float, started_at: float) -> bool:
        """Halves how many calls may be under way, once for all that were at the time; whether it did."""
        if started_at < self._reduced_at:
            return False
        self._limit = max(1.0, min(self._limit, self.calls + 1.0) / 2)
        self._reduced_at = now
        return True

    def backoff_s(self) -> float:
        """Exponential, with jitter: replicas that died together must not be asked together for ever."""
        return min(MAX_BACKOFF_S, 0.1 * 2 ** min(self.failures, 10)) * random.uniform(0.5, 1.0)

    # ---- inside ----

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
        """What to do, if TLS is to blame: gRPC says UNAVAILABLE to that, as it does to a server that is not up yet."""
        if not isinstance(error, UnavailableError):
            return None
        if remedy := credentials.handshake_remedy(failed.details() or ""):
            return remedy
        if self.info is not None or error.reason != UnavailableError.reason:
            return None  # it has answered us: so TLS is as it should be
        return await asyncio.to_thread(credentials.why_closed, self.endpoint, tls=self._tls)

    def _headers(self, token: str | None) -> tuple[tuple[str, str], ...]:
        return self._metadata if token is None else (*self._metadata, ("authorization", f"Bearer {token}"))


def with_remedy(error: UnauthenticatedError) -> UnauthenticatedError:
    """The same error, with what to do."""
    return UnauthenticatedError(
        f"{error}; is the token right, and has it not expired? For one that is rotated, give TeacherClient a function "
        "as token: it is called again when a server refuses the last one"
    )


def _options() -> tuple[tuple[str, int | str], ...]:
    config = json.loads(service_config())
    del config["healthCheckConfig"]  # see above
    options = {**dict(client_options()), "grpc.service_config": json.dumps(config)}
    # http_proxy and its kin are for the internet; a teacher is a neighbour.
    return (*options.items(), ("grpc.enable_http_proxy", 0))
