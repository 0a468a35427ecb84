"""The vLLM engine: the contract for every way of scoring that runs here, and its own tests. One real vLLM engine."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: run these with the Python of its environment", allow_module_level=True)
from jdistill.config import TeacherServerConfig
from jdistill.sidecar.engines.vllm import worker as vllm_worker
from jdistill.wire.errors import EngineDeadError, TeacherError, UnsupportedError
from jdistill.wire.types import SequenceToScore
from tests.sidecar.checkpoints import write_checkpoint
from tests.sidecar.engine_contract import EngineContract, expected_logprobs, score_all, serve

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),  # vLLM's imports raise deprecation warnings of other libraries
]


@pytest.fixture(scope="module")
def vllm_module():
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jdistill.sidecar.engines.vllm.engine
        import jdistill.sidecar.engines.vllm.startup
        import jdistill.sidecar.engines.vllm.ways
    return jdistill.sidecar.engines.vllm


@pytest.fixture(scope="module")
def extension(tmp_path_factory, vllm_module):
    """One real engine. Prompts are chunked and the prefix cache is on: neither may change a number."""
    tmp_path = tmp_path_factory.mktemp("vllm")
    yield from serve(
        "vllm",
        write_checkpoint(tmp_path / "tiny"),
        tmp_path,
        engine_args={"max_num_batched_tokens": 80, "max_num_seqs": 8, "enable_prefix_caching": True},
    )


def by_way(served, way):
    """Returns the same vLLM with another way of scoring."""
    config = TeacherServerConfig(engine="vllm", model=str(served.path))
    engine = type(served.engine)(served.engine._llm, served.engine.info, way, config)
    return dataclasses.replace(served, engine=engine)


class TestExtensionWay(EngineContract):
    @pytest.fixture
    def served(self, extension):
        assert extension.engine.way == "extension"
        return extension


class TestPlainWayWithAllOfASmallVocabulary(EngineContract):
    @pytest.fixture
    def served(self, extension, vllm_module):
        return by_way(extension, vllm_module.ways.PlainWay(512, 512))


class TestPlainWayWithALargeVocabulary(EngineContract):
    """As with a vocabulary too large to request whole: top-k up to vLLM's limit, no candidates or temperatures."""

    @pytest.fixture
    def served(self, extension, vllm_module):
        return by_way(extension, vllm_module.ways.PlainWay(512, 20))

    def test_candidates_are_scored_in_the_order_asked_with_duplicates_and_the_token_itself(self, served):
        assert served.engine.info.max_candidate_count == 0
        sequence = SequenceToScore(served.token_ids[0], (), np.zeros((1, 1), np.int32))
        with pytest.raises(
            UnsupportedError, match=r"vLLM .*, scoring by plain, scores up to 0 candidates, asked for 1"
        ):
            served.score([sequence])

    def test_top_k_above_the_limit_is_refused(self, served):
        with pytest.raises(
            UnsupportedError, match=r"gives top_k up to 20, asked for 21: set engine_args\.max_logprobs"
        ):
            served.score([SequenceToScore(served.token_ids[0])], top_k=21)


def test_early_closing_leaves_no_request_in_vllm(extension):
    async def first_only():
        stream = extension.engine.score([SequenceToScore(ids) for ids in extension.token_ids * 20])
        async for _ in stream:
            break
        before = extension.engine._llm.output_processor.get_num_unfinished_requests()
        await stream.aclose()
        return before, extension.engine._llm.output_processor.get_num_unfinished_requests()

    before, after = extension.runner.run(first_only())
    assert before > 0
    assert after == 0


def test_a_way_that_disagrees_with_the_plain_way_is_not_used(extension, vllm_module):
    class Shifted(vllm_module.ways.ExtensionWay):
        def read(self, output, sequence, *, top_k, temperature):
            scores = super().read(output, sequence, top_k=top_k, temperature=temperature)
            return dataclasses.replace(scores, logprobs=np.roll(scores.logprobs, 1))

    class Cold(vllm_module.ways.ExtensionWay):
        def params(self, sequence, *, top_k, temperature):
            return super().params(sequence, top_k=top_k, temperature=1.0)

    probe = vllm_module.engine._probe_sequence(extension.engine.info)
    plain = by_way(extension, vllm_module.ways.PlainWay(512, 20)).engine
    expected = extension.runner.run(plain._score_one(probe, top_k=2, temperature=1.0))
    extension.runner.run(extension.engine._compare(probe, expected, "float32"))
    for way, message in ((Shifted(512), "differ from prompt_logprobs by up to"), (Cold(512), "temperature is off by")):
        engine = by_way(extension, way).engine
        with pytest.raises(UnsupportedError, match=message):
            extension.runner.run(engine._compare(probe, expected, "float32"))


