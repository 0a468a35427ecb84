"""Compare the teacher service with the engine in process, with AReaL's HTTP requests and with other wires, in one run.

    python -m benchmarks.service [--quick] [--only engine-bound service-bound wire service replicas] [--output FILE.md]

The ways take turns within a round, in one order and then in the reverse, so that a machine that is busy for a while
slows all of them; a ratio is the median over the rounds. All ways score the same sequences, and their numbers are
checked to be equal. The last printed line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.service import checkpoints, http_client, processes, replicas, wire, work
from benchmarks.service.counting_proxy import CountingProxy
from benchmarks.service.engines import VOCAB_SIZE
from benchmarks.service.report import Table, console, load, number, spread, write
from jdistill.client import TeacherClient
from jdistill.wire.types import SequenceToScore

LENGTH = work.PROMPT_TOKENS + work.RESPONSE_TOKENS
SECTIONS = ("engine-bound", "service-bound", "wire", "service", "replicas")
# Before each turn: OpenMP's threads go on spinning for a while after their last work, and another engine's would take a
# core from the one that is measured.
SETTLE_S = 0.5
# At most so long for the rounds of one workload, once there have been two.
ROUNDS_S = {"engine-bound": 240.0, "service-bound": 100.0}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a check that it works: little work, no result file")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--output", type=pathlib.Path, help="default: benchmarks/results/service.md, unless a part only"
    )
    args = parser.parse_args()
    begin = time.monotonic()
    figures: dict[str, Any] = {}
    tables: list[Table] = []
    with tempfile.TemporaryDirectory(prefix="bench-service-") as scratch:
        for section in args.only:
            console.rule(f"{section}  ({time.monotonic() - begin:.0f} s)")
            run = {"wire": wire_alone, "service": service_costs, "replicas": many_replicas}.get(section)
            directory = pathlib.Path(scratch, section)
            directory.mkdir()
            if run is None:
                table, found = one_workload(directory, section, quick=args.quick)
            else:
                table, found = run(directory, quick=args.quick)
            table.show()
            tables.append(table)
            figures |= found
    figures["seconds"] = round(time.monotonic() - begin)
    output = args.output
    if output is None and not args.quick and set(args.only) == set(SECTIONS):
        output = pathlib.Path(__file__).parent.parent / "results" / "service.md"
    if output is not None:
        write(output, tables, ["All figures of the run as JSON: [service.json](service.json)."])
        output.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


# ---- vLLM, with all ways to it ----


def one_workload(directory: pathlib.Path, workload: str, *, quick: bool) -> tuple[Table, dict[str, Any]]:
    """All ways of scoring with one model."""
    count, rounds, pairs = (8, 2, 1) if quick else (64, 3, 2) if workload == "engine-bound" else (64, 6, 3)
    vocab_size = checkpoints.SHAPES[workload]["vocab_size"]
    model = directory / "model"
    num_parameters = checkpoints.write(model, workload)
    response = work.sequences(count, vocab_size=vocab_size)
    whole = [SequenceToScore(sequence.token_ids) for sequence in response]
    args = ("--engine", "measured-vllm", "--model", model, "--max-sequence-length", LENGTH)
    with (
        processes.sidecar(directory, "sidecar", *args) as sidecar,
        processes.vllm_http_server(directory, model, max_length=LENGTH) as url,
        processes.python(directory, "bare_forward", model) as bare,
        TeacherClient([sidecar.endpoint]) as client,
    ):
        sums: dict[str, list[float]] = {}

        def through_sidecar(sequences: list[SequenceToScore]) -> float:
            begin = time.perf_counter()
            scores = client.score(sequences)
            seconds = time.perf_counter() - begin
            # All ways are compared over the response.
            sums["sidecar"] = [float(s.logprobs[-work.RESPONSE_TOKENS :].sum()) for s in scores]
            return seconds

        def in_process(way: str, first_scored: int = work.PROMPT_TOKENS) -> float:
            reply = sidecar.in_process(way=way, count=count, one_by_one=False, first_scored=first_scored)
            if first_scored == work.PROMPT_TOKENS:
                sums[f"in process, {way}"] = reply["sums"]
            return reply["times_s"][0]

        def http(connections: int, prompt_logprobs: int = 1) -> float:
            seconds, sums[f"http, {connections}"] = http_client.score(
                url, response, connections=connections, prompt_logprobs=prompt_logprobs
            )
            return seconds

        def bare_forward() -> float:
            reply = processes.ask(bare, {"count": count})
            sums["bare"] = reply["sums"]
            return reply["seconds"]

        ways: dict[str, Callable[[], float]] = {
            "sidecar": lambda: through_sidecar(response),
            "in process": lambda: in_process("engine"),
            "sidecar, whole": lambda: through_sidecar(whole),
            "in process, whole": lambda: in_process("engine", 1),
            "AsyncLLM": lambda: in_process("plain"),
            "HTTP, 1": lambda: http(1),
            "HTTP, 16": lambda: http(16),
            "HTTP, 16, lean": lambda: http(16, 0),
            "bare": bare_forward,
        }
        scored_by = sidecar.in_process(way="engine", count=1, one_by_one=False)["way"]
        for way in ways.values():
            way()  # once for warming up
        times: dict[str, list[float]] = {name: [] for name in ways}
        at_load = [load()]
        begin = time.monotonic()
        for i in range(rounds):
            # What decides the first figures goes more often; its pairs are next to each other in time.
            names = ["sidecar", "in process"] * (pairs - 1) + list(ways)
            for name in names if i % 2 == 0 else reversed(names):
                time.sleep(SETTLE_S)
                times[name].append(ways[name]())
            at_load.append(load())
            console.print(f"  round {i + 1}: " + "  ".join(f"{name} {times[name][-1]:.2f} s" for name in ways))
            if i >= 1 and time.monotonic() - begin > ROUNDS_S[workload]:
                break
        _check_equal(sums)
        added_ms = _added_latency(client, sidecar, response, 4 if quick else 15)

    def gain(slow: str, fast: str) -> list[float]:
        """Returns the speedup in each round."""
        if len(times[slow]) == len(times[fast]):
            return [s / f for s, f in zip(times[slow], times[fast], strict=True)]
        per_round = [len(times[name]) // len(at_load[1:]) for name in (slow, fast)]
        slows, fasts = (
            np.reshape(times[name], (-1, k)).mean(axis=1) for name, k in zip((slow, fast), per_round, strict=True)
        )
        return (slows / fasts).tolist()

    def best(slow: str) -> float:
        """Returns the sidecar's speedup, from the fastest turn of each."""
        return min(times[slow]) / min(times["sidecar"])

    num_tokens = count * LENGTH
    described = {
        "sidecar": "sidecar + TeacherClient, response only",
        "in process": f"same engine in process (by {scored_by}), response only",
        "sidecar, whole": "sidecar + TeacherClient, whole sequence",
        "in process, whole": f"same engine in process (by {scored_by}), whole sequence",
        "AsyncLLM": "vLLM's AsyncLLM in process, prompt_logprobs=0, all at once",
        "HTTP, 1": "vLLM's HTTP server, prompt_logprobs=1, one request at a time (AReaL's way)",
        "HTTP, 16": "the same over 16 connections",
        "HTTP, 16, lean": "the same over 16 connections, prompt_logprobs=0",
        "bare": "bare PyTorch forward + log-softmax, no engine",
    }
    table = Table(
        f"{workload}: {num_parameters / 1e6:.1f} M parameters, vocabulary {vocab_size:,}, float32, {count} sequences "
        f"of {work.PROMPT_TOKENS} + {work.RESPONSE_TOKENS} tokens",
        ["way", "tokens/s (median)", "lowest to highest", "sidecar is faster by"],
    )
    for name, text in described.items():
        rates = [num_tokens / seconds for seconds in times[name]]
        reference = "sidecar, whole" if name.endswith("whole") else "sidecar"
        ratio = "" if name == reference else f"{statistics.median(gain(name, reference)):.2f} x"
        table.add(text, number(statistics.median(rates)), spread(rates), ratio)
    vs_in_process = gain("in process", "sidecar")
    vs_whole = gain("in process, whole", "sidecar, whole")
    # Over the whole prompt as vLLM scores it, and as our extension does: it made the whole prompt faster too.
    response_gain, own_response_gain = gain("AsyncLLM", "in process"), gain("sidecar, whole", "sidecar")
    table.notes += [
        f"The sidecar reaches {statistics.median(vs_in_process):.3f} of the tokens/s of the same engine in process "
        f"({spread(vs_in_process)}, {len(vs_in_process)} pairs); whole sequence: {statistics.median(vs_whole):.3f}.",
        f"Scoring only the response is {statistics.median(response_gain):.2f} x as fast as vLLM's prompt_logprobs for "
        f"the whole prompt, both in process, and {statistics.median(own_response_gain):.2f} x as fast as this "
        "project's scoring of the whole sequence "
        f"(at most {(LENGTH - 1) / work.RESPONSE_TOKENS:.2f} x, where the model's body costs nothing).",
        "In the best turn of each way, which is the least disturbed by the machine's load, the sidecar reaches "
        f"{best('in process'):.3f} of the tokens/s of the same engine in process, {best('HTTP, 1'):.2f} x those of "
        f"HTTP one by one, and {best('HTTP, 16'):.2f} x those of HTTP over 16 connections.",
        f"One sequence of {LENGTH} tokens alone: the sidecar adds {added_ms[0]:.1f} ms (p50), {added_ms[1]:.1f} ms "
        "(p90) to the engine's time in process.",
        f"Load of the machine (1 minute) while measuring: {min(at_load):g} to {max(at_load):g}.",
    ]
    key = workload.replace("-", "_")
    figures: dict[str, Any] = {
        f"vs_in_process_{key}": statistics.median(vs_in_process),
        f"vs_in_process_whole_{key}": statistics.median(vs_whole),
        f"vs_async_llm_{key}": statistics.median(gain("AsyncLLM", "sidecar")),
        f"vs_http_sequential_{key}": statistics.median(gain("HTTP, 1", "sidecar")),
        f"vs_http_16_{key}": statistics.median(gain("HTTP, 16", "sidecar")),
        f"vs_http_sequential_whole_{key}": statistics.median(gain("HTTP, 1", "sidecar, whole")),
        f"vs_http_16_whole_{key}": statistics.median(gain("HTTP, 16", "sidecar, whole")),
        f"vs_http_16_lean_{key}": statistics.median(gain("HTTP, 16, lean", "sidecar")),
        f"vs_bare_forward_{key}": statistics.median(gain("bare", "sidecar")),
        f"tokens_per_s_{key}": num_tokens / statistics.median(times["sidecar"]),
        f"added_ms_p50_{key}": added_ms[0],
        f"added_ms_p90_{key}": added_ms[1],
        f"load_{key}": max(at_load),
        f"vs_in_process_best_{key}": best("in process"),
        f"vs_http_sequential_best_{key}": best("HTTP, 1"),
        f"vs_http_16_best_{key}": best("HTTP, 16"),
        f"vs_bare_forward_best_{key}": best("bare"),
    }
    if workload == "engine-bound":
        figures["response_only_gain"] = statistics.median(response_gain)
        figures["response_only_gain_own_whole"] = statistics.median(own_response_gain)
    else:
        figures |= {name: figures[f"{name}_{key}"] for name in ("vs_http_sequential", "vs_http_16")}
    return table, _rounded(figures)


