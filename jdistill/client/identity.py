"""Finds out whether an endpoint is one server: a call such as Sleep would reach only one of several.

A name may resolve to several addresses, and a load balancer may send each call elsewhere. Every server process has an
instance id, which is new after each start; several ids at one endpoint are told from a restart by asking again.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable

from jdistill.wire.endpoint import Endpoint, target_of
from jdistill.wire.errors import TeacherError

NUM_ASKS = 3  # more, of a process that answers for the first time
MAX_ADDRESSES = 8  # asked of a name that has more


class SeveralServersError(TeacherError):
    """An endpoint means several servers; waiting cannot help."""


class Identity:
    """The server processes that have answered at one endpoint."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint
        self._seen: list[str] = []

    async def check(
        self, instance_id: str, ask: Callable[[], Awaitable[str]], ask_at: Callable[[str], Awaitable[str | None]]
    ) -> None:
        """Checks the answer of a process; asks more only if it was not the last one to answer.

        Args:
            instance_id: of the answer; "" (a server that has none) is not checked.
            ask: returns the instance id of the next answer at the endpoint.
            ask_at: the same at one gRPC target; None if nothing answers there.

        Raises:
            SeveralServersError: names them, and the remedy.
        """
        if not instance_id or (self._seen and self._seen[-1] == instance_id):
            return
        answers = [*self._seen, instance_id]
        if instance_id not in self._seen:
            answers += [await ask() for _ in range(NUM_ASKS)]
        changes = [one for one, _ in itertools.groupby(answers)]
        # A process that has ended never answers again, and none restarts twice within a few calls.
        if len(set(changes)) < len(changes) or len(changes) - len(self._seen) > 2:
            latest = ", ".join(sorted(set(changes[-NUM_ASKS - 1 :])))
            raise SeveralServersError(self._message(f"a load balancer stands before instances {latest}"))
        found = await self._by_address(ask_at)
        if len(set(found.values())) > 1:
            whose = ", ".join(f"{target} ({one})" for target, one in found.items())
            raise SeveralServersError(self._message(f"the name stands for {whose}"))
        self._seen = changes

    async def _by_address(self, ask_at: Callable[[str], Awaitable[str | None]]) -> dict[str, str]:
        """Instance ids by address, of a name that has several."""
        endpoint = self._endpoint
        if not endpoint.is_name:
            return {}
        try:
            infos = await asyncio.get_running_loop().getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
        except OSError:
            return {}  # gRPC resolves names in other ways too
        targets = list(dict.fromkeys(target_of(str(place[0]), endpoint.port) for *_, place in infos))[:MAX_ADDRESSES]
        if len(targets) < 2:
            return {}
        ids = await asyncio.gather(*(ask_at(target) for target in targets))
        return {target: one for target, one in zip(targets, ids, strict=True) if one}

    def _message(self, finding: str) -> str:
        return (
            f"{self._endpoint.text}: this endpoint means several servers: {finding}. Sleep, wake and the checks of the "
            "model reach only one of them: give the address of each server as an endpoint, without a balancer"
        )
