"""What engines in front of HTTP servers share: several equal servers, balance, servers left out and back, verification.

aiohttp is the client: asynchronous, pooled, and already there wherever vLLM or SGLang is installed. A request that is
cancelled closes its connection, which is how both servers learn that nobody waits any more.

Dimension key: P scored positions of one sequence, K top-k, C candidates.
"""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import hashlib
import json
import logging
import pathlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import aiohttp
import numpy as np
import pydantic

from jdistill.checkpoint_files import (
    checkpoint_dtype,
    context_length,
    read_config,
    tokenizer_fingerprint,
    vocab_size,
)
from jdistill.config import ConfigError, Section, TeacherServerConfig, parse
from jdistill.teacher.engines.base import Engine
from jdistill.teacher.fingerprint import model_fingerprint
from jdistill.wire.errors import InvalidRequestError, TeacherError, UnavailableError
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores

logger = logging.getLogger(__name__)

LEFT_OUT_S = 2.0  # how long a server that failed is not asked, unless all have failed
AGREE_WITHIN = 0.25  # nats between two servers' scores of the probe: rounding of 16 bits, not another model


class HttpOptions(Section):
    """The engine_args of the engines in front of HTTP servers."""

    max_connections: int = pydantic.Field(64, ge=1)  # requests under way at each server
    timeout_s: float = pydantic.Field(600.0, gt=0)  # of one request
    api_key_file: str | None = None  # holds the key that the server asks for (authorization: Bearer)
    max_top_k: int = pydantic.Field(20, ge=0)  # the server's own limit: vLLM's --max-logprobs


class Server:
    """One URL, and what it has to do."""

    def __init__(self, url: str, max_connections: int):
        self.url = url.rstrip("/")
        self.outstanding_tokens = 0
        self.left_out_until = 0.0
        self.slots = asyncio.Semaphore(max_connections)


class ServerRefusedError(TeacherError):
    """The server answered, and not with scores."""

    reason = "ENGINE_RESULT"


