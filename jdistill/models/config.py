"""Describes a decoder: its sizes and flags, rotary embeddings and LoRA adapters."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding, with the fields of Hugging Face's `rope_parameters`.

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
    truncate: bool = True  # yarn: round the ends of the ramp to whole dims
    attention_factor: float = 1.0  # yarn: scales cos and sin; resolved when the config is read

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Returns the radians per position of each rotated pair, float32 [head_dim / 2]."""
        exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
        plain = self.theta**-exponent
        if self.kind == "default":
            frequencies = plain
        elif self.kind == "linear":
            frequencies = plain / self.factor
        elif self.kind == "llama3":
            # Pairs with few rotations within the original context are interpolated, those with many are kept.
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
        """Returns the (fractional) index of the pair that turns `num_rotations` times within the original context."""
        wavelengths = self.original_max_position_embeddings / (num_rotations * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(self.theta))


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters, trained instead of the weights that they are added to; see models/lora.py."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # names from LORA_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"LoRA with rank {self.rank} and alpha {self.alpha}: expected rank >= 1 and alpha > 0")
        wrong = [name for name in self.targets if name not in LORA_TARGETS]
        if wrong or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"LoRA targets {list(self.targets)}: expected one or more of {', '.join(LORA_TARGETS)}, without repeats"
            )

    @property
    def scale(self) -> float:
        """Factor of the adapters' outputs."""
        return self.alpha / self.rank


# The matrices of a layer that can have an adapter.
LORA_TARGETS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and flags of a decoder, named as in Hugging Face's config.json where it has the field."""

    family: str  # a key of families.FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # F; with experts: the width of one expert
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: Rope = Rope()
    qk_norm: bool = False  # RMSNorm on each head's query and key, before the rotation
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02  # standard deviation of the weights that random_init draws
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    sliding_window: int | None = None  # tokens that a query of a sliding layer sees, its own included
    sliding_layers: tuple[bool, ...] = ()  # one flag per layer; () without a window
    local_rope: Rope | None = None  # for the sliding layers; None: they use `rope` too
    query_pre_attn_scalar: float | None = None  # attention logits are q.k / sqrt(this); None: head_dim
    attention_softcap: float | None = None  # c: attention logits x become c * tanh(x / c)
    final_softcap: float | None = None  # the same for the logits over the vocabulary
    norm_plus_one: bool = False  # norms multiply by 1 + weight
    post_norms: bool = False  # further norms on the outputs of attention and MLP, before the residual sum
    scale_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    num_experts: int = 0  # per layer; 0: one dense MLP
    num_experts_per_tok: int = 0  # experts per token: those with the largest router probabilities
    norm_topk_prob: bool = False  # divide the probabilities of a token's experts by their sum
    lora: Lora | None = None  # adapters being trained; config.json does not have this

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
            raise ValueError("local_rope is for sliding layers, but sliding_window is None")
        for field in ("sliding_window", "query_pre_attn_scalar", "attention_softcap", "final_softcap"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"{field} = {value}: expected more than 0, or None")
        if self.num_experts and (self.hidden_act != "silu" or self.mlp_bias):
            raise ValueError("num_experts needs hidden_act = silu and no mlp_bias: no family has another combination")
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
        """Factor of the products of queries and keys; None: the default, head_dim**-0.5."""
        usual = self.query_pre_attn_scalar in (None, self.head_dim)
        return None if usual else self.query_pre_attn_scalar**-0.5
