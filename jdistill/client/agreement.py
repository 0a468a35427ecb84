"""Check that replicas serve one model, the one that the run began with; pure functions of their ServerInfo."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jdistill.wire.errors import FingerprintMismatchError, ModelNotFoundError, UnavailableError
from jdistill.wire.types import ModelInfo, ServerInfo, ServerState

_IDENTITY = ("fingerprint", "tokenizer_fingerprint", "vocab_size")
_LIMITS = ("max_sequence_length", "max_top_k", "max_candidate_count", "any_temperature")


def check_up(info: ServerInfo, endpoint: str) -> None:
    """Raises UnavailableError unless this server would accept a score now."""
    if info.state is ServerState.LOADING:
        raise UnavailableError(f"{endpoint}: is loading its model")
    if info.state is ServerState.DRAINING:
        raise UnavailableError(f"{endpoint}: is draining and accepts no more work")
    if info.state is ServerState.SLEEPING and not info.wake_on_score:
        raise UnavailableError(
            f"{endpoint}: is asleep and refuses scores; call TeacherClient.wake(), or start it with on_sleep: wake"
        )


def pick_model(info: ServerInfo, model: str, endpoint: str) -> ModelInfo:
    """Returns the ModelInfo of the served name `model` ("": the base model).

    Raises:
        ModelNotFoundError: lists the served names.
    """
    if not model:
        return info.model
    for one in info.models:
        if one.model == model:
            return one
    served = ", ".join(repr(one.model) for one in info.models)
    raise ModelNotFoundError(
        f"{endpoint}: serves no model {model!r}, only {served}; use one of these names, or start that teacher with "
        "the adapter",
        field="model",
    )


def same_servers(infos: Sequence[tuple[str, ServerInfo]]) -> list[tuple[str, str]]:
    """Returns the pairs of endpoints that reach one server process: a mistake, or two routes to it."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(info.instance_id, endpoint), endpoint) for endpoint, info in infos if info.instance_id]
    return [(one, other) for one, other in pairs if one != other]


def agree(models: Sequence[tuple[str, ModelInfo]], expected_tokenizer_fingerprint: str | None) -> ModelInfo:
    """Returns the model that all replicas serve, with the tightest limits of all.

    Args:
        models: (endpoint, model) of each replica.

    Raises:
        FingerprintMismatchError: replicas differ (says which and in what), or the tokenizer is not the student's.
    """
    for name in _IDENTITY:
        endpoints: dict[Any, list[str]] = {}
        for endpoint, model in models:
            endpoints.setdefault(getattr(model, name), []).append(endpoint)
        if len(endpoints) > 1:
            parts = "; ".join(f"{', '.join(who)}: {value!r}" for value, who in endpoints.items())
            raise FingerprintMismatchError(
                f"the teacher replicas differ in {name}: {parts}. All replicas of one teacher must serve the same "
                "checkpoint in the same dtype: restart those that differ"
            )
    model = models[0][1]
    expected = expected_tokenizer_fingerprint
    if expected and model.tokenizer_fingerprint != expected:
        has = f"{model.tokenizer_fingerprint!r}" if model.tokenizer_fingerprint else "none (no tokenizer files)"
        raise FingerprintMismatchError(
            f"the tokenizer of teacher {model.model!r} has fingerprint {has}, the student's {expected!r}: one id means "
            "different text on each side, so every score would be wrong. Use a teacher of the same model family; if "
            "only the tokenizer files differ, save the student's beside the teacher's checkpoint"
        )
    return dataclasses.replace(model, **{name: min(getattr(one, name) for _, one in models) for name in _LIMITS})


def difference(model: ModelInfo, pinned: ModelInfo) -> str | None:
    """Describes how `model` differs from the pinned one in identity or by tighter limits; None if it does not."""
    for name in _IDENTITY:
        if getattr(model, name) != getattr(pinned, name):
            return f"{name} is now {getattr(model, name)!r}, was {getattr(pinned, name)!r}"
    for name in _LIMITS:
        if getattr(model, name) < getattr(pinned, name):
            return f"{name} is now {getattr(model, name)}, was {getattr(pinned, name)}"
    return None