def _check_equal(sums: dict[str, list[float]]) -> None:
    """Checks that all ways found the same log-probabilities up to float32 rounding."""
    reference = np.array(sums["bare"])
    for name, found in sums.items():
        worst = float(np.abs(np.array(found) / reference - 1).max())
        if not worst < 1e-4:
            raise AssertionError(f"{name} scores other numbers than the bare forward pass: they differ by {worst:.2g}")


def _added_latency(
    client: TeacherClient, sidecar: processes.Sidecar, sequences: list[SequenceToScore], rounds: int
) -> tuple[float, float]:
    """Returns (p50, p90) in ms of one sequence through the sidecar, minus the median of the engine in process."""
    alone, through = [], []
    count = min(8, len(sequences))
    for _ in range(rounds):
        time.sleep(SETTLE_S)
        alone += sidecar.in_process(way="engine", count=count, one_by_one=True)["times_s"]
        for sequence in sequences[:count]:
            begin = time.perf_counter()
            client.score([sequence])
            through.append(time.perf_counter() - begin)
    p50, p90 = (1e3 * (np.percentile(through, q) - np.percentile(alone, q)) for q in (50, 90))
    return float(p50), float(p90)


# ---- the wire ----


def wire_alone(directory: pathlib.Path, *, quick: bool) -> tuple[Table, dict[str, Any]]:
    """Measures batches/s of each wire, and of the whole service with an engine whose answers are precomputed."""
    at_least_s = 0.5 if quick else 2.0
    sequences = work.sequences(64, vocab_size=VOCAB_SIZE, length=512, first_scored=1)
    described = {
        "codec_stream": "this wire: streamed, checksums, ids and values verified",
        "service": "this wire with all of the service and TeacherClient around it",
        "asarray": "same bytes, np.asarray over protobuf's repeated fields, nothing verified",
        "lists": "same schema, Python lists on both sides",
        "http_json": "one JSON document over HTTP",
        "per_token": "gRPC, a message for each token",
    }
    rates: dict[tuple[str, int], list[float]] = {(way, top_k): [] for top_k in (0, 64) for way in described}
    cpu_ms: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in rates}  # client, server
    at_load = [load()]
    with (
        processes.python(directory, "wire_server") as server,
        processes.sidecar(directory, "ready", "--engine", "ready", "--model", directory) as sidecar,
        TeacherClient([sidecar.endpoint]) as client,
    ):
        bare = wire.WireClient(processes.ask(server, "ports"), sequences)
        for i in range(1 if quick else 3):
            for way, top_k in rates:
                if i and way in ("lists", "http_json", "per_token"):
                    continue  # once: they are slow, and far away
                other = sidecar if way == "service" else server
                begin, own_s, its_s = time.perf_counter(), _own_cpu_s(), other.cpu_s()
                if way == "service":
                    rate, bare.sums[way, top_k] = wire.service_batches_per_s(client, sequences, top_k, at_least_s)
                else:
                    at_least = 1 if way in ("http_json", "per_token", "lists") else 3
                    rate = bare.batches_per_s(way, top_k, at_least_s=at_least_s, at_least=at_least)
                rates[way, top_k].append(rate)
                num_batches = rate * (time.perf_counter() - begin)
                spent_s = (_own_cpu_s() - own_s, other.cpu_s() - its_s)
                cpu_ms[way, top_k].append((1e3 * spent_s[0] / num_batches, 1e3 * spent_s[1] / num_batches))
            at_load.append(load())
    for (way, top_k), found in bare.sums.items():
        assert abs(found / bare.sums["codec_stream", top_k] - 1) < 1e-4, f"{way} gave other numbers"
    table = Table(
        "The wire: batches/s of 64 sequences x 512 tokens, client and server in two processes",
        ["way", "top-0", "lowest to highest", "CPU ms", "top-64", "lowest to highest", "CPU ms"],
    )
    for way, text in described.items():
        cells = []
        for top_k in (0, 64):
            spent = [f"{statistics.median(side):.3g}" for side in zip(*cpu_ms[way, top_k], strict=True)]
            cells += [number(statistics.median(rates[way, top_k])), spread(rates[way, top_k]), " + ".join(spent)]
        table.add(text, *cells)
    table.notes.append(
        "CPU ms: per batch, in the client + in the server. The larger of the two bounds what two free cores can reach, "
        "whatever else ran during the measurement."
    )
    table.notes.append(f"Load of the machine (1 minute) while measuring: {min(at_load):g} to {max(at_load):g}.")
    figures: dict[str, Any] = {"load_wire": max(at_load)}
    for top_k in (0, 64):
        figures[f"wire_batches_per_s_top{top_k}"] = statistics.median(rates["codec_stream", top_k])
        client_ms, server_ms = (statistics.median(side) for side in zip(*cpu_ms["codec_stream", top_k], strict=True))
        figures |= {f"wire_client_cpu_ms_top{top_k}": client_ms, f"wire_server_cpu_ms_top{top_k}": server_ms}
        for way in ("service", "asarray", "lists", "http_json", "per_token"):
            figures[f"{way}_batches_per_s_top{top_k}"] = statistics.median(rates[way, top_k])
    return table, _rounded(figures)


