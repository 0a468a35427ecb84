"""PyTorch's side, what a user of transformers gets: eager, SDPA, float32; `python -m benchmarks.peers.torch TASK`."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.peers import work

torch.set_num_threads(len(os.sched_getaffinity(0)))
torch.manual_seed(work.SEED)
FACTS = {"versions": work.versions("torch", "transformers")}


def make_model() -> Qwen3ForCausalLM:
    fields = work.hf_config()
    theta = fields.pop("rope_theta")
    config = Qwen3Config(**fields, rope_parameters={"rope_type": "default", "rope_theta": theta}, pad_token_id=None)
    config._attn_implementation = "sdpa"
    model = Qwen3ForCausalLM(config).to(torch.float32)
    tensors = {name: torch.from_numpy(array) for name, array in work.weights().items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise AssertionError(f"the weights do not fit Qwen3ForCausalLM: {missing} missing, {unexpected} unexpected")
    model.tie_weights()
    return model


def tensors() -> dict[str, torch.Tensor]:
    data = {name: torch.from_numpy(array) for name, array in work.batch().items()}
    data["tokens"] = torch.cat([data["prompt_ids"], data["completion_ids"]], dim=1).long()
    return data


def completion_logits(model: Qwen3ForCausalLM, tokens_BS: torch.Tensor) -> torch.Tensor:
    """float32 [B, R, V]: those that the completion's tokens were drawn from."""
    found = model(input_ids=tokens_BS, logits_to_keep=work.NEW_TOKENS + 1, use_cache=False)
    return found.logits[:, :-1]


def target_logprobs(logits_BRV: torch.Tensor, targets_BR: torch.Tensor) -> torch.Tensor:
    # A row at a time, as trainers on top of transformers do: the peak has one row's exponentials, not the batch's.
    norm_BR = torch.stack([torch.logsumexp(logits_RV, dim=-1) for logits_RV in logits_BRV])
    return logits_BRV.gather(-1, targets_BR[..., None])[..., 0] - norm_BR


def entropies(logits_RV: torch.Tensor) -> torch.Tensor:
    logprobs_RV = logits_RV.log_softmax(dim=-1)
    return -(logprobs_RV.exp() * logprobs_RV).sum(dim=-1)


def train(door: work.Door) -> None:
    model, data = make_model().train(), tensors()
    # optax's AdamW by its defaults.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=work.LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=work.WEIGHT_DECAY
    )
    targets_BR, advantages_B1 = data["tokens"][:, -work.NEW_TOKENS :], data["advantages"][:, None]

    def once(_: dict[str, Any]) -> dict[str, Any]:
        logits_BRV = completion_logits(model, data["tokens"])
        logprobs_BR = target_logprobs(logits_BRV, targets_BR)
        with torch.no_grad():
            entropy = float(torch.stack([entropies(logits_RV) for logits_RV in logits_BRV]).mean())
        ratio_BR = torch.exp(logprobs_BR - data["old_logprobs"])
        clipped_BR = ratio_BR.clamp(1 - work.CLIP, 1 + work.CLIP)
        policy_BR = -torch.minimum(advantages_B1 * ratio_BR, advantages_B1 * clipped_BR)
        loss = (policy_BR + work.KL_WEIGHT * (logprobs_BR - data["reference_logprobs"])).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"loss": float(loss.detach()), "entropy": entropy}

    door.serve(once, FACTS)


def generate(door: work.Door) -> None:
    model, prompts = make_model().eval(), tensors()["prompt_ids"].long()

    def once(_: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            found = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=work.NEW_TOKENS,
                eos_token_id=None,
                pad_token_id=work.PAD_ID,
                disable_compile=True,
            )
        return {"tokens": found[:, work.PROMPT_TOKENS :].numel()}

    door.serve(once, FACTS)


def score(door: work.Door) -> None:
    model, data = make_model().eval(), tensors()
    targets_BR = data["tokens"][:, -work.NEW_TOKENS :]

    def once(_: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            found = target_logprobs(completion_logits(model, data["tokens"]), targets_BR)
        return {"mean_logprob": float(found.mean())}

    door.serve(once, FACTS)


if __name__ == "__main__":
    work.main({"train": train, "generate": generate, "score": score})
