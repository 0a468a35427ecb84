"""YAML files plus dotted overrides -> frozen, typed, strict configuration.

pydantic checks types and relations (it is what vLLM and most of the field use); ruamel.yaml reads YAML 1.2, in which
`1e-5` is a number (PyYAML reads YAML 1.1, where it is a string).
"""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what was expected and the nearest valid key."""


class Section(pydantic.BaseModel):
    """Base of all sections: frozen, strict, no unknown keys."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class LoraSection(Section):
    """Adapters of low rank beside the weights of every layer; they alone are trained."""

    rank: int = pydantic.Field(16, ge=1)
    alpha: float = pydantic.Field(32.0, gt=0)  # the adapters' outputs are multiplied by alpha / rank
    targets: tuple[str, ...] = pydantic.Field(
        ("query", "key", "value", "output", "gate", "up", "down"), strict=False, min_length=1
    )


class ModelSection(Section):
    path: str  # a Hugging Face checkpoint directory: config.json, *.safetensors, tokenizer files
    init: Literal["checkpoint", "random"] = "checkpoint"  # random: only config.json and the tokenizer are read
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # masters are float32 always
    remat: Literal["none", "layer"] = "layer"  # layer: keep only each layer's input for the backward pass
    lora: LoraSection | None = None  # train adapters alone; the rest stays as it is, in compute_dtype

    @pydantic.model_validator(mode="after")
    def _adapts_something(self) -> ModelSection:
        if self.lora is not None and self.init == "random":
            raise ValueError("model.lora adapts a model that knows something: init: random has nothing to adapt")
        return self


class TaskSection(Section):
    name: str  # a key of jdistill.tasks.TASKS
    options: dict[str, Any] = {}  # fields of that task's own config, checked there


class EngineSection(Section):
    """Which model, in which engine, of which size; what the engine cannot do it refuses at start."""

    engine: str  # a key of jdistill.sidecar.engines.ENGINES
    model: str  # checkpoint directory; in front of a running server (urls): at least its config.json and tokenizer
    urls: list[str] | None = None  # vllm-http, sglang-http: servers that run
    served_name: str | None = None  # default: the directory's name
    adapters: dict[str, str] = {}  # LoRA adapters: name that clients use -> PEFT directory
    dtype: str = "auto"  # auto: the checkpoint's
    quantization: str | None = None  # the engine's own name of it, e.g. fp8; None: as the checkpoint says
    max_sequence_length: int | None = None  # default: the checkpoint's
    tensor_parallel_size: int = pydantic.Field(1, ge=1)
    pipeline_parallel_size: int = pydantic.Field(1, ge=1)
    data_parallel_size: int = pydantic.Field(1, ge=1)
    memory_fraction: float | None = pydantic.Field(None, gt=0, le=1)  # share of each GPU's memory; None: the engine's
    max_batch_tokens: int = pydantic.Field(16384, ge=1)  # transformers, jax: tokens of one forward pass
    offload: bool = False  # allow Sleep and Wake, which free the GPU's memory between scoring phases
    engine_args: dict[str, Any] = {}  # passed to the engine by name, checked there


class SpawnSection(EngineSection):
    """A sidecar that the trainer starts and takes down."""

    python: str | None = None  # interpreter of the teacher's own environment; default: the trainer's
    env: dict[str, str] = {}  # added to the process's environment, e.g. CUDA_VISIBLE_DEVICES
    startup_timeout_s: float = 600.0  # loading a 14B model from a network disk takes minutes


