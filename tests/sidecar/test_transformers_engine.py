"""The transformers engine: the contract of all engines, packing, memory, refusals."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import weakref

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdistill.config import TeacherServerConfig
from jdistill.wire.types import SequenceToScore
from tests.sidecar.checkpoints import write_adapter, write_checkpoint
from tests.sidecar.engine_contract import (
    AdapterContract,
    EngineContract,
    expected_logprobs,
    score_all,
    serve,
    serve_adapters,
)
from tests.sidecar.reference import reference_logits

pytest.importorskip("torch", reason="the transformers engine needs PyTorch: pip install 'jdistill[transformers]'")

from jdistill.sidecar.engines import transformers as module
from jdistill.sidecar.engines.transformers import TransformersEngine


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("transformers")
    # A budget of 300 tokens makes several batches; chunks of 7 positions cut through sequences.
    yield from serve(
        "transformers",
        write_checkpoint(tmp_path / "tiny"),
        tmp_path,
        max_batch_tokens=300,
        offload=True,
        engine_args={"chunk_tokens": 7, "device": "cpu"},
    )


class TestTransformersEngine(EngineContract):
    def test_batches_have_no_padding(self, served):
        assert served.engine.packs
        shapes = shapes_through(served.engine._model.base_model)
        served.score([SequenceToScore(ids) for ids in served.token_ids])
        assert all(rows == 1 for rows, _ in shapes)
        assert sum(columns for _, columns in shapes) == sum(map(len, served.token_ids))
        assert len(shapes) == 2  # 300 tokens at most: 2 + 128 + 37 + 64 + 9, 100

    def test_only_scored_positions_are_projected_onto_the_vocabulary_in_chunks(self, served):
        shapes = shapes_through(served.engine._head)
        served.score([SequenceToScore(ids, ((1, 2),)) for ids in served.token_ids], top_k=5)
        served.score([SequenceToScore(served.token_ids[1], ((100, 128),))])
        rows = [rows for rows, _ in shapes]
        assert max(rows) == 7
        assert sum(rows) == 6 + 28

    def test_sleep_frees_every_parameter(self, served):
        parameters = [weakref.ref(parameter) for parameter in served.engine._model.parameters()]
        assert len(parameters) > 10
        served.runner.run(served.engine.sleep())
        assert not [parameter for parameter in parameters if parameter() is not None]
        served.runner.run(served.engine.wake())


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("padded")
    engine_args = {"packing": False, "chunk_tokens": 7}
    path = write_checkpoint(tmp_path / "tiny")
    yield from serve("transformers", path, tmp_path, max_batch_tokens=300, engine_args=engine_args)


class TestTransformersEngineWithPadding(EngineContract):
    @pytest.fixture
    def served(self, padded):
        assert not padded.engine.packs
        return padded


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory):
    pytest.importorskip("peft", reason="transformers serves adapters with PEFT: pip install peft")
    yield from serve_adapters("transformers", tmp_path_factory.mktemp("adapters"), offload=True)


class TestTransformersAdapters(AdapterContract):
    def test_adapters_wake_with_the_model(self, with_adapters):
        sequence = SequenceToScore(with_adapters.token_ids[2])
        (before,) = with_adapters.score([sequence], adapter="code")
        with_adapters.runner.run(with_adapters.engine.sleep())
        with_adapters.runner.run(with_adapters.engine.wake())
        (after,) = with_adapters.score([sequence], adapter="code")
        np.testing.assert_array_equal(after.logprobs, before.logprobs)


def shapes_through(module):
    """Returns a list to which the first two dimensions of each input to `module` are added."""
    shapes = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape[:2])),
        with_kwargs=True,
    )
    return shapes


def run(coroutine):
    with asyncio.Runner() as runner:
        return runner.run(coroutine)


def create(path, **config):
    return run(TransformersEngine.create(TeacherServerConfig(engine="transformers", model=str(path), **config)))


def check_against_reference(path, tmp_path, *, packs):
    """Compares two sequences scored in one batch with each alone in bare transformers."""
    rng = np.random.default_rng(1)
    token_ids = [rng.integers(0, 512, size).astype(np.int32) for size in (30, 90)]
    logits = reference_logits(path, token_ids, tmp_path / "reference.npz")

    async def score():
        engine = await TransformersEngine.create(TeacherServerConfig(engine="transformers", model=str(path)))
        scores = await score_all(engine, [SequenceToScore(ids) for ids in token_ids])
        await engine.close()
        return engine.packs, scores

    got_packs, scores = run(score())
    assert got_packs == packs
    for ids, logits_SV, got in zip(token_ids, logits, scores, strict=True):
        expected = expected_logprobs(logits_SV, 1.0)[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_other_families_with_tied_embeddings_and_grouped_queries_equal_transformers(tmp_path, model_type):
    path = write_checkpoint(tmp_path / "tiny", model_type=model_type, tie_word_embeddings=True, seed=3)
    check_against_reference(path, tmp_path, packs=True)


def test_a_model_that_does_not_attend_to_all_tokens_gets_padded_batches(tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}  # the second of two layers
    check_against_reference(write_checkpoint(tmp_path / "tiny", **window), tmp_path, packs=False)


@pytest.mark.parametrize("wrong", [{"sequence_lengths": None}, {"softcap": 30.0}])
def test_a_model_whose_packed_sequences_leak_or_need_more_attention_gets_padded_batches(served, monkeypatch, wrong):
    right = module.packed_sdpa
    monkeypatch.setattr(module, "packed_sdpa", lambda *args, **kwargs: right(*args, **{**kwargs, **wrong}))

    async def score():
        engine = await TransformersEngine.create(TeacherServerConfig(engine="transformers", model=str(served.path)))
        scores = await score_all(engine, [SequenceToScore(ids) for ids in served.token_ids])
        await engine.close()
        return engine.packs, scores

    packs, scores = run(score())
    assert not packs
    for index, got in enumerate(scores):
        EngineContract().check(served, index, (), got)


MEMORY = """
import asyncio, json, resource, sys
import numpy as np
from jdistill.config import TeacherServerConfig
from jdistill.sidecar.engines.transformers import TransformersEngine
from jdistill.wire.types import SequenceToScore

