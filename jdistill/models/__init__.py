"""Flax decoders of the Hugging Face families; safetensors in and out."""

from jdistill.models.cache import KVCache, init_cache, resize_cache
from jdistill.models.config import DecoderConfig, Lora, Rope
from jdistill.models.decoder import Decoder
from jdistill.models.families import FAMILIES, config_from_hf
from jdistill.models.lora import lora_of, merge_lora, trained_kind
from jdistill.models.params import param_specs
from jdistill.models.partitioning import param_shardings
from jdistill.models.pretrained import load, random_init, save, save_adapter

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
