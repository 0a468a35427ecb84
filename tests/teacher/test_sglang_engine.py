"""The engines around SGLang: a real server, started by the engine itself; the other one in front of the same server."""

import asyncio
import importlib.util
import os
import pathlib
import signal

import numpy as np
import pytest

if importlib.util.find_spec("sglang") is None:
    pytest.skip("SGLang is not installed: run these with the Python of its environment", allow_module_level=True)

from jdistill.config import TeacherServerConfig
from jdistill.teacher.engines import create_engine
from jdistill.wire.errors import EngineDeadError
from jdistill.wire.types import SequenceToScore
from tests.teacher.checkpoints import write_checkpoint
from tests.teacher.engine_contract import EngineContract, Served, score_all, serve

pytestmark = [pytest.mark.sglang, pytest.mark.filterwarnings("default")]

STUBS = str(pathlib.Path(__file__).parent / "sglang_stubs")
CPU = {"device": "cpu", "max_total_tokens": 16384, "max_connections": 32}


@pytest.fixture(scope="module")
def stubs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [STUBS, os.environ.get("PYTHONPATH", "")])))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(STUBS)
        yield


@pytest.fixture(scope="module")
def owned(stubs, tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("sglang") / "qwen3-tiny")
    reference = tmp_path_factory.mktemp("reference")
    yield from serve("sglang", path, reference, dtype="float32", memory_fraction=0.2, engine_args=CPU)


@pytest.fixture(scope="module", params=["sglang", "sglang-http"])
def served(request, owned):
    """The engine that owns the server, and the one that is in front of it."""
    if request.param == "sglang":
        yield owned
    else:
        config = TeacherServerConfig(
            engine="sglang-http",
            model=str(owned.path),
            urls=[owned.engine._servers[0].url],
            max_sequence_length=128,
            dtype="float32",
        )
        engine = owned.runner.run(create_engine(config))
        yield Served(engine, owned.path, owned.runner, owned.token_ids, owned.logits)
        owned.runner.run(engine.close())


class TestSglangEngines(EngineContract):
    pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"engine_args": {"device": "cpu", "chunked_prefil_size": 3}}, "chunked_prefill_size"),
        ({"engine_args": {"device": "cpu", "tp_size": 2}}, "set tensor_parallel_size instead"),
        ({"offload": True, "engine_args": {"device": "cpu"}}, "GPUs only"),
        ({"urls": ["http://127.0.0.1:1"]}, "use engine sglang-http"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(owned, change, words):
    fields = {"engine": "sglang", "model": str(owned.path), **change}
    with pytest.raises(ValueError, match=words):
        owned.runner.run(create_engine(TeacherServerConfig(**fields)))


def test_a_server_that_dies_is_an_engine_that_is_dead(owned):
    """Last: it ends the server."""
    sequences = [SequenceToScore(np.arange(1, 120, dtype=np.int32)) for _ in range(200)]

    async def kill_in_mid_scoring():
        await owned.engine.check()
        scoring = asyncio.ensure_future(score_all(owned.engine, sequences))
        await asyncio.sleep(0.3)
        os.killpg(owned.engine._process.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="has ended"):
            await asyncio.wait_for(scoring, 20)
        with pytest.raises(EngineDeadError, match="has ended"):
            await owned.engine.check()

    owned.runner.run(kill_in_mid_scoring())
