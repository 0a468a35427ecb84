"""Scores only the requested positions and ids, at any temperature; runs inside vLLM's worker processes.

vLLM's own prompt log-probabilities project every prompt token onto the vocabulary, one request at a time, and give only
the top-k. This extension (vLLM's `worker_extension_cls`) takes from the same hidden states only the rows that requests
score, batched over all requests of a step. It reads private attributes of vLLM's first ("V1") model runner; installing
it fails where they are absent, and the engine checks it against vLLM's own numbers at every start.

Results travel in `prompt_token_id_logprobs`, a float32 matrix per request that vLLM passes on unchanged: column 0 is
the id of the scored token, column 1 its log-probability, then C candidates, K top ids, K top log-probabilities. Ids are
exact below 2**24.

Dimension key: P scored positions of a request, N rows of a step, n of a chunk, V vocabulary, C candidates, K top-k.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

KEY = "jdistill"  # in SamplingParams.extra_args
# Number of logits that exist at once. 256 MiB in float32; on a CPU 16 MiB, still in its caches when read
# (measured: 353 -> 302 ms for 2,048 rows of 32,768), but with enough rows to amortise reading the projection's weights.
CHUNK_LOGITS = {"cpu": 4 << 20}
DEFAULT_CHUNK_LOGITS = 64 << 20
MIN_CHUNK, MAX_CHUNK = 128, 4096  # rows
MAX_VOCAB_SIZE = 1 << 24
WATCH_S = 1.0  # between two checks that the sidecar is alive
# Attributes read from the model runner.
RUNNER_ATTRIBUTES = (
    "requests",
    "input_batch",
    "query_start_loc",
    "model",
    "_get_prompt_logprobs_dict",
    "sample_tokens",
)


def request_args(
    spans: tuple[tuple[int, int], ...], candidate_ids: np.ndarray | None, *, top_k: int, temperature: float
) -> dict[str, Any]:
    """Returns `SamplingParams.extra_args` of a request, read by the workers; candidate ids are int32 [P, C]."""
    return {
        KEY: {
            "spans": [position for span in spans for position in span],
            "candidate_count": 0 if candidate_ids is None else candidate_ids.shape[1],
            "candidate_ids": b"" if candidate_ids is None else np.ascontiguousarray(candidate_ids, "<i4").tobytes(),
            "top_k": top_k,
            "temperature": temperature,
        }
    }


@dataclasses.dataclass(slots=True, eq=False)
class _Job:
    """One request: what it asks for, and its finished rows."""

    positions: np.ndarray  # [P], token positions, ascending
    targets: np.ndarray  # [P], the ids at those positions
    candidates: np.ndarray  # [P, C]
    top_k: int
    temperature: float
    result: torch.Tensor  # float32 [P, 2 + C + 2 K], on the CPU
    done: np.ndarray  # bool [P]

    @classmethod
    def of(cls, args: dict[str, Any], prompt_token_ids: list[int]) -> _Job:
        spans = args["spans"]
        positions = np.concatenate(
            [np.arange(start, stop) for start, stop in zip(spans[::2], spans[1::2], strict=True)]
        )
        C, K = args["candidate_count"], args["top_k"]
        return cls(
            positions=positions,
            targets=np.asarray(prompt_token_ids, np.int64)[positions],
            candidates=np.frombuffer(args["candidate_ids"], "<i4").reshape(len(positions), C).astype(np.int64),
            top_k=K,
            temperature=args["temperature"],
            result=torch.empty((len(positions), 2 + C + 2 * K), dtype=torch.float32),
            done=np.zeros(len(positions), bool),
        )


class ScoringWorker:
    """Mixed into vLLM's worker class; methods are called by `collective_rpc`."""

    def jdistill_install(self) -> str:
        """Hooks into this worker's model runner; returns "", or the reason why it cannot."""
        runner = self.model_runner
        missing = [name for name in RUNNER_ATTRIBUTES if not hasattr(runner, name)]
        if missing:
            return f"{type(runner).__module__}.{type(runner).__name__} has no {', '.join(missing)}"
        if runner.model_config.get_vocab_size() > MAX_VOCAB_SIZE:
            return f"the vocabulary has more than {MAX_VOCAB_SIZE} ids"
        _Scorer(runner)
        return ""

    def jdistill_prepare(self) -> None:
        """Allocates the input buffer of later pipeline stages, which vLLM's CPU runner (0.32) omits unless it compiles.

        Other runners allocate it in their profiling run; without it the first request kills the engine.
        """
        runner = self.model_runner
        if getattr(runner, "intermediate_tensors", runner) is None and self.parallel_config.pipeline_parallel_size > 1:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )

    def jdistill_end_with(self, sidecar_pid: int) -> None:
        """Ends this worker and its parent engine process when the sidecar's process is gone.

        A killed sidecar ends no children: vLLM's processes would stay forever and keep the GPU.
        """
        pids = [pid for pid in (os.getppid(),) if pid not in (sidecar_pid, 1)] + [os.getpid()]
        thread = threading.Thread(target=_end_with, args=(sidecar_pid, pids), name="sidecar-watch", daemon=True)
        thread.start()


