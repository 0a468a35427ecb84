"""Compares the student with Tunix and PyTorch: step, sampler, whole loop, log-probs, compile time, teacher.

    python -m benchmarks.student [--quick] [--only train generate ...] [--tunix-python PATH] [--output FILE.md]

Each side runs in a separate process, and the sides take turns, so that temporary load on the machine slows all of them.
A ratio is the median over the turns. Sides that do the same work must find the same numbers. The last line printed is
one JSON object; a ratio above 1 means that jdistill is faster, or needs less memory or time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.peers import work
from benchmarks.service.processes import ROOT, Process, ask
from benchmarks.service.report import Table, console, load, number, spread

# Pause before each turn, because a library's thread pool spins for a while after its last work.
SETTLE_S = 0.3
# Time limit for the turns of one task after the first two: a busy machine takes several times longer.
TURNS_S = 90.0
# Keep all sides off the network and other devices, and their logs short.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
}
NAMES = {"ours": "jdistill", "tunix": "Tunix", "torch": "PyTorch + transformers"}
Figures = dict[str, Any]


class Sides:
    """Python environments and package versions of the sides."""

    def __init__(self, directory: pathlib.Path, tunix_python: str, torch_python: str, *, quick: bool):
        self.directory = directory
        self.pythons = {"ours": sys.executable, "tunix": tunix_python, "torch": torch_python}
        self.quick = quick
        self.versions: dict[str, dict[str, str]] = {}

    @contextlib.contextmanager
    def process(self, module: str, *args: Any, side: str = "ours") -> Iterator[tuple[Process, dict[str, Any]]]:
        """Run `python -m benchmarks.peers.MODULE ARGS`; yield the process and the facts that it reports first."""
        log_path = self.directory / f"{module}-{'-'.join(map(str, args))}.log"
        command = [self.pythons[side], "-m", f"benchmarks.peers.{module}", *map(str, args)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        process = Process(command, log_path, env=ENVIRONMENT, **pipes)
        try:
            facts = ask(process, None)
            if "versions" in facts:
                self.versions.setdefault(side, facts["versions"])
            yield process, facts
        finally:
            process.stop()

    def turns(
        self, task: str, sides: Sequence[str], count: int, *, repeats: dict[str, str] | None = None, warm_ups: int = 1
    ) -> Turns:
        """Run `count` turns of one task on each side, after a compiling turn and warm-up turns.

        Args:
            task: task of each side's module.
            sides: names; ours first.
            count: turns per side, fewer if they exceed TURNS_S.
            repeats: name of an additional variant -> task of our side that it runs.
            warm_ups: uncounted turns per side after the compiling one.
        """
        tasks = {side: (side, task) for side in sides} | {name: ("ours", t) for name, t in (repeats or {}).items()}
        with contextlib.ExitStack() as stack:
            running = {}
            for name, (side, its_task) in tasks.items():
                running[name], _ = stack.enter_context(self.process(side, its_task, side=side))
            first = {name: ask(process, {}) for name, process in running.items()}
            for process in list(running.values()) * warm_ups:
                ask(process, {})
            answers: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
            at_load, begin = [load()], time.monotonic()
            for i in range(count):
                for name, process in running.items():
                    time.sleep(SETTLE_S)
                    answers[name].append(ask(process, {}))
                at_load.append(load())
                if i >= 1 and time.monotonic() - begin > TURNS_S:
                    break
        return Turns(first, answers, at_load)


class Turns:
    """Replies of the sides."""

    def __init__(self, first: dict[str, dict], answers: dict[str, list[dict]], at_load: list[float]):
        self.first, self.answers, self.at_load = first, answers, at_load

    def values(self, way: str, key: str = "seconds") -> list[float]:
        return [answer[key] for answer in self.answers[way]]

    def median(self, way: str, key: str = "seconds") -> float:
        return statistics.median(self.values(way, key))

    def faster(self, way: str, than: str) -> float:
        """Return the median ratio over the turns, each of which measured both sides."""
        pairs = zip(self.values(way), self.values(than), strict=True)
        return statistics.median(other / own for own, other in pairs)

    def table(self, title: str, tokens: float, unit: str, texts: dict[str, str] | None = None) -> Table:
        """Add a row per side: tokens per second, time, first call, memory, and our speedup."""
        columns = ["way", unit, "lowest to highest", "s", "first call s", "CPU s", "peak MiB", "jdistill is faster by"]
        table = Table(title, columns)
        for way, answers in self.answers.items():
            rates = [tokens / seconds for seconds in self.values(way)]
            table.add(
                (texts or {}).get(way) or NAMES[way],
                number(statistics.median(rates)),
                spread(rates),
                number(self.median(way)),
                number(self.first[way]["seconds"]),
                number(self.median(way, "cpu_s")),
                number(answers[-1]["peak_rss_mib"]),
                "" if way == "ours" else f"{self.faster('ours', way):.2f} x",
            )
        table.notes.append(f"{len(answers)} turns. {loads(self.at_load)}")
        return table


def loads(at_load: list[float]) -> str:
    return f"Load of the machine (1 minute) while measuring: {min(at_load):g} to {max(at_load):g}."


def check(what: str, found: float, expected: float, tolerance: float) -> None:
    if not abs(found - expected) <= tolerance:
        raise AssertionError(f"{what} is {found}, expected {expected} +- {tolerance}: it is not the same work")


# ---- sections ----


def train(sides: Sides) -> tuple[list[Table], Figures]:
    repeats = {"topk": "train_topk"}
    found = sides.turns("train", ["ours", "tunix", "torch"], 3 if sides.quick else 9, repeats=repeats)
    for side in ("ours", "tunix", "torch"):
        check(f"{NAMES[side]}'s first loss", found.first[side]["loss"], work.LOSS_FIRST, 1e-6)
    tokens = work.NUM_ROWS * work.ROW_TOKENS
    texts = {"topk": "jdistill, distillation over the student's top 8 instead of the reference term"}
    table = found.table("Training step, 16 x 256 tokens, GRPO + reference term + entropy", tokens, "tokens/s", texts)
    flops = work.train_flops()
    peak = {way: answers[-1]["peak_rss_mib"] for way, answers in found.answers.items()}
    table.notes += [
        f"{flops / 1e9:.0f} GFLOP of matrix products per step: "
        + ", ".join(f"{NAMES[side]} {flops / found.median(side) / 1e9:.0f} GFLOP/s" for side in NAMES)
        + ".",
        f"All three compute {work.LOSS_FIRST} as the first loss. Ours is put together from the policy loss and "
        "log-probs: our own loss uses another estimator of the reference term, at the same cost, because the one that "
        "the others use has the wrong gradient.",
    ]
    return [table], {
        "train_vs_tunix": found.faster("ours", "tunix"),
        "train_vs_torch": found.faster("ours", "torch"),
        "train_topk_vs_tunix": found.faster("topk", "tunix"),
        "train_topk_vs_torch": found.faster("topk", "torch"),
        "train_tokens_per_s": tokens / found.median("ours"),
        "train_cpu_s_vs_tunix": found.median("tunix", "cpu_s") / found.median("ours", "cpu_s"),
        "rss_vs_torch": peak["ours"] / peak["torch"],
        "rss_vs_tunix": peak["ours"] / peak["tunix"],
        "train_first_call_s": found.first["ours"]["seconds"],
    }


def generate(sides: Sides) -> tuple[list[Table], Figures]:
    # PyTorch's threads spin while they wait for each other, which takes minutes where others are computing too.
    ways = ["ours", "tunix"] if sides.quick else ["ours", "tunix", "torch"]
    found = sides.turns("generate", ways, 2 if sides.quick else 7)
    tokens = work.NUM_ROWS * work.NEW_TOKENS
    check("tokens generated", min(a["tokens"] for turns in found.answers.values() for a in turns), tokens, 0)
    unit = "new tokens/s"
    table = found.table(
        "Sampler, 16 prompts of 64 tokens, 192 new tokens each, with log-probs (PyTorch: without)", tokens, unit
    )
    first_token = sides.turns("first_token", ["ours", "tunix"], 2 if sides.quick else 7)
    second = first_token.table("Time to first token: the same with one new token", work.NUM_ROWS, unit)
    vs_torch = {"generate_vs_torch": found.faster("ours", "torch")} if "torch" in ways else {}
    return [table, second], vs_torch | {
        "generate_vs_tunix": found.faster("ours", "tunix"),
        "generate_tokens_per_s": tokens / found.median("ours"),
        "generate_compile_s": found.first["ours"]["seconds"] - found.median("ours"),
        "generate_compile_s_tunix": found.first["tunix"]["seconds"] - found.median("tunix"),
        "first_token_s": first_token.median("ours"),
        "first_token_vs_tunix": first_token.faster("ours", "tunix"),
    }


def generate_varied(sides: Sides) -> tuple[list[Table], Figures]:
    # Half a minute a turn and side: the one that compiles has warmed up as well.
    found = sides.turns("generate_varied", ["ours", "tunix"], 1 if sides.quick else 3, warm_ups=0)
    _, lengths = work.varied()
    tokens = int(lengths.sum())
    check("tokens kept", min(a["tokens"] for turns in found.answers.values() for a in turns), tokens, 0)
    title = f"Sampler, {len(lengths)} requests of 64 + {lengths.min()} to {lengths.max()} tokens ({lengths.mean():.0f})"
    table = found.table(title, tokens, "new tokens/s")
    table.notes.append(
        "Only tokens that a request asked for count. A batch that runs until its longest request ends computes "
        f"{len(lengths) * lengths.max() / tokens:.2f} x as many."
    )
    return [table], {
        "generate_varied_vs_tunix": found.faster("ours", "tunix"),
        "generate_varied_tokens_per_s": tokens / found.median("ours"),
    }


def score(sides: Sides) -> tuple[list[Table], Figures]:
    found = sides.turns("score", ["ours", "tunix", "torch"], 3 if sides.quick else 9)
    for side in found.answers:
        check(f"{NAMES[side]}'s mean log-prob", found.first[side]["mean_logprob"], work.MEAN_LOGPROB, 1e-4)
    tokens = work.NUM_ROWS * work.ROW_TOKENS
    table = found.table("Log-probs of given completions, forward only", tokens, "tokens/s")
    return [table], {
        "score_vs_tunix": found.faster("ours", "tunix"),
        "score_vs_torch": found.faster("ours", "torch"),
    }


def grpo_step(sides: Sides) -> tuple[list[Table], Figures]:
    found = sides.turns("grpo_step", ["ours", "tunix"], 1 if sides.quick else 5)
    for way, answers in found.answers.items():
        # The two calls before the turns had their rewards too: each step has looked at the rewards once.
        check(f"{NAMES[way]}'s steps", answers[-1]["rewarded"], 2 + len(answers), 0)
    tokens = work.NUM_ROWS * work.NEW_TOKENS
    title = "A whole GRPO step: 4 prompts x 4 rollouts, the reference's log-probs, rewards, update"
    table = found.table(title, tokens, "new tokens/s")
    return [table], {
        "grpo_step_vs_tunix": found.faster("ours", "tunix"),
        "grpo_step_s": found.median("ours"),
        "grpo_rss_vs_tunix": found.answers["ours"][-1]["peak_rss_mib"] / found.answers["tunix"][-1]["peak_rss_mib"],
    }


def logprob(sides: Sides) -> tuple[list[Table], Figures]:
    num_tokens, vocab_size, width = (4096, 16384, 256) if sides.quick else (4096, 151_936, 1024)
    variants = {"plain": "log-prob", "entropy": "log-prob, entropy", "topk": "log-prob, 8 candidates"}
    # The plain one decides the first figure, so it goes twice; each of the others once.
    order = ["plain", *variants] if not sides.quick else list(variants)
    seconds: dict[tuple[str, str], list[float]] = {(form, v): [] for form in ("ours", "naive") for v in variants}
    at_load = [load()]
    with contextlib.ExitStack() as stack:
        running, facts = {}, {}
        for form in ("ours", "naive"):
            process = sides.process("logprob", form, num_tokens, vocab_size, width)
            running[form], facts[form] = stack.enter_context(process)
        for i, variant in enumerate(order):
            values = {}
            for form in ("ours", "naive") if i % 2 == 0 else ("naive", "ours"):
                time.sleep(SETTLE_S)
                answer = ask(running[form], {"variant": variant})
                seconds[form, variant].append(answer["seconds"])
                values[form] = answer["value"]
            check(f"our value of {variant}", values["ours"], values["naive"], 1e-4 * abs(values["naive"]))
            at_load.append(load())
    check("the gradients' largest difference", facts["ours"]["gradient_error"], 0, 1e-5)
    table = Table(
        f"Target log-probs, forward + backward: {num_tokens:,} tokens, vocabulary {vocab_size:,}, hidden {width:,}",
        ["way", "temporaries MiB", f"of {num_tokens // 2:,} tokens", "s (fastest)"],
    )
    fastest = {key: min(times) for key, times in seconds.items()}
    for variant, text in variants.items():
        for form in ("ours", "naive"):
            temporaries, half = (facts[form][key][variant] for key in ("temp_mib", "temp_mib_half"))
            name = f"{'jdistill' if form == 'ours' else 'naive'}, {text}"
            table.add(name, number(temporaries), number(half), number(fastest[form, variant]))
    table.add("log_softmax, log-prob", number(facts["naive"]["temp_mib_log_softmax"]), "", "")
    table.notes += [
        f"Temporaries come from the compiled program's memory analysis; chunks of {facts['ours']['chunk_tokens']} "
        "tokens (the default).",
        f"Our gradients differ from the naive form's by at most {facts['ours']['gradient_error']:.1g} of the largest "
        f"one. {loads(at_load)}",
    ]
    ours, naive = facts["ours"]["temp_mib"], facts["naive"]["temp_mib"]
    figures: Figures = {
        "logprob_temp_vs_naive": ours["plain"] / naive["plain"],
        "logprob_time_vs_naive": fastest["ours", "plain"] / fastest["naive", "plain"],
        "logprob_temp_mib": ours["plain"],
        "logprob_temp_mib_naive": naive["plain"],
        "logprob_temp_full_vs_half_tokens": ours["plain"] / facts["ours"]["temp_mib_half"]["plain"],
    }
    for variant in ("entropy", "topk"):
        figures[f"logprob_{variant}_temp_vs_naive"] = ours[variant] / naive[variant]
        figures[f"logprob_{variant}_time_vs_naive"] = fastest["ours", variant] / fastest["naive", variant]
    return [table], figures


def compile_time(sides: Sides) -> tuple[list[Table], Figures]:
    depths = (4, 32)
    seconds: dict[int, list[float]] = {depth: [] for depth in depths}
    temporaries: dict[int, float] = {}
    at_load = [load()]
    with sides.process("ours", "compile_time") as (process, _):
        ask(process, {"layers": depths[0]})  # loads the compiler
        for _ in range(1 if sides.quick else 3):
            for depth in depths:
                answer = ask(process, {"layers": depth})
                seconds[depth].append(answer["seconds"])
                temporaries[depth] = answer["temp_mib"]
            at_load.append(load())
    ratio = statistics.median(deep / flat for flat, deep in zip(*seconds.values(), strict=True))
    table = Table(
        "Tracing and compiling the training step", ["layers", "s (median)", "lowest to highest", "temporaries MiB"]
    )
    for depth, times in seconds.items():
        table.add(depth, number(statistics.median(times)), spread(times), number(temporaries[depth]))
    table.notes.append(loads(at_load))
    return [table], {"compile_32_vs_4_layers": ratio, "compile_s": statistics.median(seconds[4])}


def with_teacher(sides: Sides) -> tuple[list[Table], Figures]:
    count, num_steps = (1, 6) if sides.quick else (2, 12)
    texts = {"varied": "completions of 1 to 64 tokens", "equal": "completions of 34 tokens, all ending at once"}
    table = Table(
        "`jdistill train`: a step with a teacher that takes as long as the rollout, and without a teacher",
        ["rollout", "without s", "rollout s", "with s", "rollout s", "waited s", "with / without"],
    )
    figures: Figures = {}
    at_load = [load()]
    for case, text in texts.items():
        with sides.process("with_teacher", case, num_steps) as (process, _):
            pairs = [ask(process, {}) for _ in range(count)]
        at_load.append(load())
        ratio = statistics.median(pair["with"]["step_s"] / pair["without"]["step_s"] for pair in pairs)
        columns = [("without", "step_s"), ("without", "rollout_s"), ("with", "step_s"), ("with", "rollout_s")]
        columns.append(("with", "teacher_wait_s"))
        medians = [statistics.median(pair[way][key] for pair in pairs) for way, key in columns]
        table.add(text, *map(number, medians), f"{ratio:.3f}")
        name = "step_with_teacher_vs_without"
        figures[name if case == "varied" else f"{name}_{case}"] = ratio
        # Of the teacher's time, which is the rollout's by construction: what the step still waited for.
        waited = [pair["with"]["teacher_wait_s"] / pair["without"]["rollout_s"] for pair in pairs]
        figures[f"teacher_wait_share_{case}"] = statistics.median(waited)
    table.notes += [
        "The teacher is a sidecar over gRPC whose engine only waits, as if it ran on another machine. 16 prompts x 8.",
        f"Medians over the {num_steps} steps of a run except the first two, {count} pairs of runs. {loads(at_load)}",
    ]
    return [table], figures


SECTIONS: dict[str, Callable[[Sides], tuple[list[Table], Figures]]] = {
    "train": train,
    "generate": generate,
    "generate_varied": generate_varied,
    "score": score,
    "grpo_step": grpo_step,
    "logprob": logprob,
    "compile_time": compile_time,
    "with_teacher": with_teacher,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.student", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a check that it works: few turns, no result file")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tunix-python", default=str(ROOT / ".venv-tunix" / "bin" / "python"))
    parser.add_argument("--torch-python", default=sys.executable, help="default: this one")
    parser.add_argument(
        "--output", type=pathlib.Path, help="default: benchmarks/results/student.md, unless a part only"
    )
    args = parser.parse_args()
    if not pathlib.Path(args.tunix_python).exists():
        parser.error(f"no Python at {args.tunix_python}: `make bench-student` makes it, or give --tunix-python")
    # As an exception, so that the sides are taken down with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    begin = time.monotonic()
    figures: Figures = {}
    tables: list[Table] = []
    with tempfile.TemporaryDirectory(prefix="bench-student-") as scratch:
        sides = Sides(pathlib.Path(scratch), args.tunix_python, args.torch_python, quick=args.quick)
        for section in args.only:
            console.rule(f"{section}  ({time.monotonic() - begin:.0f} s)")
            shown, found = SECTIONS[section](sides)
            for table in shown:
                table.show()
            tables += shown
            figures |= found
    figures = {name: float(f"{value:.4g}") for name, value in figures.items()}
    figures["seconds"] = round(time.monotonic() - begin)
    output = args.output
    if output is None and not args.quick and set(args.only) == set(SECTIONS):
        output = ROOT / "benchmarks" / "results" / "student.md"
    if output is not None:
        write(output, tables, sides)
        output.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


def write(path: pathlib.Path, tables: list[Table], sides: Sides) -> None:
    """Return the results as Markdown."""
    versions = [
        f"{NAMES[side]}: " + ", ".join(f"{name} {version}" for name, version in found.items())
        for side, found in sides.versions.items()
    ]
    cores = len(os.sched_getaffinity(0))
    arguments = "".join(f" {word}" for word in sys.argv[1:] if "/" not in word)
    lines = [
        "# The student compared with Tunix and PyTorch",
        "",
        f"`make bench-student` (`python -m benchmarks.student{arguments}`), {datetime.date.today()}.",
        "",
        *(f"- {text}." for text in versions),
        "",
        f"{cores} shared cores, no GPU, float32. The load in each table's notes shows what else ran on them (above "
        f"{cores}: others were computing too), so trust ratios rather than absolute numbers: the ways take turns, and "
        "a ratio is the median over the turns.",
        "The model has Qwen3's architecture and random weights: 4 layers, width 256, 8 heads, vocabulary 8,192.",
        "",
        f"All figures of the run as JSON: [{path.stem}.json]({path.stem}.json).",
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines + [line for table in tables for line in table.markdown()]).rstrip() + "\n")


if __name__ == "__main__":
    main()
