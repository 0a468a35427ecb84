"""Engines in front of an HTTP server: a fake one that answers like vLLM's, or with injected faults."""

import asyncio
import base64
import contextlib
import io
import itertools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("aiohttp")
from aiohttp import web

from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.sidecar.engines import http_front
from jdistill.sidecar.engines.http_connection import server_url
from jdistill.sidecar.engines.vllm_http import VllmHttpEngine
from jdistill.wire.codec import token_crc
from jdistill.wire.errors import FingerprintMismatchError, InvalidRequestError, TeacherError, UnavailableError
from jdistill.wire.types import SequenceToScore
from tests.sidecar.checkpoints import write_checkpoint
from tests.sidecar.engine_contract import random_spans
from tests.sidecar.http_server import free_port
from tests.sidecar.services import until

VOCAB = 512


def bigrams(seed: int) -> np.ndarray:
    """Returns log p(column | row) [V, V], the fake server's model."""
    logits_VV = np.random.default_rng(seed).standard_normal((VOCAB, VOCAB)) * 3
    return logits_VV - np.log(np.exp(logits_VV).sum(axis=-1, keepdims=True))


class FakeVllm:
    """An HTTP server with vLLM's paths and reply formats over a bigram model."""

    def __init__(self, root, *, seed=0, scale_out=True, fields=True, max_len=129, key=None):
        self.table_VV = bigrams(seed)
        self.root, self.scale_out, self.fields, self.max_len, self.key = str(root), scale_out, fields, max_len, key
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.num_scored = self.running = self.most_running = self.cancelled = 0
        self.healthy = True
        self.change = None  # reply -> reply, injects faults
        self.status = None  # of every scoring request
        self.gate = asyncio.Event()
        self.gate.set()

    async def start(self):
        app = web.Application()
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/version", self.version)
        app.router.add_post("/v1/completions", self.score)
        app.router.add_post("/inference/v1/generate", self.score)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True).start()
        return self

    async def stop(self):
        await self.runner.cleanup()

    async def health(self, request):
        return web.Response(status=200 if self.healthy else 503)

    async def version(self, request):
        return web.json_response({"version": "0.32.0"})

    async def models(self, request):
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        base = {"id": "teacher", "root": self.root, "parent": None, "max_model_len": self.max_len}
        return web.json_response({"data": [base, {"id": "math", "root": "/lora", "parent": "teacher"}]})

    async def score(self, request):
        body = await request.json()
        generate = request.path.endswith("/generate")
        if generate and not self.scale_out:
            return web.json_response({"error": "Scale-out endpoints are disabled."}, status=403)
        if self.status is not None:
            return web.json_response({"error": "told to"}, status=self.status)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        self.num_scored += 1
        ids, sampling = (body["token_ids"], body["sampling_params"]) if generate else (body["prompt"], body)
        if max(ids) >= VOCAB:
            return web.json_response({"error": "Token id is out of vocabulary"}, status=400)
        reply = {"prompt_logprobs": None, "prompt_token_ids": ids}
        rows = sampling.get("prompt_logprob_token_ids")
        if rows is not None:
            if not self.fields:
                return web.json_response({"error": "requires the V2 model runner"}, status=400)
            start, width = sampling["prompt_logprob_start"], max(map(len, rows))
            assert len(rows) == len(ids) - 1 - start
            array = np.zeros((len(rows), width), np.float32)
            for i, row in enumerate(rows):
                array[i, : len(row)] = self.table_VV[ids[start + i], row]
            file = io.BytesIO()
            np.save(file, array)
            reply["prompt_token_id_logprobs"] = base64.b64encode(file.getvalue()).decode()
        if sampling.get("prompt_logprobs") is not None:
            reply["prompt_logprobs"] = [None]
            for before, token in itertools.pairwise(ids):
                row_V = self.table_VV[before]
                shown = [*np.argsort(-row_V)[: sampling["prompt_logprobs"]].tolist(), token]  # the token comes last
                reply["prompt_logprobs"].append({str(i): {"logprob": float(row_V[i])} for i in shown})
        if not generate:
            reply = {"choices": [reply]}
        if self.change is not None:
            reply = self.change(reply)
        return web.Response(text=reply if isinstance(reply, str) else json.dumps(reply))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("front") / "teacher")