class TeacherSection(Section):
    endpoints: list[str] | None = None  # running sidecars of one teacher, "host:port"; or:
    several: dict[str, list[str]] | None = None  # of several teachers by name; the task says who scores what; or:
    spawn: SpawnSection | None = None
    deadline_s: float = 600.0  # over all attempts of one batch: how long a dead teacher may stay away
    max_in_flight: int = 4  # calls in flight for each endpoint
    batch_tokens: int = 16384  # tokens of one call
    hedge_after_s: float | None = 1.0  # a call later than this, and far later than others, goes to a second replica too
    stall_s: float = 120.0  # a replica that is silent for so long while it has work is given up
    model: str = ""  # which of the sidecar's models: an adapter's or the served name; "": the base model
    offload: bool = False  # the teacher frees its GPU memory except while a finished rollout is scored
    privileged: bool = False  # it sees the task's privileged prompt (with the solution, say) in place of the student's
    tokenizer: str | None = None  # directory of its tokenizer, where that is not the student's
    tls_ca: str | None = None  # PEM file: the authority that signed the sidecars' certificates
    tls_cert: str | None = None  # PEM file: our own certificate, where the sidecar asks for one (mTLS)
    tls_key: str | None = None
    token_file: str | None = None  # holds the bearer token; read again when the teacher refuses it

    @pydantic.model_validator(mode="after")
    def _one_way(self) -> TeacherSection:
        if sum(way is not None for way in (self.endpoints, self.several, self.spawn)) != 1:
            raise ValueError(
                "give exactly one of teacher.endpoints (sidecars that run), teacher.several (of several teachers) and "
                "teacher.spawn (the trainer starts one)"
            )
        credentials = [name for name in ("tls_ca", "tls_cert", "tls_key", "token_file") if getattr(self, name)]
        if self.spawn is not None and credentials:
            raise ValueError(
                f"teacher.{credentials[0]} is for teacher.endpoints; a sidecar that the trainer starts is reached over "
                "loopback, without TLS or token"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("teacher.tls_cert and teacher.tls_key belong together: give both or none")
        return self


class RolloutSection(Section):
    num_prompts: int = pydantic.Field(16, ge=1)  # P, prompts a step
    num_completions: int = pydantic.Field(8, ge=1)  # G, completions a prompt; GRPO needs at least 2
    max_prompt_tokens: int = pydantic.Field(512, ge=1)
    max_new_tokens: int = pydantic.Field(512, ge=1)
    temperature: float = pydantic.Field(1.0, gt=0)  # of the student's sampling, the student's loss and the teacher
    min_new_tokens: int = pydantic.Field(0, ge=0)  # no stop token before so many
    top_k: int | None = pydantic.Field(None, ge=1)  # of these three see rollout/sampler.py; None: off
    top_p: float | None = pydantic.Field(None, gt=0, le=1)
    min_p: float | None = pydantic.Field(None, gt=0, le=1)
    stop_strings: tuple[str, ...] = pydantic.Field((), strict=False)  # beside the task's stop tokens
    max_rows: int | None = pydantic.Field(None, ge=1)  # sequences decoded at once; None: all of a step
    cache_dtype: Literal["float32", "bfloat16"] | None = None  # of keys and values; None: model.compute_dtype
    chunk_tokens: int = pydantic.Field(16, ge=1)  # decode steps between two looks at which sequences have ended
    ahead: int = pydantic.Field(0, ge=0, le=1)  # 1: a step's batch is sampled before the last step's update

    @pydantic.model_validator(mode="after")
    def _lengths(self) -> RolloutSection:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens = {self.min_new_tokens} is above max_new_tokens = {self.max_new_tokens}")
        return self

    @property
    def is_truncated(self) -> bool:
        """Whether tokens are sampled from a part of the distribution."""
        return (self.top_k, self.top_p, self.min_p) != (None, None, None)


class ScheduleSection(Section):
    """A weight that changes over the run: `{kind: linear, begin: 1.0, end: 0.0}`."""

    kind: Literal["linear", "cosine", "kdrl"]
    begin: float = pydantic.Field(ge=0)
    end: float = pydantic.Field(ge=0)
    num_steps: int | None = pydantic.Field(None, ge=1)  # linear, cosine: when `end` is reached; None: at the last step
    decrement: float | None = pydantic.Field(None, gt=0)  # kdrl: by how much less each step

    @pydantic.model_validator(mode="after")
    def _fits_its_kind(self) -> ScheduleSection:
        if (self.kind == "kdrl") != (self.decrement is not None):
            raise ValueError("decrement belongs to kind: kdrl, which needs it; linear and cosine have num_steps")
        if self.kind == "kdrl" and (self.num_steps is not None or self.end > self.begin):
            raise ValueError("kdrl goes from begin down to end by decrement a step: no num_steps, and end <= begin")
        return self


Weight = Annotated[float, pydantic.Field(ge=0)] | ScheduleSection


class BehaviorSection(Section):
    """Corrects for a sampler whose policy is older than the trainer's, or rounds otherwise (decoupled PPO)."""

    action: Literal["clamp", "mask"] = "clamp"  # clamp: truncated importance sampling; mask: rejection
    level: Literal["token", "sequence", "sequence_product"] = "token"
    lower: float | None = pydantic.Field(None, ge=0, le=1)  # of the weight exp(proximal - sampler)
    upper: float | None = pydantic.Field(2.0, ge=1)

    @pydantic.model_validator(mode="after")
    def _bounded(self) -> BehaviorSection:
        if self.action == "mask" and self.lower is None and self.upper is None:
            raise ValueError("action: mask rejects what is outside lower and upper, and neither is given: set upper")
        return self


class ReferenceSection(Section):
    """A KL to a frozen model, as a term of the loss."""

    path: str  # Hugging Face directory of the student's own architecture and tokenizer; usually model.path
    weight: Weight = 0.001
    estimator: str = "reverse_kl"  # reverse_kl (k2), straight_through_reverse_kl, forward_kl (k3)


class ObjectiveSection(Section):
    kind: Literal["on_policy", "supervised"] = "on_policy"
    # the reward's side
    rl_loss_weight: Weight = 1.0
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "gae"] = "grpo"
    policy: Literal["ppo_clip", "gspo", "cispo", "sapo"] = "ppo_clip"
    clip_low: float | None = pydantic.Field(None, gt=0)  # None: what the policy's authors use
    clip_high: float | None = pydantic.Field(None, gt=0)  # None: as clip_low (cispo: 4); larger: DAPO's clip-higher
    dual_clip: float | None = pydantic.Field(None, gt=1)  # ppo_clip: bounds the loss of bad tokens grown likely
    tau_positive: float = pydantic.Field(1.0, gt=0)  # sapo: temperature of its gate where the advantage is positive
    tau_negative: float = pydantic.Field(1.05, gt=0)
    proximal: Literal["sampler", "recomputed"] = "sampler"  # what the ratio is relative to; see behavior
    behavior: BehaviorSection | None = None  # with proximal: recomputed
    discount: float = pydantic.Field(1.0, gt=0, le=1)  # gae
    gae_lambda: float = pydantic.Field(0.95, ge=0, le=1)  # gae
    value_loss_weight: float = pydantic.Field(0.5, gt=0)  # gae: of the value head's loss
    value_clip: float | None = pydantic.Field(None, gt=0)  # gae: how far a value may move in one step
    dynamic_sampling: int = pydantic.Field(0, ge=0)  # DAPO: rounds of prompts at most, until all groups have signal
    overlong_buffer: int = pydantic.Field(0, ge=0)  # DAPO: the last tokens of max_new_tokens cost up to 1 of reward
    reference: ReferenceSection | None = None
    # the teacher's side
    distill_loss_weight: Weight = 0.0
    # auto: topk_reverse_kl where the engine can score candidates, else sampled_reverse_kl; names in docs/objectives.md
    distillation: str = "auto"
    distill_placement: Literal["advantage", "loss"] | None = None  # of a sampled estimator; None: where it is right
    distill_top_k: int = pydantic.Field(8, ge=1)  # K of the distributions
    distill_candidates: Literal["student", "teacher"] | None = None  # whose K most likely tokens; None: what fits best
    distill_tail: bool = True  # one bucket for all other tokens; false ignores what happens there
    distill_beta: float = pydantic.Field(0.5, gt=0, lt=1)  # topk_jsd
    distill_discount: float = pydantic.Field(0.0, ge=0, le=1)  # sampled_reverse_kl: 0 myopic, 1 full return-to-go
    distill_clip: float | None = pydantic.Field(None, gt=0)  # bounds each token's distillation advantage or loss
    distill_where: Literal["all", "wrong"] = "all"  # wrong: only completions below distill_threshold (KDRL)
    distill_threshold: float = 0.5  # of the reward
    distill_entropy_weight: float = pydantic.Field(0.0, ge=0)  # more weight where the student is uncertain; 0: the same
    teacher_weights: dict[str, float] = {}  # of each of teacher.several, times distill_loss_weight; default 1
    reduction: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"  # constant: over rows * max_new_tokens
    chunk_tokens: int = pydantic.Field(256, ge=1)  # tokens whose logits exist at once; more on a large GPU

    @property
    def has_rl(self) -> bool:
        """Whether the reward trains anything, at any step."""
        return self.kind == "on_policy" and self.rl_loss_weight != 0

    @property
    def has_distillation(self) -> bool:
        """Whether a teacher is needed, at any step."""
        return self.kind == "on_policy" and self.distill_loss_weight != 0

    @pydantic.model_validator(mode="after")
    def _contradictions(self) -> ObjectiveSection:
        if self.kind == "on_policy" and not self.has_rl and not self.has_distillation:
            raise ValueError("rl_loss_weight and distill_loss_weight are both 0: nothing would be trained")
        if self.behavior is not None and self.proximal != "recomputed":
            raise ValueError(
                "behavior weighs exp(proximal - sampler), which is 1 with proximal: sampler; set proximal: recomputed"
            )
        gae_only = {"value_clip": self.value_clip} if self.advantage != "gae" else {}
        if wrong := [name for name, value in gae_only.items() if value is not None]:
            raise ValueError(f"{wrong[0]} is of the value head, which advantage: gae has; set that, or leave it out")
        if self.dual_clip is not None and self.policy != "ppo_clip":
            raise ValueError(f"dual_clip is of policy: ppo_clip, got policy: {self.policy}")
        if self.advantage == "gae" and not self.has_rl:
            raise ValueError("advantage: gae with rl_loss_weight: 0: there is no reward for its value head")
        return self


