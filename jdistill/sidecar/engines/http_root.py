"""Compares the checkpoint that a running server says it serves, where it can be read here, with the configuration's."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

from jdistill.checkpoint_files import read_config, tokenizer_fingerprint, vocab_size
from jdistill.config import ConfigError
from jdistill.fingerprint import model_fingerprint
from jdistill.weight_files import MISTRAL_FILES

logger = logging.getLogger(__name__)


def check_root(url: str, root: Any, path: pathlib.Path) -> None:
    """Raises ConfigError if the server's checkpoint can be read here and is not the configuration's."""
    if not isinstance(root, str):
        return
    ours = (vocab_size(read_config(path)), tokenizer_fingerprint(path))
    try:
        theirs = (vocab_size(read_config(root)), tokenizer_fingerprint(root))
    except (OSError, ValueError):  # a name on a hub, or a directory on another machine
        if pathlib.PurePath(root).name != path.resolve().name:
            logger.warning("%s serves %s; make sure that it is the model of %s", url, root, path)
        return
    if ours != theirs:
        raise ConfigError(
            f"model {path} has another vocabulary or tokenizer than {root}, which {url} serves; give the "
            "directory of the model that the server serves"
        )


def check_root_weights(url: str, root: Any, path: pathlib.Path, dtype: str, fingerprint: str) -> None:
    """Raises ConfigError if the server's weights can be read here and are not the configuration's."""
    if not isinstance(root, str) or not any(pathlib.Path(root).glob("*.safetensors")):
        return
    if model_fingerprint(root, dtype) != fingerprint:
        raise ConfigError(
            f"model {path} has other weights or another config.json than {root}, which {url} serves: give the "
            "directory of the model that the server serves"
        )
    if mistral := sorted(pathlib.Path(root).glob(MISTRAL_FILES)):
        logger.warning(
            "%s also holds %s: vLLM prefers it to the files that were fingerprinted, unless the server was started "
            "with --load-format safetensors --config-format hf",
            root,
            mistral[0].name,
        )
