"""Reads a Hugging Face config.json field by field, and writes the fields that all families share.

A field that could change the numbers and is not implemented is refused, never ignored. All problems of a file are
reported together.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

from jdistill.models.config import DecoderConfig, Rope

# Fields of config.json that do not affect the forward pass: any value is accepted. First those of all models, then
# those of generation (transformers 4 wrote them too), then what other tools leave behind.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _experts_implementation
    _name_or_path architectures attn_implementation bos_token_id cache_implementation chunk_size_feed_forward
    decoder_start_token_id dtype eos_token_id finetuning_task id2label initializer_factor keys_to_ignore_at_inference
    label2id max_window_layers model_type num_labels output_attentions output_hidden_states output_scores pad_token_id
    prefix pretraining_tp problem_type return_dict return_dict_in_generate sep_token_id task_specific_params
    tie_last_hidden_states tokenizer_class torch_dtype torchscript transformers_version unk_token_id use_bfloat16
    use_cache

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values
    repetition_penalty suppress_tokens temperature top_k top_p typical_p

    bos_token eos_token gradient_checkpointing is_llama_config model_max_length pad_token tokenizer_model_max_length
    tokenizer_padding_side transformers.js_config unsloth_fixed unsloth_version use_flash_attention
    use_flash_attention_2
    """.split()
)
# Stands in for a field that has a problem, so that the others are read too.
_PLACEHOLDERS: dict[type, Any] = {int: 2, float: 1.0, bool: False, str: "", list: [], dict: {}}