class OptimizerSection(Section):
    name: str = "adamw"  # adamw, lion, adafactor, muon, sgd; see student/optimizer.py
    learning_rate: float = pydantic.Field(1e-6, gt=0)
    b1: float | None = pydantic.Field(None, ge=0, lt=1)  # of the first moment; None: the optimizer's own, adamw 0.9
    b2: float | None = pydantic.Field(None, ge=0, lt=1)  # of the second moment; None: the optimizer's own, adamw 0.95
    eps: float | None = pydantic.Field(None, gt=0)  # None: the optimizer's own, adamw 1e-8
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of the optimizer's state; bfloat16: rounded at random
    weight_decay: float = pydantic.Field(0.0, ge=0)
    clip_norm: float = pydantic.Field(1.0, gt=0)  # of the global gradient
    warmup_steps: int = pydantic.Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up, to the last step
    end_factor: float = pydantic.Field(0.05, ge=0, le=1)  # the last step's rate as a share of learning_rate
    minibatches: int = pydantic.Field(1, ge=1)  # updates a step; 1 is strictly on-policy
    accumulate: int = pydantic.Field(1, ge=1)  # parts of an update, one after another: memory for one of them
    packing: bool = False  # rows without their padding; worth it where lengths differ
    batch_size: int = pydantic.Field(64, ge=1)  # supervised only: sequences a step


