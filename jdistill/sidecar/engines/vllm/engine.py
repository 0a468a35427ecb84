"""vLLM engine: AsyncLLM in this process, with the best way of scoring for this version, model runner and platform.

The ways (ways.py) are tried in the order fields, extension, plain; one is used only if it gives the numbers of `plain`,
vLLM's own prompt log-probabilities, on a probe at start.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import pathlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import vllm
from vllm.config import ModelConfig
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.engine import exceptions as vllm_exceptions
from vllm.v1.engine.async_llm import AsyncLLM

from jdistill.config import TeacherServerConfig
from jdistill.sidecar.engines.adapters import adapter_info, write_zero_adapter
from jdistill.sidecar.engines.base import Engine
from jdistill.sidecar.engines.options import model_info
from jdistill.sidecar.engines.own_loader import check_own_loader
from jdistill.sidecar.engines.probe import PROBE_LENGTH, distance, probe_ids
from jdistill.sidecar.engines.vllm import startup
from jdistill.sidecar.engines.vllm.ways import HAS_ID_SCORES, PARAMETERS, ExtensionWay, FieldsWay, PlainWay, Way
from jdistill.sidecar.results import check_scores
from jdistill.wire.codec import token_crc
from jdistill.wire.errors import EngineDeadError, InvalidRequestError, TeacherError, UnavailableError, UnsupportedError
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores

logger = logging.getLogger(__name__)

# Nats between two ways of computing one log-probability: the rounding of float32, or of 16-bit logits (0.06 at a logit
# of 16).
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}


class VllmEngine(Engine):
    """Scores with vLLM's AsyncLLM; `await VllmEngine.create(config)` takes 10 s to minutes."""

    name = "vllm"

    def __init__(self, llm: AsyncLLM, info: ModelInfo, way: Way, config: TeacherServerConfig):
        self.version = vllm.__version__
        self._llm: AsyncLLM | None = llm
        self.can_sleep = config.offload
        self._config = config
        self._adapters = config.adapters
        self._request_ids = itertools.count()
        self._at_start: TokenScores | None = None  # scores of a probe, compared after a sleep
        self._base_lora: LoRARequest | None = None
        self._lora = {
            name: LoRARequest(name, number, str(pathlib.Path(path).absolute()))
            for number, (name, path) in enumerate(config.adapters.items(), start=1)
        }
        self._use(way, info)

    def _use(self, way: Way, info: ModelInfo) -> None:
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
        and `sleep_level`: 1 (the default; the weights move to host memory) or 2 (they are read from disk again).

        Raises:
            FileNotFoundError, ValueError: the checkpoint or an engine argument cannot be used.
            UnsupportedError: the requested way of scoring does not work here.
        """
        scoring, given = startup.check_args(config)
        info = await asyncio.to_thread(model_info, config)
        takes_stored_head = hasattr(ModelConfig, "maybe_untie_word_embeddings")  # since 0.32, or slightly before
        await asyncio.to_thread(check_own_loader, "vLLM", config.model, takes_stored_head=takes_stored_head)
        args = startup.arguments(config, info, given)
        startup.set_environment(config, info, args)
        llm = await asyncio.to_thread(startup.start, args)
        plain = PlainWay(info.vocab_size, args["max_logprobs"])
        engine = cls(llm, info, plain, config)
        scratch = contextlib.ExitStack()
        if config.adapters and current_platform.is_cpu():
            # In a batch with adapters, vLLM's CPU kernels (0.32) apply the last adapter to the base model's rows: they
            # index with -1. An adapter of zeros scores like the base model and never has index -1.
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
        """Scores with each adapter, alone and beside the others, so that a misfit fails at start, not at step 900."""
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
                    f"vLLM {self.version} scores {name} differently when other adapters share the batch (by up to "
                    f"{worst:.3g} nats): serve each adapter by its own sidecar, or merged"
                )

    async def _choose(self, scoring: str, info: ModelInfo, args: dict[str, Any]) -> None:
        """Chooses the first way that gives the plain way's numbers."""
        plain = self._way
        probe = _probe_sequence(info)
        expected = await self._score_one(probe, top_k=2, temperature=1.0)
        ways: list[Way] = []
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
                # Concurrently: vLLM spreads requests over data-parallel engines, so each of them gets one.
                num_engines = self._config.data_parallel_size
                await asyncio.gather(*(self._compare(probe, expected, info.dtype) for _ in range(num_engines)))
            except EngineDeadError:
                raise
            except Exception as e:  # a private interface may raise anything: this way does not work here
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
        check_scores(asked, got, top_k=2, info=self.info, index=0)  # complete: distance() compares only what is there
        worst = distance(got, expected)
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
        finally:  # closed early, cancelled or failed: vLLM aborts the request of a cancelled task
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _refuse(self, sequences: Sequence[SequenceToScore], top_k: int, temperature: float) -> None:
        """Raises UnsupportedError for requests that the chosen way cannot serve."""
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
            EngineDeadError: the model scores the probe differently than at start.
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
                    f"vLLM {self.version} scores the probe differently after waking (by up to {worst:.3g} nats): was "
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
            raise TeacherError("vLLM ended a request without a result")
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
            # In the event loop's thread: from another one, vLLM's output handler logs an error about the lost engine.
            self._llm.shutdown()
            self._llm = None  # its destructor fails if it runs at interpreter exit


def _clamp(logprobs: np.ndarray) -> np.ndarray:
    """Converts to float32 and clamps at 0: logit - normalizer can round to a few 1e-7 above it."""
    return np.minimum(np.asarray(logprobs, np.float32), np.float32(0))


def _probe_sequence(info: ModelInfo) -> SequenceToScore:
    """Returns the probe; where it has its full length, its scored spans leave a hole."""
    ids = probe_ids(info)
    return SequenceToScore(ids, ((2, 5), (7, len(ids))) if len(ids) == PROBE_LENGTH else ((1, len(ids)),))