@contextlib.asynccontextmanager
async def running(*servers):
    for server in servers:
        await server.start()
    try:
        yield
    finally:
        for server in servers:
            server.gate.set()
            await server.stop()


@contextlib.asynccontextmanager
async def engine_for(path, server, **config):
    config = {"engine": "vllm-http", "model": str(path), "urls": [server.url], **config}
    engine = await VllmHttpEngine.create(TeacherServerConfig(**config))
    try:
        yield engine
    finally:
        await engine.close()


async def score_all(engine, sequences, **options):
    results = [(index, scores) async for index, scores in engine.score(sequences, **options)]
    assert sorted(index for index, _ in results) == list(range(len(sequences)))
    return [scores for _, scores in sorted(results, key=lambda item: item[0])]


def sequences_of(count, length=40):
    rng = np.random.default_rng(3)
    return [
        SequenceToScore(rng.integers(0, VOCAB, length).astype(np.int32), random_spans(length, seed))
        for seed in range(count)
    ]


def check(table_VV, sequence, scores):
    positions_P = sequence.scored_positions()
    rows_PV = table_VV[sequence.token_ids[positions_P - 1]]
    np.testing.assert_allclose(
        scores.logprobs, rows_PV[np.arange(len(positions_P)), sequence.token_ids[positions_P]], atol=1e-5
    )
    if scores.top_ids is not None:
        np.testing.assert_array_equal(scores.top_ids, np.argsort(-rows_PV)[:, : scores.top_ids.shape[1]])
        np.testing.assert_allclose(scores.top_logprobs, np.take_along_axis(rows_PV, scores.top_ids, -1), atol=1e-5)
    if sequence.candidate_ids is not None:
        expected = np.take_along_axis(rows_PV, sequence.candidate_ids, -1)
        np.testing.assert_allclose(scores.candidate_logprobs, expected, atol=1e-5)
    assert scores.token_crc == token_crc(sequence.token_ids)


@pytest.mark.parametrize(
    ("server", "way"),
    [
        ({}, "fields"),
        ({"fields": False}, "generate"),
        ({"scale_out": False}, "completions"),
    ],
)
def test_the_best_way_that_the_server_supports_is_used_and_gives_the_models_scores(path, server, way):
    async def run():
        fake = FakeVllm(path, **server)
        async with running(fake), engine_for(path, fake) as engine:
            assert engine.way == way
            assert engine.info.max_candidate_count == (19 if way == "fields" else 0)
            assert engine.info.max_sequence_length == 128
            sequences = sequences_of(4)
            if way == "fields":
                rng = np.random.default_rng(0)
                sequences += [
                    SequenceToScore(s.token_ids, s.spans, rng.integers(0, VOCAB, (s.num_scored, 5)).astype(np.int32))
                    for s in sequences
                ]
            for top_k in (0, 3):
                for sequence, scores in zip(sequences, await score_all(engine, sequences, top_k=top_k), strict=True):
                    assert (scores.top_ids is None) == (top_k == 0)
                    check(fake.table_VV, sequence, scores)

    asyncio.run(run())


