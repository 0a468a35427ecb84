"""The queue and the calls of one teacher on one asyncio loop: starts calls, retries, hedges, deadlines.

A job is one sequence; a call carries a batch of jobs to one replica. Whatever happens to a call, each of its jobs ends
in one of three ways: verified scores, an error, or back in the queue. Other threads enter through the loop only.

    admission -> queue -> balance -> call -> outcome -> scores, an error, or the queue again
                              stragglers: a second call beside a late one, the end of a hung one
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence

import grpc
import grpc.aio

from jdistill.client import balance, outcome, stragglers
from jdistill.client.admission import Admission
from jdistill.client.calls import Call
from jdistill.client.jobs import Job, JobQueue, unexpected
from jdistill.client.pool import ReplicaPool, Settings
from jdistill.client.replica import Replica
from jdistill.client.teachers import Teacher
from jdistill.client.token import BearerToken
from jdistill.client.verification import Reply
from jdistill.client.waiting import WaitReport
from jdistill.wire import codec
from jdistill.wire.errors import DeadlineError, TeacherError, UnavailableError
from jdistill.wire.types import TokenScores

logger = logging.getLogger("jdistill.client")


class Dispatcher:
    """The queue and the calls of one teacher; lives on the loop. Takes the arguments of its `ReplicaPool`."""

    def __init__(
        self, name: str, teacher: Teacher, settings: Settings, *, token: BearerToken | None, report: WaitReport
    ):
        self._loop = asyncio.get_running_loop()
        self._name = name
        self._model_name = teacher.model
        self._settings = settings
        self._token = token
        self._report = report
        self.pool = ReplicaPool(
            name,
            teacher,
            settings,
            token=token,
            report=report,
            on_change=self._pump,
            on_hopeless=self._fail_queue,
        )
        self._admission = Admission(self.pool, batch_tokens=settings.batch_tokens, on_admitted=self._enqueue)
        self._orders = itertools.count()
        self._queue = JobQueue()
        self._calls: set[Call] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._call_ids = itertools.count()
        self._closed = False

    # ---- called by TeacherClient ----

    def submit(self, jobs: Sequence[Job], *, coalesce: bool) -> None:
        """Takes jobs in order; with `coalesce` they wait a moment for others that could share their call."""
        if self._closed:
            for job in jobs:
                job.fail(UnavailableError("this TeacherClient is closed"))
            return
        for job in jobs:
            job.order = next(self._orders)
            job.future.add_done_callback(self._when_done(job))
        self._admission.stage(jobs, coalesce=coalesce)

    async def close(self) -> None:
        """Fails all unfinished jobs, ends all tasks, closes the channels."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        jobs = [job for call in self._calls for job in call.jobs]
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        jobs = [*await self._admission.close(), *jobs]
        await asyncio.gather(*tasks, return_exceptions=True)
        error = UnavailableError("this TeacherClient was closed before the teacher had answered")
        for job in [*jobs, *self._queue.take_all()]:
            job.fail(error)
        await self.pool.close()

    # ---- the queue ----

    def _enqueue(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._queue.add(job)
        self._pump()

    def _pump(self) -> None:
        """Starts every call that can start; must be called after every change."""
        if self._closed:
            return
        try:
            self._pump_once()
        except Exception as e:
            self._fail_queue(unexpected(e))

    def _pump_once(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._loop.time()
        for job in self._queue.take_overdue(now):
            self._expire(job)
        self._start_calls(now)
        stragglers.give_up_hung_calls(self._calls, self.pool.replicas, self._settings.stall_s, now)
        self._hedge_late_calls(now)
        if self._queue:
            self._report_if_waiting()
        else:
            self._report.over(self._name)
        if (wake_at := min(self._wake_times(now), default=None)) is not None:
            self._timer = self._loop.call_at(wake_at, self._pump)

    def _wake_times(self, now: float) -> Iterator[float]:
        """Yields the times at which there may be something to do although no event has occurred."""
        replicas = self.pool.replicas
        if (job := self._queue.oldest()) is not None:
            yield job.deadline
        if self._queue or self._calls:
            yield from (r.paused_until for r in replicas if r.ready and r.paused_until > now)
        for call in self._calls:
            if not call.given_up:
                yield call.hung_at(self._settings.stall_s)
            late_at = stragglers.late_at(call, replicas, self._settings.hedge_after_s)
            if late_at is not None and late_at > now:
                yield late_at

    def _expire(self, job: Job) -> None:
        if job.bad_replies:
            job.fail(next(iter(job.bad_replies.values())))
            return
        attempts = f"{job.attempts} attempt{'' if job.attempts == 1 else 's'}"
        job.fail(
            DeadlineError(
                f"{self.pool.who}no scores of sequence {job.index} ({job.num_tokens} tokens) within "
                f"{self._settings.deadline_s:g} s, after {attempts}: {self.pool.errors_by_endpoint()}"
            )
        )

    def _report_if_waiting(self) -> None:
        if (job := self._queue.oldest()) is not None and not any(r.ready for r in self.pool.replicas):
            self.pool.report_waiting(job.deadline)

    def _fail_queue(self, error: TeacherError) -> None:
        for job in self._queue.take_all():
            job.fail(error)

    # ---- calls ----

    def _start_calls(self, now: float) -> None:
        batch_tokens = self._settings.batch_tokens
        while self._queue and (
            batch := balance.take_batch(self._queue, self.pool.replicas, batch_tokens=batch_tokens, now=now)
        ):
            self._report.over(self._name)
            self._start(*batch, now)

    def _hedge_late_calls(self, now: float) -> None:
        """Sends the unscored jobs of late calls to another replica too."""
        replicas = self.pool.replicas
        late = stragglers.late_calls(self._calls, replicas, self._settings.hedge_after_s, now)
        for call in late:
            if (hedge := stragglers.choose_hedge(call, late, replicas, now)) is None:
                continue
            replica, jobs = hedge
            logger.info(
                "teacher %s has sent nothing for %.1f s: asking %s for %d of its sequences too",
                call.replica.endpoint,
                now - call.progress_at,
                replica.endpoint,
                len(jobs),
            )
            self._start(replica, jobs, now, is_hedge=True)
            call.races = True
            call.deliver()

    def _start(self, replica: Replica, jobs: list[Job], now: float, *, is_hedge: bool = False) -> None:
        assert self.pool.model is not None
        try:
            reply = Reply(
                [job.sequence for job in jobs],
                [job.crc for job in jobs],
                [job.index for job in jobs],
                endpoint=replica.endpoint,
                info=self.pool.model,
                top_k=jobs[0].top_k,
                temperature=jobs[0].temperature,
            )
        except Exception as e:  # for example no memory
            for job in jobs:
                job.fail(unexpected(e))
            return
        replica.calls += 1
        replica.outstanding_tokens += sum(job.num_tokens for job in jobs)
        call = Call(replica, jobs, reply, now, replica.outstanding_tokens, is_hedge=is_hedge, races=is_hedge)
        for job in jobs:
            job.calls.add(call)
            job.attempts += 1
        self._calls.add(call)
        call.task = self._loop.create_task(self._run(call))
        self._tasks.add(call.task)
        call.task.add_done_callback(self._tasks.discard)
        call.task.add_done_callback(lambda _: self._never_began(call))

    def _never_began(self, call: Call) -> None:
        """Cleans up after a task that was cancelled before its first step: it runs no code, not even `finally`."""
        if not call.ended:
            self._detach(call)
            self._queue.put_back(call.jobs)
            self._pump()

    async def _run(self, call: Call) -> None:
        """Runs one call from start to end; afterwards each job has ended or is back in the queue."""
        error: BaseException | None = None
        retry = False  # with a new token
        try:
            try:
                await self._stream(call)
            except grpc.aio.AioRpcError as e:
                error = e
                retry = e.code() is grpc.StatusCode.UNAUTHENTICATED and await self._renew_token(call)
        except (Exception, asyncio.CancelledError) as e:
            error = e
        self._detach(call)
        try:
            if not retry:
                outcome.settle(call, error, pool=self.pool, queue=self._queue, now=self._loop.time())
        finally:
            self._queue.put_back(call.jobs)
            self._pump()

    async def _stream(self, call: Call) -> None:
        """Sends the request and verifies the whole reply."""
        assert self.pool.model is not None
        jobs = call.jobs
        call.token = None if self._token is None else await self._token.get()
        request = codec.encode_request(
            [job.sequence for job in jobs],
            model=self._model_name,
            expected_fingerprint=self.pool.model.fingerprint,
            temperature=jobs[0].temperature,
            top_k=jobs[0].top_k,
            request_id=f"{self._settings.client_id}-{next(self._call_ids)}",
        )
        timeout_s = max(job.deadline for job in jobs) - self._loop.time()
        stream = call.replica.score(request, call.token, timeout_s)
        del request  # up to 8 MB for one sequence with 64 candidates
        try:
            async for data in stream:
                call.reply.add(data)
                call.progress_at = call.replica.message_at = self._loop.time()
                if call.races or call.reply.is_whole:  # not only at the end of the stream, which may never come
                    call.deliver()
            call.reply.finish()
        finally:
            stream.cancel()  # does nothing to a call that has ended

    async def _renew_token(self, call: Call) -> bool:
        """Whether the call may be retried with a new token: once for each of its jobs."""
        if self._token is None or any(job.token_renewed for job in call.jobs):
            return False
        for job in call.jobs:
            job.token_renewed = True
        return await self._token.renew(call.token)

    def _detach(self, call: Call) -> None:
        """Removes a call that is over from the books."""
        call.ended = True
        self._calls.discard(call)
        call.replica.calls -= 1
        call.replica.outstanding_tokens -= sum(job.num_tokens for job in call.jobs)
        for job in call.jobs:
            job.calls.discard(call)

    # ---- cancellation by the caller ----

    def _when_done(self, job: Job | None) -> Callable[[concurrent.futures.Future[TokenScores]], None]:
        def done(future: concurrent.futures.Future[TokenScores]) -> None:
            nonlocal job
            if future.cancelled():  # by its holder, in any thread
                self._loop.call_soon_threadsafe(self._cancelled, job)
            # A future keeps its callbacks. With this reference it would keep itself and its scores alive until the
            # garbage collector runs, which counts objects, not megabytes.
            job = None

        return done

    def _cancelled(self, job: Job) -> None:
        """Ends the calls that only served a cancelled job."""
        self._queue.discard(job)
        for call in list(job.calls):
            call.end_if_needless()
        self._pump()
