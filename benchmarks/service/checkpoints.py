"""Write the two models to score from a seed: Qwen3's architecture with random float32 weights.

engine-bound: the projection onto 32,768 words is nearly all of the work, as with a large model.
service-bound: 0.4 M parameters and 512 words, so that what surrounds the engine is a large part of the time.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

SHAPES: dict[str, dict[str, int]] = {
    "engine-bound": {
        "vocab_size": 32768,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "service-bound": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}


def write(path: pathlib.Path, workload: str, *, seed: int = 0) -> int:
    """Writes config.json, model.safetensors, tokenizer.json; returns the number of parameters."""
    shape = SHAPES[workload]
    config: dict[str, Any] = {
        **shape,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    rng = np.random.default_rng(seed)
    D, F, V, H = (shape[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    queries, keys = shape["num_attention_heads"] * H, shape["num_key_value_heads"] * H

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns), np.float32) * np.float32(columns**-0.5)

    tensors = {
        "model.embed_tokens.weight": matrix(V, D),
        "model.norm.weight": np.ones(D, np.float32),
        "lm_head.weight": 2 * matrix(V, D),
    }
    for layer in range(shape["num_hidden_layers"]):
        sizes = {
            "self_attn.q_proj": (queries, D),
            "self_attn.k_proj": (keys, D),
            "self_attn.v_proj": (keys, D),
            "self_attn.o_proj": (D, queries),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        norms = {"input_layernorm": D, "post_attention_layernorm": D, "self_attn.q_norm": H, "self_attn.k_norm": H}
        tensors |= {f"model.layers.{layer}.{name}.weight": matrix(*size) for name, size in sizes.items()}
        tensors |= {f"model.layers.{layer}.{name}.weight": np.ones(size, np.float32) for name, size in norms.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(path, V)
    return sum(tensor.size for tensor in tensors.values())


def _write_tokenizer(path: pathlib.Path, vocab_size: int) -> None:
    # vLLM's HTTP server writes the text of every token beside its log-probability.
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w0", "eos_token": "w1"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
