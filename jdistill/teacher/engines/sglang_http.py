"""In front of SGLang servers that run: /generate with token ids and `return_logprob`.

SGLang starts its log-probabilities at `logprob_start_len`, where the first entry is always null, so a score that begins
at token position t asks from t - 1. Every entry names the token that it speaks of, and each is compared. Candidates:
SGLang takes one list of ids for all positions, so the union of a sequence's candidates is asked and picked from; the
reply grows with positions x union.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jdistill.config import ConfigError
from jdistill.teacher.engines.http_front import HttpFrontEngine, Server, ServerRefusedError, finish
from jdistill.wire.codec import token_crc
from jdistill.wire.types import SequenceToScore, TokenScores


class SglangHttpEngine(HttpFrontEngine):
    """Sampled tokens, top-k and candidates at temperature 1: SGLang's input log-probabilities know no other."""

    name = "sglang-http"
    max_candidate_count = 64

    async def identify(self, server: Server) -> dict[str, Any]:
        """See HttpFrontEngine.identify."""
        info = await self.get(server, "/get_server_info")
        if "max_req_input_len" not in info:
            raise ConfigError(f"{server.url} is no SGLang server: its /get_server_info has no max_req_input_len")
        loaded = [path.get("lora_name", "") if isinstance(path, dict) else str(path).partition("=")[0]
                  for path in info.get("lora_paths") or []]  # fmt: skip
        missing = [name for name in self._config.adapters if name not in loaded]
        if missing:
            there = ", ".join(loaded) or "none"
            raise ConfigError(f"adapters: {server.url} has no {missing[0]!r}; it has loaded {there}")
        return {
            "version": info.get("version", "unknown"),
            "model": info.get("served_model_name"),
            "max_length": info["max_req_input_len"] - 1,  # it refuses an input of exactly that (0.5.23)
        }

    def request(self, sequence: SequenceToScore, *, top_k: int, adapter: str = "") -> tuple[str, dict[str, Any]]:
        """See HttpFrontEngine.request."""
        body: dict[str, Any] = {
            "input_ids": sequence.token_ids.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": sequence.spans[0][0] - 1,
            "top_logprobs_num": top_k,
        }
        if (asked := self._asked_ids(sequence)).size:
            body["token_ids_logprob"] = asked.tolist()
        if adapter:
            body["lora_path"] = adapter
        return "/generate", body

    def _asked_ids(self, sequence: SequenceToScore) -> np.ndarray:
        """The ids to score at all positions beside the tokens themselves, ascending."""
        candidates = np.empty(0, np.int32) if sequence.candidate_ids is None else sequence.candidate_ids.ravel()
        last = self.info.vocab_size - 1
        if last in sequence.token_ids[sequence.scored_positions()]:
            # SGLang (0.5.23) scores id 0 where the vocabulary's last id stands; asked for by id it is right.
            candidates = np.append(candidates, np.int32(last))
        return np.unique(candidates)

    def read(self, reply: dict[str, Any], sequence: SequenceToScore, *, top_k: int) -> TokenScores:
        """See HttpFrontEngine.read."""
        start = sequence.spans[0][0] - 1
        expected_ids = sequence.token_ids[start:]
        rows = self._rows(reply, "input_token_logprobs", len(expected_ids))
        positions_P = sequence.scored_positions() - start
        try:
            scored_ids = np.array([row[1] for row in rows], np.int64)
            logprobs_P = [rows[i][0] for i in positions_P]
        except (TypeError, IndexError, ValueError):
            raise ServerRefusedError("input_token_logprobs holds entries without a log-probability and an id") from None
        asked = self._asked_ids(sequence)
        values_PU = np.empty((len(positions_P), 0), np.float32)
        if asked.size:
            entries = self._entries(reply, "input_token_ids_logprobs", len(rows), positions_P, len(asked))
            if not (np.array([[entry[1] for entry in row] for row in entries]) == asked).all():
                raise ServerRefusedError("the server scored other candidates than it was asked for")
            values_PU = np.array([[entry[0] for entry in row] for row in entries], np.float32)
        last = self.info.vocab_size - 1
        zeroed = (expected_ids == last) & (scored_ids == 0)
        scored_ids = np.where(zeroed, expected_ids, scored_ids)
        for p in np.flatnonzero(zeroed[positions_P]):
            logprobs_P[p] = values_PU[p, -1]
        if not np.array_equal(scored_ids, expected_ids):
            raise ServerRefusedError("the server scored other tokens than it was asked for")
        if any(value is None for value in logprobs_P):
            raise ServerRefusedError("a position that was asked for has no log-probability")
        top = None
        if top_k:
            entries = self._entries(reply, "input_top_logprobs", len(rows), positions_P, top_k)
            top = ([[entry[1] for entry in row] for row in entries], [[entry[0] for entry in row] for row in entries])
        candidates_PC = None
        if sequence.candidate_ids is not None:
            candidates_PC = np.take_along_axis(values_PU, np.searchsorted(asked, sequence.candidate_ids), axis=1)
        # What the server repeats are the ids from `start` on; those before it are as they were sent.
        whole = np.concatenate([sequence.token_ids[:start], scored_ids]).astype(np.int32)
        return finish(sequence, whole[sequence.scored_positions()], logprobs_P, top, candidates_PC, token_crc(whole))

    def _rows(self, reply: dict[str, Any], name: str, count: int) -> list[Any]:
        rows = (reply.get("meta_info") or {}).get(name)
        if not isinstance(rows, list) or len(rows) != count:
            got = len(rows) if isinstance(rows, list) else "no"
            raise ServerRefusedError(f"{got} entries of {name}, expected {count}")
        return rows

    def _entries(
        self, reply: dict[str, Any], name: str, count: int, positions: np.ndarray, width: int
    ) -> list[list[Any]]:
        rows = self._rows(reply, name, count)
        chosen = [rows[i] for i in positions]
        for row in chosen:
            if not isinstance(row, list) or len(row) != width or any(entry[0] is None for entry in row):
                raise ServerRefusedError(f"{name} has not {width} entries at each position")
        return chosen
