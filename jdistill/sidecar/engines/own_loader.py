"""Refuses what vLLM's and SGLang's own loaders would read otherwise than the fingerprint describes it.

Each chooses files and the output head by its own rules (weight_files has the rules that all engines share), and loads
whatever its options say.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from jdistill.checkpoint_files import read_config, ties_head
from jdistill.weight_files import (
    MISTRAL_FILES,
    SAFETENSORS_INDEX,
    embedding_and_head,
    has_separate_head,
    stored_tensors,
)

# Values of load_format that read the files that were fingerprinted.
LOAD_FORMATS = ("auto", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "bitsandbytes")
# Arguments of vLLM and of SGLang that replace fields of config.json, or the whole file.
CONFIG_ARGS = ("hf_overrides", "hf_config_path", "config_format", "json_model_override_args")


def check_model_args(engine: str, engine_args: Mapping[str, Any]) -> None:
    """Raises ValueError for engine_args with which the engine would load another model than was fingerprinted."""
    for name in CONFIG_ARGS:
        if engine_args.get(name) not in (None, "", "{}", {}):
            raise ValueError(
                f"engine_args: {name} = {engine_args[name]!r} changes the model behind the fingerprint: write the "
                "fields into config.json of the checkpoint (a copy with links to the weights will do)"
            )
    value = engine_args.get("load_format", "auto")
    if value not in LOAD_FORMATS:
        raise ValueError(
            f"engine_args: load_format = {value!r}: {engine} would load other weights than the fingerprinted "
            f"*.safetensors; expected one of {', '.join(LOAD_FORMATS)}"
        )


def check_own_loader(engine: str, path: str | pathlib.Path, *, takes_stored_head: bool = False) -> None:
    """Raises ValueError if an engine would load another model from a checkpoint that is otherwise whole.

    Args:
        engine: its name, for the message.
        path: checkpoint directory.
        takes_stored_head: whether the engine takes a stored head in spite of `tie_word_embeddings: true`.
    """
    path = pathlib.Path(path)
    tensors = stored_tensors(path)
    if ties_head(read_config(path)):
        embedding, head = embedding_and_head(tensors)
        if not takes_stored_head and has_separate_head(tensors):
            raise ValueError(
                f"{path}: config.json says tie_word_embeddings: true, but {head} is stored with other values than "
                f"{embedding}: {engine} takes the embeddings as head, transformers 5 and the trainer the stored head. "
                "Set tie_word_embeddings to false in config.json, or delete the tensor that is wrong"
            )
        if head is not None and embedding is None:
            raise ValueError(
                f"{path}: config.json says tie_word_embeddings: true and only {head} is stored, which {engine} "
                "does not read: rename it to model.embed_tokens.weight (loading and saving with transformers does that)"
            )
    mistral = sorted(path.glob(MISTRAL_FILES))
    if mistral and not (path / SAFETENSORS_INDEX).exists():
        raise ValueError(
            f"{path}: without {SAFETENSORS_INDEX}, {engine} would also read {mistral[0].name}, the same model in "
            "Mistral's own format: move it to another directory"
        )
