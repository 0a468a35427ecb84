"""Options of a training run: everything but the objective, which has a module of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jdistill.config.objective import ObjectiveSection
from jdistill.config.section import Section
from jdistill.config.sidecar import EngineSection
from jdistill.wire.endpoint import parse_endpoints


class LoraSection(Section):
    """Low-rank adapters beside the weights of every layer; only they are trained."""

    rank: int = Field(16, ge=1, description="rank of each adapter")
    alpha: float = Field(32.0, gt=0, description="the adapters' outputs are multiplied by alpha / rank")
    targets: tuple[str, ...] = Field(
        ("query", "key", "value", "output", "gate", "up", "down"),
        strict=False,
        min_length=1,
        description="matrices that get an adapter",
    )


class ModelSection(Section):
    """The student."""

    path: str = Field(description="Hugging Face checkpoint directory: config.json, *.safetensors, tokenizer files")
    init: Literal["checkpoint", "random"] = Field(
        "checkpoint", description="random reads only config.json and the tokenizer, and draws the weights from the seed"
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="dtype of activations and matrix products; master weights are always float32"
    )
    remat: Literal["none", "layer"] = Field(
        "layer", description="layer keeps only each layer's input for the backward pass; none keeps every activation"
    )
    lora: LoraSection | None = Field(
        None,
        description="train low-rank adapters only, with the model frozen in compute_dtype; null: train all weights",
    )

    @model_validator(mode="after")
    def _adapts_something(self) -> ModelSection:
        if self.lora is not None and self.init == "random":
            raise ValueError("model.lora adapts a pretrained model, and init: random has no pretrained weights")
        return self


class TaskSection(Section):
    """Where prompts and rewards come from."""

    name: str = Field(description="name of a task in jdistill.tasks.TASKS")
    options: dict[str, Any] = Field({}, description="the task's own options, which the task checks")


class SpawnSection(EngineSection):
    """A sidecar that the trainer starts and stops."""

    python: str | None = Field(
        None, description="Python interpreter of the teacher's environment; null: the trainer's interpreter"
    )
    env: dict[str, str] = Field(
        {},
        description="environment variables to add; CUDA_VISIBLE_DEVICES (or HIP_VISIBLE_DEVICES) names the sidecar's "
        "GPUs, which the student leaves alone; without it the sidecar gets the first ones",
    )
    startup_timeout_s: float = Field(
        600.0, description="seconds until the sidecar must answer; a 14B model on a network disk takes minutes"
    )


class TeacherSection(Section):
    """How to reach the teacher. Give exactly one of endpoints, several and spawn."""

    endpoints: list[str] | None = Field(
        None, description='running sidecars of one teacher, each as "host:port" or "unix:/path"'
    )
    several: dict[str, list[str]] | None = Field(
        None, description="several teachers: name -> endpoints; the task chooses the teacher of each problem"
    )
    spawn: SpawnSection | None = Field(None, description="a sidecar that the trainer starts and stops")
    deadline_s: float = Field(
        600.0, description="seconds for one batch over all attempts: how long a dead teacher may stay away"
    )
    max_in_flight: int = Field(4, description="calls in flight at each endpoint")
    batch_tokens: int = Field(16384, description="tokens per call")
    hedge_after_s: float | None = Field(
        1.0,
        description="seconds after which a call far slower than the others also goes to a second replica; null: never",
    )
    stall_s: float = Field(
        120.0, description="seconds of silence after which a replica with work is given up for a while"
    )
    model: str = Field(
        "", description="model name at the sidecar: an adapter's name or the served name; empty: the base model"
    )
    offload: bool = Field(False, description="the teacher frees its GPU memory except while a rollout is scored")
    privileged: bool = Field(
        False, description="the teacher sees the task's privileged prompt (e.g. with the solution), not the student's"
    )
    tokenizer: str | None = Field(
        None, description="directory of the teacher's tokenizer; null: the teacher has the student's tokenizer"
    )
    tls_ca: str | None = Field(None, description="PEM file: authority that signed the sidecars' certificates")
    tls_cert: str | None = Field(
        None, description="PEM file: the trainer's own certificate, if the sidecar asks for one (mTLS)"
    )
    tls_key: str | None = Field(None, description="PEM file: private key of tls_cert")
    token_file: str | None = Field(
        None, description="file with the bearer token; it is read again when the teacher refuses the token"
    )

    @model_validator(mode="after")
    def _one_way(self) -> TeacherSection:
        if sum(way is not None for way in (self.endpoints, self.several, self.spawn)) != 1:
            raise ValueError(
                "give exactly one of teacher.endpoints (running sidecars), teacher.several (several teachers) and "
                "teacher.spawn (the trainer starts a sidecar)"
            )
        for key, endpoints in {"endpoints": self.endpoints, **(self.several or {})}.items():
            if endpoints is not None:
                parse_endpoints(endpoints, "teacher.endpoints" if key == "endpoints" else f"teacher.several.{key}")
        credentials = [name for name in ("tls_ca", "tls_cert", "tls_key", "token_file") if getattr(self, name)]
        if self.spawn is not None and credentials:
            raise ValueError(
                f"teacher.{credentials[0]} is for teacher.endpoints; the trainer reaches a sidecar that it starts over "
                "loopback, without TLS or token"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("teacher.tls_cert and teacher.tls_key belong together: give both or none")
        return self


class RolloutSection(Section):
    """How the student samples."""

    num_prompts: int = Field(16, ge=1, description="prompts per step (P)")
    num_completions: int = Field(8, ge=1, description="completions per prompt (G); GRPO needs at least 2")
    max_prompt_tokens: int = Field(512, ge=1, description="longest prompt, in tokens")
    max_new_tokens: int = Field(512, ge=1, description="longest completion, in tokens")
    temperature: float = Field(
        1.0, gt=0, description="temperature of the student's sampling, the student's loss and the teacher's scores"
    )
    min_new_tokens: int = Field(
        0, ge=0, description="tokens that a completion has before any stop token or the end of any stop string"
    )
    top_k: int | None = Field(None, ge=1, description="sample from the k most likely tokens; null: off")
    top_p: float | None = Field(
        None, gt=0, le=1, description="sample from the fewest tokens whose probabilities reach top_p; null: off"
    )
    min_p: float | None = Field(
        None, gt=0, le=1, description="sample from tokens with min_p times the top probability or more; null: off"
    )
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), strict=False, description="strings that end a completion, besides the task's stop tokens"
    )
    include_stop_str_in_output: bool = Field(
        False, description="the reward sees the stop token or stop string that ended the completion, too"
    )
    max_rows: int | None = Field(None, ge=1, description="sequences decoded at once; null: all of a step")
    cache_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="dtype of cached keys and values; null: model.compute_dtype"
    )
    chunk_tokens: int = Field(16, ge=1, description="decoding steps between two checks for completions that have ended")
    ahead: int = Field(
        0, ge=0, le=1, description="1 samples a step's batch before the previous step's update (one update off-policy)"
    )

    @model_validator(mode="after")
    def _lengths(self) -> RolloutSection:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens = {self.min_new_tokens} is above max_new_tokens = {self.max_new_tokens}")
        return self

    @property
    def max_length(self) -> int:
        """Longest prompt and completion together, in tokens."""
        return self.max_prompt_tokens + self.max_new_tokens

    @property
    def is_truncated(self) -> bool:
        """Whether tokens are sampled from a part of the distribution."""
        return self.top_k is not None or self.min_p is not None or self.top_p not in (None, 1)


class OptimizerSection(Section):
    """The optimizer, its learning rate, and how a step's batch is cut into updates."""

    name: str = Field("adamw", description="adamw, lion, adafactor, muon or sgd")
    learning_rate: float = Field(1e-6, gt=0, description="learning rate after the warm-up")
    b1: float | None = Field(
        None, ge=0, lt=1, description="decay of the first moment; null: the optimizer's default (adamw: 0.9)"
    )
    b2: float | None = Field(
        None, ge=0, lt=1, description="decay of the second moment; null: the optimizer's default (adamw: 0.95)"
    )
    eps: float | None = Field(None, gt=0, description="null: the optimizer's default (adamw: 1e-8)")
    moment_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype of the moments; bfloat16 halves their memory, with stochastic rounding"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the global gradient")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate from the warm-up to the last step"
    )
    end_factor: float = Field(
        0.05, ge=0, le=1, description="linear, cosine: learning rate of the last step, as a share of learning_rate"
    )
    minibatches: int = Field(1, ge=1, description="updates per step; 1 is strictly on-policy")
    accumulate: int = Field(
        1, ge=1, description="parts of one update, computed one after another: memory for one part at a time"
    )
    packing: bool = Field(False, description="pack rows without their padding; pays off if lengths differ")
    batch_size: int = Field(64, ge=1, description="supervised only: sequences per step")


