"""The replicas of one teacher: preflight and agreement, leaving out and taking back, sleep and wake."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc

from jdistill.client import agreement
from jdistill.client.identity import SeveralServersError
from jdistill.client.replica import MAX_BACKOFF_S, Replica
from jdistill.client.teachers import Teacher
from jdistill.client.token import BearerToken
from jdistill.client.waiting import WaitReport
from jdistill.wire.endpoint import parse_endpoint
from jdistill.wire.errors import (
    DeadlineError,
    FingerprintMismatchError,
    InvalidRequestError,
    TeacherError,
    UnauthenticatedError,
    UnavailableError,
)
from jdistill.wire.types import ModelInfo, ServerInfo

logger = logging.getLogger("jdistill.client")

PROBE_TIMEOUT_S = 10.0  # for one GetServerInfo: it does no work, so a longer silence means a dead server
GRACE_S = 2.0  # for the other replicas once one has answered the preflight: a half-open connection must not delay it


@dataclasses.dataclass(frozen=True)
class Settings:
    """Arguments of TeacherClient that all of its teachers share; documented there."""

    deadline_s: float
    max_in_flight: int
    batch_tokens: int
    hedge_after_s: float | None
    stall_s: float
    expected_tokenizer_fingerprint: str | None
    credentials: grpc.ChannelCredentials | None
    client_id: str


class ReplicaPool:
    """All replicas of one teacher; lives on the loop.

    Args:
        name: the teacher's name; "" if there is only one.
        token, report: shared by all teachers of a client.
        on_change: called when a replica is back, and before each probe of a lost one.
        on_hopeless: called with the error when every replica is refused, so that waiting cannot help.
    """

    def __init__(
        self,
        name: str,
        teacher: Teacher,
        settings: Settings,
        *,
        token: BearerToken | None,
        report: WaitReport,
        on_change: Callable[[], None],
        on_hopeless: Callable[[TeacherError], None],
    ):
        self._loop = asyncio.get_running_loop()
        self._name = name
        self.who = f"teacher {name!r}: " if name else ""
        self._settings = settings
        self._report = report
        self._on_change = on_change
        self._on_hopeless = on_hopeless
        self.replicas = [
            Replica(
                parse_endpoint(endpoint),
                model=teacher.model,
                tls=settings.credentials,
                token=token,
                client_id=settings.client_id,
                max_in_flight=settings.max_in_flight,
            )
            for endpoint in teacher.endpoints
        ]
        self.model: ModelInfo | None = None  # pinned by the preflight; its limits are the tightest of all replicas
        self._preflight = asyncio.Lock()
        self._watchers: list[asyncio.Task[None]] = []

    # ---- called by TeacherClient ----

    async def info(self) -> ServerInfo:
        """Asks all replicas and compares them; see TeacherClient.info."""
        deadline = self._loop.time() + self._settings.deadline_s
        async with self._preflight:
            return await self._agree(deadline)

    async def check_can_sleep(self) -> None:
        """Raises UnsupportedError if a replica reports that it cannot sleep."""
        await self.info()
        for replica in self.replicas:
            replica.check_can_sleep()

    async def sleep(self) -> None:
        """Puts all replicas that are up to sleep; a replica that is down has no memory to free."""
        deadline = self._loop.time() + self._settings.deadline_s
        await self.ensure_model(deadline)
        for replica in self.replicas:  # all or none: a teacher half asleep is of no use
            replica.check_can_sleep()
        results = await self._control(self.replicas, Replica.sleep, deadline)
        for replica, result in results:
            if isinstance(result, UnavailableError):
                self.lose(replica, result)
            elif result is None and not (replica.info is not None and replica.info.wake_on_score):
                replica.error = f"{replica.endpoint}: was put to sleep by this client"
                replica.ready = False
                replica.lost.set()
        _raise_first(result for _, result in results if not isinstance(result, UnavailableError))

    async def wake(self) -> None:
        """Wakes all replicas and waits until at least one is ready; those that are down join when they are up."""
        deadline = self._loop.time() + self._settings.deadline_s
        failures = 0
        asleep = list(self.replicas)
        while True:
            results = await self._control(asleep, self._wake, deadline)
            for replica, result in results:
                if isinstance(result, UnavailableError) and self.model is not None:
                    self.lose(replica, result)
            _raise_first(result for _, result in results if not isinstance(result, UnavailableError | DeadlineError))
            asleep = [replica for replica, result in results if result is not None]
            if len(asleep) < len(self.replicas):
                return
            failures += 1
            await self._wait_for_any(deadline, failures)

    async def close(self) -> None:
        """Stops the watchers and closes the channels."""
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for replica in self.replicas:
            await replica.channel.close()

    # ---- preflight ----

    async def ensure_model(self, deadline: float) -> None:
        """Runs the preflight unless it has already succeeded; raises as `info` does."""
        async with self._preflight:  # first come, first served: the order of submission stays
            if self.model is None:
                await self._agree(deadline)

    async def _agree(self, deadline: float) -> ServerInfo:
        """Waits until a replica answers, then compares all answers with each other and with what the run expects."""
        failures = 0
        while True:
            answers = await self._ask_all(deadline)
            _raise_first(a for _, a in answers if isinstance(a, SeveralServersError))
            infos = [(r, a) for r, a in answers if isinstance(a, ServerInfo)]
            if infos:
                break
            # Wrong credentials, or not a teacher: waiting will not fix that.
            _raise_first(a for _, a in answers if not isinstance(a, UnavailableError | DeadlineError))
            failures += 1
            await self._wait_for_any(deadline, failures)
        self._report.over(self._name)
        models = [(replica.endpoint, replica.model(info)) for replica, info in infos]
        model = agreement.agree(models, self._settings.expected_tokenizer_fingerprint)
        first = infos[0][1]
        if self.model is None:
            for pair in agreement.same_servers([(replica.endpoint, info) for replica, info in infos]):
                logger.warning("%s and %s are the same server: give it once, unless these are two routes to it", *pair)
            self.model = model
            answered = {r for r, _ in infos}
            for replica in self.replicas:
                replica.ready = replica in answered
                if not replica.ready:
                    logger.warning("teacher %s is left out until it answers: %s", replica.endpoint, replica.error)
                    replica.lost.set()
                self._watchers.append(self._loop.create_task(self._watch(replica)))
        elif problem := agreement.difference(model, self.model):
            raise FingerprintMismatchError(
                f"{self.who}the teacher has changed since this client's first call: {problem}"
            )
        others = tuple(one for one in first.models if one.model != self.model.model)
        return dataclasses.replace(first, models=(self.model, *others))

    async def _wait_for_any(self, deadline: float, failures: int) -> None:
        """Sleeps before the next round; raises DeadlineError once the deadline has passed."""
        now = self._loop.time()
        if now >= deadline:
            self._report.over(self._name)
            raise DeadlineError(
                f"{self.who}no teacher answered within {self._settings.deadline_s:g} s: "
                f"{self.errors_by_endpoint()}. Is it running, and is the address right?"
            )
        self.report_waiting(deadline)
        await asyncio.sleep(min(deadline - now, MAX_BACKOFF_S, 0.1 * 2**failures) * random.uniform(0.5, 1.0))

    # ---- replicas ----

    async def _control(self, replicas: Sequence[Replica], ask: Any, deadline: float) -> list[tuple[Replica, Any]]:
        """Runs `ask(replica, timeout_s)` for all replicas concurrently; returns (replica, result or TeacherError)."""
        timeout_s = max(0.1, deadline - self._loop.time())
        results = await asyncio.gather(*(ask(r, timeout_s) for r in replicas), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, TeacherError):
                raise result
        return list(zip(replicas, results, strict=True))

    async def _ask_all(self, deadline: float) -> list[tuple[Replica, ServerInfo | TeacherError]]:
        """Asks all replicas for their ServerInfo; those silent GRACE_S after another's answer are not waited for."""
        timeout_s = min(PROBE_TIMEOUT_S, max(0.1, deadline - self._loop.time()))
        tasks = {self._loop.create_task(replica.ask(timeout_s)): replica for replica in self.replicas}
        waiting = set(tasks)
        try:
            while waiting and not any(task.exception() is None for task in set(tasks) - waiting):
                _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if waiting:
                _, waiting = await asyncio.wait(waiting, timeout=GRACE_S)
        finally:
            for task in tasks:
                task.cancel()
        answers: list[tuple[Replica, ServerInfo | TeacherError]] = []
        for task, replica in tasks.items():
            if task in waiting:
                replica.error = f"{replica.endpoint}: no answer within {GRACE_S:g} s of another replica's"
                answers.append((replica, DeadlineError(replica.error)))
            elif (error := task.exception()) is None or isinstance(error, TeacherError):
                answers.append((replica, error or task.result()))
            else:
                raise error
        return answers

    async def _wake(self, replica: Replica, timeout_s: float) -> None:
        await replica.wake(timeout_s)
        info = await replica.ask(min(PROBE_TIMEOUT_S, timeout_s))
        if self.model is not None and not replica.ready:
            self._consider(replica, info)
            if replica.refused is not None:
                raise replica.refused

    async def _watch(self, replica: Replica) -> None:
        """Brings a lost replica back once it answers as the same model."""
        while True:
            await replica.lost.wait()
            self._on_change()
            await asyncio.sleep(replica.backoff_s())
            if not replica.lost.is_set():
                continue  # `wake` has brought it back meanwhile
            try:
                info = await replica.ask(PROBE_TIMEOUT_S)
            except (UnauthenticatedError, SeveralServersError) as e:
                replica.failures += 1
                self.refuse(replica, e)
            except TeacherError:
                replica.failures += 1
                replica.refused = None
            else:
                self._consider(replica, info)

    def _consider(self, replica: Replica, info: ServerInfo) -> None:
        """Takes back a replica that answers again, unless it now serves another model."""
        assert self.model is not None
        try:
            problem = agreement.difference(replica.model(info), self.model)
        except InvalidRequestError as e:
            problem = str(e)
        if problem:
            replica.failures += 1
            self.refuse(
                replica,
                FingerprintMismatchError(
                    f"{replica.endpoint}: {problem}; this is not the model that the run began with. Restart that "
                    "teacher with the original checkpoint and dtype, or start a new run"
                ),
            )
            return
        replica.refused = None
        replica.ready = True
        replica.lost.clear()
        logger.info("teacher %s is back", replica.endpoint)
        self._on_change()

    def lose(self, replica: Replica, error: TeacherError) -> None:
        """Leaves a replica out until it answers a probe."""
        replica.error = str(error)
        if replica.ready:
            replica.ready = False
            replica.failures += 1
            logger.warning("teacher %s is left out until it answers again: %s", replica.endpoint, error)
        replica.lost.set()

    def hold(self, replica: Replica, error: TeacherError) -> None:
        """Pauses a replica that failed but is up."""
        logger.warning("teacher %s failed: %s", replica.endpoint, error)
        replica.error = str(error)
        replica.failures += 1
        replica.paused_until = max(replica.paused_until, self._loop.time() + replica.backoff_s())

    def refuse(self, replica: Replica, error: TeacherError) -> None:
        """Leaves out another model, several servers, or one that rejects our token; still probed from time to time."""
        if replica.refused is None:
            logger.error("teacher left out: %s", error)
        replica.error = str(error)
        replica.refused = error
        replica.ready = False
        replica.lost.set()
        if all(r.refused is not None for r in self.replicas):
            # No replica is left, dead or alive, that could return with the right weights by itself.
            everyone = "; ".join(str(r.refused) for r in self.replicas)
            self._on_hopeless(type(error)(everyone))

    # ---- reporting ----

    def report_waiting(self, deadline: float) -> None:
        """Reports, every few seconds, that work waits for a replica, until `deadline` at most."""
        now = self._loop.time()
        if self._report.due(self._name, now):
            left_s = max(0.0, deadline - now)
            self._report.waits(
                self._name,
                f"{self.who}waiting for a teacher, at most {left_s:.0f} s; no replica is up: "
                f"{self.errors_by_endpoint()}",
                now,
            )

    def errors_by_endpoint(self) -> str:
        """The last error of each replica."""
        # Network errors already begin with their endpoint.
        return "; ".join(
            r.error if r.error.startswith(r.endpoint) else f"{r.endpoint}: {r.error}" for r in self.replicas
        )


def _raise_first(results: Iterable[Any]) -> None:
    for result in results:
        if isinstance(result, BaseException):
            raise result
