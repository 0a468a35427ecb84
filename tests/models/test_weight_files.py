"""Which files make a checkpoint, and whether its head is tied: as transformers decides, or refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from jdistill import models
from jdistill.checkpoint_files import check_checkpoint
from jdistill.config import TeacherServerConfig
from jdistill.fingerprint import model_fingerprint
from jdistill.sidecar.engines.options import model_info
from jdistill.sidecar.engines.own_loader import LOAD_FORMATS, check_model_args, check_own_loader
from jdistill.weight_files import stored_tensors

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS_BS = np.random.default_rng(0).integers(0, 101, (2, 20))


@pytest.fixture
def tiny(tmp_path, reference):
    make_reference, _ = reference
    make_reference(tmp_path / "tiny", "llama")
    return tmp_path / "tiny"


def shard(path, *, index=True, count=2):
    tensors = load_file(path / "model.safetensors")
    weight_map = {}
    for i in range(count):
        part, file = sorted(tensors)[i::count], f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors").unlink()
    if index:
        write_index(path, weight_map)


def write_index(path, weight_map):
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(path):
    return json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]


def write_other(file):
    """Writes a safetensors file with the names of a whole model and other values."""
    path = file.parent
    tensors = {name: value + 1 for tensors in map(load_file, files_of(path)) for name, value in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def files_of(path):
    return sorted(path.glob("model*.safetensors"))


def write_adapter_beside(path):
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))


def edit_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def whole(path):
    pass


def with_bin(path):
    torch.save({EMBED: torch.zeros(101, 48)}, path / "pytorch_model.bin")


def with_consolidated(path):
    save_file({"tok_embeddings.weight": np.zeros((3, 3), np.float32)}, path / "consolidated.safetensors")


def sharded_with_everything_beside(path):
    shard(path)
    with_bin(path)
    with_consolidated(path)
    write_other(path / "model-00003-of-00003.safetensors")  # of an older save, not in the index
    write_other(path / "adapter_model.safetensors")
    (path / "consolidated.safetensors.index.json").write_text("{}")
    (path / "pytorch_model.bin.index.json").write_text("{}")


def index_of_one_file(path):
    write_index(path, dict.fromkeys(load_file(path / "model.safetensors"), "model.safetensors"))


def index_with_a_wrong_shard(path):
    shard(path)
    write_index(path, read_index(path) | {EMBED: read_index(path)[HEAD]})


def index_without_a_tensor(path):
    shard(path)
    write_index(path, {name: file for name, file in read_index(path).items() if name != EMBED})


@pytest.mark.parametrize(
    "layout",
    [
        whole,
        with_bin,
        with_consolidated,
        shard,
        sharded_with_everything_beside,
        index_of_one_file,
        index_with_a_wrong_shard,
        index_without_a_tensor,
    ],
    ids=lambda layout: layout.__name__,
)
def test_the_files_read_are_those_that_transformers_reads(tiny, layout):
    layout(tiny)
    check_checkpoint(tiny)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    stored = stored_tensors(tiny)
    assert set(stored) == set(theirs)
    for name, tensor in stored.items():
        np.testing.assert_array_equal(load_file(tensor.file)[name], theirs[name].numpy(), err_msg=name)


def stray_single_beside_shards(path):
    shard(path)
    write_other(path / "model.safetensors")


def stray_single_beside_an_index_that_names_it_too(path):
    stray_single_beside_shards(path)
    write_index(path, read_index(path) | {"extra": "model.safetensors"})


def shards_of_an_older_save_beside_a_single_file(path):
    write_other(path / "model-00001-of-00001.safetensors")


def adapter_weights_beside_a_single_file(path):
    save_file({"base_model.model.x.lora_A.weight": np.zeros((1, 1), np.float32)}, path / "adapter_model.safetensors")


def tensor_in_two_shards(path):
    shard(path)
    first, second = (load_file(file) for file in files_of(path))
    save_file(
        second | {EMBED: first.get(EMBED, second.get(EMBED)), HEAD: first.get(HEAD, second.get(HEAD))},
        files_of(path)[1],
    )
    save_file(first | {EMBED: first.get(EMBED, second.get(EMBED))}, files_of(path)[0])


def shards_of_two_saves_without_index(path):
    tensors = load_file(path / "model.safetensors")
    shard(path, index=False)
    save_file(tensors, path / "model-00001-of-00001.safetensors")


def missing_shard_without_index(path):
    shard(path, index=False, count=3)
    files_of(path)[1].unlink()


def index_outside_the_directory(path):
    shard(path)
    write_index(path, dict.fromkeys(read_index(path), "../model.safetensors"))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (stray_single_beside_shards, r"two sets of weights: model\.safetensors, which transformers reads"),
        (stray_single_beside_an_index_that_names_it_too, "two sets of weights"),
        (
            shards_of_an_older_save_beside_a_single_file,
            r"transformers reads model\.safetensors alone, vLLM and SGLang all",
        ),
        (adapter_weights_beside_a_single_file, r"and adapter_model\.safetensors \(1 such files\) without an index"),
        (write_adapter_beside, r"adapter_config\.json beside a model: transformers adds that adapter"),
        (tensor_in_two_shards, r"is stored in model-00001-of-00002\.safetensors and in model-00002-of"),
        (shards_of_two_saves_without_index, r"not the shards of one model .*Copy the index"),
        (missing_shard_without_index, "it has 2 of 3 shards"),
        (index_outside_the_directory, "which is not a file of this directory"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_engines_would_read_differently_is_refused_by_loader_and_fingerprint(tiny, layout, message):
    layout(tiny)
    for read in (check_checkpoint, models.load, lambda path: model_fingerprint(path, "float32")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read(tiny)


def test_a_weights_file_named_in_the_configuration_has_to_be_the_one_that_all_engines_read(tiny):
    edit_config(tiny, transformers_weights="model.safetensors")
    check_checkpoint(tiny)
    edit_config(tiny, transformers_weights="other.safetensors")
    with pytest.raises(ValueError, match=r"transformers_weights = 'other\.safetensors', which only transformers reads"):
        check_checkpoint(tiny)


def test_an_adapters_directory_is_not_mistaken_for_a_model(tmp_path):
    write_adapter_beside(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds a LoRA adapter .* --adapter NAME=DIR"):
        check_checkpoint(tmp_path)


def test_mistrals_own_files_are_refused_where_the_engines_own_loader_would_read_them_too(tiny):
    with_consolidated(tiny)
    with pytest.raises(ValueError, match=r"vLLM would also read consolidated\.safetensors"):
        check_own_loader("vLLM", tiny)
    shard(tiny)
    check_own_loader("vLLM", tiny)
    for file in [*files_of(tiny), tiny / "model.safetensors.index.json"]:
        file.unlink()
    with pytest.raises(FileNotFoundError, match="Mistral's own format only"):
        check_checkpoint(tiny)


def test_engine_args_with_which_another_model_would_be_loaded_are_refused():
    for value in LOAD_FORMATS:
        check_model_args("vLLM", {"load_format": value})
    check_model_args("vLLM", {})
    for value in ("dummy", "mistral", "pt", "npcache"):
        with pytest.raises(ValueError, match=f"load_format = '{value}': vLLM would load other weights"):
            check_model_args("vLLM", {"load_format": value})
    for name, value in (("hf_overrides", {"rope_theta": 5e5}), ("json_model_override_args", '{"rope_theta": 5e5}')):
        with pytest.raises(ValueError, match=f"{name} = .* changes the model behind the fingerprint: write the fields"):
            check_model_args("vLLM", {name: value})
        check_model_args("vLLM", {name: type(value)()})


def test_online_quantization_is_part_of_the_fingerprint(tiny):
    configs = [TeacherServerConfig(engine="vllm", model=str(tiny), quantization=kind) for kind in (None, "fp8")]
    plain, quantized = (model_info(config).fingerprint for config in configs)
    assert plain == model_fingerprint(tiny, "float32") != quantized


# ---- the head ----


def our_logits(decoder):
    positions_BS = np.broadcast_to(np.arange(TOKENS_BS.shape[1]), TOKENS_BS.shape)
    return np.asarray(nnx.jit(lambda d: d.logits(d(TOKENS_BS, positions_BS)[0]))(decoder))


def write_heads(path, *, tied, embed, head):
    """Rewrites embeddings and head: "a" and "b" are two matrices, "" is a missing tensor; tied None: no such field."""
    tensors = load_file(path / "model.safetensors")
    rows = tensors[EMBED]
    values = {"a": rows, "b": np.ascontiguousarray(rows[::-1])}
    tensors = {name: value for name, value in tensors.items() if name not in (EMBED, HEAD)}
    tensors |= {name: values[value].copy() for name, value in ((EMBED, embed), (HEAD, head)) if value}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (path / "config.json").write_text(json.dumps(config if tied is None else config | {"tie_word_embeddings": tied}))


CASES = [
    (tied, embed, head)
    for tied in (True, False, None)
    for embed, head in (("a", "a"), ("a", "b"), ("a", ""), ("", "b"))
]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("tied", "embed", "head"), CASES)
def test_the_head_is_tied_exactly_where_transformers_ties_it(tmp_path, reference, family, tied, embed, head):
    make_reference, reference_logits = reference
    path = tmp_path / "tiny"
    make_reference(path, family)
    write_heads(path, tied=tied, embed=embed, head=head)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, attn_implementation="eager"
    )
    if loading["missing_keys"]:  # transformers goes on with random weights
        for read in (models.load, check_checkpoint)[: 2 if embed else 1]:
            with pytest.raises(ValueError, match=r"tensor .* is missing|has no lm_head\.weight"):
                read(path)
        return
    check_checkpoint(path)
    decoder = models.load(path)
    expected = reference_logits(model, TOKENS_BS)
    np.testing.assert_allclose(our_logits(decoder), expected, rtol=0, atol=2e-5)
    assert decoder.config == models.config_from_hf(path)
    models.save(decoder, tmp_path / "saved", source=path)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    np.testing.assert_array_equal(reference_logits(saved, TOKENS_BS), expected)
    check_own_loader("SGLang", tmp_path / "saved")
    ties = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and not (ties and embed):
        with pytest.raises(ValueError, match=r"SGLang (takes the embeddings as head|does not read)"):
            check_own_loader("SGLang", path)
    else:
        check_own_loader("SGLang", path)
    if embed:
        check_own_loader("vLLM", path, takes_stored_head=True)


def test_an_unused_copy_of_a_checkpoint_has_the_same_fingerprint(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "copy")
    sharded_with_everything_beside(tmp_path / "copy")
    assert model_fingerprint(tmp_path / "copy", "float32") == model_fingerprint(tiny, "float32")
