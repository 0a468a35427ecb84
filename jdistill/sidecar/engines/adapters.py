"""Reads a LoRA adapter in PEFT's format, and refuses what an engine would apply otherwise than PEFT.

An adapter is judged by its tensors: which modules have matrices, of what rank. adapter_config.json names the same
modules in many ways (a list, a regular expression, all-linear), so it is only checked against them. Without PEFT's
code: the environments of vLLM and SGLang do not have it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jdistill.config import ConfigError
from jdistill.fingerprint import adapter_fingerprint
from jdistill.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DTYPE_OF_SAFETENSORS,
    StoredTensor,
    read_header,
)
from jdistill.wire.types import ModelInfo

MERGE = "merge it into the checkpoint (PEFT: merge_and_unload, then save_pretrained)"
_MATRIX = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Names of input embeddings and output heads.
_VOCABULARY_MODULES = {"lm_head", "embed_tokens", "unembed_tokens", "wte", "embed_in", "embed_out"}
# Options that change the computation and add no tensor; neutral if empty.
_UNSUPPORTED_OPTIONS = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora", "arrow_config")
# Initialisations under which a saved adapter is a plain LoRA. PEFT changes the base weights when it loads the others.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One matrix of the base model with an adapter: y = W x + scale * B (A x)."""

    rank: int
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A checked adapter: its directory, options, and the modules that it adapts, by their names in the base model."""

    path: pathlib.Path
    options: Mapping[str, Any]
    modules: Mapping[str, AdaptedModule]

    @property
    def max_rank(self) -> int:
        """The largest rank, of a module or that the options name."""
        ranks = [module.rank for module in self.modules.values()]
        return max([self.options["r"], *(self.options.get("rank_pattern") or {}).values(), *ranks])


def read_adapter(path: str | pathlib.Path, base: Mapping[str, StoredTensor] | None = None) -> Adapter:
    """Reads an adapter's options and tensor names.

    Args:
        path: directory with adapter_config.json and adapter_model.safetensors.
        base: tensors of the base model, which the adapter has to fit; None: unknown.

    Raises:
        ConfigError: `path` is not a LoRA adapter, is damaged, does not fit, or does what no engine here supports.
    """
    path = pathlib.Path(path)
    options = _read_options(path)
    try:
        tensors = read_header(path / ADAPTER_WEIGHTS)
    except ValueError as e:
        raise ConfigError(f"adapters: {e}") from None
    sides: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        if changed := _VOCABULARY_MODULES & set(name.split(".")):
            raise ConfigError(f"adapters: {path} changes {min(changed)} ({name}), which is not supported; {MERGE}")
        if match := _MATRIX.fullmatch(name):
            sides.setdefault(match["module"], {})[match["side"]] = tensor
        else:
            raise ConfigError(
                f"adapters: {path} holds {name}, which is no low-rank matrix (DoRA, bias, modules_to_save or "
                f"target_parameters): that is not supported; {MERGE}"
            )
    if not sides:
        raise ConfigError(
            f"adapters: {path / ADAPTER_WEIGHTS} holds no lora_A and lora_B: is it another kind of adapter?"
        )
    try:
        modules = {name: _read_module(path, options, name, both, base) for name, both in sides.items()}
    except (re.error, TypeError, AttributeError) as e:
        raise ConfigError(f"adapters: {path / ADAPTER_CONFIG} cannot be understood ({type(e).__name__}: {e})") from None
    return Adapter(path, options, modules)


def _read_options(path: pathlib.Path) -> dict[str, Any]:
    file = path / ADAPTER_CONFIG
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"adapters: {path} is not a LoRA adapter ({type(e).__name__}: {e}); expected a directory that PEFT saved, "
            f"with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
        ) from None
    if not isinstance(options, dict):
        raise ConfigError(f"adapters: {file}: expected a JSON object, got {type(options).__name__}")
    kind, rank, alpha = options.get("peft_type"), options.get("r"), options.get("lora_alpha")
    if kind != "LORA" or type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise ConfigError(
            f"adapters: {file} has peft_type {kind!r}, r {rank!r} and lora_alpha {alpha!r}, expected LORA, a positive "
            "rank and a number"
        )
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise ConfigError(
            f"adapters: {path} has no {ADAPTER_WEIGHTS}; save the adapter as safetensors (a .bin file is a "
            "pickle, which can run code, and is not read)"
        )
    for name in _UNSUPPORTED_OPTIONS:
        if options.get(name):
            raise ConfigError(f"adapters: {file} has {name} = {options[name]!r}, which is not supported; {MERGE}")
    init = options.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise ConfigError(
            f"adapters: {file} has init_lora_weights = {init!r}, with which PEFT changes the base weights when it "
            "loads the adapter, and other engines do not; convert it to a plain LoRA (PEFT: save_pretrained with "
            f"path_initial_model_for_weight_conversion), or {MERGE}"
        )
    return options


def _read_module(
    path: pathlib.Path,
    options: Mapping[str, Any],
    name: str,
    both: Mapping[str, StoredTensor],
    base: Mapping[str, StoredTensor] | None,
) -> AdaptedModule:
    """Checks the two matrices of one module against each other, the options and the base model."""
    if set(both) != {"A", "B"}:
        raise ConfigError(f"adapters: {path} has only lora_{''.join(both)} of {name}: half written? Copy it again")
    shape_a, shape_b = both["A"].shape, both["B"].shape
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
        raise ConfigError(
            f"adapters: {path}: {name} has matrices of shapes {list(shape_a)} and {list(shape_b)}, expected [rank, "
            f"inputs] and [outputs, rank] (a convolution?): not supported; {MERGE}"
        )
    rank = _by_pattern(options.get("rank_pattern"), name, options["r"])
    alpha = _by_pattern(options.get("alpha_pattern"), name, options["lora_alpha"])
    if rank != shape_a[0]:
        raise ConfigError(
            f"adapters: {path}: {name} has rank {shape_a[0]}, but {ADAPTER_CONFIG} gives it rank {rank} (r, "
            "rank_pattern), so its scale is unknown: the two files belong to different adapters"
        )
    if not is_target(options, name):
        raise ConfigError(
            f"adapters: {path} holds matrices for {name}, which {ADAPTER_CONFIG} does not target (target_modules, "
            "exclude_modules, layers_to_transform): PEFT ignores them, other engines do not. Correct the file, or "
            "delete the matrices"
        )
    if base is not None:
        _check_fits(path, name, (shape_b[0], shape_a[1]), base, transposed=bool(options.get("fan_in_fan_out")))
    return AdaptedModule(rank, alpha / (math.sqrt(rank) if options.get("use_rslora") else rank))


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the end of a module's name, as PEFT does."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def is_target(options: Mapping[str, Any], name: str) -> bool:
    """Returns whether PEFT gives a module of the base model an adapter under these options."""

    def named(names: Any) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, name) is not None
        return any(name == one or name.endswith("." + one) for one in names)

    if options.get("exclude_modules") and named(options["exclude_modules"]):
        return False
    targets, layers = options.get("target_modules") or (), options.get("layers_to_transform")
    if targets == "all-linear":
        return True
    if isinstance(targets, str) or name in targets or layers is None or layers == []:
        return named(targets)
    patterns = options.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = next((m for p in patterns if (m := re.match(rf"(?:^|.*?\.){p}\.(?P<index>\d+)\.", name))), None)
    wanted = [layers] if isinstance(layers, int) else layers
    return named(targets) and found is not None and int(found["index"]) in wanted


def _check_fits(
    path: pathlib.Path, name: str, shape: tuple[int, int], base: Mapping[str, StoredTensor], *, transposed: bool
) -> None:
    # transformers gives some modules another prefix than the checkpoint does (multimodal models).
    tail = name[max(0, name.find("layers.")) :]
    found = [other for other in base if f".{other}".rpartition(".")[0].endswith("." + tail)]
    if not found:
        raise ConfigError(
            f"adapters: {path} adapts {name}, which the base model does not store: it belongs to another model, or its "
            f"training fused or renamed modules; {MERGE}"
        )
    shapes = [shape, shape[::-1]] if transposed else [shape]
    stored = base.get(name + ".weight", base[found[0]])
    # A quantized matrix has other names and shapes: qweight, weight_packed, ...
    if found[0].endswith(".weight") and stored.dtype in DTYPE_OF_SAFETENSORS and stored.shape not in shapes:
        raise ConfigError(
            f"adapters: {path} adapts {name} as a matrix of shape {list(shape)}, but the base model's has shape "
            f"{list(stored.shape)}: the adapter belongs to another model"
        )


def check_applied(
    adapter: Adapter, engine: str, rank_and_scale: Callable[[str], tuple[int, float]], *, remedy: str
) -> None:
    """Raises ConfigError unless an engine applies an adapter as PEFT does.

    Args:
        adapter: from `read_adapter`.
        engine: its name, for the message.
        rank_and_scale: what the engine takes for a module, by the module's name.
        remedy: another engine that can, for the message.
    """
    for name, module in adapter.modules.items():
        rank, scale = rank_and_scale(name)
        if rank != module.rank or not math.isclose(scale, module.scale, rel_tol=1e-6):
            raise ConfigError(
                f"adapters: {engine} would apply {adapter.path} to {name} with rank {rank} and scale {scale:.4g}, PEFT "
                f"with rank {module.rank} and scale {module.scale:.4g} (use_rslora, rank_pattern, alpha_pattern): "
                f"{remedy}, or {MERGE}"
            )


def write_zero_adapter(path: str | pathlib.Path, to: str | pathlib.Path) -> None:
    """Writes an adapter to `to` with the shapes of the one at `path` and all weights zero."""
    from safetensors.numpy import save_file

    path, to = pathlib.Path(path), pathlib.Path(to)
    (to / ADAPTER_CONFIG).write_bytes((path / ADAPTER_CONFIG).read_bytes())
    tensors = read_header(path / ADAPTER_WEIGHTS)
    zeros = {name: np.zeros(tensor.shape, np.float32) for name, tensor in tensors.items()}
    save_file(zeros, to / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def adapter_info(base: ModelInfo, name: str, path: str | pathlib.Path) -> ModelInfo:
    """Describes an adapter: the base model's limits, and a fingerprint over base and adapter files."""
    if (pathlib.Path(path) / ADAPTER_WEIGHTS).is_file():
        fingerprint = adapter_fingerprint(base.fingerprint, path)
    else:  # behind an HTTP engine the files may be only on the server: then only name and path identify the adapter
        fingerprint = hashlib.sha256(f"{base.fingerprint} {name} {path}".encode()).hexdigest()
    return dataclasses.replace(base, model=name, base_model=base.model, fingerprint=fingerprint)
