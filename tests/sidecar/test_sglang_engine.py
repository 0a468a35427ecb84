"""The engines around SGLang: one starts a real server, the other stands in front of the same server.

The server has adapters, prompts chunked to 80 tokens, the prefix cache and (make test-full) two pipeline stages; none
of them may change a number. The GPU libraries that it imports are replaced by sglang_stubs.
"""

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import time
import urllib.request

import numpy as np
import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed: run these with the Python of its environment", allow_module_level=True)
import psutil

from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.sidecar.engines import create_engine, sglang_http
from jdistill.sidecar.engines.sglang import _environment
from jdistill.wire.errors import EngineDeadError, UnsupportedError
from jdistill.wire.types import SequenceToScore
from tests.faults.harness import FULL
from tests.sidecar.checkpoints import write_adapter, write_checkpoint
from tests.sidecar.engine_contract import EngineContract, score_all, serve
from tests.sidecar.processes import launch
from tests.sidecar.reference import reference_logits

# The shared server starts in 40 s on two quiet cores, in 170 s on busy ones.
pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]

STUBS = str(pathlib.Path(__file__).parent / "sglang_stubs")
CPU = {"device": "cpu", "max_total_tokens": 16384, "max_connections": 32}


@pytest.fixture(scope="module", autouse=True)
def stubs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [STUBS, os.environ.get("PYTHONPATH", "")])))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(STUBS)
        yield


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Returns the checkpoint's directory, and the directories of two adapters by name."""
    directory = tmp_path_factory.mktemp("sglang")
    path = write_checkpoint(directory / "qwen3-tiny")
    ranks = {"math": 4, "code": 9}
    return path, {name: str(write_adapter(directory / name, path, rank=r, seed=r)) for name, r in ranks.items()}


@pytest.fixture(scope="module")
def owned(adapters, tmp_path_factory):
    path, paths = adapters
    yield from serve(
        "sglang",
        path,
        tmp_path_factory.mktemp("reference"),
        dtype="float32",
        memory_fraction=0.2,
        pipeline_parallel_size=2 if FULL else 1,  # make test-full: two processes load SGLang
        adapters=paths,
        engine_args={**CPU, "lora_backend": "torch_native", "chunked_prefill_size": 80},
    )


@pytest.fixture(scope="module")
def in_front(owned, adapters):
    config = TeacherServerConfig(
        engine="sglang-http",
        model=str(owned.path),
        urls=[owned.engine.connection.url],
        max_sequence_length=128,
        adapters=adapters[1],
    )
    engine = owned.runner.run(create_engine(config))
    yield dataclasses.replace(owned, engine=engine)
    owned.runner.run(engine.close())


class TestSglangEngine(EngineContract):
    @pytest.fixture
    def served(self, owned):
        assert owned.engine.way == "flat"
        return owned


class TestSglangHttpEngine(EngineContract):
    @pytest.fixture
    def served(self, in_front):
        return in_front


class TestNestedListsAndCandidatesInManyPieces(EngineContract):
    @pytest.fixture
    def served(self, in_front, monkeypatch):
        monkeypatch.setattr(in_front.engine, "way", "plain")
        monkeypatch.setattr(sglang_http, "MAX_ENTRIES", 40)
        return in_front


def test_each_adapter_scores_like_its_merged_checkpoint(owned, adapters, tmp_path):
    engine = owned.engine
    sequence = SequenceToScore(owned.token_ids[5], ((40, 100),), np.full((60, 2), 7, np.int32))

    async def together():
        names = ["", "math", "code", "math"]
        return await asyncio.gather(*(score_all(engine, [sequence], top_k=2, adapter=name) for name in names))

    (base,), (math,), (code,), (again,) = owned.runner.run(together())
    contract = EngineContract()
    contract.check(owned, 5, sequence.spans, base, candidates=sequence.candidate_ids)
    np.testing.assert_allclose(math.logprobs, again.logprobs, atol=2e-5, rtol=0)
    for name, scores in (("math", math), ("code", code)):
        merged = pathlib.Path(adapters[1][name] + "-merged")
        logits = reference_logits(merged, owned.token_ids[5:6], tmp_path / f"{name}.npz")
        reference = dataclasses.replace(owned, logits=[None] * 5 + logits)
        contract.check(reference, 5, sequence.spans, scores, candidates=sequence.candidate_ids)
        assert np.abs(scores.logprobs - base.logprobs).max() > 1
        assert engine.adapters[name].base_model == engine.info.model
    assert len({engine.info.fingerprint, *(info.fingerprint for info in engine.adapters.values())}) == 3


@pytest.mark.parametrize("max_entries", [1, 40, 1000, 10**6])
def test_pieces_hold_every_position_once_and_at_most_max_entries(max_entries):
    rng = np.random.default_rng(2)
    spans = ((3, 9), (20, 21), (30, 64))
    sequence = SequenceToScore(rng.integers(0, 512, 70).astype(np.int32), spans, rng.integers(0, 99, (41, 3)))
    found = list(sglang_http.pieces(sequence, max_entries))
    positions = np.concatenate([piece.scored_positions() for piece in found])
    np.testing.assert_array_equal(positions, sequence.scored_positions())
    np.testing.assert_array_equal(np.concatenate([piece.candidate_ids for piece in found]), sequence.candidate_ids)
    for piece in found:
        begin, end = piece.spans[0][0], piece.spans[-1][1]
        np.testing.assert_array_equal(piece.token_ids, sequence.token_ids[:end])
        assert piece.num_scored == 1 or (end - begin + 1) * len(np.unique(piece.candidate_ids)) <= max_entries
    assert len(found) == {1: 41, 10**6: 1}.get(max_entries, len(found))


