"""In front of vLLM's own OpenAI-compatible server: /v1/completions with token ids and `prompt_logprobs`.

The reply has, for each prompt position, a mapping from token id to log-probability. The prompt's token is found by its
id, never by its place (in older versions the first entry was the most likely token), the first position is null, and
the ids that were scored come back (`return_token_ids`) and are compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jdistill.config import ConfigError
from jdistill.teacher.engines.http_front import HttpFrontEngine, Server, ServerRefusedError, finish
from jdistill.wire.codec import token_crc
from jdistill.wire.types import SequenceToScore, TokenScores


class VllmHttpEngine(HttpFrontEngine):
    """Sampled tokens and top-k at temperature 1; vLLM's HTTP API scores no candidates and no other temperature."""

    name = "vllm-http"

    async def identify(self, server: Server) -> dict[str, Any]:
        """See HttpFrontEngine.identify."""
        models = {card["id"]: card for card in (await self.get(server, "/v1/models"))["data"]}
        missing = [name for name in self._config.adapters if name not in models]
        if missing:
            raise ConfigError(f"adapters: {server.url} has no {missing[0]!r}; it serves {', '.join(models)}")
        base = [name for name, card in models.items() if not card.get("parent")]
        name = self._config.served_name if self._config.served_name in base else base[0]
        version = (await self.get(server, "/version")).get("version", "unknown")
        # One token is always generated, so the longest sequence that can be scored is one shorter.
        length = models[name].get("max_model_len")
        self._model = name
        return {"version": version, "model": name, "max_length": None if length is None else length - 1}

    def request(self, sequence: SequenceToScore, *, top_k: int, adapter: str = "") -> tuple[str, dict[str, Any]]:
        """See HttpFrontEngine.request."""
        return "/v1/completions", {
            "model": adapter or self._model,
            "prompt": sequence.token_ids.tolist(),
            "prompt_logprobs": top_k,
            "max_tokens": 1,
            "temperature": 0.0,
            "return_token_ids": True,
            "add_special_tokens": False,
        }

    def read(self, reply: dict[str, Any], sequence: SequenceToScore, *, top_k: int) -> TokenScores:
        """See HttpFrontEngine.read."""
        try:
            (choice,) = reply["choices"]
            rows = choice["prompt_logprobs"]
            prompt_ids = choice.get("prompt_token_ids")
        except (KeyError, TypeError, ValueError):
            raise ServerRefusedError("the reply has no choices[0].prompt_logprobs") from None
        if not isinstance(rows, list) or len(rows) != len(sequence.token_ids):
            got = len(rows) if isinstance(rows, list) else "none"
            raise ServerRefusedError(f"{got} rows of prompt_logprobs for {len(sequence.token_ids)} tokens")
        if rows[0] is not None:
            raise ServerRefusedError("the first token has a log-probability: these rows are not aligned as vLLM's")
        if prompt_ids is not None and prompt_ids != sequence.token_ids.tolist():
            raise ServerRefusedError("the server says that it scored other token ids")
        logprobs, top_ids, top_logprobs = [], [], []
        for position in sequence.scored_positions().tolist():
            row, token = rows[position], str(int(sequence.token_ids[position]))
            if not isinstance(row, dict) or token not in row:
                raise ServerRefusedError(f"no log-probability of the token at position {position}")
            logprobs.append(row[token]["logprob"])
            if top_k:
                best = sorted(row.items(), key=lambda item: -item[1]["logprob"])[:top_k]
                if len(best) < top_k:
                    raise ServerRefusedError(f"{len(best)} of the {top_k} most likely tokens at position {position}")
                top_ids.append([int(token) for token, _ in best])
                top_logprobs.append([entry["logprob"] for _, entry in best])
        scored = sequence.token_ids if prompt_ids is None else np.asarray(prompt_ids, np.int32)
        return finish(
            sequence,
            scored[sequence.scored_positions()],
            logprobs,
            (top_ids, top_logprobs) if top_k else None,
            None,
            token_crc(scored),
        )