def resident_mib():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20

async def score(engine, token_ids):
    async for _ in engine.score([SequenceToScore(ids) for ids in token_ids], top_k=4):
        pass

async def main(path):
    config = TeacherServerConfig(engine="transformers", model=path, offload=True, engine_args={"chunk_tokens": 128})
    engine = await TransformersEngine.create(config)
    await score(engine, [np.arange(128, dtype=np.int32)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    await score(engine, np.arange(2048, dtype=np.int32).reshape(16, 128))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    awake = resident_mib()
    await engine.sleep()
    asleep = resident_mib()
    await engine.wake()
    await score(engine, [np.arange(128, dtype=np.int32)])
    json.dump({"scoring": peak - before, "awake": awake, "asleep": asleep}, sys.stdout)

asyncio.run(main(sys.argv[1]))
"""


def test_memory_does_not_grow_with_tokens_times_vocabulary_and_sleep_gives_the_weights_back(tmp_path):
    V, D = 100_000, 256
    path = write_checkpoint(tmp_path / "wide", vocab_size=V, hidden_size=D, tokenizer=False)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], check=True, timeout=240, stdout=subprocess.PIPE)
    memory = json.loads(done.stdout)
    # The embedding is as large but mapped from the file: only the rows in use are in memory.
    head_mib, all_logits_mib = V * D * 4 / 2**20, 16 * 127 * V * 4 / 2**20
    assert (round(head_mib), round(all_logits_mib)) == (98, 775)
    # Logits of a chunk are 49 MiB; they, their exponentials and buffers of the top-k exist at once.
    assert memory["scoring"] < 0.4 * all_logits_mib, memory
    assert memory["awake"] - memory["asleep"] > 0.9 * head_mib, memory


def test_bfloat16_is_served_when_asked_and_has_another_fingerprint(tmp_path):
    path = write_checkpoint(tmp_path / "tiny")

    async def score(dtype):
        engine = await TransformersEngine.create(
            TeacherServerConfig(engine="transformers", model=str(path), dtype=dtype)
        )
        scores = await score_all(engine, [SequenceToScore(np.arange(60, dtype=np.int32))])
        await engine.close()
        return engine.info, scores[0].logprobs

    (exact_info, exact), (info, rounded) = run(score("auto")), run(score("bfloat16"))
    assert (exact_info.dtype, info.dtype) == ("float32", "bfloat16")
    assert exact_info.fingerprint != info.fingerprint
    assert 1e-4 < np.abs(exact - rounded).max() < 1.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"engine_args": {"devise": "cpu"}}, "does not know 'devise'; did you mean 'device'"),
        ({"engine_args": {"device": "abacus"}}, "device .abacus. is unknown to PyTorch"),
        ({"engine_args": {"chunk_tokens": 0}}, "positive integer, got 0"),
        ({"engine_args": {"packing": 1}}, "packing must be true or false, got 1"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: the transformers engine cannot do that .*vllm or sglang"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: the transformers engine cannot do that"),
        ({"data_parallel_size": 2}, "data_parallel_size: the transformers engine .*start several sidecars"),
        ({"quantization": "fp8"}, r"quantization: the transformers engine cannot do that \(got 'fp8'\)"),
        ({"memory_fraction": 0.5}, "memory_fraction: the transformers engine .*max_batch_tokens bounds the rest"),
        ({"adapters": {"math": "no/such/adapter"}}, "is not a LoRA adapter"),
        ({"max_sequence_length": 129}, "expected 2 to 128"),
        ({"dtype": "float64"}, "auto or one of float32, bfloat16, float16, got 'float64'"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_remedy(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        create(write_checkpoint(tmp_path / "tiny"), **config)


def test_a_model_that_caps_its_logits_is_refused(tmp_path):
    import torch
    import transformers

    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=32,
        final_logit_softcapping=0.5,
    )
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    model.save_pretrained(tmp_path / "gemma")
    with pytest.raises(ValueError, match="soft cap or a scale"):
        create(tmp_path / "gemma")


def test_adapters_without_peft_are_refused_with_the_remedy(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "tiny")
    adapter = write_adapter(tmp_path / "math", path)
    monkeypatch.setattr(module, "is_peft_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs PEFT for them: pip install 'jdistill\[adapters\]', use"):
        create(path, adapters={"math": str(adapter)})


def test_an_adapter_of_another_model_is_refused(tmp_path):
    pytest.importorskip("peft", reason="transformers serves adapters with PEFT: pip install peft")
    adapter = write_adapter(tmp_path / "math", write_checkpoint(tmp_path / "deeper", num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"adapts model\.layers\.2\..*, which the base model does not store"):
        create(write_checkpoint(tmp_path / "tiny"), adapters={"math": str(adapter)})


def test_weights_that_transformers_would_make_up_are_refused(tmp_path):
    path = write_checkpoint(tmp_path / "tiny")
    tensors = load_file(path / "model.safetensors")
    lost = "model.layers.1.input_layernorm.weight"
    save_file({name: value for name, value in tensors.items() if name != lost}, path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"no weights for {lost} \(1 such tensors\) and would score with random"):
        create(path, engine_args={"device": "cpu"})


def test_a_separate_head_is_scored_though_the_configuration_ties_it_and_a_version_that_ties_is_refused(
    tmp_path, monkeypatch
):
    path = write_checkpoint(tmp_path / "tiny")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    check_against_reference(path, tmp_path, packs=True)
    # As transformers 4 does it.
    monkeypatch.setattr("transformers.modeling_utils._tied_params_are_equal", lambda a, b: True)
    with pytest.raises(ValueError, match=r"another output head is stored, which transformers .* ignores"):
        create(path, engine_args={"device": "cpu"})
