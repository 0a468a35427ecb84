"""The sidecar's states (loading, serving, sleeping, draining): load, sleep, wake, drain, and the engine's death.

Outside SERVING, `serving_engine` and `check_awake` refuse scoring requests with UNAVAILABLE (see admission.py).
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from jdistill.config import TeacherServerConfig
from jdistill.sidecar.call import OpenCalls
from jdistill.sidecar.engines import create_engine
from jdistill.sidecar.engines.base import Engine
from jdistill.sidecar.fair_queue import FairQueue
from jdistill.sidecar.metrics import Metrics
from jdistill.sidecar.process import CLOSE_TIMEOUT_S
from jdistill.wire.errors import EngineDeadError, FingerprintMismatchError, UnavailableError, UnsupportedError
from jdistill.wire.types import ModelInfo, ServerState

logger = logging.getLogger(__name__)

CHECK_EVERY_S = 1.0  # between two checks that the engine is alive
ASLEEP_RETRY_S = 2.0  # a training step that leaves the teacher asleep takes seconds to minutes


class Lifecycle:
    """State of one sidecar and its engine; `dead` is set once the engine has died for good.

    Args:
        model: the served name, for messages.
        config: what a score does that arrives while the engine sleeps, and the timeout of a drain.
        calls: the open scoring calls.
        queue: the queue in front of the engine.
        metrics: is told every state and failure.
        on_state: awaited at each change of `state`.
    """

    def __init__(
        self,
        model: str,
        config: TeacherServerConfig,
        *,
        calls: OpenCalls,
        queue: FairQueue,
        metrics: Metrics,
        on_state: Callable[[ServerState], Awaitable[None]],
    ):
        self._model = model
        self._config = config
        self._calls = calls
        self._queue = queue
        self._metrics = metrics
        self._on_state = on_state
        self._refusal: UnavailableError | None = UnavailableError(f"teacher {model!r} is loading; try again")
        self._notifying = asyncio.Lock()  # on_state is told one change at a time
        self._transition = asyncio.Lock()  # one change between sleep and wake at a time
        self._falling_asleep = False
        self._waking: asyncio.Task[None] | None = None  # on behalf of waiting scores
        self._draining = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.engine: Engine | None = None
        self.models: dict[str, ModelInfo] = {}  # by name: the base model first, then the adapters
        self.state = ServerState.LOADING
        self.dead = asyncio.Event()
        metrics.state_changed(self.state)

    # ---- load and serve ----

    async def load(self, stop: asyncio.Event) -> bool:
        """Creates the engine and starts serving; returns False if `stop` was set first."""
        begin = time.monotonic()
        loading = asyncio.ensure_future(create_engine(self._config))
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            loading.cancel()
            await asyncio.wait({loading}, timeout=CLOSE_TIMEOUT_S)
            return False
        await self.serve(await loading)
        logger.info("loaded in %.1f s", time.monotonic() - begin)
        return True

    async def serve(self, engine: Engine) -> None:
        """Answers calls with `engine` from now on."""
        self.engine = engine
        self.models = _models_of(engine)
        self._refusal = None
        self._draining.clear()
        await self._enter(ServerState.SERVING)
        self._spawn(self._watch(engine))

    def serving_engine(self) -> Engine:
        """Returns the engine; raises UnavailableError while the sidecar loads, drains or is dead."""
        if self._refusal is not None:
            # A copy: a shared error would keep the frames, and so the request, of every call that raises it.
            raise copy.copy(self._refusal)
        assert self.engine is not None
        return self.engine

    # ---- sleep and wake ----

    async def sleep(self) -> None:
        """Frees the engine's memory once running calls are done; does nothing if it already sleeps.

        Raises:
            UnsupportedError: this engine cannot sleep.
            EngineDeadError: it failed to.
        """
        await self._change_shielded(ServerState.SLEEPING)

    async def wake(self) -> None:
        """Brings the model back; does nothing if it is awake. Raises the errors of `sleep`.

        Raises:
            FingerprintMismatchError: it woke with other weights.
        """
        await self._change_shielded(ServerState.SERVING)

    def check_awake(self) -> None:
        """Raises UnavailableError if scores are refused during sleep and the engine sleeps, or is about to."""
        if self._config.on_sleep == "refuse" and (self.state is ServerState.SLEEPING or self._falling_asleep):
            raise self._asleep_error()

    def wake_for_scores(self) -> None:
        """Wakes a sleeping engine because scores wait for it; once for all of them."""
        if self._waking is None or self._waking.done():
            self._waking = self._spawn(self._change(ServerState.SERVING))

    async def _change_shielded(self, to: ServerState) -> None:
        # In its own task: a client that gives up must not leave an engine half asleep.
        await asyncio.shield(self._spawn(self._change(to)))

    async def _change(self, to: ServerState) -> None:
        async with self._transition:
            engine = self.serving_engine()
            if not engine.can_sleep:
                raise UnsupportedError(
                    f"the {engine.name} engine ({engine.version}) of teacher {self._model!r} cannot sleep here; start "
                    "it with --offload, if the engine supports that on this platform"
                )
            if self.state is not to:
                begin = time.monotonic()
                await (self._fall_asleep(engine) if to is ServerState.SLEEPING else self._wake_up(engine))
                logger.info("%s after %.1f s", to.name.lower(), time.monotonic() - begin)

    async def _fall_asleep(self, engine: Engine) -> None:
        self._falling_asleep = True
        self._queue.pause()
        try:
            if self._config.on_sleep == "refuse":
                self._queue.fail_waiting(self._asleep_error())
            if not await self._engine_is_free():
                self._queue.resume()
                self.serving_engine()  # raises the reason
            try:
                await engine.sleep()
            except Exception as e:
                raise await self._failed(e, "fall asleep") from None
            await self._enter(ServerState.SLEEPING)
        finally:
            self._falling_asleep = False
        if self._refusal is not None:
            self._queue.fail_waiting(self._refusal)
            self.serving_engine()
        if self._queue.queued_tokens:
            self.wake_for_scores()

    async def _engine_is_free(self) -> bool:
        """Waits until nothing runs; returns False if the server starts to shut down first."""
        free = asyncio.ensure_future(self._queue.wait_until_nothing_runs())
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
        expected = {name: info.fingerprint for name, info in self.models.items()}
        got = {name: info.fingerprint for name, info in _models_of(engine).items()}
        if got != expected:
            changed = ", ".join(repr(name) for name in expected if got.get(name) != expected[name])
            error = FingerprintMismatchError(
                f"teacher {self._model!r} woke with other weights than it fell asleep with ({changed}): was its "
                "checkpoint changed? It ends, so that no client mixes the scores of two models"
            )
            await self.die(EngineDeadError(str(error)))
            raise error
        await self._enter(ServerState.SERVING)
        self._queue.resume()

    async def _failed(self, error: Exception, action: str) -> EngineDeadError:
        """Declares an engine dead that could not sleep or wake, and returns the error to raise."""
        if not isinstance(error, EngineDeadError):
            logger.error("the engine could not %s", action, exc_info=error)
            error = EngineDeadError(
                f"the engine of teacher {self._model!r} could not {action} ({type(error).__name__}; see its log)"
            )
        await self.die(error)
        return error

    def _asleep_error(self) -> UnavailableError:
        error = UnavailableError(
            f"teacher {self._model!r} is asleep, and --on-sleep is refuse: call Wake (TeacherClient.wake()) first"
        )
        error.retry_after_s = ASLEEP_RETRY_S
        return error

    # ---- drain, death, end ----

    async def refuse(self, error: UnavailableError) -> None:
        """Ends new calls with `error` from now on; open calls continue, unless the engine sleeps."""
        self._refusal = error
        self._draining.set()
        if self.state is ServerState.SLEEPING:
            self._queue.fail_waiting(error)  # the engine will not be woken for them
        await self._enter(ServerState.DRAINING)

    async def drain(self, hurry: asyncio.Event) -> None:
        """Refuses new calls and lets open ones finish within `drain_timeout_s`, or until `hurry` is set."""
        if not self.dead.is_set():
            await self.refuse(UnavailableError(f"teacher {self._model!r} is shutting down"))
        if self.dead.is_set():
            self._calls.fail(EngineDeadError(f"the engine of teacher {self._model!r} has died"))
        elif len(self._calls):
            timeout_s = self._config.drain_timeout_s
            logger.info("%d calls may finish within %.0f s", len(self._calls), timeout_s)
            idle = asyncio.ensure_future(self._calls.wait_until_none())
            hurrying = asyncio.ensure_future(hurry.wait())
            await asyncio.wait({idle, hurrying}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            hurrying.cancel()
            idle.cancel()
            if len(self._calls):
                logger.warning("%d calls did not finish in time", len(self._calls))
                self._calls.fail(UnavailableError(f"teacher {self._model!r} has shut down before it finished"))
        try:
            await asyncio.wait_for(self._calls.wait_until_none(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            pass

    async def die(self, error: EngineDeadError) -> None:
        """Ends every open call and refuses new ones: the engine is gone, and the process will end (see `dead`)."""
        if not self.dead.is_set():
            self.dead.set()
            self._metrics.engine_failed(error.reason)
            self._calls.fail(error)
            await self.refuse(error)

    async def close(self) -> None:
        """Ends this object's tasks; before `close_engine`."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close_engine(self) -> None:
        """Frees the engine, within CLOSE_TIMEOUT_S; logs failures."""
        if self.engine is None:
            return
        try:
            await asyncio.wait_for(self.engine.close(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            logger.error("the engine did not close within %.0f s", CLOSE_TIMEOUT_S)
        except Exception:
            logger.exception("the engine failed to close")

    async def _watch(self, engine: Engine) -> None:
        """Notices a dead engine while no score would: during sleep, or when calls hang."""
        failing = False
        while not self.dead.is_set():
            await asyncio.sleep(CHECK_EVERY_S)
            try:
                await engine.check()
                failing = False
            except EngineDeadError as e:
                logger.error("the engine is dead: %s", e)
                await self.die(e)
            except Exception:  # a check that cannot decide is no reason to end
                if not failing:
                    logger.exception("the check of the engine failed")
                failing = True

    async def _enter(self, state: ServerState) -> None:
        """Changes the state, but never back from DRAINING."""
        if state is self.state or (self._refusal is not None and state is not ServerState.DRAINING):
            return
        self.state = state
        self._metrics.state_changed(state)
        async with self._notifying:
            await self._on_state(self.state)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved: a caller that waits has it, and where none does, `die` has told every call


def _models_of(engine: Engine) -> dict[str, ModelInfo]:
    return {engine.info.model: engine.info, **engine.adapters}
