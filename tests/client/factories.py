"""A scripted teacher on a real gRPC server; its scores encode (position, token): any misalignment changes a number."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import random
import threading
import time
import uuid

import grpc
import numpy as np

from jdistill.wire import codec, errors, status
from jdistill.wire.channel import SERVER_OPTIONS
from jdistill.wire.types import ModelInfo, SequenceToScore, ServerInfo, ServerState, TokenScores
from tests.waiting import wait_until

SEED = 0
VOCAB = 97


def seed_random() -> None:
    """Seeds `random`, the source of the client's jitter; pytest shows the printed seed of a test that fails."""
    random.seed(SEED)
    print(f"random.seed({SEED})")


def expected_logprobs(token_ids, positions, model=0):
    """Exact in float32 up to position 4095; another for every (model, position, token)."""
    return (
        -(np.asarray(positions, np.float32) * 128 + np.asarray(token_ids, np.float32)) / 1024 - 1024 * model
    ).astype(np.float32)


def expected_scores(sequence: SequenceToScore, top_k: int, model: int = 0) -> TokenScores:
    """Scores of the sequence as the teacher sees it: its prefix moves the positions."""
    sequence = sequence.as_scored()
    positions = sequence.scored_positions()
    top = top_ids = candidates = None
    if top_k:
        top_ids = ((positions[:, None] * 7 + np.arange(top_k)) % VOCAB).astype(np.int32)
        top = -(positions[:, None] + np.arange(top_k) / 128).astype(np.float32)
    if sequence.candidate_ids is not None:
        candidates = expected_logprobs(sequence.candidate_ids, positions[:, None], model)
    return TokenScores(
        logprobs=expected_logprobs(sequence.token_ids[positions], positions, model),
        top_ids=top_ids,
        top_logprobs=top,
        candidate_logprobs=candidates,
        token_crc=codec.token_crc(sequence.token_ids),
    )


def assert_scores(got: TokenScores, sequence: SequenceToScore, top_k: int = 0, model: int = 0) -> None:
    expected = expected_scores(sequence, top_k, model)
    for name in ("logprobs", "top_ids", "top_logprobs", "candidate_logprobs"):
        if getattr(expected, name) is None:
            assert getattr(got, name) is None
        else:
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    assert got.token_crc == expected.token_crc


def make_info(**changes) -> ServerInfo:
    model = {
        "model": "fake",
        "fingerprint": "f" * 8,
        "tokenizer_fingerprint": "t" * 8,
        "vocab_size": VOCAB,
        "max_sequence_length": 4096,
        "max_top_k": 16,
        "max_candidate_count": 16,
        "any_temperature": True,
        "dtype": "float32",
    }
    rest = {"server_version": "0", "instance_id": "i", "engine": "fake", "engine_version": "0", "max_request_bytes": 0}
    adapters = changes.pop("adapters", ())
    for name, value in changes.items():
        (model if name in model else rest)[name] = value
    models = [ModelInfo(**model)]
    models += [ModelInfo(**{**model, "model": a, "fingerprint": a, "base_model": model["model"]}) for a in adapters]
    return ServerInfo(models=tuple(models), **rest)


