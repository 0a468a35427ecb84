"""Defines every metric, and writes them to two files per run.

Each file has one line per step. `metrics.jsonl` holds what the same seed reproduces, `timings.jsonl` what depends on
the clock: without timings, the metrics of two runs can be compared byte for byte.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import IO, Any, NamedTuple


class Metric(NamedTuple):
    """Meaning and unit of a number."""

    meaning: str
    unit: str


# One line of metrics.jsonl: {"step": steps done, name: value, ...}.
METRICS = {
    "loss": Metric("the objective being minimized: the weighted sum of the terms", "nats"),
    "policy_loss": Metric(
        "clipped policy loss, weights included; includes the sampled reverse KL where it is an advantage", "1"
    ),
    "distill_loss": Metric("distillation term, reduced like the loss, before its weights", "nats"),
    "distill_loss_weight": Metric("weight of the distillation term in this step, if it changes over the run", "1"),
    "reverse_kl": Metric(
        "KL(student || teacher) per sampled token: over the student's top-k and a tail where the teacher scored "
        "candidates, else the mean of logprobs - teacher_logprobs",
        "nats",
    ),
    "teacher_usable_share": Metric("share of sampled tokens that a teacher with another tokenizer scores", "1"),
    "unshared_candidates_share": Metric(
        "share of candidates that student or teacher lacks, counted into the bucket of all other tokens; only where "
        "their vocabularies have different sizes",
        "1",
    ),
    "reference_kl": Metric("KL to the frozen reference, by its estimator, before its weight", "nats"),
    "value_loss": Metric("squared error of the value head, halved and clipped, before its weight", "1"),
    "explained_variance": Metric("share of the returns' variance that the value head predicts", "1"),
    "behavior_weight_mean": Metric("mean weight exp(proximal - sampler log-prob) of the kept tokens", "1"),
    "behavior_kept_share": Metric("share of scored tokens that behavior's rejection keeps", "1"),
    "entropy": Metric("entropy of the student per scored token, at the loss's temperature", "nats"),
    "grad_norm": Metric("global norm of the gradient before clipping", "1"),
    "padding_share": Metric("share of the trained batch's positions that hold no token; see optimizer.packing", "1"),
    "learning_rate": Metric("learning rate of this step's updates", "1"),
    "ratio_mean": Metric("mean probability ratio, trainer over sampler; 1 on-policy if the two agree", "1"),
    "ratio_max": Metric("largest probability ratio", "1"),
    "clip_fraction": Metric("share of scored tokens whose policy gradient is zero because of the clip", "1"),
    "sampler_gap_mean": Metric("mean |trainer's - sampler's log-prob| of the sampled tokens", "nats"),
    "sampler_gap_max": Metric("largest |trainer's - sampler's log-prob| of a sampled token", "nats"),
    "reward": Metric("mean reward of the completions sampled in this step", "1"),
    "signal_share": Metric(
        "share of groups whose rewards differ, overlong_buffer included: only they have an advantage; 0: the reward "
        "trains nothing in this step",
        "1",
    ),
    "response_length": Metric("mean length of the completions, stop token included", "tokens"),
    "stopped_share": Metric("share of completions that a stop token or stop string ended, not max_new_tokens", "1"),
    "readable_share": Metric(
        "share of completions that ended with an answer that the task can read, right or wrong (gsm8k)", "1"
    ),
    "dropped_completions": Metric(
        "completions sampled in this step and not trained on, because of dynamic sampling", "completions"
    ),
    "sampled_tokens": Metric("tokens sampled for training since the start of the run", "tokens"),
    "eval/accuracy": Metric("share of held-out problems solved, sampled at rollout.temperature", "1"),
    "eval/accuracy_greedy": Metric("share of held-out problems solved with greedy decoding", "1"),
}

# One line of timings.jsonl, with the same steps.
TIMINGS = {
    "rollout_s": Metric("sampling, rewards included", "s"),
    "teacher_wait_s": Metric("idle time waiting for the teacher", "s"),
    "teacher_exposed_share": Metric("teacher_wait_s over the time from the first request to the last score", "1"),
    "data_s": Metric("making a supervised batch", "s"),
    "train_s": Metric("the update, including compilation if a shape is new", "s"),
    "eval_s": Metric("held-out evaluation", "s"),
    "compilations": Metric(
        "programs compiled in the step or read from JAX's cache; 0 once all shapes have occurred", "1"
    ),
    "compile_s": Metric("time in these compilations", "s"),
    "step_s": Metric("the whole step, without evaluation and checkpoint", "s"),
    "tokens_per_s": Metric("scored tokens of the step over step_s", "tokens/s"),
}


class MetricsWriter:
    """Appends one line per step to run_dir/metrics.jsonl and run_dir/timings.jsonl, and flushes it at once.

    Args:
        run_dir: existing directory.
    """

    def __init__(self, run_dir: str | pathlib.Path):
        run_dir = pathlib.Path(run_dir)
        self._paths = {"metrics": run_dir / "metrics.jsonl", "timings": run_dir / "timings.jsonl"}
        self._files: dict[str, IO[str]] = {}
        self._open()

    def _open(self) -> None:
        self._files = {name: path.open("a", encoding="utf-8") for name, path in self._paths.items()}

    def write(self, step: int, values: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """Writes the lines of one step.

        Args:
            step: steps done; 0: before the first step.
            values: names of METRICS -> numbers.
            timings: names of TIMINGS -> numbers.

        Raises:
            ValueError: a name is not documented, or a number is not finite; nothing is written.
        """
        lines = {
            "metrics": _line(step, values, METRICS, "METRICS"),
            "timings": _line(step, timings, TIMINGS, "TIMINGS"),
        }
        # Timings first: a kill in between leaves a timing without its step, and never a step without its timing.
        for name in ("timings", "metrics"):
            self._files[name].write(lines[name])
            self._files[name].flush()

    def truncate_to(self, step: int) -> None:
        """Drops the lines after `step` (-1: all lines) and an incomplete last line, before a run is resumed."""
        self.close()
        for path in self._paths.values():
            kept = "".join(
                line
                for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
                if line.endswith("\n") and json.loads(line)["step"] <= step
            )
            beside = path.with_name(path.name + ".new")
            beside.write_text(kept, encoding="utf-8")
            os.replace(beside, path)  # atomic, in case this process is killed too
        self._open()

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()


def read(path: str | pathlib.Path) -> list[dict[str, float]]:
    """Reads the lines of a metrics or timings file in order; an incomplete last line is left out."""
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(step: int, values: Mapping[str, Any], table: Mapping[str, Metric], table_name: str) -> str:
    unknown = sorted(set(values) - set(table))
    if unknown:
        raise ValueError(f"metric {', '.join(unknown)} is not documented: add it to student/metrics.py's {table_name}")
    numbers = {name: float(value) for name, value in values.items()}
    broken = {name: value for name, value in numbers.items() if not math.isfinite(value)}
    if broken:
        raise ValueError(f"step {step}: {broken}: a metric that has no value is left out, never NaN")
    return json.dumps({"step": int(step), **numbers}) + "\n"
