"""Each estimator against the exact gradient, by enumerating every sequence of 5 symbols and length 3, in float64.

Dimension key: N = V**T all sequences, T = 3 targets, V = 5 vocabulary, H = 1 + V + V**2 prefixes, K candidates.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.losses import distillation, policy_gradient

V, T = 5, 3
SEQUENCES_NT = np.array(list(itertools.product(range(V), repeat=T)))
# The prefix before target t, as a row of the tables: 0 is the empty one, then 1 + a, then 6 + 5 a + b.
PREFIXES_NT = np.stack(
    [np.zeros(V**T, int), 1 + SEQUENCES_NT[:, 0], 1 + V + V * SEQUENCES_NT[:, 0] + SEQUENCES_NT[:, 1]], axis=1
)
MASK_NT = np.ones((V**T, T), bool)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def tables():
    """Logits [H, V] of a student and a teacher that differ a lot."""
    rng = np.random.default_rng(7)
    return jnp.asarray(rng.normal(size=(1 + V + V * V, V))), jnp.asarray(1.5 * rng.normal(size=(1 + V + V * V, V)))


def full_logprobs(logits_HV):
    return jax.nn.log_softmax(logits_HV)[PREFIXES_NT]


def token_logprobs(logits_HV):
    return jnp.take_along_axis(full_logprobs(logits_HV), jnp.asarray(SEQUENCES_NT)[..., None], axis=2)[..., 0]


def sequence_probabilities(logits_HV):
    return jax.lax.stop_gradient(jnp.exp(token_logprobs(logits_HV).sum(1)))


def exact_sequence_kl(student_HV, teacher_HV):
    logprobs_N, teacher_N = token_logprobs(student_HV).sum(1), token_logprobs(teacher_HV).sum(1)
    return jnp.sum(jnp.exp(logprobs_N) * (logprobs_N - teacher_N))


def myopic_kl(student_HV, teacher_HV):
    """The full KL at each position, the distribution of prefixes held fixed."""
    logprobs_NTV, teacher_NTV = full_logprobs(student_HV), full_logprobs(teacher_HV)
    kl_NT = jnp.sum(jnp.exp(logprobs_NTV) * (logprobs_NTV - teacher_NTV), axis=-1)
    return jnp.sum(sequence_probabilities(student_HV)[:, None] * kl_NT)


def surrogate(student_HV, teacher_HV, discount):
    """What the step computes, in expectation over everything the student could have sampled."""
    logprobs_NT = token_logprobs(student_HV)
    advantages_NT = distillation.sampled_reverse_kl_advantage(
        logprobs_NT, token_logprobs(teacher_HV), jnp.asarray(MASK_NT), discount=discount
    )
    loss_NT = policy_gradient.ppo_clip(logprobs_NT, jax.lax.stop_gradient(logprobs_NT), advantages_NT)
    return jnp.sum(sequence_probabilities(student_HV)[:, None] * loss_NT)


@pytest.mark.parametrize(("discount", "exact"), [(1.0, exact_sequence_kl), (0.0, myopic_kl)])
def test_sampled_reverse_kl_advantage_has_the_exact_gradient(discount, exact):
    student_HV, teacher_HV = tables()
    estimated = jax.grad(surrogate)(student_HV, teacher_HV, discount)
    expected = jax.grad(exact)(student_HV, teacher_HV)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(estimated, expected, atol=1e-14)


def test_the_two_discounts_are_two_different_gradients():
    student_HV, teacher_HV = tables()
    gap = jax.grad(exact_sequence_kl)(student_HV, teacher_HV) - jax.grad(myopic_kl)(student_HV, teacher_HV)
    assert np.abs(gap).max() > 0.05


def test_k1_in_the_loss_trains_nothing_and_the_teacher_drops_out_of_it():
    student_HV, teacher_HV = tables()

    def k1_in_the_loss(student_HV, teacher_HV):
        d_NT = token_logprobs(student_HV) - token_logprobs(teacher_HV)
        return jnp.sum(sequence_probabilities(student_HV)[:, None] * d_NT)

    gradient = jax.grad(k1_in_the_loss)(student_HV, teacher_HV)
    np.testing.assert_allclose(gradient, 0, atol=1e-15)
    np.testing.assert_array_equal(gradient, jax.grad(k1_in_the_loss)(student_HV, teacher_HV[::-1]))


def topk(student_HV, teacher_HV, num_candidates):
    """topk_reverse_kl [N, T] over the student's own top-k."""
    logprobs_NTV = full_logprobs(student_HV)
    _, ids_NTK = jax.lax.top_k(jax.lax.stop_gradient(logprobs_NTV), num_candidates)
    return distillation.topk_reverse_kl(
        jnp.take_along_axis(logprobs_NTV, ids_NTK, axis=-1),
        jnp.take_along_axis(full_logprobs(teacher_HV), ids_NTK, axis=-1),
    )


