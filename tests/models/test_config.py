"""config.json is read strictly: a field that changes the numbers is implemented or refused, never ignored."""

import json

import pytest

from jdistill import models

BASE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def read(tmp_path, remove=(), **fields):
    merged = {key: value for key, value in {**BASE, **fields}.items() if key not in remove}
    (tmp_path / "config.json").write_text(json.dumps(merged))
    return models.config_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "mixtral"},
            r"config.json: model_type = 'mixtral' is not supported \(only gemma2, .*, qwen3, qwen3_moe\)",
        ),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "only causal language models"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_attention .window 64"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling.rope_type = 'dynamic' is not supported",
        ),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "shift": 3}},
            r"rope_scaling\.shift = 3 is an unknown",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_theta = 1000000.0 but rope_parameters.rope_theta = 10000.0: delete",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"logit_softcap": 30.0}, r"logit_softcap = 30\.0 is an unknown field: it may change the model"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"weights are quantized .quant_method fp8.*need plain"),
        ({"text_config": {"hidden_size": 4}}, "is a multimodal model, whose language model is in text_config"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "rope_scaling.*'yarn' disagree"),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
                "original_max_position_embeddings": 32,
            },
            "original_max_position_embeddings = 64, but beside rope_scaling it is 32",
        ),
        ({"hidden_sizes": 3}, "hidden_sizes = 3 is an unknown field .did you mean hidden_size"),
        ({"hidden_size": "32"}, "hidden_size = '32': expected int"),
        ({"num_hidden_layers": 0}, "num_layers = 0: expected at least 1"),
        ({"num_key_value_heads": 3}, "config.json: num_kv_heads = 3 does not divide num_heads = 4"),
        ({"head_dim": 7}, "head_dim = 7: .* even"),
    ],
)
def test_an_unsupported_field_is_refused_by_name_value_and_file(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **fields)


GEMMA2 = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "hidden_act": "gelu_pytorch_tanh"}
GEMMA3 = {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_act": None,
    "hidden_activation": "gelu_pytorch_tanh",
}
MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (GEMMA2, {"hidden_act": "silu"}, "hidden_act = 'silu' is not supported"),
        (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not supported"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
        (GEMMA2, {"sliding_window_size": 64}, "sliding_window_size = 64 is not supported .only 4096"),
        (GEMMA2, {"sliding_window": None}, "sliding_window is null, but 1 of 2 layers are sliding"),
        (GEMMA2, {"layer_types": ["full_attention"]}, r"layer_types = \['full_attention'\]: expected 2"),
        (GEMMA2, {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types = .* expected 2"),
        (GEMMA2, {"final_logit_softcapping": -1.0}, "final_softcap = -1.0: expected more than 0"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported"),
        (GEMMA3, {"rope_parameters": {"rope_theta": 1e4}}, "expected one entry for full_attention"),
        (
            GEMMA3,
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
            "rope_parameters.full_attention and rope_theta, rope_scaling disagree",
        ),
        (
            GEMMA3,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters.sliding_attention.rope_type = 'linear' is not supported",
        ),
        (MISTRAL, {"sliding_window": 0}, "sliding_window = 0: expected more than 0"),
        (MOE, {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not supported"),
        (MOE, {"num_local_experts": 5}, "num_experts = 4, num_local_experts = 5 disagree"),
        (MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported"),
        (MOE, {"num_experts_per_tok": 5}, "num_experts_per_tok = 5: expected 1 to num_experts = 4"),
    ],
)
def test_features_that_a_family_does_not_support_are_refused(tmp_path, family, fields, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **{**family, **fields})


def test_null_disables_a_feature_that_is_on_by_default(tmp_path):
    assert read(tmp_path, **MISTRAL).sliding_window == 4096
    assert read(tmp_path, **MISTRAL, sliding_window=None).sliding_window is None
    config = read(tmp_path, **GEMMA2)
    assert (config.attention_softcap, config.final_softcap) == (50.0, 30.0)
    assert config.sliding_layers == (True, False)
    config = read(tmp_path, **GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (config.attention_softcap, config.final_softcap) == (None, None)


def test_both_spellings_of_gemma_3_rope_are_read_alike(tmp_path):
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = read(tmp_path, **GEMMA3, rope_local_base_freq=2e4, rope_scaling=scaling, num_hidden_layers=12)
    both = {"full_attention": {**scaling, "rope_theta": 1e6}, "sliding_attention": {"rope_theta": 20000}}
    new = read(tmp_path, ("rope_theta",), **GEMMA3, rope_parameters=both, num_hidden_layers=12)
    assert new == old
    assert (old.rope.theta, old.rope.kind, old.rope.factor, old.local_rope.theta) == (1e6, "linear", 8.0, 2e4)
    assert [layer for layer, sliding in enumerate(old.sliding_layers) if not sliding] == [5, 11]
    default = read(tmp_path, ("rope_theta",), **GEMMA3)
    assert (default.rope.theta, default.local_rope.theta) == (1e6, 1e4)


def test_a_missing_field_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: vocab_size is missing"):
        read(tmp_path, remove=("vocab_size",))


def test_fields_that_change_nothing_are_accepted(tmp_path):
    plain = read(tmp_path)
    noisy = read(
        tmp_path,
        _name_or_path="x",
        torch_dtype="bfloat16",
        transformers_version="4.1",
        use_cache=True,
        eos_token_id=[1, 2],
        sliding_window=4096,
        use_sliding_window=False,
        max_window_layers=1,
        some_new_switch=False,
        another=None,
        rope_scaling=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000},
    )
    assert noisy == plain
    assert plain.rope.theta == 1e6
    assert (plain.qk_norm, plain.qkv_bias, plain.tie_word_embeddings) == (True, False, True)


def test_absent_fields_take_the_defaults_of_transformers(tmp_path):
    config = read(tmp_path, remove=("tie_word_embeddings", "rope_theta", "head_dim", "max_position_embeddings"))
    assert not config.tie_word_embeddings
    assert config.rope.theta == 10_000.0
    assert config.head_dim == 128
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config = read(tmp_path, remove=("head_dim", "num_key_value_heads"), **llama)
    assert (config.head_dim, config.num_kv_heads, config.qk_norm) == (8, 4, False)


def test_an_error_names_a_directory_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="it does not exist"):
        models.config_from_hf(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        models.config_from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qw')
    with pytest.raises(ValueError, match="half written"):
        models.config_from_hf(tmp_path)
