"""One sequence on its way to its scores, and the queue of waiting sequences.

The textbook queue is one deque. Here only jobs of one kind (options, replicas that may score them) can share a call,
and picking those out of a deque would scan all waiting jobs for every call: quadratic in the size of a batch.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import heapq
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jdistill.wire import codec
from jdistill.wire.errors import TeacherError, VerificationError
from jdistill.wire.types import SequenceToScore, TokenScores

logger = logging.getLogger("jdistill.client")

_NO_ENDPOINTS: frozenset[str] = frozenset()


class ScoreFuture(concurrent.futures.Future[Any]):
    """The future of one sequence's scores."""

    def abandon(self, error: Exception) -> None:
        """Ends an unfinished future in a forked child, without its callbacks: they are its parent's."""
        self._condition = threading.Condition()  # a thread that the child lacks may have held the old one
        self._waiters = []
        self._done_callbacks = []
        if not self.done():
            self.set_exception(error)


@dataclasses.dataclass(eq=False, slots=True)
class Job:
    """One sequence on its way to one TokenScores.

    Args:
        index: number of the sequence in error messages.
        deadline: in the loop's time.
        crc, num_tokens: of the sequence as the teacher sees it, with its prefix in place.
        num_bytes: what the sequence adds to a request.
        order: position in the order of submission; set by the dispatcher.
        group: all jobs of one call of `score`: they all succeed, or all fail with one error.
        bad_replies: rejected replies by endpoint; those replicas are not asked again.
        sink: takes the scores instead of the future, in the loop's thread, so that a batch need not keep all of its
            scores until the last one has arrived.
        calls: the calls that carry the job now; never more than two, and two only while it is hedged.
        stalls: number of calls with this job that were given up as hung.
    """

    sequence: SequenceToScore
    index: int
    top_k: int
    temperature: float
    deadline: float
    crc: int
    num_tokens: int
    num_bytes: int
    future: ScoreFuture = dataclasses.field(default_factory=ScoreFuture)
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
        """(top_k, temperature, candidates per position, excluded replicas): jobs of one kind can share a call."""
        candidates = self.sequence.candidate_ids
        return (
            self.top_k,
            self.temperature,
            0 if candidates is None else candidates.shape[1],
            frozenset(self.bad_replies) if self.bad_replies else _NO_ENDPOINTS,
        )

    def succeed(self, scores: TokenScores) -> None:
        """Ends the job with its scores; does nothing if the job has already ended."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            if self.sink is None:
                self.future.set_result(scores)
                return
            try:
                self.sink(scores)
            except Exception as e:  # for example no memory for the batch
                self.future.set_exception(e)
            else:
                self.future.set_result(None)

    def fail(self, error: TeacherError) -> None:
        """Ends the job with an error and cancels the rest of its group; does nothing if the job has already ended."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)
            for other in self.group:
                other.future.cancel()


class JobQueue:
    """Waiting jobs, oldest first. Each operation costs O(log n) per job; `len` and `num_tokens` are O(1)."""

    def __init__(self) -> None:
        self._heaps: dict[Any, list[tuple[int, Job]]] = {}  # by kind; (order, job)
        self._count = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._count

    def add(self, job: Job) -> None:
        """Inserts a job at its place in the order of submission, so a job of a failed call goes before newer ones."""
        assert not job.queued
        job.queued = True
        self._count += 1
        self.num_tokens += job.num_tokens
        heapq.heappush(self._heaps.setdefault(job.kind, []), (job.order, job))

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Adds those of `jobs` that have not ended, are in no other call and are not in the queue yet."""
        for job in jobs:
            if not (job.future.done() or job.calls or job.queued):
                self.add(job)

    def discard(self, job: Job) -> None:
        """Removes a job that has ended; does nothing if it is not in the queue."""
        if job.queued:  # its heap entry is dropped when it reaches the front
            job.queued = False
            self._count -= 1
            self.num_tokens -= job.num_tokens

    def oldest(self) -> Job | None:
        """The oldest waiting job of any kind."""
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
        """Removes the jobs whose deadline has passed; deadline_s is the same for all, so deadlines follow the order."""
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
        """Yields the heaps, each with a waiting job at its front."""
        for kind, heap in list(self._heaps.items()):
            while heap and (not heap[0][1].queued or heap[0][1].future.done()):
                self.discard(heapq.heappop(heap)[1])
            if heap:
                yield heap
            else:
                del self._heaps[kind]


def make_job(sequence: SequenceToScore, *, index: int, top_k: int, temperature: float, deadline: float) -> Job:
    """Makes the Job of a sequence whose arrays will not change any more."""
    token_ids, prefix = sequence.token_ids, sequence.teacher_prefix
    scored_ids = token_ids
    if prefix is not None and token_ids.ndim == prefix.ndim == 1:  # otherwise validation refuses it later
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


def unexpected(error: BaseException) -> TeacherError:
    """Turns an unexpected exception into an error for the jobs concerned, so that callers never hang."""
    logger.error("unexpected error in the client; please report it", exc_info=error)
    return TeacherError(f"the client failed with {type(error).__name__}: {error}")
