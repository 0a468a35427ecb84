"""Distillation terms: holes in the mask, padding, order, and numbers at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.losses import distillation, masked


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_return_to_go_equals_the_plain_loop_over_scored_tokens(discount, seed):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, 3, 6)).astype(np.float32)
    mask_BT = rng.random((3, 6)) < 0.6
    expected = np.zeros((3, 6))
    for b in range(3):
        to_go = 0.0
        for t in reversed(range(6)):
            if mask_BT[b, t]:
                to_go = float(teacher[b, t]) - float(student[b, t]) + discount * to_go
                expected[b, t] = to_go
    # What stands at unscored targets is not read: NaN there changes nothing.
    got = distillation.sampled_reverse_kl_advantage(
        jnp.asarray(np.where(mask_BT, student, np.nan)),
        jnp.asarray(np.where(mask_BT, teacher, -np.inf)),
        jnp.asarray(mask_BT),
        discount=discount,
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_no_gradient_flows_through_the_advantage():
    teacher = jnp.full((1, 3), -1.0)
    mask = jnp.ones((1, 3), bool)
    grad = jax.grad(lambda x: distillation.sampled_reverse_kl_advantage(x, teacher, mask, discount=1.0).sum())(
        jnp.full((1, 3), -2.0)
    )
    np.testing.assert_array_equal(grad, 0)


def random_topk(rng, num_rows, num_targets, vocabulary, k, scale):
    """Log-probs [B, T, K] of a student's top-k and of a teacher at the same tokens; float32."""
    logits = rng.normal(scale=scale, size=(2, num_rows, num_targets, vocabulary))
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    ids = np.argsort(-logprobs[0], axis=-1)[..., :k]
    return [np.take_along_axis(x, ids, axis=-1).astype(np.float32) for x in logprobs]


@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.sampled_from([1, 4, 11]),
    scale=st.sampled_from([0.1, 3.0, 40.0, 1000.0]),
)
@settings(max_examples=60, deadline=None)
def test_topk_is_finite_and_never_negative_in_float32(seed, k, scale):
    student, teacher = random_topk(np.random.default_rng(seed), 2, 3, 11, k, scale)
    value, grad = jax.value_and_grad(lambda x: distillation.topk_reverse_kl(x, jnp.asarray(teacher)).sum())(
        jnp.asarray(student)
    )
    per_token = distillation.topk_reverse_kl(jnp.asarray(student), jnp.asarray(teacher))
    assert np.isfinite(value) and np.isfinite(grad).all()
    # Rounding of the log-probs themselves (eps * scale) moves the value by as much.
    assert np.all(np.asarray(per_token) >= -1e-5 * max(1, scale / 10))


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_unscored_targets_padding_and_order_never_change_the_reduced_term(seed):
    rng = np.random.default_rng(seed)
    student, teacher = random_topk(rng, 3, 4, 9, 3, 2.0)
    mask_BT = rng.random((3, 4)) < 0.6

    def loss(student, teacher, mask):
        per_token = distillation.topk_reverse_kl(masked.fill(student, mask), masked.fill(teacher, mask))
        return masked.masked_mean(per_token, mask)

    value, grad = jax.value_and_grad(loss)(jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(mask_BT))
    order = rng.permutation(3)
    pad = ((0, 0), (0, 2), (0, 0))

    def spoil(x):
        return np.pad(np.where(mask_BT[..., None], x, -np.inf), pad, constant_values=np.nan)[order]

    other_value, other_grad = jax.value_and_grad(loss)(
        jnp.asarray(spoil(student)), jnp.asarray(spoil(teacher)), jnp.asarray(np.pad(mask_BT, pad[:2])[order])
    )
    np.testing.assert_allclose(other_value, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other_grad[np.argsort(order), :4], grad, rtol=1e-5, atol=1e-7)
    assert np.all(np.asarray(grad)[~mask_BT] == 0)


def test_a_candidate_the_student_has_given_up_costs_nothing_and_one_the_teacher_forbids_is_infinite():
    teacher = jnp.array([[[np.log(0.5), -np.inf]]], jnp.float32)
    gone = jnp.array([[[np.log(0.5), -np.inf]]], jnp.float32)
    value, grad = jax.value_and_grad(lambda x: distillation.topk_reverse_kl(x, teacher).sum())(gone)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    assert np.isfinite(grad).all()
    kept = jnp.array([[[np.log(0.5), np.log(0.25)]]], jnp.float32)
    assert np.isposinf(distillation.topk_reverse_kl(kept, teacher)[0, 0])


def test_no_gradient_flows_to_the_teacher():
    student, teacher = random_topk(np.random.default_rng(0), 1, 2, 6, 3, 1.0)
    grad = jax.grad(lambda q: distillation.topk_reverse_kl(jnp.asarray(student), q).sum())(jnp.asarray(teacher))
    np.testing.assert_array_equal(grad, 0)
