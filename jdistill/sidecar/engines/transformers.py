"""PyTorch engine: any causal language model of Hugging Face transformers, in batches without padding where possible.

A batch is one row of concatenated sequences in which no token attends to another sequence. transformers supports that
with flash attention; with `sdpa` it builds a mask over the whole row, which costs 5 times the padding that it saves (16
sequences of 64 to 512 tokens), so here each sequence gets its own call of PyTorch's causal attention. Models whose
packed sequences score differently than alone (a probe at start), or that do not attend to all tokens, get padded
batches.

Only the scored positions are projected onto the vocabulary, in chunks, so that no [tokens, vocabulary] array of a whole
batch exists; the body of the model runs once over the batch.

Dimension key: B sequences (or rows), S length, M all tokens of a batch, D hidden size, V vocabulary, N scored positions
of the whole batch, n of a chunk, K top-k, C candidates; H heads, F head size.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from transformers.utils import is_peft_available

from jdistill.sidecar.batching import BatchedEngine, split_scores
from jdistill.sidecar.engines.adapters import adapter_info, read_adapter
from jdistill.sidecar.engines.options import check_engine_args, check_sizes, model_info
from jdistill.weight_files import has_separate_head, stored_tensors
from jdistill.wire.errors import EngineDeadError
from jdistill.wire.types import SequenceToScore, TokenScores

logger = logging.getLogger(__name__)

# Names in `engine_args`, with their defaults.
ENGINE_ARGS: dict[str, Any] = {
    "device": "auto",  # auto: cuda if available, otherwise cpu; or any name that PyTorch knows
    "attn_implementation": None,  # None: the model's own choice; or sdpa, eager, flash_attention_2, ...
    "trust_remote_code": False,  # run Python code from the checkpoint
    "chunk_tokens": None,  # positions whose logits exist at once; None: CHUNK_LOGITS / vocabulary
    "packing": True,  # batches without padding, where the model allows it; False: padded
}
CHUNK_LOGITS = 64 << 20  # 256 MiB in float32
PACKED_SDPA = "jdistill_packed_sdpa"
# Error of packed sequences relative to the largest hidden state. A leak between sequences is of the order of 1.
PACKING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.03}


def packed_sdpa(
    module: torch.nn.Module,
    query_BHMF: torch.Tensor,
    key_BHMF: torch.Tensor,
    value_BHMF: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sequence_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function for transformers: causal within each of the sequences packed in one row.

    Raises:
        NotImplementedError: the model needs more than causal attention.
    """
    more = [name for name in ("softcap", "s_aux", "position_bias", "cache") if kwargs.get(name) is not None]
    if attention_mask is not None or dropout or kwargs.get("is_causal") is False or more:
        raise NotImplementedError(f"{type(module).__name__} needs more than causal attention ({', '.join(more)})")
    grouped = query_BHMF.shape[1] != key_BHMF.shape[1]
    lengths = list(sequence_lengths or (query_BHMF.shape[2],))
    parts = zip(*(x.split(lengths, dim=2) for x in (query_BHMF, key_BHMF, value_BHMF)), strict=True)
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True, scale=scaling, enable_gqa=grouped)
        for part in parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def sees_all_tokens(config: Any, longest: int) -> bool:
    """Returns whether every layer attends to all earlier tokens in sequences of up to `longest` tokens."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) == {"full_attention"}
    window = getattr(config, "sliding_window", None)
    return getattr(config, "attention_chunk_size", None) is None and (window is None or window >= longest)


class TransformersEngine(BatchedEngine):
    """Scores with `AutoModelForCausalLM`; top-k, candidates and any temperature, all up to the whole vocabulary."""

    name = "transformers"

    def load(self) -> None:
        """See BatchedEngine.load."""
        config = self.config
        check_engine_args(self.name, config.engine_args, ENGINE_ARGS)
        args = {**ENGINE_ARGS, **config.engine_args}
        check_sizes(self.name, config, "adapters")
        self.version = transformers.__version__
        self.info = model_info(config)
        if config.adapters and not is_peft_available():
            raise ValueError(
                "adapters: the transformers engine needs PEFT for them: pip install 'jdistill[adapters]', use the vllm "
                "engine, or merge the adapter into the checkpoint"
            )
        tensors = stored_tensors(config.model) if config.adapters else None
        for path in config.adapters.values():
            read_adapter(path, tensors)  # raises before the model is read
        chunk_tokens = args["chunk_tokens"]
        if chunk_tokens is None:
            chunk_tokens = max(16, CHUNK_LOGITS // self.info.vocab_size)
        if not isinstance(chunk_tokens, int) or chunk_tokens < 1:
            raise ValueError(f"engine_args: chunk_tokens must be a positive integer, got {chunk_tokens!r}")
        self._chunk_tokens = chunk_tokens
        self._device = _device(args["device"])
        transformers.utils.logging.disable_progress_bar()
        self._model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            config.model,
            dtype=getattr(torch, self.info.dtype),
            attn_implementation=args["attn_implementation"],
            trust_remote_code=args["trust_remote_code"],
            local_files_only=True,
            output_loading_info=True,
        )
        self._check_loading(loading)
        self._model.to(self._device).eval().requires_grad_(False)
        self._head = self._model.get_output_embeddings()
        self._check_head()
        if not isinstance(args["packing"], bool):
            raise ValueError(f"engine_args: packing must be true or false, got {args['packing']!r}")
        self.packs = args["packing"] and self._begin_packing()
        self._load_adapters()

    @torch.inference_mode()
    def _begin_packing(self) -> bool:
        """Enables packed rows if packed sequences give the same hidden states as alone; otherwise changes nothing."""
        text = self._model.config.get_text_config()
        own = text._attn_implementation or ""
        if not sees_all_tokens(text, self.info.max_sequence_length):
            logger.info("batches are padded: not all layers of %s attend to all tokens", self.config.model)
            return False
        if own != "sdpa" and not own.startswith("flash_attention"):
            logger.info("batches are padded: %s attention does not support packing", own)
            return False
        size, longest = self.info.vocab_size, self.info.max_sequence_length
        ids = [torch.arange(first, first + min(length, longest)) for first, length in ((3, 5), (1, 9), (7, 2))]
        ids = [(13 * tokens_S + 1) % size for tokens_S in ids]
        alone = torch.cat([self._hidden(tokens_S[None])[0] for tokens_S in ids]).float()
        try:
            if own == "sdpa":
                transformers.AttentionInterface.register(PACKED_SDPA, packed_sdpa)
                self._model.set_attn_implementation(PACKED_SDPA)
            packed = self._hidden(torch.cat(ids)[None], [len(tokens_S) for tokens_S in ids])[0].float()
            error = ((packed - alone).abs().max() / alone.abs().max()).item()
            if not error <= PACKING_TOLERANCE[self.info.dtype]:
                raise ValueError(f"packed sequences differ from the same sequences alone (off by {error:.2g})")
        except Exception as e:  # a model's code may raise anything on unexpected input
            if own == "sdpa":
                with contextlib.suppress(Exception):
                    self._model.set_attn_implementation(own)
            logger.info("batches are padded: %s: %s", type(e).__name__, e)
            return False
        return True

    def _load_adapters(self) -> None:
        self.adapters = {name: adapter_info(self.info, name, path) for name, path in self.config.adapters.items()}
        self._adapter: str | None = None
        # Numbered, because a PyTorch module name must not contain dots.
        self._modules = {name: f"adapter{number}" for number, name in enumerate(self.adapters)}
        for name, path in self.config.adapters.items():
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are intended
                loaded = self._model.load_adapter(path, self._modules[name])
            # PEFT initialises adapters as no-ops and leaves them so where a name does not match.
            missing = [key for key in loaded.missing_keys if self._modules[name] in key.split(".")]
            bad = [*missing, *loaded.unexpected_keys, *map(str, loaded.mismatched_keys)]
            if bad:
                raise ValueError(f"adapters: {path} does not fit {self.config.model}: {bad[0]} ({len(bad)} such names)")
        if self._model.get_output_embeddings() is not self._head:
            raise ValueError(f"adapters: PEFT changed the output head of {self.config.model}, which is not supported")
        self._model.requires_grad_(False)

    def _use_adapter(self, name: str) -> None:
        if name == self._adapter or not self.adapters:
            return
        if name:
            self._model.set_adapter(self._modules[name])
            self._model.enable_adapters()
        else:
            self._model.disable_adapters()
        self._adapter = name

    def _check_loading(self, loading: Mapping[str, Any]) -> None:
        """Raises ValueError if weights are random, or the head is tied although another one is stored."""
        path = self.config.model
        if lost := sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]])):
            raise ValueError(
                f"{path}: transformers {transformers.__version__} finds no weights for {lost[0]} ({len(lost)} such "
                "tensors) and would score with random ones: config.json and weights belong to different models, or the "
                "checkpoint is incomplete"
            )
        if unused := sorted(map(str, loading["unexpected_keys"])):
            logger.warning("%s: transformers does not use %s (%d such tensors)", path, unused[0], len(unused))
        head, embedding = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        if head.weight is embedding.weight and has_separate_head(stored_tensors(path)):
            raise ValueError(
                f"{path}: config.json says tie_word_embeddings: true, but another output head is stored, which "
                f"transformers {transformers.__version__} ignores: set tie_word_embeddings to false in config.json, or "
                "delete the tensor that is wrong"
            )

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Raises ValueError if the logits are more than the projection of the body's output (soft caps, scales)."""
        probe_BS = torch.arange(1, 9, device=self._device)[None] % self.info.vocab_size
        expected_SV = self._model(probe_BS, use_cache=False).logits[0].float()
        logits_SV = self._head(self._hidden(probe_BS)[0]).float()
        if logits_SV.shape[-1] != self.info.vocab_size:
            raise ValueError(
                f"{self.config.model}: config.json has vocab_size {self.info.vocab_size}, but the output projection "
                f"has {logits_SV.shape[-1]} rows"
            )
        tolerance = 1e-3 if self.info.dtype == "float32" else 0.1
        if not torch.allclose(logits_SV, expected_SV, atol=tolerance, rtol=tolerance):
            raise ValueError(
                f"{self.config.model}: {type(self._model).__name__} changes its logits after the output projection "
                "(a soft cap or a scale), which the transformers engine does not support; use the vllm engine"
            )

    def _hidden(self, tokens_BS: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
        """Returns the body's output [B, S, D]; `lengths`: of the sequences in a packed row."""
        tokens_BS = tokens_BS.to(self._device)
        packed: dict[str, Any] = {}
        if lengths is not None:
            ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(self._device)
            packed = {
                "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(self._device),
                "sequence_lengths": tuple(lengths),  # for packed_sdpa; the others are for flash attention
                **{"cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
                **{"max_length_q": max(lengths), "max_length_k": max(lengths)},
            }
        # No attention mask: padding is on the right, where no real token attends to, and without a mask attention takes
        # its fast causal path.
        return self._model.base_model(input_ids=tokens_BS, use_cache=False, **packed).last_hidden_state

    @torch.inference_mode()
    def score_batch(
        self, sequences: list[SequenceToScore], *, top_k: int, temperature: float, adapter: str = ""
    ) -> list[TokenScores]:
        """See BatchedEngine.score_batch."""
        lengths = [len(sequence.token_ids) for sequence in sequences]
        if self.packs:
            starts = np.cumsum([0, *lengths[:-1]])
            tokens_BS = torch.empty((1, sum(lengths)), dtype=torch.int64)
        else:
            starts = np.arange(len(sequences)) * max(lengths)
            tokens_BS = torch.zeros((len(sequences), max(lengths)), dtype=torch.int64)
        tokens_M = tokens_BS.view(-1)
        for start, sequence in zip(starts, sequences, strict=True):
            tokens_M[start : start + len(sequence.token_ids)] = torch.from_numpy(sequence.token_ids)
        places = [start + sequence.scored_positions() for start, sequence in zip(starts, sequences, strict=True)]
        places_N = torch.from_numpy(np.concatenate(places).astype(np.int64))
        targets_N = tokens_M[places_N].to(self._device)
        candidates_NC = None
        if sequences[0].candidate_ids is not None:
            ids_NC = np.concatenate([sequence.candidate_ids for sequence in sequences]).astype(np.int64)
            candidates_NC = torch.from_numpy(ids_NC).to(self._device)
        try:
            self._use_adapter(adapter)
            hidden_MD = self._hidden(tokens_BS, lengths if self.packs else None).flatten(0, 1)
            # The logits at position t - 1 predict token t.
            hidden_ND = hidden_MD[(places_N - 1).to(self._device)]
            del hidden_MD
            results = self._log_probabilities(hidden_ND, targets_N, candidates_NC, top_k, temperature)
        except RuntimeError as e:
            # An out-of-memory error fails these sequences only; after any other CUDA error the process is lost.
            if isinstance(e, torch.cuda.OutOfMemoryError) or "CUDA error" not in str(e):
                raise
            raise EngineDeadError(f"the transformers engine's GPU failed: {e}") from e
        logprobs_N, top_ids_NK, top_logprobs_NK, candidate_logprobs_NC = results
        tokens = tokens_M.numpy()
        return split_scores(
            sequences,
            [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)],
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
        """Returns log-probabilities in float32 nats: targets [N], top-k ids and values [N, K], candidates [N, C]."""
        N, device = len(hidden_ND), self._device
        # Allocated before the loop: results kept between freed chunks would fragment memory.
        logprobs_N1 = torch.empty((N, 1), device=device)
        top_ids_NK = torch.empty((N, top_k), dtype=torch.int64, device=device)
        top_logprobs_NK = torch.empty((N, top_k), device=device)
        candidate_logprobs_NC = None if candidates_NC is None else torch.empty(candidates_NC.shape, device=device)
        for start in range(0, N, self._chunk_tokens):
            chunk = slice(start, start + self._chunk_tokens)
            logits_nV = self._head(hidden_ND[chunk]).float()
            logits_nV /= temperature
            normalizer_n1 = torch.logsumexp(logits_nV, dim=-1, keepdim=True)
            logprobs_N1[chunk] = logits_nV.gather(1, targets_N[chunk, None]) - normalizer_n1
            if top_k:
                top_logits_nK, top_ids_NK[chunk] = logits_nV.topk(top_k, dim=-1, sorted=True)
                top_logprobs_NK[chunk] = top_logits_nK - normalizer_n1
            if candidate_logprobs_NC is not None:
                candidate_logprobs_NC[chunk] = logits_nV.gather(1, candidates_NC[chunk]) - normalizer_n1
        return (
            _to_numpy(logprobs_N1)[:, 0],
            top_ids_NK.cpu().numpy() if top_k else None,
            _to_numpy(top_logprobs_NK) if top_k else None,
            None if candidate_logprobs_NC is None else _to_numpy(candidate_logprobs_NC),
        )

    def unload(self) -> None:
        """See BatchedEngine.unload."""
        self._model = self._head = None
        gc.collect()  # modules and hooks form cycles
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _to_numpy(logprobs: torch.Tensor) -> np.ndarray:
    """Clamps float32 log-probabilities at 0, since logit - normalizer can round to a few 1e-7 above it."""
    return logprobs.clamp_(max=0.0).cpu().numpy()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ValueError(f"engine_args: device {name!r} is unknown to PyTorch: {e}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"engine_args: device {name!r}, but this PyTorch ({torch.__version__}) sees no GPU")
    return device
