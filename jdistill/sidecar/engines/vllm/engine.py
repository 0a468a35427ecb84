"""vLLM engine: AsyncLLM in process, with the best way of scoring that this version, runner and platform have.

Three ways, tried in this order at start; one is used only if it gives vLLM's own numbers on a probe:

fields     `prompt_logprob_token_ids` and `prompt_logprob_start`, where vLLM's second model runner runs (GPUs).
extension  our code in vLLM's workers (`vllm_worker`), with its first model runner (CPUs): any temperature.
plain      `prompt_logprobs`, everywhere. Candidates and temperatures only where the vocabulary is small enough for vLLM
           to return all of it; else they are refused.

Dimension key: S tokens of a sequence, P scored positions, W entries that vLLM returns for a position, V vocabulary, K
top-k, C candidates.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import os
import pathlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

# vLLM writes its log to stdout by default; a command's output goes there.
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")

import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import exceptions as vllm_exceptions
from vllm.v1.engine.async_llm import AsyncLLM

from jdistill.checkpoint_files import read_config
from jdistill.config import TeacherServerConfig
from jdistill.sidecar.engines import vllm_worker
from jdistill.sidecar.engines.base import Engine
from jdistill.sidecar.engines.options import (
    adapter_info,
    adapter_rank,
    check_engine_args,
    model_info,
    write_zero_adapter,
)
from jdistill.wire.codec import token_crc
from jdistill.wire.errors import EngineDeadError, InvalidRequestError, TeacherError, UnavailableError, UnsupportedError
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores

logger = logging.getLogger(__name__)

# engine_args that would contradict the sidecar's own configuration -> what to set instead.
RESERVED = {
    "data_parallel_size": "data_parallel_size",
    "dtype": "dtype",
    "enable_lora": "adapters",
    "enable_return_routed_experts": None,
    "enable_sleep_mode": "offload",
    "gpu_memory_utilization": "memory_fraction",
    "logprobs_mode": None,  # raw_logits would come back in the same field, looking like log-probabilities
    "max_model_len": "max_sequence_length",
    "max_lora_rank": "adapters",
    "max_loras": "adapters",
    "model": "model",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "quantization": "quantization",
    "runner": None,
    "served_model_name": "served_name",
    "skip_tokenizer_init": None,
    "tensor_parallel_size": "tensor_parallel_size",
    "worker_extension_cls": None,
}
# A vocabulary up to this size can be asked for whole, position by position, without drowning in Python objects.
SMALL_VOCAB_SIZE = 1024
MAX_LOGPROBS = 256  # default limit of top_k and candidates with a larger vocabulary
# Tokens of a step. The plain way holds float32 logits of all of them: 1.2 GB with a vocabulary of 152,000, and no more
# with a smaller one, whose steps may be longer (a third faster with a vocabulary of 512: there the steps are the cost).
MIN_BATCHED_TOKENS, MAX_BATCHED_TOKENS = 2048, 8192
STEP_LOGITS = 1 << 28
# Two ways to compute one log-probability: rounding of float32, or of the logits in 16 bits (0.06 at a logit of 16).
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}
PARAMETERS = frozenset(SamplingParams.__struct_fields__)
HAS_ID_SCORES = hasattr(
    RequestOutput("", None, [], None, [], True), "prompt_token_id_logprobs"
)  # the reply field of `fields` and `extension`


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Scores:
    """TokenScores without the checksum."""

    logprobs: np.ndarray
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    candidate_logprobs: np.ndarray | None = None


class _Way(abc.ABC):
    """How scores are asked of vLLM and read from its reply."""

    name: str
    max_top_k: int
    max_candidate_count: int
    any_temperature: bool

    @abc.abstractmethod
    def params(self, sequence: SequenceToScore, *, top_k: int, temperature: float) -> SamplingParams:
        """What to ask."""

    @abc.abstractmethod
    def read(self, output: RequestOutput, sequence: SequenceToScore, *, top_k: int, temperature: float) -> _Scores:
        """Reads the answer; raises TeacherError if it does not hold what was asked."""


def _sampling_params(**kwargs: Any) -> SamplingParams:
    """A request that generates the one token that vLLM insists on, and never reads the prefix cache."""
    optional = {
        "flat_logprobs": True,  # lists instead of an object for each entry
        # A prompt read from the prefix cache has no hidden states: versions have returned uninitialised memory for it.
        "skip_reading_prefix_cache": True,
    }
    kwargs |= {name: value for name, value in optional.items() if name in PARAMETERS}
    return SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **kwargs
    )


class PlainWay(_Way):
    """`prompt_logprobs`: the prompt's tokens and the top-k, of every position."""

    name = "plain"

    def __init__(self, vocab_size: int, max_logprobs: int):
        self._vocab_size = vocab_size
        whole = max_logprobs >= vocab_size
        self.max_top_k = min(max_logprobs, vocab_size)
        self.max_candidate_count = vocab_size if whole else 0
        self.any_temperature = whole

    def _whole(self, sequence: SequenceToScore, temperature: float) -> bool:
        return sequence.candidate_ids is not None or temperature != 1

    def params(self, sequence: SequenceToScore, *, top_k: int, temperature: float) -> SamplingParams:
        """See _Way.params."""
        whole = self._whole(sequence, temperature)
        return _sampling_params(prompt_logprobs=self._vocab_size if whole else top_k)

    def read(self, output: RequestOutput, sequence: SequenceToScore, *, top_k: int, temperature: float) -> _Scores:
        """See _Way.read."""
        positions_P = sequence.scored_positions()
        targets_P = sequence.token_ids[positions_P]
        whole = self._whole(sequence, temperature)
        ids_PW, logprobs_PW = _entries(output.prompt_logprobs, positions_P)
        if not whole:
            top_ids, top_logprobs = _top(ids_PW, logprobs_PW, top_k) if top_k else (None, None)
            return _Scores(_select(ids_PW, logprobs_PW, targets_P), top_ids, top_logprobs)
        logprobs_PV = np.full((len(positions_P), self._vocab_size), np.nan, np.float32)
        rows_P1 = np.arange(len(positions_P))[:, None]
        known_PW = ids_PW >= 0
        logprobs_PV[np.broadcast_to(rows_P1, ids_PW.shape)[known_PW], ids_PW[known_PW]] = logprobs_PW[known_PW]
        if np.isnan(logprobs_PV).any():
            raise TeacherError("vLLM did not return the whole vocabulary for a position where it was asked for")
        if temperature != 1:
            scaled_PV = logprobs_PV.astype(np.float64) / temperature
            scaled_PV -= scaled_PV.max(axis=-1, keepdims=True)
            logprobs_PV = scaled_PV - np.log(np.exp(scaled_PV).sum(axis=-1, keepdims=True))
            logprobs_PV = logprobs_PV.astype(np.float32)
        top_ids = top_logprobs = candidate_logprobs = None
        if top_k:
            top_ids = np.argsort(-logprobs_PV, axis=-1, kind="stable")[:, :top_k].astype(np.int32)
            top_logprobs = np.take_along_axis(logprobs_PV, top_ids, axis=-1)
        if sequence.candidate_ids is not None:
            candidate_logprobs = np.take_along_axis(logprobs_PV, sequence.candidate_ids, axis=-1)
        return _Scores(logprobs_PV[rows_P1[:, 0], targets_P], top_ids, top_logprobs, candidate_logprobs)