def test_a_way_that_disagrees_with_completions_is_not_used(path):
    def shifted(reply):
        text = reply.get("prompt_token_id_logprobs")
        if text is None:
            return reply
        array, file = np.load(io.BytesIO(base64.b64decode(text))), io.BytesIO()
        np.save(file, np.roll(array, 1, axis=0))
        return {**reply, "prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode()}

    async def run():
        fake = FakeVllm(path)
        fake.change = shifted
        async with running(fake), engine_for(path, fake) as engine:
            assert engine.way == "generate"

    asyncio.run(run())


def edited(edit):
    def change(reply):
        edit(reply["choices"][0])
        return reply

    return change


def set_all(value):
    def edit(choice):
        for row in choice["prompt_logprobs"][1:]:
            for entry in row.values():
                entry["logprob"] = value

    return edited(edit)


def rows_change(edit):
    return edited(lambda choice: edit(choice["prompt_logprobs"]))


LIES = [
    ("missing, NaN or above 0", set_all(float("nan"))),
    ("missing, NaN or above 0", set_all(None)),
    ("missing, NaN or above 0", set_all(0.5)),
    ("cannot read", set_all("much")),
    ("39 rows of prompt_logprobs for 40 tokens", rows_change(lambda rows: rows.pop())),
    ("no rows of prompt_logprobs", edited(lambda choice: choice.update(prompt_logprobs=None))),
    ("not aligned like vLLM's", rows_change(lambda rows: rows.insert(0, rows.pop()))),
    ("scored other token ids than requested", edited(lambda choice: choice["prompt_token_ids"].reverse())),
    ("no log-probability of token", rows_change(lambda rows: rows.__setitem__(slice(1, None), [{}] * 39))),
    (
        "of the 2 most likely",
        rows_change(lambda rows: [row.pop(token) for row in rows[1:] for token in list(row)[:-1]]),
    ),
    ("cannot read", lambda reply: {}),
    ("cannot read", lambda reply: {"choices": []}),
    ("not JSON", lambda reply: "<html>"),
    ("answers 200", lambda reply: []),
]


@pytest.mark.parametrize(("words", "lie"), LIES)
def test_an_impossible_reply_is_an_error_and_never_a_score(path, words, lie):
    async def run():
        fake = FakeVllm(path, scale_out=False)
        async with running(fake), engine_for(path, fake) as engine:
            sequences = sequences_of(1)
            await score_all(engine, sequences, top_k=2)
            fake.change = lie
            with pytest.raises(TeacherError, match=words) as caught:
                await score_all(engine, sequences, top_k=2)
            assert not isinstance(caught.value, UnavailableError)  # a retry would not help
            fake.change = None
            check(fake.table_VV, sequences[0], (await score_all(engine, sequences, top_k=2))[0])

    asyncio.run(run())


@pytest.mark.parametrize(("lie", "words"), [("too few", "expected"), ("NaN", "NaN"), ("pickle", "is not an array")])
def test_a_bad_array_of_candidates_is_an_error(path, lie, words):
    def bad(reply):
        array = np.load(io.BytesIO(base64.b64decode(reply["prompt_token_id_logprobs"])))
        array = {"too few": array[1:], "NaN": array * np.nan, "pickle": array.astype(object)}[lie]
        file = io.BytesIO()
        np.save(file, array)
        return {**reply, "prompt_token_id_logprobs": base64.b64encode(file.getvalue()).decode()}

    async def run():
        fake = FakeVllm(path)
        async with running(fake), engine_for(path, fake) as engine:
            fake.change = bad
            with pytest.raises(TeacherError, match=words):
                await score_all(engine, sequences_of(1))

    asyncio.run(run())


def test_several_urls_are_refused_with_the_remedy(path):
    urls = ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
    config = TeacherServerConfig(engine="vllm-http", model=str(path), urls=urls)
    with pytest.raises(ConfigError, match=r"given 2 times.*one sidecar per server.*teacher\.endpoints: \["):
        asyncio.run(VllmHttpEngine.create(config))


def test_a_server_that_stops_while_scoring_is_unavailable_until_it_answers_again(path):
    async def run():
        server = FakeVllm(path)
        async with running(server), engine_for(path, server) as engine:
            server.gate.clear()
            scoring = asyncio.ensure_future(score_all(engine, sequences_of(12), top_k=1))
            await until(lambda: server.running == 12)
            await server.stop()
            with pytest.raises(UnavailableError, match=server.url):
                await asyncio.wait_for(scoring, 10)
            with pytest.raises(UnavailableError, match=server.url):
                await score_all(engine, sequences_of(1))
            server.gate.set()
            await server.start()
            before = server.num_scored
            sequences = sequences_of(2)
            for sequence, scores in zip(sequences, await score_all(engine, sequences), strict=True):
                check(server.table_VV, sequence, scores)
            assert server.num_scored == before + 3, "the probe comes first"

    asyncio.run(run())


def test_connections_are_bounded(path):
    async def run():
        server = FakeVllm(path)
        async with running(server), engine_for(path, server, engine_args={"max_connections": 3}) as engine:
            server.gate.clear()
            scoring = asyncio.ensure_future(score_all(engine, sequences_of(9)))
            await until(lambda: server.running == 3)
            server.gate.set()
            await asyncio.wait_for(scoring, 10)
            assert server.most_running == 3

    asyncio.run(run())


def test_an_unhealthy_servers_500_is_unavailable_and_a_healthy_ones_is_an_error(path):
    async def run():
        server = FakeVllm(path)
        async with running(server), engine_for(path, server) as engine:
            server.status, server.healthy = 500, False
            with pytest.raises(UnavailableError, match="answers 500 and is not healthy"):
                await score_all(engine, sequences_of(4))
            server.healthy = True
            engine._trusted_until = float("inf")
            with pytest.raises(TeacherError, match="answers 500") as caught:
                await score_all(engine, sequences_of(4))
            assert not isinstance(caught.value, UnavailableError)
            server.status = 400
            with pytest.raises(InvalidRequestError, match="refused a sequence"):
                await score_all(engine, sequences_of(1))

    asyncio.run(run())


@pytest.mark.parametrize("failure", ["while scoring", "in a pause"])
def test_a_server_that_comes_back_with_other_weights_is_refused(path, monkeypatch, failure):
    if failure == "in a pause":
        monkeypatch.setattr(http_front, "TRUSTED_S", 0.0)

    async def run():
        server = FakeVllm(path)
        async with running(server), engine_for(path, server) as engine:
            await score_all(engine, sequences_of(2))
            if failure == "while scoring":
                server.status = 503
                with pytest.raises(UnavailableError, match="503"):
                    await score_all(engine, sequences_of(1))
                server.status = None
            server.table_VV = bigrams(1)
            with pytest.raises(FingerprintMismatchError, match="other weights"):
                await score_all(engine, sequences_of(2))
            server.table_VV, server.max_len = bigrams(0), 65
            with pytest.raises(FingerprintMismatchError, match=r"changed its max_length.* 64, .* 128"):
                await score_all(engine, sequences_of(2))
            server.max_len = 129
            await score_all(engine, sequences_of(2))

    asyncio.run(run())


def test_closing_the_iterator_ends_the_requests_at_the_server(path):
    async def run():
        fake = FakeVllm(path)
        async with running(fake), engine_for(path, fake) as engine:
            fake.gate.clear()
            stream = engine.score(sequences_of(5))
            first = asyncio.ensure_future(anext(stream))
            await until(lambda: fake.running == 5)
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first
            await stream.aclose()
            await until(lambda: not fake.running)
            assert fake.cancelled == 5

    asyncio.run(run())


@pytest.mark.parametrize(
    ("server", "config", "words"),
    [
        ({"key": "secret"}, {}, "answers 401 Unauthorized: it wants a key.*api_key_file"),
        ({}, {"engine_args": {"server_model": "math"}}, "no model 'math'"),
        ({}, {"engine_args": {"max_top_k": 2, "scoring": "magic"}}, "scoring"),
        ({}, {"engine_args": {"api_key_file": "/nowhere/key"}}, "api_key_file: /nowhere/key"),
        ({}, {"adapters": {"teacher": "/x"}}, "no 'teacher'"),
        ({"scale_out": False}, {"max_sequence_length": 129}, "expected 2 to 128"),
    ],
)
def test_a_server_that_contradicts_the_configuration_is_refused_at_start(path, server, config, words):
    async def run():
        fake = FakeVllm(path, **server)
        async with running(fake):
            with pytest.raises(ConfigError, match=words):
                async with engine_for(path, fake, **config):
                    pass

    asyncio.run(run())


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_url_as_openais_clients_take_it_is_understood(path, end):
    async def run():
        fake = FakeVllm(path)
        async with running(fake):
            fake.url += end
            async with engine_for(path, fake) as engine:
                assert engine.connection.url == f"http://127.0.0.1:{fake.port}"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("127.0.0.1:8000", "expected http://HOST:PORT"),
        ("ftp://127.0.0.1:8000", "expected http://HOST:PORT"),
        ("http://", "expected http://HOST:PORT"),
        ("http://127.0.0.1:70000", "expected http://HOST:PORT"),
        ("http://[::1:8000", "expected http://HOST:PORT"),
        ("http://127.0.0.1 :8000", "spaces"),
        ("http://127.0.0.1:8000?key=1", "without a query"),
        ("http://user:secret@127.0.0.1:8000", "without a query"),
    ],
)
def test_a_malformed_url_is_refused_before_it_is_asked(url, words):
    with pytest.raises(ConfigError, match=words):
        server_url(url)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (
            web.Response(text="<html>sign in</html>", content_type="text/html"),
            "answers with text/html, not JSON: is this",
        ),
        (web.Response(status=404), "answers 404 Not Found: is this a vllm server"),
        (web.Response(status=403), "answers 403 Forbidden: it refuses the key in .*key .engine_args.api_key_file"),
        (web.json_response({"models": []}), "do not answer like vLLM's"),
    ],
)
def test_a_server_of_another_kind_and_a_refused_key_are_told_apart(path, tmp_path, reply, words):
    (tmp_path / "key").write_text("mine\n")

    async def run():
        fake = FakeVllm(path)

        async def models(request):
            return web.Response(status=reply.status, body=reply.body, content_type=reply.content_type)

        fake.models = models
        async with running(fake):
            with pytest.raises(ConfigError, match=words) as refused:
                async with engine_for(path, fake, engine_args={"api_key_file": str(tmp_path / "key")}):
                    pass
            assert "mine" not in str(refused.value)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 600}, r"another vocabulary or tokenizer than .*other"),
        ({"seed": 1}, r"other weights or another config\.json than .*other"),
    ],
)
def test_a_server_with_another_checkpoint_is_refused_before_it_scores(path, tmp_path, change, words):
    other = write_checkpoint(tmp_path / "other" / "teacher", **change)

    async def run():
        fake = FakeVllm(other)
        async with running(fake):
            with pytest.raises(ConfigError, match=words):
                async with engine_for(path, fake):
                    pass
        assert fake.num_scored == 0

    asyncio.run(run())