class EvalSection(Section):
    every: int = pydantic.Field(25, ge=0)  # steps; 0: never
    num_prompts: int = pydantic.Field(256, ge=1)
    greedy: bool = True  # beside T = rollout.temperature


class CheckpointSection(Section):
    every: int = pydantic.Field(50, ge=0)  # steps; 0: only at the end
    keep: int = pydantic.Field(2, ge=1)


class MeshSection(Section):
    """Number of devices on each axis; -1 (one of them at most): all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


class TrainConfig(Section):
    """`jdistill train`: one YAML is one run."""

    run_dir: str
    seed: int = 0
    num_steps: int = pydantic.Field(ge=1)
    model: ModelSection
    task: TaskSection
    teacher: TeacherSection | None = None
    rollout: RolloutSection = RolloutSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    mesh: MeshSection = MeshSection()

    @pydantic.model_validator(mode="after")
    def _relations(self) -> TrainConfig:
        objective = self.objective
        if objective.kind == "supervised":
            return self._check_parts(self.optimizer.batch_size, "optimizer.batch_size")
        if objective.has_distillation and self.teacher is None:
            raise ValueError(
                "objective.distill_loss_weight > 0 needs a teacher: set teacher.endpoints or teacher.spawn, "
                "or set objective.distill_loss_weight: 0"
            )
        alone = objective.advantage in ("gae", "reinforce_plus_plus")  # do without a group
        if objective.has_rl and not alone and self.rollout.num_completions < 2:
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
                "rollout.ahead: the teacher scores while the next batch is sampled, and with teacher.offload it sleeps "
                "then: leave one of the two out"
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


class TeacherServerConfig(EngineSection):
    """`jdistill teacher`: one sidecar. The command's flags have the same names."""

    host: str = "127.0.0.1"
    insecure: bool = False  # allow a host beyond loopback without encryption or authentication
    port: int = pydantic.Field(50051, ge=0, le=65535)  # 0: any free one; see port_file
    port_file: str | None = None  # where the bound port is written once the server listens
    tls_cert: str | None = None  # PEM file: certificate (chain) of this server
    tls_key: str | None = None  # PEM file: its private key
    tls_client_ca: str | None = None  # PEM file: clients must show a certificate that this authority has signed
    token_file: str | None = None  # clients must send one of its tokens; a line each: TOKEN [expiry in ISO 8601]
    max_running_tokens: int = pydantic.Field(131_072, ge=1)  # tokens that are in the engine at once
    # Tokens that may wait for the engine, over all clients: 4 MiB of ids, and seconds to minutes of work.
    max_queued_tokens: int = pydantic.Field(1 << 20, ge=1)
    on_sleep: Literal["wake", "refuse"] = "wake"  # what a score that arrives in sleep does
    metrics_port: int | None = pydantic.Field(
        None, ge=0, le=65535
    )  # Prometheus, over HTTP; None: none, 0: any free one
    log_format: Literal["text", "json"] = "text"
    drain_timeout_s: float = pydantic.Field(30.0, ge=0)  # how long running calls may finish after SIGTERM


