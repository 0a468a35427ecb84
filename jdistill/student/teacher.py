"""Sends completions to the teacher of a run and hands back its scores."""

from __future__ import annotations

import concurrent.futures
import contextlib
import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from jdistill import checkpoint_files, models, tasks
from jdistill.client import Teacher, TeacherClient
from jdistill.config import ConfigError, TeacherSection, TrainConfig
from jdistill.rollout.completion import Completion
from jdistill.student import hosts
from jdistill.student.batch import SegmentScores
from jdistill.student.cross_tokenizer import CrossTokenizer, Retokenized, scatter
from jdistill.student.recipe import TeacherCapabilities, make_recipe
from jdistill.student.teacher_process import TeacherProcess
from jdistill.tasks.base import Problem, Task
from jdistill.wire import credentials
from jdistill.wire.types import SequenceToScore, ServerInfo, TokenScores


class RemoteTeacher:
    """The teacher or teachers of one run; made after the task, before the student takes its memory.

    Args:
        config: configuration of the run.
        model_config: architecture of the student.
        task: source of the problems that the completions answer. A teacher with another tokenizer gets its prompts
            from the same task made with that tokenizer.
        run_dir: directory in which a sidecar started here writes its log.
        stack: closes the client and ends the sidecar.
        say: shows a message to the user.

    Raises:
        ConfigError: a teacher cannot score this student's samples in the way that the objective needs.
        TeacherError: no teacher is up before the deadline.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: models.DecoderConfig,
        task: Task,
        run_dir: pathlib.Path,
        stack: contextlib.ExitStack,
        *,
        say: Callable[[str], None],
    ):
        teacher = config.teacher
        assert teacher is not None
        self._config = config
        self._task = task
        self.offload = teacher.offload
        tokenizer_path = teacher.tokenizer or config.model.path
        endpoints = _endpoints(teacher, run_dir, stack)
        self._names = list(endpoints)
        self._client = stack.enter_context(_client(teacher, endpoints, tokenizer_path, say))
        if teacher.offload:
            self._client.wake()  # a run that was killed may have left it asleep
            self._client.check_can_sleep()  # now rather than after the first rollout
        infos = [self._client.info(name) for name in self._names]
        self.fingerprints = dict(zip(self._names, (info.model.fingerprint for info in infos), strict=True))
        num_token_ids = 1 + max(task.tokenizer.get_vocab().values())
        for info in infos:
            check_teacher(config, model_config, info, num_token_ids=num_token_ids)
        student_fingerprint = checkpoint_files.tokenizer_fingerprint(config.model.path)
        if teacher.tokenizer and checkpoint_files.tokenizer_fingerprint(teacher.tokenizer) == student_fingerprint:
            say(
                "teacher.tokenizer is the student's own tokenizer: without the key, the teacher would score the "
                "student's tokens instead of spans of text, and candidates too"
            )
        if teacher.tokenizer is None:
            for size in sorted({info.model.vocab_size for info in infos} - {model_config.vocab_size}):
                say(_sizes_differ(model_config.vocab_size, size, num_token_ids))
        self._teacher_task, self._cross = task, None
        if teacher.tokenizer is not None:
            self._teacher_task = tasks.create_task(
                config.task.name, config.task.options, tokenizer_path, seed=task.seed
            )
            self._cross = CrossTokenizer(
                task.tokenizer,
                self._teacher_task.tokenizer,
                student_stop_ids=task.stop_token_ids,
                teacher_stop_id=self._teacher_task.turn_end.appended_id,
                max_length=min(info.model.max_sequence_length for info in infos),
            )
        capabilities = [
            TeacherCapabilities(
                f"{info.engine} {info.engine_version}",
                info.model.max_top_k,
                info.model.max_candidate_count,
                info.model.vocab_size,
            )
            for info in infos
        ]
        self.recipe = make_recipe(config, vocab_size=model_config.vocab_size, teachers=capabilities)
        if teacher.offload:
            self._client.sleep()  # before the student takes its memory

    def new_batch(self) -> BatchScoring:
        """Begins the scoring of one step's completions."""
        return BatchScoring(self)

    def submit(self, sequence: SequenceToScore) -> Future[TokenScores]:
        """Sends one sequence."""
        return self._client.submit(
            sequence, top_k=self.recipe.teacher_top_k, temperature=self._config.rollout.temperature
        )

    def wake(self) -> None:
        """Wakes the teacher; with offload, before a finished rollout is scored."""
        self._client.wake()

    def sleep(self) -> None:
        """Puts the teacher to sleep; with offload, after a rollout was scored."""
        self._client.sleep()

    def to_score(self, problem: Problem, completion: Completion) -> tuple[SequenceToScore, Retokenized | None]:
        """The request for one completion, and its alignment with the tokens of a teacher with another tokenizer."""
        name = self._task.teacher(problem) if len(self._names) > 1 else ""
        prefix, num_replaced = None, 0
        assert self._config.teacher is not None
        privileged = self._config.teacher.privileged
        if self._cross is not None:
            theirs = self._teacher_task.train_problem(problem.index)
            prompt_ids = self._teacher_task.privileged_prompt_ids(theirs) if privileged else theirs.prompt_ids
            retokenized = self._cross.retokenize(prompt_ids, completion.completion_ids)
            return SequenceToScore(retokenized.token_ids, retokenized.spans, teacher=name), retokenized
        candidate_ids = completion.candidate_ids if self.recipe.num_candidates else None
        if (num_shared := self.recipe.num_shared_ids) is not None:
            _check_shared(completion.token_ids, num_shared)
            if candidate_ids is not None:  # make_batch marks their scores as missing
                candidate_ids = np.where(candidate_ids < num_shared, candidate_ids, 0)
        if privileged:
            prefix, num_replaced = self._task.privileged_prompt_ids(problem), completion.prompt_length
        sequence = SequenceToScore(
            completion.token_ids,
            ((completion.prompt_length, len(completion.token_ids)),),
            candidate_ids,
            teacher=name,
            teacher_prefix=prefix,
            num_replaced=num_replaced,
        )
        return sequence, None