class HFFields:
    """The fields of one config.json; problems are collected, and `finish` raises them together."""

    def __init__(self, fields: dict[str, Any], source: str, *, parent: HFFields | None = None, prefix: str = ""):
        self._fields = dict(fields)
        self._taken: set[str] = set()
        self._prefix = prefix if parent is None else parent._prefix + prefix
        self.source = source
        self.problems: list[str] = [] if parent is None else parent.problems

    def inner(self, fields: dict[str, Any], name: str = "") -> HFFields:
        """Returns the fields of a nested object (`name`), whose problems count as this file's."""
        return HFFields(fields, self.source, parent=self, prefix=f"{name}." if name else "")

    def refuse(self, problem: str) -> None:
        """Notes a problem; begins with the name of the field."""
        self.problems.append(self._prefix + problem)

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """Returns the value of a field, or `default` if it is absent or null; a placeholder if there is a problem."""
        self._taken.add(name)
        value = self._fields.get(name)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if value is None and default is not ...:
            return default
        if float in kinds and type(value) is int:
            return float(value)
        if type(value) in kinds:
            return value
        if value is None:
            self.refuse(f"{name} is missing: is it a whole config.json of a causal LM?")
        else:
            self.refuse(f"{name} = {value!r}: expected {' or '.join(k.__name__ for k in kinds)}")
        return _PLACEHOLDERS[kinds[0]] if default is ... else default

    def take_unless_null(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """Like `take`, but null gives None: for fields where null switches a feature off."""
        if name in self._fields and self._fields[name] is None:
            self._taken.add(name)
            return None
        return self.take(name, kind, default)

    def take_alike(self, names: Sequence[str], kind: type | tuple[type, ...], default: Any) -> Any:
        """Returns a value that the file may give under several names; they must not differ."""
        values = {name: value for name in names if (value := self.take(name, kind, None)) is not None}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{name} = {value!r}" for name, value in values.items())
            self.refuse(f"{said} disagree: delete the wrong one")
        return next(iter(values.values()), default)

    def sliding_layers(self, num_layers: int, default: Sequence[bool]) -> tuple[bool, ...]:
        """Returns one flag per layer, from `layer_types`: whether it has a sliding window; `default` if absent."""
        types = self.take("layer_types", list, None)
        if types is None:
            return tuple(default)
        odd = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
        if odd or len(types) != num_layers:
            self.refuse(
                f"layer_types = {types}: expected {num_layers} (num_hidden_layers) of full_attention and "
                "sliding_attention"
            )
            return tuple(default)
        return tuple(kind == "sliding_attention" for kind in types)

    def refuse_unless(self, name: str, *allowed: Any) -> None:
        """Notes a problem unless the field is absent, null or one of `allowed`."""
        self._taken.add(name)
        value = self._fields.get(name)
        if value is not None and value not in allowed:
            self.refuse(f"{name} = {value!r} is not supported (only {', '.join(map(repr, allowed)) or 'null'})")

    def rope(self, *, max_position_embeddings: int, name: str = "rope_parameters") -> Rope:
        """Reads either spelling: `rope_theta` + `rope_scaling`, or `rope_parameters` (transformers 5).

        Args:
            max_position_embeddings: stands for an absent original_max_position_embeddings.
            name: of rope_parameters, for messages.
        """
        self.refuse_unless("partial_rotary_factor", 1)
        theta = self.take("rope_theta", float, None)
        original = self.take("original_max_position_embeddings", int, None)
        old, new = self.take("rope_scaling", dict, None), self.take("rope_parameters", dict, None)
        if old and new and old != new:
            self.refuse("rope_scaling and rope_parameters disagree: delete the wrong one")
        where = name if new else "rope_scaling"
        rope = self.inner(new or old or {}, where)
        inner_theta = rope.take("rope_theta", float, None)
        if theta is not None and inner_theta is not None and theta != inner_theta:
            self.refuse(f"rope_theta = {theta} but {where}.rope_theta = {inner_theta}: delete the wrong one")
        theta = inner_theta or theta or Rope.theta  # 10,000, the default of transformers
        rope.refuse_unless("partial_rotary_factor", 1)
        kind = rope.take_alike(("rope_type", "type"), str, "default")
        if kind not in ("default", "linear", "llama3", "yarn"):
            rope.refuse(f"rope_type = {kind!r} is not supported (only default, linear, llama3, yarn)")
        if kind not in ("linear", "llama3", "yarn"):
            # The other fields are left over from a scaling that was switched off.
            return Rope(theta=theta)
        fields: dict[str, Any] = {"theta": theta, "kind": kind, "factor": rope.take("factor", float)}
        inner_original = rope.take("original_max_position_embeddings", int, None)
        if kind in ("llama3", "yarn"):
            if original is not None and inner_original is not None and original != inner_original:
                rope.refuse(
                    f"original_max_position_embeddings = {inner_original}, but beside {where} it is {original}: "
                    "delete the wrong one"
                )
            fields["original_max_position_embeddings"] = original or inner_original or max_position_embeddings
        if kind == "llama3":
            fields["low_freq_factor"] = rope.take("low_freq_factor", float)
            fields["high_freq_factor"] = rope.take("high_freq_factor", float)
        if kind == "yarn":
            fields["beta_fast"] = rope.take("beta_fast", float, 32.0)
            fields["beta_slow"] = rope.take("beta_slow", float, 1.0)
            fields["truncate"] = rope.take("truncate", bool, True)
            fields["attention_factor"] = _yarn_attention_factor(rope, fields["factor"])
        rope.refuse_unknown()
        return Rope(**fields)

    def refuse_unknown(self) -> None:
        """Notes a problem for each field that was not read and may change the model."""
        for name, value in self._fields.items():
            if name in self._taken or name in HARMLESS or "dropout" in name or not value:  # null, false, 0, empty
                continue
            near = difflib.get_close_matches(name, sorted(self._taken), n=1, cutoff=0.8)
            hint = f" (did you mean {near[0]}?)" if near else ""
            self.refuse(f"{name} = {value!r} is an unknown field{hint}: it may change the model. If not, delete it")

    def finish(self) -> None:
        """Raises ValueError with all problems that were noted."""
        problems = list(dict.fromkeys(self.problems))
        if not problems:
            return
        text = problems[0] if len(problems) == 1 else "\n- ".join([f"{len(problems)} problems", *problems])
        raise ValueError(
            f"{self.source}: {text}\nCorrect the file, use another checkpoint, or, for a teacher, the vllm or "
            "transformers engine"
        )


def _yarn_attention_factor(rope: HFFields, factor: float) -> float:
    given = rope.take("attention_factor", float, None)
    mscale, mscale_all_dim = rope.take("mscale", float, None), rope.take("mscale_all_dim", float, None)
    if given is not None:
        return given

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def hf_fields(config: DecoderConfig) -> dict[str, Any]:
    """Returns the fields of config.json that all families share, in a spelling that all transformers versions read."""
    rope = config.rope
    scaling: dict[str, Any] | None = None
    if rope.kind != "default":
        scaling = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        assert scaling is not None
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
        names = ("low_freq_factor", "high_freq_factor") if rope.kind == "llama3" else _YARN_FIELDS
        scaling.update({name: getattr(rope, name) for name in names})
    return {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
    }


def layer_types(config: DecoderConfig) -> list[str]:
    """Returns `layer_types` of config.json for `config.sliding_layers`."""
    return ["sliding_attention" if sliding else "full_attention" for sliding in config.sliding_layers]


_YARN_FIELDS = ("beta_fast", "beta_slow", "truncate", "attention_factor")
