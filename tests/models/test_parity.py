"""Our decoders against transformers' on random configurations, float32."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdistill import models
from jdistill.models.packing import pack_rows

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 2e5, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
ALTERNATING = ["sliding_attention", "full_attention"]
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CASES = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 20, "attention_bias": True}),
    ("llama", {"mlp_bias": True, "rms_norm_eps": 1e-2}),
    ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    ("llama", {"num_hidden_layers": 5, "hidden_size": 32, "num_attention_heads": 8, "head_dim": 4}),
    ("qwen2", {}),
    ("qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("qwen2", {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("qwen2", {"rope_parameters": YARN, "head_dim": 32}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}),
    ("qwen2", {"intermediate_size": 200, "vocab_size": 33}),
    ("qwen2", {"num_hidden_layers": 1, "rms_norm_eps": 1e-3}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    ("qwen3", {"num_key_value_heads": 4, "attention_bias": True}),
    ("qwen3", {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("qwen3", {"rope_parameters": {**YARN, "beta_fast": 16.0, "attention_factor": 0.9}, "head_dim": 32}),
    ("qwen3", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False}, "head_dim": 64}),
    ("qwen3", {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6, "hidden_size": 40}),
    ("qwen3", {"rope_parameters": LLAMA3, "num_hidden_layers": 4}),
    ("mistral", {"sliding_window": 8, "num_hidden_layers": 3}),
    ("gemma2", {"sliding_window": 16, "num_hidden_layers": 4, "attn_logit_softcapping": 2.0}),
    (
        "gemma2",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 5,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 1.0,
            "attn_logit_softcapping": None,
            "query_pre_attn_scalar": 7,
        },
    ),
    # No row is longer than its window, so causal_attention is used.
    ("gemma3_text", {"query_pre_attn_scalar": 12, "final_logit_softcapping": 2.0, "attention_bias": True}),
    ("gemma3_text", {"sliding_window": 16, "num_hidden_layers": 7, "query_pre_attn_scalar": 20}),
    ("gemma3_text", {"sliding_window": 9, "rope_parameters": GEMMA3_ROPES, "layer_types": ALTERNATING, "head_dim": 32}),
    ("qwen3_moe", MOE),
    ("qwen3_moe", {**MOE, "norm_topk_prob": True, "num_experts_per_tok": 3, "attention_bias": True}),
]


def positions_like(tokens_BS):
    return np.broadcast_to(np.arange(tokens_BS.shape[1]), tokens_BS.shape)


@nnx.jit
def jitted(decoder, tokens_BS, positions_BS, packing=None):
    hidden_BSD, _ = decoder(tokens_BS, positions_BS, packing=packing)
    return hidden_BSD.dtype.type(0), decoder.logits(hidden_BSD)


def our_logits(decoder, tokens_BS):
    return np.asarray(jitted(decoder, jnp.asarray(tokens_BS), jnp.asarray(positions_like(tokens_BS)))[1])


@pytest.mark.parametrize(
    ("family", "fields"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x) or "default"
)
def test_logits_equal_transformers_on_every_configuration(tmp_path, reference, family, fields):
    make, logits = reference
    model = make(tmp_path, family, seed=len(fields), **fields)
    decoder = models.load(tmp_path)
    rng = np.random.default_rng(0)
    for shape in ((2, 90), (1, 2)) if not fields else ((2, 90),):  # every shape is compiled
        tokens_BS = rng.integers(0, decoder.config.vocab_size, shape)
        expected = logits(model, tokens_BS)
        assert np.abs(expected).max() > 0.5, "the reference says nothing"
        np.testing.assert_allclose(our_logits(decoder, tokens_BS), expected, rtol=0, atol=5e-5)


def test_both_spellings_of_rope_are_read_alike(tmp_path, reference):
    make, _ = reference
    make(tmp_path, "llama", rope_parameters=LLAMA3)
    new = models.config_from_hf(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    scaling = fields.pop("rope_parameters")
    fields["rope_theta"] = scaling.pop("rope_theta")
    fields["rope_scaling"] = scaling
    file.write_text(json.dumps(fields))
    assert models.config_from_hf(tmp_path) == new
    assert new.rope.theta == 5000.0
    assert new.rope.kind == "llama3"


def test_right_padding_never_changes_a_real_token(tmp_path, reference):
    make, logits = reference
    model = make(tmp_path, "qwen3")
    decoder = models.load(tmp_path)
    rng = np.random.default_rng(1)
    tokens_BS = rng.integers(0, 101, (3, 20))
    lengths_B = np.array([20, 11, 3])
    mask_BS = (np.arange(20) < lengths_B[:, None]).astype(np.int64)
    expected = logits(model, tokens_BS, mask_BS)
    ours = our_logits(decoder, tokens_BS)
    for b, length in enumerate(lengths_B):
        np.testing.assert_allclose(ours[b, :length], expected[b, :length], rtol=0, atol=5e-5)


def test_packed_rows_equal_separate_rows(tmp_path, reference):
    make, logits = reference
    model = make(tmp_path, "qwen2")
    decoder = models.load(tmp_path)
    tokens_BS = np.random.default_rng(2).integers(0, 101, (3, 9))
    lengths_B = [5, 9, 2]
    packing = pack_rows(lengths_B, 9)
    line_1PV = jitted(decoder, packing.pack(tokens_BS), packing.pack(positions_like(tokens_BS)), packing)[1]
    ours_BSV = packing.unpack(line_1PV)
    for row, length in enumerate(lengths_B):
        expected = logits(model, tokens_BS[row : row + 1, :length])[0]
        np.testing.assert_allclose(ours_BSV[row, :length], expected, rtol=0, atol=5e-5)


def test_bfloat16_compute_stays_near_float32(tmp_path, reference):
    make, logits = reference
    model = make(tmp_path, "qwen3")
    tokens_BS = np.random.default_rng(3).integers(0, 101, (2, 30))
    decoder = models.load(tmp_path, compute_dtype="bfloat16")
    zero, ours = jitted(decoder, jnp.asarray(tokens_BS), jnp.asarray(positions_like(tokens_BS)))
    assert zero.dtype == jnp.bfloat16, "hidden states are in compute dtype"
    assert decoder.embed[...].dtype == jnp.float32, "masters stay float32"
    ours, expected = np.asarray(ours), logits(model, tokens_BS)
    # 8 bits of mantissa over two layers: errors of a few percent of the logits' spread.
    assert np.sqrt(np.mean((ours - expected) ** 2)) < 0.03 * expected.std()