def test_topk_over_the_whole_vocabulary_is_the_full_kl_and_its_gradient():
    student_HV, teacher_HV = tables()

    def estimated(student_HV):
        return jnp.sum(sequence_probabilities(student_HV)[:, None] * topk(student_HV, teacher_HV, V))

    np.testing.assert_allclose(estimated(student_HV), myopic_kl(student_HV, teacher_HV), rtol=1e-13)
    np.testing.assert_allclose(jax.grad(estimated)(student_HV), jax.grad(myopic_kl)(student_HV, teacher_HV), atol=1e-14)


def test_topk_with_its_tail_is_the_exact_kl_of_the_merged_distributions():
    student_HV, teacher_HV = tables()

    def merged(student_HV, num_candidates):
        """The same from probabilities alone: sort, sum the others, then the textbook KL."""
        p_NTV = jnp.exp(full_logprobs(student_HV))
        order = jnp.argsort(-p_NTV, axis=-1)
        p = jnp.take_along_axis(p_NTV, order, axis=-1)
        q = jnp.take_along_axis(jnp.exp(full_logprobs(teacher_HV)), order, axis=-1)
        p, q = (
            jnp.concatenate([x[..., :num_candidates], x[..., num_candidates:].sum(-1, keepdims=True)], -1)
            for x in (p, q)
        )
        return jnp.sum(p * jnp.log(p / q), axis=-1)

    weight_NT = jnp.asarray(np.random.default_rng(1).random((V**T, T)))
    for k in (1, 2, 3, 4):
        np.testing.assert_allclose(topk(student_HV, teacher_HV, k), merged(student_HV, k), atol=1e-13)
        np.testing.assert_allclose(
            jax.grad(lambda x, k=k: jnp.sum(weight_NT * topk(x, teacher_HV, k)))(student_HV),
            jax.grad(lambda x, k=k: jnp.sum(weight_NT * merged(x, k)))(student_HV),
            atol=1e-12,
        )


def test_topk_lies_between_zero_and_the_full_kl_and_grows_with_k():
    student_HV, teacher_HV = tables()
    logprobs_NTV, teacher_NTV = full_logprobs(student_HV), full_logprobs(teacher_HV)
    full_NT = np.asarray(jnp.sum(jnp.exp(logprobs_NTV) * (logprobs_NTV - teacher_NTV), axis=-1))
    values = [np.zeros_like(full_NT), *(np.asarray(topk(student_HV, teacher_HV, k)) for k in range(1, V)), full_NT]
    for smaller, larger in itertools.pairwise(values):
        assert np.all(smaller <= larger + 1e-14)


def test_topk_is_zero_with_a_zero_gradient_where_student_and_teacher_agree():
    student_HV, _ = tables()
    for k in (1, 3, V):
        value, grad = jax.value_and_grad(lambda x, k=k: topk(x, student_HV, k).sum())(student_HV)
        np.testing.assert_allclose(value, 0, atol=1e-13)
        np.testing.assert_allclose(grad, 0, atol=1e-13)
