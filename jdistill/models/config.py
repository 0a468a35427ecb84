"""DecoderConfig: what a decoder is, read strictly from a Hugging Face config.json.

Strict means: a field that would change the numbers and that is not implemented is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

# Fields of config.json that change nothing in the forward pass, so any value is fine.
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


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding. Fields as in Hugging Face's `rope_parameters`.

    Reference:
        Su et al., "RoFormer", 2021; llama3: the Llama 3.1 release; yarn: Peng et al., "YaRN", 2023.
    """

    theta: float = 10_000.0
    kind: str = "default"  # default, linear, llama3, yarn
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dims
    attention_factor: float = 1.0  # yarn: scales cos and sin; resolved when the config is read

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """float32 [head_dim / 2]: radians per position of each rotated pair."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        plain = self.theta**-exponent
        if self.kind == "default":
            frequencies = plain
        elif self.kind == "linear":
            frequencies = plain / self.factor
        elif self.kind == "llama3":
            # Rotations within the original context, from few (interpolate) to many (leave alone).
            rotations = self.original_max_position_embeddings * plain / (2 * math.pi)
            keep = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = np.clip(keep, 0.0, 1.0)
            frequencies = keep * plain + (1 - keep) * plain / self.factor
        else:
            assert self.kind == "yarn", self.kind
            low, high = (self._yarn_dim(beta, head_dim) for beta in (self.beta_fast, self.beta_slow))
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            high += 0.001 if low == high else 0.0  # a ramp of width 0 would divide by 0
            keep = 1 - np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
            frequencies = keep * plain + (1 - keep) * plain / self.factor
        return frequencies.astype(np.float32)

    def _yarn_dim(self, num_rotations: float, head_dim: int) -> float:
        """The (fractional) pair that turns `num_rotations` times within the original context."""
        wavelengths = self.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(self.theta))


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters, which are trained in place of the weights that they stand beside; see models/lora.py."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # parameters of a layer, of LORA_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"LoRA of rank {self.rank} and alpha {self.alpha}: expected at least 1, and more than 0")
        wrong = [name for name in self.targets if name not in LORA_TARGETS]
        if wrong or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"LoRA targets {list(self.targets)}: expected some of {', '.join(LORA_TARGETS)}, each once at most"
            )

    @property
    def scale(self) -> float:
        """What the adapters' outputs are multiplied by."""
        return self.alpha / self.rank


# What adapters can stand beside: the matrices of a layer.
LORA_TARGETS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder's shape and flags. Names as in Hugging Face's config.json where it has one."""

    family: str  # a key of jdistill.models.FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # F, of one expert where there are experts
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    qk_norm: bool = False  # RMSNorm of each head's query and key, before the rotation
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02  # standard deviation of the weights of random_init
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    sliding_window: int | None = None  # how many tokens a sliding layer attends to, its own included
    sliding_layers: tuple[bool, ...] = ()  # one a layer; () where there is no window
    local_rope: Rope | None = None  # of the sliding layers; None: theirs is `rope` too
    query_pre_attn_scalar: float | None = None  # attention logits are q.k / sqrt of this; None: of head_dim
    attention_softcap: float | None = None  # c: attention logits x become c * tanh(x / c)
    final_softcap: float | None = None  # the same for the vocabulary's logits
    norm_plus_one: bool = False  # norms multiply by 1 + weight
    post_norms: bool = False  # norms after attention and MLP too, before the residual is added
    scale_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    num_experts: int = 0  # of each layer's MLP; 0: one dense MLP
    num_experts_per_tok: int = 0  # those with the largest router probabilities
    norm_topk_prob: bool = False  # their probabilities are divided by their sum
    lora: Lora | None = None  # no part of a checkpoint: the adapters that are being trained

    def __post_init__(self) -> None:
        for field in (
            "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim "
            "max_position_embeddings"
        ).split():
            if getattr(self, field) < 1:
                raise ValueError(f"{field} = {getattr(self, field)}: expected at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: rotary embeddings rotate pairs, so it must be even")
        if len(self.sliding_layers) != (0 if self.sliding_window is None else self.num_layers):
            raise ValueError(
                f"sliding_layers has {len(self.sliding_layers)} entries with sliding_window = {self.sliding_window}: "
                f"expected {self.num_layers} (num_layers) with a window, none without"
            )
        if self.local_rope is not None and self.sliding_window is None:
            raise ValueError("local_rope is that of sliding layers, but sliding_window is None")
        for field in ("sliding_window", "query_pre_attn_scalar", "attention_softcap", "final_softcap"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"{field} = {value}: expected more than 0, or None")
        if self.num_experts and (self.hidden_act != "silu" or self.mlp_bias):
            raise ValueError("num_experts with mlp_bias or another hidden_act than silu: no family has that")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok}: expected 1 to num_experts = {self.num_experts}"
            )
        of_experts = {"gate", "up", "down"} & set(self.lora.targets if self.lora else ())
        if self.num_experts and of_experts:
            raise ValueError(
                f"LoRA on {', '.join(sorted(of_experts))} of {self.num_experts} experts is not supported: give targets "
                "query, key, value, output"
            )

    @property
    def attention_scale(self) -> float | None:
        """What attention logits are multiplied by; None: the usual head_dim**-0.5."""
        usual = self.query_pre_attn_scalar in (None, self.head_dim)
        return None if usual else self.query_pre_attn_scalar**-0.5


class HFFields:
    """The fields of one config.json, each to be taken once; `finish` refuses what nobody took and that might matter."""

    def __init__(self, fields: dict[str, Any], source: str):
        self._fields = dict(fields)
        self._taken: set[str] = set()
        self.source = source

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The field's value, checked; `default` (or an error) where it is absent or null."""
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
        """As `take`, but null is None and not the default: where null switches something off."""
        if name in self._fields and self._fields[name] is None:
            self._taken.add(name)
            return None
        return self.take(name, kind, default)

    def sliding_layers(self, num_layers: int, default: Sequence[bool]) -> tuple[bool, ...]:
        """Which layers slide, by `layer_types`; `default` where it is absent."""
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
        """Reads both spellings: `rope_theta` + `rope_scaling`, and `rope_parameters` (transformers 5)."""
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
        theta = inner_theta or theta or Rope.theta  # 10,000: what transformers assumes where it is absent
        rope.refuse_unless("partial_rotary_factor", 1)
        kind = rope.take("type", str, "default")
        kind = rope.take("rope_type", str, kind)
        if kind not in ("default", "linear", "llama3", "yarn"):
            raise ValueError(
                f"{rope.source}.rope_type = {kind!r} is not supported (default, linear, llama3, yarn): "
                "use another checkpoint, or serve it with the vllm or transformers engine"
            )
        if kind == "default":
            # Left-overs of a scaling that is switched off mean nothing.
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
        """Raises ValueError for a field that nobody read and that is set to something."""
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
    """The fields of config.json that all families share, in the spelling that every version of transformers reads."""
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
    """`sliding_layers` as config.json spells it."""
    return ["sliding_attention" if sliding else "full_attention" for sliding in config.sliding_layers]


_YARN_FIELDS = ("beta_fast", "beta_slow", "truncate", "attention_factor")
