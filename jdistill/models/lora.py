"""LoRA: trains low-rank adapters A and B while the weights W stay fixed: y = x W + alpha / rank * (x A) B.

The decoder computes both terms, also in the rollout: in adapters merged into bfloat16 weights, rounding would remove
most of what a few steps have changed, and the sampler would not be the policy that is trained.

Dimension key: L layers, I inputs and O outputs of a matrix (flattened to one dim each), r rank.

Reference:
    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, 2021.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from jdistill import weight_files
from jdistill.config import LoraSection
from jdistill.models import checkpoint
from jdistill.models.config import DecoderConfig, Lora
from jdistill.models.decoder import Decoder
from jdistill.models.layouts import LINEAR, Tensors, to_hf
from jdistill.models.params import LORA_SUFFIXES, NUM_IN


def lora_of(section: LoraSection | None) -> Lora | None:
    """Returns the adapters that the configuration's model.lora describes."""
    return None if section is None else Lora(section.rank, section.alpha, section.targets)


def trained_kind(config: DecoderConfig) -> type[nnx.Param]:
    """Returns the filter for the trained parameters: `nnx.split(decoder, trained_kind(config), ...)`.

    The adapters if the decoder has any, else all parameters.
    """
    return nnx.Param if config.lora is None else nnx.LoRAParam


def merge_lora(decoder: Decoder) -> Decoder:
    """Returns the model with its adapters added to the weights, which keep their dtype and sharding.

    Parameters without an adapter are shared with `decoder`, not copied.
    """
    lora = decoder.config.lora
    if lora is None:
        return decoder
    config = dataclasses.replace(decoder.config, lora=None)
    plain = nnx.eval_shape(
        lambda: Decoder(config, rngs=nnx.Rngs(0), compute_dtype=decoder.compute_dtype, remat=decoder.remat)
    )
    weights = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
    for target in lora.targets:
        a, b = (weights["layers"].pop(target + suffix) for suffix in LORA_SUFFIXES)
        weights["layers"][target] = _merged(weights["layers"][target], a, b, lora.scale)
    state = nnx.state(plain, nnx.Param)
    nnx.replace_by_pure_dict(state, weights)
    nnx.update(plain, state)
    return plain


@jax.jit
def _merged(w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    num_layers, rank = a.shape[0], a.shape[-1]
    a_LIr, b_LrO = a.reshape(num_layers, -1, rank), b.reshape(num_layers, rank, -1)
    delta_LIO = jnp.einsum("lir,lro->lio", a_LIr, b_LrO, precision=jax.lax.Precision.HIGHEST)
    return (w.astype(jnp.float32) + scale * delta_LIO.reshape(w.shape)).astype(w.dtype)


def write_adapter(decoder: Decoder, path: str | pathlib.Path, tensors: Tensors, *, base: str | pathlib.Path) -> None:
    """Writes the adapters atomically, without the base weights, in PEFT's format.

    On several hosts every process calls this, and the first one writes.

    Args:
        decoder: has adapters, which may be sharded.
        path: directory to write; must not exist, or be empty.
        tensors: the family's TENSORS.
        base: checkpoint of the base model.

    Raises:
        ValueError: the decoder has no adapters, or `path` exists and is not an empty directory.
    """
    lora, path = decoder.config.lora, pathlib.Path(path)
    if lora is None:
        raise ValueError("this model has no adapters: it was trained without model.lora; save the whole model")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty directory: remove it, or write somewhere else")
    layers = nnx.to_pure_dict(nnx.state(decoder, nnx.LoRAParam))["layers"]
    values: dict[str, np.ndarray] = {}
    modules = []
    for target in lora.targets:
        pattern, layout = tensors[f"layers.{target}"]
        module = pattern.removesuffix(".weight")
        modules.append(module.rpartition(".")[2])
        # A has the matrix's input dims, B its output dims, so only A may begin with heads.
        layouts = (layout if NUM_IN.get(target, 1) == 2 else LINEAR, LINEAR)
        for suffix, peft_name, one in zip(LORA_SUFFIXES, ("lora_A", "lora_B"), layouts, strict=True):
            for layer, value in enumerate(checkpoint.on_host(layers[target + suffix])):
                name = f"base_model.model.{module.format(layer=layer)}.{peft_name}.weight"
                values[name] = to_hf(value, one)
    config: Mapping[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "inference_mode": True,
    }
    temporary = path.parent / f".{path.name}.{os.getpid()}.partial"
    if jax.process_index() == 0:
        temporary.mkdir(parents=True)
        try:
            safetensors.numpy.save_file(values, temporary / weight_files.ADAPTER_WEIGHTS, metadata={"format": "pt"})
            (temporary / weight_files.ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
