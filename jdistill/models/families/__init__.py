"""One file per family: reads and writes its config.json, and names its tensors."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from types import ModuleType
from typing import Any

from jdistill import checkpoint_files, weight_files
from jdistill.models.config import DecoderConfig
from jdistill.models.hf_config import HFFields

# Hugging Face's model_type -> the family's module, which defines ARCHITECTURE, HIDDEN_ACT, TENSORS, from_hf and to_hf.
FAMILIES = {
    "gemma2": "jdistill.models.families.gemma2",
    "gemma3_text": "jdistill.models.families.gemma3",
    "llama": "jdistill.models.families.llama",
    "mistral": "jdistill.models.families.mistral",
    "qwen2": "jdistill.models.families.qwen2",
    "qwen3": "jdistill.models.families.qwen3",
    "qwen3_moe": "jdistill.models.families.qwen3_moe",
}


def family(model_type: str) -> ModuleType:
    """Module of a family listed in FAMILIES."""
    return importlib.import_module(FAMILIES[model_type])


def config_from_hf(path: str | pathlib.Path) -> DecoderConfig:
    """Reads the config.json of a checkpoint directory, which may have no weights yet.

    With weights, `tie_word_embeddings: true` holds only if no other head is stored, as in transformers 5.

    Raises:
        FileNotFoundError: there is no config.json, or a shard is missing.
        ValueError: the architecture is unknown; a field is missing, unknown or asks for something not implemented; the
            weights are damaged or ambiguous (`weight_files.stored_tensors`).
    """
    raw = checkpoint_files.read_config(path)
    source = str(pathlib.Path(path) / "config.json")
    _refuse_quantized(raw, source)
    model_type = raw.get("model_type")
    if raw.get("text_config"):
        raise ValueError(
            f"{source}: model_type = {model_type!r} is a multimodal model, whose language model is in text_config: the "
            "student and the jax engine need that part alone (docs/troubleshooting.md says how to take it out); a "
            "teacher can serve the whole with the vllm engine"
        )
    if model_type not in FAMILIES:
        raise ValueError(
            f"{source}: model_type = {model_type!r} is not supported (only {', '.join(FAMILIES)}): "
            "use another checkpoint, or, for a teacher, the vllm or transformers engine"
        )
    module = family(model_type)
    architectures = raw.get("architectures") or [module.ARCHITECTURE]
    if architectures != [module.ARCHITECTURE]:
        raise ValueError(
            f"{source}: architectures = {architectures!r}, expected [{module.ARCHITECTURE!r}]: "
            "only causal language models can be trained or score tokens"
        )
    fields = HFFields(raw, source)
    fields.refuse_unless("hidden_act", module.HIDDEN_ACT)
    try:
        config = module.from_hf(fields)
        fields.refuse_unknown()
    except ZeroDivisionError:
        fields.refuse("num_attention_heads = 0: expected at least 1")
    except ValueError as e:  # values that do not go together; every field has been read
        if not fields.problems:  # otherwise placeholders may be what does not fit
            fields.refuse(str(e))
        fields.refuse_unknown()
    fields.finish()
    if config.tie_word_embeddings and any(pathlib.Path(path).glob("*.safetensors")):
        tied = not weight_files.has_separate_head(weight_files.stored_tensors(path))
        config = dataclasses.replace(config, tie_word_embeddings=tied)
    return config


def _refuse_quantized(raw: dict[str, Any], source: str) -> None:
    """Raises ValueError for a quantized checkpoint (FP8, AWQ, GPTQ, bitsandbytes, compressed-tensors)."""
    said = raw.get("quantization_config") or raw.get("compression_config")
    if said:
        method = said.get("quant_method", "unknown") if isinstance(said, dict) else said
        raise ValueError(
            f"{source}: the weights are quantized (quant_method {method}); the student and the jax engine need plain "
            "float32, bfloat16 or float16 weights. Use the checkpoint that it was made from (often the same name "
            "without -FP8, -AWQ, -GPTQ or -bnb-4bit); a teacher can serve it as it is with the vllm or sglang engine"
        )
