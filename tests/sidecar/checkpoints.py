"""Writes a tiny Hugging Face checkpoint with random weights, from numpy, safetensors and tokenizers alone.

Works in every environment that an engine runs in (the vLLM one has no jax, the JAX one may have no torch).
"""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
}
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def write_checkpoint(
    path: str | pathlib.Path, *, model_type: str = "qwen3", seed: int = 0, tokenizer: bool = True, **config: Any
) -> pathlib.Path:
    """Writes config.json, model.safetensors (float32) and tokenizer.json; returns the directory.

    Weights are larger than those of an initialised model, so that log-probabilities range over several nats and a wrong
    row, id or temperature is far outside every tolerance.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "dtype": "float32",
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
        **TINY,
        **config,
    }
    (path / "config.json").write_text(json.dumps(config, indent=1))
    rng = np.random.default_rng(seed)
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    N, H = config["num_attention_heads"] * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)

    def norm(size: int) -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(size)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(V, D), "model.norm.weight": norm(D)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = 2 * matrix(V, D)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": norm(D),
            prefix + "post_attention_layernorm.weight": norm(D),
            prefix + "self_attn.q_proj.weight": matrix(N, D),
            prefix + "self_attn.k_proj.weight": matrix(H, D),
            prefix + "self_attn.v_proj.weight": matrix(H, D),
            prefix + "self_attn.o_proj.weight": matrix(D, N),
            prefix + "mlp.gate_proj.weight": matrix(F, D),
            prefix + "mlp.up_proj.weight": matrix(F, D),
            prefix + "mlp.down_proj.weight": matrix(D, F),
        }
        if model_type == "qwen3":
            tensors[prefix + "self_attn.q_norm.weight"] = norm(config["head_dim"])
            tensors[prefix + "self_attn.k_norm.weight"] = norm(config["head_dim"])
        if model_type == "qwen2":
            tensors[prefix + "self_attn.q_proj.bias"] = matrix(1, N)[0]
            tensors[prefix + "self_attn.k_proj.bias"] = matrix(1, H)[0]
            tensors[prefix + "self_attn.v_proj.bias"] = matrix(1, H)[0]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        write_tokenizer(path, vocab_size=V)
    return path


def write_tokenizer(path: str | pathlib.Path, *, vocab_size: int, prefix: str = "w") -> None:
    """Writes tokenizer.json and tokenizer_config.json: `<s>`, `</s>`, then w2, w3, ..."""
    path = pathlib.Path(path)
    vocab = {"<s>": 0, "</s>": 1} | {f"{prefix}{i}": i for i in range(2, vocab_size)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def write_adapter(
    path: str | pathlib.Path, base: str | pathlib.Path, *, rank: int = 4, seed: int = 1, **options: Any
) -> pathlib.Path:
    """Writes a random LoRA adapter on the attention of a Qwen3 checkpoint, in PEFT's format.

    `options` go to adapter_config.json; alpha_pattern by the last part of names, as q_proj.

    Beside it, in `path`-merged, the checkpoint with the adapter merged into its weights, which gives the same numbers.
    """
    path, base = pathlib.Path(path), pathlib.Path(base)
    path.mkdir(parents=True)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    config |= {"target_modules": targets, "base_model_name_or_path": str(base), "lora_dropout": 0.0}
    config |= options
    (path / "adapter_config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    weights, adapter = load_file(base / "model.safetensors"), {}
    for name in list(weights):
        if name.split(".")[-2] not in targets:
            continue
        rows, columns = weights[name].shape
        a = (rng.standard_normal((rank, columns)) * columns**-0.5).astype(np.float32)
        b = (rng.standard_normal((rows, rank)) * rank**-0.5).astype(np.float32)
        prefix = "base_model.model." + name.removesuffix(".weight")
        adapter |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        alpha = config.get("alpha_pattern", {}).get(name.split(".")[-2], config["lora_alpha"])
        weights[name] = weights[name] + alpha / (rank**0.5 if config.get("use_rslora") else rank) * (b @ a)
    save_file(adapter, path / "adapter_model.safetensors", metadata={"format": "pt"})
    merged = path.with_name(path.name + "-merged")
    shutil.copytree(base, merged)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return path
