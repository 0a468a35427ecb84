"""The wire alone, and the whole service with precomputed answers: batches of 64 x 512 tokens per second.

Client and server are separate processes. Each way ends with numpy arrays of the scores; what a way checks beside that
is its own: this project's checks checksums, ids, counts, order and every value.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import grpc
import numpy as np

from benchmarks.service.engines import ReadyEngine
from benchmarks.service.per_token import PerTokenReply
from benchmarks.service.wire_server import SERVICE
from jdistill.client import TeacherClient
from jdistill.client.verification import Reply
from jdistill.config import TeacherServerConfig
from jdistill.wire import channel, codec
from jdistill.wire.types import SequenceToScore
from jdistill.wire.v1 import teacher_pb2

IN_FLIGHT = 3  # calls: while one is encoded another is decoded
# The service config asks for health checks, which a bare server does not answer.
OPTIONS = [option for option in channel.client_options() if option[0] != "grpc.service_config"]


class WireClient:
    """The wires without the service, over one gRPC and one HTTP connection."""

    def __init__(self, ports: dict[str, int], sequences: list[SequenceToScore]):
        self._ports = ports
        self._sequences = sequences
        self._crcs = [codec.token_crc(s.token_ids) for s in sequences]
        self._info = ReadyEngine(TeacherServerConfig(engine="ready", model="ready")).info
        # Each way's answer, to be compared: ways that do not give the same numbers do not do the same work.
        self.sums: dict[tuple[str, int], float] = {}

    def batches_per_s(self, way: str, top_k: int, *, at_least_s: float, at_least: int = 3) -> float:
        """Runs one wire for a while, with several calls in flight."""
        return asyncio.run(self._run(way, top_k, at_least_s, at_least))

    async def _run(self, way: str, top_k: int, at_least_s: float, at_least: int) -> float:
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{self._ports['grpc']}", OPTIONS) as self._channel,
            aiohttp.ClientSession() as self._http,
        ):
            one: Callable[[int], Any] = getattr(self, way)
            total = await one(top_k)  # once for warming up
            self.sums[way, top_k] = total
            begin, done = time.perf_counter(), 0

            async def keep_going() -> None:
                nonlocal done
                while done < at_least or time.perf_counter() - begin < at_least_s:
                    await one(top_k)
                    done += 1

            await asyncio.gather(*(keep_going() for _ in range(IN_FLIGHT)))
            return done / (time.perf_counter() - begin)

    async def codec_stream(self, top_k: int) -> float:
        """This project's codec and verification."""
        request = codec.encode_request(self._sequences, top_k=top_k)
        indexes = range(len(self._sequences))
        reply = Reply(
            self._sequences, self._crcs, indexes, endpoint="wire", info=self._info, top_k=top_k, temperature=1.0
        )
        async for data in self._channel.unary_stream(f"/{SERVICE}/codec_stream")(request):
            reply.add(data)
        return float(reply.finish()[-1].logprobs.sum())

    async def asarray(self, top_k: int) -> float:
        """protobuf's own class on the client, np.asarray over its fields; the server as `codec_stream`."""
        request = codec.encode_request(self._sequences, top_k=top_k)
        async for data in self._channel.unary_stream(f"/{SERVICE}/codec_stream")(request):
            reply = teacher_pb2.ScoreSequencesResponse.FromString(data)
            logprobs = np.asarray(reply.logprobs, np.float32)
            if top_k:
                np.asarray(reply.top_ids, np.int32), np.asarray(reply.top_logprobs, np.float32)
        return float(logprobs[-len(self._sequences[-1].token_ids) + 1 :].sum())

    async def lists(self, top_k: int) -> float:
        """protobuf's own classes and Python lists on both sides."""
        lengths, ids = [], []
        for sequence in self._sequences:
            lengths.append(len(sequence.token_ids))
            ids += sequence.token_ids.tolist()
        request = teacher_pb2.ScoreSequencesRequest(sequence_lengths=lengths, token_ids=ids, top_k=top_k)
        async for data in self._channel.unary_stream(f"/{SERVICE}/lists")(request.SerializeToString()):
            reply = teacher_pb2.ScoreSequencesResponse.FromString(data)
            logprobs = np.array(list(reply.logprobs), np.float32)
            if top_k:
                np.array(list(reply.top_ids), np.int32), np.array(list(reply.top_logprobs), np.float32)
        return float(logprobs[-lengths[-1] + 1 :].sum())

    async def per_token(self, top_k: int) -> float:
        """One message per token."""
        request = codec.encode_request(self._sequences, top_k=top_k)
        async for data in self._channel.unary_stream(f"/{SERVICE}/per_token")(request):
            reply = PerTokenReply.FromString(data)
            for sequence in reply.sequences:
                logprobs = np.array([token.logprob for token in sequence.tokens], np.float32)
                if top_k:
                    np.array([list(token.top_ids) for token in sequence.tokens], np.int32)
                    np.array([list(token.top_logprobs) for token in sequence.tokens], np.float32)
        return float(logprobs.sum())

    async def http_json(self, top_k: int) -> float:
        """One JSON document over HTTP."""
        asked = {"token_ids": [s.token_ids.tolist() for s in self._sequences], "top_k": top_k}
        async with self._http.post(f"http://127.0.0.1:{self._ports['http']}/score", data=json.dumps(asked)) as reply:
            scored = json.loads(await reply.read())
        for sequence in scored["sequences"]:
            logprobs = np.array(sequence["logprobs"], np.float32)
            if top_k:
                np.array(sequence["top_ids"], np.int32), np.array(sequence["top_logprobs"], np.float32)
        return float(logprobs.sum())


def service_batches_per_s(
    client: TeacherClient, sequences: list[SequenceToScore], top_k: int, at_least_s: float
) -> Any:
    """Returns (batches/s, sum) of the whole service; threads share the client, like a trainer's, so calls overlap."""
    total = float(client.score(sequences, top_k=top_k)[-1].logprobs.sum())
    done, lock = 0, threading.Lock()
    begin = time.perf_counter()

    def keep_going() -> None:
        nonlocal done
        while time.perf_counter() - begin < at_least_s:
            client.score(sequences, top_k=top_k)
            with lock:
                done += 1

    with concurrent.futures.ThreadPoolExecutor(IN_FLIGHT) as pool:
        for future in [pool.submit(keep_going) for _ in range(IN_FLIGHT)]:
            future.result()
    return done / (time.perf_counter() - begin), total
