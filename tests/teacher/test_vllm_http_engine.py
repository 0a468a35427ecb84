"""The engine in front of vLLM's own server, which runs for real."""

import asyncio
import importlib.util
import sys
import urllib.request

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: run these with the Python of its environment", allow_module_level=True)


from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.teacher.engines import create_engine
from jdistill.wire.types import SequenceToScore
from tests.teacher.checkpoints import write_checkpoint
from tests.teacher.engine_contract import EngineContract, serve
from tests.teacher.http_server import free_port, running

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm-http")
    path = write_checkpoint(directory / "qwen3-tiny")
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "129"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1", "HF_HUB_OFFLINE": "1"}
    log_path = directory / "server.log"
    with running(command, port=port, log_path=log_path, health="/health", **environment) as address:
        yield address, path


@pytest.fixture(scope="module")
def served(url, tmp_path_factory):
    address, path = url
    yield from serve("vllm-http", path, tmp_path_factory.mktemp("reference"), urls=[address], dtype="float32")


class TestVllmHttpEngine(EngineContract):
    pass


def test_a_closed_iterator_aborts_the_requests_in_the_server(served, url):
    def running_requests():
        text = urllib.request.urlopen(url[0] + "/metrics", timeout=5).read().decode()
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
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: the server"),
        ({"offload": True}, "cannot put it to sleep"),
        ({"adapters": {"math": "/nowhere"}}, "has no 'math'"),
        ({"max_sequence_length": 500}, "the limit of the server"),
        ({"engine": "vllm"}, "two ways of naming an engine"),
        ({"engine_args": {"max_conections": 3}}, "max_connections"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(served, url, change, words):
    fields = {"engine": "vllm-http", "model": str(url[1]), "urls": [url[0]], **change}
    with pytest.raises(ConfigError, match=words):
        served.runner.run(create_engine(TeacherServerConfig(**fields)))
