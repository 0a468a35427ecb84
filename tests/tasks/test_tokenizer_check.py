"""A loaded tokenizer is compared with its tokenizer.json; the reference is the tokenizers library."""

from __future__ import annotations

import json

import pytest
import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jdistill.tasks.base import load_tokenizer
from jdistill.tokenizer_check import check_tokenizer

TEXTS = ["the cat sat on the mat and 123 dogs   ran", "def f(x):\n    return x + 1\n", "a b c 0 1 2 3 4 5 6 7 8 9"] * 3
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(*, split: str | None) -> Tokenizer:
    """Returns a tokenizer like GPT-2's, or with `split` like those of Qwen and Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Split(tokenizers.Regex(split), "isolated")] if split else []
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.normalizer = normalizers.NFC() if split else None
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_fallback(*, prefix: bool) -> Tokenizer:
    """Returns a tokenizer like Llama 2's, or without `prefix` like Gemma's: U+2581 for spaces, and bytes as tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    tokenizer.pre_tokenizer = None if prefix else pre_tokenizers.Split(" ", "merged_with_previous")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    return tokenizer


def write(path, tokenizer, *, model_type, tokenizer_class, **config):
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>", **config}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("tokenizer", "model_type", "tokenizer_class"),
    [
        (byte_level(split=QWEN), "qwen2", "Qwen2Tokenizer"),
        (byte_level(split=QWEN), "qwen2", "LlamaTokenizerFast"),  # as DeepSeek-R1-Distill-Qwen
        (byte_level(split=QWEN), "llama", "PreTrainedTokenizerFast"),  # as Llama 3
        (byte_level(split=QWEN), "llama", "LlamaTokenizerFast"),  # as DeepSeek-R1-Distill-Llama
        (byte_level(split=None), "llama", "GPT2Tokenizer"),  # as SmolLM2
        (byte_fallback(prefix=True), "llama", "LlamaTokenizer"),  # as TinyLlama
        (byte_fallback(prefix=True), "mistral", "LlamaTokenizer"),  # as Mistral 7B v0.1
        (byte_fallback(prefix=False), "gemma2", "GemmaTokenizer"),
        (byte_fallback(prefix=False), "gemma3_text", "GemmaTokenizerFast"),
    ],
)
def test_the_tokenizers_of_published_models_are_loaded_as_their_files_describe_them(
    tmp_path, tokenizer, model_type, tokenizer_class
):
    path = write(tmp_path / "model", tokenizer, model_type=model_type, tokenizer_class=tokenizer_class)
    loaded = load_tokenizer(path)
    text = "the cat sat   on\n\n 42 mats"
    assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_class_with_rules_of_its_own_in_place_of_the_files_is_an_error_with_versions_ids_and_remedy(tmp_path):
    # transformers gives every qwen2 checkpoint Qwen's pre-tokenizer.
    path = write(
        tmp_path / "model", byte_level(split=None), model_type="qwen2", tokenizer_class="PreTrainedTokenizerFast"
    )
    with pytest.raises(ValueError, match=r"loads another tokenizer \(Qwen2Tokenizer\) than tokenizer\.json") as error:
        load_tokenizer(path)
    for words in (transformers.__version__, tokenizers.__version__, "becomes the ids [", "TokenizersBackend"):
        assert words in str(error.value)


def test_lost_spaces_other_text_and_a_failure_are_errors(tmp_path):
    path = write(tmp_path / "model", byte_level(split=QWEN), model_type="llama", tokenizer_class="TokenizersBackend")
    loaded = load_tokenizer(path)
    loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # as transformers 5.19 builds it
    with pytest.raises(ValueError, match=r"becomes the ids \[.*\] instead of \[.*\] \(from token \d+ on\)"):
        check_tokenizer(path, loaded)
    loaded = load_tokenizer(path)
    loaded.backend_tokenizer.decoder = decoders.Fuse()
    with pytest.raises(ValueError, match="the ids of a probe text become '"):
        check_tokenizer(path, loaded)

    class Broken:
        def encode(self, text, add_special_tokens):
            raise Exception("Unk token `<unk>` not found")

    with pytest.raises(ValueError, match=r"a probe text cannot be encoded \(Unk token"):
        check_tokenizer(path, Broken())


def test_truncation_padding_and_special_tokens_in_the_file_do_not_count(tmp_path):
    tokenizer = byte_level(split=QWEN)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=200)
    load_tokenizer(write(tmp_path / "m", tokenizer, model_type="llama", tokenizer_class="PreTrainedTokenizerFast"))


def test_what_is_not_checked_and_a_second_chat_template_are_named_in_the_log(tmp_path, caplog):
    path = write(
        tmp_path / "model",
        byte_level(split=QWEN),
        model_type="qwen2",
        tokenizer_class="Qwen2Tokenizer",
        chat_template="{{ messages[0]['content'] }}",
    )
    (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}\n")
    loaded = load_tokenizer(path)
    assert "chat template" not in caplog.text
    (path / "chat_template.jinja").write_text("<s>{{ messages[0]['content'] }}")
    messages = [{"role": "user", "content": "a"}]
    assert load_tokenizer(path).apply_chat_template(messages, tokenize=False) == "<s>a"
    assert "chat_template.jinja is used; tokenizer_config.json holds another chat template" in caplog.text
    (path / "tokenizer.json").unlink()
    check_tokenizer(path, loaded)
    assert "has no tokenizer.json: the tokenizer that transformers loads is not checked" in caplog.text
