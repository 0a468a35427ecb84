"""Responses as a rollout would hand them to a task's reward."""

import numpy as np

from jdistill.rollout.completion import Completion


def respond(task, ids, *, stop_string=None, include_stop=False):
    """The response of sampled ids: ended by the task's stop token if that is the last id, or by a stop string."""
    ids = np.asarray(ids, np.int32)
    text = task.decode(ids)
    span = None if stop_string is None else (text.rindex(stop_string), text.rindex(stop_string) + len(stop_string))
    ended = span is not None or (len(ids) > 0 and int(ids[-1]) in task.stop_token_ids)
    reason = "stop" if ended else "length"
    return task.response(Completion(0, ids, 0, np.zeros(len(ids), np.float32), None, reason, span, include_stop))