class EvalSection(Section):
    """Evaluation on held-out problems."""

    every: int = Field(25, ge=0, description="steps between evaluations; 0: never")
    num_prompts: int = Field(256, ge=1, description="held-out problems")
    greedy: bool = Field(True, description="evaluate greedily too, besides sampling at rollout.temperature")


class CheckpointSection(Section):
    """When to save, and how many checkpoints to keep."""

    every: int = Field(50, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints to keep")


class MeshSection(Section):
    """Devices on each mesh axis. At most one axis may be -1: all devices that are left."""

    data: int = Field(-1, description="devices that split the batch, each with all parameters")
    fsdp: int = Field(1, description="devices that split the batch and the parameters")
    tensor: int = Field(1, description="devices that split each layer")


class TrainConfig(Section):
    """`jdistill train`: one YAML file is one run."""

    run_dir: str = Field(description="directory for metrics, checkpoints and the teacher's log")
    seed: int = Field(0, description="seed of sampling, data order and random weights")
    num_steps: int = Field(ge=1, description="steps: one rollout each, and optimizer.minibatches updates")
    model: ModelSection = Field(description="the student")
    task: TaskSection = Field(description="prompts and rewards")
    teacher: TeacherSection | None = Field(None, description="how to reach the teacher; null: no distillation")
    rollout: RolloutSection = Field(RolloutSection(), description="sampling")
    objective: ObjectiveSection = Field(ObjectiveSection(), description="the loss")
    optimizer: OptimizerSection = Field(OptimizerSection(), description="optimizer, learning rate, updates")
    eval: EvalSection = Field(EvalSection(), description="held-out evaluation")
    checkpoint: CheckpointSection = Field(CheckpointSection(), description="checkpoints")
    mesh: MeshSection = Field(MeshSection(), description="devices")

    @model_validator(mode="after")
    def _relations(self) -> TrainConfig:
        objective = self.objective
        unsaid = "distill_loss_weight" not in objective.model_fields_set
        if objective.kind == "on_policy" and self.teacher is not None and unsaid:
            raise ValueError(
                "teacher: objective.distill_loss_weight is not given, and with its default of 0 the teacher would do "
                "nothing: set it above 0 to distil, or to 0 to train with the reward alone"
            )
        if objective.kind == "supervised":
            return self._check_parts(self.optimizer.batch_size, "optimizer.batch_size")
        if objective.has_distillation and self.teacher is None:
            raise ValueError(
                "objective.distill_loss_weight > 0 needs a teacher: set teacher.endpoints or teacher.spawn, "
                "or set objective.distill_loss_weight: 0"
            )
        needs_group = objective.advantage not in ("gae", "reinforce_plus_plus")
        if objective.has_rl and needs_group and self.rollout.num_completions < 2:
            raise ValueError(
                f"objective.advantage: {objective.advantage} compares completions of one prompt: "
                "rollout.num_completions must be at least 2"
            )
        if objective.overlong_buffer > self.rollout.max_new_tokens:
            raise ValueError(
                f"objective.overlong_buffer = {objective.overlong_buffer} is more than rollout.max_new_tokens = "
                f"{self.rollout.max_new_tokens}"
            )
        if self.rollout.ahead and self.teacher is not None and self.teacher.offload:
            raise ValueError(
                "rollout.ahead: the teacher scores while the next batch is sampled, but teacher.offload puts it to "
                "sleep then: drop one of the two"
            )
        num_rows = self.rollout.num_prompts * self.rollout.num_completions
        return self._check_parts(num_rows, "rollout.num_prompts * rollout.num_completions")

    def _check_parts(self, num_rows: int, what: str) -> TrainConfig:
        section = self.optimizer
        if num_rows % (section.minibatches * section.accumulate):
            times = f" * optimizer.accumulate = {section.accumulate}" if section.accumulate > 1 else ""
            raise ValueError(
                f"optimizer.minibatches = {section.minibatches}{times} does not divide {what} = {num_rows}"
            )
        return self
