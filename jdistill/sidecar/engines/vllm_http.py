"""In front of a running vLLM server: scores token ids in the best way that the server supports.

fields       /inference/v1/generate with `prompt_logprob_token_ids` and `prompt_logprob_start`: candidates, and only the
             requested positions. Needs vLLM 0.32 or newer, on a GPU, started with --enable-scale-out.
generate     the same path with `prompt_logprobs`: all positions; no text is decoded (2.3 times as fast with top-20).
completions  /v1/completions with `prompt_logprobs`; works everywhere.

For each prompt position, `prompt_logprobs` maps token ids to log-probabilities; the first position is null. The
prompt's token is found by its id, never by its place (in older versions the first entry was the most likely token). The
server returns the ids it scored (`return_token_ids`), and they are compared.

Dimension key: P scored positions, K top-k, C candidates.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Any, Literal

import numpy as np
import pydantic

from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.sidecar.engines.adapters import Adapter, check_applied
from jdistill.sidecar.engines.http_connection import ServerRefusedError
from jdistill.sidecar.engines.http_front import HttpFrontEngine, HttpOptions
from jdistill.sidecar.engines.http_replies import token_scores
from jdistill.wire.codec import token_crc
from jdistill.wire.types import SequenceToScore, TokenScores


class VllmHttpOptions(HttpOptions):
    """`engine_args` of vllm-http."""

    server_model: str | None = pydantic.Field(
        None, description="model name at the server; null: served_name if the server has it, else its first model"
    )
    scoring: Literal["auto", "fields", "generate", "completions"] = pydantic.Field(
        "auto", description="API used for scoring; auto: the first of fields, generate and completions that works"
    )
    max_candidates: int = pydantic.Field(
        19,
        ge=1,
        description="fields: candidates per position; the scored token takes one more of the server's --max-logprobs "
        "(20 by default)",
    )


class VllmHttpEngine(HttpFrontEngine):
    """Scores sampled tokens and top-k, by `fields` also candidates; temperature 1 only, like vLLM's HTTP API."""

    name = "vllm-http"
    options: VllmHttpOptions
    options_class = VllmHttpOptions
    ways = ("fields", "generate", "completions")

    def __init__(self, config: TeacherServerConfig, url: str):
        super().__init__(config, url)
        if self.options.scoring != "auto":
            self.ways = (self.options.scoring, "completions")
        self._model = ""

    async def identify(self) -> dict[str, Any]:
        """See HttpFrontEngine.identify."""
        try:
            models = {card["id"]: card for card in (await self.connection.get("/v1/models"))["data"]}
            base = [name for name, card in models.items() if not card.get("parent")]
            version = (await self.connection.get("/version")).get("version", "unknown")
        except (AttributeError, KeyError, TypeError):
            raise ConfigError(f"{self.connection.url}/v1/models and /version do not answer like vLLM's") from None
        missing = [name for name in self._config.adapters if name not in models or name in base]
        if missing:
            raise ConfigError(f"adapters: {self.connection.url} has no {missing[0]!r}; it serves {', '.join(models)}")
        name = self.options.server_model
        if name is None and base:
            name = self._config.served_name if self._config.served_name in base else base[0]
        if name not in base:
            raise ConfigError(
                f"engine_args.server_model: {self.connection.url} has no model {name!r}; it serves "
                f"{', '.join(models) or 'none'}"
            )
        card = models[name]
        # One token is always generated, so a scored sequence can have at most max_model_len - 1 tokens.
        length = card.get("max_model_len")
        self._model = name
        return {
            "version": version,
            "model": name,
            "max_length": None if length is None else length - 1,
            "root": card.get("root"),
        }

    @classmethod
    def check_adapter(cls, adapter: Adapter) -> None:
        """See HttpFrontEngine.check_adapter: not every version of vLLM reads rank_pattern and alpha_pattern."""
        rank, alpha = adapter.options["r"], adapter.options["lora_alpha"]
        scale = alpha / (math.sqrt(rank) if adapter.options.get("use_rslora") else rank)
        check_applied(adapter, "a vLLM server", lambda _: (rank, scale), remedy="use the vllm or transformers engine")

    def use(self, way: str) -> None:
        """See HttpFrontEngine.use."""
        super().use(way)
        self.max_candidate_count = self.options.max_candidates if way == "fields" else 0

    def request(self, sequence: SequenceToScore, *, top_k: int, adapter: str = "") -> tuple[str, dict[str, Any]]:
        """See HttpFrontEngine.request."""
        model, prompt = adapter or self._model, sequence.token_ids.tolist()
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k}
        if self.way == "completions":
            body = {"model": model, "prompt": prompt, "return_token_ids": True, "add_special_tokens": False, **sampling}
            return "/v1/completions", body
        # A prompt read from the prefix cache has no hidden states: versions have returned uninitialised memory for it.
        sampling |= {"detokenize": False, "skip_reading_prefix_cache": True}
        if self.way == "fields":
            positions_P = sequence.scored_positions()
            start = int(positions_P[0]) - 1
            # Row i is for token position start + i + 1; an empty row requests nothing.
            rows: list[list[int]] = [[] for _ in range(len(prompt) - 1 - start)]
            for p, position in enumerate(positions_P.tolist()):
                more = [] if sequence.candidate_ids is None else sequence.candidate_ids[p].tolist()
                rows[position - 1 - start] = [prompt[position], *more]
            sampling |= {"prompt_logprob_token_ids": rows, "prompt_logprob_start": start}
            sampling["prompt_logprobs"] = top_k or None
        body = {"model": model, "token_ids": prompt, "return_token_ids": True, "sampling_params": sampling}
        return "/inference/v1/generate", body

    def read(self, reply: dict[str, Any], sequence: SequenceToScore, *, top_k: int) -> TokenScores:
        """See HttpFrontEngine.read."""
        holder = reply["choices"][0] if self.way == "completions" else reply
        prompt_ids = holder.get("prompt_token_ids")
        if prompt_ids is not None and prompt_ids != sequence.token_ids.tolist():
            raise ServerRefusedError("the server scored other token ids than requested")
        scored = sequence.token_ids if prompt_ids is None else np.asarray(prompt_ids, np.int32)
        positions_P = sequence.scored_positions()
        logprobs: Any = None
        candidates_PC = top = None
        if self.way == "fields":
            width = 1 + (0 if sequence.candidate_ids is None else sequence.candidate_ids.shape[1])
            start = int(positions_P[0]) - 1
            shape = (len(sequence.token_ids) - 1 - start, width)
            rows_PW = _array(reply.get("prompt_token_id_logprobs"), shape)[positions_P - 1 - start]
            logprobs, candidates_PC = rows_PW[:, 0], rows_PW[:, 1:] if width > 1 else None
        if logprobs is None or top_k:
            rows = _rows(holder.get("prompt_logprobs"), len(sequence.token_ids))
            if logprobs is None:
                logprobs = [
                    _logprob(rows[position], int(sequence.token_ids[position]), position)
                    for position in positions_P.tolist()
                ]
            top = _top(rows, positions_P.tolist(), top_k) if top_k else None
        return token_scores(sequence, scored[positions_P], logprobs, top, candidates_PC, token_crc(scored))


