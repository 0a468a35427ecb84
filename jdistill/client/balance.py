"""Choose the next batch and its replica: equal shares, the least loaded replica first."""

from __future__ import annotations

from collections.abc import Sequence

from jdistill.client.jobs import Job, JobQueue
from jdistill.client.replica import MAX_CALL_BYTES, REQUEST_OVERHEAD_BYTES, Replica


def take_batch(
    queue: JobQueue, replicas: Sequence[Replica], *, batch_tokens: int, now: float
) -> tuple[Replica, list[Job]] | None:
    """Removes the jobs of the next call from the queue; None if no replica can take any of them now."""
    available = [replica for replica in replicas if replica.is_available(now)]
    free = [replica for replica in available if replica.has_room]
    # An equal share per available replica, with or without room now: calls get smaller towards the end of a batch, so
    # that all replicas finish together, and a batch smaller than batch_tokens leaves none of them idle.
    share = -(-queue.num_tokens // max(1, len(available)))
    for replica in sorted(free, key=lambda r: r.outstanding_tokens):  # stable: ties follow the order of endpoints
        max_tokens = min(batch_tokens, share, replica.max_queued_tokens)
        max_bytes = min(MAX_CALL_BYTES, replica.max_request_bytes) - REQUEST_OVERHEAD_BYTES
        if jobs := queue.take(replica.endpoint, max_tokens, max_bytes):
            return replica, jobs
    return None
