"""One sequence on its way to its scores, and the queue of those that wait: in order, by kind, never scanned.

The textbook has one deque; but only jobs of one kind (options, replicas that may score them) share a call, and picking
them out of a deque costs a pass over all that wait for every call: quadratic for a large batch.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jdistill.wire import codec
from jdistill.wire.errors import TeacherError, VerificationError
from jdistill.wire.types import SequenceToScore, TokenScores


@dataclasses.dataclass(eq=False, slots=True)
class Job:
    """One sequence on its way to one TokenScores.

    Args:
        index: what errors call it.
        deadline: in the loop's time.
        crc, num_tokens: of the sequence as the teacher sees it, its prefix in place.
        order: of submission; set by the dispatcher.
        group: of one call of `score`: all of them or one error.
        bad_replies: by endpoint; those replicas are not asked again.
        sink: takes the scores instead of the future, in the loop's thread, so that they need not be kept until all of
            a batch are there.
        calls: that carry it now; two, and never more, if it is hedged.
        stalls: times that a server was given up over it.
    """

    sequence: SequenceToScore
    index: int
    top_k: int
    temperature: float
    deadline: float
    crc: int
    num_tokens: int
    num_bytes: int
    future: concurrent.futures.Future[Any] = dataclasses.field(default_factory=concurrent.futures.Future)
    order: int = 0
    group: Sequence[Job] = ()
    sink: Callable[[TokenScores], None] | None = None
    attempts: int = 0
    server_faults: int = 0
    token_renewed: bool = False
    stalls: int = 0
    bad_replies: dict[str, VerificationError] = dataclasses.field(default_factory=dict)
    calls: set[Any] = dataclasses.field(default_factory=set)
    queued: bool = False

    @property
    def kind(self) -> tuple[int, float, int, frozenset[str]]:
        """Jobs of one kind can share a call: top_k, temperature, candidates a position, replicas that may not."""
        candidates = self.sequence.candidate_ids
        return (
            self.top_k,
            self.temperature,
            0 if candidates is None else candidates.shape[1],
            frozenset(self.bad_replies) if self.bad_replies else _NOBODY,
        )

    def succeed(self, scores: TokenScores) -> None:
        """Ends the job; a job that has ended stays as it is."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            if self.sink is None:
                self.future.set_result(scores)
                return
            try:
                self.sink(scores)
            except Exception as e:  # no memory for the batch, perhaps
                self.future.set_exception(e)
            else:
                self.future.set_result(None)

    def fail(self, error: TeacherError) -> None:
        """Ends the job and its group: what nobody will get is not sent. A job that has ended stays as it is."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)
            for other in self.group:
                other.future.cancel()


_NOBODY: frozenset[str] = frozenset()


class JobQueue:
    """Jobs that wait, oldest first. Each operation costs O(log n) a job; `len` and `num_tokens` cost nothing."""

    def __init__(self) -> None:
        self._heaps: dict[Any, list[tuple[int, Job]]] = {}  # by kind; (order, job)
        self._count = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._count

    def add(self, job: Job) -> None:
        """Puts a job where its order says: one that comes back after a failed call is the oldest of all."""
        assert not job.queued
        job.queued = True
        self._count += 1
        self.num_tokens += job.num_tokens
        heapq.heappush(self._heaps.setdefault(job.kind, []), (job.order, job))

    def discard(self, job: Job) -> None:
        """Forgets a job that has ended; does nothing to one that does not wait."""
        if job.queued:  # its entry is dropped when it comes to the front
            job.queued = False
            self._count -= 1
            self.num_tokens -= job.num_tokens

    def oldest(self) -> Job | None:
        """The job at the front of all kinds."""
        return min((heap[0][1] for heap in self._fronts()), key=lambda job: job.order, default=None)

    def take(self, endpoint: str, max_tokens: int, max_bytes: int) -> list[Job]:
        """Removes the next batch that this replica may score: its oldest job, whatever its size, and more of its kind.

        No smaller job jumps the queue when the next one does not fit: calls go out in the order of submission.
        """
        may = [heap for heap in self._fronts() if endpoint not in heap[0][1].bad_replies]
        if not may:
            return []
        heap = min(may, key=lambda heap: heap[0][0])
        jobs: list[Job] = []
        while heap:
            job = heap[0][1]
            if job.queued and not job.future.done():
                if jobs and (job.num_tokens > max_tokens or job.num_bytes > max_bytes):
                    break
                jobs.append(job)
                max_tokens -= job.num_tokens
                max_bytes -= job.num_bytes
            self.discard(job)
            heapq.heappop(heap)
        return jobs

    def take_overdue(self, now: float) -> list[Job]:
        """Removes the jobs whose deadline is over; all have the same deadline_s, so they end in their order."""
        overdue = []
        for heap in self._fronts():
            while heap and (not heap[0][1].queued or heap[0][1].deadline <= now):
                job = heapq.heappop(heap)[1]
                if job.queued:
                    self.discard(job)
                    overdue.append(job)
        return overdue

    def take_all(self) -> list[Job]:
        """Removes all jobs, oldest first."""
        jobs = [job for _, job in sorted(entry for heap in self._heaps.values() for entry in heap) if job.queued]
        self._heaps.clear()
        for job in jobs:
            self.discard(job)
        return jobs

    def _fronts(self) -> Iterator[list[tuple[int, Job]]]:
        """The heaps, each with a job that waits at its front."""
        for kind, heap in list(self._heaps.items()):
            while heap and (not heap[0][1].queued or heap[0][1].future.done()):
                self.discard(heapq.heappop(heap)[1])
            if heap:
                yield heap
            else:
                del self._heaps[kind]


def make_job(sequence: SequenceToScore, *, index: int, top_k: int, temperature: float, deadline: float) -> Job:
    """A Job of a sequence whose arrays nobody else will change."""
    token_ids, prefix = sequence.token_ids, sequence.teacher_prefix
    scored_ids = token_ids
    if prefix is not None and token_ids.ndim == prefix.ndim == 1:  # else it is refused before it is sent
        scored_ids = sequence.as_scored().token_ids
    return Job(
        sequence=sequence,
        index=index,
        top_k=top_k,
        temperature=temperature,
        deadline=deadline,
        crc=codec.token_crc(scored_ids),
        num_tokens=len(scored_ids),
        num_bytes=codec.request_bytes(sequence),
    )