def _rows(rows: Any, count: int) -> list[Any]:
    if not isinstance(rows, list) or len(rows) != count:
        got = len(rows) if isinstance(rows, list) else "no"
        raise ServerRefusedError(f"{got} rows of prompt_logprobs for {count} tokens")
    if rows[0]:  # null; {} in vLLM's flat form
        raise ServerRefusedError("the first token has a log-probability: these rows are not aligned like vLLM's")
    return rows


def _logprob(row: Any, token: int, position: int) -> float:
    entry = row.get(str(token)) if isinstance(row, dict) else None
    if entry is None:
        raise ServerRefusedError(f"no log-probability of token {token} at position {position}")
    return entry["logprob"]


def _top(rows: list[Any], positions: list[int], top_k: int) -> tuple[list[list[int]], list[list[float]]]:
    ids, logprobs = [], []
    for position in positions:
        # The prompt's own token is listed too, and older versions have another order.
        best = sorted(((entry["logprob"], token) for token, entry in rows[position].items()), reverse=True)[:top_k]
        if len(best) < top_k:
            raise ServerRefusedError(f"{len(best)} of the {top_k} most likely tokens at position {position}")
        ids.append([int(token) for _, token in best])
        logprobs.append([logprob for logprob, _ in best])
    return ids, logprobs


def _array(text: Any, shape: tuple[int, int]) -> np.ndarray:
    """Returns the array in a reply: numpy's file format in base64, without pickles."""
    if not isinstance(text, str):
        raise ServerRefusedError("the reply has no prompt_token_id_logprobs")
    try:
        array = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except (ValueError, EOFError, OSError) as e:
        raise ServerRefusedError(f"prompt_token_id_logprobs is not an array: {e}") from None
    if array.shape != shape or array.dtype.kind != "f":
        raise ServerRefusedError(f"prompt_token_id_logprobs is {array.dtype} {array.shape}, expected {shape} of floats")
    return array
