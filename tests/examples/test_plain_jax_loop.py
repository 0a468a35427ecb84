"""The loop that uses nothing of ours but TeacherClient: its student comes closer to the teacher."""

import ast
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from jdistill.client import TeacherClient

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
SOURCE = EXAMPLES / "plain_jax_loop.py"


@pytest.fixture
def loop():
    spec = importlib.util.spec_from_file_location("plain_jax_loop", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exact_kl(loop, teacher, params):
    """Mean KL(student || teacher) in nats over all 16 tokens, at positions that the student has sampled itself."""
    prompts = np.random.default_rng(1).integers(0, 10, (64, 8))
    prompts[:, 3], prompts[:, 7] = loop.IDS["+"], loop.IDS["="]
    digits = np.array([loop.IDS[c] for c in "0123456789"])
    prompts[:, [0, 1, 2, 4, 5, 6]] = digits[prompts[:, [0, 1, 2, 4, 5, 6]]]
    tokens_BS, mask_BT = (np.asarray(array) for array in loop.sample(params, prompts, jax.random.key(2)))
    everything_BTV = np.broadcast_to(np.arange(loop.V), (*mask_BT.shape, loop.V))
    teacher_BTV = teacher.score_batch(tokens_BS, mask_BT, candidate_ids_BTC=everything_BTV).candidate_logprobs
    own_PV = np.asarray(loop.log_probs(params, tokens_BS), np.float64)[mask_BT]
    teacher_PV = teacher_BTV[mask_BT].astype(np.float64)
    np.testing.assert_allclose(np.exp(teacher_PV).sum(-1), 1, atol=1e-5)
    return (np.exp(own_PV) * (own_PV - teacher_PV)).sum(-1).mean()


def test_the_students_exact_kl_to_the_teacher_falls(loop, start_sidecar):
    sidecar = start_sidecar("--engine", "jax", "--model", EXAMPLES / "addition" / "teacher", wait=False)
    sidecar.wait_for_port(timeout_s=120)
    lines = []
    with TeacherClient([sidecar.address], deadline_s=60) as teacher:
        params = loop.init(jax.random.key(0))
        before = exact_kl(loop, teacher, params)
        params = loop.train(teacher, params, num_steps=50, batch_size=16, log=lines.append)
        after = exact_kl(loop, teacher, params)
    assert after < 0.7 * before, f"{before:.3f} -> {after:.3f} nats a token; {lines}"


def test_reverse_kl_with_a_tail_is_that_of_the_coarser_distributions(loop):
    rng = np.random.default_rng(0)
    own_V, teacher_V = (rng.dirichlet(np.ones(16)) for _ in range(2))
    own, other = (np.array([p[3], p[9], 1 - p[3] - p[9]]) for p in (own_V, teacher_V))
    got = loop.reverse_kl(np.log(own_V[[3, 9]])[None, None], np.log(teacher_V[[3, 9]])[None, None])
    np.testing.assert_allclose(got, [[(own * np.log(own / other)).sum()]], rtol=1e-5)


def test_of_jdistill_it_imports_the_client_alone():
    nodes = ast.walk(ast.parse(SOURCE.read_text()))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {m for m in modules if m.startswith("jdistill")} == {"jdistill.client"}
    assert "import jdistill" not in SOURCE.read_text()
