"""Refuses scoring requests that the engine must not see: all checks of a request stand in `admit`, in order.

Two refusals happen elsewhere: a caller without a valid certificate or token never gets this far (security.py), and a
call that finds the queue full is refused by the queue (fair_queue.py).
"""

from __future__ import annotations

from jdistill.sidecar.call import MAX_NAME_CHARS, Call, Work
from jdistill.sidecar.fair_queue import FairQueue
from jdistill.sidecar.lifecycle import Lifecycle
from jdistill.wire import codec
from jdistill.wire.errors import DeadlineError, FingerprintMismatchError, ModelNotFoundError
from jdistill.wire.types import ModelInfo
from jdistill.wire.validate import validate_request


def admit(call: Call, remaining_s: float | None, *, lifecycle: Lifecycle, queue: FairQueue) -> Work | None:
    """Checks `call.request` and turns it into work for the engine; notes the facts for the log in `call`.

    Args:
        remaining_s: time until the call's deadline; None: no deadline.

    Returns:
        The work, or None for a request without sequences, which needs no engine.

    Raises:
        UnavailableError: the teacher is loading, shutting down, or asleep with `on_sleep: refuse`.
        EngineDeadError: the engine has died.
        InvalidRequestError: not a request, or one with invalid contents; names the field and the sequence.
        ModelNotFoundError: no model or adapter of that name.
        FingerprintMismatchError: the client expects other weights.
        UnsupportedError: the engine cannot do what is asked.
        DeadlineError: the deadline has passed.
    """
    engine = lifecycle.serving_engine()
    sequences, options = codec.decode_request(call.request)
    call.request = b""
    call.request_id = options.request_id[:MAX_NAME_CHARS]
    info = _find_model(options.model, lifecycle)
    call.model = info.model
    if options.expected_fingerprint and options.expected_fingerprint != info.fingerprint:
        raise FingerprintMismatchError(
            f"expected the model with fingerprint {options.expected_fingerprint[:16]}..., teacher {info.model!r} "
            f"has {info.fingerprint[:16]}...: it serves other weights, or another dtype, than when the run began"
        )
    validate_request(sequences, info=info, top_k=options.top_k, temperature=options.temperature)
    if not sequences:
        return None
    if remaining_s is not None and remaining_s <= 0:
        raise DeadlineError("the deadline passed before the request reached the engine")
    lifecycle.check_awake()
    sequences = [sequence.as_scored() for sequence in sequences]
    sizes = [len(sequence.token_ids) for sequence in sequences]
    call.num_sequences, call.num_tokens = len(sequences), sum(sizes)
    return Work(engine, info, sequences, options, queue.cut(sizes))


def _find_model(name: str, lifecycle: Lifecycle) -> ModelInfo:
    info = lifecycle.models.get(name) if name else lifecycle.serving_engine().info
    if info is None:
        raise ModelNotFoundError(
            f"no model {name!r} here; this teacher serves {', '.join(map(repr, lifecycle.models))}", field="model"
        )
    return info
