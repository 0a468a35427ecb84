"""Which sequence goes to which replica and when: batches, balance, retries and deadlines, on one asyncio loop.

A job is one sequence; a call carries a batch of jobs to one replica. Whatever happens to a call, each of its jobs ends
in one of three ways: verified scores, an error, or back in the queue. Other threads come in through the loop only.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import logging
import random
import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from jdistill.client.verification import Reply
from jdistill.wire import codec, status
from jdistill.wire.channel import client_options
from jdistill.wire.errors import (
    DeadlineError,
    FingerprintMismatchError,
    InvalidRequestError,
    OverloadedError,
    TeacherError,
    UnavailableError,
    UnsupportedError,
    VerificationError,
)
from jdistill.wire.types import ModelInfo, SequenceToScore, ServerInfo, TokenScores
from jdistill.wire.validate import validate_options, validate_sequence

logger = logging.getLogger("jdistill.client")

COALESCE_S = 0.003  # how long a submitted sequence waits for others to share its call
PROBE_TIMEOUT_S = 10.0  # of one GetServerInfo: it does no work, so a longer silence is a dead server
MAX_BACKOFF_S = 3.0  # between two probes of a dead replica; a probe is cheap, an idle trainer is not
REPORT_EVERY_S = 10.0
MAX_REQUEST_BYTES = 1 << 20  # of token ids, spans and candidates in one call; far below anybody's limit
REQUEST_OVERHEAD_BYTES = 4096  # names, fingerprint, field tags
MAX_SERVER_FAULTS = 3  # attempts of a sequence that end in an error which nobody has foreseen (INTERNAL, UNKNOWN)

# gRPC says UNAVAILABLE to every TLS mistake, which looks like a server that is not up yet.
_TLS_MISTAKE = re.compile(
    r"(?i)handshake failed|certificate|ssl_error|wrong.version.number|peer name|verification check"
)
_HOPELESS_CODES = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


@dataclasses.dataclass(eq=False, slots=True)
class Job:
    """One sequence on its way to one TokenScores.

    `index` is what errors call it; `deadline` is in the loop's time.
    """

    sequence: SequenceToScore
    index: int
    top_k: int
    temperature: float
    deadline: float
    crc: int
    future: concurrent.futures.Future[TokenScores] = dataclasses.field(default_factory=concurrent.futures.Future)
    group: Sequence[Job] = ()  # of one call of `score`: all of them or one error
    attempts: int = 0
    server_faults: int = 0
    bad_replies: dict[str, VerificationError] = dataclasses.field(default_factory=dict)  # by endpoint
    call: asyncio.Task[None] | None = None

    @property
    def kind(self) -> tuple[int, float, int]:
        """Jobs of one kind can share a call."""
        candidates = self.sequence.candidate_ids
        return self.top_k, self.temperature, 0 if candidates is None else candidates.shape[1]

    @property
    def num_tokens(self) -> int:
        """What it costs, for batches and balance."""
        return len(self.sequence.token_ids)

    def succeed(self, scores: TokenScores) -> None:
        """Ends the job; a job that was cancelled stays so."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_result(scores)

    def fail(self, error: TeacherError) -> None:
        """Ends the job; a job that was cancelled stays so."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Replica:
    """One endpoint: its channel, what is known of it, and what it has to do."""

    def __init__(self, endpoint: str, credentials: grpc.ChannelCredentials | None, token: str | None):
        self.endpoint = endpoint
        # http_proxy and its kin are for the internet; a teacher is a neighbour.
        options = (*client_options(), ("grpc.enable_http_proxy", 0))
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(endpoint, options)
        else:
            self.channel = grpc.aio.secure_channel(endpoint, credentials, options)
        # Without serializers gRPC hands bytes through: the codec reads them.
        self._score = self.channel.unary_stream(codec.SCORE_METHOD)
        self._info = self.channel.unary_unary(codec.INFO_METHOD)
        self._metadata = (("authorization", f"Bearer {token}"),) if token is not None else None
        self.ready = False
        self.refused: FingerprintMismatchError | None = None  # it answers, but is not the teacher of this run
        self.lost = asyncio.Event()
        self.failures = 0  # in a row
        self.paused_until = 0.0  # loop time; an overloaded server is left alone until then
        self.error = "not tried yet"
        self.max_request_bytes = MAX_REQUEST_BYTES
        self.calls = 0
        self.outstanding_tokens = 0

    def score(self, request: bytes, timeout_s: float) -> Any:
        """Starts a call; an asynchronous iterator of messages."""
        return self._score(request, timeout=timeout_s, metadata=self._metadata)

    async def ask(self, timeout_s: float) -> ServerInfo:
        """GetServerInfo, as a TeacherError if it fails."""
        try:
            info = codec.decode_server_info(await self._info(b"", timeout=timeout_s, metadata=self._metadata))
        except grpc.aio.AioRpcError as e:
            error = status.from_rpc_error(e, self.endpoint)
            self.error = str(error)
            if e.code() in _HOPELESS_CODES:
                raise HopelessError(f"{error}; is the token right?") from None
            if _TLS_MISTAKE.search(e.details() or ""):
                raise HopelessError(f"{error}; are the TLS credentials those of this server?") from None
            raise error from None
        if info.max_request_bytes:
            self.max_request_bytes = min(MAX_REQUEST_BYTES, info.max_request_bytes)
        return info

    def backoff_s(self) -> float:
        """Exponential, with jitter: replicas that died together must not be asked together for ever."""
        return min(MAX_BACKOFF_S, 0.1 * 2 ** min(self.failures, 10)) * random.uniform(0.5, 1.0)


class HopelessError(TeacherError):
    """Waiting cannot help: wrong credentials."""


class Dispatcher:
    """All of TeacherClient that lives on the loop; see there for the arguments."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        deadline_s: float,
        max_in_flight: int,
        batch_tokens: int,
        expected_tokenizer_fingerprint: str | None,
        credentials: grpc.ChannelCredentials | None,
        token: str | None,
        on_wait: Callable[[str | None], None] | None,
    ):
        self._loop = asyncio.get_running_loop()
        self._deadline_s = deadline_s
        self._max_in_flight = max_in_flight
        self._batch_tokens = batch_tokens
        self._expected_tokenizer_fingerprint = expected_tokenizer_fingerprint
        self._on_wait = on_wait
        self._replicas = [Replica(endpoint, credentials, token) for endpoint in endpoints]
        self._model: ModelInfo | None = None  # pinned by the preflight; limits are the tightest of all replicas
        self._preflight = asyncio.Lock()
        self._staged: list[Job] = []
        self._staging: asyncio.TimerHandle | None = None
        self._admitting: set[Job] = set()
        self._queue: collections.deque[Job] = collections.deque()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reported_at: float | None = None  # None: not waiting
        self._client_id = uuid.uuid4().hex[:8]
        self._call_ids = itertools.count()
        self._calls: dict[asyncio.Task[None], list[Job]] = {}
        self._closed = False

    # ---- what TeacherClient calls ----

    def submit(self, jobs: Sequence[Job], *, coalesce: bool) -> None:
        """Takes jobs in order; with `coalesce` they wait a moment for others that could share their call."""
        if self._closed:
            for job in jobs:
                job.fail(UnavailableError("this TeacherClient is closed"))
            return
        for job in jobs:
            job.future.add_done_callback(functools.partial(self._done, job))
        self._staged += jobs
        if not coalesce or sum(job.num_tokens for job in self._staged) >= self._batch_tokens:
            self._flush()
        elif self._staging is None:
            self._staging = self._loop.call_later(COALESCE_S, self._flush)

    async def info(self) -> ServerInfo:
        """Asks all replicas; see TeacherClient.info."""
        deadline = self._loop.time() + self._deadline_s
        async with self._preflight:
            return await self._agree(deadline)

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
        jobs = [*self._staged, *self._admitting, *self._queue]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for job in [*jobs, *self._queue]:  # cancelled calls have put theirs back into the queue
            job.fail(error)
        for replica in self._replicas:
            await replica.channel.close()

    # ---- preflight ----

    async def _agree(self, deadline: float) -> ServerInfo:
        """Waits until a replica answers, then compares all that do with each other and with what the run expects."""
        failures = 0
        while True:
            answers = await asyncio.gather(
                *(r.ask(max(0.1, min(PROBE_TIMEOUT_S, deadline - self._loop.time()))) for r in self._replicas),
                return_exceptions=True,
            )
            for answer in answers:
                if isinstance(answer, BaseException) and not isinstance(answer, TeacherError):
                    raise answer
            infos = [(r, a) for r, a in zip(self._replicas, answers, strict=True) if isinstance(a, ServerInfo)]
            if infos:
                break
            for answer in answers:
                if not isinstance(answer, UnavailableError | DeadlineError):
                    raise answer  # wrong credentials, not a teacher: nobody will put it right while we wait
            now = self._loop.time()
            if now >= deadline:
                self._stop_waiting()
                raise DeadlineError(
                    f"no teacher has answered within {self._deadline_s:g} s: {self._errors_by_endpoint()}. Is it "
                    "running, and is the address right?"
                )
            self._report_waiting(deadline)
            failures += 1
            await asyncio.sleep(min(deadline - now, MAX_BACKOFF_S, 0.1 * 2**failures) * random.uniform(0.5, 1.0))
        self._stop_waiting()
        model = self._check_agreement(infos)
        if self._model is not None:
            if problem := self._compare(model):
                raise FingerprintMismatchError(f"the teacher was exchanged since this client's first call: {problem}")
            return dataclasses.replace(infos[0][1], models=(self._model,))
        self._model = model
        answered = {r for r, _ in infos}
        for replica in self._replicas:
            replica.ready = replica in answered
            if not replica.ready:
                logger.warning("teacher %s is left out until it answers: %s", replica.endpoint, replica.error)
                replica.lost.set()
            self._spawn(self._watch(replica))
        return dataclasses.replace(infos[0][1], models=(model,))

    def _check_agreement(self, infos: Sequence[tuple[Replica, ServerInfo]]) -> ModelInfo:
        """The model that all of them serve."""
        for name in ("fingerprint", "tokenizer_fingerprint", "vocab_size"):
            endpoints: dict[Any, list[str]] = {}
            for replica, info in infos:
                endpoints.setdefault(getattr(info.model, name), []).append(replica.endpoint)
            if len(endpoints) > 1:
                parts = "; ".join(f"{', '.join(who)}: {value!r}" for value, who in endpoints.items())
                raise FingerprintMismatchError(
                    f"the teacher replicas differ in {name}: {parts}. All replicas of one teacher serve the same "
                    "checkpoint in the same dtype: restart those that differ"
                )
        model = infos[0][1].model
        expected = self._expected_tokenizer_fingerprint
        if expected and model.tokenizer_fingerprint != expected:
            has = f"{model.tokenizer_fingerprint!r}" if model.tokenizer_fingerprint else "none (no tokenizer files)"
            raise FingerprintMismatchError(
                f"the tokenizer of teacher {model.model!r} has the fingerprint {has}, the student's {expected!r}: the "
                "same id means another text on each side, and every score would be wrong. Use a teacher of the same "
                "model family, or save the student's tokenizer files beside the teacher's checkpoint if only they "
                "differ"
            )
        limits = {
            name: min(getattr(info.model, name) for _, info in infos)
            for name in ("max_sequence_length", "max_top_k", "max_candidate_count", "any_temperature")
        }
        return dataclasses.replace(model, **limits)

    def _compare(self, model: ModelInfo) -> str | None:
        """How `model` differs from the pinned one in a way that matters; None if it does not."""
        assert self._model is not None
        for name in ("fingerprint", "tokenizer_fingerprint", "vocab_size"):
            if getattr(model, name) != getattr(self._model, name):
                return f"{name} is now {getattr(model, name)!r}, was {getattr(self._model, name)!r}"
        for name in ("max_sequence_length", "max_top_k", "max_candidate_count", "any_temperature"):
            if getattr(model, name) < getattr(self._model, name):
                return f"{name} is now {getattr(model, name)}, was {getattr(self._model, name)}"
        return None

    # ---- replicas ----

    async def _watch(self, replica: Replica) -> None:
        """Brings a lost replica back once it answers as the same model."""
        while True:
            await replica.lost.wait()
            self._report_if_waiting()
            await asyncio.sleep(replica.backoff_s())
            try:
                info = await replica.ask(PROBE_TIMEOUT_S)
            except TeacherError:
                replica.failures += 1
                replica.refused = None
                continue
            if problem := self._compare(info.model):
                replica.failures += 1
                self._refuse(
                    replica,
                    FingerprintMismatchError(
                        f"{replica.endpoint}: {problem}; another model than this run began with. Restart that teacher "
                        "with the first one's checkpoint and dtype, or start a new run"
                    ),
                )
                continue
            replica.refused = None
            replica.ready = True
            replica.lost.clear()
            logger.info("teacher %s is back", replica.endpoint)
            self._pump()

    def _lose(self, replica: Replica, error: TeacherError) -> None:
        replica.error = str(error)
        if replica.ready:
            replica.ready = False
            replica.failures += 1
            logger.warning("teacher %s is left out until it answers again: %s", replica.endpoint, error)
        replica.lost.set()

    def _refuse(self, replica: Replica, error: FingerprintMismatchError) -> None:
        """Leaves out a server that is not this run's teacher; looks at it again from time to time."""
        if replica.refused is None:
            logger.error("teacher left out: %s", error)
        replica.error = str(error)
        replica.refused = error
        replica.ready = False
        replica.lost.set()
        if all(r.refused is not None for r in self._replicas):
            # Nobody is left, dead or alive, who could come back with the right weights on their own.
            everyone = "; ".join(str(r.refused) for r in self._replicas)
            jobs = list(self._queue)
            self._queue.clear()
            for job in jobs:
                job.fail(FingerprintMismatchError(everyone))

    # ---- from staged to queued ----

    def _flush(self) -> None:
        if self._staging is not None:
            self._staging.cancel()
            self._staging = None
        jobs, self._staged = self._staged, []
        if self._model is None:
            self._admitting.update(jobs)
            self._spawn(self._admit_after_preflight(jobs))
        else:
            self._admit(jobs)

    async def _admit_after_preflight(self, jobs: list[Job]) -> None:
        try:
            async with self._preflight:  # first come, first served: the order of submission stays
                if self._model is None:
                    await self._agree(min(job.deadline for job in jobs))
        except Exception as e:
            if not isinstance(e, TeacherError):  # a bug of ours must not leave anybody waiting
                logger.exception("preflight")
                e = TeacherError(f"the client failed with {type(e).__name__}: {e}")
            for job in jobs:
                job.fail(e)
        else:
            self._admit(jobs)
        finally:
            self._admitting.difference_update(jobs)

    def _admit(self, jobs: list[Job]) -> None:
        assert self._model is not None
        limit = min(r.max_request_bytes for r in self._replicas)
        for job in jobs:
            try:
                validate_options(info=self._model, top_k=job.top_k, temperature=job.temperature)
                validate_sequence(job.sequence, job.index, info=self._model)
                num_bytes = codec.request_bytes(job.sequence) + REQUEST_OVERHEAD_BYTES
                if num_bytes > limit < MAX_REQUEST_BYTES:
                    raise InvalidRequestError(
                        f"sequence {job.index} makes a request of {num_bytes} bytes, the teacher takes {limit}",
                        sequence=job.index,
                    )
            except TeacherError as e:
                job.fail(e)
                for other in job.group:
                    other.future.cancel()  # all or one error: what nobody will get is not sent
            else:
                self._queue.append(job)
        self._pump()

    # ---- from queued to scored ----

    def _pump(self) -> None:
        """Starts whatever calls can start; to be called whenever something has changed."""
        if self._closed:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._loop.time()
        overdue = [job for job in self._queue if job.deadline <= now]
        if overdue or any(job.future.done() for job in self._queue):
            self._queue = collections.deque(j for j in self._queue if j.deadline > now and not j.future.done())
            for job in overdue:
                self._expire(job)
        self._start_calls(now)
        if not self._queue:
            self._stop_waiting()
            return
        self._report_if_waiting()
        wake_at = min(job.deadline for job in self._queue)
        wake_at = min([wake_at, *(r.paused_until for r in self._replicas if r.ready and r.paused_until > now)])
        self._timer = self._loop.call_at(wake_at, self._pump)

    def _start_calls(self, now: float) -> None:
        while self._queue:
            free = [r for r in self._replicas if r.ready and r.calls < self._max_in_flight and r.paused_until <= now]
            # An even share, so that a batch smaller than batch_tokens does not leave other replicas idle.
            share = -(-sum(job.num_tokens for job in self._queue) // max(1, len(free)))
            for replica in sorted(free, key=lambda r: r.outstanding_tokens):  # stable: ties in the order of endpoints
                if jobs := self._take(replica, min(self._batch_tokens, share)):
                    self._stop_waiting()
                    task = self._spawn(self._call(replica, jobs))
                    self._calls[task] = jobs
                    task.add_done_callback(self._calls.pop)
                    for job in jobs:
                        job.call = task
                    break
            else:
                return

    def _take(self, replica: Replica, num_tokens: int) -> list[Job]:
        """Removes the next batch for `replica` from the queue: the first job it may have and others of that kind."""
        taken: list[Job] = []
        rest: collections.deque[Job] = collections.deque()
        tokens_left, bytes_left = num_tokens, replica.max_request_bytes - REQUEST_OVERHEAD_BYTES
        full = False
        for job in self._queue:
            num_bytes = codec.request_bytes(job.sequence)
            if full or replica.endpoint in job.bad_replies or (taken and job.kind != taken[0].kind):
                rest.append(job)
            elif taken and (job.num_tokens > tokens_left or num_bytes > bytes_left):
                full = True  # no smaller one jumps the queue: the order of the calls is that of submission
                rest.append(job)
            else:
                taken.append(job)
                tokens_left -= job.num_tokens
                bytes_left -= num_bytes
        self._queue = rest
        replica.calls += bool(taken)
        replica.outstanding_tokens += sum(job.num_tokens for job in taken)
        return taken

    async def _call(self, replica: Replica, jobs: list[Job]) -> None:
        """One call from start to end; afterwards each job has ended or is back in the queue."""
        assert self._model is not None
        top_k, temperature, _ = jobs[0].kind
        reply = Reply(
            [job.sequence for job in jobs],
            [job.crc for job in jobs],
            [job.index for job in jobs],
            endpoint=replica.endpoint,
            info=self._model,
            top_k=top_k,
            temperature=temperature,
        )
        stream = None
        try:
            request = codec.encode_request(
                [job.sequence for job in jobs],
                expected_fingerprint=self._model.fingerprint,
                temperature=temperature,
                top_k=top_k,
                request_id=f"{self._client_id}-{next(self._call_ids)}",
            )
            for job in jobs:
                job.attempts += 1
            stream = replica.score(request, max(job.deadline for job in jobs) - self._loop.time())
            async for data in stream:
                reply.add(data)
            scores_B = reply.finish()
        except grpc.aio.AioRpcError as e:
            self._call_failed(replica, jobs, reply, e)
        except VerificationError as e:
            self._reply_was_bad(replica, jobs, reply, e)
        except FingerprintMismatchError as e:
            self._requeue(jobs)
            self._refuse(replica, e)
        except asyncio.CancelledError:
            # We are closing, or nobody wants the result any more (or gRPC has cancelled what we have not: try again).
            self._requeue(jobs)
        except Exception as e:  # a bug of ours must not leave anybody waiting
            logger.exception("call to teacher %s", replica.endpoint)
            for job in jobs:
                job.fail(TeacherError(f"{replica.endpoint}: the client failed with {type(e).__name__}: {e}"))
        else:
            replica.failures = 0
            for job, scores in zip(jobs, scores_B, strict=True):
                job.succeed(scores)
        finally:
            if stream is not None:
                stream.cancel()  # does nothing to a call that has ended
            replica.calls -= 1
            replica.outstanding_tokens -= sum(job.num_tokens for job in jobs)
            for job in jobs:
                job.call = None
            self._pump()

    def _call_failed(self, replica: Replica, jobs: list[Job], reply: Reply, e: grpc.aio.AioRpcError) -> None:
        error = status.from_rpc_error(e, replica.endpoint)
        if isinstance(error, VerificationError):  # the service has seen for itself that its engine's answer is wrong
            self._reply_was_bad(replica, jobs, reply, error)
            return
        # What came whole, and was verified, before the stream broke is as good as any other answer.
        missing = []
        for b, job in enumerate(jobs):
            if (scores := reply.complete(b)) is not None:
                job.succeed(scores)
            else:
                missing.append(job)
        if isinstance(error, FingerprintMismatchError):
            self._requeue(missing)
            self._refuse(replica, error)
        elif isinstance(error, OverloadedError):
            replica.error = str(error)
            replica.failures += 1
            delay_s = status.retry_delay_s(e)
            replica.paused_until = self._loop.time() + max(replica.backoff_s(), delay_s or 0.0)
            self._requeue(missing)
        elif isinstance(error, UnavailableError):
            self._lose(replica, error)
            self._requeue(missing)
        elif isinstance(error, DeadlineError):
            replica.error = str(error)
            self._requeue(missing)  # those whose own deadline is over end there
        elif isinstance(error, InvalidRequestError) and error.sequence is not None and error.sequence < len(jobs):
            blamed = jobs[error.sequence]
            blamed.fail(InvalidRequestError(str(error), field=error.field, sequence=blamed.index))
            self._requeue([job for job in missing if job is not blamed])
        elif isinstance(error, InvalidRequestError | UnsupportedError) or e.code() in _HOPELESS_CODES:
            for job in missing:
                job.fail(error)
        else:
            replica.error = str(error)
            replica.failures += 1
            replica.paused_until = self._loop.time() + replica.backoff_s()
            for job in missing:
                job.server_faults += 1
                if job.server_faults >= MAX_SERVER_FAULTS:
                    job.fail(TeacherError(f"{error} (attempt {job.attempts} of sequence {job.index})"))
            self._requeue(missing)

    def _reply_was_bad(self, replica: Replica, jobs: list[Job], reply: Reply, error: VerificationError) -> None:
        """Uses nothing of a bad reply. The sequence it was bad for goes to another replica, or fails if none is up."""
        logger.error("bad reply of a teacher: %s", error)
        replica.error = str(error)
        blamed = jobs if reply.blamed is None else [jobs[reply.blamed]]
        for job in blamed:
            job.bad_replies[replica.endpoint] = error
            if not any(r.ready and r.endpoint not in job.bad_replies for r in self._replicas):
                job.fail(error)
        self._requeue(jobs)

    def _requeue(self, jobs: Sequence[Job]) -> None:
        self._queue.extendleft(job for job in reversed(jobs) if not job.future.done())

    def _expire(self, job: Job) -> None:
        if job.bad_replies:
            job.fail(next(iter(job.bad_replies.values())))
            return
        attempts = f"{job.attempts} attempt{'' if job.attempts == 1 else 's'}"
        job.fail(
            DeadlineError(
                f"no scores of sequence {job.index} ({job.num_tokens} tokens) within {self._deadline_s:g} s, after "
                f"{attempts}: {self._errors_by_endpoint()}"
            )
        )

    def _done(self, job: Job, future: concurrent.futures.Future[TokenScores]) -> None:
        if future.cancelled():  # by whoever holds it, in any thread
            self._loop.call_soon_threadsafe(self._cancelled, job)

    def _cancelled(self, job: Job) -> None:
        """Ends a call that nobody waits for any more."""
        if job.call is not None and all(other.future.done() for other in self._calls[job.call]):
            job.call.cancel()
        self._pump()

    # ---- telling people ----

    def _report_if_waiting(self) -> None:
        if self._queue and not any(r.ready for r in self._replicas):
            self._report_waiting(self._queue[0].deadline)

    def _report_waiting(self, deadline: float) -> None:
        now = self._loop.time()
        if self._reported_at is not None and now < self._reported_at + REPORT_EVERY_S:
            return
        self._reported_at = now
        left_s = max(0.0, deadline - now)
        message = f"waiting for a teacher, {left_s:.0f} s at most; no replica is up: {self._errors_by_endpoint()}"
        logger.warning("%s", message)
        self._tell(message)

    def _stop_waiting(self) -> None:
        if self._reported_at is not None:
            self._reported_at = None
            self._tell(None)

    def _tell(self, message: str | None) -> None:
        if self._on_wait is not None:
            try:
                self._on_wait(message)
            except Exception:  # a broken progress display must not stop the scoring
                logger.exception("on_wait")

    def _errors_by_endpoint(self) -> str:
        # Errors of the network begin with their endpoint.
        return "; ".join(
            r.error if r.error.startswith(r.endpoint) else f"{r.endpoint}: {r.error}" for r in self._replicas
        )

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
