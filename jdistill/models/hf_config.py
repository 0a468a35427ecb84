"""Reads a Hugging Face config.json field by field, and writes the fields that all families share.

Reading is strict: a field that is not implemented and could change the numbers is an error, never ignored.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

from jdistill.models.config import DecoderConfig, Rope

# Fields of config.json that do not affect the forward pass: any value is accepted.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_internal _commit_hash _name_or_path architectures bos_token_id
    cache_implementation chunk_size_feed_forward dtype eos_token_id id2label keys_to_ignore_at_inference label2id
    max_window_layers model_type num_labels output_attentions output_hidden_states pad_token_id prefix pretraining_tp
    problem_type return_dict sep_token_id task_specific_params tie_last_hidden_states tokenizer_class torch_dtype
    transformers_version unk_token_id unsloth_fixed unsloth_version use_cache do_sample length_penalty max_length
    max_new_tokens min_length num_beams num_return_sequences repetition_penalty temperature top_k top_p
    """.split()
)


class HFFields:
    """The fields of one config.json; `finish` raises for fields that were not read and might change the model."""

    def __init__(self, fields: dict[str, Any], source: str):
        self._fields = dict(fields)
        self._taken: set[str] = set()
        self.source = source

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """Returns the value of a field, or `default` if it is absent or null.

        Raises:
            ValueError: the type is wrong, or the field is absent and there is no default.
        """
        self._taken.add(name)
        value = self._fields.get(name)
        if value is None:
            if default is ...:
                raise ValueError(f"{self.source}: missing field {name!r}: is it a whole config.json of a causal LM?")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and type(value) is int:
            return float(value)
        if type(value) not in kinds:
            raise ValueError(f"{self.source}: {name} = {value!r}: expected {' or '.join(k.__name__ for k in kinds)}")
        return value

    def take_unless_null(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """Like `take`, but null gives None: for fields where null switches a feature off."""
        if name in self._fields and self._fields[name] is None:
            self._taken.add(name)
            return None
        return self.take(name, kind, default)

    def sliding_layers(self, num_layers: int, default: Sequence[bool]) -> tuple[bool, ...]:
        """Returns one flag per layer, from `layer_types`: whether it has a sliding window; `default` if absent."""
        types = self.take("layer_types", list, None)
        if types is None:
            return tuple(default)
        odd = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
        if odd or len(types) != num_layers:
            raise ValueError(
                f"{self.source}: layer_types = {types}: expected {num_layers} (num_hidden_layers) of full_attention "
                "and sliding_attention"
            )
        return tuple(kind == "sliding_attention" for kind in types)

    def refuse_unless(self, name: str, *allowed: Any) -> None:
        """Raises ValueError unless the field is absent, null or one of `allowed`."""
        self._taken.add(name)
        value = self._fields.get(name)
        if value is not None and value not in allowed:
            raise ValueError(
                f"{self.source}: {name} = {value!r} is not supported (only {', '.join(map(repr, allowed))}): "
                "use another checkpoint, or serve it with the vllm or transformers engine"
            )

    def rope(self, *, max_position_embeddings: int) -> Rope:
        """Reads either spelling: `rope_theta` + `rope_scaling`, or `rope_parameters` (transformers 5)."""
        self.refuse_unless("partial_rotary_factor", 1)
        theta = self.take("rope_theta", float, None)
        original = self.take("original_max_position_embeddings", int, None)
        old, new = self.take("rope_scaling", dict, None), self.take("rope_parameters", dict, None)
        if old is not None and new is not None and old != new:
            raise ValueError(f"{self.source}: rope_scaling and rope_parameters disagree: delete the wrong one")
        where = "rope_scaling" if new is None else "rope_parameters"
        rope = HFFields(new or old or {}, f"{self.source}: {where}")
        inner_theta = rope.take("rope_theta", float, None)
        if theta is not None and inner_theta is not None and theta != inner_theta:
            raise ValueError(
                f"{self.source}: rope_theta = {theta} but {where}.rope_theta = {inner_theta}: delete the wrong one"
            )
        theta = inner_theta or theta or Rope.theta  # 10,000, the default of transformers
        rope.refuse_unless("partial_rotary_factor", 1)
        kind = rope.take("type", str, "default")
        kind = rope.take("rope_type", str, kind)
        if kind not in ("default", "linear", "llama3", "yarn"):
            raise ValueError(
                f"{rope.source}.rope_type = {kind!r} is not supported (default, linear, llama3, yarn): "
                "use another checkpoint, or serve it with the vllm or transformers engine"
            )
        if kind == "default":
            # The other fields are left over from a scaling that was switched off.
            return Rope(theta=theta)
        fields: dict[str, Any] = {"theta": theta, "kind": kind, "factor": rope.take("factor", float)}
        if kind in ("llama3", "yarn"):
            inner_original = rope.take("original_max_position_embeddings", int, None)
            fields["original_max_position_embeddings"] = original or inner_original or max_position_embeddings
        if kind == "llama3":
            fields["low_freq_factor"] = rope.take("low_freq_factor", float)
            fields["high_freq_factor"] = rope.take("high_freq_factor", float)
        if kind == "yarn":
            fields["beta_fast"] = rope.take("beta_fast", float, 32.0)
            fields["beta_slow"] = rope.take("beta_slow", float, 1.0)
            fields["truncate"] = rope.take("truncate", bool, True)
            fields["attention_factor"] = _yarn_attention_factor(rope, fields["factor"])
        rope.finish()
        return Rope(**fields)

    def finish(self) -> None:
        """Raises ValueError if a field was not read, is not harmless, and is set to anything but null or false."""
        unknown = {
            name: value
            for name, value in self._fields.items()
            if name not in self._taken | HARMLESS and not (value is None or value is False)
        }
        if unknown:
            name, value = next(iter(unknown.items()))
            near = difflib.get_close_matches(name, sorted(self._taken), n=1, cutoff=0.8)
            raise ValueError(
                f"{self.source}: unknown field {name} = {value!r}"
                + (f" (did you mean {near[0]}?)" if near else "")
                + ": it may change the model, so it is not ignored. If it is irrelevant, delete it from the file"
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
