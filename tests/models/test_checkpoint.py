"""Hugging Face checkpoints are read and written: transformers loads ours bit for bit."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx

from jdistill import checkpoint_files, models, weight_files
from jdistill.models import checkpoint, hf_config
from jdistill.models.families import llama
from tests.devices import run_on_devices
from tests.models.factories import CONFIGS, LLAMA, random_decoder


@nnx.jit
def jitted(decoder, tokens_BS, positions_BS):
    return decoder.logits(decoder(tokens_BS, positions_BS)[0])


def our_logits(decoder, tokens_BS):
    return np.asarray(jitted(decoder, tokens_BS, np.broadcast_to(np.arange(tokens_BS.shape[1]), tokens_BS.shape)))


def assert_equal_params(a, b):
    for (path, x), (other, y) in zip(*(nnx.to_flat_state(nnx.state(d, nnx.Param)) for d in (a, b)), strict=True):
        assert path == other
        np.testing.assert_array_equal(x[...], y[...], err_msg=str(path))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.family}-{c.rope.kind}")
def test_transformers_gives_the_same_logits_for_a_checkpoint_saved_without_a_source(tmp_path, config):
    decoder = random_decoder(config)
    models.save(decoder, tmp_path / "out")
    assert models.config_from_hf(tmp_path / "out") == config
    transformers.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.dtype == torch.float32
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens_BS = np.random.default_rng(0).integers(0, 40, (2, 50))
    with torch.no_grad():
        expected = model(torch.tensor(tokens_BS)).logits.numpy()
    np.testing.assert_allclose(our_logits(decoder, tokens_BS), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 9000])
def test_saved_and_loaded_float32_is_bit_equal_in_one_file_and_in_shards(tmp_path, max_shard_bytes):
    decoder = random_decoder(LLAMA)
    config_json = {"architectures": ["LlamaForCausalLM"], **hf_config.hf_fields(LLAMA)}
    config_json |= {"attention_bias": True, "mlp_bias": True}
    out = tmp_path / "out"
    checkpoint.write(
        decoder, out, llama.TENSORS, config_json, source=None, dtype="float32", max_shard_bytes=max_shard_bytes
    )
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    if max_shard_bytes == 9000:
        assert len(shards) > 3
        assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        index = json.loads((out / "model.safetensors.index.json").read_text())
        stored = weight_files.stored_tensors(out)
        assert set(index["weight_map"]) == set(stored)
        assert index["metadata"]["total_size"] == sum(tensor.size_bytes for tensor in stored.values())
    else:
        assert shards == ["model.safetensors"]
    assert_equal_params(models.load(out), decoder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    query = reference["model.layers.1.self_attn.q_proj.weight"].numpy()
    np.testing.assert_array_equal(query, np.asarray(decoder.layers.query[...][1]).reshape(24, 40).T)


def test_a_bfloat16_checkpoint_is_rounded_once_and_recognised(tmp_path):
    decoder = random_decoder(LLAMA)
    models.save(decoder, tmp_path / "out", dtype="bfloat16")
    assert checkpoint_files.checkpoint_dtype(tmp_path / "out") == "bfloat16"
    loaded = models.load(tmp_path / "out")
    expected = np.asarray(decoder.layers.gate[...]).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert loaded.layers.gate[...].dtype == np.float32
    np.testing.assert_array_equal(loaded.layers.gate[...], expected)
    half = models.load(tmp_path / "out", param_dtype="bfloat16")
    np.testing.assert_array_equal(np.asarray(half.layers.gate[...]).astype(np.float32), expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16


def test_the_sources_config_tokenizer_and_generation_config_are_kept(tmp_path, reference):
    make, _ = reference
    model = make(tmp_path / "source", "qwen3", rope_parameters={"rope_type": "default", "rope_theta": 2e5})
    source = tmp_path / "source"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text(f'{{"name": "{name}"}}')
    (source / "notes.txt").write_text("not part of a checkpoint")
    decoder = models.load(source)
    models.save(decoder, tmp_path / "out", source=source, dtype="bfloat16")
    kept = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept == {**json.loads((source / "config.json").read_text()), "dtype": "bfloat16"}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "notes.txt").exists()
    models.save(decoder, tmp_path / "exact", source=source)
    (tmp_path / "exact" / "generation_config.json").unlink()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exact").state_dict()
    assert set(again) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor), name


def test_a_failed_save_leaves_no_files_and_an_existing_directory_is_refused(tmp_path, monkeypatch):
    decoder = random_decoder(LLAMA)

    def disk_full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", disk_full)
    with pytest.raises(OSError, match="no space left"):
        models.save(decoder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    models.save(decoder, tmp_path / "out")
    with pytest.raises(ValueError, match="is not an empty directory"):
        models.save(decoder, tmp_path / "out")
    with pytest.raises(ValueError, match="describes another model"):
        models.save(random_decoder(CONFIGS[1]), tmp_path / "other", source=tmp_path / "out")
    with pytest.raises(ValueError, match="dtype = 'int8'"):
        models.save(decoder, tmp_path / "int8", dtype="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def rewrite(path, change):
    file = path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.2.mlp.up_proj.weight"),
            r"tensor model\.layers\.2\.mlp\.up_proj\.weight is missing",
        ),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight is missing \(1 of"),
        (lambda t: t.update(extra=np.zeros(3, np.float32)), r"unexpected tensor extra \(1 of them\)"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(23, np.float32)}),
            r"model\.norm\.weight has shape \[23\].*\[24\]",
        ),
        (lambda t: t.update({"model.norm.weight": np.zeros(24, np.int8)}), "stored as I8.*quantized"),
    ],
)
def test_tensors_that_do_not_match_the_config_are_named(tmp_path, change, message):
    models.save(random_decoder(LLAMA), tmp_path / "out")
    rewrite(tmp_path / "out", change)
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path / "out")


def test_a_truncated_file_is_refused(tmp_path):
    models.save(random_decoder(LLAMA), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="half written or damaged"):
        models.load(tmp_path / "out")


EIGHT_DEVICES = """
import sys
import jax, numpy as np
from flax import nnx
from jdistill import models
from jdistill.config import MeshSection
from jdistill.models.mesh import batch_sharding
from jdistill.student import sharding

