"""How a command ends after an error that is the user's, the network's or the disk's: a message and an exit code."""

from __future__ import annotations

import errno

from jdistill.wire.errors import TeacherError

_FULL = {errno.ENOSPC, errno.EDQUOT}


def of_error(error: BaseException) -> tuple[str, int] | None:
    """Returns the message, with the error's notes, and the exit code: 1 the work failed, 2 the request was wrong.

    None: the error is a bug of ours, whose traceback is needed.
    """
    if isinstance(error, OSError) and error.errno is not None:
        if error.filename is None and error.errno not in _FULL:
            return None
        code, text = int(error.errno in _FULL) or 2, f"{error.filename or 'writing'}: {error.strerror}"
        if error.errno in _FULL:
            text += "; free some space and start again (train: with --resume, if a checkpoint was saved)"
    elif isinstance(error, TeacherError | ValueError | FileNotFoundError):
        code, text = 2 if isinstance(error, ValueError | FileNotFoundError) else 1, str(error)
    else:
        return None
    return "\n".join([text, *getattr(error, "__notes__", [])]), code
