"""Shared by the fault tests: batches whose scores encode position, token and sequence; inspection of processes."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import urllib.request
from typing import Any

import numpy as np

from jdistill.sidecar.engines import fake
from jdistill.wire import codec
from jdistill.wire.types import SequenceToScore, TokenScores

# The lengths of the specification (20 s down, a minute of overload, 30 minutes of soak) instead of a few seconds.
FULL = os.environ.get("JDISTILL_SOAK") == "1"
VOCAB = 64
WATCHED = ("--metrics-port", 0, "--log-format", "json", "--log-level", "debug")  # what `metrics` and `calls` need


def batch(num, *, seed=0, min_tokens=3, max_tokens=40, candidates=0) -> list[SequenceToScore]:
    """Random sequences, half of them with a hole among the scored positions."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(num):
        length = int(rng.integers(min_tokens, max_tokens + 1))
        cut = int(rng.integers(1, length - 1))
        spans = ((cut, cut + 1), (cut + 1, length)) if rng.random() < 0.5 else ((cut, length),)
        if length > 4 and rng.random() < 0.5:
            spans = ((1, 2), (3, length))
        sequence = SequenceToScore(rng.integers(0, VOCAB, length, np.int32), spans)
        if candidates:
            ids = rng.integers(0, VOCAB, (sequence.num_scored, candidates), np.int32)
            sequence = dataclasses.replace(sequence, candidate_ids=ids)
        sequences.append(sequence)
    return sequences


def expected(sequence: SequenceToScore, *, top_k=0, temperature=1.0, vocab_size=VOCAB) -> TokenScores:
    """Returns the fake engine's scores, from its formula."""
    positions_P = sequence.scored_positions()
    full_PV = fake.logprobs_PV(sequence.token_ids, positions_P, vocab_size=vocab_size, temperature=temperature)
    full_PV = np.minimum(full_PV.astype(np.float32), 0)
    order_PV = np.argsort(-full_PV, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    candidates = sequence.candidate_ids
    return TokenScores(
        logprobs=full_PV[np.arange(len(positions_P)), sequence.token_ids[positions_P]],
        top_ids=order_PV if top_k else None,
        top_logprobs=np.take_along_axis(full_PV, order_PV, axis=1) if top_k else None,
        candidate_logprobs=None if candidates is None else np.take_along_axis(full_PV, candidates, axis=1),
        token_crc=codec.token_crc(sequence.token_ids),
    )


def assert_scores(got, sequences, *, top_k=0, temperature=1.0) -> None:
    """Checks that each sequence has exactly its scores, bit for bit, in the requested order."""
    for b, (scores, sequence) in enumerate(zip(got, sequences, strict=True)):
        right = expected(sequence, top_k=top_k, temperature=temperature)
        assert scores.token_crc == right.token_crc
        for name in ("logprobs", "top_ids", "top_logprobs", "candidate_logprobs"):
            g, e = getattr(scores, name), getattr(right, name)
            if e is None:
                assert g is None
            else:
                np.testing.assert_array_equal(g, e, err_msg=f"{name} of sequence {b}")


def change_bytes(rng, data):
    """Returns `data` with bytes flipped, deleted, inserted, doubled or truncated; `rng` is a seeded numpy generator."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(changed) + 1))
        end = place + int(rng.integers(1, 20))
        how = rng.choice(5, p=[0.1, 0.1, 0.1, 0.1, 0.6])
        if how == 0:
            del changed[place:end]
        elif how == 1:
            changed[place:place] = rng.integers(0, 256, end - place, np.uint8).tobytes()
        elif how == 2:
            changed[place:place] = changed[place:end]
        elif how == 3 and len(changed) > 1:
            del changed[place:]
        elif changed:
            changed[place % len(changed)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def metrics(sidecar) -> dict[str, float]:
    """Reads the sidecar's Prometheus metrics, by name and labels."""
    port = int(pathlib.Path(f"{sidecar.port_file}.metrics").read_text())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def calls(sidecar) -> list[dict[str, Any]]:
    """Reads the log's records of finished scoring calls: code, sequences, tokens, scored, ..."""
    records = [json.loads(line) for line in sidecar.log.splitlines() if line.startswith("{") and line.endswith("}")]
    return [record for record in records if record.get("method") == "ScoreSequences" and "code" in record]


def good_calls(sidecar) -> int:
    return sum(call["code"] == "OK" for call in calls(sidecar))


def rss_bytes(pid: int) -> int:
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def num_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