def test_a_closed_iterator_aborts_the_requests_in_the_server(owned):
    url = owned.engine.connection.url

    def busy():
        with urllib.request.urlopen(url + "/v1/loads?include=core", timeout=60) as reply:
            loads = json.load(reply)["loads"]
        return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)

    config = TeacherServerConfig(
        engine="sglang-http", model=str(owned.path), urls=[url], engine_args={"max_connections": 1200}
    )

    async def start_and_leave():
        engine = await create_engine(config)
        scoring = asyncio.ensure_future(score_all(engine, [SequenceToScore(ids) for ids in owned.token_ids * 200]))
        while not await asyncio.to_thread(busy):
            assert not scoring.done()
        scoring.cancel()
        await asyncio.wait([scoring])
        begin = time.monotonic()
        while await asyncio.to_thread(busy):
            await asyncio.sleep(0.05)
        await engine.close()
        return scoring.cancelled(), time.monotonic() - begin

    cancelled, duration_s = owned.runner.run(start_and_leave())
    assert cancelled
    assert duration_s < 10  # 68,000 tokens would take 20 s at least; what is being computed is finished


def test_sleep_is_refused_without_offload(owned):
    assert not owned.engine.can_sleep
    with pytest.raises(UnsupportedError, match="was not started with offload"):
        owned.runner.run(owned.engine.sleep())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engine_args": {"device": "cpu", "chunked_prefil_size": 3}}, "chunked_prefill_size"),
        ({"engine_args": {"device": "cpu", "tp_size": 2}}, "set tensor_parallel_size instead"),
        ({"engine_args": {"api_key": "x"}}, "api_key is set by the sidecar itself"),
        ({"offload": True}, "GPUs only"),
        ({"urls": ["http://127.0.0.1:1"]}, "use engine sglang-http"),
        ({"adapters": {"math": "/nowhere"}}, "is not a LoRA adapter"),
    ],
)
def test_an_impossible_configuration_is_refused_with_the_remedy_before_anything_starts(owned, change, words):
    fields = {"engine": "sglang", "model": str(owned.path), **change}
    with pytest.raises(ValueError, match=words):
        owned.runner.run(create_engine(TeacherServerConfig(**fields)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapters": {"physics": "/x"}}, "has no 'physics'; it has loaded math, code|code, math"),
        ({"max_sequence_length": 500}, "the limit of the server"),
        ({"engine": "vllm-http"}, "do not answer like vLLM's|answers 404"),
    ],
)
def test_a_server_that_contradicts_the_configuration_is_refused(owned, change, words):
    urls = [owned.engine.connection.url]
    fields = {"engine": "sglang-http", "model": str(owned.path), "urls": urls, **change}
    with pytest.raises(ConfigError, match=words):
        owned.runner.run(create_engine(TeacherServerConfig(**fields)))


def test_several_ranks_on_a_cpu_share_its_cores_unless_told_otherwise(monkeypatch):
    config = TeacherServerConfig(engine="sglang", model="x", tensor_parallel_size=2)
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert _environment(config, True)["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in _environment(config, False)
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "3|2")
    assert "SGLANG_CPU_OMP_THREADS_BIND" not in _environment(config, True)


def test_the_engine_is_dead_when_its_server_dies(owned):
    """Must be the last test of the shared server: it kills it."""
    sequences = [SequenceToScore(np.arange(1, 120, dtype=np.int32)) for _ in range(400)]

    async def kill_in_mid_scoring():
        await owned.engine.check()
        stream = owned.engine.score(sequences)
        await anext(stream)
        os.killpg(owned.engine._process.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="has ended"):
            await asyncio.wait_for(exhaust(stream), 20)
        with pytest.raises(EngineDeadError, match="has ended"):
            await owned.engine.check()

    async def exhaust(stream):
        async for _ in stream:
            pass

    owned.runner.run(kill_in_mid_scoring())


def test_a_server_that_cannot_start_is_an_error_and_leaves_nothing_behind(adapters):
    config = TeacherServerConfig(
        engine="sglang", model=str(adapters[0]), engine_args={**CPU, "attention_backend": "no_such_backend"}
    )
    before = psutil.Process().children(recursive=True)
    with pytest.raises(ConfigError, match=r"does not start with this model .* has ended with code [1-9]"):
        asyncio.run(create_engine(config))
    assert set(psutil.Process().children(recursive=True)) <= set(before)


def test_the_server_ends_with_a_sidecar_that_is_killed(adapters, tmp_path):
    flags = ["--engine", "sglang", "--model", adapters[0], "--memory-fraction", 0.2]
    for name, value in CPU.items():
        flags += ["--engine-arg", f"{name}={value}"]
    sidecar = launch(tmp_path, *flags, wait=False)
    processes = []
    try:
        sidecar.wait_for_port(timeout_s=200)
        processes = psutil.Process(sidecar.process.pid).children(recursive=True)
        assert len(processes) >= 3  # server, scheduler, detokenizer
        sidecar.process.kill()
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    finally:
        sidecar.process.kill()
        sidecar.process.wait()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