class FieldsWay(_Way):
    """`prompt_logprob_token_ids` from `prompt_logprob_start` on: the response's positions and any ids."""

    name = "fields"
    any_temperature = False

    def __init__(self, vocab_size: int, max_logprobs: int):
        self.max_top_k = min(max_logprobs, vocab_size)
        self.max_candidate_count = max_logprobs - 1  # the scored token itself takes one column

    def params(self, sequence: SequenceToScore, *, top_k: int, temperature: float) -> SamplingParams:
        """See _Way.params."""
        positions_P = sequence.scored_positions()
        targets_P1 = sequence.token_ids[positions_P][:, None]
        ids_PC = targets_P1 if sequence.candidate_ids is None else np.hstack([targets_P1, sequence.candidate_ids])
        # Row i speaks of token position start + i + 1, down to the prompt's last; -1 asks for nothing.
        start = int(positions_P[0]) - 1
        ids = np.full((len(sequence.token_ids) - 1 - start, ids_PC.shape[1]), -1, np.int32)
        ids[positions_P - 1 - start] = ids_PC
        return _sampling_params(
            prompt_logprob_token_ids=ids,
            prompt_logprob_start=start,
            prompt_logprobs=top_k or None,
        )

    def read(self, output: RequestOutput, sequence: SequenceToScore, *, top_k: int, temperature: float) -> _Scores:
        """See _Way.read."""
        positions_P = sequence.scored_positions()
        start = int(positions_P[0]) - 1
        C = 0 if sequence.candidate_ids is None else sequence.candidate_ids.shape[1]
        rows = _id_scores(output, (len(sequence.token_ids) - 1 - start, 1 + C))[positions_P - 1 - start]
        top_ids = top_logprobs = None
        if top_k:
            top_ids, top_logprobs = _top(*_entries(output.prompt_logprobs, positions_P), top_k)
        return _Scores(rows[:, 0], top_ids, top_logprobs, rows[:, 1:] if C else None)


