"""Options of the objective: what the reward trains, what the teacher trains, and how much each counts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jdistill.config.section import Section


class ScheduleSection(Section):
    """A weight that changes over the run: `{kind: linear, begin: 1.0, end: 0.0}`."""

    kind: Literal["linear", "cosine", "kdrl"] = Field(
        description="linear, cosine: from begin to end over num_steps; kdrl: decrement less at each step"
    )
    begin: float = Field(ge=0, description="weight at the first step")
    end: float = Field(ge=0, description="weight after the schedule, and its lower bound for kdrl")
    num_steps: int | None = Field(
        None, ge=1, description="linear, cosine: step at which end is reached; null: the last step"
    )
    decrement: float | None = Field(None, gt=0, description="kdrl: how much the weight falls at each step")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> ScheduleSection:
        if (self.kind == "kdrl") != (self.decrement is not None):
            raise ValueError("kind: kdrl needs decrement, and only kdrl takes it; linear and cosine take num_steps")
        if self.kind == "kdrl" and (self.num_steps is not None or self.end > self.begin):
            raise ValueError(
                "kdrl falls from begin to end by decrement per step: it takes no num_steps, and end <= begin"
            )
        if self.begin == self.end:
            raise ValueError(f"begin and end are both {self.begin:g}: a weight that does not change is a number")
        return self


Weight = Annotated[float, Field(ge=0)] | ScheduleSection


class BehaviorSection(Section):
    """Corrects for a sampler whose policy is older than the trainer's or rounds differently (decoupled PPO).

    Needs `proximal: recomputed`. Each token's loss is multiplied by exp(proximal - sampler).
    """

    action: Literal["clamp", "mask"] = Field(
        "clamp",
        description="clamp the weight to lower and upper (truncated importance sampling), or mask what lies outside "
        "(rejection)",
    )
    level: Literal["token", "sequence"] = Field(
        "token", description="one weight per token, or one per sequence: the geometric mean of its tokens' ratios"
    )
    lower: float | None = Field(None, ge=0, le=1, description="lower bound of the weight; null: none")
    upper: float | None = Field(2.0, ge=1, description="upper bound of the weight; null: none")

    @model_validator(mode="after")
    def _bounded(self) -> BehaviorSection:
        if self.action == "mask" and self.lower is None and self.upper is None:
            raise ValueError("action: mask rejects what is outside lower and upper, and neither is given: set upper")
        return self


class ReferenceSection(Section):
    """A KL to a frozen model, as a term of the loss."""

    path: str = Field(
        description="Hugging Face directory with the student's architecture and tokenizer; usually model.path"
    )
    weight: Weight = Field(0.001, description="weight of the term: a number or a schedule")
    estimator: str = Field("reverse_kl", description="reverse_kl (k2), straight_through_reverse_kl or forward_kl (k3)")


class ObjectiveSection(Section):
    """The loss: weighted policy, distillation, reference and value terms. See docs/objectives.md."""

    kind: Literal["on_policy", "supervised"] = Field(
        "on_policy",
        description="on_policy trains on the student's own samples, supervised on the task's solutions",
    )
    # The reward's side.
    rl_loss_weight: Weight = Field(1.0, description="weight of the policy loss: a number or a schedule; 0: no RL")
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "gae"] = Field(
        "grpo", description="how rewards become advantages; gae trains a value head"
    )
    policy: Literal["ppo_clip", "gspo", "cispo", "sapo"] = Field("ppo_clip", description="the policy loss")
    clip_low: float | None = Field(
        None, gt=0, description="the ratio is clipped below at 1 - clip_low; null: the value of the policy's authors"
    )
    clip_high: float | None = Field(
        None,
        gt=0,
        description="the ratio is clipped above at 1 + clip_high; null: clip_low (cispo: 4); DAPO sets it above "
        "clip_low",
    )
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="ppo_clip: upper bound of the loss, in multiples of abs(advantage), for tokens with a negative "
        "advantage; null: off",
    )
    tau_positive: float = Field(1.0, gt=0, description="sapo: temperature of the gate where the advantage is positive")
    tau_negative: float = Field(1.05, gt=0, description="sapo: temperature of the gate where the advantage is negative")
    proximal: Literal["sampler", "recomputed"] = Field(
        "sampler",
        description="denominator of the ratio: the sampler's log-probs, or log-probs recomputed with the parameters at "
        "the start of the step",
    )
    behavior: BehaviorSection | None = Field(
        None, description="correction for the sampler, with proximal: recomputed; null: none"
    )
    discount: float = Field(1.0, gt=0, le=1, description="gae: discount of later rewards, per token")
    gae_lambda: float = Field(
        0.95, ge=0, le=1, description="gae: 0 trusts the value head (biased), 1 trusts the rewards (noisy)"
    )
    value_loss_weight: float = Field(0.5, gt=0, description="gae: weight of the value head's loss")
    value_clip: float | None = Field(
        None, gt=0, description="gae: how far a value may move in one step, in units of the return; null: no limit"
    )
    dynamic_sampling: int = Field(
        0,
        ge=0,
        description="DAPO: rounds of prompts at most, until every group's rewards differ; 0: one round, no filter",
    )
    overlong_buffer: int = Field(
        0, ge=0, description="DAPO: the last tokens before max_new_tokens, which cost up to 1 of reward; 0: off"
    )
    reference: ReferenceSection | None = Field(None, description="KL to a frozen reference model; null: none")
    # The teacher's side.
    distill_loss_weight: Weight = Field(
        0.0,
        description="weight of the distillation term: a number or a schedule; 0: no teacher. With a teacher it must be "
        "given",
    )
    distillation: str = Field(
        "auto",
        description="the estimator, by a name in docs/objectives.md; auto: topk_reverse_kl where the engine can score "
        "candidates, else sampled_reverse_kl",
    )
    distill_placement: Literal["advantage", "loss"] | None = Field(
        None, description="where a sampled estimator goes; null: where its gradient is right"
    )
    distill_top_k: int = Field(8, ge=1, description="candidates per token (K) of the top-k estimators")
    distill_candidates: Literal["student", "teacher"] | None = Field(
        None, description="whose K most likely tokens are the candidates; null: the estimator's best choice"
    )
    distill_tail: bool = Field(
        True, description="put all other tokens into one bucket; false ignores the mass outside the candidates"
    )
    distill_beta: float = Field(0.5, gt=0, lt=1, description="topk_jsd: weight of the teacher in the mixture")
    distill_discount: float = Field(
        0.0,
        ge=0,
        le=1,
        description="sampled_reverse_kl as an advantage: 0 counts the token alone (myopic), 1 the full return-to-go",
    )
    distill_clip: float | None = Field(
        None, gt=0, description="bound of each token's distillation advantage or loss, in nats; null: off"
    )
    distill_where: Literal["all", "wrong"] = Field(
        "all", description="wrong: distil only completions with a reward below distill_threshold (KDRL)"
    )
    distill_threshold: float = Field(0.5, description="reward below which a completion counts as wrong")
    distill_entropy_weight: float = Field(
        0.0, ge=0, description="larger values weigh tokens at which the student is uncertain more; 0: all the same"
    )
    teacher_weights: dict[str, float] = Field(
        {}, description="factor on distill_loss_weight for each name in teacher.several; names left out count 1"
    )
    reduction: Literal["token_mean", "sequence_mean", "constant"] = Field(
        "token_mean",
        description="mean over tokens, mean over sequences, or the sum over rows * max_new_tokens (constant)",
    )
    chunk_tokens: int = Field(
        256, ge=1, description="tokens whose logits exist at the same time; a large GPU takes more"
    )

    @property
    def has_rl(self) -> bool:
        """Whether the reward trains anything, at any step."""
        return self.kind == "on_policy" and self.rl_loss_weight != 0

    @property
    def has_distillation(self) -> bool:
        """Whether a teacher is needed, at any step."""
        return self.kind == "on_policy" and self.distill_loss_weight != 0

    @model_validator(mode="after")
    def _contradictions(self) -> ObjectiveSection:
        if self.kind == "on_policy" and not self.has_rl and not self.has_distillation:
            raise ValueError("rl_loss_weight and distill_loss_weight are both 0: nothing would be trained")
        if self.behavior is not None and self.proximal != "recomputed":
            raise ValueError(
                "behavior weighs exp(proximal - sampler), which is 1 with proximal: sampler; set proximal: recomputed"
            )
        if self.value_clip is not None and self.advantage != "gae":
            raise ValueError(
                "value_clip bounds the value head, which only advantage: gae has; set that or drop value_clip"
            )
        if self.dual_clip is not None and self.policy != "ppo_clip":
            raise ValueError(f"dual_clip belongs to policy: ppo_clip, got policy: {self.policy}")
        if self.advantage == "gae" and not self.has_rl:
            raise ValueError("advantage: gae with rl_loss_weight: 0 leaves no reward for its value head")
        return self