def test_weights_that_the_server_would_read_otherwise_are_refused_or_named(tmp_path, caplog):
    path = write_checkpoint(tmp_path / "teacher", tie_word_embeddings=False)
    weights = (path / "model.safetensors").read_bytes()

    async def start():
        fake = FakeVllm(path)
        async with running(fake), engine_for(path, fake):
            pass

    (path / "model-00001-of-00001.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model\.safetensors alone, vLLM and SGLang all of them"):
        asyncio.run(start())
    (path / "model.safetensors").unlink()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"stored with other values .* the server \(vllm-http\) takes"):
        asyncio.run(start())
    (path / "config.json").write_text(json.dumps(config))
    index = dict.fromkeys(load_file(path / "model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "consolidated.safetensors").write_bytes(weights)
    asyncio.run(start())
    assert "also holds consolidated.safetensors: vLLM prefers it" in caplog.text


@pytest.mark.parametrize("kind", ["raw", "all below 0"])
def test_a_server_that_returns_logits_is_refused(path, kind):
    async def run():
        fake = FakeVllm(path)
        fake.table_VV = fake.table_VV + (20 if kind == "raw" else -fake.table_VV.max(axis=-1, keepdims=True))
        async with running(fake):
            with pytest.raises(ConfigError, match="logprobs-mode raw_logprobs"):
                async with engine_for(path, fake):
                    pass

    asyncio.run(run())


def test_the_key_is_sent_and_an_adapter_is_requested_by_its_name(path, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    asked = []

    async def run():
        fake = FakeVllm(path, key="secret")
        score = fake.score

        async def noted(request):
            asked.append((await request.json())["model"])
            return await score(request)

        fake.score = noted
        config = {"engine_args": {"api_key_file": str(tmp_path / "key")}, "adapters": {"math": "/lora"}}
        async with running(fake), engine_for(path, fake, **config) as engine:
            assert engine.adapters["math"].base_model == engine.info.model == "teacher"
            assert engine.adapters["math"].fingerprint != engine.info.fingerprint
            del asked[:]
            await score_all(engine, sequences_of(1))
            await score_all(engine, sequences_of(1), adapter="math")
        assert asked == ["teacher", "math"]

    asyncio.run(run())