class ExtensionWay(_Way):
    """Our code in vLLM's workers."""

    name = "extension"
    any_temperature = True

    def __init__(self, vocab_size: int):
        self.max_top_k = self.max_candidate_count = vocab_size

    def params(self, sequence: SequenceToScore, *, top_k: int, temperature: float) -> SamplingParams:
        """See _Way.params."""
        args = vllm_worker.request_args(
            sequence.spans, sequence.candidate_ids, top_k=top_k, temperature=float(temperature)
        )
        return _sampling_params(extra_args=args)

    def read(self, output: RequestOutput, sequence: SequenceToScore, *, top_k: int, temperature: float) -> _Scores:
        """See _Way.read."""
        targets_P = sequence.token_ids[sequence.scored_positions()]
        C = 0 if sequence.candidate_ids is None else sequence.candidate_ids.shape[1]
        rows = _id_scores(output, (len(targets_P), 2 + C + 2 * top_k))
        if not np.array_equal(rows[:, 0].astype(np.int64), targets_P):
            raise TeacherError("vLLM's worker scored other token ids than were asked for")
        top = rows[:, 2 + C :]
        return _Scores(
            rows[:, 1],
            top[:, :top_k].astype(np.int32) if top_k else None,
            top[:, top_k:] if top_k else None,
            rows[:, 2 : 2 + C] if C else None,
        )


def _id_scores(output: RequestOutput, shape: tuple[int, int]) -> np.ndarray:
    scores = output.prompt_token_id_logprobs
    if scores is None or np.shape(scores) != shape:
        got = "none" if scores is None else f"shape {np.shape(scores)}"
        raise TeacherError(f"vLLM returned {got} for the asked scores, expected shape {shape}")
    return np.asarray(scores)


