"""A batch on its way to one replica, and when it is late (another replica is asked too) or hung (it is given up).

Late is relative: as long as the other replicas would have taken several times over. A fixed time would hedge every call
of a large teacher, or none of a small one.
"""

from __future__ import annotations

import asyncio
import dataclasses

from jdistill.client.jobs import Job
from jdistill.client.replica import Replica
from jdistill.client.verification import Reply

LATE_FACTOR = 4.0  # times what the fastest other replica takes: above any scatter of equal machines
HUNG_FACTOR = 10.0  # times what the replica itself usually takes


@dataclasses.dataclass(eq=False, slots=True)
class Call:
    """One ScoreSequences: `jobs` at `replica`. Times are the loop's.

    Args:
        load: tokens outstanding at the replica when it began, its own included.
        is_hedge: it began because another call with the same jobs was late.
        races: another call carries its jobs too, so each sequence is delivered as soon as it is whole.
        progress_at: when its last message came.
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
        # Twice as much after each time, or a server that is only slow would never get them done.
        self._patience = 2 ** max(job.stalls for job in self.jobs)

    def unscored(self) -> list[Job]:
        """Its jobs that are not whole yet, in order."""
        return [job for b, job in enumerate(self.jobs) if not job.future.done() and self.reply.complete(b) is None]

    def late_at(self, hedge_after_s: float, usual_s_per_token: float | None) -> float:
        """When another replica should be asked too, given how fast the others are.

        None: nobody knows, and as long as messages come all may be as it should.
        """
        if usual_s_per_token is None:
            return self.progress_at + hedge_after_s
        return self.started_at + max(hedge_after_s, LATE_FACTOR * usual_s_per_token * self.load)

    def hung_at(self, stall_s: float) -> float:
        """When it is given up."""
        usual_s = HUNG_FACTOR * (self.replica.pace.s_per_token or 0.0) * self.load
        return self.progress_at + max(stall_s, usual_s) * self._patience
