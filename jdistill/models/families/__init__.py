"""One file per family: reads and writes its config.json, and names its tensors."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from types import ModuleType

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
    model_type = raw.get("model_type")
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
    fields.refuse_unless("attention_dropout", 0)
    try:
        config = module.from_hf(fields)
    except ValueError as e:
        raise e if source in str(e) else ValueError(f"{source}: {e}") from None
    fields.finish()
    if config.tie_word_embeddings and any(pathlib.Path(path).glob("*.safetensors")):
        tied = not weight_files.has_separate_head(weight_files.stored_tensors(path))
        config = dataclasses.replace(config, tie_word_embeddings=tied)
    return config