C = TypeVar("C", bound=Section)


def load(schema: type[C], path: str | pathlib.Path | None, overrides: Sequence[str] = ()) -> C:
    """Reads a YAML file (None: begins with nothing) and applies `section.key=value` overrides (values are YAML).

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, contradiction.
    """
    if path is None:
        data: Any = {}
        for override in overrides:
            _apply(data, override)
        return parse(schema, data, source="command line")
    path = pathlib.Path(path)
    try:
        data = YAML(typ="safe").load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}") from None
    except (YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not YAML: {e}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    for override in overrides:
        _apply(data, override)
    return parse(schema, data, source=str(path))


def parse(schema: type[C], data: dict[str, Any], *, source: str = "config") -> C:
    """Checks `data` against `schema`. Raises ConfigError with one line for each thing that is wrong."""
    try:
        return schema.model_validate(data)
    except pydantic.ValidationError as e:
        raise ConfigError("\n".join(_explain(schema, error, source) for error in e.errors())) from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value, e.g. optimizer.learning_rate=1e-5")
    try:
        value = YAML(typ="safe").load(text) if text.strip() else None
    except YAMLError as e:
        raise ConfigError(f"override {override!r}: the value is not YAML: {e}") from None
    *parents, leaf = key.split(".")
    node = data
    for i, parent in enumerate(parents):
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: i + 1])} is not a section")
        node = child
    node[leaf] = value


def _section_at(schema: type[Section], loc: Sequence[Any]) -> type[Section] | None:
    """The section that holds the last key of `loc`."""
    section: type[Section] | None = schema
    for key in loc:
        field = section.model_fields.get(key) if section is not None else None
        if field is None:
            return None
        section = _section_type(field.annotation)
    return section


def _section_type(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _explain(schema: type[Section], error: Any, source: str) -> str:
    loc = [part for part in error["loc"]]
    key = ".".join(str(part) for part in loc)
    if error["type"] == "extra_forbidden":
        section = _section_at(schema, loc[:-1])
        names = list(section.model_fields) if section is not None else []
        near = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
        hint = (
            f"did you mean {'.'.join([*map(str, loc[:-1]), near[0]])}?" if near else f"valid keys: {', '.join(names)}"
        )
        return f"{source}: unknown key {key}; {hint}"
    if error["type"] == "missing":
        return f"{source}: missing key {key}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{source}: {key + ': ' if key else ''}{message}"
    return f"{source}: {key}: {message}, got {error['input']!r}"
