"""In front of a running SGLang server: /generate with token ids and `return_logprob`.

SGLang starts its log-probabilities at `logprob_start_len`, where the first entry is always null, so a score that begins
at token position t requests from t - 1. Every entry names its token, and each is compared. Top-k comes as packed arrays
where the version supports them (`flat`), otherwise as nested lists (`plain`).

Candidates: SGLang takes one list of ids for all positions, so the union of all positions' candidates is requested and
then selected from. Positions x union grows with the square of the positions, so a sequence is requested in consecutive
pieces of at most MAX_ENTRIES entries, whose common beginning is in SGLang's prefix cache.

Dimension key: P scored positions of one request, U ids requested at each of them, K top-k, C candidates.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import uuid
from collections.abc import Iterator
from typing import Any

import aiohttp
import numpy as np
import pydantic

from jdistill.config import ConfigError
from jdistill.sidecar.engines.adapters import MERGE, Adapter, check_applied
from jdistill.sidecar.engines.http_connection import ServerRefusedError
from jdistill.sidecar.engines.http_front import HttpFrontEngine, HttpOptions
from jdistill.sidecar.engines.http_replies import token_scores
from jdistill.weight_files import ADAPTER_WEIGHTS
from jdistill.wire.codec import token_crc
from jdistill.wire.errors import FingerprintMismatchError
from jdistill.wire.types import SequenceToScore, TokenScores

MAX_ENTRIES = 65_536  # [log-probability, id] pairs per request: 2 MB of JSON


class SglangHttpOptions(HttpOptions):
    """`engine_args` of sglang-http."""

    max_top_k: int = pydantic.Field(256, ge=0, description="highest top_k offered to clients; SGLang has no limit")
    max_candidates: int = pydantic.Field(64, ge=0, description="candidates per position")


class SglangHttpEngine(HttpFrontEngine):
    """Scores sampled tokens, top-k and candidates; temperature 1 only, like SGLang's input log-probabilities."""

    name = "sglang-http"
    options: SglangHttpOptions
    options_class = SglangHttpOptions
    ways = ("flat", "plain")

    async def identify(self) -> dict[str, Any]:
        """See HttpFrontEngine.identify."""
        try:
            info = await self.connection.get("/server_info")
        except ConfigError:  # the path before 0.5.6
            info = await self.connection.get("/get_server_info")
        if not isinstance(info, dict) or not isinstance(info.get("max_req_input_len"), int):
            raise ConfigError(
                f"{self.connection.url} is not an SGLang server: its /server_info has no max_req_input_len"
            )
        loaded = []
        for adapter in info.get("lora_paths") or []:
            loaded.append(adapter.get("lora_name") if isinstance(adapter, dict) else str(adapter).partition("=")[0])
        missing = [name for name in self._config.adapters if name not in loaded]
        if missing:
            there = ", ".join(map(str, loaded)) or "none"
            raise ConfigError(f"adapters: {self.connection.url} has no {missing[0]!r}; it has loaded {there}")
        return {
            "version": info.get("version", "unknown"),
            "model": info.get("served_model_name"),
            "max_length": info["max_req_input_len"] - 1,  # an input of exactly that length is refused (0.5.23)
            "root": info.get("model_path"),
            "revision": info.get("weight_version"),
        }

    @classmethod
    def check_adapter(cls, adapter: Adapter) -> None:
        """See HttpFrontEngine.check_adapter: SGLang (0.5.23) reads less of PEFT's format than vLLM."""
        rank, alpha = adapter.options["r"], adapter.options["lora_alpha"]
        check_applied(adapter, "SGLang", lambda _: (rank, alpha / rank), remedy="use the vllm or transformers engine")
        targets = adapter.options.get("target_modules")
        if isinstance(targets, str) and targets != "all-linear":
            raise ConfigError(
                f"adapters: {adapter.path} has target_modules = {targets!r}; SGLang reads a list of names only: write "
                f"{sorted({name.rpartition('.')[2] for name in adapter.modules})} there"
            )
        if others := sorted(set(adapter.path.glob("*.safetensors")) - {adapter.path / ADAPTER_WEIGHTS}):
            raise ConfigError(f"adapters: SGLang would also read {others[0]}: move it to another directory")
        layers: dict[str, set[str]] = {}
        for name in adapter.modules:
            parent, _, last = name.rpartition(".")
            layers.setdefault(parent, set()).add(last)
        for parent, names in layers.items():
            # It joins q, k and v, starting from q and v, and gate and up, starting from gate; others would be lost.
            lost = names & {"q_proj", "k_proj", "v_proj"} and not {"q_proj", "v_proj"} <= names
            if lost or ("up_proj" in names and "gate_proj" not in names):
                raise ConfigError(
                    f"adapters: {adapter.path} adapts {', '.join(sorted(names))} of {parent}; SGLang needs q_proj and "
                    f"v_proj together, and gate_proj with up_proj: use the vllm or transformers engine, or {MERGE}"
                )

    def use(self, way: str) -> None:
        """See HttpFrontEngine.use."""
        super().use(way)
        self.max_candidate_count = self.options.max_candidates

    def request(self, sequence: SequenceToScore, *, top_k: int, adapter: str = "") -> tuple[str, dict[str, Any]]:
        """See HttpFrontEngine.request."""
        body: dict[str, Any] = {
            "rid": uuid.uuid4().hex,  # for abandon()
            "input_ids": sequence.token_ids.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": sequence.spans[0][0] - 1,
            "top_logprobs_num": top_k,
        }
        if top_k and self.way == "flat":
            body |= {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
        if (asked := self._asked_ids(sequence)).size:
            body["token_ids_logprob"] = asked.tolist()
        if adapter:
            body["lora_path"] = adapter
        return "/generate", body

    async def abandon(self, body: dict[str, Any]) -> None:
        """See HttpFrontEngine.abandon: SGLang looks for closed connections only every 4 seconds."""
        session = self.connection.session
        if session is not None and "rid" in body:
            timeout = aiohttp.ClientTimeout(total=5.0)
            url = self.connection.url + "/abort_request"
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                async with session.post(url, json={"rid": body["rid"]}, timeout=timeout):
                    pass

    async def _ask(self, sequence: SequenceToScore, top_k: int, adapter: str = "") -> TokenScores:
        if sequence.candidate_ids is None:
            return await super()._ask(sequence, top_k, adapter)
        scores = []
        for piece in pieces(sequence, MAX_ENTRIES):
            scores.append(await super()._ask(piece, top_k, adapter))
        fields = ("logprobs", "top_ids", "top_logprobs", "candidate_logprobs")
        joined = {
            name: np.concatenate([getattr(part, name) for part in scores])
            for name in fields
            if getattr(scores[0], name) is not None
        }
        return dataclasses.replace(scores[-1], **joined, token_crc=token_crc(sequence.token_ids))

    def _asked_ids(self, sequence: SequenceToScore) -> np.ndarray:
        """Returns the ids to score at all positions in addition to the tokens themselves, ascending."""
        candidates = np.empty(0, np.int32) if sequence.candidate_ids is None else sequence.candidate_ids.ravel()
        last = self.info.vocab_size - 1
        if last in sequence.token_ids[sequence.scored_positions()]:
            # SGLang (0.5.23) reports id 0 in place of the vocabulary's last id; a score requested by id is unambiguous.
            candidates = np.append(candidates, np.int32(last))
        return np.unique(candidates)

    def read(self, reply: dict[str, Any], sequence: SequenceToScore, *, top_k: int) -> TokenScores:
        """See HttpFrontEngine.read."""
        meta = reply["meta_info"]
        self._check_revision(meta)
        start = sequence.spans[0][0] - 1
        expected_ids = sequence.token_ids[start:]
        rows = _rows(meta, "input_token_logprobs", len(expected_ids))
        positions_P = sequence.scored_positions() - start
        scored_ids = np.array([row[1] for row in rows], np.int64)
        logprobs_P = [rows[i][0] for i in positions_P]
        asked = self._asked_ids(sequence)
        values_PU = np.empty((len(positions_P), 0), np.float32)
        if asked.size:
            entries = _entries(meta, "input_token_ids_logprobs", len(rows), positions_P, len(asked))
            if not (np.array([[entry[1] for entry in row] for row in entries]) == asked).all():
                raise ServerRefusedError("the server scored other candidates than requested")
            values_PU = np.array([[entry[0] for entry in row] for row in entries], np.float32)
        last = self.info.vocab_size - 1
        zeroed = (expected_ids == last) & (scored_ids == 0)
        scored_ids = np.where(zeroed, expected_ids, scored_ids)
        for p in np.flatnonzero(zeroed[positions_P]):
            logprobs_P[p] = values_PU[p, -1]
        if not np.array_equal(scored_ids, expected_ids):
            raise ServerRefusedError("the server scored other tokens than requested")
        top = _top(meta, len(rows), positions_P, top_k) if top_k else None
        candidates_PC = None
        if sequence.candidate_ids is not None:
            candidates_PC = np.take_along_axis(values_PU, np.searchsorted(asked, sequence.candidate_ids), axis=1)
        # The server returns the ids from `start` on; those before are taken as sent.
        whole = np.concatenate([sequence.token_ids[:start], scored_ids]).astype(np.int32)
        return token_scores(
            sequence, whole[sequence.scored_positions()], logprobs_P, top, candidates_PC, token_crc(whole)
        )

    def _check_revision(self, meta: dict[str, Any]) -> None:
        """Raises FingerprintMismatchError if the reply names other weights: a running server's may be replaced."""
        before = None if self._identity is None else self._identity["revision"]
        now = meta.get("weight_version")
        if before is not None and now is not None and now != before:
            raise FingerprintMismatchError(
                f"the server's weights were replaced: weight_version {now!r}, at start {before!r}; restart the sidecar "
                "if that was meant"
            )


def pieces(sequence: SequenceToScore, max_entries: int) -> Iterator[SequenceToScore]:
    """Cuts a sequence with candidates into pieces of at most `max_entries` entries (rows x different candidates).

    A piece ends after its last scored token, and its rows begin at its first one; it has at least one scored position.
    """
    assert sequence.candidate_ids is not None
    positions_P = sequence.scored_positions()
    first, union = 0, set(sequence.candidate_ids[0].tolist())
    for p in range(1, len(positions_P) + 1):
        if p < len(positions_P):
            larger = union.union(sequence.candidate_ids[p].tolist())
            num_rows = int(positions_P[p] - positions_P[first]) + 2  # holes too, and the null row
            if num_rows * len(larger) <= max_entries:
                union = larger
                continue
        begin, end = int(positions_P[first]), int(positions_P[p - 1]) + 1
        spans = tuple(
            (max(start, begin), min(stop, end)) for start, stop in sequence.spans if start < end and stop > begin
        )
        yield SequenceToScore(sequence.token_ids[:end], spans, sequence.candidate_ids[first:p])
        if p < len(positions_P):
            first, union = p, set(sequence.candidate_ids[p].tolist())


def _rows(meta: dict[str, Any], name: str, count: int) -> list[Any]:
    rows = meta.get(name)
    if not isinstance(rows, list) or len(rows) != count:
        got = len(rows) if isinstance(rows, list) else "no"
        raise ServerRefusedError(f"{got} entries of {name}, expected {count}")
    return rows


def _entries(meta: dict[str, Any], name: str, count: int, positions_P: np.ndarray, width: int) -> list[list[Any]]:
    rows = _rows(meta, name, count)
    chosen = [rows[i] for i in positions_P]
    for row in chosen:
        if not isinstance(row, list) or len(row) != width:
            raise ServerRefusedError(f"{name} does not have {width} entries at each position")
    return chosen


def _top(meta: dict[str, Any], count: int, positions_P: np.ndarray, top_k: int) -> tuple[Any, Any]:
    """Returns ids and log-probabilities [P, K] from packed arrays or nested lists."""
    if "input_top_logprobs_shape" not in meta:
        entries = _entries(meta, "input_top_logprobs", count, positions_P, top_k)
        return [[entry[1] for entry in row] for row in entries], [[entry[0] for entry in row] for row in entries]
    prefix = meta["input_top_logprobs_null_prefix"]  # number of rows without values: the first row
    if prefix != 1 or meta["input_top_logprobs_shape"] != [count - 1, top_k]:
        raise ServerRefusedError(
            f"input_top_logprobs has {prefix} null rows and shape {meta['input_top_logprobs_shape']}, expected 1 and "
            f"{[count - 1, top_k]}"
        )
    found = []
    for name, dtype in (("idx", "int32"), ("val", "float32")):
        if meta[f"input_top_logprobs_{name}_flat_b64_dtype"] != dtype:
            raise ServerRefusedError(f"input_top_logprobs_{name} is not {dtype}")
        data = base64.b64decode(meta[f"input_top_logprobs_{name}_flat_b64"], validate=True)
        found.append(np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(count - 1, top_k)[positions_P - 1])
    return found[0], found[1]
