"""Checkpoint files and fingerprints."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdistill import fingerprint
from jdistill.checkpoint_files import (
    check_checkpoint,
    checkpoint_dtype,
    context_length,
    read_config,
    tokenizer_fingerprint,
    vocab_size,
)
from jdistill.fingerprint import adapter_fingerprint, model_fingerprint
from tests.sidecar.checkpoints import write_adapter, write_checkpoint, write_tokenizer


@pytest.fixture
def tiny(tmp_path):
    return write_checkpoint(tmp_path / "tiny")


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def shard(path):
    """Rewrites model.safetensors as two shards with an index."""
    tensors = load_file(path / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "model.safetensors").unlink()


def test_a_whole_checkpoint_passes_sharded_or_not(tiny):
    check_checkpoint(tiny)
    shard(tiny)
    check_checkpoint(tiny)


def test_each_way_of_being_incomplete_is_an_error_with_its_remedy(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint directory .* has to be downloaded first"):
        check_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="it is a file"):
        check_checkpoint(tiny / "config.json")
    data = (tiny / "model.safetensors").read_bytes()
    for size in (0, 5, 8, 100, len(data) // 2, len(data) - 1):
        (tiny / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(ValueError, match="half written or damaged: copy or export the checkpoint again"):
            check_checkpoint(tiny)
    (tiny / "model.safetensors").write_bytes(data)
    check_checkpoint(tiny)
    shard(tiny)
    (tiny / "model-00002-of-00002.safetensors").rename(tiny / "elsewhere")
    with pytest.raises(FileNotFoundError, match="names 2 shards, 1 are missing"):
        check_checkpoint(tiny)
    shutil.copy(tiny / "model-00001-of-00002.safetensors", tiny / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="that no shard holds"):
        check_checkpoint(tiny)
    for file in tiny.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors files"):
        check_checkpoint(tiny)
    (tiny / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="is not JSON"):
        check_checkpoint(tiny)
    (tiny / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        check_checkpoint(tiny)


def test_limits_come_from_the_configuration_nested_or_not(tiny):
    config = read_config(tiny)
    assert (context_length(config), vocab_size(config)) == (128, 512)
    nested = {"text_config": {"max_position_embeddings": 77, "vocab_size": 9}}
    assert (context_length(nested), vocab_size(nested)) == (77, 9)
    with pytest.raises(ValueError, match="the longest sequence is unknown: set max_sequence_length"):
        context_length({})


def test_the_dtype_is_the_named_one_else_the_stored_one(tiny):
    edit_config(tiny, dtype="bfloat16")
    assert checkpoint_dtype(tiny) == "bfloat16"
    edit_config(tiny, dtype=None, torch_dtype="float16")
    assert checkpoint_dtype(tiny) == "float16"
    edit_config(tiny, dtype=None, torch_dtype=None)
    assert checkpoint_dtype(tiny) == "float32"


def test_the_fingerprint_ignores_who_wrote_it_and_how_it_is_sharded(tiny):
    before = model_fingerprint(tiny, "float32")
    edit_config(tiny, transformers_version="99.0", dtype="bfloat16", torch_dtype="bfloat16", use_cache=False)
    assert model_fingerprint(tiny, "float32") == before
    shard(tiny)
    assert model_fingerprint(tiny, "float32") == before


def drop_index(path):
    """Leaves two shards without an index."""
    shard(path)
    (path / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    ("layout", "stray", "expected"),
    [
        (lambda path: None, True, ["model.safetensors"]),
        (shard, True, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        (drop_index, False, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
    ],
    ids=["single file", "shards and index", "shards without index"],
)
def test_fingerprint_and_loader_read_the_same_files(tiny, monkeypatch, layout, stray, expected):
    models = pytest.importorskip("jdistill.models")
    from jdistill.models import checkpoint

    layout(tiny)
    if stray:  # beside the weights, and part of them for neither: it is no safetensors file
        (tiny / "consolidated.safetensors").write_bytes(b"stray")
    hashed, loaded = set(), set()
    open_descriptor, safe_open = fingerprint.os.open, checkpoint.safetensors.safe_open

    def recorded_open(file, flags):
        hashed.add(file)
        return open_descriptor(file, flags)

    def recorded_safe_open(file, framework):
        loaded.add(file)
        return safe_open(file, framework=framework)

    with monkeypatch.context() as patch:
        patch.setattr(fingerprint.os, "open", recorded_open)
        model_fingerprint(tiny, "float32")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.safetensors, "safe_open", recorded_safe_open)
        models.load(tiny)
    assert sorted(file.name for file in hashed) == sorted(file.name for file in loaded) == expected


def test_the_fingerprint_sees_dtype_configuration_names_and_any_weight(tiny):
    seen = {model_fingerprint(tiny, "float32"), model_fingerprint(tiny, "bfloat16")}
    edit_config(tiny, rope_theta=20000.0)
    seen.add(model_fingerprint(tiny, "float32"))
    tensors = load_file(tiny / "model.safetensors")
    changed = tensors["model.layers.1.mlp.up_proj.weight"]
    changed[17, 3] = np.nextafter(changed[17, 3], np.float32(np.inf))
    save_file(tensors, tiny / "model.safetensors")
    seen.add(model_fingerprint(tiny, "float32"))
    first, second = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, tiny / "model.safetensors")
    seen.add(model_fingerprint(tiny, "float32"))
    assert len(seen) == 5


def test_a_sampled_fingerprint_sees_a_training_step_and_any_sharding(tiny, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "STRIDE_BYTES", 4096)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 64)
    before = model_fingerprint(tiny, "float32")
    tensors = load_file(tiny / "model.safetensors")
    shard(tiny)
    assert model_fingerprint(tiny, "float32") == before
    rng = np.random.default_rng(0)
    stepped = {
        name: tensor + 1e-4 * np.sign(rng.standard_normal(tensor.shape)).astype(np.float32)
        for name, tensor in tensors.items()
    }
    for file in tiny.glob("*.safetensors*"):
        file.unlink()
    save_file(stepped, tiny / "model.safetensors")
    assert model_fingerprint(tiny, "float32") != before
    # The last bytes of a large tensor are always among the samples.
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, tiny / "model.safetensors")
    assert model_fingerprint(tiny, "float32") != before


def test_the_tokenizer_fingerprint_is_of_the_table_and_not_of_the_files(tiny, tmp_path):
    before = tokenizer_fingerprint(tiny)
    assert len(before) == 64
    file = tiny / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": None}, indent=7))
    assert tokenizer_fingerprint(tiny) == before
    seen = {before}
    for changes in ({"vocab_size": 511}, {"vocab_size": 512, "prefix": "v"}):
        write_tokenizer(tiny, **changes)
        seen.add(tokenizer_fingerprint(tiny))
    write_tokenizer(tiny, vocab_size=512)
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"512": {"content": "<tool>", "special": True}}
    (tiny / "tokenizer_config.json").write_text(json.dumps(config))
    seen.add(tokenizer_fingerprint(tiny))
    assert len(seen) == 4
    assert tokenizer_fingerprint(write_checkpoint(tmp_path / "bare", tokenizer=False)) == ""
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        tokenizer_fingerprint(tiny)


def test_the_tokenizer_table_is_the_one_of_transformers(tiny, monkeypatch):
    from transformers import AutoTokenizer

    import jdistill.checkpoint_files as checkpoint_files

    vocab = AutoTokenizer.from_pretrained(str(tiny)).get_vocab()
    assert checkpoint_files._token_table(tiny) == {token_id: token for token, token_id in vocab.items()}


def test_an_adapter_is_known_by_its_base_its_weights_and_its_scale_and_not_by_where_it_lies(tiny, tmp_path):
    adapter = write_adapter(tmp_path / "math", tiny)
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    known = adapter_fingerprint("base", adapter)
    assert adapter_fingerprint("base", moved) == known
    others = {adapter_fingerprint("another base", adapter)}
    (moved / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + 1}))
    others.add(adapter_fingerprint("base", moved))
    others.add(adapter_fingerprint("base", write_adapter(tmp_path / "code", tiny, seed=2)))
    assert len(others | {known}) == 4
