"""The fields of published config.json files are read, with the sizes and rotations that transformers reads from them.

The entries hold the fields as their publishers wrote them: sizes, and whatever else stands in the files.
"""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import transformers

from jdistill import models
from jdistill.models import families, hf_config

OLD = {"torch_dtype": "bfloat16", "use_cache": True, "initializer_range": 0.02, "attention_dropout": 0.0}


def llama(**fields):
    shared = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **OLD}
    return shared | {"pretraining_tp": 1, "rms_norm_eps": 1e-05, "attention_bias": False, "rope_scaling": None} | fields


def qwen2(**fields):
    shared = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", **OLD}
    shared |= {"rms_norm_eps": 1e-06, "use_sliding_window": False, "use_mrope": False, "bos_token_id": 151643}
    return shared | {"eos_token_id": 151643, "transformers_version": "4.40.1"} | fields


def qwen3(**fields):
    shared = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", **OLD}
    shared |= {"attention_bias": False, "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-06}
    shared |= {"rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False}
    return shared | {"vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151645} | fields


def mistral(**fields):
    shared = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", **OLD}
    shared |= {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32}
    shared |= {"num_key_value_heads": 8, "rms_norm_eps": 1e-05, "tie_word_embeddings": False}
    return shared | {"max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 2} | fields


def gemma2(**fields):
    shared = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", **OLD}
    shared |= {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attn_logit_softcapping": 50.0}
    shared |= {"final_logit_softcapping": 30.0, "cache_implementation": "hybrid", "head_dim": 256, "pad_token_id": 0}
    shared |= {"max_position_embeddings": 8192, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096}
    return shared | {"vocab_size": 256000, "bos_token_id": 2, "eos_token_id": 1} | fields


def gemma3(**fields):
    shared = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **OLD, "attention_bias": False}
    shared |= {"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "rope_scaling": None}
    shared |= {"final_logit_softcapping": None, "head_dim": 256, "max_position_embeddings": 32768, "pad_token_id": 0}
    shared |= {"num_attention_heads": 4, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06}
    shared |= {"rope_local_base_freq": 10000, "rope_theta": 1000000, "sliding_window": 512, "vocab_size": 262144}
    return shared | {"bos_token_id": 2, "eos_token_id": [1, 106]} | fields


def sizes(hidden, intermediate, layers, heads, kv_heads):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
EOS3 = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "mlp_bias": False, "vocab_size": 128256}
PUBLISHED = {
    "Qwen3-0.6B": qwen3(**sizes(1024, 3072, 28, 16, 8), max_window_layers=28, tie_word_embeddings=True),
    "Qwen3-8B": qwen3(**sizes(4096, 12288, 36, 32, 8), max_window_layers=36, tie_word_embeddings=False),
    "Qwen3-4B-Instruct-2507": qwen3(
        **sizes(2560, 9728, 36, 32, 8), max_window_layers=36, tie_word_embeddings=True, max_position_embeddings=262144
    )
    | {"rope_theta": 5000000},
    "Qwen3-8B with YaRN, as its card says": qwen3(**sizes(4096, 12288, 36, 32, 8), tie_word_embeddings=False)
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    "Qwen3-30B-A3B": qwen3(**sizes(2048, 6144, 48, 32, 4), max_window_layers=48, tie_word_embeddings=False)
    | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1}
    | {"mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128}
    | {"num_experts_per_tok": 8, "output_router_logits": False, "router_aux_loss_coef": 0.001},
    "Qwen3-Coder-30B-A3B-Instruct": qwen3(**sizes(2048, 5472, 48, 32, 4), max_window_layers=28)
    | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1}
    | {"mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128}
    | {"num_experts_per_tok": 8, "output_router_logits": False, "router_aux_loss_coef": 0.0, "qkv_bias": False}
    | {"shared_expert_intermediate_size": 0, "use_qk_norm": True, "rope_theta": 10000000, "tie_word_embeddings": False},
    "Qwen2.5-0.5B": qwen2(**sizes(896, 4864, 24, 14, 2), max_position_embeddings=32768, max_window_layers=24)
    | {"rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "vocab_size": 151936},
    "Qwen2.5-7B": qwen2(**sizes(3584, 18944, 28, 28, 4), max_position_embeddings=131072, max_window_layers=28)
    | {"rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "vocab_size": 152064},
    "Qwen2.5-Math-7B": qwen2(**sizes(3584, 18944, 28, 28, 4), max_position_embeddings=4096, max_window_layers=28)
    | {"rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 152064},
    "Qwen2.5-Coder-7B": qwen2(**sizes(3584, 18944, 28, 28, 4), max_position_embeddings=32768, max_window_layers=28)
    | {"rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "vocab_size": 152064},
    "DeepSeek-R1-Distill-Qwen-1.5B": qwen2(**sizes(1536, 8960, 28, 12, 2), max_position_embeddings=131072)
    | {"max_window_layers": 21, "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False}
    | {"vocab_size": 151936},
    "DeepSeek-R1-Distill-Llama-8B": llama(**sizes(4096, 14336, 32, 32, 8), **EOS3, max_position_embeddings=131072)
    | {"rope_scaling": {"factor": 8.0, **LLAMA3_ROPE}, "rope_theta": 500000.0, "tie_word_embeddings": False},
    "Llama-3.1-8B-Instruct": llama(**sizes(4096, 14336, 32, 32, 8), **EOS3, max_position_embeddings=131072)
    | {"rope_scaling": {"factor": 8.0, **LLAMA3_ROPE}, "rope_theta": 500000.0, "tie_word_embeddings": False},
    "Llama-3.2-1B": llama(**sizes(2048, 8192, 16, 32, 8), **EOS3, max_position_embeddings=131072, head_dim=64)
    | {"rope_scaling": {"factor": 32.0, **LLAMA3_ROPE}, "rope_theta": 500000.0, "tie_word_embeddings": True},
    "TinyLlama-1.1B-Chat-v1.0": llama(**sizes(2048, 5632, 22, 32, 4), max_position_embeddings=2048, vocab_size=32000)
    | {"rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2},
    "SmolLM2-135M": llama(**sizes(576, 1536, 30, 9, 3), max_position_embeddings=8192, vocab_size=49152)
    | {"initializer_range": 0.041666666666666664, "is_llama_config": True, "rope_interleaved": False}
    | {"rope_theta": 100000, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0},
    "SmolLM2-1.7B-Instruct": llama(**sizes(2048, 8192, 24, 32, 32), max_position_embeddings=8192, vocab_size=49152)
    | {"rope_theta": 130000, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    | {"mlp_bias": False, "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}}},
    "deepseek-coder-6.7b-instruct": llama(**sizes(4096, 11008, 32, 32, 32), max_position_embeddings=16384)
    | {"rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000, "rms_norm_eps": 1e-06}
    | {"vocab_size": 32256, "tie_word_embeddings": False, "bos_token_id": 32013, "eos_token_id": 32021},
    "Mistral-7B-v0.1": mistral(rope_theta=10000.0, sliding_window=4096, vocab_size=32000),
    "Mistral-7B-v0.3": mistral(rope_theta=1000000.0, sliding_window=None, vocab_size=32768),
    "Mistral-Nemo-Base-2407": mistral(rope_theta=1000000.0, sliding_window=None, vocab_size=131072)
    | {"hidden_size": 5120, "num_hidden_layers": 40, "head_dim": 128, "max_position_embeddings": 128000},
    "gemma-2-2b": gemma2(**sizes(2304, 9216, 26, 8, 4), query_pre_attn_scalar=256),
    "gemma-2-9b": gemma2(**sizes(3584, 14336, 42, 16, 8), query_pre_attn_scalar=256, sliding_window_size=4096),
    "gemma-2-27b": gemma2(**sizes(4608, 36864, 46, 32, 16), query_pre_attn_scalar=144, head_dim=128),
    "gemma-3-1b-it": gemma3(hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, sliding_window_pattern=6)
    | {"cache_implementation": "hybrid"},
    "gemma-3-270m": gemma3(hidden_size=640, intermediate_size=2048, num_hidden_layers=18, _sliding_window_pattern=6)
    | {"layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "use_bidirectional_attention": False},
}


def read(directory, fields):
    (directory / "config.json").write_text(json.dumps(fields))
    return models.config_from_hf(directory)


def check_against_transformers(ours, directory):
    theirs = transformers.AutoConfig.from_pretrained(directory)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    experts = getattr(theirs, "num_experts", 0)
    intermediate = theirs.moe_intermediate_size if experts else theirs.intermediate_size
    assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size, ours.num_layers) == (
        theirs.vocab_size,
        theirs.hidden_size,
        intermediate,
        theirs.num_hidden_layers,
    )
    assert (ours.num_heads, ours.num_kv_heads, ours.head_dim, ours.num_experts) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        head_dim,
        experts,
    )
    assert (ours.rms_norm_eps, ours.max_position_embeddings, ours.tie_word_embeddings) == (
        theirs.rms_norm_eps,
        theirs.max_position_embeddings,
        theirs.tie_word_embeddings,
    )
    types = getattr(theirs, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if getattr(theirs, "sliding_window", None) else "full_attention"] * ours.num_layers
    assert (list(ours.sliding_layers) or [False] * ours.num_layers) == [kind == "sliding_attention" for kind in types]
    if any(ours.sliding_layers):
        assert ours.sliding_window == theirs.sliding_window
    # The rotary embedding of the model itself, which knows every kind of scaling.
    module = importlib.import_module(transformers.AutoModelForCausalLM._model_mapping[type(theirs)].__module__)
    rotary = next(value for name, value in vars(module).items() if name.endswith("RotaryEmbedding"))(theirs)
    for rope, suffix in ((ours.rope, "full_attention_"), (ours.local_rope, "sliding_attention_")):
        if rope is None:
            continue
        name = suffix if ours.family.startswith("gemma3") else ""
        expected = getattr(rotary, f"{name}inv_freq").numpy()
        np.testing.assert_allclose(rope.inverse_frequencies(ours.head_dim), expected, rtol=1e-6)
        assert rope.attention_factor == pytest.approx(getattr(rotary, f"{name}attention_scaling"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_and_rotations_are_those_of_transformers(tmp_path, name):
    check_against_transformers(read(tmp_path, PUBLISHED[name]), tmp_path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_this_version_of_transformers_writes_is_read_alike(tmp_path, name):
    ours = read(tmp_path, PUBLISHED[name])
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read(tmp_path, config.to_dict() | {"architectures": PUBLISHED[name]["architectures"]}) == ours
    config.save_pretrained(tmp_path)
    assert models.config_from_hf(tmp_path) == ours


# What to_dict() of transformers 4.51 adds to a model's own fields.
DUMP_4_51 = {
    **dict.fromkeys("add_cross_attention do_sample early_stopping is_decoder is_encoder_decoder".split(), False),
    **dict.fromkeys("output_attentions output_hidden_states output_scores remove_invalid_values".split(), False),
    **dict.fromkeys("return_dict_in_generate tf_legacy_loss tie_encoder_decoder torchscript".split(), False),
    **dict.fromkeys("use_bfloat16".split(), False),
    **dict.fromkeys("bad_words_ids begin_suppress_tokens cross_attention_hidden_size finetuning_task prefix".split()),
    **dict.fromkeys("decoder_start_token_id exponential_decay_length_penalty forced_bos_token_id".split()),
    **dict.fromkeys("forced_eos_token_id pad_token_id problem_type sep_token_id suppress_tokens".split()),
    **dict.fromkeys("task_specific_params tokenizer_class".split()),
    **dict.fromkeys("encoder_no_repeat_ngram_size min_length no_repeat_ngram_size chunk_size_feed_forward".split(), 0),
    **dict.fromkeys("num_beam_groups num_beams num_return_sequences".split(), 1),
    **dict.fromkeys("length_penalty repetition_penalty temperature top_p typical_p".split(), 1.0),
    **{"diversity_penalty": 0.0, "max_length": 20, "top_k": 50, "return_dict": True, "pruned_heads": {}},
    **{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
    **{"_name_or_path": "x", "_attn_implementation_autoset": True, "transformers_version": "4.51.3"},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_whole_dump_of_transformers_4_is_read_alike(tmp_path, name):
    ours = read(tmp_path, PUBLISHED[name])
    assert read(tmp_path, DUMP_4_51 | PUBLISHED[name]) == ours


def test_every_family_is_among_the_published_models():
    assert {fields["model_type"] for fields in PUBLISHED.values()} == set(families.FAMILIES)
    assert len(PUBLISHED) >= 15 and not hf_config.HARMLESS & {"head_dim", "rope_theta", "sliding_window"}


def test_all_problems_of_a_file_are_in_one_message(tmp_path):
    wrong = {"hidden_size": "576", "num_key_value_heads": None, "attention_bias": "no", "residual_scale": 2.0}
    wrong |= {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "hidden_act": "gelu", "vocab_size": None}
    with pytest.raises(ValueError, match=r"config\.json: 6 problems\n- ") as error:
        read(tmp_path, PUBLISHED["SmolLM2-135M"] | wrong)
    for words in (
        "hidden_size = '576': expected int",
        "attention_bias = 'no': expected bool",
        "residual_scale = 2.0 is an unknown field",
        "rope_scaling.rope_type = 'dynamic' is not supported",
        "hidden_act = 'gelu' is not supported",
        "vocab_size is missing",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("quantization", "method"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, "awq"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
    ],
)
def test_a_quantized_checkpoint_gets_one_message_that_says_what_to_use(tmp_path, quantization, method):
    with pytest.raises(ValueError, match=rf"quantized \(quant_method {method}\).*plain .*without -FP8") as error:
        read(tmp_path, PUBLISHED["Qwen3-8B"] | {"quantization_config": quantization})
    assert "unknown" not in str(error.value) and "delete" not in str(error.value)


MULTIMODAL = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    "mm_tokens_per_image": 256,
}


def test_gemma_3_4b_is_named_as_multimodal_and_its_text_model_can_be_taken_out_as_the_docs_say(tmp_path, reference):
    with pytest.raises(ValueError, match=r"'gemma3' is a multimodal model, .*docs/troubleshooting\.md says how"):
        read(tmp_path, MULTIMODAL)
    _, reference_logits = reference
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    # The recipe of docs/troubleshooting.md.
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "whole")
    text_model = transformers.Gemma3ForCausalLM(model.config.text_config)
    text_model.model, text_model.lm_head = model.model.language_model, model.lm_head
    text_model.save_pretrained(tmp_path / "text")
    tokens_BS = np.arange(3, 15)[None]
    decoder = models.load(tmp_path / "text")
    ours = decoder.logits(decoder(tokens_BS, np.arange(12)[None])[0])
    np.testing.assert_allclose(np.asarray(ours), reference_logits(whole, tokens_BS), atol=2e-5)
