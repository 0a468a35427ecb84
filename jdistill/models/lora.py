"""LoRA: adapters of low rank that are trained while the weights stay as they are: y = x W + alpha / rank * (x A) B.

Reference: Hu et al. 2021, arXiv 2106.09685. The decoder computes both terms, in the rollout too: merged into bfloat16
weights, most of what a few steps have changed would be rounded away, and the sampler would not be the policy trained.

Dimension key: L layers, I inputs and O outputs of a matrix (all dims of a kind as one), r rank.
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

from jdistill.config import LoraSection
from jdistill.models import checkpoint
from jdistill.models.config import DecoderConfig, Lora
from jdistill.models.decoder import Decoder
from jdistill.models.layouts import LINEAR, Tensors, to_hf
from jdistill.models.params import LORA_SUFFIXES, NUM_IN


def lora_of(section: LoraSection | None) -> Lora | None:
    """The adapters of a configuration's model.lora."""
    return None if section is None else Lora(section.rank, section.alpha, section.targets)


def trained_kind(config: DecoderConfig) -> type[nnx.Param]:
    """Which parameters of a decoder are trained, as a filter: `nnx.split(decoder, trained_kind(config), ...)`.

    All of them, or the adapters where there are any.
    """
    return nnx.Param if config.lora is None else nnx.LoRAParam


def merge_lora(decoder: Decoder) -> Decoder:
    """The same model without adapters: they are added to the weights, which keep their dtype and sharding.

    What has no adapter is shared with the decoder given, not copied.
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
    """Writes the adapters alone, as PEFT saves them; whole or not at all.

    Args:
        decoder: with adapters; they may be sharded.
        path: a directory that does not exist yet (or is empty).
        tensors: of the family's params.py.
        base: the checkpoint that they stand on.

    Raises:
        ValueError: no adapters, or `path` is taken.
    """
    lora, path = decoder.config.lora, pathlib.Path(path)
    if lora is None:
        raise ValueError("this model has no adapters: it was trained without model.lora; save the whole of it")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty directory: remove it, or write somewhere else")
    layers = nnx.to_pure_dict(nnx.state(decoder, nnx.LoRAParam))["layers"]
    values: dict[str, np.ndarray] = {}
    modules = []
    for target in lora.targets:
        pattern, layout = tensors[f"layers.{target}"]
        module = pattern.removesuffix(".weight")
        modules.append(module.rpartition(".")[2])
        # The first factor has the matrix's inputs, the second its outputs: only the first may begin with heads.
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
            safetensors.numpy.save_file(values, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
            (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
