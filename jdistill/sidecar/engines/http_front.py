"""What engines in front of HTTP servers share: several equal servers, balance, servers left out and back, verification.

aiohttp is the client: asynchronous, pooled, and already there wherever vLLM or SGLang is installed. A request that is
cancelled closes its connection, which is how both servers learn that nobody waits any more.

Nobody tells this process that somebody else's server was started again with other weights under the same name. So a
server scores a probe before its first sequence, after every failure and after every pause, and it is left out unless it
is what it was.

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
from jdistill.fingerprint import model_fingerprint
from jdistill.sidecar.engines.base import Engine
from jdistill.sidecar.engines.options import adapter_info
from jdistill.wire.errors import FingerprintMismatchError, InvalidRequestError, TeacherError, UnavailableError
from jdistill.wire.types import ModelInfo, SequenceToScore, TokenScores

logger = logging.getLogger(__name__)

LEFT_OUT_S = 2.0  # how long a server that failed is not asked, unless all have failed
# How long a server's last answer vouches for it. Shorter than any start of vLLM or SGLang (7 s at least): a restart is
# either met by a request, which fails, or falls into a pause of more than this.
TRUSTED_S = 5.0
AGREE_WITHIN = 0.25  # nats between two scores of the probe: rounding of 16 bits, not another model


class HttpOptions(Section):
    """The engine_args of the engines in front of HTTP servers."""

    max_connections: int = pydantic.Field(64, ge=1)  # requests under way at each server
    timeout_s: float = pydantic.Field(600.0, gt=0)  # of one request
    api_key_file: str | None = None  # holds the key that the server asks for (authorization: Bearer)
    max_top_k: int = pydantic.Field(20, ge=0)  # up to the server's own limit (vLLM: --max-logprobs, 20 by default)


class Server:
    """One URL, and what it has to do."""

    def __init__(self, url: str, max_connections: int):
        self.url = url.rstrip("/")
        self.outstanding_tokens = 0
        self.left_out_until = 0.0
        self.trusted_until = 0.0  # see TRUSTED_S
        self.slots = asyncio.Semaphore(max_connections)
        self.admission = asyncio.Lock()


class ServerRefusedError(TeacherError):
    """The server answered, and not with scores."""

    reason = "ENGINE_RESULT"


class HttpFrontEngine(Engine):
    """Scores through servers that somebody else runs; a subclass knows one server's API."""

    max_candidate_count = 0
    options_class: type[HttpOptions] = HttpOptions
    ways: tuple[str, ...] = (
        "plain",
    )  # of scoring, the best first; the last is the one that the others must agree with

    def __init__(self, config: TeacherServerConfig, urls: Sequence[str]):
        self._config = config
        self.options = parse(self.options_class, config.engine_args, source=f"engine_args of the {self.name} engine")
        self._servers = [Server(url, self.options.max_connections) for url in urls]
        self._session: aiohttp.ClientSession | None = None
        self._identity: dict[str, Any] | None = None  # of the first server that answered
        self._expected: TokenScores | None = None  # of the whole probe, by that server
        self._farewells: set[asyncio.Task[None]] = set()
        self.way = self.ways[-1]
        self.version = "unknown"

    @classmethod
    async def create(cls, config: TeacherServerConfig) -> HttpFrontEngine:
        """See Engine.create; the servers must run. Compares what they say with `config.model`, and with each other."""
        _check_urls(cls.name, config)
        engine = cls(config, config.urls or ())
        await engine.connect()
        return engine

    async def connect(self) -> None:
        """Asks every server what it is, and has each score a probe; one that does not answer is left out for now.

        Raises:
            ConfigError: none answers, or one is not what the configuration, or another of them, says.
        """
        headers = {}
        if self.options.api_key_file is not None:
            headers["Authorization"] = f"Bearer {_read_key(self.options.api_key_file)}"
        # No trust_env: http_proxy and its kin are for the internet, the server is a neighbour.
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self.options.timeout_s, sock_connect=10.0),
            # vLLM's and SGLang's servers close a connection that was idle for 5 s: not the moment to use it again.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
            headers=headers,
            raise_for_status=False,
        )
        failures = []
        try:
            for server in self._servers:
                try:
                    await self._admit(server)
                except UnavailableError as e:
                    self._leave_out(server)
                    failures.append(str(e))
            if len(failures) == len(self._servers):
                raise ConfigError(f"{'; '.join(failures)}; is the server up, and the URL right?")
        except FingerprintMismatchError as e:
            await self.close()
            raise ConfigError(str(e)) from e
        except BaseException:
            await self.close()
            raise
        for failure in failures:
            logger.warning("%s; it is left out until it answers", failure)
        logger.info(
            "%d of %d servers: %s %s, scoring by %s, top_k up to %d, %d candidates",
            len(self._servers) - len(failures),
            len(self._servers),
            self.name,
            self.version,
            self.way,
            self.info.max_top_k,
            self.info.max_candidate_count,
        )

    @abc.abstractmethod
    async def identify(self, server: Server) -> dict[str, Any]:
        """What the server says of itself: "version", "model" (its name), "max_length" (tokens or None), "root" (path),
        "revision" (of the weights).

        Raises:
            ConfigError: it is not such a server, or serves another model than the configuration says.
            UnavailableError: it does not answer.
        """

    def use(self, way: str) -> None:
        """From now on `request` and `read` follow `way`, one of `ways`."""
        self.way = way

    @abc.abstractmethod
    def request(self, sequence: SequenceToScore, *, top_k: int, adapter: str = "") -> tuple[str, dict[str, Any]]:
        """(path, JSON body) that scores one sequence."""

    @abc.abstractmethod
    def read(self, reply: dict[str, Any], sequence: SequenceToScore, *, top_k: int) -> TokenScores:
        """The scores in the server's reply, found by token id. Raises ServerRefusedError if they are not there."""

    async def abandon(self, server: Server, body: dict[str, Any]) -> None:
        """Tells the server that nobody waits for this request; for servers that notice a closed connection late."""

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
            if self._farewells:
                await asyncio.wait(self._farewells, timeout=1.0)
            session, self._session = self._session, None
            await session.close()

    async def get(self, server: Server, path: str) -> Any:
        """JSON of GET.

        Raises:
            ConfigError: another answer than JSON; names the URL.
            UnavailableError: no answer, or the server is loading.
        """
        assert self._session is not None
        try:
            async with self._session.get(server.url + path) as reply:
                if reply.status in (429, 502, 503, 504):
                    raise UnavailableError(f"{server.url}{path} answers {reply.status} {reply.reason}")
                if reply.status != 200:
                    raise ConfigError(
                        f"{server.url}{path} answers {reply.status} {reply.reason}: is a server of the {self.name} "
                        "engine's kind there, and does it want a key (engine_args.api_key_file)?"
                    )
                return await reply.json(content_type=None)
        except ValueError as e:
            raise ConfigError(f"{server.url}{path} does not answer in JSON: {e}") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise UnavailableError(f"cannot reach {server.url}{path} ({type(e).__name__}: {e})") from None

    async def _score_one(self, sequence: SequenceToScore, top_k: int, adapter: str) -> TokenScores:
        failures: list[TeacherError] = []
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
                    if server.trusted_until < time.monotonic():
                        async with server.admission:
                            if server.trusted_until < time.monotonic():  # else another task has just done it
                                await self._admit(server)
                    scores = await self._ask(server, sequence, top_k, adapter)
            except (UnavailableError, FingerprintMismatchError) as e:
                self._leave_out(server)
                failures.append(e)
                continue
            finally:
                server.outstanding_tokens -= num_tokens
            server.trusted_until = time.monotonic() + TRUSTED_S
            return scores
        changed = all(isinstance(e, FingerprintMismatchError) for e in failures)
        error = FingerprintMismatchError if changed else UnavailableError
        raise error("; ".join(map(str, failures)))

    def _leave_out(self, server: Server) -> None:
        server.left_out_until = time.monotonic() + LEFT_OUT_S
        server.trusted_until = 0.0

    async def _ask(self, server: Server, sequence: SequenceToScore, top_k: int, adapter: str = "") -> TokenScores:
        path, body = self.request(sequence, top_k=top_k, adapter=adapter)
        reply = await self._post(server, path, body)
        try:
            return self.read(reply, sequence, top_k=top_k)
        except ServerRefusedError as e:
            raise ServerRefusedError(f"{server.url}: {e}") from None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
            raise ServerRefusedError(
                f"{server.url}: a reply that {self.name} cannot read ({type(e).__name__}: {e})"
            ) from e

    async def _post(self, server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert self._session is not None
        try:
            try:
                async with self._session.post(server.url + path, json=body) as reply:
                    data = await reply.read()
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as e:
                if isinstance(e, aiohttp.ClientConnectorError):
                    raise
                # Most likely an idle connection that the server closed just now; scoring twice does no harm.
                async with self._session.post(server.url + path, json=body) as reply:
                    data = await reply.read()
        except (aiohttp.ClientError, asyncio.CancelledError, TimeoutError, OSError) as e:
            farewell = asyncio.create_task(self.abandon(server, body))
            self._farewells.add(farewell)
            farewell.add_done_callback(self._farewells.discard)
            if isinstance(e, asyncio.CancelledError):
                raise
            raise UnavailableError(f"{server.url}: {type(e).__name__}: {e}") from None
        if reply.status in (429, 502, 503, 504):
            raise UnavailableError(f"{server.url} answers {reply.status}: {_excerpt(data)}")
        if reply.status >= 500 and not await self._healthy(server):  # its engine has died: others may live
            raise UnavailableError(f"{server.url} answers {reply.status} and is not healthy: {_excerpt(data)}")
        try:
            parsed = json.loads(data)
        except ValueError:
            raise ServerRefusedError(f"{server.url} answers {reply.status}, not JSON: {_excerpt(data)}") from None
        if reply.status == 400:
            raise InvalidRequestError(f"{server.url} refused a sequence: {_excerpt(data)}")
        if reply.status != 200 or not isinstance(parsed, dict):
            raise ServerRefusedError(f"{server.url} answers {reply.status}: {_excerpt(data)}")
        return parsed

    async def _healthy(self, server: Server) -> bool:
        assert self._session is not None
        try:
            async with self._session.get(server.url + "/health", timeout=aiohttp.ClientTimeout(total=5.0)) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def _admit(self, server: Server) -> None:
        """Asks a server what it is and has it score the probe.

        Raises:
            ConfigError: the first server to answer cannot be used with this configuration.
            FingerprintMismatchError: it is not what the first one was.
            UnavailableError: it does not answer.
        """
        first = self._identity is None
        try:
            identity = await self.identify(server)
        except ConfigError as e:
            if first:
                raise
            raise FingerprintMismatchError(str(e)) from e
        if first:
            self._describe(server, identity)
            try:
                await self._choose(server)
            except ServerRefusedError as e:
                raise ConfigError(f"{server.url} ({self.version}) does not score a probe: {e}") from e
            self._identity = identity
        else:
            self._compare_identity(server, identity)
            try:
                got = await self._ask(server, self._probe(), self._probe_top_k())
            except (ServerRefusedError, InvalidRequestError) as e:
                raise FingerprintMismatchError(f"{server.url} does not score the probe any more: {e}") from e
            off = self._distance(got)
            if not off <= AGREE_WITHIN:
                raise FingerprintMismatchError(
                    f"{server.url} scores the probe {off:.3g} nats from what the first server said at start: other "
                    "weights. The URLs of one teacher serve one model; restart the sidecar if that was meant"
                )
        server.trusted_until = time.monotonic() + TRUSTED_S

    def _compare_identity(self, server: Server, identity: dict[str, Any]) -> None:
        assert self._identity is not None
        for name in ("model", "max_length", "revision"):
            if identity.get(name) != self._identity.get(name):
                raise FingerprintMismatchError(
                    f"the servers differ in {name}: {server.url} says {identity.get(name)!r}, at start it was "
                    f"{self._identity.get(name)!r}; the URLs of one teacher serve the same model"
                )

    def _describe(self, server: Server, identity: dict[str, Any]) -> None:
        """Makes `info` of the files in `config.model` and what the server says; raises ConfigError if they differ."""
        config = self._config
        self.version = str(identity["version"])
        path = pathlib.Path(config.model)
        hf_config = read_config(path)
        _check_root(server, identity.get("root"), path)
        longest = min(context_length(hf_config), identity["max_length"] or context_length(hf_config))
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
            known = json.dumps([hf_config, identity["model"], identity["max_length"]], sort_keys=True)
            fingerprint = hashlib.sha256(known.encode()).hexdigest()
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

    async def _choose(self, server: Server) -> None:
        """Takes the first way that gives the last way's scores of the probe; the last one must."""
        top_k = self._probe_top_k()
        self.use(self.ways[-1])
        try:
            self._expected = await self._ask(server, SequenceToScore(self._probe().token_ids), top_k)
        except InvalidRequestError as e:
            raise ServerRefusedError(f"{e}. Does it allow top_k = {top_k} (engine_args.max_top_k)?") from e
        mass = np.exp(self._expected.top_logprobs.astype(np.float64)).sum(axis=-1).max() if top_k else 1.0
        if not mass <= 1.01:
            raise ServerRefusedError(
                f"the {top_k} most likely tokens have a probability of {mass:.3g} together: it returns something else "
                "than log-probabilities of the raw logits (vLLM: start it with --logprobs-mode raw_logprobs)"
            )
        reasons = []
        for way in self.ways:
            self.use(way)
            self._set_candidates(self.max_candidate_count)
            try:
                off = self._distance(await self._ask(server, self._probe(), top_k))
            except (ServerRefusedError, InvalidRequestError) as e:
                reasons.append(f"{way}: {e}")
                continue
            if off <= AGREE_WITHIN:  # written so that NaN fails
                break
            reasons.append(f"{way}: scores the end of a sequence {off:.3g} nats from the whole of it")
        else:
            raise ServerRefusedError("; ".join(reasons))
        if reasons:
            logger.info("%s does not score by %s", server.url, "; nor by ".join(reasons))

    def _set_candidates(self, count: int) -> None:
        self.info = dataclasses.replace(self.info, max_candidate_count=min(count, self.info.vocab_size))
        self.adapters = {name: self._adapter_info(name, path) for name, path in self._config.adapters.items()}

    def _adapter_info(self, name: str, path: str) -> ModelInfo:
        info = adapter_info(self.info, name, path)
        if (pathlib.Path(path) / "adapter_config.json").is_file():
            return info
        # Its files are with the server only: all that tells it from another is what it is called.
        known = f"{self.info.fingerprint} {name} {path}"
        return dataclasses.replace(info, fingerprint=hashlib.sha256(known.encode()).hexdigest())

    def _probe(self) -> SequenceToScore:
        """A short sequence, its second half scored; with two candidates, the whole probe's top-k, where they can be."""
        length = min(12, self.info.max_sequence_length)
        ids = (np.arange(1, length + 1) * max(1, self.info.vocab_size // 13) % self.info.vocab_size).astype(np.int32)
        begin = length // 2
        candidates = None
        if self.info.max_candidate_count and self._probe_top_k():
            assert self._expected is not None and self._expected.top_ids is not None
            candidates = self._expected.top_ids[begin - 1 :, : min(2, self.info.max_candidate_count)]
        return SequenceToScore(ids, ((begin, length),), candidates)

    def _probe_top_k(self) -> int:
        return self.info.max_top_k

    def _distance(self, got: TokenScores) -> float:
        """Nats between scores of the probe and those of the whole probe at start; NaN if there are NaN."""
        assert self._expected is not None
        begin = len(self._expected.logprobs) - len(got.logprobs)
        pairs = [(got.logprobs, self._expected.logprobs[begin:])]
        if got.top_logprobs is not None:
            pairs.append((got.top_logprobs, self._expected.top_logprobs[begin:]))
        if got.candidate_logprobs is not None:
            pairs.append(
                (got.candidate_logprobs, self._expected.top_logprobs[begin:, : got.candidate_logprobs.shape[1]])
            )
        return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)


def _read_key(file: str) -> str:
    try:
        key = pathlib.Path(file).read_text().strip()
    except OSError as e:
        raise ConfigError(f"engine_args.api_key_file: {file}: {e.strerror}") from None
    if not key or not key.isprintable() or not key.isascii():
        raise ConfigError(f"engine_args.api_key_file: {file} holds no key: expected one line of text")
    return key


def _check_root(server: Server, root: Any, path: pathlib.Path) -> None:
    """Where the server's checkpoint can be read here, it must be the configuration's."""
    if not isinstance(root, str):
        return
    ours = (vocab_size(read_config(path)), tokenizer_fingerprint(path))
    try:
        theirs = (vocab_size(read_config(root)), tokenizer_fingerprint(root))
    except (OSError, ValueError):  # a name on a hub, or a directory of another machine
        if pathlib.PurePath(root).name != path.resolve().name:
            logger.warning("%s serves %s; make sure that it is the model of %s", server.url, root, path)
        return
    if ours != theirs:
        raise ConfigError(
            f"model {path} has another vocabulary or tokenizer than {root}, which {server.url} serves; give the "
            "directory of the model that the server serves"
        )


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
        top_ids=None if top is None else _ids(top[0]),
        top_logprobs=None if top is None else _clamp(top[1]),
        candidate_logprobs=None if candidate_logprobs is None else _clamp(candidate_logprobs),
        token_crc=crc,
    )


def _clamp(values: Any) -> np.ndarray:
    """float32; rounding can leave a log-probability a few 1e-7 above 0. What cannot be one is refused."""
    array = np.asarray(values, np.float32)  # None becomes NaN
    if not (array <= 1e-4).all():  # NaN too
        raise ServerRefusedError(
            "the server returned a log-probability that is missing, NaN or above 0 (are its logprobs those of the raw "
            "logits? vLLM: --logprobs-mode raw_logprobs)"
        )
    return np.minimum(array, np.float32(0))


def _ids(values: Any) -> np.ndarray:
    array = np.asarray(values, np.int64)
    if ((array < 0) | (array > np.iinfo(np.int32).max)).any():
        raise ServerRefusedError("the server returned a token id that cannot be one")
    return array.astype(np.int32)
