"""Small tokenizers whose special tokens and chat templates have the shapes of published families."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple


class Family(NamedTuple):
    """One family: its special tokens (ids from 0), end token, template, and the ids that its files list as ends."""

    special: tuple[str, ...]
    eos: str
    template: str
    turn_end: str  # what the published models write after an assistant's message
    generation_eos: tuple[str, ...] | None  # eos_token_id of generation_config.json; None: no such file
    config_eos: tuple[str, ...] = ()  # of config.json


CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>"
    "\n\n{% endif %}{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '### Human: ' if m.role == 'user' else '### Assistant: ' }}{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}### Assistant: {% endif %}"
)

QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
FAMILIES = {
    "gemma": Family(
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", GEMMA, "<end_of_turn>", ("<eos>",)
    ),
    "llama3": Family(
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
        ),
        "<|eot_id|>",
        LLAMA3,
        "<|eot_id|>",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "qwen2.5": Family(QWEN_TOKENS, "<|im_end|>", CHATML, "<|im_end|>", ("<|im_end|>", "<|endoftext|>")),
    "qwen2.5 base": Family(QWEN_TOKENS, "<|endoftext|>", CHATML, "<|im_end|>", ("<|endoftext|>",)),
    "qwen3": Family(QWEN_TOKENS, "<|im_end|>", QWEN3, "<|im_end|>", ("<|im_end|>", "<|endoftext|>")),
    "llama2": Family(("<unk>", "<s>", "</s>"), "</s>", LLAMA2, "</s>", ("</s>",)),
    "mistral": Family(("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), "</s>", MISTRAL, "</s>", None, ("</s>",)),
    "phi3": Family(
        ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        PHI3,
        "<|end|>",
        None,
        ("<|endoftext|>",),
    ),
}


def write_family(path: pathlib.Path, family: Family, **tokenizer_config: Any) -> pathlib.Path:
    """Writes a byte-level tokenizer with the special tokens of a family at ids 256 and on, and its files."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": family.eos, "chat_template": family.template}
    bos = [token for token in ("<bos>", "<s>", "<|begin_of_text|>") if token in family.special]
    config |= {"bos_token": bos[0]} if bos else {}
    (path / "tokenizer_config.json").write_text(json.dumps(config | tokenizer_config))
    for file, tokens in (("generation_config.json", family.generation_eos), ("config.json", family.config_eos)):
        if tokens is not None:
            ids = [id_of(family, token) for token in tokens]
            (path / file).write_text(json.dumps({"eos_token_id": ids} if ids else {}))
    return path


def id_of(family: Family, token: str) -> int:
    """Returns the id of a special token of `write_family`'s tokenizer."""
    return 256 + family.special.index(token)
