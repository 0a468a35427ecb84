"""`jdistill score`: token log-probabilities of the sequences in a JSONL file."""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

import numpy as np

from jdistill.commands import teacher
from jdistill.commands.probe import add_credentials_arguments, client_credentials
from jdistill.config import ConfigError, Section, parse
from jdistill.text_files import check_output, read_json_lines
from jdistill.wire.errors import InvalidRequestError, TeacherError, UnsupportedError, VerificationError
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores

DESCRIPTION = """\
Score token sequences from a JSONL file, with a running teacher or an engine in this process.

  jdistill score --teacher 127.0.0.1:50051 --input in.jsonl --output out.jsonl
  jdistill score --teacher gpu7:50051 gpu8:50051 --tls-ca ca.pem --token-file token --input in.jsonl --output out.jsonl
  jdistill score --engine transformers --model checkpoints/Qwen3-0.6B --input in.jsonl --output out.jsonl

Each line of the input is {"token_ids": [..]} and, optionally,
  "id"             copied to the output (default: the number of the line, from 1)
  "spans"          [[start, stop], ..]: positions of the tokens to score, stop excluded (default: all but the first, 0)
  "top_k"          also the k most likely tokens at each scored position
  "candidate_ids"  [[..], ..]: further tokens to score at each scored position
Each line of the output, in the same order, is {"id", "logprobs"} and "top_ids", "top_logprobs", "candidate_logprobs"
as requested: natural logarithms, one entry (or row) per scored position, with all digits of their float32.

The whole input is checked before anything is scored, and the output file appears only once it is complete.
"""

# Tokens in flight: enough to keep an engine busy, few enough not to hold a large file in memory.
GROUP_TOKENS = 16384
MAX_TOKENS_UNDER_WAY = 8 * GROUP_TOKENS

# The fields of TeacherServerConfig that apply to an engine in this process.
ENGINE_FLAGS = (
    "engine",
    "model",
    "urls",
    "dtype",
    "quantization",
    "max_sequence_length",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "memory_fraction",
    "max_batch_tokens",
    "engine_args",
)


class ScoreLine(Section):
    """One line of the input."""

    token_ids: list[int]
    id: str | int | None = None
    spans: list[list[int]] | None = None
    top_k: int = 0
    candidate_ids: list[list[int]] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One parsed line."""

    line: int  # from 1
    id: str | int
    sequence: SequenceToScore
    top_k: int

    @property
    def kind(self) -> tuple[int, int]:
        """Sequences of one request must have the same kind."""
        candidates = self.sequence.candidate_ids
        return self.top_k, 0 if candidates is None else candidates.shape[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See jdistill.commands."""
    parser.add_argument("--input", required=True, metavar="FILE", help="JSONL file to read")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL file to write")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits (1)")
    remote = parser.add_argument_group("with a running teacher")
    remote.add_argument("--teacher", nargs="+", metavar="HOST:PORT", help="its address; several are replicas")
    remote.add_argument("--deadline-s", type=float, default=600.0, help="seconds a teacher may be unavailable (600)")
    add_credentials_arguments(parser)
    local = parser.add_argument_group("with an engine in this process")
    teacher.add_config_arguments(local, {name: teacher.HELP[name] for name in ENGINE_FLAGS})


def run(args: argparse.Namespace) -> int:
    """See jdistill.commands."""
    local = [name for name in ENGINE_FLAGS if getattr(args, name)]  # repeated flags are [] when absent
    if args.teacher and local:
        raise ConfigError(
            f"--teacher and --{local[0].replace('_', '-')}: a running teacher has its own engine; give one of the two"
        )
    if not args.teacher and not local:
        raise ConfigError("give --teacher HOST:PORT (one that runs) or --engine NAME --model DIR (in this process)")
    given = [name for name in ("tls_ca", "tls_cert", "tls_key", "token_file") if getattr(args, name)]
    if given and not args.teacher:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} is for --teacher: an engine in this process asks for nothing"
        )
    config = None if args.teacher else teacher.config_of(args, ENGINE_FLAGS, None, [])
    source, target = pathlib.Path(args.input), pathlib.Path(args.output)
    if not source.is_file():
        raise ConfigError(f"--input {source}: there is no such file")
    check_output("--output", target)
    if target.exists() and not target.is_file():  # a device would be replaced by a file
        raise ConfigError(f"--output {target}: it is no regular file; the complete output replaces it at the end")
    for _ in read(source):  # a malformed first line is found before a model is loaded
        break
    else:
        raise ConfigError(f"--input {source} is empty: expected a JSON object a line, with token_ids")
    credentials = client_credentials(args)
    asyncio.run(_run(args, config, credentials, source, target))
    return 0


