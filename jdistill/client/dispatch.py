"""Which sequence of one teacher goes to which replica and when: batches, balance, retries, hedges, on one asyncio loop.

A job is one sequence; a call carries a batch of jobs to one replica. Whatever happens to a call, each of its jobs ends
in one of three ways: verified scores, an error, or back in the queue. Other threads come in through the loop only.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import grpc.aio

from jdistill.client.calls import Call
from jdistill.client.jobs import Job, JobQueue
from jdistill.client.pool import ReplicaPool, Settings
from jdistill.client.replica import MAX_CALL_BYTES, REQUEST_OVERHEAD_BYTES, Replica, with_remedy
from jdistill.client.teachers import Teacher
from jdistill.client.token import BearerToken
from jdistill.client.verification import Reply
from jdistill.client.waiting import WaitReport
from jdistill.wire import codec, status
from jdistill.wire.errors import (
    CorruptedError,
    DeadlineError,
    FingerprintMismatchError,
    InvalidRequestError,
    OverloadedError,
    TeacherError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
    VerificationError,
)
from jdistill.wire.types import TokenScores
from jdistill.wire.validate import validate_options, validate_sequence

logger = logging.getLogger("jdistill.client")

COALESCE_S = 0.003  # how long a submitted sequence waits for others to share its call
MAX_SERVER_FAULTS = 3  # attempts of a sequence that end in an error which nobody has foreseen (INTERNAL, UNKNOWN)


class Dispatcher:
    """The queue and the calls of one teacher; lives on the loop. The arguments are those of its `ReplicaPool`."""

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
        self._staged: list[Job] = []
        self._staged_tokens = 0
        self._staging: asyncio.TimerHandle | None = None
        self._admitting: set[Job] = set()
        self._orders = itertools.count()
        self._queue = JobQueue()
        self._calls: set[Call] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._call_ids = itertools.count()
        self._closed = False

    # ---- what TeacherClient calls ----

    def submit(self, jobs: Sequence[Job], *, coalesce: bool) -> None:
        """Takes jobs in order; with `coalesce` they wait a moment for others that could share their call."""
        if self._closed:
            for job in jobs:
                job.fail(UnavailableError("this TeacherClient is closed"))
            return
        for job in jobs:
            job.order = next(self._orders)
            job.future.add_done_callback(self._when_done(job))
            self._staged_tokens += job.num_tokens
        self._staged += jobs
        if not coalesce or self._staged_tokens >= self._settings.batch_tokens:
            self._flush()
        elif self._staging is None:
            self._staging = self._loop.call_later(COALESCE_S, self._flush)

    async def close(self) -> None:
        """Fails what is under way, ends all tasks, closes the channels."""
        if self._closed:
            return
        self._closed = True
        for timer in (self._timer, self._staging):
            if timer is not None:
                timer.cancel()
        error = UnavailableError("this TeacherClient was closed before the teacher had answered")
        tasks = list(self._tasks)
        jobs = [*self._staged, *self._admitting, *(job for call in self._calls for job in call.jobs)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for job in [*jobs, *self._queue.take_all()]:
            job.fail(error)
        await self.pool.close()

    # ---- from staged to queued ----

    def _flush(self) -> None:
        if self._staging is not None:
            self._staging.cancel()
            self._staging = None
        jobs, self._staged, self._staged_tokens = self._staged, [], 0
        if self.pool.model is None:
            self._admitting.update(jobs)
            self._spawn(self._admit_after_preflight(jobs))
        else:
            self._admit(jobs)

    async def _admit_after_preflight(self, jobs: list[Job]) -> None:
        try:
            await self.pool.ensure_model(min(job.deadline for job in jobs))
        except Exception as e:
            error = e if isinstance(e, TeacherError) else _our_bug(e)
            for job in jobs:
                job.fail(error)
        else:
            self._admit(jobs)
        finally:
            self._admitting.difference_update(jobs)

    def _admit(self, jobs: list[Job]) -> None:
        assert self.pool.model is not None
        limit = min(r.max_request_bytes for r in self.pool.replicas)
        for job in jobs:
            if job.future.done():
                continue  # cancelled, perhaps because another of its group was refused
            try:
                validate_options(info=self.pool.model, top_k=job.top_k, temperature=job.temperature)
                validate_sequence(job.sequence, job.index, info=self.pool.model)
                num_bytes = job.num_bytes + REQUEST_OVERHEAD_BYTES
                if num_bytes > limit:
                    raise InvalidRequestError(
                        f"sequence {job.index} makes a request of {num_bytes} bytes, the teacher takes {limit}",
                        sequence=job.index,
                    )
            except Exception as e:
                job.fail(e if isinstance(e, TeacherError) else _our_bug(e))
            else:
                self._queue.add(job)
        self._pump()

    # ---- from queued to scored ----

    def _pump(self) -> None:
        """Starts whatever calls can start; to be called whenever something has changed."""
        if self._closed:
            return
        try:
            self._pump_once()
        except Exception as e:
            self._fail_queue(_our_bug(e))

    def _pump_once(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._loop.time()
        for job in self._queue.take_overdue(now):
            self._expire(job)
        self._start_calls(now)
        self._give_up_hung_calls(now)
        self._hedge_late_calls(now)
        if self._queue:
            self._report_if_waiting()
        else:
            self._report.over(self._name)
        if (wake_at := min(self._wake_times(now), default=None)) is not None:
            self._timer = self._loop.call_at(wake_at, self._pump)

    def _wake_times(self, now: float) -> Iterator[float]:
        """When something may have to be done although nothing has happened."""
        if (job := self._queue.oldest()) is not None:
            yield job.deadline
        if self._queue or self._calls:
            yield from (r.paused_until for r in self.pool.replicas if r.ready and r.paused_until > now)
        for call in self._calls:
            if not call.given_up:
                yield call.hung_at(self._settings.stall_s)
            if (late_at := self._late_at(call)) is not None and late_at > now:
                yield late_at

    def _start_calls(self, now: float) -> None:
        while self._queue:
            ready = [r for r in self.pool.replicas if r.ready and r.paused_until <= now]
            free = [r for r in ready if r.has_room]
            # An even share, of those too that have no room just now: calls get smaller towards the end of a batch, so
            # that the replicas end together, and a batch smaller than batch_tokens leaves none idle.
            share = -(-self._queue.num_tokens // max(1, len(ready)))
            for replica in sorted(free, key=lambda r: r.outstanding_tokens):  # stable: ties in the order of endpoints
                max_tokens = min(self._settings.batch_tokens, share, replica.max_queued_tokens)
                max_bytes = min(MAX_CALL_BYTES, replica.max_request_bytes) - REQUEST_OVERHEAD_BYTES
                if jobs := self._queue.take(replica.endpoint, max_tokens, max_bytes):
                    self._report.over(self._name)
                    self._start(replica, jobs, now)
                    break
            else:
                return

    def _late_at(self, call: Call) -> float | None:
        """When `call` should be hedged; None: never."""
        if self._settings.hedge_after_s is None or len(self.pool.replicas) == 1 or call.races:
            return None
        return call.late_at(self._settings.hedge_after_s, self._usual_s_per_token(call.replica))

    def _usual_s_per_token(self, but: Replica) -> float | None:
        """Of the fastest of the other replicas."""
        paces = (r.pace.s_per_token for r in self.pool.replicas if r is not but)
        return min((pace for pace in paces if pace is not None), default=None)

    def _hedge_late_calls(self, now: float) -> None:
        """Sends what is still unscored of a late call to a replica that has nothing else to do."""
        late = [call for call in self._calls if (at := self._late_at(call)) is not None and at <= now]
        late_replicas = {call.replica for call in late}
        for call in sorted(late, key=lambda call: call.progress_at):
            jobs = [job for job in call.unscored() if len(job.calls) == 1]
            # As long as nobody knows how fast the others are, they may all be this slow: only an idle one is asked.
            unknown = self._usual_s_per_token(call.replica) is None
            free = [
                r
                for r in self.pool.replicas
                if r.ready and r.paused_until <= now and r not in late_replicas and r.has_room
                if not (unknown and r.calls) and not any(r.endpoint in job.bad_replies for job in jobs)
            ]
            if not jobs or not free:
                continue
            replica = min(free, key=lambda r: r.outstanding_tokens)
            bytes_left = replica.max_request_bytes - REQUEST_OVERHEAD_BYTES
            stops = itertools.accumulate(job.num_bytes for job in jobs)
            jobs = [job for job, stop in zip(jobs, stops, strict=True) if stop <= bytes_left] or jobs[:1]
            logger.info(
                "teacher %s has sent nothing for %.1f s: %d sequences are asked of %s too",
                call.replica.endpoint,
                now - call.progress_at,
                len(jobs),
                replica.endpoint,
            )
            self._start(replica, jobs, now, is_hedge=True)
            call.races = True
            self._deliver(call)

    def _give_up_hung_calls(self, now: float) -> None:
        """Ends calls whose server has sent nothing for very long; their jobs go elsewhere, or there again."""
        stall_s = self._settings.stall_s
        for hung in [call for call in self._calls if not call.given_up and call.hung_at(stall_s) <= now]:
            replica = hung.replica
            silent_s = now - hung.progress_at
            calls = [hung]
            if replica.message_at <= hung.progress_at:  # not this call alone: nothing has come at all
                calls = [call for call in self._calls if call.replica is replica]
                if any(r is not replica and r.ready and r.paused_until <= now for r in self.pool.replicas):
                    replica.left_behind(now, silent_s)
            for call in calls:
                if call.given_up:
                    continue
                call.given_up = True
                replica.error = f"{replica.endpoint}: is connected, but has sent no scores for {silent_s:.1f} s"
                logger.warning("%s: %d sequences are asked again", replica.error, len(call.unscored()))
                for job in call.jobs:
                    job.stalls += 1
                call.task.cancel()

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
        except Exception as e:  # no memory, perhaps
            for job in jobs:
                job.fail(_our_bug(e))
            return
        replica.calls += 1
        replica.outstanding_tokens += sum(job.num_tokens for job in jobs)
        call = Call(replica, jobs, reply, now, replica.outstanding_tokens, is_hedge=is_hedge, races=is_hedge)
        for job in jobs:
            job.calls.add(call)
            job.attempts += 1
        self._calls.add(call)
        call.task = self._spawn(self._run(call))
        call.task.add_done_callback(lambda _: self._never_began(call))

    def _never_began(self, call: Call) -> None:
        """A task that is cancelled before its first step runs none of its own code, not even `finally`."""
        if not call.ended:
            self._detach(call)
            self._requeue(call.jobs)
            self._pump()

    async def _run(self, call: Call) -> None:
        """One call from start to end; afterwards each job has ended or is back in the queue."""
        error: BaseException | None = None
        again = False  # with another token
        try:
            try:
                await self._stream(call)
            except grpc.aio.AioRpcError as e:
                error = e
                again = e.code() is grpc.StatusCode.UNAUTHENTICATED and await self._renew_token(call)
        except (Exception, asyncio.CancelledError) as e:
            error = e
        self._detach(call)
        try:
            if not again:
                self._settle(call, error)
        finally:
            self._requeue(call.jobs)
            self._pump()

    async def _stream(self, call: Call) -> None:
        """Sends the request and takes all of the reply."""
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
                    self._deliver(call)
            call.reply.finish()
        finally:
            stream.cancel()  # does nothing to a call that has ended

    async def _renew_token(self, call: Call) -> bool:
        """Whether the call may be tried again with another token: once for each of its jobs."""
        if self._token is None or any(job.token_renewed for job in call.jobs):
            return False
        for job in call.jobs:
            job.token_renewed = True
        return await self._token.renew(call.token)

    def _detach(self, call: Call) -> None:
        """The call is over, whatever became of it."""
        call.ended = True
        self._calls.discard(call)
        call.replica.calls -= 1
        call.replica.outstanding_tokens -= sum(job.num_tokens for job in call.jobs)
        for job in call.jobs:
            job.calls.discard(call)

    def _settle(self, call: Call, error: BaseException | None) -> None:
        """Ends the jobs that this outcome ends; whoever is left goes back to the queue."""
        replica = call.replica
        if error is None:
            replica.succeeded()
            replica.pace.add(self._loop.time() - call.started_at, call.load)
            self._deliver(call)
        elif isinstance(error, grpc.aio.AioRpcError):
            self._call_failed(call, error)
        elif isinstance(error, VerificationError):
            self._reply_was_bad(call, error)
        elif isinstance(error, FingerprintMismatchError):
            self._requeue(call.jobs)
            self.pool.refuse(replica, error)
        elif isinstance(error, CorruptedError):  # no fault of the teacher's: the way there is bad, or was for a moment
            self._deliver(call)
            self.pool.lose(replica, error)
        elif isinstance(error, UnauthenticatedError):  # the token function failed
            for job in call.jobs:
                job.fail(error)
        elif isinstance(error, asyncio.CancelledError):
            # We are closing, or nobody wants the result (or gRPC has cancelled what we have not: try again).
            self._deliver(call)  # what was whole when we gave it up
            if call.needless and call.races and not call.is_hedge:
                self._lost_race(call)
        else:
            for job in call.jobs:
                job.fail(_our_bug(error))

    def _deliver(self, call: Call) -> list[Job]:
        """Ends the jobs whose scores are whole; returns the others."""
        missing, rivals = [], set()
        for b, job in enumerate(call.jobs):
            if (scores := call.reply.complete(b)) is not None:
                job.succeed(scores)  # the first one wins, and its scores are taken whole
                rivals |= job.calls
            else:
                missing.append(job)
        if call.reply.is_whole:
            rivals.discard(call)  # its end is under way; a cancellation would look as if we had given up
        for rival in rivals:
            self._end_if_needless(rival)
        return missing

    def _lost_race(self, call: Call) -> None:
        """Another replica was asked later and is done; this one gets less, or nothing for a while."""
        replica, now = call.replica, self._loop.time()
        replica.pace.add(now - call.started_at, call.load)  # at least
        if call.progress_at > call.started_at:
            replica.slow_down(now, call.started_at)
        else:
            replica.left_behind(now, now - call.started_at)

    def _call_failed(self, call: Call, e: grpc.aio.AioRpcError) -> None:
        replica, jobs = call.replica, call.jobs
        error = status.from_rpc_error(e, replica.endpoint)
        if isinstance(error, VerificationError):  # the service has seen for itself that its engine's answer is wrong
            self._reply_was_bad(call, error)
            return
        # What came whole, and was verified, before the stream broke is as good as any other answer.
        missing = self._deliver(call)
        # The server could not read it at all, and what we write can be read: it was damaged on its way.
        was_garbled = isinstance(error, InvalidRequestError) and error.field == codec.WHOLE_REQUEST
        if isinstance(error, FingerprintMismatchError):
            self._requeue(missing)
            self.pool.refuse(replica, error)
        elif isinstance(error, OverloadedError):
            replica.error = str(error)
            replica.overloaded(self._loop.time(), call.started_at, status.retry_delay_s(e))
        elif isinstance(error, UnavailableError):
            self.pool.lose(replica, error)
        elif isinstance(error, DeadlineError):
            replica.error = str(error)  # jobs whose own deadline is over end in the queue
        elif isinstance(error, InvalidRequestError) and error.sequence is not None and error.sequence < len(jobs):
            blamed = jobs[error.sequence]
            blamed.fail(InvalidRequestError(str(error), field=error.field, sequence=blamed.index))
        elif isinstance(error, InvalidRequestError | UnsupportedError) and not was_garbled:
            for job in missing:
                job.fail(error)
        elif isinstance(error, UnauthenticatedError):
            for job in missing:
                job.fail(with_remedy(error))
        else:
            self.pool.hold(replica, error)
            for job in missing:
                job.server_faults += 1
                if job.server_faults >= MAX_SERVER_FAULTS and not job.calls:
                    job.fail(TeacherError(f"{error} (attempt {job.attempts} of sequence {job.index})"))

    def _reply_was_bad(self, call: Call, error: VerificationError) -> None:
        """Uses nothing of a bad reply. The sequence it was bad for goes to another replica, or fails if none is up.

        A reply that is bad as a whole may have been damaged on its way: then the only replica is asked once more.
        """
        logger.error("bad reply of a teacher: %s", error)
        call.replica.error = str(error)
        blamed = call.jobs if call.reply.blamed is None else [call.jobs[call.reply.blamed]]
        for job in blamed:
            job.bad_replies[call.replica.endpoint] = error
            if job.calls or any(r.ready and r.endpoint not in job.bad_replies for r in self.pool.replicas):
                continue
            job.server_faults += 1
            if call.reply.blamed is None and job.server_faults == 1:
                del job.bad_replies[call.replica.endpoint]
            else:
                job.fail(error)

    def _requeue(self, jobs: Sequence[Job]) -> None:
        """Puts back what nobody has scored and nobody else is scoring."""
        for job in jobs:
            if not (job.future.done() or job.calls or job.queued):
                self._queue.add(job)

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

    def _when_done(self, job: Job | None) -> Callable[[concurrent.futures.Future[TokenScores]], None]:
        def done(future: concurrent.futures.Future[TokenScores]) -> None:
            nonlocal job
            if future.cancelled():  # by whoever holds it, in any thread
                self._loop.call_soon_threadsafe(self._cancelled, job)
            # A future keeps its callbacks. Without this it would keep itself, and its scores, until the garbage
            # collector comes by, which counts objects and not megabytes.
            job = None

        return done

    def _cancelled(self, job: Job) -> None:
        """Ends a call that nobody waits for any more."""
        self._queue.discard(job)
        for call in list(job.calls):
            self._end_if_needless(call)
        self._pump()

    def _end_if_needless(self, call: Call) -> None:
        if not call.needless and all(job.future.done() for job in call.jobs):
            call.needless = True
            call.task.cancel()

    # ---- telling people ----

    def _report_if_waiting(self) -> None:
        if (job := self._queue.oldest()) is not None and not any(r.ready for r in self.pool.replicas):
            self.pool.report_waiting(job.deadline)

    def _fail_queue(self, error: TeacherError) -> None:
        for job in self._queue.take_all():
            job.fail(error)

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _our_bug(error: BaseException) -> TeacherError:
    """What nobody has foreseen must not leave anybody waiting."""
    logger.error("unforeseen: please report it", exc_info=error)
    return TeacherError(f"the client failed with {type(error).__name__}: {error}")