class BatchScoring:
    """The scoring of one batch's completions; made by `RemoteTeacher.new_batch`. Several may be in progress."""

    def __init__(self, teacher: RemoteTeacher):
        self._teacher = teacher
        self._futures: dict[int, Future[TokenScores]] = {}
        self._retokenized: dict[int, Retokenized] = {}
        self._first_submitted = self._last_scored = 0.0

    def submit(self, index: int, problem: Problem, completion: Completion) -> None:
        """Sends completion number `index` of this batch, while others may still be sampled."""
        if not self._futures:
            self._first_submitted = time.monotonic()
        sequence, retokenized = self._teacher.to_score(problem, completion)
        if retokenized is not None:
            self._retokenized[index] = retokenized
        self._futures[index] = future = self._teacher.submit(sequence)
        future.add_done_callback(self._on_scored)

    def _on_scored(self, _: Future[TokenScores]) -> None:
        self._last_scored = time.monotonic()

    @property
    def busy_s(self) -> float:
        """Seconds from the submission of the first completion to the score of the last one."""
        return self._last_scored - self._first_submitted

    def submit_rest(self, problems: Sequence[Problem], completions: Sequence[Completion]) -> None:
        """Sends the completions that have not been submitted yet."""
        for index, (problem, completion) in enumerate(zip(problems, completions, strict=True)):
            if index not in self._futures:
                self.submit(index, problem, completion)

    def are_scored(self, indices: Sequence[int]) -> bool:
        """Whether `scores` would return at once."""
        return all(self._futures[index].done() for index in indices)

    def wait(self, indices: Sequence[int]) -> None:
        """Waits until these completions are scored or have failed."""
        concurrent.futures.wait([self._futures[index] for index in indices])

    def scores(self, indices: Sequence[int]) -> list[TokenScores] | list[SegmentScores]:
        """Waits for the scores of these completions and returns them in this order; each can be taken once."""
        found = [self._futures.pop(index).result() for index in indices]
        if not self._retokenized:
            return found
        return [
            SegmentScores(*scatter(self._retokenized.pop(index), scores.logprobs))
            for index, scores in zip(indices, found, strict=True)
        ]


