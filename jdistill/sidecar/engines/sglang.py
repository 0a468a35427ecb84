"""SGLang: starts its server as a child process on a loopback port, owns it, and scores through it.

SGLang has no stable in-process interface; its server has one. The child ends with this process, even by SIGKILL, and
when the child dies the engine is dead. Like any loopback port, its port can be reached by other processes of this
machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import inspect
import logging
import os
import signal
import socket
import sys
import time
from typing import Any

import aiohttp

from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.sidecar.engines.adapters import read_adapter
from jdistill.sidecar.engines.options import check_engine_args, model_info
from jdistill.sidecar.engines.own_loader import check_model_args, check_own_loader
from jdistill.sidecar.engines.sglang_http import SglangHttpEngine, SglangHttpOptions
from jdistill.weight_files import stored_tensors
from jdistill.wire.errors import EngineDeadError, FingerprintMismatchError, TeacherError, UnavailableError
from jdistill.wire.types import SequenceToScore, TokenScores

logger = logging.getLogger(__name__)

# engine_args that would contradict the sidecar's own configuration -> what to set instead.
RESERVED = {
    "admin_api_key": None,  # the server has no key: it is for the sidecar only
    "api_key": None,
    "context_length": "max_sequence_length",
    "dp_size": "data_parallel_size",
    "dtype": "dtype",
    "enable_lora": "adapters",
    "enable_memory_saver": "offload",
    "enable_weights_cpu_backup": "offload",
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
# engine_args for the sidecar, not for the server.
OWN_ARGS = frozenset(SglangHttpOptions.model_fields) - {"api_key_file"}
# With a context of n tokens, SGLang accepts inputs of up to n - 7 (0.5.23).
SPARE_POSITIONS = 8
STOP_TIMEOUT_S = 3.0  # less than the sidecar gives an engine to close
IDLE_TIMEOUT_S = 30.0  # for cancelled requests to leave SGLang


class SglangEngine(SglangHttpEngine):
    """Starts and owns SGLang's server; engine_args go to it by name (`chunked_prefill_size`, ...)."""

    name = "sglang"

    def __init__(self, config: TeacherServerConfig, url: str, process: asyncio.subprocess.Process):
        own = {name: value for name, value in config.engine_args.items() if name in OWN_ARGS}
        super().__init__(config.model_copy(update={"engine_args": own}), url)
        self._process: asyncio.subprocess.Process | None = process
        self._asleep = False

    @classmethod
    async def create(cls, config: TeacherServerConfig) -> SglangEngine:
        """Starts the server and waits until it serves."""
        fields, has_accelerator = await asyncio.to_thread(_look_at_sglang)
        check_engine_args("sglang", config.engine_args, fields | OWN_ARGS)
        for name in RESERVED.keys() & config.engine_args:
            instead = f"; set {RESERVED[name]} instead" if RESERVED[name] else ""
            raise ConfigError(f"engine_args: {name} is set by the sidecar itself{instead}")
        on_cpu = config.engine_args.get("device", None if has_accelerator else "cpu") == "cpu"
        if config.offload and on_cpu:
            raise ConfigError("offload: SGLang can free memory on GPUs only; leave offload out")
        check_model_args("SGLang", config.engine_args)
        info = await asyncio.to_thread(model_info, config)
        await asyncio.to_thread(check_own_loader, "SGLang", config.model)
        tensors = stored_tensors(config.model) if config.adapters else None
        for path in config.adapters.values():
            cls.check_adapter(read_adapter(path, tensors))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        args = {name: value for name, value in config.engine_args.items() if name not in OWN_ARGS}
        command = _command(config, info.dtype, info.max_sequence_length, port, args, on_cpu)
        logger.info("starting %s", " ".join(["sglang.launch_server", *command]))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "jdistill.sidecar.engines.sglang_launch",
            str(os.getpid()),
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),  # a command's output goes to stdout
            stderr=sys.stderr.fileno(),
            env={**os.environ, **_environment(config, on_cpu)},
            start_new_session=True,
        )
        engine = cls(config, f"http://127.0.0.1:{port}", process)
        try:
            await engine._wait_until_healthy(port)
            await engine.connect()
            longest = engine.info.max_sequence_length
            if longest < info.max_sequence_length:
                raise ConfigError(
                    f"SGLang has room for sequences of {longest} tokens, not for {info.max_sequence_length}: raise "
                    "memory_fraction (or engine_args.max_total_tokens), or lower max_sequence_length"
                )
            if config.offload:
                await engine._try_to_sleep()
        except BaseException:
            await engine.close()
            raise
        return engine

    async def _score_one(self, sequence: SequenceToScore, top_k: int, adapter: str) -> TokenScores:
        try:
            return await super()._score_one(sequence, top_k, adapter)
        except UnavailableError as e:
            # The connection breaks slightly before the process is known to have ended.
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
        if not self.can_sleep:
            await super().sleep()
        if self._asleep:
            return
        await self._wait_until_idle()  # a busy scheduler fails an assertion, which ends SGLang
        await self._control("/release_memory_occupation")
        self._asleep = True

    async def wake(self) -> None:
        """See Engine.wake; the probe checks that the weights are back."""
        if not self.can_sleep:
            await super().wake()
        if not self._asleep:
            return
        await self._control("/resume_memory_occupation")
        self._asleep = False
        try:
            await self._verify()
        except FingerprintMismatchError as e:
            raise EngineDeadError(f"SGLang {self.version} woke with another model than it fell asleep with: {e}") from e

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
            os.killpg(process.pid, signal.SIGKILL)  # including its schedulers
        await process.wait()

    async def _try_to_sleep(self) -> None:
        """Sleeps and wakes once, so that an engine that cannot fails at start, not at step 900."""
        self.can_sleep = True
        try:
            await self.sleep()
            await self.wake()
        except TeacherError as e:
            raise ConfigError(
                f"offload: SGLang {self.version} cannot sleep and wake here: {e}; leave offload out"
            ) from e

    async def _wait_until_idle(self) -> None:
        begin = time.monotonic()
        while True:
            loads = (await self.connection.get("/v1/loads?include=core"))["loads"]
            if not sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads):
                return
            if time.monotonic() - begin > IDLE_TIMEOUT_S:
                raise UnavailableError(f"SGLang is still busy after {IDLE_TIMEOUT_S:.0f} s; it sleeps only when idle")
            await asyncio.sleep(0.05)

    async def _control(self, path: str) -> None:
        assert self.connection.session is not None
        try:
            async with self.connection.session.post(self.connection.url + path, json={}) as reply:
                if reply.status == 200:
                    return
                text = await reply.text()
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise EngineDeadError(f"SGLang does not answer {path} ({type(e).__name__}: {e})") from None
        raise EngineDeadError(f"SGLang answers {reply.status} to {path}: {text[:300]}")

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


