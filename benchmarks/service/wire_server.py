"""The servers of the wire comparison: a bare gRPC server and an HTTP server, which send the same numbers.

Every way gets the tokens, makes the checksums where its wire has them, and encodes the reply anew for each call.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import grpc
import numpy as np
from aiohttp import web

from benchmarks.service.engines import MAX_TOP_K, ReadyEngine
from benchmarks.service.per_token import PerTokenReply
from jdistill.config import TeacherServerConfig
from jdistill.sidecar.process import keep_freed_memory
from jdistill.wire import channel, codec
from jdistill.wire.v1 import teacher_pb2

SERVICE = "benchmark.Wire"


class Server:
    """One method per wire."""

    def __init__(self) -> None:
        self._engine = ReadyEngine(TeacherServerConfig(engine="ready", model="ready"))
        # What a Python program has that keeps its scores in lists.
        self._lists: dict[int, Any] = {}

    async def codec_stream(self, request: bytes, context: Any) -> Any:
        """This project's codec: several messages of about 1 MiB."""
        sequences, options = codec.decode_request(request)
        pending, size = [], 0
        for b, sequence in enumerate(sequences):
            scores = self._engine.answer(sequence, options.top_k)
            num_bytes = codec.response_bytes(scores)
            if pending and size + num_bytes > codec.DEFAULT_CHUNK_BYTES:
                yield self._encode(pending)
                pending, size = [], 0
            pending.append((b, 0, scores))
            size += num_bytes
        yield self._encode(pending)

    async def lists(self, request: bytes, context: Any) -> Any:
        """The same schema, filled from Python lists, in one message."""
        asked = teacher_pb2.ScoreSequencesRequest.FromString(request)
        num_scored = asked.sequence_lengths[0] - 1
        count = len(asked.sequence_lengths)
        scores = self._as_lists(num_scored, asked.top_k)
        reply = teacher_pb2.ScoreSequencesResponse(
            sequence_indexes=range(count), first_targets=[0] * count, target_counts=[num_scored] * count
        )
        for _ in range(count):
            reply.logprobs.extend(scores["logprobs"])
            if asked.top_k:
                reply.top_ids.extend(scores["flat_top_ids"])
                reply.top_logprobs.extend(scores["flat_top_logprobs"])
        yield reply.SerializeToString()

    async def per_token(self, request: bytes, context: Any) -> Any:
        """One message per token, inside one message for the batch."""
        asked = teacher_pb2.ScoreSequencesRequest.FromString(request)
        scores = self._as_lists(asked.sequence_lengths[0] - 1, asked.top_k)
        reply = PerTokenReply()
        for _ in range(len(asked.sequence_lengths)):
            sequence = reply.sequences.add()
            for p, logprob in enumerate(scores["logprobs"]):
                ids = scores["top_ids"][p] if asked.top_k else ()
                logprobs = scores["top_logprobs"][p] if asked.top_k else ()
                sequence.tokens.add(logprob=logprob, top_ids=ids, top_logprobs=logprobs)
        yield reply.SerializeToString()

    async def http_json(self, request: web.Request) -> web.Response:
        """One JSON document."""
        asked = json.loads(await request.read())
        scores = self._as_lists(len(asked["token_ids"][0]) - 1, asked["top_k"])
        names = ("logprobs", "top_ids", "top_logprobs") if asked["top_k"] else ("logprobs",)
        one = {name: scores[name] for name in names}
        return web.Response(body=json.dumps({"sequences": [one] * len(asked["token_ids"])}).encode())

    def _encode(self, runs: Any) -> bytes:
        return codec.encode_response(runs, info=self._engine.info, temperature=1.0)

    def _as_lists(self, num_scored: int, top_k: int) -> dict[str, Any]:
        if (num_scored, top_k) not in self._lists:
            scores = self._engine._scores[top_k]
            lists: dict[str, Any] = {"logprobs": scores.logprobs[:num_scored].tolist()}
            if top_k:
                for name in ("top_ids", "top_logprobs"):
                    values = getattr(scores, name)[:num_scored]
                    lists |= {name: values.tolist(), f"flat_{name}": values.ravel().tolist()}
            self._lists[num_scored, top_k] = lists
        return self._lists[num_scored, top_k]


async def main() -> None:
    assert MAX_TOP_K == 64 and np.little_endian
    keep_freed_memory()
    server = Server()
    grpc_server = grpc.aio.server(options=channel.SERVER_OPTIONS)
    methods = {name: getattr(server, name) for name in ("codec_stream", "lists", "per_token")}
    handlers = {name: grpc.unary_stream_rpc_method_handler(method) for name, method in methods.items()}
    grpc_server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/score", server.http_json)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(json.dumps("ready"), flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps({"grpc": port, "http": runner.addresses[0][1]}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