class HttpFrontEngine(Engine):
    """Scores through servers that somebody else runs; a subclass knows one server's API."""

    max_candidate_count = 0
    options_class: type[HttpOptions] = HttpOptions

    def __init__(self, config: TeacherServerConfig, urls: Sequence[str]):
        self._config = config
        self.options = parse(self.options_class, config.engine_args, source=f"engine_args of the {self.name} engine")
        self._servers = [Server(url, self.options.max_connections) for url in urls]
        self._session: aiohttp.ClientSession | None = None
        self.version = "unknown"

    @classmethod
    async def create(cls, config: TeacherServerConfig) -> HttpFrontEngine:
        """See Engine.create; the servers must run. Compares what they say with `config.model`, and with each other."""
        _check_urls(cls.name, config)
        engine = cls(config, config.urls or ())
        await engine.connect()
        return engine

    async def connect(self) -> None:
        """Asks every server what it is, and scores a probe with each."""
        headers = {}
        if self.options.api_key_file is not None:
            headers["Authorization"] = f"Bearer {pathlib.Path(self.options.api_key_file).read_text().strip()}"
        # No trust_env: http_proxy and its kin are for the internet, the server is a neighbour.
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self.options.timeout_s, sock_connect=10.0),
            connector=aiohttp.TCPConnector(limit=0),
            headers=headers,
            raise_for_status=False,
        )
        try:
            identities = [await self.identify(server) for server in self._servers]
            await self._describe(identities)
            await self._probe()
        except BaseException:
            await self.close()
            raise

    @abc.abstractmethod
    async def identify(self, server: Server) -> dict[str, Any]:
        """What the server says of itself: at least "version", "model" (its name), "max_length" (tokens or None).

        Raises:
            ConfigError: it is not such a server, or serves another model than the configuration says.
        """

    @abc.abstractmethod
    def request(self, sequence: SequenceToScore, *, top_k: int, adapter: str = "") -> tuple[str, dict[str, Any]]:
        """(path, JSON body) that scores one sequence."""

    @abc.abstractmethod
    def read(self, reply: dict[str, Any], sequence: SequenceToScore, *, top_k: int) -> TokenScores:
        """The scores in the server's reply, found by token id. Raises ServerRefusedError if they are not there."""

    async def score(
        self, sequences: Sequence[SequenceToScore], *, top_k: int = 0, temperature: float = 1.0, adapter: str = ""
    ) -> AsyncIterator[tuple[int, TokenScores]]:
        """See Engine.score."""
        if self._session is None:
            raise UnavailableError(f"the {self.name} engine is closed")
        tasks = {
            asyncio.create_task(self._score_one(sequence, top_k, adapter)): index
            for index, sequence in enumerate(sequences)
        }
        pending = set(tasks)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield tasks[task], task.result()
        finally:  # closed early, cancelled or failed: the servers see their connections go
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """See Engine.close."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    async def get(self, server: Server, path: str) -> Any:
        """JSON of GET. Raises ConfigError that names the URL."""
        assert self._session is not None
        try:
            async with self._session.get(server.url + path) as reply:
                if reply.status != 200:
                    raise ConfigError(
                        f"{server.url}{path} answers {reply.status} {reply.reason}: is a server of the {self.name} "
                        "engine's kind there, and does it want a key (engine_args.api_key_file)?"
                    )
                return await reply.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, ValueError) as e:
            raise ConfigError(
                f"cannot reach {server.url}{path} ({type(e).__name__}: {e}); is the server up, and the URL right?"
            ) from None

    async def _score_one(self, sequence: SequenceToScore, top_k: int, adapter: str) -> TokenScores:
        path, body = self.request(sequence, top_k=top_k, adapter=adapter)
        failures: list[str] = []
        num_tokens = len(sequence.token_ids)
        tried: set[Server] = set()
        while len(tried) < len(self._servers):
            now = time.monotonic()
            left = [server for server in self._servers if server not in tried]
            up = [server for server in left if server.left_out_until <= now] or left
            server = min(up, key=lambda server: server.outstanding_tokens)
            tried.add(server)
            server.outstanding_tokens += num_tokens
            try:
                async with server.slots:
                    reply = await self._post(server, path, body)
            except UnavailableError as e:
                server.left_out_until = time.monotonic() + LEFT_OUT_S
                failures.append(str(e))
                continue
            finally:
                server.outstanding_tokens -= num_tokens
            return self.read(reply, sequence, top_k=top_k)
        raise UnavailableError("; ".join(failures))

    async def _post(self, server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert self._session is not None
        try:
            async with self._session.post(server.url + path, json=body) as reply:
                data = await reply.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise UnavailableError(f"{server.url}: {type(e).__name__}: {e}") from None
        if reply.status in (429, 502, 503, 504):
            raise UnavailableError(f"{server.url} answers {reply.status}: {_excerpt(data)}")
        try:
            parsed = json.loads(data)
        except ValueError:
            raise ServerRefusedError(f"{server.url} answers {reply.status}, not JSON: {_excerpt(data)}") from None
        if reply.status == 400:
            raise InvalidRequestError(f"{server.url} refused a sequence: {_excerpt(data)}")
        if reply.status != 200 or not isinstance(parsed, dict):
            raise ServerRefusedError(f"{server.url} answers {reply.status}: {_excerpt(data)}")
        return parsed

    async def _describe(self, identities: list[dict[str, Any]]) -> None:
        config, first = self._config, identities[0]
        for server, identity in zip(self._servers, identities, strict=True):
            for name in ("model", "max_length"):
                if identity[name] != first[name]:
                    raise ConfigError(
                        f"the servers differ in {name}: {self._servers[0].url} says {first[name]!r}, {server.url} says "
                        f"{identity[name]!r}; the URLs of one teacher serve the same model"
                    )
        self.version = str(first["version"])
        path = pathlib.Path(config.model)
        hf_config = read_config(path)
        longest = min(context_length(hf_config), first["max_length"] or context_length(hf_config))
        if config.max_sequence_length is not None and not 2 <= config.max_sequence_length <= longest:
            raise ConfigError(
                f"max_sequence_length: expected 2 to {longest} (the limit of the server), got "
                f"{config.max_sequence_length}"
            )
        try:
            dtype = checkpoint_dtype(path) if config.dtype == "auto" else config.dtype
            fingerprint = model_fingerprint(path, dtype)
        except (FileNotFoundError, ValueError):  # no weights here: all that can be told apart is what the server says
            dtype = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "unknown")
            known = json.dumps([hf_config, first["model"], first["max_length"]], sort_keys=True)
            fingerprint = hashlib.sha256(known.encode()).hexdigest()
        size = vocab_size(hf_config)
        self.info = ModelInfo(
            model=config.served_name or path.resolve().name,
            fingerprint=fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint(path),
            vocab_size=size,
            max_sequence_length=config.max_sequence_length or longest,
            max_top_k=min(self.options.max_top_k, size),
            max_candidate_count=min(self.max_candidate_count, size),
            any_temperature=False,
            dtype=dtype,
        )
        self.adapters = {
            name: dataclasses.replace(
                self.info,
                model=name,
                base_model=self.info.model,
                fingerprint=hashlib.sha256(f"{fingerprint} {name} {path}".encode()).hexdigest(),
            )
            for name, path in config.adapters.items()
        }

    async def _probe(self) -> None:
        """Each server scores the same short sequence: does this API give what we read out of it, and all the same?"""
        length = min(12, self.info.max_sequence_length)
        ids = (np.arange(1, length + 1) * max(1, self.info.vocab_size // 13) % self.info.vocab_size).astype(np.int32)
        probe = SequenceToScore(ids, ((length // 2, length),))
        top_k = min(2, self.info.max_top_k)
        expected: np.ndarray | None = None
        for server in self._servers:
            path, body = self.request(probe, top_k=top_k)
            try:
                got = self.read(await self._post(server, path, body), probe, top_k=top_k).logprobs
                whole = SequenceToScore(ids)
                path, body = self.request(whole, top_k=0)
                all_of_it = self.read(await self._post(server, path, body), whole, top_k=0).logprobs
            except TeacherError as e:
                raise ConfigError(
                    f"{server.url} ({self.version}) does not score a probe as the {self.name} engine needs it: {e}"
                ) from e
            if not np.abs(all_of_it[length // 2 - 1 :] - got).max() <= AGREE_WITHIN:
                raise ConfigError(
                    f"{server.url} ({self.version}) scores the end of a sequence otherwise than the whole of it: "
                    "this version is not to be trusted"
                )
            if expected is not None and not np.abs(expected - got).max() <= AGREE_WITHIN:
                raise ConfigError(
                    f"{server.url} and {self._servers[0].url} score the same sequence differently, by up to "
                    f"{np.abs(expected - got).max():.3g} nats: they serve different weights"
                )
            expected = got if expected is None else expected


def _check_urls(name: str, config: TeacherServerConfig) -> None:
    if not config.urls:
        raise ConfigError(f"engine {name} is in front of a server that runs: give its address, --url http://HOST:PORT")
    for url in config.urls:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {url}: expected http://HOST:PORT or https://HOST:PORT")
    if len(set(config.urls)) != len(config.urls):
        raise ConfigError(f"--url: one is given twice: {', '.join(config.urls)}")
    for field in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if getattr(config, field) != 1:
            raise ConfigError(f"{field}: the server behind engine {name} has its own; leave it out here")
    for field in ("quantization", "memory_fraction"):
        if getattr(config, field) is not None:
            raise ConfigError(f"{field}: the server behind engine {name} has its own; leave it out here")
    if config.offload:
        raise ConfigError(f"offload: engine {name} does not own the server and cannot put it to sleep")


def _excerpt(data: bytes) -> str:
    text = data.decode(errors="replace")
    return text if len(text) <= 300 else text[:300] + " ..."


def finish(
    sequence: SequenceToScore,
    scored_ids: np.ndarray,
    logprobs_P: list[float],
    top: tuple[list[list[int]], list[list[float]]] | None,
    candidate_logprobs: np.ndarray | None,
    crc: int,
) -> TokenScores:
    """Arrays out of what was read; the ids that the server says it scored must be the sequence's."""
    expected_P = sequence.token_ids[sequence.scored_positions()]
    if not np.array_equal(np.asarray(scored_ids), expected_P):
        raise ServerRefusedError("the server scored other tokens than it was asked for")
    return TokenScores(
        logprobs=_clamp(logprobs_P),
        top_ids=None if top is None else np.asarray(top[0], np.int32),
        top_logprobs=None if top is None else _clamp(top[1]),
        candidate_logprobs=None if candidate_logprobs is None else _clamp(candidate_logprobs),
        token_crc=crc,
    )


def _clamp(values: Any) -> np.ndarray:
    """float32; rounding can leave a log-probability a few 1e-7 above 0. JSON's NaN stays, and is refused later."""
    array = np.asarray(values, np.float32)
    return np.where(array > 1e-4, array, np.minimum(array, np.float32(0)))
