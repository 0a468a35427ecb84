"""Late calls are hedged on another replica; hung calls are given up. `Call` says when a call is late or hung."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Sequence

from jdistill.client.calls import Call
from jdistill.client.jobs import Job
from jdistill.client.replica import REQUEST_OVERHEAD_BYTES, Replica

logger = logging.getLogger("jdistill.client")


def late_at(call: Call, replicas: Sequence[Replica], hedge_after_s: float | None) -> float | None:
    """When `call` should be hedged; None: never."""
    if hedge_after_s is None or len(replicas) == 1 or call.races:
        return None
    return call.late_at(hedge_after_s, _usual_s_per_token(replicas, but=call.replica))


def late_calls(
    calls: Collection[Call], replicas: Sequence[Replica], hedge_after_s: float | None, now: float
) -> list[Call]:
    """The calls that should be hedged now, the longest silent first."""
    late = [call for call in calls if (at := late_at(call, replicas, hedge_after_s)) is not None and at <= now]
    return sorted(late, key=lambda call: call.progress_at)


def choose_hedge(
    call: Call, late: Sequence[Call], replicas: Sequence[Replica], now: float
) -> tuple[Replica, list[Job]] | None:
    """Chooses the replica, and the unscored jobs of `call`, for a second call; None if no replica can take them."""
    jobs = [job for job in call.unscored() if len(job.calls) == 1]
    late_replicas = {other.replica for other in late}
    # Until the pace of another replica is known, all of them may be this slow: only an idle one is asked.
    pace_unknown = _usual_s_per_token(replicas, but=call.replica) is None
    free = [
        replica
        for replica in replicas
        if replica.is_available(now) and replica not in late_replicas and replica.has_room
        if not (pace_unknown and replica.calls) and not any(replica.endpoint in job.bad_replies for job in jobs)
    ]
    if not jobs or not free:
        return None
    replica = min(free, key=lambda r: r.outstanding_tokens)
    bytes_left = replica.max_request_bytes - REQUEST_OVERHEAD_BYTES
    stops = itertools.accumulate(job.num_bytes for job in jobs)
    fitting = [job for job, stop in zip(jobs, stops, strict=True) if stop <= bytes_left]
    return replica, fitting or jobs[:1]


def give_up_hung_calls(calls: Collection[Call], replicas: Sequence[Replica], stall_s: float, now: float) -> None:
    """Cancels the calls whose server has been silent for too long; their jobs return to the queue."""
    for hung in [call for call in calls if not call.given_up and call.hung_at(stall_s) <= now]:
        replica = hung.replica
        silent_s = now - hung.progress_at
        affected = [hung]
        if replica.message_at <= hung.progress_at:  # no call at this replica has received anything since
            affected = [call for call in calls if call.replica is replica]
            if any(other is not replica and other.is_available(now) for other in replicas):
                replica.left_behind(now, silent_s)
        for call in affected:
            if call.given_up:
                continue
            call.given_up = True
            replica.error = f"{replica.endpoint}: is connected, but has sent no scores for {silent_s:.1f} s"
            logger.warning("%s: %d sequences will be scored again", replica.error, len(call.unscored()))
            for job in call.jobs:
                job.stalls += 1
            assert call.task is not None
            call.task.cancel()


def _usual_s_per_token(replicas: Sequence[Replica], *, but: Replica) -> float | None:
    """Pace of the fastest replica other than `but`; None if none of them has finished a call."""
    paces = (replica.pace.s_per_token for replica in replicas if replica is not but)
    return min((pace for pace in paces if pace is not None), default=None)