def service_costs(directory: pathlib.Path, *, quick: bool) -> tuple[Table, dict[str, Any]]:
    """Measures CPU, bytes and latency of the service with an engine that costs nothing."""
    sequences = work.sequences(64, vocab_size=VOCAB_SIZE, length=512, first_scored=1)
    num_scored = sum(s.num_scored for s in sequences)
    table = Table("What service and client cost without the engine", ["", "top-0", "top-64"])
    figures: dict[str, Any] = {}
    rows: dict[str, list[str]] = {}
    with (
        processes.sidecar(directory, "ready", "--engine", "ready", "--model", directory) as sidecar,
        CountingProxy(sidecar.endpoint) as proxy,
        TeacherClient([sidecar.endpoint]) as client,
        TeacherClient([proxy.endpoint]) as counted,
    ):
        for top_k in (0, 64):
            counted.score(sequences[:1], top_k=top_k)
            before = proxy.num_bytes
            counted.score(sequences, top_k=top_k)
            num_bytes = (proxy.num_bytes - before) / num_scored
            client.score(sequences, top_k=top_k)
            num_batches = (20 if quick else 200) if top_k == 0 else (5 if quick else 40)
            own_s, its_s = _own_cpu_s(), sidecar.cpu_s()
            for _ in range(num_batches):
                client.score(sequences, top_k=top_k)
            scored_millions = num_batches * num_scored / 1e6
            own_s, its_s = (_own_cpu_s() - own_s) / scored_millions, (sidecar.cpu_s() - its_s) / scored_millions
            times_ms = []
            for _ in range(50 if quick else 300):
                begin = time.perf_counter()
                client.score(sequences[:1], top_k=top_k)
                times_ms.append(1e3 * (time.perf_counter() - begin))
            p50, p90 = np.percentile(times_ms, (50, 90))
            for name, text, key, value in (
                ("client CPU seconds per million scored tokens", f"{own_s:.3f}", "client_cpu_s_per_million", own_s),
                ("server CPU seconds per million scored tokens", f"{its_s:.3f}", "server_cpu_s_per_million", its_s),
                (
                    "bytes per scored token, both directions, with all framing",
                    f"{num_bytes:.1f}",
                    "bytes_per_token",
                    num_bytes,
                ),
                ("round trip of one 512-token sequence, ms, p50", f"{p50:.2f}", "latency_ms_p50", p50),
                ("round trip of one 512-token sequence, ms, p90", f"{p90:.2f}", "latency_ms_p90", p90),
            ):
                rows.setdefault(name, []).append(text)
                figures[f"{key}_top{top_k}"] = float(value)
    for name, cells in rows.items():
        table.add(name, *cells)
    table.notes.append(f"Load of the machine (1 minute) at the end: {load():g}.")
    return table, _rounded(figures)


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# ---- replicas and overlap ----


