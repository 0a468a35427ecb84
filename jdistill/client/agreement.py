"""Are these replicas one teacher, and the one that the run began with? Pure functions of what the replicas say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jdistill.wire.errors import FingerprintMismatchError, ModelNotFoundError, UnavailableError
from jdistill.wire.types import ModelInfo, ServerInfo, ServerState

_IDENTITY = ("fingerprint", "tokenizer_fingerprint", "vocab_size")
_LIMITS = ("max_sequence_length", "max_top_k", "max_candidate_count", "any_temperature")


def check_up(info: ServerInfo, endpoint: str) -> None:
    """Raises UnavailableError unless this server would take a score now."""
    if info.state is ServerState.LOADING:
        raise UnavailableError(f"{endpoint}: is loading its model")
    if info.state is ServerState.DRAINING:
        raise UnavailableError(f"{endpoint}: is draining, and takes no more work")
    if info.state is ServerState.SLEEPING and not info.wake_on_score:
        raise UnavailableError(
            f"{endpoint}: is asleep and refuses scores; call TeacherClient.wake(), or start it with on_sleep: wake"
        )


def pick_model(info: ServerInfo, model: str, endpoint: str) -> ModelInfo:
    """The ModelInfo of the served name `model` ("": the base model).

    Raises:
        ModelNotFoundError: lists what there is.
    """
    if not model:
        return info.model
    for one in info.models:
        if one.model == model:
            return one
    served = ", ".join(repr(one.model) for one in info.models)
    raise ModelNotFoundError(
        f"{endpoint}: serves no model {model!r}, only {served}; name one of them, or start that teacher with the "
        "adapter",
        field="model",
    )


def agree(models: Sequence[tuple[str, ModelInfo]], expected_tokenizer_fingerprint: str | None) -> ModelInfo:
    """The model that all replicas, (endpoint, model) each, serve; its limits are the tightest of all.

    Raises:
        FingerprintMismatchError: says which replicas differ in what, or that it is not the student's tokenizer.
    """
    for name in _IDENTITY:
        endpoints: dict[Any, list[str]] = {}
        for endpoint, model in models:
            endpoints.setdefault(getattr(model, name), []).append(endpoint)
        if len(endpoints) > 1:
            parts = "; ".join(f"{', '.join(who)}: {value!r}" for value, who in endpoints.items())
            raise FingerprintMismatchError(
                f"the teacher replicas differ in {name}: {parts}. All replicas of one teacher serve the same "
                "checkpoint in the same dtype: restart those that differ"
            )
    model = models[0][1]
    expected = expected_tokenizer_fingerprint
    if expected and model.tokenizer_fingerprint != expected:
        has = f"{model.tokenizer_fingerprint!r}" if model.tokenizer_fingerprint else "none (no tokenizer files)"
        raise FingerprintMismatchError(
            f"the tokenizer of teacher {model.model!r} has the fingerprint {has}, the student's {expected!r}: the "
            "same id means another text on each side, and every score would be wrong. Use a teacher of the same "
            "model family, or save the student's tokenizer files beside the teacher's checkpoint if only they "
            "differ"
        )
    return dataclasses.replace(model, **{name: min(getattr(one, name) for _, one in models) for name in _LIMITS})


def difference(model: ModelInfo, pinned: ModelInfo) -> str | None:
    """How `model` differs from the pinned one in a way that matters; None if it does not."""
    for name in _IDENTITY:
        if getattr(model, name) != getattr(pinned, name):
            return f"{name} is now {getattr(model, name)!r}, was {getattr(pinned, name)!r}"
    for name in _LIMITS:
        if getattr(model, name) < getattr(pinned, name):
            return f"{name} is now {getattr(model, name)}, was {getattr(pinned, name)}"
    return None
