"""Request scores from vLLM's OpenAI server as trainers do today: completions with `prompt_logprobs: 1`, in JSON.

AReaL sends one request and waits for it before it sends the next; `connections` > 1 is the same with that many at once.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import numpy as np

from jdistill.wire.types import SequenceToScore


def score(
    url: str, sequences: list[SequenceToScore], *, connections: int, prompt_logprobs: int = 1
) -> tuple[float, list[float]]:
    """Returns (seconds, sum of the scored log-probabilities of each sequence)."""
    return asyncio.run(_score(url, sequences, connections, prompt_logprobs))


async def _score(
    url: str, sequences: list[SequenceToScore], connections: int, prompt_logprobs: int
) -> tuple[float, list[float]]:
    slots = asyncio.Semaphore(connections)
    connector = aiohttp.TCPConnector(limit=connections)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:

        async def one(sequence: SequenceToScore) -> float:
            ids = sequence.token_ids.tolist()
            body = {"model": "teacher", "prompt": ids, "max_tokens": 1, "prompt_logprobs": prompt_logprobs}
            async with slots, session.post(f"{url}/v1/completions", json={**body, "temperature": 0.0}) as reply:
                assert reply.status == 200, await reply.text()
                parsed = await reply.json()
            return float(_logprobs(parsed, ids, sequence).sum())

        await one(sequences[0])  # the connection
        begin = time.perf_counter()
        sums = await asyncio.gather(*map(one, sequences))
        return time.perf_counter() - begin, list(sums)


def _logprobs(reply: dict[str, Any], ids: list[int], sequence: SequenceToScore) -> np.ndarray:
    rows = reply["choices"][0]["prompt_logprobs"]
    logprobs = [row[str(token)]["logprob"] for row, token in zip(rows[1:], ids[1:], strict=True)]
    return np.array(logprobs, np.float32)[sequence.scored_positions() - 1]
