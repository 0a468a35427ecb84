"""Compares the objectives on the demo task, with a nearly perfect teacher and with one stopped halfway.

    python -m benchmarks.objectives [--steps 150] [--seeds 0 1 2] [--grid 2e-4 6e-4] [--teachers perfect imperfect]
                                    [--arms "RL only" ...] [--to runs/objectives]
                                    [--output benchmarks/results/objectives.md]

Every arm is tuned over the same grid of learning rates with one seed, by held-out accuracy at T = 1, and then runs with
every seed. Finished runs are reused, so an interrupted comparison continues. Besides accuracy, the table has the true
reverse KL to the teacher over the whole vocabulary, the length of the responses, and the cosine between an estimator's
gradient on one batch and the exact gradient of the per-token reverse KL at the same positions.

"k1 in the loss" is a mistake that configurations refuse, so this program adds it to the table of objectives.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import pathlib
import shutil
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from jdistill import cli, config, models, report, tasks
from jdistill.losses import estimators, masked
from jdistill.rollout.sampler import Sampler
from jdistill.student import metrics
from jdistill.student.batch import TrainBatch, make_batch
from jdistill.student.checkpoint import restore_params
from jdistill.student.evaluate import held_out_accuracy
from jdistill.student.objective import Scored, loss
from jdistill.student.recipe import make_recipe
from jdistill.student.teacher_process import TeacherProcess
from jdistill.student.train import train
from jdistill.tasks import addition
from jdistill.wire.types import TokenScores

K1 = "k1_in_the_loss"
ANNEALED = "objective.distill_loss_weight={kind: linear, begin: 1.0, end: 0.0}"
DEFAULT = "RL + distillation, top-k (default)"
# Arm -> overrides of configs/demo.yaml, which is RL + distillation by top-k reverse KL.
ARMS = {
    "RL only": ["objective.distill_loss_weight=0", "objective.rl_loss_weight=1"],
    "distillation only, sampled": ["objective.rl_loss_weight=0", "objective.distillation=sampled_reverse_kl"],
    "distillation only, top-k": ["objective.rl_loss_weight=0"],
    "RL + distillation, sampled": ["objective.distillation=sampled_reverse_kl"],
    DEFAULT: [],
    "RL + annealed distillation, top-k": [ANNEALED, "objective.rl_loss_weight=1"],
    "RL + k1 in the loss (the mistake)": [f"objective.distillation={K1}", "objective.rl_loss_weight=1"],
}
# Estimator whose gradient is compared -> overrides.
GRADIENTS = {
    "sampled reverse KL, advantage": ["objective.distillation=sampled_reverse_kl"],
    "sampled reverse KL, k2 in the loss": ["objective.distillation=k2", "objective.distill_placement=loss"],
    "sampled forward KL, k3 in the loss": ["objective.distillation=sampled_forward_kl"],
    "top-8 reverse KL with tail": ["objective.distillation=topk_reverse_kl"],
    "top-1 reverse KL with tail": ["objective.distillation=topk_reverse_kl", "objective.distill_top_k=1"],
    "top-8 JSD, beta 0.5": ["objective.distillation=topk_jsd"],
    "top-8 forward KL": ["objective.distillation=topk_forward_kl"],
    "k1 in the loss (the mistake)": [f"objective.distillation={K1}"],
}
IMPERFECT = (0.70, 0.85)  # held-out accuracy at T = 1 at which the teacher's training stops
console = Console(stderr=True, highlight=False, width=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--grid", type=float, nargs="+", default=[2e-4, 6e-4])
    parser.add_argument("--teachers", nargs="+", default=["perfect", "imperfect"], choices=["perfect", "imperfect"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path("runs/objectives"))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/objectives.md"))
    args = parser.parse_args()
    began = time.monotonic()
    with _k1_in_the_table():
        sections = []
        for name in args.teachers:
            path = "examples/addition/teacher" if name == "perfect" else imperfect_teacher(args.to)
            sections.append(one_teacher(args, name, str(path)))
        text = [
            "# Objectives, side by side",
            "",
            f"`python -m benchmarks.objectives {' '.join(sys.argv[1:])}`, {datetime.date.today()}, Python "
            f"{sys.version.split()[0]}, "
            + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax"))
            + f", CPU; {(time.monotonic() - began) / 60:.0f} minutes.",
            f"{args.steps} steps of 16 prompts x 8 completions; mean (lowest to highest) over seeds {args.seeds}; "
            "512 held-out problems, so the standard error of one accuracy is at most .022.",
            *(line for section in sections for line in ["", *section]),
        ]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("\n".join(text) + "\n")
    console.print(f"written: {args.output}")


@contextlib.contextmanager
def _k1_in_the_table():
    """Register log p - log q as a loss, a common mistake whose expected gradient is zero."""
    wrong = estimators.Objective(K1, "loss", None, lambda logprobs, teacher_logprobs: logprobs - teacher_logprobs)
    estimators.OBJECTIVES[K1] = wrong
    try:
        yield
    finally:
        del estimators.OBJECTIVES[K1]


def imperfect_teacher(to: pathlib.Path) -> pathlib.Path:
    """Train a teacher of the demo's shape, stopped at 70 to 85 % accuracy."""
    found, run_dir, init = to / "imperfect-teacher", to / "imperfect-run", to / "imperfect-init"
    if (found / "model.safetensors").exists():
        return found
    addition.write_model(init, num_layers=4)
    overrides = ["eval.every=10", "eval.num_prompts=512", "checkpoint.every=10", "checkpoint.keep=100"]
    overrides += [f"model.path={init}", f"run_dir={run_dir}"]
    section = config.load(config.TrainConfig, "examples/addition/teacher.yaml", overrides)
    train(section, overwrite=True, label="the imperfect teacher")
    lines = [line for line in metrics.read(run_dir / "metrics.jsonl") if "eval/accuracy" in line]
    line = min(lines, key=lambda line: abs(line["eval/accuracy"] - sum(IMPERFECT) / 2))
    assert IMPERFECT[0] <= line["eval/accuracy"] <= IMPERFECT[1], f"no evaluation fell between {IMPERFECT}"
    shutil.rmtree(found, ignore_errors=True)
    cli.main(["export", str(run_dir), "--step", str(line["step"]), "--to", str(found), "--dtype", "float32"])
    return found