def _end_with(watched_pid: int, pids: list[int]) -> None:
    _wait_for_end(watched_pid)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _wait_for_end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        try:
            descriptor = os.pidfd_open(pid)
        except (AttributeError, PermissionError):  # not Linux, or a container that forbids it
            while True:
                os.kill(pid, 0)  # raises once the process is gone
                time.sleep(WATCH_S)
        select.select([descriptor], [], [])  # readable once it is dead, even before it is reaped
        os.close(descriptor)


class _Scorer:
    """The hooks on one model runner."""

    def __init__(self, runner: Any):
        self._runner = runner
        self._jobs: dict[str, _Job] = {}
        self._finished: dict[str, torch.Tensor] = {}
        lora_heads = [m for m in runner.model.modules() if type(m).__name__ == "LogitsProcessorWithLoRA"]
        self._head_lora = lora_heads[0].punica_wrapper if lora_heads else None
        chunk_logits = CHUNK_LOGITS.get(runner.device.type, DEFAULT_CHUNK_LOGITS)
        self._chunk = min(MAX_CHUNK, max(MIN_CHUNK, chunk_logits // runner.model_config.get_vocab_size()))
        prompt_logprobs, sample_tokens = runner._get_prompt_logprobs_dict, runner.sample_tokens

        def score_then_prompt_logprobs(hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
            self._step(hidden_states, num_scheduled_tokens)
            return prompt_logprobs(hidden_states, num_scheduled_tokens)

        def sample_tokens_then_attach(*args: Any, **kwargs: Any) -> Any:
            output = sample_tokens(*args, **kwargs)
            finished, self._finished = self._finished, {}
            if finished:
                # With asynchronous scheduling the output is wrapped until its copies to the CPU are done; ours are.
                inner = getattr(output, "_model_runner_output", output)
                inner.prompt_token_id_logprobs_dict = {**inner.prompt_token_id_logprobs_dict, **finished}
            return output

        runner._get_prompt_logprobs_dict = score_then_prompt_logprobs
        runner.sample_tokens = sample_tokens_then_attach

    @contextlib.contextmanager
    def _without_lora_on_the_head(self) -> Iterator[None]:
        """Disables LoRA on the output head: vLLM expects one row of logits per request, and here there are more.

        No number changes, because adapters of the head are refused at start.
        """
        if self._head_lora is None:
            yield
            return
        add = self._head_lora.add_lora_logits
        self._head_lora.add_lora_logits = lambda logits, *args, **kwargs: logits
        try:
            yield
        finally:
            self._head_lora.add_lora_logits = add

    def _step(self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> None:
        """Scores the rows of one step; a long prompt takes several steps."""
        runner = self._runner
        groups: dict[tuple[int, int], list[tuple[_Job, slice, int]]] = {}
        complete: list[tuple[str, _Job]] = []
        for req_id, num_tokens in num_scheduled_tokens.items():
            request = runner.requests[req_id]
            args = ((request.sampling_params and request.sampling_params.extra_args) or {}).get(KEY)
            first = request.num_computed_tokens
            if args is None or first >= len(request.prompt_token_ids):
                continue
            job = self._jobs.get(req_id)
            if job is None:
                job = self._jobs[req_id] = _Job.of(args, request.prompt_token_ids)
            # The hidden state at token position i predicts position i + 1.
            lo, hi = np.searchsorted(job.positions, [first + 1, first + num_tokens + 1])
            if lo < hi:
                offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[req_id]]) - first
                groups.setdefault((job.candidates.shape[1], job.top_k), []).append((job, slice(lo, hi), offset))
            if first + num_tokens >= len(request.prompt_token_ids):
                complete.append((req_id, job))
        for pieces in groups.values():
            self._score(hidden_states, pieces)
        for req_id, job in complete:
            del self._jobs[req_id]
            if job.done.all():  # otherwise nothing is attached, and the engine fails the request
                self._finished[req_id] = job.result
        if len(self._jobs) > len(num_scheduled_tokens):  # some requests were aborted in between
            self._jobs = {req_id: job for req_id, job in self._jobs.items() if req_id in runner.requests}

    def _score(self, hidden_states: torch.Tensor, pieces: list[tuple[_Job, slice, int]]) -> None:
        """Fills the results of `pieces`, which share their number of candidates and top-k.

        A piece is (job, rows of the job, offset from token position to row of `hidden_states`).
        """
        device = hidden_states.device
        top_k = pieces[0][0].top_k
        rows = np.concatenate([job.positions[part] - 1 + offset for job, part, offset in pieces])
        rows_N = torch.from_numpy(rows).to(device)
        targets_N = torch.from_numpy(np.concatenate([job.targets[part] for job, part, _ in pieces])).to(device)
        candidates_NC = torch.from_numpy(np.concatenate([job.candidates[part] for job, part, _ in pieces])).to(device)
        temperatures_N1 = None
        if any(job.temperature != 1 for job, _, _ in pieces):
            temperatures = [np.full(part.stop - part.start, job.temperature, np.float32) for job, part, _ in pieces]
            temperatures_N1 = torch.from_numpy(np.concatenate(temperatures)).to(device)[:, None]
        results = []
        for start in range(0, len(rows), self._chunk):
            chunk = slice(start, start + self._chunk)
            with self._without_lora_on_the_head():
                logits_nV = self._runner.model.compute_logits(hidden_states[rows_N[chunk]])
            if logits_nV is None:  # tensor parallel: only one rank holds them, and only its output is used
                continue
            if temperatures_N1 is not None:
                logits_nV = logits_nV.to(torch.float32) / temperatures_N1[chunk]
            # One pass from the model's dtype; logsumexp would allocate an array of this size too, and is slower.
            logprobs_nV = torch.log_softmax(logits_nV, dim=-1, dtype=torch.float32)
            del logits_nV
            targets_n1 = targets_N[chunk, None]
            columns = [
                targets_n1.to(torch.float32),
                logprobs_nV.gather(1, targets_n1),
                logprobs_nV.gather(1, candidates_NC[chunk]),
            ]
            if top_k:
                top_logprobs_nK, top_ids_nK = logprobs_nV.topk(top_k, dim=-1, sorted=True)
                columns += [top_ids_nK.to(torch.float32), top_logprobs_nK]
            results.append(torch.cat(columns, dim=1))
        if not results:
            return
        result = torch.cat(results).cpu()
        start = 0
        for job, part, _ in pieces:
            stop = start + part.stop - part.start
            job.result[part] = result[start:stop]
            job.done[part] = True
            start = stop
