"""Properties of every distillation objective in the table, in float32.

Dimension key: B sequences, T targets, V vocabulary, K candidates.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.losses import distillation, estimators, masked

B, T, V, K = 3, 5, 11, 4
NAMES = sorted(estimators.OBJECTIVES)
SCALES = [0.1, 3.0, 40.0, 1000.0]  # of the logits; at 1000 gaps reach thousands of nats
SEEDS = st.integers(0, 2**32 - 1)


@functools.cache
def objective(name, **options):
    """Return f(logprobs, teacher_logprobs, loss_mask) -> loss per token, which fills its inputs as a trainer does."""
    function = estimators.OBJECTIVES[name].function
    if name == "topk_jsd":
        options = {"beta": 0.3} | options
    if name == "sampled_reverse_kl_advantage":
        options = {"discount": 0.9} | options

    def per_token(logprobs, teacher_logprobs, loss_mask):
        if name == "sampled_reverse_kl_advantage":
            return function(logprobs, teacher_logprobs, loss_mask, **options)
        return function(masked.fill(logprobs, loss_mask), masked.fill(teacher_logprobs, loss_mask), **options)

    return jax.jit(per_token)


@functools.cache
def reduced(name, **options):
    """(value, gradient) of the mean over scored tokens."""
    per_token = objective(name, **options)
    return jax.jit(jax.value_and_grad(lambda p, q, mask: masked.masked_mean(per_token(p, q, mask), mask)))


def inputs(rng, name, scale, num_candidates=K, dtype=np.float32):
    """Log-probs of a student and a teacher for the objective: [B, T] or [B, T, K]."""
    logits = rng.normal(scale=scale, size=(2, B, T, V))
    shifted = logits - logits.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    if estimators.OBJECTIVES[name].needs_candidates is None:
        picked = rng.integers(0, V, (B, T))
        return [np.take_along_axis(x, picked[..., None], -1)[..., 0].astype(dtype) for x in logprobs]
    ids = np.argsort(-logprobs[0], axis=-1)[..., :num_candidates]
    return [np.take_along_axis(x, ids, axis=-1).astype(dtype) for x in logprobs]


def wide(mask_BT, x):
    return mask_BT.reshape(mask_BT.shape + (1,) * (x.ndim - 2))


ALL = np.ones((B, T), bool)


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS, scale=st.sampled_from(SCALES))
@settings(max_examples=25, deadline=None)
def test_values_and_gradients_are_finite(name, seed, scale):
    rng = np.random.default_rng(seed)
    student, teacher = inputs(rng, name, scale)
    if name != "sampled_reverse_kl_advantage":  # linear in the log-probs, so infinities stay infinite
        teacher = np.where(rng.random(teacher.shape) < 0.2, -np.inf, teacher).astype(np.float32)
        given_up = (rng.random(student.shape) < 0.2) & np.isfinite(teacher)
        student = np.where(given_up, -np.inf, student).astype(np.float32)
    value, grad = reduced(name)(student, teacher, ALL)
    assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS, scale=st.sampled_from(SCALES))
@settings(max_examples=15, deadline=None)
def test_zero_where_student_and_teacher_agree(name, seed, scale):
    rng = np.random.default_rng(seed)
    student, _ = inputs(rng, name, scale)
    np.testing.assert_array_equal(np.abs(objective(name)(student, student, ALL)), 0)


@functools.cache
def of_logits(name, num_candidates):
    """Gradient of the sum with respect to the student's logits [B, T, V], at the tokens `ids`."""
    per_token = objective(name)

    def total(logits, teacher_logprobs, ids):
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), ids, axis=-1)
        if estimators.OBJECTIVES[name].needs_candidates is None:
            logprobs, teacher_logprobs = logprobs[..., 0], teacher_logprobs[..., 0]
        return per_token(logprobs, teacher_logprobs, jnp.asarray(ALL)).sum()

    return jax.jit(jax.grad(total))


@pytest.mark.parametrize(
    ("name", "num_candidates"),
    [(name, k) for name in NAMES for k in ((1, K, V) if name in distillation.DISTRIBUTION else (1,))],
)
@given(seed=SEEDS, scale=st.sampled_from([0.1, 3.0, 40.0]))
@settings(max_examples=8, deadline=None)
def test_no_gradient_where_student_and_teacher_agree(name, num_candidates, seed, scale):
    logits = np.random.default_rng(seed).normal(scale=scale, size=(B, T, V)).astype(np.float32)
    ids = np.argsort(-logits, axis=-1)[..., :num_candidates]
    teacher = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids, axis=-1)
    grad = of_logits(name, num_candidates)(logits, teacher, ids)
    np.testing.assert_allclose(grad, 0, atol=2e-5)  # a rest below 2e-6 counts as 0


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in NAMES] + [(name, {"tail": False}) for name in distillation.DISTRIBUTION],
)
def test_no_gradient_flows_to_the_teacher(name, options):
    student, teacher = inputs(np.random.default_rng(0), name, 2.0)
    grad = jax.grad(lambda q: objective(name, **options)(student, q, ALL).sum())(jnp.asarray(teacher))
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("name", ["sampled_reverse_kl", "straight_through_reverse_kl", "sampled_forward_kl"])
@given(seed=SEEDS, scale=st.sampled_from([1e-4, 1e-2, 1.0]))
@settings(max_examples=15, deadline=None)
def test_no_loss_of_a_sampled_token_is_negative(name, seed, scale):
    student, teacher = inputs(np.random.default_rng(seed), name, scale)
    assert np.all(np.asarray(objective(name)(student, teacher, ALL)) >= 0)


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_unscored_targets_padding_and_order_touch_neither_value_nor_gradient(name, seed):
    rng = np.random.default_rng(seed)
    student, teacher = inputs(rng, name, 2.0)
    mask_BT = rng.random((B, T)) < 0.6
    value, grad = reduced(name)(student, teacher, mask_BT)
    assert np.all(np.asarray(grad)[~mask_BT] == 0)

    order = rng.permutation(B)
    pad = ((0, 0), (0, 2))

    def spoil(x):
        bad = rng.choice(np.array([np.nan, np.inf, -np.inf, 1e30], np.float32), x.shape)
        x = np.where(wide(mask_BT, x), x, bad)
        return np.pad(x, pad + ((0, 0),) * (x.ndim - 2), constant_values=np.nan)[order]

    other_value, other_grad = reduced(name)(spoil(student), spoil(teacher), np.pad(mask_BT, pad)[order])
    np.testing.assert_allclose(other_value, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(other_grad)[np.argsort(order), :T], grad, rtol=1e-5, atol=1e-7)
    assert np.all(np.asarray(other_grad)[:, T:] == 0)