def test_the_fields_way_is_refused_by_name_where_vllm_lacks_its_runner(extension, vllm_module):
    engine = by_way(extension, vllm_module.ways.PlainWay(512, 512)).engine
    with pytest.raises(UnsupportedError, match=r"scoring=fields does not work .*V2 model runner.*use scoring=auto"):
        extension.runner.run(engine._choose("fields", engine.info, {"max_logprobs": 512}))
    assert engine.way == "plain"


def test_the_fields_way_agrees_with_vllms_own_scorer(extension, vllm_module):
    """Runs vLLM's own code behind these fields, whose runner needs Triton; only the projection is replaced."""
    import torch
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    way = vllm_module.ways.FieldsWay(512, 16)
    assert (way.max_top_k, way.max_candidate_count, way.any_temperature) == (16, 15, False)
    ids, logits = extension.token_ids[2], extension.logits[2]
    spans = ((4, 7), (20, 21), (30, 37))
    rng = np.random.default_rng(0)
    sequence = SequenceToScore(ids, spans, rng.integers(0, 512, (11, 3)).astype(np.int32))
    params = way.params(sequence, top_k=0, temperature=1.0)
    params.verify(extension.engine._llm.model_config, None, None, None)
    assert params.prompt_logprob_start == 3 and params.skip_reading_prefix_cache
    logprobs_SV = expected_logprobs(logits, 1.0)
    # In this mode vLLM gathers the projection's values unchanged, without its Triton kernel.
    worker = PromptLogprobsWorker(4, torch.device("cpu"), logprobs_mode="raw_logits")
    worker.add_request("a", 0, params)
    scores = {}
    for start, stop in ((0, 10), (10, 37)):  # the prompt in two pieces

        class Batch:
            req_ids = ("a",)
            idx_mapping_np = np.array([0])
            num_computed_prefill_tokens_np = np.array([start])
            num_scheduled_tokens = np.array([stop - start])
            prefill_len_np = np.array([37])
            query_start_loc_np = np.array([0, stop - start])

        hidden = torch.from_numpy(logprobs_SV[start:stop].astype(np.float32))
        scores |= worker.compute_prompt_token_id_logprobs(lambda rows: rows, hidden, Batch, np.array([37]))

    class Output:
        prompt_token_id_logprobs = scores["a"].numpy()

    got = way.read(Output, sequence, top_k=0, temperature=1.0)
    positions = sequence.scored_positions()
    np.testing.assert_allclose(got.logprobs, logprobs_SV[positions - 1, ids[positions]], atol=1e-5)
    expected = np.take_along_axis(logprobs_SV[positions - 1], sequence.candidate_ids, axis=-1)
    np.testing.assert_allclose(got.candidate_logprobs, expected, atol=1e-5)


def test_prompt_logprobs_are_chosen_by_id_and_never_by_order(vllm_module):
    from vllm.logprobs import Logprob

    # As older versions return them: most likely first, the prompt's token somewhere.
    row = {7: Logprob(-0.5), 3: Logprob(-1.5), 9: Logprob(-4.0)}
    ids, logprobs = vllm_module.ways._entries([None, {9: Logprob(-2.0)}, row], np.array([1, 2]))
    assert vllm_module.ways._select(ids, logprobs, np.array([9, 9])).tolist() == [-2.0, -4.0]
    top_ids, top_logprobs = vllm_module.ways._top(ids[1:], logprobs[1:], 2)
    assert (top_ids.tolist(), top_logprobs.tolist()) == ([[7, 3]], [[-0.5, -1.5]])
    with pytest.raises(TeacherError, match="no log-probability of token 8 at scored position number 1"):
        vllm_module.ways._select(ids, logprobs, np.array([9, 8]))
    with pytest.raises(TeacherError, match="fewer than the 2 most likely"):
        vllm_module.ways._top(ids[:1], logprobs[:1], 2)


@pytest.mark.parametrize(
    ("engine_args", "message"),
    [
        (
            {"gpu_memory_utilisation": 0.5},
            "does not know 'gpu_memory_utilisation'; did you mean 'gpu_memory_utilization'",
        ),
        ({"max_model_len": 100}, "max_model_len is set by the sidecar itself; set max_sequence_length instead"),
        ({"logprobs_mode": "raw_logits"}, "logprobs_mode is set by the sidecar itself"),
        ({"scoring": "guess"}, "expected one of auto, fields, extension, plain, got 'guess'"),
    ],
)
def test_engine_args_are_checked_by_name_before_anything_starts(tmp_path, vllm_module, engine_args, message):
    config = TeacherServerConfig(engine="vllm", model=str(tmp_path), engine_args=engine_args)
    with pytest.raises(ValueError, match=message):
        asyncio.run(vllm_module.engine.VllmEngine.create(config))