class FakeTeacher:
    """Each call of ScoreSequences takes the next of `faults`: a function (teacher, context, chunks) -> chunks.

    Its scores tell its models apart: `model_number` is that of the base model, adapters count on from there.
    """

    vocab_size = VOCAB
    expected_logprobs = staticmethod(expected_logprobs)
    expected_scores = staticmethod(expected_scores)
    assert_scores = staticmethod(assert_scores)

    def __init__(self, **info):
        self.info = make_info(**info)
        self.faults = collections.deque()
        self.always = None  # a fault for every call
        self.requests: list[list[SequenceToScore]] = []
        self.metadata: list[dict[str, str]] = []
        self.options: list[codec.RequestOptions] = []
        self.delay_s = 0.0  # before each sequence
        self.chunk_bytes = 1 << 20
        self.host = "127.0.0.1"
        self.port = 0
        self.unix_path = None
        self.server = None
        self.num_cancelled = 0
        self.model_number = 0
        self.token = None  # that every call must bring
        self.control: list[str] = []  # "Sleep" and "Wake", as they came
        self.served = threading.Event()
        self.instance_id = ""

    @property
    def endpoint(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def sent_info(self) -> ServerInfo:
        """`info` with the id of this start."""
        return dataclasses.replace(self.info, instance_id=self.instance_id)

    def start(self) -> FakeTeacher:
        self.instance_id = uuid.uuid4().hex
        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(8), options=SERVER_OPTIONS)
        handlers = {
            "ScoreSequences": grpc.unary_stream_rpc_method_handler(self._score),
            "GetServerInfo": grpc.unary_unary_rpc_method_handler(self._get_info),
        }
        control = {
            "Sleep": grpc.unary_unary_rpc_method_handler(lambda _, context: self._set_state("Sleep", context)),
            "Wake": grpc.unary_unary_rpc_method_handler(lambda _, context: self._set_state("Wake", context)),
        }
        self.server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(codec.SERVICE, handlers),
                grpc.method_handlers_generic_handler(codec.CONTROL_SERVICE, control),
            )
        )
        self.port = self.server.add_insecure_port(f"{self.host}:{self.port}")
        if self.unix_path is not None:
            self.server.add_insecure_port(f"unix:{self.unix_path}")
        self.server.start()
        return self

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop(None).wait()
            self.server = None

    def abort(self, context, error):
        code, text, trailing = status.to_status(error)
        context.set_trailing_metadata(trailing)
        context.abort(code, text)

    def set_state(self, state: ServerState) -> None:
        self.info = dataclasses.replace(self.info, state=state)

    def _check_token(self, context):
        got = dict(context.invocation_metadata()).get("authorization")
        if self.token is not None and got != f"Bearer {self.token}":
            self.abort(context, errors.UnauthenticatedError(f"not the token: {got}"))

    def _get_info(self, _, context):
        self._check_token(context)
        return codec.encode_server_info(self.sent_info)

    def _set_state(self, name, context):
        self._check_token(context)
        self.control.append(name)
        if not self.info.can_sleep:
            self.abort(context, errors.UnsupportedError("cannot sleep"))
        self.set_state(ServerState.SLEEPING if name == "Sleep" else ServerState.SERVING)
        return b""

    def _score(self, request, context):
        self._check_token(context)
        if self.info.state is ServerState.SLEEPING and self.info.wake_on_score:
            self.set_state(ServerState.SERVING)
        if self.info.state is not ServerState.SERVING:
            self.abort(context, errors.UnavailableError(f"is {self.info.state.name.lower()}"))
        sequences, options = codec.decode_request(request)
        self.requests.append(sequences)
        self.options.append(options)
        self.metadata.append(dict(context.invocation_metadata()))
        self.served.set()
        context.add_callback(lambda: setattr(self, "num_cancelled", self.num_cancelled + (not finished)))
        finished = []
        if options.expected_fingerprint != self.info.models[self._number(options.model)].fingerprint:
            self.abort(
                context,
                errors.FingerprintMismatchError(f"expected {options.expected_fingerprint}, this is another model"),
            )
        chunks = self._chunks(sequences, options)
        fault = self.faults.popleft() if self.faults else self.always
        yield from chunks if fault is None else fault(self, context, chunks)
        finished.append(True)

    def _chunks(self, sequences, options):
        """(sequence index, first target, scores) one after another, in an order other than that of the request."""
        for b in reversed(range(len(sequences))):
            time.sleep(self.delay_s)
            number = self._number(options.model)
            scores = expected_scores(sequences[b], options.top_k, self.model_number + number)
            for first, part in codec.split_scores(scores, self.chunk_bytes):
                yield self.encode([(b, first, part)], options.temperature, number)

    def _number(self, model):
        return [one.model for one in self.info.models].index(model or self.info.model.model)

    def encode(self, runs, temperature=1.0, number=0) -> bytes:
        return codec.encode_response(runs, info=self.info.models[number], temperature=temperature)


def hang(teacher, context, chunks):
    """A fault: accepts, keeps the connection, sends nothing; ends when the client does."""
    while context.is_active():
        time.sleep(0.01)
    yield from ()


def hang_after(num_chunks):
    """Returns a fault that sends `num_chunks` chunks and then hangs."""

    def fault(teacher, context, chunks):
        for _ in range(num_chunks):
            yield next(chunks)
        yield from hang(teacher, context, chunks)

    return fault


def replicas(client):
    """The replicas of a client with one teacher."""
    (dispatcher,) = client._dispatchers.values()
    return dispatcher.pool.replicas


def wait_until_ready(client):
    """Waits until every replica has answered: a busy machine may leave some out of the preflight."""
    client.info()
    wait_until(lambda: all(replica.ready for replica in replicas(client)))


def score_first_at(client, first, asked, *, once=lambda call: True):
    """Scores `asked`, which fit one call, at the teacher `first`; the others may help once `once(call)` is true."""
    wait_until_ready(client)
    (dispatcher,) = client._dispatchers.values()
    others = [replica for replica in replicas(client) if replica.endpoint != first.endpoint]
    for replica in others:
        replica.paused_until = math.inf

    def started():
        calls = list(dispatcher._calls)
        return first.served.is_set() and len(calls) == 1 and once(calls[0])

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.score, asked)
        wait_until(started)
        for replica in others:
            replica.paused_until = 0.0
        dispatcher._loop.call_soon_threadsafe(dispatcher._pump)
        return future.result(timeout=60)


def sequences(num, *, seed=0, max_tokens=40, candidates=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(num):
        length = int(rng.integers(3, max_tokens))
        start = int(rng.integers(1, length - 1))
        spans = ((start, start + 1), (start + 1, length)) if rng.random() < 0.5 else ((start, length),)
        sequence = SequenceToScore(rng.integers(0, 97, length), spans)
        if candidates:
            ids = rng.integers(0, 97, (sequence.num_scored, candidates))
            sequence = dataclasses.replace(sequence, candidate_ids=ids)
        made.append(sequence)
    return made


def check(teacher, asked, got, top_k=0):
    for sequence, scores in zip(asked, got, strict=True):
        teacher.assert_scores(scores, sequence, top_k)
