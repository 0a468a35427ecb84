"""Loads, saves and initialises decoders: a Hugging Face checkpoint directory on one side, a Decoder on the other."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jdistill import checkpoint_files
from jdistill.models import checkpoint
from jdistill.models.config import DecoderConfig, Lora
from jdistill.models.decoder import Decoder, Remat
from jdistill.models.families import config_from_hf, family
from jdistill.models.lora import write_adapter
from jdistill.models.partitioning import param_shardings


def random_init(
    path_or_config: str | pathlib.Path | DecoderConfig,
    seed: int,
    *,
    compute_dtype: jnp.dtype | str = "float32",
    remat: Remat = "none",
    mesh: Mesh | None = None,
) -> Decoder:
    """Makes a decoder with random float32 weights; reads config.json only. The mesh does not change the numbers."""
    is_config = isinstance(path_or_config, DecoderConfig)
    config = path_or_config if is_config else config_from_hf(path_or_config)

    def init() -> nnx.State:
        return nnx.state(_create(config, seed, compute_dtype, remat), nnx.Param)

    abstract = nnx.eval_shape(lambda: _create(config, seed, compute_dtype, remat))
    out_shardings = None if mesh is None else param_shardings(abstract, mesh)
    # jit with out_shardings: each device initialises only its own shard.
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
        compute_dtype: dtype of activations, and of parameters at use.
        remat: see Decoder.
        mesh: shards parameters by partitioning.MESH_AXES; each device reads only its shard. None: one device.
        param_dtype: dtype in which the parameters are stored: float32 for training, the compute dtype for scoring only.
        lora: adapters to add to the weights, in float32; they start as a no-op. None: no adapters.
        seed: initialises the random factor of each adapter.

    Raises:
        FileNotFoundError, ValueError: as config_from_hf; or weights are missing, unexpected or damaged.
    """
    config = config_from_hf(path)
    decoder = nnx.eval_shape(lambda: _create(config, 0, compute_dtype, remat))
    tensors = family(config.family).TENSORS
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
    """Writes a Hugging Face checkpoint for transformers and vLLM, atomically.

    Args:
        decoder: model to save; its parameters may be sharded.
        path: a directory that does not exist yet (or is empty).
        source: checkpoint from which the model was loaded; its config.json, tokenizer and generation_config.json are
            copied.
        dtype: dtype of the weights.

    Raises:
        ValueError: `path` is taken, `source` holds another model, or the decoder has adapters.
    """
    config_json: dict[str, Any]
    if decoder.config.lora is not None:
        raise ValueError("a decoder with adapters is no Hugging Face checkpoint: merge_lora(decoder), or save_adapter")
    if source is None:
        config_json = family(decoder.config.family).to_hf(decoder.config)
    else:
        if config_from_hf(source) != decoder.config:
            raise ValueError(f"{source} describes another model than the one to be saved: give the one it came from")
        config_json = checkpoint_files.read_config(source)
        if not decoder.config.tie_word_embeddings:
            config_json["tie_word_embeddings"] = False  # the source may say true beside a separate head
    # transformers 5 writes `dtype`, versions before 4.56 know only `torch_dtype`, and all newer ones read both.
    for key in [key for key in ("dtype", "torch_dtype") if key in config_json] or ["torch_dtype"]:
        config_json[key] = dtype
    tensors = family(decoder.config.family).TENSORS
    checkpoint.write(decoder, path, tensors, config_json, source=source, dtype=dtype)


def save_adapter(decoder: Decoder, path: str | pathlib.Path, *, base: str | pathlib.Path) -> None:
    """Writes only the adapters of a decoder, in PEFT's format, which vLLM, SGLang and a teacher's `adapters` load.

    Args:
        decoder: model with adapters.
        path: a directory that does not exist yet (or is empty).
        base: checkpoint that the adapters were trained on.

    Raises:
        ValueError: the decoder has no adapters, or `path` is taken.
    """
    write_adapter(decoder, path, family(decoder.config.family).TENSORS, base=base)


def _create(config: DecoderConfig, seed: int, compute_dtype: jnp.dtype | str, remat: Remat) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(seed), compute_dtype=compute_dtype, remat=remat)