def one_teacher(args: argparse.Namespace, name: str, path: str) -> list[str]:
    """Tune and run every arm; draw the picture and return a section of the page."""
    base = config.load(config.TrainConfig, "configs/demo.yaml", [f"num_steps={args.steps}", "eval.every=50"])
    measured = Measured(base, path)
    accuracy = measured.accuracy(models.load(path, compute_dtype="float32"))
    groups: dict[str, list[pathlib.Path]] = {}
    rows = []
    section = base.teacher.spawn.model_copy(update={"model": path})
    to = args.to / name
    to.mkdir(parents=True, exist_ok=True)
    with TeacherProcess(section, to / "teacher.log") as teacher:
        for arm in args.arms:
            tuned = {rate: run_arm(args, to, teacher.endpoint, arm, rate, args.seeds[0]) for rate in args.grid}
            rate = max(tuned, key=lambda rate: final(tuned[rate])["eval/accuracy"])
            runs = [run_arm(args, to, teacher.endpoint, arm, rate, seed) for seed in args.seeds]
            groups[arm] = runs
            finals = [final(run) for run in runs]
            students = [measured.student(run) for run in runs]
            cells = [
                over_seeds([line["eval/accuracy"] for line in finals]),
                over_seeds([line["eval/accuracy_greedy"] for line in finals]),
                over_seeds([measured.reverse_kl(student) for student in students]),
                over_seeds([line["response_length"] for line in finals], digits=1),
            ]
            rows.append(f"| {arm} | {rate:g} | " + " | ".join(cells) + " |")
            console.print(rows[-1])
    suffix = "" if args.arms == list(ARMS) else f"-{args.steps}"
    picture = pathlib.Path("docs/images") / f"objectives-{name}{suffix}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    title = f"3-digit addition, a teacher that is right {accuracy['eval/accuracy']:.0%} of the time"
    report.draw(groups, picture, to / "objectives.html", title=title, notes=[], teacher=accuracy, commands=[])
    last = DEFAULT if DEFAULT in groups else args.arms[-1]
    start = models.load(base.model.path, compute_dtype="float32")
    return [
        f"## The {name} teacher: {accuracy['eval/accuracy']:.3f} right at T = 1, "
        f"{accuracy['eval/accuracy_greedy']:.3f} greedy",
        "",
        "| arm | rate | accuracy, T = 1 | accuracy, greedy | true reverse KL, nats per token | response, tokens |",
        "| --- | ---: | --- | --- | --- | --- |",
        *rows,
        "",
        "Cosine between an estimator's gradient on one batch of 128 completions and the exact gradient of the "
        "per-token reverse KL at the same positions, for the student that every run begins with and for the one that "
        f"{last} ends with:",
        "",
        "| estimator | at the beginning | at the end |",
        "| --- | ---: | ---: |",
        *(
            f"| {label} | {measured.cosine(start, overrides):.3f} | "
            f"{measured.cosine(measured.student(groups[last][0]), overrides):.3f} |"
            for label, overrides in GRADIENTS.items()
        ),
    ]


