"""The error tree of everything that touches the network, rooted in TeacherError."""

from __future__ import annotations


class TeacherError(Exception):
    """Any failure to get verified scores. `reason` is the upper-case word of google.rpc.ErrorInfo."""

    reason = "TEACHER_ERROR"


class InvalidRequestError(TeacherError, ValueError):
    """The request itself is wrong; retrying cannot help. `field` and `sequence` say where (None if nowhere special)."""

    reason = "INVALID_REQUEST"

    def __init__(self, message: str, *, field: str | None = None, sequence: int | None = None):
        super().__init__(message)
        self.field = field
        self.sequence = sequence


class ModelNotFoundError(InvalidRequestError):
    """The teacher serves no model of that name."""

    reason = "MODEL_NOT_FOUND"


class UnsupportedError(TeacherError):
    """This engine cannot do what was asked; the message names the engine and the remedy."""

    reason = "UNSUPPORTED"


class UnauthenticatedError(TeacherError):
    """No token, a wrong or an expired one; retrying cannot help."""

    reason = "UNAUTHENTICATED"


class FingerprintMismatchError(TeacherError):
    """Another model, checkpoint or tokenizer than expected."""

    reason = "FINGERPRINT_MISMATCH"


class UnavailableError(TeacherError):
    """The teacher cannot be reached, is loading, draining or dead; worth a retry until the deadline."""

    reason = "UNAVAILABLE"
    retry_after_s: float | None = None  # when it is worth coming back, if the server knows


class OverloadedError(UnavailableError):
    """The teacher's queue is full; worth a retry."""

    reason = "OVERLOADED"


class CorruptedError(UnavailableError):
    """A message was changed on its way (its checksum says so); worth a retry."""

    reason = "CORRUPTED"


class DeadlineError(TeacherError):
    """No verified answer before the deadline; the message lists the attempts."""

    reason = "DEADLINE"


class VerificationError(TeacherError):
    """The teacher answered, but not to what was asked: other ids, too few or too many scores, NaN, above 0."""

    reason = "VERIFICATION"


class EngineDeadError(UnavailableError):
    """The engine behind the service has died; the process will exit so that a supervisor restarts it."""

    reason = "ENGINE_DEAD"
