"""One configuration per family, and decoders with random parameters."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from jdistill import models
from jdistill.models import DecoderConfig, Rope

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "norm_plus_one": True,
    "post_norms": True,
    "scale_embedding": True,
    "tie_word_embeddings": True,
}
LLAMA = DecoderConfig(
    family="llama",
    **SIZES,
    rope=Rope(
        theta=5e5,
        kind="llama3",
        factor=8.0,
        original_max_position_embeddings=32,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    ),
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
)
CONFIGS = [
    LLAMA,
    dataclasses.replace(
        LLAMA, rope=Rope(kind="linear", factor=2.0), qkv_bias=False, output_bias=False, tie_word_embeddings=True
    ),
    dataclasses.replace(LLAMA, family="qwen2", output_bias=False, mlp_bias=False, head_dim=6, rope=Rope(theta=1e6)),
    dataclasses.replace(
        LLAMA,
        family="qwen3",
        qk_norm=True,
        mlp_bias=False,
        rope=Rope(kind="yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.2, truncate=False),
    ),
    DecoderConfig(family="mistral", **SIZES, sliding_window=9, sliding_layers=(True, True, True)),
    DecoderConfig(
        family="gemma2",
        **(SIZES | GEMMA),
        sliding_window=9,
        sliding_layers=(True, False, True),
        query_pre_attn_scalar=12.0,
        attention_softcap=3.0,
        final_softcap=4.0,
    ),
    DecoderConfig(
        family="gemma3_text",
        **(SIZES | GEMMA),
        qk_norm=True,
        rope=Rope(kind="linear", theta=1e6, factor=8.0),
        local_rope=Rope(theta=300.0),
        sliding_window=9,
        sliding_layers=(False, True, True),
        query_pre_attn_scalar=10.0,
    ),
    DecoderConfig(family="qwen3_moe", **SIZES, qk_norm=True, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True),
]


def random_decoder(config, seed=0):
    """Makes every parameter random, with numpy (compiling JAX's random numbers takes seconds)."""
    rng = np.random.default_rng(seed)
    decoder = nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0)))
    random = jax.tree.map(
        lambda x: jax.numpy.asarray(0.2 * rng.standard_normal(x.shape, np.float32)), nnx.state(decoder, nnx.Param)
    )
    nnx.update(decoder, random)
    return decoder
