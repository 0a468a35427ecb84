"""SGLang: starts its server as a child process on a loopback port, owns it, and scores through it.

SGLang has no stable interface in process; its server has one. The child ends with this process however that ends
(SIGKILL too), and when the child dies the engine is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import inspect
import logging
import os
import signal
import socket
import sys
from typing import Any

import aiohttp

from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.teacher.engines.http_front import HttpOptions
from jdistill.teacher.engines.options import check_engine_args, model_info
from jdistill.teacher.engines.sglang_http import SglangHttpEngine
from jdistill.wire.errors import EngineDeadError, UnavailableError
from jdistill.wire.types import SequenceToScore, TokenScores

logger = logging.getLogger(__name__)

# engine_args that would contradict the sidecar's own configuration -> what to set instead.
RESERVED = {
    "context_length": "max_sequence_length",
    "dp_size": "data_parallel_size",
    "dtype": "dtype",
    "enable_memory_saver": "offload",
    "host": None,
    "lora_paths": "adapters",
    "mem_fraction_static": "memory_fraction",
    "model_path": "model",
    "port": None,
    "pp_size": "pipeline_parallel_size",
    "quantization": "quantization",
    "served_model_name": "served_name",
    "tp_size": "tensor_parallel_size",
}
# SGLang keeps a few positions for itself: with a context of 128 it takes inputs of 122 tokens (0.5.23).
SPARE_POSITIONS = 8
STOP_TIMEOUT_S = 3.0  # less than the sidecar gives an engine to close
# The child is to end when this process does, by SIGKILL too, before it becomes SGLang's server.
LAUNCH = (
    "import runpy, sys; from jdistill.teacher.server import exit_with_parent; exit_with_parent(int(sys.argv.pop(1))); "
    "runpy.run_module('sglang.launch_server', run_name='__main__', alter_sys=True)"
)


class SglangEngine(SglangHttpEngine):
    """See the module; engine_args go to SGLang's server by name (`chunked_prefill_size`, ...)."""

    name = "sglang"

    def __init__(self, config: TeacherServerConfig, url: str, process: asyncio.subprocess.Process):
        own = {name: value for name, value in config.engine_args.items() if name in HttpOptions.model_fields}
        super().__init__(config.model_copy(update={"engine_args": own}), [url])
        self._process: asyncio.subprocess.Process | None = process

    @classmethod
    async def create(cls, config: TeacherServerConfig) -> SglangEngine:
        """Starts the server and waits until it serves."""
        fields = await asyncio.to_thread(_server_fields)
        own = set(HttpOptions.model_fields)
        check_engine_args("sglang", config.engine_args, fields | own)
        for name in RESERVED.keys() & config.engine_args:
            instead = f"; set {RESERVED[name]} instead" if RESERVED[name] else ""
            raise ConfigError(f"engine_args: {name} is set by the sidecar itself{instead}")
        on_cpu = config.engine_args.get("device") == "cpu"
        if config.offload and on_cpu:
            raise ConfigError("offload: SGLang can free memory on GPUs only; leave offload out")
        info = await asyncio.to_thread(model_info, config)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        args = {name: value for name, value in config.engine_args.items() if name not in own}
        command = _command(config, info.dtype, info.max_sequence_length, port, args, on_cpu)
        logger.info("starting %s", " ".join(["sglang.launch_server", *command]))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            LAUNCH,
            str(os.getpid()),
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),  # a command's output goes to stdout
            stderr=sys.stderr.fileno(),
            env={
                **os.environ,
                **({"SGLANG_USE_CPU_ENGINE": "1"} if on_cpu else {}),
                # A context of the longest sequence and the spare positions may be above the checkpoint's limit; no
                # token is ever scored there.
                "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
            },
            start_new_session=True,
        )
        engine = cls(config, f"http://127.0.0.1:{port}", process)
        try:
            await engine._wait_until_healthy(port)
            await engine.connect()
            # Weights are here, so the fingerprint is theirs; what the server can is what it said.
            assert engine.info.fingerprint == info.fingerprint
            engine.info = dataclasses.replace(engine.info, max_sequence_length=info.max_sequence_length)
            engine.can_sleep = config.offload
        except BaseException:
            await engine.close()
            raise
        return engine

    async def score(self, sequences: Any, *, top_k: int = 0, temperature: float = 1.0, adapter: str = "") -> Any:
        """See Engine.score."""
        async with contextlib.aclosing(
            super().score(sequences, top_k=top_k, temperature=temperature, adapter=adapter)
        ) as results:
            async for item in results:
                yield item

    async def _score_one(self, sequence: SequenceToScore, top_k: int, adapter: str) -> TokenScores:
        try:
            return await super()._score_one(sequence, top_k, adapter)
        except UnavailableError as e:
            # The connection breaks a moment before the process is known to be gone.
            with contextlib.suppress(TimeoutError):
                if self._process is not None:
                    await asyncio.wait_for(self._process.wait(), 1.0)
            await self.check()
            raise e

    async def check(self) -> None:
        """See Engine.check."""
        if self._process is not None and self._process.returncode is not None:
            raise EngineDeadError(
                f"SGLang's server has ended with code {self._process.returncode}; its log above says why. The sidecar "
                "has to be restarted"
            )

    async def sleep(self) -> None:
        """See Engine.sleep."""
        await self._control("/release_memory_occupation") if self.can_sleep else await super().sleep()

    async def wake(self) -> None:
        """See Engine.wake."""
        await self._control("/resume_memory_occupation") if self.can_sleep else await super().wake()

    async def close(self) -> None:
        """See Engine.close."""
        await super().close()
        if self._process is None:
            return
        process, self._process = self._process, None
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its schedulers too
        await process.wait()

    async def _control(self, path: str) -> None:
        assert self._session is not None
        async with self._session.post(self._servers[0].url + path, json={}) as reply:
            if reply.status != 200:
                raise EngineDeadError(f"SGLang answers {reply.status} to {path}: {(await reply.text())[:300]}")

    async def _wait_until_healthy(self, port: int) -> None:
        timeout = aiohttp.ClientTimeout(total=5.0)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                try:
                    await self.check()
                except EngineDeadError as e:
                    raise ConfigError(
                        f"SGLang {_version()} does not start with this model and these arguments: {e}"
                    ) from e
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(f"http://127.0.0.1:{port}/health") as reply:
                        if reply.status == 200:
                            return
                await asyncio.sleep(0.25)


