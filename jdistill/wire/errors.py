"""The error tree of everything that uses the network, rooted in TeacherError."""

from __future__ import annotations


class TeacherError(Exception):
    """Any failure to get verified scores; `reason` is the upper-case word in google.rpc.ErrorInfo."""

    reason = "TEACHER_ERROR"


class InvalidRequestError(TeacherError, ValueError):
    """The request itself is wrong, so a retry cannot help; `field` and `sequence` locate the mistake where known."""

    reason = "INVALID_REQUEST"

    def __init__(self, message: str, *, field: str | None = None, sequence: int | None = None):
        super().__init__(message)
        self.field = field
        self.sequence = sequence


class ModelNotFoundError(InvalidRequestError):
    """The teacher serves no model with the requested name."""

    reason = "MODEL_NOT_FOUND"


class UnsupportedError(TeacherError):
    """This engine cannot do what was asked; the message names the engine and the remedy."""

    reason = "UNSUPPORTED"


class UnauthenticatedError(TeacherError):
    """The token is missing, wrong or expired; a retry cannot help."""

    reason = "UNAUTHENTICATED"


class FingerprintMismatchError(TeacherError):
    """The teacher has another model, checkpoint or tokenizer than expected."""

    reason = "FINGERPRINT_MISMATCH"


class UnavailableError(TeacherError):
    """The teacher is unreachable, loading, draining or dead; worth a retry until the deadline."""

    reason = "UNAVAILABLE"
    retry_after_s: float | None = None  # earliest useful retry; None: unknown to the server


class OverloadedError(UnavailableError):
    """The teacher's queue is full; worth a retry."""

    reason = "OVERLOADED"


class CorruptedError(UnavailableError):
    """A message does not match its checksum, so it was changed in transit; worth a retry."""

    reason = "CORRUPTED"


class DeadlineError(TeacherError):
    """No verified answer arrived before the deadline; the message lists the attempts."""

    reason = "DEADLINE"


class VerificationError(TeacherError):
    """The reply does not answer the request: other ids, too few or too many scores, NaN or positive values."""

    reason = "VERIFICATION"


class EngineDeadError(UnavailableError):
    """The engine has died; the sidecar exits so that a supervisor restarts it."""

    reason = "ENGINE_DEAD"
