"""Objectives from their YAML keys: each row of the table traced, four combinations trained with a real sidecar."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jdistill import checkpoint_files, config
from jdistill.student import metrics, recipe
from jdistill.student.plan import make_shapes
from jdistill.student.teacher_process import TeacherProcess
from jdistill.student.train import train
from jdistill.wire.errors import TeacherError

REPO = pathlib.Path(__file__).parents[2]
STUDENT, TEACHER = "examples/addition/student", "examples/addition/teacher"
RL = ["objective.distill_loss_weight=0"]
KD = ["objective.rl_loss_weight=0"]
# Name -> (overrides of configs/demo.yaml, metrics that the step must report beside loss and grad_norm).
CASES = {
    "dr_grpo, constant": ([*RL, "objective.advantage=dr_grpo", "objective.reduction=constant"], ["policy_loss"]),
    "rloo, dual clip": ([*RL, "objective.advantage=rloo", "objective.dual_clip=3.0"], ["clip_fraction"]),
    "reinforce++": ([*RL, "objective.advantage=reinforce_plus_plus"], ["policy_loss"]),
    "dapo": (
        [*RL, "objective.clip_high=0.28", "objective.dynamic_sampling=2", "objective.overlong_buffer=10"],
        ["clip_fraction"],
    ),
    "gspo": ([*RL, "objective.policy=gspo", "objective.reduction=sequence_mean"], ["policy_loss"]),
    "cispo": ([*RL, "objective.policy=cispo"], ["policy_loss"]),
    "sapo": ([*RL, "objective.policy=sapo", "optimizer.minibatches=2"], ["policy_loss"]),
    "ppo with a critic": (
        [*RL, "objective.advantage=gae", "objective.value_clip=0.2", "optimizer.minibatches=2"],
        ["value_loss", "explained_variance"],
    ),
    "decoupled ppo": (
        ["optimizer.minibatches=2", "objective.proximal=recomputed", "objective.behavior={action: clamp}"],
        ["behavior_weight_mean", "distill_loss"],
    ),
    "rejection": (
        [*RL, "objective.proximal=recomputed", "objective.behavior={action: mask, level: sequence, upper: 5.0}"],
        ["behavior_kept_share"],
    ),
    "reference": ([f"objective.reference={{path: {STUDENT}, weight: 0.1}}"], ["reference_kl", "distill_loss"]),
    "sampled reverse KL, return-to-go, clipped": (
        ["objective.distillation=sampled_reverse_kl", "objective.distill_discount=1.0", "objective.distill_clip=5.0"],
        ["reverse_kl", "policy_loss"],
    ),
    "k2 in the loss": ([*KD, "objective.distillation=k2", "objective.distill_placement=loss"], ["distill_loss"]),
    "straight-through k3": ([*KD, "objective.distillation=straight_through_reverse_kl"], ["distill_loss"]),
    "forward KL by k3": ([*KD, "objective.distillation=sampled_forward_kl"], ["distill_loss"]),
    "top-k forward KL of the teacher's tokens": (
        [*KD, "objective.distillation=topk_forward_kl"],
        ["distill_loss"],
    ),
    "JSD over the whole vocabulary": (
        [*KD, "objective.distillation=topk_jsd", "objective.distill_top_k=16", "objective.distill_beta=0.3"],
        ["distill_loss"],
    ),
    "annealed, where the answer was wrong, by entropy": (
        [
            "objective.distill_loss_weight={kind: linear, begin: 1.0, end: 0.0}",
            "objective.distill_where=wrong",
            "objective.distill_entropy_weight=1.0",
        ],
        ["distill_loss_weight", "distill_loss"],
    ),
    "kdrl": (
        ["objective.distill_loss_weight={kind: kdrl, begin: 1, end: 0.2, decrement: 0.3}", "objective.distillation=k2"],
        ["distill_loss_weight", "distill_loss"],
    ),
    "in parts, without padding": (
        ["optimizer.minibatches=2", "optimizer.accumulate=2", "optimizer.packing=true"],
        ["padding_share", "distill_loss"],
    ),
    "another optimizer, its moments in bfloat16": (
        ["optimizer.name=muon", "optimizer.b2=null", "optimizer.moment_dtype=bfloat16"],
        ["distill_loss"],
    ),
    "adapters of low rank, beside a reference": (
        ["model.lora={rank: 4}", "optimizer.accumulate=2", f"objective.reference={{path: {STUDENT}, weight: 0.1}}"],
        ["reference_kl", "distill_loss"],
    ),
    "privileged context": (["teacher.privileged=true", "objective.distillation=sampled_reverse_kl"], ["reverse_kl"]),
}


SMALL = ["num_steps=2", "rollout.num_prompts=2", "rollout.num_completions=4", "eval.every=0", "checkpoint.every=0"]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    section = config.SpawnSection(engine="jax", model=str(REPO / TEACHER), dtype="float32")
    with TeacherProcess(section, tmp_path_factory.mktemp("teacher") / "teacher.log") as teacher:
        yield teacher.endpoint


@pytest.fixture
def run(endpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)

    def run(*overrides, resume=False):
        """Trains two steps; returns the lines of metrics.jsonl."""
        teacher = ["teacher.spawn=null"]
        if not any("several" in override for override in overrides):
            teacher.append(f"teacher.endpoints=['{endpoint}']")
        run_dir = tmp_path / "run"
        train(
            config.load(
                config.TrainConfig,
                "configs/demo.yaml",
                [*SMALL, *teacher, *overrides, f"run_dir={run_dir}"],
            ),
            overwrite=not resume,
            resume=resume,
        )
        return metrics.read(run_dir / "metrics.jsonl")

    return run


@pytest.mark.parametrize("name", CASES)
def test_every_objective_traces_a_step_from_its_yaml_keys(name, monkeypatch):
    """Traces the step that `train` compiles; tests/losses and tests/student check its numbers."""
    overrides, reported = CASES[name]
    monkeypatch.chdir(REPO)
    asked = config.load(config.TrainConfig, "configs/demo.yaml", [*SMALL, *overrides])
    recipe.check(asked)
    shapes = make_shapes(asked)
    state, found = jax.eval_shape(shapes.step.program.step, shapes.state, shapes.batch, shapes.step.frozen)
    assert {"loss", "grad_norm", "finite", *reported} <= set(found)
    assert all(x.shape == () for x in found.values())
    as_before = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, shapes.state)
    assert all(jax.tree.leaves(as_before)), "a state that comes back with other shapes compiles every step again"


# What the rows above leave out: rollout, requests to the teacher, and the sum of the terms, with values.
# Name -> (overrides, weights of the terms whose sum is the loss, what a metric is in steps 1 and 2).
TRAINED = {
    "dapo, and the teacher's own tokens": (
        [
            *("objective.clip_high=0.28", "objective.dynamic_sampling=2", "objective.overlong_buffer=10"),
            *("objective.advantage=rloo", "objective.distillation=topk_forward_kl"),
        ],
        {"policy_loss": 1, "distill_loss": 1},
        {"dropped_completions": [lambda n: n in (0, 8), lambda n: n in (0, 8)]},  # one of two rounds of 2 groups of 4
    ),
    "ppo with a critic, a sampled reverse KL with its return-to-go, in packed parts": (
        [
            *("optimizer.accumulate=2", "optimizer.packing=true"),
            *("objective.advantage=gae", "objective.value_clip=0.2", "optimizer.minibatches=2"),
            *("objective.distillation=sampled_reverse_kl", "objective.distill_discount=1.0"),
            *("objective.distill_clip=5.0", "objective.value_loss_weight=0.25"),
        ],
        {"policy_loss": 1, "value_loss": 0.25},
        # The head's first estimates are 0, with explained variance 0; after two updates it is not 0.
        {"explained_variance": [lambda v: v == 0, lambda v: v < 1], "reverse_kl": [lambda v: v > 0] * 2},
    ),
    "adapters, kdrl, and a reference, in parts": (
        [
            *("model.lora={rank: 4}", "optimizer.accumulate=2", "objective.distillation=k2"),
            "objective.distill_loss_weight={kind: kdrl, begin: 1, end: 0.2, decrement: 0.3}",
            f"objective.reference={{path: {STUDENT}, weight: 0.1}}",
        ],
        {"policy_loss": 1, "distill_loss": "distill_loss_weight", "reference_kl": 0.1},
        # Until the first update the student equals its reference.
        {
            "distill_loss_weight": [lambda w: w == 1, lambda w: w == np.float32(0.7)],
            "reference_kl": [lambda kl: kl < 1e-10, lambda kl: kl > 1e-8],
        },
    ),
    "decoupled, with rejection, packed, another optimizer": (
        [
            *("objective.policy=cispo", "objective.advantage=dr_grpo", "objective.proximal=recomputed"),
            "objective.behavior={action: mask, level: sequence, upper: 5.0}",
            *("optimizer.minibatches=2", "optimizer.packing=true", "optimizer.name=muon"),
            *("optimizer.b2=null", "optimizer.moment_dtype=bfloat16"),
        ],
        {"policy_loss": 1, "distill_loss": 1},
        # The sampler and the step round differently, but by far less than the rejection limit.
        {"behavior_kept_share": [lambda share: share == 1] * 2, "behavior_weight_mean": [lambda w: w == 1] * 2},
    ),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_loss_is_the_sum_of_its_terms(run, name):
    overrides, weights, expected = TRAINED[name]
    lines = run(*overrides)
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        terms = [line[term] * (line[weight] if isinstance(weight, str) else weight) for term, weight in weights.items()]
        # float32 rounding: means over minibatches and parts of summed terms, against sums of means.
        np.testing.assert_allclose(line["loss"], sum(terms), rtol=0, atol=2e-6 * max(1, *map(abs, terms)))
        assert line["grad_norm"] > 0
    for metric, holds in expected.items():
        assert holds[0](lines[0][metric]) and holds[1](lines[1][metric]), (metric, [line[metric] for line in lines])


def test_training_on_parts_while_others_are_scored_changes_no_number(run):
    at_once, in_parts = run(), run("optimizer.accumulate=4")
    for a, b in zip(at_once, in_parts, strict=True):
        assert set(a) == set(b)
        for name in set(a) - {"padding_share"}:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=1e-4, err_msg=name)


def test_nothing_compiles_after_the_first_steps_and_a_slow_teacher_shows_in_the_metrics(run, tmp_path):
    fingerprint = checkpoint_files.tokenizer_fingerprint(STUDENT)
    # At most 8 rows of 42 tokens: scoring takes over a second, sampling only milliseconds.
    slow = {"vocab_size": 16, "tokens_per_s": 300, "tokenizer_fingerprint": fingerprint}
    section = config.SpawnSection(engine="fake", model=str(REPO / TEACHER), engine_args=slow)
    with TeacherProcess(section, tmp_path / "slow.log") as teacher:
        run("num_steps=5", "optimizer.accumulate=2", f"teacher.endpoints=['{teacher.endpoint}']")
    timings = metrics.read(tmp_path / "run" / "timings.jsonl")
    assert timings[0]["compilations"] > 0 and timings[0]["compile_s"] > 0
    assert [line["compilations"] for line in timings[2:]] == [0, 0, 0]
    for line in timings[2:]:
        assert line["teacher_wait_s"] > 0.5 and 0.4 < line["teacher_exposed_share"] <= 1


AHEAD = ["objective.proximal=recomputed", "objective.behavior={action: clamp}"]


def test_with_ahead_each_batch_is_sampled_before_the_last_update(run):
    """With ahead, two steps sample as the untrained student; `still` hardly learns, so it shows what that samples."""
    ahead = run(*AHEAD, "rollout.ahead=1", "num_steps=4", "optimizer.learning_rate=0.01", "optimizer.warmup_steps=0")
    still = run(*AHEAD, "num_steps=4", "optimizer.learning_rate=1e-12")
    gaps = [line["sampler_gap_mean"] for line in ahead]
    assert gaps[0] < 1e-4 < 0.01 < min(gaps[1:]), "each step but the first trains on what an older policy sampled"
    for name in ("response_length", "reward", "stopped_share"):
        assert [line[name] for line in ahead[:2]] == [line[name] for line in still[:2]]
    assert ahead[3]["response_length"] != still[3]["response_length"]
    assert [line["sampled_tokens"] for line in ahead[:2]] == [line["sampled_tokens"] for line in still[:2]]


def test_with_ahead_a_pending_batch_is_restored_from_the_checkpoint(run, tmp_path):
    saved = ["checkpoint.every=2", "checkpoint.keep=9"]
    keys = [*AHEAD, *saved, "rollout.ahead=1", "num_steps=5", "objective.dynamic_sampling=2"]
    whole = run(*keys)
    for step in (4, 5):  # as if the run had been killed in step 3 or 4
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    assert run(*keys, resume=True) == whole


def test_each_of_several_teachers_scores_its_problems(run, endpoint):
    lines = run(
        f"teacher.several={{math: ['{endpoint}'], code: ['{endpoint}']}}",
        "task.options.teachers=[math, code]",
        "objective.teacher_weights={code: 0.5}",
    )
    assert lines[-1]["distill_loss"] > 0


def test_a_privileged_teacher_gives_other_scores(run):
    sampled = ["objective.distillation=sampled_reverse_kl", "num_steps=1"]
    (plain,), (privileged,) = run(*sampled), run(*sampled, "teacher.privileged=true")
    assert plain["response_length"] == privileged["response_length"]  # the same samples
    assert abs(plain["reverse_kl"] - privileged["reverse_kl"]) > 0.01


def test_a_teacher_with_another_tokenizer_scores_the_same_text(run, tmp_path):
    # The same teacher with a permuted vocabulary: its scores of a text must not change.
    other = shutil.copytree(REPO / TEACHER, tmp_path / "teacher")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    new_ids = np.roll(np.arange(len(vocabulary)), 5)
    tokenizer["model"]["vocab"] = {token: int(new_ids[i]) for token, i in vocabulary.items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = int(new_ids[token["id"]])
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("config.json", "generation_config.json"):
        found = json.loads((other / name).read_text())
        for key in ("eos_token_id", "pad_token_id"):
            found[key] = int(new_ids[found[key]])
        (other / name).write_text(json.dumps(found))
    tensors = load_file(other / "model.safetensors")
    (name,) = [name for name in tensors if "embed_tokens" in name]
    rows = tensors[name].copy()
    rows[new_ids] = tensors[name]
    save_file(tensors | {name: rows}, other / "model.safetensors")

    sampled = "objective.distillation=sampled_reverse_kl"
    plain = run(sampled)
    section = config.SpawnSection(engine="jax", model=str(other), dtype="float32")
    with TeacherProcess(section, tmp_path / "other.log") as teacher:
        overrides = [sampled, f"teacher.endpoints=['{teacher.endpoint}']"]
        with pytest.raises(TeacherError, match="tokenizer"):
            run(*overrides, "num_steps=1")
        across = run(*overrides, f"teacher.tokenizer={other}", "objective.distillation=auto")
    for a, b in zip(plain, across, strict=True):
        assert b.pop("teacher_usable_share") == 1
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.distillation=k1", "objective.distill_placement=loss"], "teacher drops out"),
        (["rollout.ahead=1"], "objective.behavior"),
        ([*AHEAD, "rollout.ahead=1", "teacher.offload=true"], "teacher.offload"),
        (["objective.distillation=k2", "objective.distill_placement=advantage"], "k2"),
        (["objective.distillation=abs"], "abs"),
        (["objective.distillation=reverse_kl_by_guess"], "reverse_kl_by_guess"),
        (["objective.reference={path: x, estimator: k1}"], "objective.reference.estimator"),
        (["objective.teacher_weights={code: 1.0}"], "none of teacher.several"),
        ([f"teacher.tokenizer={TEACHER}", "objective.distillation=k2"], "must be sampled_reverse_kl"),
    ],
)
def test_invalid_objectives_are_refused_before_anything_is_loaded(run, tmp_path, overrides, message):
    with pytest.raises(config.ConfigError, match=message):
        run(*overrides)
    assert not (tmp_path / "run").exists()