def run_arm(
    args: argparse.Namespace, to: pathlib.Path, endpoint: str, arm: str, rate: float, seed: int
) -> pathlib.Path:
    """Train one arm unless its run is already finished; return the run directory."""
    words = "".join(c if c.isalnum() else "_" for c in arm.lower())
    run_dir = to / f"{words}-{rate:g}-{args.steps}-{seed}"
    overrides = [*ARMS[arm], f"optimizer.learning_rate={rate!r}", f"seed={seed}", f"run_dir={run_dir}"]
    overrides += [f"num_steps={args.steps}", "eval.every=50", "checkpoint.every=0"]
    overrides += ["teacher.spawn=null", f"teacher.endpoints=['{endpoint}']"]
    path = run_dir / "metrics.jsonl"
    if not path.exists() or metrics.read(path)[-1]["step"] < args.steps:
        label = f"{arm}, rate {rate:g}, seed {seed}"
        train(config.load(config.TrainConfig, "configs/demo.yaml", overrides), overwrite=True, label=label)
    return run_dir


def final(run_dir: pathlib.Path) -> dict[str, float]:
    """Return the last line of a run's metrics, with the response length averaged over the last 10 steps."""
    lines = metrics.read(run_dir / "metrics.jsonl")
    return lines[-1] | {"response_length": float(np.mean([line["response_length"] for line in lines[1:][-10:]]))}


def over_seeds(values: list[float], digits: int = 3) -> str:
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


