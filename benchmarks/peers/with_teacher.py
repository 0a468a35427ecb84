"""A trainer's step beside a teacher that takes as long as the rollout, and without one: `jdistill train`, whole.

The teacher is the real sidecar over gRPC with an engine that waits instead of computing (`fake`), as a teacher on a
machine of its own would let this one wait. `python -m benchmarks.peers.with_teacher CASE NUM_STEPS`.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any

from benchmarks.peers import work
from benchmarks.service import processes
from jdistill import checkpoint_files
from jdistill.config import TrainConfig, parse
from jdistill.student.train import train

STUDENT = processes.ROOT / "examples" / "addition" / "student"
SKIPPED = 2  # first steps, which compile
# varied: a random model, whose completions end whenever its end token is drawn, 16 tokens on average and 64 at most.
# equal: the demo's student, whose completions all have 34 tokens, so that the teacher gets all of them at the end.
CASES = {"varied": ("random", 64), "equal": ("checkpoint", 40)}


def config(directory: pathlib.Path, name: str, case: str, num_steps: int, endpoint: str | None) -> TrainConfig:
    init, max_new_tokens = CASES[case]
    model = STUDENT
    if init == "random":
        # The demo's tokenizer and a body of the size that everything else is measured with.
        model = directory / "model"
        model.mkdir(exist_ok=True)
        for file in STUDENT.glob("*.json"):
            (model / file.name).write_text(file.read_text())
        kept = json.loads((STUDENT / "config.json").read_text())
        tokens = {key: kept[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        (model / "config.json").write_text(json.dumps(work.hf_config() | tokens))
    return parse(
        TrainConfig,
        {
            "run_dir": str(directory / name),
            "num_steps": num_steps,
            "model": {"path": str(model), "init": init, "compute_dtype": "float32", "remat": "layer"},
            "task": {"name": "addition"},
            "teacher": None if endpoint is None else {"endpoints": [endpoint]},
            "rollout": {"max_prompt_tokens": 8, "max_new_tokens": max_new_tokens, "chunk_tokens": 8},
            "objective": {
                "distill_loss_weight": 0.0 if endpoint is None else 1.0,
                "distillation": "sampled_reverse_kl",
            },
            # So small that the student, and with it the lengths, stays as it is. In parts: while one is trained on, the
            # teacher scores the next.
            "optimizer": {"learning_rate": 1e-12, "accumulate": 8},
            "eval": {"every": 0},
            "checkpoint": {"every": 0},
        },
    )


def run(asked: TrainConfig) -> dict[str, float]:
    """Medians of the steps that did not compile; teacher_wait_s where there is one."""
    train(asked)
    lines = {}
    for kind in ("metrics", "timings"):
        text = pathlib.Path(asked.run_dir, f"{kind}.jsonl").read_text()
        lines[kind] = [json.loads(line) for line in text.splitlines()][SKIPPED:]
    names = [name for name in ("step_s", "rollout_s", "train_s", "teacher_wait_s") if name in lines["timings"][0]]
    found = {name: statistics.median(line[name] for line in lines["timings"]) for name in names}
    rollout = asked.rollout
    num_rows = rollout.num_prompts * rollout.num_completions
    found["tokens"] = num_rows * (8 + statistics.mean(line["response_length"] for line in lines["metrics"]))
    return found


def main() -> None:
    case, num_steps = sys.argv[1], int(sys.argv[2])
    door, fingerprint = work.Door(), checkpoint_files.tokenizer_fingerprint(STUDENT)
    with tempfile.TemporaryDirectory(prefix="bench-student-") as name:
        directory, num_runs = pathlib.Path(name), 0

        def once(request: dict[str, Any]) -> dict[str, Any]:
            """A pair: without, then with a teacher that takes as long as the rollout took in the first."""
            nonlocal num_runs
            num_runs += 1
            without = run(config(directory, f"without-{num_runs}", case, num_steps, None))
            pace = without["tokens"] / without["rollout_s"]
            args = ("--engine", "fake", "--model", directory, "--engine-arg", "vocab_size=16")
            args += ("--engine-arg", f"tokens_per_s={pace:.1f}", "--engine-arg", f"tokenizer_fingerprint={fingerprint}")
            with processes.sidecar(directory, f"teacher-{num_runs}", *args) as teacher:
                beside = run(config(directory, f"with-{num_runs}", case, num_steps, teacher.endpoint))
            return {"without": without, "with": beside}

        door.serve(once, {})


if __name__ == "__main__":
    main()