def test_a_cpu_gets_all_its_cores_and_a_cache_of_the_right_size_unless_set(tmp_path, vllm_module, monkeypatch):
    path = write_checkpoint(tmp_path / "tiny")
    config = TeacherServerConfig(engine="vllm", model=str(path), tensor_parallel_size=2)
    info = vllm_module.engine.model_info(config)
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    vllm_module.startup.set_environment(config, info, {})
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "1"
    # 2 layers x 2 (keys, values) x 2 heads x 32 x 4 bytes = 1 KiB a token: 4 sequences of 1 Mi tokens are 4 GiB.
    long = dataclasses.replace(info, max_sequence_length=1 << 20)
    assert vllm_module.startup._kv_cache_gib(config, long) == 4
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "3")
    vllm_module.startup.set_environment(config, info, {})
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "3"


def test_workers_end_with_a_killed_sidecar_even_before_it_is_reaped():
    sleep = [sys.executable, "-c", "import time; time.sleep(120)"]
    sidecar, engine_core = subprocess.Popen(sleep), subprocess.Popen(sleep)
    watch = f"import os; from {vllm_worker.__name__} import _end_with; print(1, flush=True); "
    watch += f"_end_with({sidecar.pid}, [{engine_core.pid}, os.getpid()])"
    worker = subprocess.Popen([sys.executable, "-c", watch], stdout=subprocess.PIPE)
    try:
        assert worker.stdout.readline() == b"1\n"
        assert engine_core.poll() is None
        os.kill(sidecar.pid, signal.SIGKILL)  # it stays a zombie until the end of this test
        assert worker.wait(60) == engine_core.wait(60) == -signal.SIGKILL
    finally:
        for process in (sidecar, engine_core, worker):
            process.kill()
            process.wait()
        worker.stdout.close()


class Sleeper:
    """Wraps real vLLM and replaces its sleep mode, which needs a GPU, by a record of the calls."""

    def __init__(self, llm):
        self._llm, self.asked, self._asleep = llm, [], False

    def __getattr__(self, name):
        return getattr(self._llm, name)

    async def is_sleeping(self):
        return self._asleep

    async def sleep(self, level):
        self._asleep = True
        self.asked.append(("sleep", level))

    async def wake_up(self, tags=("weights", "kv_cache")):
        self._asleep = "kv_cache" not in tags
        self.asked += [("wake", tag) for tag in tags]

    async def collective_rpc(self, method):
        self.asked.append(("rpc", method))


@pytest.mark.parametrize(
    ("level", "asked"),
    [
        (1, [("sleep", 1), ("wake", "weights"), ("wake", "kv_cache")]),
        (2, [("sleep", 2), ("wake", "weights"), ("rpc", "reload_weights"), ("wake", "kv_cache")]),
    ],
)
def test_sleep_and_wake_call_vllms_own_and_compare_the_probe_afterwards(extension, vllm_module, level, asked):
    config = TeacherServerConfig(
        engine="vllm", model=str(extension.path), offload=True, engine_args={"sleep_level": level}
    )
    engine = vllm_module.engine.VllmEngine(
        Sleeper(extension.engine._llm), extension.engine.info, vllm_module.ways.ExtensionWay(512), config
    )
    engine._at_start = extension.engine._at_start

    async def twice():
        await engine.sleep()
        await engine.sleep()
        await engine.wake()
        await engine.wake()

    extension.runner.run(twice())
    assert engine._llm.asked == asked
    assert engine.info == extension.engine.info
    engine._at_start = dataclasses.replace(engine._at_start, logprobs=engine._at_start.logprobs - 0.1)
    with pytest.raises(EngineDeadError, match=r"scores the probe differently after waking \(by up to 0\.1"):
        extension.runner.run(twice())


def test_a_dead_engine_raises_now_and_later(extension):
    """The last test: it kills vLLM's engine process."""
    (process,) = extension.engine._llm.engine_core.resources.engine_manager.processes

    async def kill_while_scoring():
        running = asyncio.create_task(
            score_all(extension.engine, [SequenceToScore(ids) for ids in extension.token_ids * 200])
        )
        while not extension.engine._llm.output_processor.get_num_unfinished_requests():
            await asyncio.sleep(0)
        await extension.engine.check()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="has died"):
            await asyncio.wait_for(running, 20)
        with pytest.raises(EngineDeadError, match="has died"):
            await extension.engine.check()

    extension.runner.run(kill_while_scoring())
    for _ in range(2):
        with pytest.raises(EngineDeadError, match=r"has died .* has to be restarted"):
            extension.runner.run(score_all(extension.engine, [SequenceToScore(extension.token_ids[1])]))


def test_a_stored_head_is_scored_though_the_configuration_ties_it(tmp_path, vllm_module):
    path = write_checkpoint(tmp_path / "tiny")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    for served in serve("vllm", path, tmp_path, engine_args={"load_format": "auto"}):
        (got,) = served.score([SequenceToScore(served.token_ids[2])])
        expected_SV = expected_logprobs(served.logits[2], 1.0)[:-1]
        ids = served.token_ids[2][1:]
        np.testing.assert_allclose(got.logprobs, expected_SV[np.arange(len(ids)), ids], atol=1e-4)
