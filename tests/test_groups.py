"""The groups that tests/conftest.py forms reach pytest-xdist: a version of pytest that it does not know drops them."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="there are no groups without workers")
def test_a_group_is_part_of_the_node_id_by_which_tests_are_distributed(request):
    # Without it each test is distributed alone: every worker makes fixtures of a module, builds run twice at once.
    assert request.node.nodeid.endswith("@tests/test_groups.py::" + request.node.name)