@pytest.mark.parametrize("name", sorted(distillation.DISTRIBUTION))
@pytest.mark.parametrize("tail", [True, False])
@given(seed=SEEDS, scale=st.sampled_from([0.1, 3.0]))
@settings(max_examples=10, deadline=None)
def test_padded_candidates_and_the_order_of_candidates_change_nothing(name, tail, seed, scale):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        both = inputs(rng, name, scale, dtype=np.float64)
        value, grad = reduced(name, tail=tail)(*both, ALL)
        order = rng.permutation(K + 2)
        padded = [np.pad(x, ((0, 0), (0, 0), (0, 2)), constant_values=-np.inf)[..., order] for x in both]
        other_value, other_grad = reduced(name, tail=tail)(*padded, ALL)
    np.testing.assert_allclose(other_value, value, rtol=1e-8, atol=1e-12)
    found = np.asarray(other_grad)[..., np.argsort(order)]
    np.testing.assert_allclose(found[..., :K], grad, rtol=1e-7, atol=1e-12)
    np.testing.assert_array_equal(found[..., K:], 0)


def full_divergence(name, student, teacher):
    """The textbook formula in float64, from float32 log-probs of the whole vocabulary."""
    log_p, log_q = (x.astype(np.float64) for x in (student, teacher))
    p, q = np.exp(log_p), np.exp(log_q)
    if name == "topk_reverse_kl":
        return (p * (log_p - log_q)).sum(-1)
    if name == "topk_forward_kl":
        return (q * (log_q - log_p)).sum(-1)
    log_m = np.logaddexp(np.log(0.3) + log_q, np.log(0.7) + log_p)
    return (0.3 * q * (log_q - log_m) + 0.7 * p * (log_p - log_m)).sum(-1)


@pytest.mark.parametrize("name", sorted(distillation.DISTRIBUTION))
@given(seed=SEEDS, scale=st.sampled_from([0.1, 1.0, 3.0]))
@settings(max_examples=20, deadline=None)
def test_with_its_tail_it_grows_with_k_from_zero_to_the_full_divergence(name, seed, scale):
    with jax.enable_x64(True):
        student, teacher = inputs(np.random.default_rng(seed), name, scale, num_candidates=V, dtype=np.float64)
        full_BT = full_divergence(name, student, teacher)
        last_BT = np.zeros((B, T))
        for k in (1, K, V - 1, V):
            found_BT = np.asarray(objective(name)(student[..., :k], teacher[..., :k], ALL))
            assert found_BT.dtype == np.float64
            # A rest of 1e-8, which these tables have, is known to 1e-8 of itself.
            assert np.all(found_BT >= last_BT - 1e-7) and np.all(found_BT <= full_BT + 1e-7)
            last_BT = found_BT
        np.testing.assert_allclose(last_BT, full_BT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(distillation.DISTRIBUTION))
@given(seed=SEEDS, scale=st.sampled_from([0.1, 1.0, 3.0, 10.0]))
@settings(max_examples=20, deadline=None)
def test_over_the_whole_vocabulary_the_empty_tail_makes_no_noise_in_float32(name, seed, scale):
    student, teacher = inputs(np.random.default_rng(seed), name, scale, num_candidates=V)
    found_BT = objective(name)(student, teacher, ALL)
    np.testing.assert_allclose(found_BT, full_divergence(name, student, teacher), rtol=1e-5, atol=5e-6)
    np.testing.assert_allclose(found_BT, objective(name, tail=False)(student, teacher, ALL), rtol=1e-6, atol=1e-6)
    # The gradients differ only by the derivative of sum p = 1, which the tail omits.
    _, grad = reduced(name)(student, teacher, ALL)
    _, other = reduced(name, tail=False)(student, teacher, ALL)
    constant = np.exp(student) / ALL.size if name == "topk_reverse_kl" else 0
    np.testing.assert_allclose(grad, other - constant, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", sorted(distillation.DISTRIBUTION))
@given(seed=SEEDS, scale=st.sampled_from(SCALES))
@settings(max_examples=20, deadline=None)
def test_with_its_tail_it_is_never_negative_in_float32(name, seed, scale):
    # Rounding of the log-probs (eps * scale) changes the value by the same amount.
    found_BT = objective(name)(*inputs(np.random.default_rng(seed), name, scale), ALL)
    assert np.all(np.asarray(found_BT) >= -1e-5 * max(1, scale / 10))