def _entries(prompt_logprobs: Any, positions_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities [P, W] of the positions' entries, in vLLM's order; short rows end in -1, -inf."""
    if prompt_logprobs is None:
        raise TeacherError("vLLM returned no prompt log-probabilities")
    if hasattr(prompt_logprobs, "start_indices"):  # FlatLogprobs
        starts_P = np.asarray(prompt_logprobs.start_indices)[positions_P]
        counts_P = np.asarray(prompt_logprobs.end_indices)[positions_P] - starts_P
        columns_W = np.arange(counts_P.max(initial=0))
        known_PW = columns_W < counts_P[:, None]
        places_PW = np.where(known_PW, starts_P[:, None] + columns_W, 0)
        ids = np.asarray(prompt_logprobs.token_ids, np.int64)
        logprobs = np.asarray(prompt_logprobs.logprobs, np.float32)
        return np.where(known_PW, ids[places_PW], -1), np.where(known_PW, logprobs[places_PW], -np.inf)
    rows = [prompt_logprobs[position] or {} for position in positions_P]
    width = max(map(len, rows))
    ids_PW = np.full((len(rows), width), -1, np.int64)
    logprobs_PW = np.full((len(rows), width), -np.inf, np.float32)
    for p, row in enumerate(rows):
        ids_PW[p, : len(row)] = list(row)
        logprobs_PW[p, : len(row)] = [entry.logprob for entry in row.values()]
    return ids_PW, logprobs_PW


def _select(ids_PW: np.ndarray, logprobs_PW: np.ndarray, targets_P: np.ndarray) -> np.ndarray:
    # By id, never by order: in older versions the first entry was the most likely token, not the prompt's.
    found_PW = ids_PW == targets_P[:, None]
    if not found_PW.any(axis=-1).all():
        p = int(np.argmin(found_PW.any(axis=-1)))
        raise TeacherError(f"vLLM returned no log-probability of token {targets_P[p]} at scored position number {p}")
    return logprobs_PW[np.arange(len(targets_P)), found_PW.argmax(axis=-1)]


def _top(ids_PW: np.ndarray, logprobs_PW: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The K most likely entries; the prompt's own token may be there twice, or beside the top-k."""
    # Flat rows begin with the prompt's token and name it again if it is among the top-k.
    twice_P = (ids_PW[:, 1:] == ids_PW[:, :1]).any(axis=-1)
    logprobs_PW = logprobs_PW.copy()
    logprobs_PW[twice_P, 0] = -np.inf
    order_PK = np.argsort(-logprobs_PW, axis=-1, kind="stable")[:, :top_k]
    top_ids = np.take_along_axis(ids_PW, order_PK, axis=-1).astype(np.int32)
    top_logprobs = np.take_along_axis(logprobs_PW, order_PK, axis=-1)
    if top_ids.shape[1] < top_k or (top_ids < 0).any():
        raise TeacherError(f"vLLM returned fewer than the {top_k} most likely tokens of a position")
    return top_ids, top_logprobs


class VllmEngine(Engine):
    """Scores with vLLM's AsyncLLM; `await VllmEngine.create(config)` takes 10 s to minutes."""

    name = "vllm"

    def __init__(self, llm: AsyncLLM, info: ModelInfo, way: _Way, config: TeacherServerConfig):
        self.version = vllm.__version__
        self._llm: AsyncLLM | None = llm
        self.can_sleep = config.offload
        self._config = config
        self._adapters = config.adapters
        self._request_ids = itertools.count()
        self._at_start: TokenScores | None = None  # of a probe, to be compared after a sleep
        self._base_lora: LoRARequest | None = None
        self._lora = {
            name: LoRARequest(name, number, str(pathlib.Path(path).absolute()))
            for number, (name, path) in enumerate(config.adapters.items(), start=1)
        }
        self._use(way, info)

    def _use(self, way: _Way, info: ModelInfo) -> None:
        self._way = way
        self.info = dataclasses.replace(
            info,
            max_top_k=way.max_top_k,
            max_candidate_count=way.max_candidate_count,
            any_temperature=way.any_temperature,
        )
        self.adapters = {name: adapter_info(self.info, name, path) for name, path in self._adapters.items()}

    @property
    def way(self) -> str:
        """The way of scoring that was chosen: "fields", "extension" or "plain"."""
        return self._way.name

    @classmethod
    async def create(cls, config: TeacherServerConfig) -> VllmEngine:
        """Starts vLLM and chooses the way of scoring.

        `config.engine_args` goes to vLLM by name, apart from `scoring`: auto (the default), fields, extension or plain;
        and `sleep_level`: 1 (the default; weights wait in the host's memory) or 2 (they are read again from the disk).

        Raises:
            FileNotFoundError, ValueError: the checkpoint or an engine argument cannot be used.
            UnsupportedError: the way of scoring that was asked for does not work here.
        """
        args = dict(config.engine_args)
        scoring = args.pop("scoring", "auto")
        ways = ("auto", "fields", "extension", "plain")
        if scoring not in ways:
            raise ValueError(f"engine_args: scoring: expected one of {', '.join(ways)}, got {scoring!r}")
        names = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
        check_engine_args("vllm", args, names | {"scoring", "sleep_level"})
        _check_sleep(config, args.pop("sleep_level", 1))
        for name in RESERVED.keys() & args:
            instead = f"; set {RESERVED[name]} instead" if RESERVED[name] else ""
            raise ValueError(f"engine_args: {name} is set by the sidecar itself{instead}")
        info = await asyncio.to_thread(model_info, config)
        if args.get("max_logprobs", 0) == -1:
            args["max_logprobs"] = info.vocab_size
        default_max_logprobs = info.vocab_size if info.vocab_size <= SMALL_VOCAB_SIZE else MAX_LOGPROBS
        args = {
            "max_logprobs": default_max_logprobs,
            "max_num_batched_tokens": max(MIN_BATCHED_TOKENS, min(MAX_BATCHED_TOKENS, STEP_LOGITS // info.vocab_size)),
            "enable_prefix_caching": False,
            "disable_log_stats": True,
            "generation_config": "vllm",
            "enforce_eager": current_platform.is_cpu(),  # compiling for a CPU costs a minute
            **args,
            "model": config.model,
            "dtype": info.dtype,
            "tensor_parallel_size": config.tensor_parallel_size,
            "pipeline_parallel_size": config.pipeline_parallel_size,
            "data_parallel_size": config.data_parallel_size,
            "quantization": config.quantization,
            # One more than the longest sequence, since one token is generated.
            "max_model_len": info.max_sequence_length + 1,
            "skip_tokenizer_init": True,
            "logprobs_mode": "raw_logprobs",
        }
        if config.memory_fraction is not None:
            args["gpu_memory_utilization"] = config.memory_fraction
        if config.offload:
            args["enable_sleep_mode"] = True
        if config.adapters:
            ranks = [adapter_rank(path) for path in config.adapters.values()]
            args |= {"enable_lora": True, "max_lora_rank": _lora_rank(max(ranks)), "max_loras": len(ranks) + 1}
        args["worker_extension_cls"] = f"{vllm_worker.__name__}.{vllm_worker.ScoringWorker.__name__}"
        args = {name: value for name, value in args.items() if name in names}
        _set_environment(config, info, args)
        llm = await asyncio.to_thread(_start, args)
        plain = PlainWay(info.vocab_size, args["max_logprobs"])
        engine = cls(llm, info, plain, config)
        scratch = contextlib.ExitStack()
        if config.adapters and current_platform.is_cpu():
            # In a batch that adapters share, vLLM's CPU kernels (0.32) give the base model's rows the last one: they
            # index with -1. An adapter of zeros is the base model, and is never -1.
            path = scratch.enter_context(tempfile.TemporaryDirectory(prefix="jdistill-"))
            write_zero_adapter(next(iter(config.adapters.values())), path)
            engine._base_lora = LoRARequest("jdistill-base", len(config.adapters) + 1, path)
        try:
            await llm.collective_rpc("jdistill_end_with", args=(os.getpid(),))
            await llm.collective_rpc("jdistill_prepare")
            await engine._choose(scoring, info, args)
            if engine._lora:
                await engine._check_adapters(info)
            engine._at_start = await engine._score_one(_probe_sequence(info), top_k=2, temperature=1.0)
        except BaseException:
            await engine.close()
            raise
        finally:
            scratch.close()
        return engine

    async def _check_adapters(self, info: ModelInfo) -> None:
        """Uses each adapter now, alone and beside the others: what does not fit is found at start, not in step 900."""
        probe = _probe_sequence(info)
        loras = [self._base_lora, *self._lora.values()]
        score = functools.partial(self._score_one, probe, top_k=0, temperature=1.0)
        alone = [(await score(lora=lora)).logprobs for lora in loras]
        together = await asyncio.gather(*(score(lora=lora) for lora in loras))
        for lora, expected, got in zip(loras, alone, together, strict=True):
            name = "the base model" if lora is self._base_lora else f"adapter {lora.lora_name!r}"
            worst = float(np.abs(got.logprobs - expected).max())
            if not worst <= PROBE_TOLERANCE[info.dtype]:
                raise UnsupportedError(
                    f"vLLM {self.version} scores {name} otherwise when other adapters share the batch (by up to "
                    f"{worst:.3g} nats): serve each adapter by a sidecar of its own, or merged"
                )
            if lora is not self._base_lora and np.array_equal(expected, alone[0]):
                logger.warning("%s changes no score of a probe: are its weights those of a trained one?", name)

    async def _choose(self, scoring: str, info: ModelInfo, args: dict[str, Any]) -> None:
        """Takes the first way that gives the plain way's numbers."""
        plain = self._way
        probe = _probe_sequence(info)
        expected = await self._score_one(probe, top_k=2, temperature=1.0)
        ways: list[_Way] = []
        if HAS_ID_SCORES and "prompt_logprob_token_ids" in PARAMETERS and scoring in ("auto", "fields"):
            ways.append(FieldsWay(info.vocab_size, args["max_logprobs"]))
        if HAS_ID_SCORES and scoring in ("auto", "extension"):
            ways.append(ExtensionWay(info.vocab_size))
        reasons = []
        for way in ways:
            try:
                if isinstance(way, ExtensionWay):
                    problems = set(await self._llm.collective_rpc("jdistill_install")) - {""}
                    if problems:
                        raise UnsupportedError("; ".join(sorted(problems)))
                self._use(way, info)
                # At once, since vLLM spreads requests over data-parallel engines: each of them gets one.
                num_engines = self._config.data_parallel_size
                await asyncio.gather(*(self._compare(probe, expected, info.dtype) for _ in range(num_engines)))
            except EngineDeadError:
                raise
            except Exception as e:  # whatever a private interface throws: this way is not for here
                self._use(plain, info)
                reasons.append(f"{way.name}: {e}")
                continue
            break
        if scoring not in ("auto", self.way):
            why = "; ".join(reasons) or "this version has no such fields"
            raise UnsupportedError(
                f"engine_args: scoring={scoring} does not work with vLLM {self.version} here ({why}); use scoring=auto"
            )
        can = "any temperature" if self.info.any_temperature else "temperature 1 only"
        logger.info(
            "vLLM %s scores by %s: top_k up to %d, %d candidates, %s%s",
            self.version,
            self.way,
            self.info.max_top_k,
            self.info.max_candidate_count,
            can,
            f" (not {'; not '.join(reasons)})" if reasons else "",
        )

    async def _compare(self, probe: SequenceToScore, expected: TokenScores, dtype: str) -> None:
        """Raises UnsupportedError unless the chosen way gives `expected`, the plain way's scores of `probe`."""
        tolerance = PROBE_TOLERANCE[dtype]
        num_candidates = min(2, self.info.max_candidate_count)
        candidates = expected.top_ids[:, :num_candidates]
        asked = SequenceToScore(probe.token_ids, probe.spans, candidates if num_candidates else None)
        got = await self._score_one(asked, top_k=2, temperature=1.0)
        pairs = [(got.logprobs, expected.logprobs), (got.top_logprobs, expected.top_logprobs)]
        if num_candidates:
            pairs.append((got.candidate_logprobs, expected.top_logprobs[:, :num_candidates]))
        for ours, theirs in pairs:
            worst = float(np.abs(ours - theirs).max())
            if not worst <= tolerance:  # NaN too
                raise UnsupportedError(f"its log-probabilities differ from prompt_logprobs by up to {worst:.3g} nats")
        if self.info.any_temperature and num_candidates == 2:
            # Twice the temperature halves every difference of two log-probabilities.
            warm = await self._score_one(asked, top_k=0, temperature=2.0)
            theirs = np.diff(expected.top_logprobs, axis=-1) / 2
            worst = float(np.abs(np.diff(warm.candidate_logprobs, axis=-1) - theirs).max())
            if not worst <= tolerance:
                raise UnsupportedError(f"its temperature is off by up to {worst:.3g} nats")

    async def score(
        self, sequences: Sequence[SequenceToScore], *, top_k: int = 0, temperature: float = 1.0, adapter: str = ""
    ) -> AsyncIterator[tuple[int, TokenScores]]:
        """See Engine.score."""
        if self._llm is None:
            raise UnavailableError("the vllm engine is closed")
        self._refuse(sequences, top_k, temperature)
        lora = self._lora.get(adapter, self._base_lora)
        tasks = {
            asyncio.create_task(self._score_one(sequence, top_k=top_k, temperature=temperature, lora=lora)): index
            for index, sequence in enumerate(sequences)
        }
        pending = set(tasks)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield tasks[task], task.result()
        finally:  # closed early, cancelled or failed: vLLM aborts a request whose task is cancelled
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _refuse(self, sequences: Sequence[SequenceToScore], top_k: int, temperature: float) -> None:
        """Raises UnsupportedError for what the chosen way cannot give."""
        info = self.info
        num_candidates = max((s.candidate_ids.shape[1] for s in sequences if s.candidate_ids is not None), default=0)
        remedy = (
            "set engine_args.max_logprobs higher, use another engine (transformers, jax), or the first model runner "
            "(VLLM_USE_V2_MODEL_RUNNER=0 with engine_args.scoring: extension)"
        )
        where = f"vLLM {self.version}, scoring by {self.way}"
        if temperature != 1 and not info.any_temperature:
            raise UnsupportedError(f"{where}, gives temperature 1 only, asked for {temperature:g}: {remedy}")
        if top_k > info.max_top_k:
            raise UnsupportedError(f"{where}, gives top_k up to {info.max_top_k}, asked for {top_k}: {remedy}")
        if num_candidates > info.max_candidate_count:
            raise UnsupportedError(
                f"{where}, scores up to {info.max_candidate_count} candidates, asked for {num_candidates}: {remedy}"
            )

    async def check(self) -> None:
        """See Engine.check."""
        if self._llm is None:
            return
        try:
            await self._llm.check_health()
        except vllm_exceptions.EngineDeadError as e:
            raise EngineDeadError(f"vLLM's engine process has died ({e}); its log above says why") from e

    async def sleep(self) -> None:
        """See Engine.sleep."""
        if not self.can_sleep or self._llm is None:
            await super().sleep()
        elif not await self._llm.is_sleeping():
            await self._llm.sleep(level=self._config.engine_args.get("sleep_level", 1))

    async def wake(self) -> None:
        """See Engine.wake.

        Raises:
            EngineDeadError: the model does not give the numbers that it gave at start.
        """
        if not self.can_sleep or self._llm is None:
            await super().wake()
        elif await self._llm.is_sleeping():
            if self._config.engine_args.get("sleep_level", 1) == 1:
                await self._llm.wake_up()
            else:
                await self._llm.wake_up(tags=["weights"])
                await self._llm.collective_rpc("reload_weights")
                await self._llm.wake_up(tags=["kv_cache"])
                self._use(self._way, await asyncio.to_thread(model_info, self._config))
            got = await self._score_one(_probe_sequence(self.info), top_k=2, temperature=1.0)
            worst = float(np.abs(got.logprobs - self._at_start.logprobs).max())
            if not worst <= PROBE_TOLERANCE[self.info.dtype]:
                raise EngineDeadError(
                    f"vLLM {self.version} woke with other numbers than it began with (by up to {worst:.3g} nats): was "
                    "the checkpoint replaced? The sidecar has to be restarted"
                )

    async def _score_one(
        self, sequence: SequenceToScore, *, top_k: int, temperature: float, lora: LoRARequest | None = None
    ) -> TokenScores:
        way = self._way
        try:
            params = way.params(sequence, top_k=top_k, temperature=temperature)
            prompt = {"prompt_token_ids": sequence.token_ids.tolist()}
            output = None
            async for reply in self._llm.generate(
                prompt, params, request_id=str(next(self._request_ids)), lora_request=lora
            ):
                output = reply
        except vllm_exceptions.EngineDeadError as e:
            raise EngineDeadError(
                f"vLLM's engine process has died ({e}); its log above says why. The sidecar has to be restarted"
            ) from e
        except vllm_exceptions.EngineGenerateError as e:
            raise TeacherError(f"vLLM could not score a sequence: {e.__cause__ or e}") from e
        except ValueError as e:  # vLLM's own validation
            raise InvalidRequestError(f"vLLM refused a sequence of {len(sequence.token_ids)} tokens: {e}") from e
        if output is None or not output.finished:
            raise TeacherError("vLLM ended a request without an answer")
        scores = way.read(output, sequence, top_k=top_k, temperature=temperature)
        return TokenScores(
            logprobs=_clamp(scores.logprobs),
            top_ids=scores.top_ids,
            top_logprobs=None if scores.top_logprobs is None else _clamp(scores.top_logprobs),
            candidate_logprobs=None if scores.candidate_logprobs is None else _clamp(scores.candidate_logprobs),
            token_crc=token_crc(np.asarray(output.prompt_token_ids, np.int32)),
        )

    async def close(self) -> None:
        """See Engine.close."""
        if self._llm is not None:
            # In the event loop's thread: elsewhere vLLM's output handler sees its engine go and logs an error.
            self._llm.shutdown()
            self._llm = None  # its destructor fails if it runs at the interpreter's end


def _check_sleep(config: TeacherServerConfig, level: Any) -> None:
    """Raises ValueError if `offload` and `sleep_level` cannot be, here or together."""
    if level not in (1, 2):
        raise ValueError(f"engine_args: sleep_level: expected 1 or 2, got {level!r}")
    if "sleep_level" in config.engine_args and not config.offload:
        raise ValueError("engine_args: sleep_level is for offload: set offload too, or leave sleep_level out")
    if level == 2 and config.adapters:
        raise ValueError("engine_args: sleep_level 2 forgets the adapters' weights; use sleep_level 1")
    if config.offload and not current_platform.is_sleep_mode_available():
        raise ValueError(
            f"offload: vLLM {vllm.__version__} has no sleep mode on this platform ({current_platform.device_type}); "
            "leave offload out, or use the transformers engine"
        )


def _lora_rank(rank: int) -> int:
    """The smallest rank that vLLM has kernels for and that holds `rank`."""
    return next((known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)


def _clamp(logprobs: np.ndarray) -> np.ndarray:
    """float32; logit - normalizer can round to a few 1e-7 above 0."""
    return np.minimum(np.asarray(logprobs, np.float32), np.float32(0))


def _probe_sequence(info: ModelInfo) -> SequenceToScore:
    """A short sequence with ids from all over the vocabulary and a hole in its mask."""
    length = min(12, info.max_sequence_length)
    ids = (np.arange(1, length + 1) * max(1, info.vocab_size // 13) % info.vocab_size).astype(np.int32)
    return SequenceToScore(ids, ((2, 5), (7, length)) if length == 12 else ((1, length),))


def _set_environment(config: TeacherServerConfig, info: ModelInfo, args: dict[str, Any]) -> None:
    """What vLLM reads from the environment only; what a person has set is left alone."""
    # vLLM forks by default. The sidecar already runs gRPC's threads, which a forked copy may hang on, and holds its
    # port, which a copy that outlives it would keep.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    # max_model_len may be one above the checkpoint's limit; no token is ever scored or read at that position.
    os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    if not current_platform.is_cpu():
        return
    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        # vLLM keeps a core for itself, which halves two; a rank gets its share of the cores.
        cores = sorted(os.sched_getaffinity(0))
        num_ranks = (
            config.tensor_parallel_size * args.get("pipeline_parallel_size", 1) * args.get("data_parallel_size", 1)
        )
        share = len(cores) // num_ranks
        if share:
            shares = [cores[rank * share : (rank + 1) * share] for rank in range(num_ranks)]
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, s)) for s in shares)
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ and "kv_cache_memory_bytes" not in args:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(_kv_cache_gib(config, info))


def _kv_cache_gib(config: TeacherServerConfig, info: ModelInfo) -> int:
    """Room for four of the longest sequences, at least 1 GiB; vLLM's default is half of the memory."""
    hf = read_config(config.model)
    hf = {**hf, **(hf.get("text_config") or {})}
    num_heads = hf.get("num_attention_heads") or 1
    head_dim = hf.get("head_dim") or hf.get("hidden_size", 0) // num_heads
    num_kv_heads = hf.get("num_key_value_heads") or num_heads
    value_bytes = 4 if info.dtype == "float32" else 2
    token_bytes = 2 * hf.get("num_hidden_layers", 0) * num_kv_heads * head_dim * value_bytes
    return max(1, math.ceil(4 * info.max_sequence_length * token_bytes / 2**30))


def _start(args: dict[str, Any]) -> AsyncLLM:
    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
    except (ValueError, TypeError) as e:
        raise ValueError(f"vLLM {vllm.__version__} does not start with this model and these engine_args: {e}") from e
    except RuntimeError as e:
        raise EngineDeadError(f"vLLM {vllm.__version__} failed to start ({e}); its log above says why") from e