def many_replicas(directory: pathlib.Path, *, quick: bool) -> tuple[Table, dict[str, Any]]:
    """Measures 1, 2 and 4 replicas, and a rollout that hides the scoring, with an engine that only waits."""
    sequences = replicas.ragged(64 if quick else 512)
    speed = f"tokens_per_s={replicas.TOKENS_PER_S}"
    args = ("--engine", "waiting", "--model", directory, "--engine-arg", speed)
    counts = (1, 2, 4)
    rates: dict[int, list[float]] = {n: [] for n in counts}
    at_load = [load()]
    with processes.sidecars(directory, {f"replica-{i}": args for i in range(max(counts))}) as started:
        endpoints = [sidecar.endpoint for sidecar in started]
        for i in range(1 if quick else 3):
            for n in counts if i % 2 == 0 else reversed(counts):
                rates[n].append(replicas.tokens_per_s(endpoints[:n], sequences))
            at_load.append(load())
        hidden = [replicas.exposed_s(endpoints[0]) for _ in range(1 if quick else 3)]
    table = Table(
        f"Replicas of a simulated engine ({replicas.TOKENS_PER_S:,} tokens/s each), {len(sequences)} ragged sequences",
        ["replicas", "tokens/s (median)", "times one replica"],
    )
    scaling = {n: statistics.median(r / one for r, one in zip(rates[n], rates[1], strict=True)) for n in counts}
    for n in counts:
        table.add(n, number(statistics.median(rates[n])), f"{scaling[n]:.2f}")
    exposed, one, afterwards = (
        statistics.median(h[name] for h in hidden) for name in ("exposed_s", "one_sequence_s", "afterwards_s")
    )
    table.notes += [
        f"Scoring 32 x 4,096 tokens during a rollout that yields them one by one: {exposed * 1e3:.0f} ms are not "
        f"hidden (scoring them after the rollout takes {afterwards * 1e3:,.0f} ms); the engine needs {one * 1e3:.0f} "
        "ms for the last sequence.",
        f"Load of the machine (1 minute) while measuring: {min(at_load):g} to {max(at_load):g}.",
    ]
    return table, _rounded(
        {
            "replica_scaling_2": scaling[2],
            "replica_scaling_4": scaling[4],
            "overlap_exposed_ms": exposed * 1e3,
            "overlap_last_sequence_ms": one * 1e3,
            "overlap_hidden_share": 1 - exposed / afterwards,
            "load_replicas": max(at_load),
        }
    )


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


if __name__ == "__main__":
    main()