class Measured:
    """Measures students against one teacher, with both models in this process."""

    def __init__(self, base: config.TrainConfig, teacher: str):
        self._base = base
        self._teacher = models.load(teacher, compute_dtype="float32")
        self._task = tasks.create_task(base.task.name, base.task.options, base.model.path)
        self._problems = self._task.eval_problems(base.eval.num_prompts)

    def student(self, run_dir: pathlib.Path) -> nnx.Module:
        """Return the final student of a run."""
        decoder = models.load(self._base.model.path, compute_dtype="float32")
        restore_params(run_dir, decoder)
        return decoder

    def accuracy(self, decoder: nnx.Module) -> dict[str, float]:
        """Return held-out accuracy, sampled and greedy."""
        sampler = self._sampler(decoder)
        weights = sampler.prepare(nnx.state(decoder, nnx.Param))
        return held_out_accuracy(sampler, weights, self._task, self._problems, temperature=1.0, seed=0)

    def reverse_kl(self, student: nnx.Module) -> float:
        """Return KL(student || teacher) over the whole vocabulary, averaged over the tokens of 512 completions."""
        batch = self._batch(student, self._problems)
        kl_BT = _kl(_logprobs(student, batch.tokens), _logprobs(self._teacher, batch.tokens))
        return float(masked.masked_mean(kl_BT, jnp.asarray(batch.loss_mask)))

    def cosine(self, student: nnx.Module, overrides: list[str]) -> float:
        """Return the cosine between an estimator's gradient on 16 x 8 completions and the exact one there."""
        section = config.load(config.TrainConfig, "configs/demo.yaml", ["objective.rl_loss_weight=0", *overrides])
        problems = [self._task.train_problem(i) for i in range(16) for _ in range(8)]
        top_k = min(section.objective.distill_top_k, 16)
        batch = self._batch(student, problems, top_k=top_k if "topk" in section.objective.distillation else 0)
        teacher_BTV = _logprobs(self._teacher, batch.tokens)
        graphdef, params = nnx.split(student, nnx.Param)
        mask_BT, targets_BT = jnp.asarray(batch.loss_mask), jnp.asarray(batch.tokens[:, 1:])

        def estimated(params: nnx.State) -> jax.Array:
            logprobs_BTV = _logprobs(nnx.merge(graphdef, params), batch.tokens)
            logprobs_BT = jnp.take_along_axis(logprobs_BTV, targets_BT[..., None], axis=-1)[..., 0]
            candidates_BTK = None
            if batch.candidate_ids is not None:
                candidates_BTK = jnp.take_along_axis(logprobs_BTV, jnp.asarray(batch.candidate_ids), axis=-1)
            scored = Scored(logprobs_BT, candidates_BTK, jnp.zeros_like(logprobs_BT))
            return loss(section, make_recipe(section), scored, batch, jnp.zeros((), jnp.int32))[0]

        def exact(params: nnx.State) -> jax.Array:
            return masked.masked_mean(_kl(_logprobs(nnx.merge(graphdef, params), batch.tokens), teacher_BTV), mask_BT)

        a, b = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(jax.grad(f)(params))]) for f in (estimated, exact))
        return float(a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b) + 1e-30))

    def _sampler(self, decoder: nnx.Module, num_candidates: int = 0) -> Sampler:
        rollout = self._base.rollout
        return Sampler(
            decoder,
            max_prompt_tokens=rollout.max_prompt_tokens,
            max_new_tokens=rollout.max_new_tokens,
            stop_token_ids=self._task.stop_token_ids,
            num_candidates=num_candidates,
        )

    def _batch(self, student: nnx.Module, problems: list[Any], *, top_k: int = 0) -> TrainBatch:
        """Sample completions of the student and score them with the teacher."""
        sampler = self._sampler(student, top_k)
        completions = sorted(
            sampler.sample(
                nnx.state(student, nnx.Param),
                [problem.prompt_ids for problem in problems],
                seeds=np.arange(len(problems), dtype=np.uint32),
                temperature=1.0,
            ),
            key=lambda completion: completion.index,
        )
        max_length = self._base.rollout.max_prompt_tokens + self._base.rollout.max_new_tokens
        batch = make_batch(completions, np.zeros(len(completions)), None, max_length=max_length)
        teacher_BTV = np.asarray(_logprobs(self._teacher, batch.tokens))
        scores = []
        for b, completion in enumerate(completions):
            rows_RV = teacher_BTV[b, batch.loss_mask[b]]
            chosen = np.take_along_axis(rows_RV, completion.completion_ids[:, None], axis=1)[:, 0]
            ids = completion.candidate_ids
            scores.append(
                TokenScores(chosen, None, None, None if ids is None else np.take_along_axis(rows_RV, ids, 1), 0)
            )
        return make_batch(completions, np.zeros(len(completions)), scores, max_length=max_length)


def _logprobs(decoder: nnx.Module, tokens_BS: Any) -> jax.Array:
    """Return log-probs [B, T, V] of every target."""
    inputs_BT = jnp.asarray(tokens_BS)[:, :-1]
    hidden_BTD, _ = decoder(inputs_BT, jnp.broadcast_to(jnp.arange(inputs_BT.shape[1]), inputs_BT.shape))
    return jax.nn.log_softmax(decoder.logits(hidden_BTD).astype(jnp.float32))


def _kl(logprobs_BTV: jax.Array, teacher_BTV: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(logprobs_BTV) * (logprobs_BTV - teacher_BTV), axis=-1)


if __name__ == "__main__":
    main()
