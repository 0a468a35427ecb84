"""The engine in front of a real vLLM server."""

import asyncio
import dataclasses
import importlib.util
import sys
import urllib.request
import warnings

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: run these with the Python of its environment", allow_module_level=True)


from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.sidecar.engines import create_engine
from jdistill.wire.types import SequenceToScore
from tests.sidecar.checkpoints import write_checkpoint
from tests.sidecar.engine_contract import EngineContract, serve
from tests.sidecar.http_server import free_port, running

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm-http")
    path = write_checkpoint(directory / "qwen3-tiny")
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "129"]
    command += ["--enable-scale-out"]  # opens /inference/v1/generate
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "HF_HUB_OFFLINE": "1"}
    log_path = directory / "server.log"
    with running(command, port=port, log_path=log_path, health="/health", **environment) as address:
        yield address, path


@pytest.fixture(scope="module")
def generate(url, tmp_path_factory):
    address, path = url
    yield from serve("vllm-http", path, tmp_path_factory.mktemp("reference"), urls=[address], dtype="float32")


@pytest.fixture(scope="module")
def completions(generate, url):
    config = TeacherServerConfig(
        engine="vllm-http", model=str(url[1]), urls=[url[0]], engine_args={"scoring": "completions"}
    )
    engine = generate.runner.run(create_engine(config))
    yield dataclasses.replace(generate, engine=engine)
    generate.runner.run(engine.close())


class TestGenerate(EngineContract):
    @pytest.fixture
    def served(self, generate):
        assert generate.engine.way == "generate"  # `fields` needs a GPU: its own runner says so
        return generate


class TestCompletions(EngineContract):
    @pytest.fixture
    def served(self, completions):
        assert completions.engine.way == "completions"
        return completions


def test_the_fields_way_requests_the_same_as_in_process_and_reads_vllms_own_reply(generate, monkeypatch):
    """Checked against vLLM's own schemas, because its second model runner needs a GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest, GenerateTokensResponse
        from vllm.utils.serial_utils import numpy2base64
        from vllm.utils.torch_utils import make_ndarray_with_pad

        from jdistill.sidecar.engines.vllm.ways import FieldsWay

    engine, ids = generate.engine, generate.token_ids[2]
    monkeypatch.setattr(engine, "way", "fields")
    rng = np.random.default_rng(0)
    sequence = SequenceToScore(ids, ((4, 7), (20, 21), (30, 37)), rng.integers(0, 512, (11, 3)).astype(np.int32))
    _, body = engine.request(sequence, top_k=0)
    asked = GenerateRequest.model_validate(body).sampling_params
    expected = FieldsWay(512, 16).params(sequence, top_k=0, temperature=1.0)
    assert asked.prompt_logprob_start == expected.prompt_logprob_start == 3
    assert asked.prompt_logprobs is expected.prompt_logprobs is None
    assert (asked.max_tokens, asked.skip_reading_prefix_cache, asked.detokenize) == (1, True, False)
    padded = make_ndarray_with_pad(asked.prompt_logprob_token_ids, -1, np.int64, max_len=4)
    np.testing.assert_array_equal(padded, expected.prompt_logprob_token_ids)
    numbers = -np.arange(1.0, 1 + padded.size, dtype=np.float32).reshape(padded.shape)
    reply = GenerateTokensResponse(
        choices=[], prompt_token_ids=ids.tolist(), prompt_token_id_logprobs=numpy2base64(numbers)
    )
    got = engine.read(reply.model_dump(mode="json"), sequence, top_k=0)
    rows = sequence.scored_positions() - 4
    np.testing.assert_array_equal(got.logprobs, numbers[rows, 0])
    np.testing.assert_array_equal(got.candidate_logprobs, numbers[rows, 1:])


@pytest.mark.parametrize("way", ["generate", "completions"])
def test_a_closed_iterator_aborts_the_requests_in_the_server(way, url, request):
    served = request.getfixturevalue(way)

    def running_requests():
        text = urllib.request.urlopen(url[0] + "/metrics", timeout=60).read().decode()
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        lines = [line for line in text.splitlines() if line.startswith(names)]
        assert lines
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    async def start_and_leave():
        stream = served.engine.score([SequenceToScore(ids) for ids in served.token_ids * 60])
        async for _ in stream:
            break
        await stream.aclose()
        for _ in range(100):
            if await asyncio.to_thread(running_requests) == 0:
                return True
            await asyncio.sleep(0.05)
        return False

    assert served.runner.run(start_and_leave())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"urls": ["http://127.0.0.1:9"]}, "is the server up"),
        ({"urls": None}, "give its address"),
        ({"urls": ["127.0.0.1:8000"]}, "expected http://"),
        ({"urls": ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]}, r"one sidecar per server.*teacher\.endpoints"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: the server"),
        ({"offload": True}, "cannot put it to sleep"),
        ({"adapters": {"math": "/nowhere"}}, "has no 'math'"),
        ({"max_sequence_length": 500}, "the limit of the server"),
        ({"engine_args": {"max_top_k": 21}}, r"max_top_k"),
        ({"engine_args": {"server_model": "other"}}, "has no model 'other'"),
        ({"engine": "vllm"}, "two ways of naming an engine"),
        ({"engine_args": {"max_conections": 3}}, "max_connections"),
    ],
)
def test_an_impossible_configuration_is_refused_with_the_remedy(generate, url, change, words):
    fields = {"engine": "vllm-http", "model": str(url[1]), "urls": [url[0]], **change}
    with pytest.raises(ConfigError, match=words):
        generate.runner.run(create_engine(TeacherServerConfig(**fields)))