def _look_at_sglang() -> tuple[set[str], bool]:
    """Returns the names of the server's arguments, and whether PyTorch sees an accelerator."""
    try:
        import torch
        from sglang.srt.server_args import ServerArgs
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"engine 'sglang' needs {e.name}, which is not installed for this Python: pip install 'jdistill[sglang]', "
            "or use the interpreter of an environment that has it"
        ) from None
    # A dataclass in some versions, another kind of record in others; always annotated.
    fields = {name for kind in ServerArgs.__mro__ for name in inspect.get_annotations(kind)}
    return fields, torch.accelerator.is_available()


def _environment(config: TeacherServerConfig, on_cpu: bool) -> dict[str, str]:
    """Returns variables that SGLang reads from the environment only; those already set are left out."""
    values = {
        # The longest sequence and the spare positions may exceed the checkpoint's limit; no token is scored there.
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        "SGLANG_REQUEST_STATE_WAIT_TIMEOUT": "1",  # s between two checks for closed connections; default 4
    }
    if on_cpu:
        values["SGLANG_USE_CPU_ENGINE"] = "1"
        num_ranks = config.tensor_parallel_size * config.pipeline_parallel_size * config.data_parallel_size
        cores = sorted(os.sched_getaffinity(0))
        share = len(cores) // num_ranks
        if num_ranks > 1 and share:  # otherwise SGLang gives each rank a NUMA node, and refuses more ranks than nodes
            shares = [cores[rank * share : (rank + 1) * share] for rank in range(num_ranks)]
            values["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, s)) for s in shares)
    return {name: value for name, value in values.items() if name not in os.environ}


def _command(
    config: TeacherServerConfig, dtype: str, max_length: int, port: int, args: dict[str, Any], on_cpu: bool
) -> list[str]:
    # SGLang's default log level writes a line for every request and every batch.
    values: dict[str, Any] = {"skip_server_warmup": True, "log_level": "warning"}
    if on_cpu:
        # Not every build has the kernels for CPU matrix units; every build has PyTorch's attention.
        values |= {"device": "cpu", "attention_backend": "torch_native", "disable_cuda_graph": True}
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
        # Without the backup SGLang wakes with uninitialised weights.
        values |= {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
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
