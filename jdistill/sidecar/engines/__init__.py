"""The table of engines, and one file or folder per engine."""

from __future__ import annotations

import asyncio
import difflib
import importlib
import logging

import numpy as np

from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.sidecar.engines.base import Engine
from jdistill.sidecar.engines.probe import probe_ids
from jdistill.sidecar.results import check_scores
from jdistill.wire.types import SequenceToScore

logger = logging.getLogger(__name__)

# Imported on demand: each engine has its own environment (vllm without jax, jax without torch).
ENGINES = {
    "vllm": "jdistill.sidecar.engines.vllm.engine:VllmEngine",
    "sglang": "jdistill.sidecar.engines.sglang:SglangEngine",
    "vllm-http": "jdistill.sidecar.engines.vllm_http:VllmHttpEngine",
    "sglang-http": "jdistill.sidecar.engines.sglang_http:SglangHttpEngine",
    "transformers": "jdistill.sidecar.engines.transformers:TransformersEngine",
    "jax": "jdistill.sidecar.engines.jax:JaxEngine",
    "fake": "jdistill.sidecar.engines.fake:FakeEngine",
}

# The pip extra with an engine's dependencies.
EXTRAS = {
    "vllm": "vllm",
    "sglang": "sglang",
    "vllm-http": "http",
    "sglang-http": "http",
    "transformers": "transformers",
    "jax": "student",
    "fake": "server",
}


def check_engine_name(name: str) -> None:
    """Raises ConfigError, with the nearest name, if there is no such engine."""
    if name not in ENGINES:
        near = difflib.get_close_matches(name, ENGINES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"no engine {name!r}; {hint}There are: {', '.join(ENGINES)}")


def engine_class(name: str) -> type[Engine]:
    """Returns the class for `name`.

    Raises:
        ConfigError: no such engine, or its libraries are not installed here.
    """
    check_engine_name(name)
    module, _, attribute = ENGINES[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] == "jdistill":
            raise  # ours: a bug, not an installation
        raise ConfigError(
            f"engine {name!r} needs {e.name}, which is not installed for this Python: "
            f"pip install 'jdistill[{EXTRAS[name]}]', or use the interpreter of an environment that has it"
        ) from None


async def create_engine(config: TeacherServerConfig) -> Engine:
    """Creates the engine `config.engine` and loads its model.

    Raises:
        ConfigError, ValueError: no such engine, a checkpoint that cannot be used, unknown engine_args.
    """
    if config.urls and not config.engine.endswith("-http"):
        near = f"{config.engine}-http" if f"{config.engine}-http" in ENGINES else "vllm-http, sglang-http"
        raise ConfigError(
            f"engine {config.engine} and urls are two ways of naming an engine: it runs a model itself. For servers "
            f"that run already use engine {near}; to run one here leave urls out"
        )
    # In a thread: importing torch or vLLM takes seconds, during which health checks must be answered.
    kind = await asyncio.to_thread(engine_class, config.engine)
    engine = await kind.create(config)
    try:
        await try_adapters(engine)
    except BaseException:
        await engine.close()
        raise
    return engine


async def try_adapters(engine: Engine) -> None:
    """Scores a probe with each adapter, so that one that its library cannot run fails at start, not at every request.

    Raises:
        ConfigError: an adapter does not score.
    """
    probe = SequenceToScore(probe_ids(engine.info))
    scores: dict[str, np.ndarray] = {}
    for name in ("", *engine.adapters) if engine.adapters else ():
        try:
            ((_, got),) = [item async for item in engine.score([probe], adapter=name)]
            check_scores(probe, got, top_k=0, info=engine.info, index=0)
        except Exception as e:  # a library that does not fit may raise anything
            what = f"adapter {name!r}" if name else "the base model beside adapters"
            raise ConfigError(
                f"adapters: the {engine.name} engine ({engine.version}) cannot score with {what} "
                f"({type(e).__name__}: {e}). Are its library and PEFT of versions that work together (pip install "
                "'jdistill[adapters]')? Otherwise merge the adapter into the checkpoint"
            ) from e
        scores[name] = got.logprobs
        if name and np.array_equal(got.logprobs, scores[""]):
            logger.warning("adapter %r changes no score of the probe: is it a trained adapter?", name)
