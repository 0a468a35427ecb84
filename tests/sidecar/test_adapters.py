"""Adapters as PEFT writes them: read by their tensors, served as PEFT applies them, or refused."""

from __future__ import annotations

import asyncio
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.sidecar.engines import create_engine, try_adapters
from jdistill.sidecar.engines.adapters import is_target, read_adapter
from jdistill.sidecar.engines.fake import FakeEngine
from jdistill.sidecar.engines.sglang_http import SglangHttpEngine
from jdistill.sidecar.engines.vllm_http import VllmHttpEngine
from jdistill.weight_files import stored_tensors
from jdistill.wire.types import SequenceToScore
from tests.sidecar.checkpoints import write_adapter, write_checkpoint
from tests.sidecar.engine_contract import expected_logprobs, score_all

peft = pytest.importorskip("peft", reason="the reference for adapters is PEFT: pip install peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",
    "ignore:fan_in_fan_out is set to True",
)

IDS = np.random.default_rng(0).integers(0, 512, 30).astype(np.int32)
BODY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("adapters") / "tiny")


def make(base, to, **options):
    """Saves a random adapter with PEFT; returns PEFT's own model."""
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(model, peft.LoraConfig(**{**defaults, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name or "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(to)
    return model


def edit(path, **changes):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


PLAIN = {
    "list": {"target_modules": BODY},
    "regex": {"target_modules": r".*\.(q_proj|v_proj|down_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True},
    "patterns": {
        "target_modules": BODY,
        "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.up_proj": 2},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 20, "down_proj": 1},
    },
    "layers": {"target_modules": BODY, "layers_to_transform": [1]},
    "layers with a pattern": {"target_modules": ["up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "exclude": {"target_modules": BODY, "exclude_modules": ["k_proj"]},
    "exclude by regex": {"target_modules": BODY, "exclude_modules": r".*\.0\..*"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "one module by its whole name": {"target_modules": ["model.layers.1.mlp.gate_proj"]},
}


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_modules_ranks_and_scales_are_those_of_peft_and_are_scored_like_its_merged_model(base, tmp_path, options):
    model = make(base, tmp_path / "adapter", **options)
    adapter = read_adapter(tmp_path / "adapter", stored_tensors(base))
    theirs = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {name: (one.rank, one.scale) for name, one in adapter.modules.items()} == pytest.approx(theirs)
    config = TeacherServerConfig(
        engine="transformers", model=str(base), adapters={"math": str(adapter.path)}, engine_args={"device": "cpu"}
    )

    async def score():
        engine = await create_engine(config)
        scores = [(await score_all(engine, [SequenceToScore(IDS)], adapter=name))[0] for name in ("math", "")]
        await engine.close()
        return scores

    got, of_base = asyncio.run(score())
    with torch.no_grad(), model.disable_adapter():
        base_logits_SV = model(torch.tensor(IDS[None].astype(np.int64))).logits[0].numpy()
    with torch.no_grad():
        logits_SV = model.merge_and_unload()(torch.tensor(IDS[None].astype(np.int64))).logits[0].numpy()
    rows = np.arange(len(IDS) - 1)
    expected = expected_logprobs(logits_SV, 1.0)[rows, IDS[1:]]
    np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)
    expected_of_base = expected_logprobs(base_logits_SV, 1.0)[rows, IDS[1:]]
    np.testing.assert_allclose(of_base.logprobs, expected_of_base, atol=1e-4)
    assert np.abs(expected - expected_of_base).max() > 0.01


REFUSED = {
    "dora": ({"use_dora": True}, r"lora_magnitude_vector, which is no low-rank matrix \(DoRA"),
    "lora_bias": ({"lora_bias": True}, r"lora_B\.bias, which is no low-rank matrix"),
    "head in a list": (
        {"target_modules": ["q_proj", "lm_head"]},
        r"changes lm_head \(.*\), which is not supported; merge it",
    ),
    "head by regex": ({"target_modules": r".*(q_proj|v_proj)|lm_head"}, "changes lm_head"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "changes embed_tokens"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "changes lm_head"),
    "a norm": ({"modules_to_save": ["input_layernorm"]}, r"holds .*input_layernorm.*no low-rank matrix"),
    "trainable tokens": ({"trainable_token_indices": [3, 4]}, "changes embed_tokens"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa', with which PEFT changes the base weights"),
    "layer replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication = .*not supported"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_an_engine_would_apply_otherwise_is_refused(base, tmp_path, options, message):
    make(base, tmp_path / "adapter", **options)
    with pytest.raises(ConfigError, match=message):
        read_adapter(tmp_path / "adapter", stored_tensors(base))


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    adapter = write_adapter(tmp_path / "math", base)
    for sizes, message in (
        ({"num_hidden_layers": 1}, r"adapts model\.layers\.1\..*, which the base model does not store"),
        ({"hidden_size": 96}, r"as a matrix of shape \[\d+, 64\], but the base model's has shape \[\d+, 96\]"),
    ):
        other = write_checkpoint(tmp_path / message[:9], **sizes)
        with pytest.raises(ConfigError, match=message):
            read_adapter(adapter, stored_tensors(other))
        shutil.rmtree(other)


def test_an_adapter_whose_two_files_disagree_is_refused(base, tmp_path):
    adapter = write_adapter(tmp_path / "math", base, rank=6)
    assert read_adapter(adapter).max_rank == 6
    for change, message in (
        ({"peft_type": "IA3"}, "has peft_type 'IA3', r 6 and lora_alpha 12, expected LORA"),
        ({"r": None}, "r None"),
        ({"lora_alpha": "12"}, "lora_alpha '12'"),
        ({"r": 8}, r"has rank 6, but adapter_config\.json gives it rank 8"),
        ({"rank_pattern": {"q_proj": 9}}, "q_proj has rank 6, but .* rank 9"),
        (
            {"target_modules": ["q_proj", "v_proj"]},
            r"matrices for .*k_proj, which adapter_config\.json does not target",
        ),
        ({"target_modules": "("}, "cannot be understood"),
    ):
        before = (adapter / "adapter_config.json").read_text()
        edit(adapter, **change)
        with pytest.raises(ConfigError, match=message):
            read_adapter(adapter)
        (adapter / "adapter_config.json").write_text(before)
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="has only lora_A of"):
        read_adapter(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ConfigError, match="half written or damaged"):
        read_adapter(adapter)


def test_a_pickled_adapter_is_not_read(base, tmp_path):
    adapter = write_adapter(tmp_path / "math", base)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors; save the adapter as safetensors"):
        read_adapter(adapter)


@pytest.mark.parametrize(
    "options",
    [*PLAIN.values(), {"target_modules": ["proj"]}, {"target_modules": ["0.self_attn.q_proj"]}],
)
def test_targets_are_those_of_peft(options):
    config = peft.LoraConfig(**{"target_modules": ["q_proj"], **options})
    names = [
        f"model.layers.{layer}.{kind}.{name}" for layer in (0, 1) for kind in ("self_attn", "mlp") for name in BODY
    ]
    if config.target_modules != "all-linear":  # PEFT resolves it before it asks
        asked = [bool(peft.tuners.tuners_utils.check_target_module_exists(config, name)) for name in names]
        assert [is_target(config.to_dict(), name) for name in names] == asked


@pytest.mark.parametrize(
    ("engine", "name", "message"),
    [
        (VllmHttpEngine, "list", ""),
        (VllmHttpEngine, "rslora", ""),
        (VllmHttpEngine, "patterns", "a vLLM server would apply .* PEFT with rank .*use the vllm or transformers"),
        (SglangHttpEngine, "list", ""),
        (SglangHttpEngine, "rslora", r"SGLang would apply .* with rank 4 and scale 1\.5, PEFT with rank 4 and scale 3"),
        (SglangHttpEngine, "patterns", "SGLang would apply"),
        (
            SglangHttpEngine,
            "regex",
            r"SGLang reads a list of names only: write \['down_proj', 'q_proj', ",
        ),
        (
            SglangHttpEngine,
            "layers with a pattern",
            "SGLang needs .* and gate_proj with up_proj",
        ),
    ],
)
def test_servers_get_only_what_they_apply_as_peft_does(base, tmp_path, engine, name, message):
    make(base, tmp_path / "adapter", **PLAIN[name])
    adapter = read_adapter(tmp_path / "adapter", stored_tensors(base))
    if not message:
        engine.check_adapter(adapter)
        return
    with pytest.raises(ConfigError, match=message):
        engine.check_adapter(adapter)


def test_sglang_is_not_given_a_directory_with_other_tensors_or_half_an_attention(base, tmp_path):
    make(base, tmp_path / "adapter", target_modules=["k_proj", "v_proj"])
    with pytest.raises(ConfigError, match=r"adapts k_proj, v_proj of model\.layers\.0\.self_attn; SGLang needs q_proj"):
        SglangHttpEngine.check_adapter(read_adapter(tmp_path / "adapter"))
    make(base, tmp_path / "other")
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "other" / "optimizer.safetensors")
    with pytest.raises(ConfigError, match=r"SGLang would also read .*optimizer\.safetensors"):
        SglangHttpEngine.check_adapter(read_adapter(tmp_path / "other"))


def test_adapters_are_tried_at_start_and_one_that_cannot_score_stops_it(caplog):
    class Broken(FakeEngine):
        def _score(self, sequence, top_k, temperature, adapter):
            if adapter == "math":
                raise AttributeError("enable_adapters")
            return super()._score(sequence, top_k, temperature, "")

    async def start(*names):
        config = TeacherServerConfig(engine="fake", model="x", adapters=dict.fromkeys(names, "x"))
        await try_adapters(await Broken.create(config))

    with pytest.raises(ConfigError, match=r"cannot score with adapter 'math' \(AttributeError: enable_adapters\)"):
        asyncio.run(start("code", "math"))
    asyncio.run(start("code"))
    assert "adapter 'code' changes no score of the probe" in caplog.text
