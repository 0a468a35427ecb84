"""HTTP connection of a sidecar to the inference server behind it: requests, and what their failures mean.

The client is aiohttp: asynchronous, pooled, and installed wherever vLLM or SGLang is. A cancelled request closes its
connection, which tells both servers that its result is no longer wanted.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import re
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from jdistill.config import ConfigError
from jdistill.wire.errors import InvalidRequestError, TeacherError, UnavailableError

UNAVAILABLE_STATUSES = (429, 502, 503, 504)


class ServerRefusedError(TeacherError):
    """The server answered, but not with scores."""

    reason = "ENGINE_RESULT"


def server_url(text: str) -> str:
    """Returns http://HOST:PORT of a server; a path /v1 at the end, which OpenAI's clients want, is left out.

    Raises:
        ConfigError: it is no such URL.
    """
    url = text.rstrip("/").removesuffix("/v1").rstrip("/")
    expected = "expected http://HOST:PORT or https://HOST:PORT"
    if re.search(r"\s", url):
        raise ConfigError(f"--url {text!r}: it contains spaces; {expected}")
    try:
        parts = urllib.parse.urlsplit(url)
        has_host = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # urlsplit rejects the port or the brackets
        has_host = False
    if not has_host:
        raise ConfigError(f"--url {text}: {expected}")
    if parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"--url {text}: {expected}, without a query; a key goes into engine_args.api_key_file")
    return url


class Connection:
    """A session with one server.

    Args:
        url: as `server_url` returns it.
        engine: the engine's name, for messages.
        timeout_s: for one request.
        api_key_file: holds the key that the server asks for; None: none.
    """

    def __init__(self, url: str, engine: str, *, timeout_s: float, api_key_file: str | None):
        self.url = url
        self._engine = engine
        self._timeout_s = timeout_s
        self._api_key_file = api_key_file
        self._farewells: set[asyncio.Task[None]] = set()
        self.session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Opens the session; raises ConfigError if the key cannot be read."""
        headers = {}
        if self._api_key_file is not None:
            headers["Authorization"] = f"Bearer {_read_key(self._api_key_file)}"
        # No trust_env: http_proxy and similar variables are for the internet, not for a neighbouring server.
        self.session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=10.0),
            # vLLM and SGLang close connections after 5 idle seconds; one must not be reused at that moment.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
            headers=headers,
            raise_for_status=False,
        )

    async def close(self) -> None:
        """Closes the session; idempotent."""
        if self.session is not None:
            if self._farewells:
                await asyncio.wait(self._farewells, timeout=1.0)
            session, self.session = self.session, None
            await session.close()

    async def get(self, path: str) -> Any:
        """Returns the JSON of a GET.

        Raises:
            ConfigError: the answer is not JSON; names the URL.
            UnavailableError: no answer, or the server is loading.
        """
        assert self.session is not None
        try:
            async with self.session.get(self.url + path) as reply:
                data = await reply.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise UnavailableError(f"cannot reach {self.url}{path} ({type(e).__name__}: {e})") from None
        if reply.status in UNAVAILABLE_STATUSES:
            raise UnavailableError(f"{self.url}{path} answers {reply.status} {reply.reason}")
        if reply.status != 200:
            raise ConfigError(f"{self.url}{path} answers {reply.status} {reply.reason}: {self._remedy(reply.status)}")
        try:
            return json.loads(data)
        except ValueError:
            raise ConfigError(
                f"{self.url}{path} answers with {reply.content_type}, not JSON: {self._remedy(reply.status)}"
            ) from None

    async def post(
        self, path: str, body: dict[str, Any], *, abandon: Callable[[dict[str, Any]], Awaitable[None]]
    ) -> dict[str, Any]:
        """Returns the JSON object of a scoring request.

        Args:
            abandon: called with `body` when the request is cancelled or fails on the way.

        Raises:
            InvalidRequestError: the server refused the sequence.
            ServerRefusedError: any other answer than a JSON object.
            UnavailableError: no answer, or the server cannot score now.
        """
        assert self.session is not None
        try:
            try:
                async with self.session.post(self.url + path, json=body) as reply:
                    data = await reply.read()
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as e:
                if isinstance(e, aiohttp.ClientConnectorError):
                    raise
                # Most likely an idle connection that the server closed just now; scoring twice does no harm.
                async with self.session.post(self.url + path, json=body) as reply:
                    data = await reply.read()
        except (aiohttp.ClientError, asyncio.CancelledError, TimeoutError, OSError) as e:
            farewell = asyncio.ensure_future(abandon(body))
            self._farewells.add(farewell)
            farewell.add_done_callback(self._farewells.discard)
            if isinstance(e, asyncio.CancelledError):
                raise
            raise UnavailableError(f"{self.url}: {type(e).__name__}: {e}") from None
        if reply.status in UNAVAILABLE_STATUSES:
            raise UnavailableError(f"{self.url} answers {reply.status}: {_excerpt(data)}")
        if reply.status >= 500 and not await self._is_healthy():  # its engine has died
            raise UnavailableError(f"{self.url} answers {reply.status} and is not healthy: {_excerpt(data)}")
        if reply.status in (401, 403):
            raise ServerRefusedError(
                f"{self.url}{path} answers {reply.status}: {_excerpt(data)}: {self._remedy(reply.status)}"
            )
        try:
            parsed = json.loads(data)
        except ValueError:
            raise ServerRefusedError(f"{self.url} answers {reply.status}, not JSON: {_excerpt(data)}") from None
        if reply.status == 400:
            raise InvalidRequestError(f"{self.url} refused a sequence: {_excerpt(data)}")
        if reply.status != 200 or not isinstance(parsed, dict):
            raise ServerRefusedError(f"{self.url} answers {reply.status}: {_excerpt(data)}")
        return parsed

    def _remedy(self, status: int) -> str:
        """What to do about an answer that is not the expected one."""
        if status in (401, 403):
            if self._api_key_file is None:
                return "it wants a key: put it into a file and set engine_args.api_key_file"
            return f"it refuses the key in {self._api_key_file} (engine_args.api_key_file)"
        server = self._engine.removesuffix("-http")
        return f"is this a {server} server, as the engine {self._engine} needs it, and its URL http://HOST:PORT?"

    async def _is_healthy(self) -> bool:
        assert self.session is not None
        try:
            async with self.session.get(self.url + "/health", timeout=aiohttp.ClientTimeout(total=5.0)) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False


def _read_key(file: str) -> str:
    try:
        key = pathlib.Path(file).read_text(encoding="utf-8", errors="replace").strip()
    except OSError as e:
        raise ConfigError(f"engine_args.api_key_file: {file}: {e.strerror}") from None
    if not key or not key.isprintable() or not key.isascii():
        raise ConfigError(f"engine_args.api_key_file: {file} holds no key: expected one line of text")
    return key


def _excerpt(data: bytes) -> str:
    text = data.decode(errors="replace")
    return text if len(text) <= 300 else text[:300] + " ..."