def _endpoints(teacher: TeacherSection, run_dir: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, list[str]]:
    """The endpoints of each teacher by its name, "" for a single one; starts the sidecar of teacher.spawn."""
    if teacher.spawn is None:
        return teacher.several or {"": teacher.endpoints}
    spawn = teacher.spawn.model_copy(update={"offload": teacher.offload or teacher.spawn.offload})
    log = run_dir / "teacher.log"
    return hosts.from_first(lambda: {"": [stack.enter_context(TeacherProcess(spawn, log)).endpoint]})


def _client(
    teacher: TeacherSection, endpoints: dict[str, list[str]], tokenizer_path: str, say: Callable[[str], None]
) -> TeacherClient:
    return TeacherClient(
        {name: Teacher(one, model=teacher.model) for name, one in endpoints.items()},
        credentials=credentials.channel_credentials(ca=teacher.tls_ca, cert=teacher.tls_cert, key=teacher.tls_key),
        token=None if (path := teacher.token_file) is None else lambda: credentials.read_token(path),
        deadline_s=teacher.deadline_s,
        max_in_flight=teacher.max_in_flight,
        batch_tokens=teacher.batch_tokens,
        hedge_after_s=teacher.hedge_after_s,
        stall_s=teacher.stall_s,
        expected_tokenizer_fingerprint=checkpoint_files.tokenizer_fingerprint(tokenizer_path),
        on_wait=lambda message: say(message or "the teacher is back"),
    )


def _sizes_differ(student: int, teacher: int, num_token_ids: int) -> str:
    """What becomes of the ids that only one side has."""
    larger, ids = ("teacher", teacher - student) if teacher > student else ("student", student - teacher)
    return (
        f"the {larger} has {ids} token ids more than the other side (student {student}, teacher {teacher}, tokenizer "
        f"{num_token_ids}): a candidate with such an id counts into the bucket of all other tokens "
        "(unshared_candidates_share)"
    )


def _check_shared(token_ids: np.ndarray, num_shared: int) -> None:
    """Refuses a completion with an id that the teacher lacks: what follows such a token has no score."""
    if token_ids.max() >= num_shared:
        raise ValueError(
            f"the student sampled token {token_ids.max()}, and the teacher has no id from {num_shared} on: it is a row "
            "beyond the tokenizer, which a trained student does not sample. Start from trained weights, or from a "
            "checkpoint with as many ids as the teacher"
        )


def check_teacher(
    config: TrainConfig, model_config: models.DecoderConfig, info: ServerInfo, *, num_token_ids: int | None = None
) -> None:
    """Checks, before training, that this teacher can score the student's samples.

    Args:
        config: configuration of the run.
        model_config: architecture of the student.
        info: of the teacher.
        num_token_ids: ids of the tokenizer; rows of the student beyond them are padding, which the teacher may lack.
            None: all rows of the student are tokens.

    Raises:
        ConfigError: vocabulary, length or temperature does not fit; the message names both sides and the remedy.
    """
    teacher, section = info.model, config.teacher
    longest = config.rollout.max_length
    other_tokenizer = section is not None and section.tokenizer is not None
    num_sampled = min(model_config.vocab_size, num_token_ids or model_config.vocab_size)
    if num_sampled > teacher.vocab_size and not other_tokenizer:
        raise ConfigError(
            f"the student's vocabulary has {num_sampled} ids, the teacher's {teacher.vocab_size}: it "
            "cannot score all that the student samples; use a teacher of the same family, or set teacher.tokenizer"
        )
    if longest > teacher.max_sequence_length and not other_tokenizer:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest}, but the teacher takes sequences of at "
            f"most {teacher.max_sequence_length} tokens: lower them, or raise the teacher's max_sequence_length"
        )
    if config.rollout.temperature != 1 and not teacher.any_temperature:
        raise ConfigError(
            f"rollout.temperature = {config.rollout.temperature}, but {info.engine} {info.engine_version} gives "
            "log-probabilities at temperature 1 only: set rollout.temperature: 1, or use an engine with any_temperature"
        )
