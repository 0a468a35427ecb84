"""Base of the engines in front of one running HTTP server: verification of what it serves, and of every reply.

Another process owns the server and may restart it with other weights under the same name, without notice. So it scores
a probe before the first sequence, after every failure and after every pause, and must be what it was at start.

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

import numpy as np
import pydantic

from jdistill.checkpoint_files import (
    check_checkpoint,
    checkpoint_dtype,
    context_length,
    read_config,
    tokenizer_fingerprint,
    vocab_size,
)
from jdistill.config import ConfigError, Section, TeacherServerConfig, parse
from jdistill.fingerprint import model_fingerprint
from jdistill.sidecar.engines.adapters import Adapter, adapter_info, read_adapter
from jdistill.sidecar.engines.base import Engine
from jdistill.sidecar.engines.http_connection import Connection, ServerRefusedError, server_url
from jdistill.sidecar.engines.http_root import check_root, check_root_weights
from jdistill.sidecar.engines.own_loader import check_own_loader
from jdistill.sidecar.engines.probe import distance, probe_ids
from jdistill.weight_files import ADAPTER_CONFIG, stored_tensors
from jdistill.wire.errors import FingerprintMismatchError, InvalidRequestError, UnavailableError
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores

logger = logging.getLogger(__name__)

# How long the server's last answer vouches for it. Shorter than any start of vLLM or SGLang (at least 7 s): a restart
# either makes a request fail, or falls into a pause longer than this.
TRUSTED_S = 5.0
AGREE_WITHIN = 0.25  # nats between two scores of the probe: allows the rounding of 16 bits, not another model


class HttpOptions(Section):
    """`engine_args` of the engines in front of HTTP servers."""

    max_connections: int = pydantic.Field(64, ge=1, description="requests in flight")
    timeout_s: float = pydantic.Field(600.0, gt=0, description="seconds for one request")
    api_key_file: str | None = pydantic.Field(
        None, description="file with the API key that the server requires (authorization: Bearer)"
    )
    max_top_k: int = pydantic.Field(
        20, ge=0, description="highest top_k offered to clients; at most the server's limit (vLLM: --max-logprobs)"
    )


class HttpFrontEngine(Engine):
    """Scores through a server that another process owns; a subclass knows the server's API."""

    max_candidate_count = 0
    options_class: type[HttpOptions] = HttpOptions
    ways: tuple[str, ...] = ("plain",)  # of scoring, best first; the last is the one that the others must agree with

    def __init__(self, config: TeacherServerConfig, url: str):
        self._config = config
        self.options = parse(self.options_class, config.engine_args, source=f"engine_args of the {self.name} engine")
        self.connection = Connection(
            url, self.name, timeout_s=self.options.timeout_s, api_key_file=self.options.api_key_file
        )
        self._slots = asyncio.Semaphore(self.options.max_connections)
        self._verifying = asyncio.Lock()
        self._trusted_until = 0.0  # see TRUSTED_S
        self._identity: dict[str, Any] | None = None  # at start
        self._expected: TokenScores | None = None  # of the whole probe, at start
        self.way = self.ways[-1]
        self.version = "unknown"

    @classmethod
    async def create(cls, config: TeacherServerConfig) -> HttpFrontEngine:
        """See Engine.create; the server must be running. Compares what it serves with `config.model`."""
        engine = cls(config, _checked_url(cls.name, config))
        await engine.connect()
        return engine

    async def connect(self) -> None:
        """Asks the server what it is and has it score a probe.

        Raises:
            ConfigError: it does not answer, or is not what the configuration says.
        """
        try:
            self.connection.open()
            await self._verify()
        except UnavailableError as e:
            await self.close()
            raise ConfigError(f"{e}; is the server up, and the URL right?") from e
        except BaseException:
            await self.close()
            raise
        logger.info(
            "%s: %s %s, scoring by %s, top_k up to %d, %d candidates",
            self.connection.url,
            self.name,
            self.version,
            self.way,
            self.info.max_top_k,
            self.info.max_candidate_count,
        )

    @abc.abstractmethod
    async def identify(self) -> dict[str, Any]:
        """Returns what the server says it is: "version", "model" (its name), "max_length" (tokens or None), "root"
        (path), "revision" (of the weights).

        Raises:
            ConfigError: it is another kind of server, or serves another model than the configuration says.
            UnavailableError: it does not answer.
        """

    @classmethod
    @abc.abstractmethod
    def check_adapter(cls, adapter: Adapter) -> None:
        """Raises ConfigError unless the server applies an adapter, whose files can be read here, as PEFT does."""

    def use(self, way: str) -> None:
        """Makes `request` and `read` follow `way`, one of `ways`."""
        self.way = way

    @abc.abstractmethod
    def request(self, sequence: SequenceToScore, *, top_k: int, adapter: str = "") -> tuple[str, dict[str, Any]]:
        """Returns the path and JSON body of the request that scores one sequence."""

    @abc.abstractmethod
    def read(self, reply: dict[str, Any], sequence: SequenceToScore, *, top_k: int) -> TokenScores:
        """Returns the scores in a reply, found by token id; raises ServerRefusedError if they are missing."""

    async def abandon(self, body: dict[str, Any]) -> None:
        """Cancels a request at the server; for servers that notice a closed connection late."""

    async def score(
        self, sequences: Sequence[SequenceToScore], *, top_k: int = 0, temperature: float = 1.0, adapter: str = ""
    ) -> AsyncIterator[tuple[int, TokenScores]]:
        """See Engine.score."""
        if self.connection.session is None:
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
        finally:  # closed early, cancelled or failed: the server sees its connections close
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """See Engine.close."""
        await self.connection.close()

    async def _score_one(self, sequence: SequenceToScore, top_k: int, adapter: str) -> TokenScores:
        async with self._slots:
            try:
                if self._trusted_until < time.monotonic():
                    async with self._verifying:
                        if self._trusted_until < time.monotonic():  # otherwise another task has just verified it
                            await self._verify()
                scores = await self._ask(sequence, top_k, adapter)
            except (UnavailableError, FingerprintMismatchError):
                self._trusted_until = 0.0
                raise
        self._trusted_until = time.monotonic() + TRUSTED_S
        return scores

    async def _ask(self, sequence: SequenceToScore, top_k: int, adapter: str = "") -> TokenScores:
        path, body = self.request(sequence, top_k=top_k, adapter=adapter)
        url = self.connection.url
        reply = await self.connection.post(path, body, abandon=self.abandon)
        try:
            return self.read(reply, sequence, top_k=top_k)
        except ServerRefusedError as e:
            raise ServerRefusedError(f"{url}: {e}") from None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
            raise ServerRefusedError(f"{url}: a reply that {self.name} cannot read ({type(e).__name__}: {e})") from e

    async def _verify(self) -> None:
        """Asks the server what it is and has it score the probe; trusts it for TRUSTED_S afterwards.

        Raises:
            ConfigError: at start: it cannot be used with this configuration.
            FingerprintMismatchError: it is not what it was at start.
            UnavailableError: it does not answer.
        """
        url, at_start = self.connection.url, self._identity is None
        try:
            identity = await self.identify()
        except ConfigError as e:
            if at_start:
                raise
            raise FingerprintMismatchError(str(e)) from e
        if at_start:
            self._describe(identity)
            try:
                await self._choose()
            except ServerRefusedError as e:
                raise ConfigError(f"{url} ({self.version}) does not score a probe: {e}") from e
            self._identity = identity
        else:
            self._compare_identity(identity)
            try:
                got = await self._ask(self._probe(), self._probe_top_k())
            except (ServerRefusedError, InvalidRequestError) as e:
                raise FingerprintMismatchError(f"{url} no longer scores the probe: {e}") from e
            off = self._distance(got)
            if not off <= AGREE_WITHIN:
                raise FingerprintMismatchError(
                    f"{url} scores the probe {off:.3g} nats from its scores at start: other weights; restart the "
                    "sidecar if that was meant"
                )
        self._trusted_until = time.monotonic() + TRUSTED_S

    def _compare_identity(self, identity: dict[str, Any]) -> None:
        assert self._identity is not None
        for name in ("model", "max_length", "revision"):
            if identity.get(name) != self._identity.get(name):
                raise FingerprintMismatchError(
                    f"{self.connection.url} changed its {name}: it says {identity.get(name)!r}, at start it was "
                    f"{self._identity.get(name)!r}; restart the sidecar if that was meant"
                )

    def _describe(self, identity: dict[str, Any]) -> None:
        """Sets `info` from the files in `config.model` and the server's identity; raises ConfigError if they differ."""
        config = self._config
        self.version = str(identity["version"])
        path = pathlib.Path(config.model)
        hf_config = read_config(path)
        check_root(self.connection.url, identity.get("root"), path)
        longest = min(context_length(hf_config), identity["max_length"] or context_length(hf_config))
        if config.max_sequence_length is not None and not 2 <= config.max_sequence_length <= longest:
            raise ConfigError(
                f"max_sequence_length: expected 2 to {longest} (the limit of the server), got "
                f"{config.max_sequence_length}"
            )
        tensors = None
        if any(path.glob("*.safetensors")):
            check_checkpoint(path)
            tensors = stored_tensors(path)
            check_own_loader(f"the server ({self.name})", path)
            dtype = checkpoint_dtype(path) if config.dtype == "auto" else config.dtype
            fingerprint = model_fingerprint(path, dtype)
            check_root_weights(self.connection.url, identity.get("root"), path, dtype, fingerprint)
        else:  # no weights here: only what the server says tells models apart
            dtype = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "unknown")
            known = json.dumps([hf_config, identity["model"], identity["max_length"]], sort_keys=True)
            fingerprint = hashlib.sha256(known.encode()).hexdigest()
        for adapter in config.adapters.values():
            if (pathlib.Path(adapter) / ADAPTER_CONFIG).is_file():  # otherwise its files are only on the server
                self.check_adapter(read_adapter(adapter, tensors))
        size = vocab_size(hf_config)
        self.info = ModelInfo(
            model=config.served_name or path.resolve().name,
            fingerprint=fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint(path),
            vocab_size=size,
            max_sequence_length=config.max_sequence_length or longest,
            max_top_k=min(self.options.max_top_k, size),
            max_candidate_count=0,
            any_temperature=False,
            dtype=dtype,
        )

    async def _choose(self) -> None:
        """Chooses the first way that gives the last way's scores of the probe; the last one must work."""
        top_k = self._probe_top_k()
        self.use(self.ways[-1])
        try:
            self._expected = await self._ask(SequenceToScore(self._probe().token_ids), top_k)
        except InvalidRequestError as e:
            raise ServerRefusedError(f"{e}. Does it allow top_k = {top_k} (engine_args.max_top_k)?") from e
        mass = np.exp(self._expected.top_logprobs.astype(np.float64)).sum(axis=-1).max() if top_k else 1.0
        if not mass <= 1.01:
            raise ServerRefusedError(
                f"the {top_k} most likely tokens have a total probability of {mass:.3g}: it does not return "
                "log-probabilities of the raw logits (vLLM: start it with --logprobs-mode raw_logprobs)"
            )
        reasons = []
        for way in self.ways:
            self.use(way)
            self._set_candidates(self.max_candidate_count)
            try:
                off = self._distance(await self._ask(self._probe(), top_k))
            except (ServerRefusedError, InvalidRequestError) as e:
                reasons.append(f"{way}: {e}")
                continue
            if off <= AGREE_WITHIN:  # written so that NaN fails
                break
            reasons.append(f"{way}: scores the end of a sequence {off:.3g} nats from the whole of it")
        else:
            raise ServerRefusedError("; ".join(reasons))
        if reasons:
            logger.info("%s does not score by %s", self.connection.url, "; nor by ".join(reasons))

    def _set_candidates(self, count: int) -> None:
        self.info = dataclasses.replace(self.info, max_candidate_count=min(count, self.info.vocab_size))
        self.adapters = {name: adapter_info(self.info, name, path) for name, path in self._config.adapters.items()}

    def _probe(self) -> SequenceToScore:
        """Returns the probe with its second half scored; where possible with two candidates from its top-k at start."""
        ids = probe_ids(self.info)
        length = len(ids)
        begin = length // 2
        candidates = None
        if self.info.max_candidate_count and self._probe_top_k():
            assert self._expected is not None and self._expected.top_ids is not None
            candidates = self._expected.top_ids[begin - 1 :, : min(2, self.info.max_candidate_count)]
        return SequenceToScore(ids, ((begin, length),), candidates)

    def _probe_top_k(self) -> int:
        return self.info.max_top_k

    def _distance(self, got: TokenScores) -> float:
        assert self._expected is not None
        return distance(got, self._expected)


def _checked_url(name: str, config: TeacherServerConfig) -> str:
    """Returns the one URL of the configuration; raises ConfigError if it, or a field beside it, makes no sense here."""
    if not config.urls:
        raise ConfigError(
            f"engine {name} stands in front of a running server: give its address, --url http://HOST:PORT"
        )
    urls = [server_url(url) for url in config.urls]
    if len(config.urls) > 1:
        raise ConfigError(
            f"--url is given {len(config.urls)} times, but a sidecar stands in front of one server: start one sidecar "
            "per server and give the trainer all of them: teacher.endpoints: [host:port, host:port, ...]"
        )
    for field in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if getattr(config, field) != 1:
            raise ConfigError(f"{field}: the server behind engine {name} has its own; leave it out here")
    for field in ("quantization", "memory_fraction"):
        if getattr(config, field) is not None:
            raise ConfigError(f"{field}: the server behind engine {name} has its own; leave it out here")
    if config.offload:
        raise ConfigError(f"offload: engine {name} does not own the server and cannot put it to sleep")
    return urls[0]
