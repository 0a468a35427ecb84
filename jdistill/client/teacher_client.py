"""TeacherClient: the synchronous, thread-safe interface to one dispatcher per teacher."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import itertools
import math
import os
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc
import numpy as np

from jdistill.client import alignment, background
from jdistill.client.alignment import BatchScores
from jdistill.client.dispatch import Dispatcher
from jdistill.client.jobs import Job, make_job
from jdistill.client.pool import ReplicaPool, Settings
from jdistill.client.teachers import Endpoints, choose_teacher, parse_teachers
from jdistill.client.token import BearerToken
from jdistill.client.waiting import WaitReport
from jdistill.wire.errors import InvalidRequestError
from jdistill.wire.types import SequenceToScore, ServerInfo, TokenScores

T = TypeVar("T")


class TeacherClient:
    """Scores sequences under one or several teachers, each served by one or more equivalent sidecars.

    Every reply is verified (ids, counts, model, temperature, values) before any number of it is returned, and every
    sequence is scored exactly once or fails with an error. Replicas that die are left out until they answer again; a
    replica that returns with another model stays out. While none is up, calls wait until `deadline_s`.

    A client works only in the process that created it; in a child made by fork() it, and any new one, raises an error.
    Start workers before the first client is created, or with multiprocessing's "spawn" or "forkserver".

    Args:
        endpoints: "host:port" or "unix:/path" of each replica; or a `Teacher`, which also names the model or adapter
            that scores; or a mapping from names to either, for several teachers (`SequenceToScore.teacher`).
        deadline_s: over all attempts of one call of `score`, `submit`, `info`, `sleep` or `wake`.
        max_in_flight: concurrent calls per replica; fewer for a while after it was overloaded.
        batch_tokens: tokens per call; a longer sequence goes alone.
        hedge_after_s: when a call takes longer than this, and than four times what the fastest other replica would have
            needed, its unscored sequences are also sent to another replica with room; for each sequence the first
            complete, verified answer counts. None: never.
        stall_s: a call whose server is silent for this long, and for ten times what it usually needs, is given up and
            its sequences are retried with twice the patience. A replica that sent nothing at all is then left alone for
            as long as it was silent (twice as long each time, at most 300 s) while others are up.
        expected_tokenizer_fingerprint: of the student's tokenizer (`jdistill.checkpoint_files.tokenizer_fingerprint`);
            each teacher's must be equal. None or "": not compared.
        credentials: for TLS, from `grpc.ssl_channel_credentials`; None: plain text.
        token: sent as "authorization: Bearer ..." with each call. A function is called when a token is first needed and
            again when a server refuses the token, so it can be rotated. Without TLS anyone on the network can read it.
        on_wait: called with a message (every 10 s) while work waits because no replica is up, and with None once it
            continues; runs in the background thread, so it must be quick. The logger "jdistill.client" says the same.

    Raises:
        ValueError: malformed endpoints, or a number that is not positive and finite.
        RuntimeError: this process was forked from one that had created a client.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        *,
        deadline_s: float = 600.0,
        max_in_flight: int = 4,
        batch_tokens: int = 16384,
        hedge_after_s: float | None = 1.0,
        stall_s: float = 120.0,
        expected_tokenizer_fingerprint: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | Callable[[], str] | None = None,
        on_wait: Callable[[str | None], None] | None = None,
    ):
        teachers = parse_teachers(endpoints)
        for name, value in (
            ("deadline_s", deadline_s),
            ("max_in_flight", max_in_flight),
            ("batch_tokens", batch_tokens),
            ("hedge_after_s", hedge_after_s),
            ("stall_s", stall_s),
        ):
            if value is None and name == "hedge_after_s":
                continue
            if value is None or not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} = {value}, expected a number above 0")
        self._deadline_s = deadline_s
        self._submitted = itertools.count()
        self._closed = False
        self._pid = os.getpid()
        self._loop = background.get_loop()
        settings = Settings(
            deadline_s=deadline_s,
            max_in_flight=max_in_flight,
            batch_tokens=batch_tokens,
            hedge_after_s=hedge_after_s,
            stall_s=stall_s,
            expected_tokenizer_fingerprint=expected_tokenizer_fingerprint,
            credentials=credentials,
            client_id=uuid.uuid4().hex[:8],
        )

        async def create() -> dict[str, Dispatcher]:
            shared_token = None if token is None else BearerToken(token)
            report = WaitReport(on_wait)
            return {
                name: Dispatcher(name, teacher, settings, token=shared_token, report=report)
                for name, teacher in teachers.items()
            }

        self._dispatchers = self._run(create())
        background.open_clients.add(self)

    def info(self, teacher: str = "") -> ServerInfo:
        """Runs the preflight: asks all replicas of a teacher what they serve, and compares them.

        Waits until at least one replica answers; the others are left out until they do. In the result, `.model` is the
        model that scores, with the tightest limits of all replicas.

        Args:
            teacher: name of the teacher, if there are several.

        Raises:
            InvalidRequestError: no teacher has this name, or it does not serve the model (ModelNotFoundError); lists
                the names.
            FingerprintMismatchError: replicas differ in model, tokenizer or vocabulary, or the tokenizer is not the
                expected one, or the teacher has changed since the first call.
            DeadlineError: no replica answered.
        """
        self._check_open()
        return self._run(self._dispatchers[choose_teacher(teacher, list(self._dispatchers))].pool.info())

    def check_can_sleep(self, teacher: str | None = None) -> None:
        """Raises UnsupportedError, with the endpoint, if a replica of that teacher (None: of any teacher) cannot sleep.

        A run that will need `sleep` should call this before its first step, not find out at step 900.
        """
        self._control(ReplicaPool.check_can_sleep, teacher)

    def sleep(self, teacher: str | None = None) -> None:
        """Frees the accelerators of all replicas of that teacher (None: of all teachers); returns when that is done.

        A replica that is down is not an error. Sequences submitted meanwhile wake the teacher or wait for `wake`,
        depending on the sidecars' configuration (on_sleep).

        Raises:
            UnsupportedError: a replica cannot sleep, see `check_can_sleep`.
            TeacherError: a replica failed to sleep; names its endpoint.
        """
        self._control(ReplicaPool.sleep, teacher)

    def wake(self, teacher: str | None = None) -> None:
        """Undoes `sleep`; returns when the replicas are ready, ignoring those that are down if others are up.

        Raises:
            UnsupportedError, TeacherError: as `sleep`.
            FingerprintMismatchError: a replica woke up with another model.
            DeadlineError: no replica is up.
        """
        self._control(ReplicaPool.wake, teacher)

    def score(
        self, sequences: Sequence[SequenceToScore], *, top_k: int = 0, temperature: float = 1.0
    ) -> list[TokenScores]:
        """Scores all sequences and returns their scores in the same order; if one fails, all fail with its error.

        Args:
            sequences: any number of sequences of any lengths.
            top_k: also return the teacher's k most likely tokens at each scored position.
            temperature: divides the teacher's logits.

        Raises:
            InvalidRequestError: names field and sequence.
            UnsupportedError: the teacher's engine cannot do this.
            VerificationError: a reply was wrong, and there is no other replica to ask.
            FingerprintMismatchError: as `info`.
            DeadlineError: lists the last error of each replica.
        """
        return self._score(sequences, range(len(sequences)), top_k, temperature)

    def submit(
        self, sequence: SequenceToScore, *, top_k: int = 0, temperature: float = 1.0
    ) -> concurrent.futures.Future[TokenScores]:
        """Scores one sequence in the background, so that scoring overlaps with the rollout.

        Sequences submitted within a few milliseconds of each other share a call. The future raises what `score` raises;
        cancelling it cancels the work. Its callbacks run in the background thread and must not block.
        """
        self._check_open()
        dispatcher, job = self._job(sequence, next(self._submitted), top_k, temperature)
        background.submitted.add(job.future)
        self._loop.call_soon_threadsafe(lambda: dispatcher.submit([job], coalesce=True))
        return job.future

    def score_batch(
        self,
        tokens_BS: Any,
        loss_mask_BT: Any,
        *,
        lengths_B: Any = None,
        candidate_ids_BTC: Any = None,
        teachers_B: Sequence[str] | None = None,
        teacher_prefixes_B: Sequence[Any] | None = None,
        num_replaced_B: Any = None,
        top_k: int = 0,
        temperature: float = 1.0,
    ) -> BatchScores:
        """Scores a padded batch where the mask is true, on the target grid: target t is token t + 1.

        Args:
            tokens_BS: integers [B, S], padded on the right with any value.
            loss_mask_BT: bool [B, S - 1], may have holes. A row with an empty mask is not sent.
            lengths_B: number of real tokens of each row; a mask beyond it is an error. Default: up to the last target.
            candidate_ids_BTC: integers [B, S - 1, C] to score beside the tokens; ignored where the mask is false.
            teachers_B: name of each row's teacher; default: the only one.
            teacher_prefixes_B: for each row, the tokens that its teacher sees in place of the first
                `num_replaced_B[b]` tokens (integers [R]), or None to keep the row unchanged. The grid stays the
                student's.
            num_replaced_B: integers [B]; default: 0, so that the prefix goes before the whole row.
            top_k, temperature: as in `score`.

        Returns:
            Numpy arrays; invalid targets hold NaN (ids: -1), so that a missing score cannot pass for a number.

        Raises:
            TeacherError: as `score`; `sequence` of an InvalidRequestError is the row.
        """
        loss_mask_BT = np.asarray(loss_mask_BT)
        candidates = None if candidate_ids_BTC is None else np.asarray(candidate_ids_BTC)
        rows, sequences = alignment.to_sequences(
            np.asarray(tokens_BS),
            loss_mask_BT,
            lengths_B=None if lengths_B is None else np.asarray(lengths_B),
            candidate_ids_BTC=candidates,
            teachers_B=teachers_B,
            teacher_prefixes_B=teacher_prefixes_B,
            num_replaced_B=None if num_replaced_B is None else np.asarray(num_replaced_B),
        )
        count = 0 if candidates is None else candidates.shape[2]
        builder = alignment.BatchBuilder(loss_mask_BT, top_k=top_k, candidate_count=count)
        # Each row goes to the grid when it arrives: 64 x 32k tokens with top-64 are 1 GB, otherwise held twice.
        sinks = [functools.partial(builder.put, b) for b in rows]
        self._score(sequences, rows, top_k, temperature, sinks)
        return builder.finish()

    def close(self) -> None:
        """Fails unfinished work with UnavailableError and closes the connections; idempotent.

        Does nothing in a forked child: the connections are its parent's.
        """
        if not self._closed and self._pid == os.getpid():
            self._closed = True
            background.open_clients.discard(self)
            for dispatcher in self._dispatchers.values():
                self._run(dispatcher.close())

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score(
        self,
        sequences: Sequence[SequenceToScore],
        indexes: Sequence[int],
        top_k: int,
        temperature: float,
        sinks: Sequence[Callable[[TokenScores], None]] | None = None,
    ) -> list[Any]:
        self._check_open()
        self._check_thread()
        work = [self._job(s, i, top_k, temperature) for s, i in zip(sequences, indexes, strict=True)]
        if not work:
            return []
        jobs = [job for _, job in work]
        for job, sink in zip(jobs, sinks or [None] * len(jobs), strict=True):
            job.sink = sink
        by_dispatcher: dict[Dispatcher, list[Job]] = {}
        for dispatcher, job in work:
            job.group = jobs
            by_dispatcher.setdefault(dispatcher, []).append(job)

        def submit() -> None:
            for dispatcher, its_jobs in by_dispatcher.items():
                dispatcher.submit(its_jobs, coalesce=False)

        self._loop.call_soon_threadsafe(submit)
        futures = [job.future for job in jobs]
        try:
            concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
            for future in futures:  # in input order, so that one failure always gives the same error
                if future.done() and not future.cancelled() and (error := future.exception()) is not None:
                    raise error
            return [future.result() for future in futures]
        finally:
            for future in futures:  # after an error or Ctrl-C; does nothing to futures that are done
                future.cancel()
            for job in jobs:  # break the cycle, which would hold all scores until the garbage collector runs
                job.group = ()

    def _job(self, sequence: SequenceToScore, index: int, top_k: int, temperature: float) -> tuple[Dispatcher, Job]:
        # Copies, so that later changes of the caller's buffers do not change what is scored.
        candidates, prefix = sequence.candidate_ids, sequence.teacher_prefix
        copy = SequenceToScore(
            _int32(sequence.token_ids, "token_ids", index),
            sequence.spans,
            None if candidates is None else _int32(candidates, "candidate_ids", index),
            teacher=choose_teacher(sequence.teacher, list(self._dispatchers), index),
            teacher_prefix=None if prefix is None else _int32(prefix, "teacher_prefix", index),
            num_replaced=int(sequence.num_replaced),
        )
        job = make_job(
            copy,
            index=index,
            top_k=int(top_k),
            temperature=float(temperature),
            deadline=time.monotonic() + self._deadline_s,
        )
        return self._dispatchers[copy.teacher], job

    def _control(self, method: Callable[[ReplicaPool], Coroutine[Any, Any, None]], teacher: str | None) -> None:
        self._check_open()
        names = list(self._dispatchers)
        chosen = names if teacher is None else [choose_teacher(teacher, names)]

        async def all_at_once() -> list[Any]:
            return await asyncio.gather(
                *(method(self._dispatchers[name].pool) for name in chosen), return_exceptions=True
            )

        for result in self._run(all_at_once()):
            if result is not None:
                raise result

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            self._check_thread()
        except BaseException:
            coroutine.close()
            raise
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C while waiting
            raise

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this TeacherClient is closed")
        background.check_process(self._pid)

    def _check_thread(self) -> None:
        if background.is_current_thread():
            raise RuntimeError(
                "a future's callback must not call TeacherClient's blocking methods: it would wait for itself"
            )


def _int32(array: Any, field: str, index: int) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype == np.int32:
        return array.copy()
    if array.size and array.dtype.kind not in "iu":
        raise InvalidRequestError(
            f"{field} of sequence {index} has dtype {array.dtype}, expected integers", field=field, sequence=index
        )
    limit = np.iinfo(np.int32)
    if array.size and (array.min() < limit.min or array.max() > limit.max):
        raise InvalidRequestError(f"{field} of sequence {index} does not fit int32", field=field, sequence=index)
    return array.astype(np.int32)  # a copy always
