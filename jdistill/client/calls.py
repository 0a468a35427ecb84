"""A batch of jobs on its way to one replica, and when it counts as late (hedged) or hung (given up).

Late is relative: several times what the other replicas would have needed. A fixed time would hedge every call of a
large teacher, or none of a small one.
"""

from __future__ import annotations

import asyncio
import dataclasses

from jdistill.client.jobs import Job
from jdistill.client.replica import Replica
from jdistill.client.verification import Reply

LATE_FACTOR = 4.0  # times what the fastest other replica needs: above the scatter of equal machines
HUNG_FACTOR = 10.0  # times what the replica itself usually needs


@dataclasses.dataclass(eq=False, slots=True)
class Call:
    """One ScoreSequences call with `jobs` at `replica`. Times are the loop's.

    Args:
        load: tokens outstanding at the replica when the call began, its own included.
        is_hedge: whether the call was started because another call with the same jobs was late.
        races: whether another call carries its jobs too; then each sequence is delivered as soon as it is complete.
        progress_at: arrival of the last message.
        needless: whether the call was cancelled because all of its jobs had ended.
        given_up: whether the call was cancelled because it hung.
    """

    replica: Replica
    jobs: list[Job]
    reply: Reply
    started_at: float
    load: int
    is_hedge: bool = False
    races: bool = False
    progress_at: float = 0.0
    task: asyncio.Task[None] | None = None
    token: str | None = None
    needless: bool = False
    given_up: bool = False
    ended: bool = False
    _patience: int = 1

    def __post_init__(self) -> None:
        self.progress_at = self.started_at
        # Doubled after each stall, or a server that is merely slow would never finish these jobs.
        self._patience = 2 ** max(job.stalls for job in self.jobs)

    def unscored(self) -> list[Job]:
        """Its jobs without complete scores, in order."""
        return [job for b, job in enumerate(self.jobs) if not job.future.done() and self.reply.complete(b) is None]

    def deliver(self) -> list[Job]:
        """Ends the jobs whose scores are complete and returns the others; cancels calls that have become needless."""
        missing, rivals = [], set()
        for b, job in enumerate(self.jobs):
            if (scores := self.reply.complete(b)) is not None:
                job.succeed(scores)  # the first one wins; scores of two calls are never mixed
                rivals |= job.calls
            else:
                missing.append(job)
        if self.reply.is_whole:
            rivals.discard(self)  # its stream is about to end; a cancellation would count as giving up
        for rival in rivals:
            rival.end_if_needless()
        return missing

    def end_if_needless(self) -> None:
        """Cancels the call once all of its jobs have ended."""
        if not self.needless and all(job.future.done() for job in self.jobs):
            self.needless = True
            assert self.task is not None
            self.task.cancel()

    def late_at(self, hedge_after_s: float, usual_s_per_token: float | None) -> float:
        """When another replica should be asked too.

        Args:
            usual_s_per_token: of the fastest other replica; None if no call has ended there yet. Then only silence
                counts: while messages arrive, this replica may be as fast as the others.
        """
        if usual_s_per_token is None:
            return self.progress_at + hedge_after_s
        return self.started_at + max(hedge_after_s, LATE_FACTOR * usual_s_per_token * self.load)

    def hung_at(self, stall_s: float) -> float:
        """When the call should be given up."""
        usual_s = HUNG_FACTOR * (self.replica.pace.s_per_token or 0.0) * self.load
        return self.progress_at + max(stall_s, usual_s) * self._patience
