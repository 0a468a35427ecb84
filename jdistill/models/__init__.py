"""Flax decoders of the Hugging Face families; safetensors in and out.

A family is a folder: `config.py` (config.json -> DecoderConfig and back) and `params.py` (names of its tensors). The
decoder itself is shared, since the families differ by flags.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jdistill import checkpoint_files
from jdistill.models import checkpoint
from jdistill.models.config import DecoderConfig, HFFields, Lora, Rope
from jdistill.models.decoder import Decoder, KVCache, Remat, init_cache, param_specs, resize_cache
from jdistill.models.lora import lora_of, merge_lora, trained_kind, write_adapter
from jdistill.models.partitioning import param_shardings

__all__ = [
    "FAMILIES",
    "Decoder",
    "DecoderConfig",
    "KVCache",
    "Lora",
    "Rope",
    "config_from_hf",
    "init_cache",
    "load",
    "lora_of",
    "merge_lora",
    "param_shardings",
    "param_specs",
    "random_init",
    "resize_cache",
    "save",
    "save_adapter",
    "trained_kind",
]

# Hugging Face's model_type -> the family's package.
FAMILIES = {
    "gemma2": "jdistill.models.gemma2",
    "gemma3_text": "jdistill.models.gemma3",
    "llama": "jdistill.models.llama",
    "mistral": "jdistill.models.mistral",
    "qwen2": "jdistill.models.qwen2",
    "qwen3": "jdistill.models.qwen3",
    "qwen3_moe": "jdistill.models.qwen3_moe",
}


def _family(name: str, part: Literal["config", "params"]) -> ModuleType:
    return importlib.import_module(f"{FAMILIES[name]}.{part}")


def config_from_hf(path: str | pathlib.Path) -> DecoderConfig:
    """Reads a checkpoint directory's config.json.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: an unknown architecture, or a field that is missing, unknown or asks for what is not implemented.
    """
    raw = checkpoint_files.read_config(path)
    source = str(pathlib.Path(path) / "config.json")
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"{source}: model_type = {model_type!r} is not supported (only {', '.join(FAMILIES)}): "
            "use another checkpoint, or, for a teacher, the vllm or transformers engine"
        )
    family = _family(model_type, "config")
    architectures = raw.get("architectures") or [family.ARCHITECTURE]
    if architectures != [family.ARCHITECTURE]:
        raise ValueError(
            f"{source}: architectures = {architectures!r}, expected [{family.ARCHITECTURE!r}]: "
            "only causal language models can be trained or score tokens"
        )
    fields = HFFields(raw, source)
    fields.refuse_unless("hidden_act", family.HIDDEN_ACT)
    fields.refuse_unless("attention_dropout", 0)
    try:
        config = family.from_hf(fields)
    except ValueError as e:
        raise e if source in str(e) else ValueError(f"{source}: {e}") from None
    fields.finish()
    return config


def random_init(
    path_or_config: str | pathlib.Path | DecoderConfig,
    seed: int,
    *,
    compute_dtype: jnp.dtype | str = "float32",
    remat: Remat = "none",
    mesh: Mesh | None = None,
) -> Decoder:
    """A decoder with random float32 weights; only config.json is read. The mesh does not change the numbers."""
    is_config = isinstance(path_or_config, DecoderConfig)
    config = path_or_config if is_config else config_from_hf(path_or_config)

    def init() -> nnx.State:
        return nnx.state(_create(config, seed, compute_dtype, remat), nnx.Param)

    abstract = nnx.eval_shape(lambda: _create(config, seed, compute_dtype, remat))
    out_shardings = None if mesh is None else param_shardings(abstract, mesh)
    # jit with out_shardings: each device makes its own part only.
    nnx.update(abstract, jax.jit(init, out_shardings=out_shardings)())
    return abstract


def load(
    path: str | pathlib.Path,
    *,
    compute_dtype: jnp.dtype | str = "float32",
    remat: Remat = "none",
    mesh: Mesh | None = None,
    param_dtype: str = "float32",
    lora: Lora | None = None,
    seed: int = 0,
) -> Decoder:
    """Loads a Hugging Face checkpoint directory.

    Args:
        path: directory with config.json and *.safetensors.
        compute_dtype: of activations, and of parameters at use.
        remat: see Decoder.
        mesh: shards parameters by partitioning.MESH_AXES; each device's part alone is read. None: one device.
        param_dtype: what the parameters are kept in; float32 to train, the compute dtype only to score.
        lora: adapters to be put beside the weights, float32, which begin as nothing. None: none.
        seed: of the adapters' random half.

    Raises:
        FileNotFoundError, ValueError: see config_from_hf; or missing, unexpected or damaged weights.
    """
    config = config_from_hf(path)
    decoder = nnx.eval_shape(lambda: _create(config, 0, compute_dtype, remat))
    tensors = _family(config.family, "params").TENSORS
    params = checkpoint.read(path, decoder, tensors, mesh=mesh, param_dtype=param_dtype)
    if lora is None:
        nnx.update(decoder, params)
        return decoder
    config = dataclasses.replace(config, lora=lora)

    def adapters() -> nnx.State:
        return nnx.state(_create(config, seed, compute_dtype, remat), nnx.LoRAParam)

    decoder = nnx.eval_shape(lambda: _create(config, seed, compute_dtype, remat))
    out_shardings = None if mesh is None else nnx.filter_state(param_shardings(decoder, mesh), nnx.LoRAParam)
    nnx.update(decoder, params, jax.jit(adapters, out_shardings=out_shardings)())
    return decoder


def save(
    decoder: Decoder,
    path: str | pathlib.Path,
    *,
    source: str | pathlib.Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Writes a Hugging Face checkpoint that transformers and vLLM load; whole or not at all.

    Args:
        decoder: its parameters may be sharded.
        path: a directory that does not exist yet (or is empty).
        source: the checkpoint that the model came from: its config.json, tokenizer and generation_config.json are kept.
        dtype: of the weights.

    Raises:
        ValueError: `path` is taken, or `source` is another model's.
    """
    config_json: dict[str, Any]
    if decoder.config.lora is not None:
        raise ValueError("a decoder with adapters is no Hugging Face checkpoint: merge_lora(decoder), or save_adapter")
    if source is None:
        config_json = _family(decoder.config.family, "config").to_hf(decoder.config)
    else:
        if config_from_hf(source) != decoder.config:
            raise ValueError(f"{source} describes another model than the one to be saved: give the one it came from")
        config_json = checkpoint_files.read_config(source)
    # transformers 5 writes `dtype`, versions before 4.56 know only `torch_dtype`, and all newer ones read both.
    for key in [key for key in ("dtype", "torch_dtype") if key in config_json] or ["torch_dtype"]:
        config_json[key] = dtype
    tensors = _family(decoder.config.family, "params").TENSORS
    checkpoint.write(decoder, path, tensors, config_json, source=source, dtype=dtype)


def save_adapter(decoder: Decoder, path: str | pathlib.Path, *, base: str | pathlib.Path) -> None:
    """Writes a decoder's adapters alone in PEFT's format, which vLLM, SGLang and a teacher's `adapters` load.

    Args:
        decoder: with adapters.
        path: a directory that does not exist yet (or is empty).
        base: the checkpoint that the adapters stand on.

    Raises:
        ValueError: there are no adapters, or `path` is taken.
    """
    write_adapter(decoder, path, _family(decoder.config.family, "params").TENSORS, base=base)


def _create(config: DecoderConfig, seed: int, compute_dtype: jnp.dtype | str, remat: Remat) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(seed), compute_dtype=compute_dtype, remat=remat)
