"""From submitted to queued: sequences that arrive together share a call; each is checked against the limits.

The first ones wait for the preflight, which finds out those limits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from jdistill.client.jobs import Job, unexpected
from jdistill.client.pool import ReplicaPool
from jdistill.client.replica import REQUEST_OVERHEAD_BYTES
from jdistill.wire.errors import InvalidRequestError, TeacherError
from jdistill.wire.types import ModelInfo
from jdistill.wire.validate import validate_options, validate_sequence

COALESCE_S = 0.003  # how long a submitted sequence waits for others to share its call


class Admission:
    """Stages jobs, validates them and hands the valid ones on; lives on the loop.

    Args:
        batch_tokens: this many staged tokens need not wait for more.
        on_admitted: takes the valid jobs, in order.
    """

    def __init__(self, pool: ReplicaPool, *, batch_tokens: int, on_admitted: Callable[[list[Job]], None]):
        self._loop = asyncio.get_running_loop()
        self._pool = pool
        self._batch_tokens = batch_tokens
        self._on_admitted = on_admitted
        self._staged: list[Job] = []
        self._staged_tokens = 0
        self._timer: asyncio.TimerHandle | None = None
        self._in_preflight: set[Job] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def stage(self, jobs: Sequence[Job], *, coalesce: bool) -> None:
        """Takes jobs in order; with `coalesce` they wait a moment for others that could share their call."""
        self._staged_tokens += sum(job.num_tokens for job in jobs)
        self._staged += jobs
        if not coalesce or self._staged_tokens >= self._batch_tokens:
            self._flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(COALESCE_S, self._flush)

    async def close(self) -> list[Job]:
        """Stops all work and returns the jobs that were not admitted."""
        if self._timer is not None:
            self._timer.cancel()
        jobs = [*self._staged, *self._in_preflight]
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return jobs

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        jobs, self._staged, self._staged_tokens = self._staged, [], 0
        if self._pool.model is None:
            self._in_preflight.update(jobs)
            task = self._loop.create_task(self._admit_after_preflight(jobs))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._admit(jobs)

    async def _admit_after_preflight(self, jobs: list[Job]) -> None:
        try:
            await self._pool.ensure_model(min(job.deadline for job in jobs))
        except Exception as e:
            error = e if isinstance(e, TeacherError) else unexpected(e)
            for job in jobs:
                job.fail(error)
        else:
            self._admit(jobs)
        finally:
            self._in_preflight.difference_update(jobs)

    def _admit(self, jobs: list[Job]) -> None:
        assert self._pool.model is not None
        max_bytes = min(replica.max_request_bytes for replica in self._pool.replicas)
        admitted = []
        for job in jobs:
            if job.future.done():
                continue  # cancelled, perhaps because another job of its group was refused
            try:
                _validate(job, self._pool.model, max_bytes)
            except Exception as e:
                job.fail(e if isinstance(e, TeacherError) else unexpected(e))
            else:
                admitted.append(job)
        self._on_admitted(admitted)


def _validate(job: Job, info: ModelInfo, max_bytes: float) -> None:
    """Raises a TeacherError if the teacher cannot score this job."""
    validate_options(info=info, top_k=job.top_k, temperature=job.temperature)
    validate_sequence(job.sequence, job.index, info=info)
    num_bytes = job.num_bytes + REQUEST_OVERHEAD_BYTES
    if num_bytes > max_bytes:
        raise InvalidRequestError(
            f"sequence {job.index} makes a request of {num_bytes} bytes, the teacher accepts {max_bytes}",
            sequence=job.index,
        )
