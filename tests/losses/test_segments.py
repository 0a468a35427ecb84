"""Segments of several tokens against hand-computed sums, the single-token form, and exact enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.losses import distillation, segments


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_sums_and_returns_by_hand():
    logprobs = jnp.array([[-1.0, -2.0, -3.0, -4.0, -5.0, jnp.nan]])
    teacher = jnp.array([[0.0, -10.0, -20.0, jnp.inf, -30.0, jnp.nan]])
    ids = jnp.array([[0, 0, 1, -1, 2, 2]])
    mask = jnp.array([[True, True, True, True, True, False]])
    np.testing.assert_array_equal(segments.segment_sums(logprobs, ids, mask), [[-3, -3, -3, 0, -5, 0]])
    myopic, usable = segments.sampled_reverse_kl_advantage(logprobs, teacher, ids, mask)
    np.testing.assert_array_equal(myopic, [[-7, -7, -17, 0, -25, 0]])
    np.testing.assert_array_equal(usable, [[True, True, True, False, True, False]])
    half, _ = segments.sampled_reverse_kl_advantage(logprobs, teacher, ids, mask, discount=0.5)
    np.testing.assert_array_equal(half, [[-7 - 29.5 / 2, -7 - 29.5 / 2, -17 - 12.5, 0, -25, 0]])


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
def test_one_token_per_segment_equals_the_single_token_form(discount):
    key = jax.random.split(jax.random.key(0), 3)
    mask = jax.random.bernoulli(key[0], 0.7, (5, 9))
    logprobs, teacher = -jax.random.exponential(key[1], (5, 9)), -jax.random.exponential(key[2], (5, 9))
    ids = jnp.where(mask, jnp.cumsum(mask, axis=1) - 1, -1)
    found, usable = segments.sampled_reverse_kl_advantage(logprobs, teacher, ids, mask, discount=discount)
    expected = distillation.sampled_reverse_kl_advantage(logprobs, teacher, mask, discount=discount)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(usable, mask)


@pytest.mark.parametrize("boundaries", [(2, 4), (1, 4), (3, 4), (4,), (1, 2, 3, 4)])
def test_expected_gradient_is_that_of_the_kl_over_segments(boundaries):
    # Four student tokens with a vocabulary of 3, and a teacher that gives only joint probabilities of segments.
    num_ids, length = 3, 4
    rng = np.random.default_rng(0)
    tables = [jnp.asarray(rng.normal(size=(num_ids,) * (t + 1))) for t in range(length)]
    teacher_logits = jnp.asarray(rng.normal(size=(num_ids,) * length)).ravel()
    sequences = jnp.array(list(itertools.product(range(num_ids), repeat=length)))
    ids = jnp.array([int(np.searchsorted(boundaries, t + 1)) for t in range(length)])

    def logprobs(tables):
        columns = [jax.nn.log_softmax(x)[tuple(sequences[:, : t + 1].T)] for t, x in enumerate(tables)]
        return jnp.stack(columns, axis=1)

    # log q of each segment given the previous ones, by the chain rule over segments.
    joint = jax.nn.softmax(teacher_logits).reshape((num_ids,) * length)
    teacher, before = [], jnp.zeros(len(sequences))
    for end in boundaries:
        marginal = jnp.log(joint.sum(axis=tuple(range(end, length))))[tuple(sequences[:, :end].T)]
        teacher.append(marginal - before)
        before = marginal
    teacher_BT = jnp.zeros(sequences.shape)
    for end, column in zip(boundaries, teacher, strict=True):
        teacher_BT = teacher_BT.at[:, end - 1].set(column)
    ids_BT = jnp.broadcast_to(ids, sequences.shape)
    mask_BT = jnp.ones(sequences.shape, bool)

    def exact(tables):
        logp = logprobs(tables).sum(axis=1)
        return jnp.sum(jnp.exp(logp) * (logp - before))

    def estimated(tables):
        logprobs_BT = logprobs(tables)
        advantages_BT, _ = segments.sampled_reverse_kl_advantage(logprobs_BT, teacher_BT, ids_BT, mask_BT, discount=1.0)
        weight_B = jax.lax.stop_gradient(jnp.exp(logprobs_BT.sum(axis=1)))
        return -jnp.sum(weight_B[:, None] * advantages_BT * logprobs_BT)

    for a, b in zip(jax.grad(exact)(tables), jax.grad(estimated)(tables), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)


def test_no_gradient_and_no_recompilation():
    ids, mask = jnp.array([[0, 0, 1]]), jnp.ones((1, 3), bool)
    step = jax.jit(segments.sampled_reverse_kl_advantage)
    gradient = jax.grad(lambda x: step(x, x * 2, ids, mask)[0].sum())(jnp.array([[-1.0, -2.0, -3.0]]))
    np.testing.assert_array_equal(gradient, jnp.zeros((1, 3)))
    step(jnp.zeros((1, 3)), jnp.zeros((1, 3)), jnp.array([[-1, -1, 0]]), mask)
    assert step._cache_size() == 1
