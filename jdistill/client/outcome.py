"""What the end of a call means for its jobs and its replica: success, failure, a bad reply, a lost race.

Afterwards each job of the call has ended, or another call carries it, or the dispatcher puts it back into the queue.
"""

from __future__ import annotations

import asyncio
import logging

import grpc
import grpc.aio

from jdistill.client.calls import Call
from jdistill.client.jobs import JobQueue, unexpected
from jdistill.client.pool import ReplicaPool
from jdistill.client.replica import with_remedy
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

logger = logging.getLogger("jdistill.client")

MAX_SERVER_FAULTS = 3  # attempts of a sequence that may end in an unexpected error of the server (INTERNAL, UNKNOWN)


def settle(call: Call, error: BaseException | None, *, pool: ReplicaPool, queue: JobQueue, now: float) -> None:
    """Ends the jobs that the outcome of `call` ends, and updates what is known about its replica."""
    replica = call.replica
    if error is None:
        replica.succeeded()
        replica.pace.add(now - call.started_at, call.load)
        call.deliver()
    elif isinstance(error, grpc.aio.AioRpcError):
        _settle_failure(call, error, pool, queue, now)
    elif isinstance(error, VerificationError):
        _reject_reply(call, error, pool)
    elif isinstance(error, FingerprintMismatchError):
        queue.put_back(call.jobs)  # before `refuse`, which may fail everything in the queue
        pool.refuse(replica, error)
    elif isinstance(error, CorruptedError):  # the network's fault, not the teacher's; it may have been brief
        call.deliver()
        pool.lose(replica, error)
    elif isinstance(error, UnauthenticatedError):  # the token function failed
        for job in call.jobs:
            job.fail(error)
    elif isinstance(error, asyncio.CancelledError):
        # The client is closing, or the result is no longer needed (or gRPC cancelled a call that we did not: retry).
        call.deliver()  # what was complete when the call was given up
        if call.needless and call.races and not call.is_hedge:
            _lost_race(call, now)
    else:
        for job in call.jobs:
            job.fail(unexpected(error))


def _settle_failure(call: Call, e: grpc.aio.AioRpcError, pool: ReplicaPool, queue: JobQueue, now: float) -> None:
    """Handles a call that ended with an error status."""
    replica, jobs = call.replica, call.jobs
    error = status.from_rpc_error(e, replica.endpoint)
    if isinstance(error, VerificationError):  # the service itself found its engine's answer to be wrong
        _reject_reply(call, error, pool)
        return
    # Scores that were complete and verified before the stream broke are as good as any.
    missing = call.deliver()
    # The server could not parse the request at all. What we write parses, so it was damaged on the way.
    was_garbled = isinstance(error, InvalidRequestError) and error.field == codec.WHOLE_REQUEST
    if isinstance(error, FingerprintMismatchError):
        queue.put_back(missing)  # before `refuse`, which may fail everything in the queue
        pool.refuse(replica, error)
    elif isinstance(error, OverloadedError):
        replica.error = str(error)
        replica.overloaded(now, call.started_at, status.retry_delay_s(e))
    elif isinstance(error, UnavailableError):
        pool.lose(replica, error)
    elif isinstance(error, DeadlineError):
        replica.error = str(error)  # jobs past their own deadline end in the queue
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
        pool.hold(replica, error)
        for job in missing:
            job.server_faults += 1
            if job.server_faults >= MAX_SERVER_FAULTS and not job.calls:
                job.fail(TeacherError(f"{error} (attempt {job.attempts} of sequence {job.index})"))


def _reject_reply(call: Call, error: VerificationError, pool: ReplicaPool) -> None:
    """Drops a bad reply. The sequence to blame goes to another replica, or fails if none is up.

    A reply that is bad as a whole may have been damaged on the way: if there is only one replica, it gets another try.
    """
    logger.error("rejected a teacher's reply: %s", error)
    call.replica.error = str(error)
    blamed = call.jobs if call.reply.blamed is None else [call.jobs[call.reply.blamed]]
    for job in blamed:
        job.bad_replies[call.replica.endpoint] = error
        if job.calls or any(r.ready and r.endpoint not in job.bad_replies for r in pool.replicas):
            continue
        job.server_faults += 1
        if call.reply.blamed is None and job.server_faults == 1:
            del job.bad_replies[call.replica.endpoint]
        else:
            job.fail(error)


def _lost_race(call: Call, now: float) -> None:
    """Gives less work to a replica whose hedge, started later, finished first; none for a while if it sent nothing."""
    replica = call.replica
    replica.pace.add(now - call.started_at, call.load)  # a lower bound: it has not finished
    if call.progress_at > call.started_at:
        replica.slow_down(now, call.started_at)
    else:
        replica.left_behind(now, now - call.started_at)