def _version() -> str:
    return importlib.metadata.version("sglang")


def _server_fields() -> set[str]:
    try:
        from sglang.srt.server_args import ServerArgs
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"engine 'sglang' needs {e.name}, which is not installed for this Python: pip install 'jdistill[sglang]', "
            "or use the interpreter of an environment that has it"
        ) from None
    # A dataclass in some versions, another kind of record in others: annotated all the same.
    return {name for kind in ServerArgs.__mro__ for name in inspect.get_annotations(kind)}


def _command(
    config: TeacherServerConfig, dtype: str, max_length: int, port: int, args: dict[str, Any], on_cpu: bool
) -> list[str]:
    values: dict[str, Any] = {"skip_server_warmup": True}
    if on_cpu:
        # The kernels for a CPU's matrix units are not in every build; PyTorch's own attention is.
        values |= {"attention_backend": "torch_native", "disable_cuda_graph": True}
    values |= args
    values |= {
        "model_path": config.model,
        "host": "127.0.0.1",
        "port": port,
        "dtype": dtype,
        "context_length": max_length + SPARE_POSITIONS,
        "tp_size": config.tensor_parallel_size,
        "pp_size": config.pipeline_parallel_size,
        "dp_size": config.data_parallel_size,
    }
    if config.quantization is not None:
        values["quantization"] = config.quantization
    if config.memory_fraction is not None:
        values["mem_fraction_static"] = config.memory_fraction
    if config.offload:
        values["enable_memory_saver"] = True
    if config.adapters:
        values |= {"enable_lora": True, "lora_paths": [f"{name}={path}" for name, path in config.adapters.items()]}
    words: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return words
