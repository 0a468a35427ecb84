"""Random transformers models, saved as checkpoints: the reference implementation for ours."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
import transformers

CLASSES = {
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}


def make_reference(directory, family, seed=0, dtype=torch.float32, **fields):
    """Saves a random model with `fields`; every parameter is random, biases and norms too. Returns it."""
    config_class, model_class = CLASSES[family]
    defaults = {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = config_class(**{**defaults, **fields}, attn_implementation="eager")
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gemma's norms multiply by 1 + weight.
            center = 1.0 if "norm" in name and not family.startswith("gemma") else 0.0
            parameter.copy_(center + 0.15 * torch.randn(parameter.shape, generator=generator))
    model = model.to(dtype)
    model.save_pretrained(directory)
    return model


def reference_logits(model, tokens_BS, attention_mask_BS=None):
    with torch.no_grad():
        mask = None if attention_mask_BS is None else torch.tensor(attention_mask_BS)
        return model(torch.tensor(np.asarray(tokens_BS)), attention_mask=mask).logits.float().numpy()


@pytest.fixture
def reference():
    """(make_reference, reference_logits), as a fixture because test modules do not import one another."""
    transformers.logging.disable_progress_bar()
    return make_reference, reference_logits
