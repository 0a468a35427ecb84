"""PyTorch engine: any causal language model of Hugging Face transformers, one padded batch at a time.

Only the scored positions are projected onto the vocabulary, in chunks, so that no [tokens, vocabulary] array of a whole
batch exists; the body of the model runs once over the batch.

Dimension key: B sequences, S padded length, D hidden size, V vocabulary, N scored positions of the whole batch, n of a
chunk, K top-k, C candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from jdistill.teacher.batching import BatchedEngine, split_scores
from jdistill.teacher.engines.options import check_engine_args, check_sizes, model_info
from jdistill.wire.errors import EngineDeadError
from jdistill.wire.types import SequenceToScore, TokenScores

# What `engine_args` may name, with the default.
ENGINE_ARGS: dict[str, Any] = {
    "device": "auto",  # auto: cuda where there is one, else cpu; or any name that PyTorch knows
    "attn_implementation": None,  # None: the model's own choice; or sdpa, eager, flash_attention_2, ...
    "trust_remote_code": False,  # run the Python code that lies in the checkpoint
    "chunk_tokens": None,  # positions whose logits exist at once; None: as many as make CHUNK_LOGITS
}
CHUNK_LOGITS = 64 << 20  # 256 MiB in float32


class TransformersEngine(BatchedEngine):
    """Scores with `AutoModelForCausalLM`; top-k, candidates and any temperature, all up to the whole vocabulary."""

    name = "transformers"

    def load(self) -> None:
        """See BatchedEngine.load."""
        config = self.config
        check_engine_args(self.name, config.engine_args, ENGINE_ARGS)
        args = {**ENGINE_ARGS, **config.engine_args}
        check_sizes(self.name, config)
        self.version = transformers.__version__
        self.info = model_info(config)
        chunk_tokens = args["chunk_tokens"]
        if chunk_tokens is None:
            chunk_tokens = max(16, CHUNK_LOGITS // self.info.vocab_size)
        if not isinstance(chunk_tokens, int) or chunk_tokens < 1:
            raise ValueError(f"engine_args: chunk_tokens must be a positive integer, got {chunk_tokens!r}")
        self._chunk_tokens = chunk_tokens
        self._device = _device(args["device"])
        transformers.utils.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            config.model,
            dtype=getattr(torch, self.info.dtype),
            attn_implementation=args["attn_implementation"],
            trust_remote_code=args["trust_remote_code"],
            local_files_only=True,
        )
        self._model.to(self._device).eval().requires_grad_(False)
        self._head = self._model.get_output_embeddings()
        self._check_head()

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Refuses models whose logits are not just the projection of the body's output (soft caps, scales)."""
        probe_BS = torch.arange(1, 9, device=self._device)[None] % self.info.vocab_size
        expected_SV = self._model(probe_BS, use_cache=False).logits[0].float()
        logits_SV = self._head(self._hidden(probe_BS)[0]).float()
        if logits_SV.shape[-1] != self.info.vocab_size:
            raise ValueError(
                f"{self.config.model}: config.json says vocab_size {self.info.vocab_size}, "
                f"the output projection has {logits_SV.shape[-1]} rows"
            )
        tolerance = 1e-3 if self.info.dtype == "float32" else 0.1
        if not torch.allclose(logits_SV, expected_SV, atol=tolerance, rtol=tolerance):
            raise ValueError(
                f"{self.config.model}: {type(self._model).__name__} changes its logits after the output projection "
                "(a soft cap or a scale), which the transformers engine does not do; use the vllm engine"
            )

    def _hidden(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        # No attention mask: padding is on the right, where causal attention never looks from a real token, and without
        # a mask attention takes its fast causal path.
        return self._model.base_model(input_ids=tokens_BS, use_cache=False).last_hidden_state

    @torch.inference_mode()
    def score_batch(self, sequences: list[SequenceToScore], *, top_k: int, temperature: float) -> list[TokenScores]:
        """See BatchedEngine.score_batch."""
        longest = max(len(sequence.token_ids) for sequence in sequences)
        tokens_BS = torch.zeros((len(sequences), longest), dtype=torch.int64)
        for b, sequence in enumerate(sequences):
            tokens_BS[b, : len(sequence.token_ids)] = torch.from_numpy(sequence.token_ids.astype(np.int64))
        positions = [sequence.scored_positions() for sequence in sequences]
        columns_N = torch.from_numpy(np.concatenate(positions).astype(np.int64))
        rows_N = torch.from_numpy(np.repeat(np.arange(len(sequences)), [len(p) for p in positions]))
        targets_N = tokens_BS[rows_N, columns_N].to(self._device)
        candidates_NC = None
        if sequences[0].candidate_ids is not None:
            ids_NC = np.concatenate([sequence.candidate_ids for sequence in sequences]).astype(np.int64)
            candidates_NC = torch.from_numpy(ids_NC).to(self._device)
        try:
            hidden_BSD = self._hidden(tokens_BS.to(self._device))
            # The logits at position t - 1 speak of token t.
            hidden_ND = hidden_BSD[rows_N.to(self._device), (columns_N - 1).to(self._device)]
            results = self._log_probabilities(hidden_ND, targets_N, candidates_NC, top_k, temperature)
        except RuntimeError as e:
            # An out-of-memory error fails these sequences only; after any other CUDA error the process is lost.
            if isinstance(e, torch.cuda.OutOfMemoryError) or "CUDA error" not in str(e):
                raise
            raise EngineDeadError(f"the transformers engine's GPU failed: {e}") from e
        logprobs_N, top_ids_NK, top_logprobs_NK, candidate_logprobs_NC = results
        tokens = tokens_BS.numpy()
        return split_scores(
            sequences,
            [tokens[b, : len(sequence.token_ids)] for b, sequence in enumerate(sequences)],
            logprobs_N,
            top_ids_NK=top_ids_NK,
            top_logprobs_NK=top_logprobs_NK,
            candidate_logprobs_NC=candidate_logprobs_NC,
        )

    def _log_probabilities(
        self,
        hidden_ND: torch.Tensor,
        targets_N: torch.Tensor,
        candidates_NC: torch.Tensor | None,
        top_k: int,
        temperature: float,
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Of the targets [N], of the top-k [N, K] with their ids, of the candidates [N, C]; float32 nats."""
        logprobs, top_ids, top_logprobs, candidate_logprobs = [], [], [], []
        for start in range(0, len(hidden_ND), self._chunk_tokens):
            chunk = slice(start, start + self._chunk_tokens)
            logits_nV = self._head(hidden_ND[chunk]).float()
            logits_nV /= temperature
            normalizer_n1 = torch.logsumexp(logits_nV, dim=-1, keepdim=True)
            logprobs.append((logits_nV.gather(1, targets_N[chunk, None]) - normalizer_n1)[:, 0])
            if top_k:
                top_logits_nK, top_ids_nK = logits_nV.topk(top_k, dim=-1, sorted=True)
                top_ids.append(top_ids_nK)
                top_logprobs.append(top_logits_nK - normalizer_n1)
            if candidates_NC is not None:
                candidate_logprobs.append(logits_nV.gather(1, candidates_NC[chunk]) - normalizer_n1)
        return (
            _to_numpy(logprobs),
            torch.cat(top_ids).cpu().numpy() if top_k else None,
            _to_numpy(top_logprobs) if top_k else None,
            _to_numpy(candidate_logprobs) if candidates_NC is not None else None,
        )

    def unload(self) -> None:
        """See BatchedEngine.unload."""
        self._model = self._head = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _to_numpy(chunks: list[torch.Tensor]) -> np.ndarray:
    """Joins chunks of log-probabilities; logit - normalizer can round to a few 1e-7 above 0, hence the clamp."""
    return torch.cat(chunks).clamp_(max=0.0).cpu().numpy()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ValueError(f"engine_args: device {name!r} is none that PyTorch knows: {e}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"engine_args: device {name!r}, but this PyTorch ({torch.__version__}) sees no GPU")
    return device