def read(path: pathlib.Path) -> Iterator[Item]:
    """Yields the parsed lines of a file; skips empty ones.

    Raises:
        ConfigError: names file and line.
    """
    try:
        for number, data in read_json_lines(path, "with token_ids"):
            yield _item(data, number, f"{path} line {number}")
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(str(e)) from None


def _item(data: dict[str, Any], number: int, place: str) -> Item:
    line = parse(ScoreLine, data, source=place)
    spans: tuple[tuple[int, int], ...] = ()
    if line.spans is not None:
        if not line.spans or any(len(span) != 2 for span in line.spans):
            raise ConfigError(
                f"{place}: spans: expected [[start, stop], ..]; leave it out to score all but the first token"
            )
        spans = tuple((start, stop) for start, stop in line.spans)
    sequence = SequenceToScore(
        token_ids=_array(line.token_ids, "token_ids", place),
        spans=spans,
        candidate_ids=None if line.candidate_ids is None else _array(line.candidate_ids, "candidate_ids", place),
    )
    return Item(line=number, id=number if line.id is None else line.id, sequence=sequence, top_k=line.top_k)


def _array(values: list[Any], field: str, place: str) -> np.ndarray:
    try:
        return np.array(values, np.int32)
    except OverflowError:
        raise ConfigError(f"{place}: {field} has a number that is no token id (it does not fit 32 bits)") from None
    except ValueError:
        raise ConfigError(f"{place}: {field}: the rows have different lengths; give each position as many") from None


class Teacher(Protocol):
    """A source of scores: a running teacher or an engine in this process."""

    model: ModelInfo

    def start(self, items: list[Item], temperature: float) -> list[asyncio.Future[TokenScores]]:
        """Starts scoring items of one kind; returns one future per item."""


class RunningTeacher:
    """A running teacher through TeacherClient, which verifies and retries."""

    def __init__(self, client: Any, model: ModelInfo):
        self._client = client
        self.model = model

    def start(self, items: list[Item], temperature: float) -> list[asyncio.Future[TokenScores]]:
        """See Teacher."""
        return [
            asyncio.wrap_future(self._client.submit(item.sequence, top_k=item.top_k, temperature=temperature))
            for item in items
        ]