source, out = sys.argv[1:]
assert len(jax.devices()) == 8
mesh = sharding.make_mesh(MeshSection(data=2, fsdp=2, tensor=2))
decoder = models.load(source, mesh=mesh)
query = decoder.layers.query[...]
assert query.sharding.shard_shape(query.shape) == (3, 12, 2, 10), query.sharding
assert decoder.layers.down[...].sharding.shard_shape((3, 36, 24)) == (3, 18, 12)
one = models.load(source)
for a, b in zip(*(jax.tree.leaves(nnx.state(d, nnx.Param)) for d in (decoder, one)), strict=True):
    np.testing.assert_array_equal(a, b)
tokens_BS = np.random.default_rng(0).integers(0, 40, (8, 20)).astype(np.int32)
positions_BS = np.broadcast_to(np.arange(20, dtype=np.int32), (8, 20))

@nnx.jit
def loss_and_gradient(decoder, tokens_BS, positions_BS):
    def loss(decoder):
        logits_BSV = decoder.logits(decoder(tokens_BS, positions_BS)[0])
        return -jax.numpy.take_along_axis(jax.nn.log_softmax(logits_BSV), tokens_BS[..., None], -1).mean()
    return nnx.value_and_grad(loss)(decoder)

sharded = jax.device_put((tokens_BS, positions_BS), batch_sharding(mesh))
assert len(sharded[0].sharding.device_set) == 8
with jax.set_mesh(mesh):
    ours = loss_and_gradient(decoder, *sharded)
expected = loss_and_gradient(one, tokens_BS, positions_BS)
for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
cache = models.init_cache(decoder.config, 8, 20, "float32")
hidden, cache = nnx.jit(lambda d, t, p, c: d(t, p, cache=c))(decoder, *sharded, cache)
np.testing.assert_allclose(hidden, one(tokens_BS, positions_BS)[0], rtol=0, atol=2e-5)
models.save(decoder, out)
"""


def test_eight_devices_equal_one(tmp_path):
    models.save(random_decoder(LLAMA), tmp_path / "source")
    run_on_devices(8, EIGHT_DEVICES, tmp_path / "source", tmp_path / "out")
    source, out = (pathlib.Path(tmp_path / name / "model.safetensors").read_bytes() for name in ("source", "out"))
    assert source == out, "saved from eight devices, the file is the same"
