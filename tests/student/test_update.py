"""Metrics of a step's samples."""

import types

from jdistill.student.update import _readable_share


def told(*readable):
    """A task that says of completion i what `readable[i]` says, and completions that are their own responses."""
    return types.SimpleNamespace(response=int, is_readable=lambda i: readable[i]), range(len(readable))


def test_the_share_of_readable_answers_is_a_metric_where_the_task_says_which_are():
    assert _readable_share(*told(True, False, True, True)) == {"readable_share": 0.75}
    assert _readable_share(*told(False, False)) == {"readable_share": 0.0}
    assert _readable_share(*told(None, None)) == {}