class EngineHere:
    """An engine in this process; its results get the checks of the service and of the client."""

    def __init__(self, engine: Any):
        self._engine = engine
        self._tasks: set[asyncio.Task[None]] = set()
        self.model: ModelInfo = engine.info

    def start(self, items: list[Item], temperature: float) -> list[asyncio.Future[TokenScores]]:
        """See Teacher."""
        futures = [asyncio.get_running_loop().create_future() for _ in items]
        task = asyncio.create_task(self._score(items, temperature, futures))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return futures

    async def _score(self, items: list[Item], temperature: float, futures: list[asyncio.Future[TokenScores]]) -> None:
        from jdistill.sidecar.results import ResultChecker
        from jdistill.wire.codec import token_crc

        sequences, lines = [item.sequence for item in items], [item.line for item in items]
        top_k = items[0].top_k
        checker = ResultChecker(self._engine.name, sequences, lines, top_k=top_k, info=self.model)
        try:
            results = self._engine.score(sequences, top_k=top_k, temperature=temperature)
            async with contextlib.aclosing(results):
                async for index, scores in results:
                    checker.check(index, scores)
                    if scores.token_crc != token_crc(sequences[index].token_ids):
                        raise VerificationError("the engine scored other tokens than these")
                    futures[index].set_result(scores)
            checker.check_complete()
        except Exception as e:
            for future in futures:
                if not future.done():
                    future.set_exception(e)

    async def close(self) -> None:
        """Cancels running work and frees the engine."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._engine.close()


@contextlib.asynccontextmanager
async def _teacher(
    args: argparse.Namespace, config: Any, credentials: dict[str, Any], console: Any
) -> AsyncIterator[Teacher]:
    if config is None:
        from jdistill.client import TeacherClient

        def on_wait(message: str | None) -> None:
            if message is not None:
                console.print(message)

        with TeacherClient(args.teacher, deadline_s=args.deadline_s, on_wait=on_wait, **credentials) as client:
            # In a thread, so that Ctrl-C ends the wait for an absent teacher.
            yield RunningTeacher(client, (await asyncio.to_thread(client.info)).model)
        return
    from jdistill.sidecar.engines import create_engine

    here = EngineHere(await create_engine(config))
    try:
        yield here
    finally:
        await here.close()


async def _run(
    args: argparse.Namespace, config: Any, credentials: dict[str, Any], source: pathlib.Path, target: pathlib.Path
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    async with _teacher(args, config, credentials, console) as scorer:
        num_sequences, num_tokens = check(source, scorer.model, args.temperature)
        columns = (
            TextColumn("scoring"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens"),
            TimeRemainingColumn(),
        )
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        begin = time.monotonic()
        try:
            with (
                temporary.open("w", encoding="utf-8") as file,
                Progress(*columns, console=console, disable=not console.is_terminal) as progress,
            ):
                bar = progress.add_task("", total=num_tokens)
                async for item, scores in score_in_order(read(source), scorer, args.temperature, source):
                    file.write(format_line(item.id, scores) + "\n")
                    progress.update(bar, advance=len(item.sequence.token_ids))
            os.replace(temporary, target)  # atomic: a reader sees the complete file or the previous one
        finally:
            temporary.unlink(missing_ok=True)
    took_s = time.monotonic() - begin
    console.print(
        f"scored {num_sequences:,} sequences, {num_tokens:,} tokens in {took_s:.1f} s "
        f"({num_tokens / took_s:,.0f} tokens/s) with {scorer.model.model} -> {target}",
        soft_wrap=True,
    )


def check(source: pathlib.Path, model: ModelInfo, temperature: float) -> tuple[int, int]:
    """Validates every line as the service would; returns the numbers of sequences and tokens.

    Raises:
        InvalidRequestError, UnsupportedError, ConfigError: names file and line.
    """
    from jdistill.wire.validate import validate_options, validate_sequence

    validate_options(info=model, top_k=0, temperature=temperature)
    num_sequences = num_tokens = 0
    for item in read(source):
        try:
            validate_options(info=model, top_k=item.top_k, temperature=temperature)
            validate_sequence(item.sequence, item.line, info=model)
        except (InvalidRequestError, UnsupportedError) as e:
            raise type(e)(f"{source} line {item.line}: {e}") from None
        num_sequences += 1
        num_tokens += len(item.sequence.token_ids)
    return num_sequences, num_tokens


async def score_in_order(
    items: Iterator[Item], scorer: Teacher, temperature: float, source: pathlib.Path
) -> AsyncIterator[tuple[Item, TokenScores]]:
    """Scores many items concurrently; yields them in the order of `items`.

    Raises:
        TeacherError: names the line that failed.
    """
    under_way: collections.deque[tuple[Item, asyncio.Future[TokenScores]]] = collections.deque()
    tokens_under_way = 0
    try:
        for group in groups(items):
            under_way.extend(zip(group, scorer.start(group, temperature), strict=True))
            tokens_under_way += sum(len(item.sequence.token_ids) for item in group)
            while tokens_under_way > MAX_TOKENS_UNDER_WAY:
                item, future = under_way.popleft()
                tokens_under_way -= len(item.sequence.token_ids)
                yield item, await _result(item, future, source)
        while under_way:
            item, future = under_way.popleft()
            yield item, await _result(item, future, source)
    finally:
        for _, future in under_way:
            # After an error that was already raised: asyncio would report the others as "never retrieved".
            future.cancel() if not future.done() else future.cancelled() or future.exception()


async def _result(item: Item, future: asyncio.Future[TokenScores], source: pathlib.Path) -> TokenScores:
    try:
        return await future
    except TeacherError as e:
        raise TeacherError(f"{source} line {item.line}: {e}") from e


def groups(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Groups neighbouring items of one kind, up to GROUP_TOKENS each."""
    group: list[Item] = []
    num_tokens = 0
    for item in items:
        if group and (item.kind != group[0].kind or num_tokens + len(item.sequence.token_ids) > GROUP_TOKENS):
            yield group
            group, num_tokens = [], 0
        group.append(item)
        num_tokens += len(item.sequence.token_ids)
    if group:
        yield group


def format_line(identity: str | int, scores: TokenScores) -> str:
    """Returns one line of the output."""
    record: dict[str, Any] = {"id": identity, "logprobs": _floats(scores.logprobs)}
    if scores.top_ids is not None:
        record["top_ids"] = scores.top_ids.tolist()
        record["top_logprobs"] = [_floats(row) for row in scores.top_logprobs]  # type: ignore[union-attr]
    if scores.candidate_logprobs is not None:
        record["candidate_logprobs"] = [_floats(row) for row in scores.candidate_logprobs]
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def _floats(values: np.ndarray) -> list[float]:
    # The shortest decimal that reads back as the same float32 (numpy's own text), not the 17 digits of its double.
    return [float(text) for text in values.astype(np.float32).astype(str)]
