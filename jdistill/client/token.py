"""The bearer token: a string, or a function that returns the current one, so that it can be rotated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from jdistill.wire.errors import UnauthenticatedError

FUNCTION_TIMEOUT_S = 30.0


class BearerToken:
    """A token that is kept until a server refuses it. The function runs in a thread, so it may read files or block."""

    def __init__(self, token: str | Callable[[], str]):
        self._function = None if isinstance(token, str) else token
        self._token = token if isinstance(token, str) else None
        self._lock = asyncio.Lock()

    async def get(self) -> str:
        """Returns the token; raises UnauthenticatedError if the function fails."""
        async with self._lock:
            if self._token is None:
                self._token = await self._ask()
            return self._token

    async def renew(self, refused: str | None) -> bool:
        """Replaces the `refused` token, at most once for all calls it was refused to; returns whether it changed."""
        if self._function is None:
            return False
        async with self._lock:
            if self._token == refused:
                self._token = await self._ask()
            return self._token != refused

    async def _ask(self) -> str:
        assert self._function is not None
        try:
            token = await asyncio.wait_for(asyncio.to_thread(self._function), FUNCTION_TIMEOUT_S)
        except TimeoutError:
            raise UnauthenticatedError(f"the token function did not return within {FUNCTION_TIMEOUT_S:g} s") from None
        except Exception as e:
            raise UnauthenticatedError(f"the token function failed with {type(e).__name__}: {e}") from e
        if not isinstance(token, str) or not token.strip():
            raise UnauthenticatedError(f"the token function returned a {type(token).__name__}, expected a string")
        return token.strip()  # a file ends with a newline, which a header must not contain
