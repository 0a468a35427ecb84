"""Compares estimators with exact gradients by enumerating all sequences of 5 symbols and length 3, in float64.

Dimension key: N = V**T all sequences, T = 3 targets, V = 5 vocabulary, H = 1 + V + V**2 prefixes, K candidates.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.losses import distillation, policy_gradient
from tests.close import assert_close

V, T = 5, 3
SEQUENCES_NT = np.array(list(itertools.product(range(V), repeat=T)))
# Row of the prefix before target t in the tables: 0 for the empty prefix, then 1 + a, then 6 + 5 a + b.
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
    return rng.normal(size=(1 + V + V * V, V)), 1.5 * rng.normal(size=(1 + V + V * V, V))


def sampler_table():
    """Logits [H, V] of a sampling policy that differs from the student."""
    return np.random.default_rng(8).normal(size=(1 + V + V * V, V))


def full_logprobs(logits_HV):
    return jax.nn.log_softmax(logits_HV)[PREFIXES_NT]


def token_logprobs(logits_HV):
    return jnp.take_along_axis(full_logprobs(logits_HV), jnp.asarray(SEQUENCES_NT)[..., None], axis=2)[..., 0]


def sequence_probabilities(logits_HV):
    return jax.lax.stop_gradient(jnp.exp(token_logprobs(logits_HV).sum(1)))


def kl(p, q):
    """The textbook sum over probabilities."""
    return jnp.sum(p * jnp.log(p / q), axis=-1)


def jsd(p, q, beta):
    m = beta * q + (1 - beta) * p
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


BETA = 0.3
# name -> (our function of K candidates, textbook formula of the probabilities p, q of student and teacher)
DIVERGENCES = {
    "topk_reverse_kl": (distillation.topk_reverse_kl, kl),
    "topk_forward_kl": (distillation.topk_forward_kl, lambda p, q: kl(q, p)),
    "topk_jsd": (functools.partial(distillation.topk_jsd, beta=BETA), lambda p, q: jsd(p, q, BETA)),
}


def myopic(name, student_HV, teacher_HV, sampler_HV=None):
    """Sum of full divergences over positions, with the distribution of prefixes (student's or sampler's) held fixed."""
    weight_N = sequence_probabilities(student_HV if sampler_HV is None else sampler_HV)
    return jnp.sum(weight_N[:, None] * DIVERGENCES[name][1](*probabilities(student_HV, teacher_HV)))


def probabilities(*tables_HV):
    return tuple(jnp.exp(full_logprobs(x)) for x in tables_HV)


def exact_sequence_kl(student_HV, teacher_HV):
    logprobs_N, teacher_N = token_logprobs(student_HV).sum(1), token_logprobs(teacher_HV).sum(1)
    return jnp.sum(jnp.exp(logprobs_N) * (logprobs_N - teacher_N))


# ---- the sampled token ----


def as_advantage(student_HV, teacher_HV, *, discount=0.0, sampler_HV=None):
    """Loss [N, T] of the step: PPO's surrogate, whose clip is never active here."""
    logprobs_NT = token_logprobs(student_HV)
    advantages_NT = distillation.sampled_reverse_kl_advantage(
        logprobs_NT, token_logprobs(teacher_HV), jnp.asarray(MASK_NT), discount=discount
    )
    proximal_NT = jax.lax.stop_gradient(logprobs_NT) if sampler_HV is None else token_logprobs(sampler_HV)
    return policy_gradient.ppo_clip(logprobs_NT, proximal_NT, advantages_NT, clip_low=1e6)


def in_the_loss(function):
    def loss(student_HV, teacher_HV, *, sampler_HV=None):
        logprobs_NT = token_logprobs(student_HV)
        loss_NT = function(logprobs_NT, token_logprobs(teacher_HV))
        if sampler_HV is None:
            return loss_NT
        return jax.lax.stop_gradient(jnp.exp(logprobs_NT - token_logprobs(sampler_HV))) * loss_NT

    return loss


# name -> (loss [N, T] of the sampled tokens, divergence whose gradient it has)
SAMPLED = {
    "sampled_reverse_kl_advantage": (as_advantage, "topk_reverse_kl"),
    "sampled_reverse_kl": (in_the_loss(distillation.sampled_reverse_kl), "topk_reverse_kl"),
    "straight_through_reverse_kl": (in_the_loss(distillation.straight_through_reverse_kl), "topk_reverse_kl"),
    "sampled_forward_kl": (in_the_loss(distillation.sampled_forward_kl), "topk_forward_kl"),
}


def expected_gradient(loss, student_HV, weight_N):
    """Expected gradient of a loss [N, T] over all sequences."""
    return jax.grad(lambda x: jnp.sum(weight_N[:, None] * loss(x)))(student_HV)


def gradient(function, student_HV, *args):
    return jax.grad(lambda x: function(x, *args))(student_HV)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_sampled_estimator_has_on_policy_the_exact_gradient_of_its_divergence(name):
    student_HV, teacher_HV = tables()
    loss, divergence = SAMPLED[name]
    estimated = expected_gradient(lambda x: loss(x, teacher_HV), student_HV, sequence_probabilities(student_HV))
    expected = gradient(lambda x: myopic(divergence, x, teacher_HV), student_HV)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(estimated, expected, atol=1e-13)


@pytest.mark.parametrize("name", SAMPLED)
def test_off_policy_the_tokens_ratio_gives_the_gradient_at_the_samplers_prefixes(name):
    student_HV, teacher_HV = tables()
    sampler_HV = sampler_table()
    loss, divergence = SAMPLED[name]
    weight_N = sequence_probabilities(sampler_HV)
    estimated = expected_gradient(lambda x: loss(x, teacher_HV, sampler_HV=sampler_HV), student_HV, weight_N)
    expected = gradient(lambda x: myopic(divergence, x, teacher_HV, sampler_HV), student_HV)
    np.testing.assert_allclose(estimated, expected, atol=1e-13)
    # Without the ratio the gradient differs, so the weight has an effect.
    without = expected_gradient(lambda x: loss(x, teacher_HV), student_HV, weight_N)
    assert np.abs(without - expected).max() > 0.05


@pytest.mark.parametrize("name", SAMPLED)
def test_off_policy_the_prefixes_ratio_too_gives_the_gradient_at_the_students_own_prefixes(name):
    student_HV, teacher_HV = tables()
    sampler_HV = sampler_table()
    loss, divergence = SAMPLED[name]
    gap_NT = token_logprobs(student_HV) - token_logprobs(sampler_HV)
    before_NT = jnp.exp(jnp.cumsum(gap_NT, axis=1) - gap_NT)  # ratio of the tokens before target t
    estimated = expected_gradient(
        lambda x: before_NT * loss(x, teacher_HV, sampler_HV=sampler_HV), student_HV, sequence_probabilities(sampler_HV)
    )
    expected = gradient(lambda x: myopic(divergence, x, teacher_HV), student_HV)
    np.testing.assert_allclose(estimated, expected, atol=1e-13)


def test_the_return_to_go_has_the_exact_gradient_of_the_sequences_reverse_kl():
    student_HV, teacher_HV = tables()
    expected = gradient(exact_sequence_kl, student_HV, teacher_HV)
    on_policy_N = sequence_probabilities(student_HV)
    estimated = expected_gradient(lambda x: as_advantage(x, teacher_HV, discount=1.0), student_HV, on_policy_N)
    np.testing.assert_allclose(estimated, expected, atol=1e-13)
    # Off-policy, weighted by the whole sequence's ratio.
    sampler_N = sequence_probabilities(sampler_table())
    ratio_N = jnp.exp((token_logprobs(student_HV) - token_logprobs(sampler_table())).sum(1))
    weighted = expected_gradient(
        lambda x: ratio_N[:, None] * as_advantage(x, teacher_HV, discount=1.0), student_HV, sampler_N
    )
    np.testing.assert_allclose(weighted, expected, atol=1e-13)


def test_the_two_discounts_are_two_different_gradients():
    student_HV, teacher_HV = tables()
    myopic_gradient = gradient(lambda x: myopic("topk_reverse_kl", x, teacher_HV), student_HV)
    assert np.abs(gradient(exact_sequence_kl, student_HV, teacher_HV) - myopic_gradient).max() > 0.05


@pytest.mark.parametrize("name", ["straight_through_reverse_kl", "sampled_forward_kl"])
def test_the_value_of_k3_is_on_average_the_reverse_kl(name):
    student_HV, teacher_HV = tables()
    loss_NT = SAMPLED[name][0](student_HV, teacher_HV)
    value = jnp.sum(sequence_probabilities(student_HV)[:, None] * loss_NT)
    np.testing.assert_allclose(value, myopic("topk_reverse_kl", student_HV, teacher_HV), rtol=1e-13)


def test_the_value_of_k2_is_off_by_a_sixth_of_the_third_moment():
    student_HV, other_HV = tables()
    weight_NT = sequence_probabilities(student_HV)[:, None]
    relative = []
    for size in (0.02, 0.01):
        teacher_HV = student_HV + size * other_HV
        d_NT = token_logprobs(student_HV) - token_logprobs(teacher_HV)
        value = jnp.sum(weight_NT * SAMPLED["sampled_reverse_kl"][0](student_HV, teacher_HV))
        bias = value - myopic("topk_reverse_kl", student_HV, teacher_HV)
        third = jnp.sum(weight_NT * d_NT**3) / 6
        relative.append(float(abs(bias / third - 1)))
    # The remaining error is of the next order: it halves with the distance.
    assert relative[0] < 0.3 and 0.4 < relative[1] / relative[0] < 0.6


def one_position(logits_V):
    """log p [V, 1] of every token, for expectations over one position."""
    return jax.nn.log_softmax(logits_V)[:, None]


@pytest.mark.parametrize("name", ["sampled_reverse_kl", "straight_through_reverse_kl", "sampled_forward_kl"])
def test_beyond_20_nats_the_gradient_is_that_of_20_nats(name):
    # Token 0 has half of the student's mass and is 30 nats less likely under the teacher; token 1 is 25 nats more
    # likely under the teacher.
    log_p_V1 = jnp.array([jnp.log(0.5), -26.0, jnp.log(0.5)])[:, None]
    log_q_V1 = jnp.array([jnp.log(0.5) - 30, -1.0, jnp.log(0.3)])[:, None]
    slope_V1 = jax.grad(lambda x: getattr(distillation, name)(x, log_q_V1).sum())(log_p_V1)
    d_V = (log_p_V1 - log_q_V1)[:, 0]
    exact_V = -jnp.expm1(-d_V) if name == "sampled_forward_kl" else d_V
    held_V = 1 - jnp.exp(jnp.array([-20.0, 20.0])) if name == "sampled_forward_kl" else jnp.array([20.0, -20.0])
    np.testing.assert_allclose(slope_V1[2, 0], exact_V[2], rtol=1e-12)
    np.testing.assert_allclose(slope_V1[:2, 0], held_V, rtol=1e-12)
    # The bias stated in the docstring, as the gradient on log p of each token, weighted by p.
    p_V = jnp.exp(log_p_V1[:, 0])
    bias_V = np.asarray(p_V * (slope_V1[:, 0] - exact_V))
    if name == "sampled_forward_kl":
        q_V = jnp.exp(log_q_V1[:, 0])
        np.testing.assert_allclose(bias_V, [0, q_V[1] - jnp.exp(20) * p_V[1], 0], rtol=1e-6, atol=1e-8)
    else:
        np.testing.assert_allclose(bias_V, [-5.0, 5 * p_V[1], 0], rtol=1e-9, atol=1e-12)


# ---- distributions ----


def order(whose):
    """Ids [N, T, V] of a table's tokens, most likely first."""
    return np.argsort(-tables()[whose == "teacher"], axis=-1)[PREFIXES_NT]


def candidates(student_HV, teacher_HV, num_candidates, whose="student"):
    """Log-probs [N, T, K] of student and teacher at the top-k of one of them."""
    ids_NTK = order(whose)[..., :num_candidates]
    return [jnp.take_along_axis(full_logprobs(x), ids_NTK, axis=-1) for x in (student_HV, teacher_HV)]


def merged(student_HV, teacher_HV, num_candidates, whose="student"):
    """Probabilities [N, T, K + 1] of both at the same candidates and, summed, at the rest."""
    ordered = [jnp.take_along_axis(x, order(whose), axis=-1) for x in probabilities(student_HV, teacher_HV)]
    K = num_candidates
    return [jnp.concatenate([x[..., :K], x[..., K:].sum(-1, keepdims=True)], -1) for x in ordered]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("tail", [True, False])
def test_over_the_whole_vocabulary_it_is_the_full_divergence_and_its_gradient(name, tail):
    student_HV, teacher_HV = tables()
    ours, _ = DIVERGENCES[name]

    def estimated(student_HV):
        weight_N = sequence_probabilities(student_HV)
        return jnp.sum(weight_N[:, None] * ours(*candidates(student_HV, teacher_HV, V), tail=tail))

    expected = functools.partial(myopic, name, teacher_HV=teacher_HV)
    np.testing.assert_allclose(estimated(student_HV), expected(student_HV), rtol=1e-13)
    np.testing.assert_allclose(gradient(estimated, student_HV), gradient(expected, student_HV), atol=1e-13)


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_with_its_tail_it_is_the_textbook_divergence_of_the_merged_distributions(name, whose):
    student_HV, teacher_HV = tables()
    ours, textbook = DIVERGENCES[name]
    weight_NT = jnp.asarray(np.random.default_rng(1).random((V**T, T)))
    for k in (1, 3):
        one, other = (
            jax.value_and_grad(lambda x, f=f, k=k: jnp.sum(weight_NT * f(x, k)))(student_HV)
            for f in (
                lambda x, k: ours(*candidates(x, teacher_HV, k, whose)),
                lambda x, k: textbook(*merged(x, teacher_HV, k, whose)),
            )
        )
        np.testing.assert_allclose(one[0], other[0], rtol=1e-13)
        np.testing.assert_allclose(one[1], other[1], atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_it_lies_between_zero_and_the_full_divergence_and_grows_with_k(name):
    student_HV, teacher_HV = tables()
    ours, textbook = DIVERGENCES[name]
    full_NT = np.asarray(textbook(*probabilities(student_HV, teacher_HV)))
    values = [np.asarray(ours(*candidates(student_HV, teacher_HV, k))) for k in range(1, V)]
    for smaller, larger in itertools.pairwise([np.zeros_like(full_NT), *values, full_NT]):
        assert np.all(smaller <= larger + 1e-14)
    assert np.mean(values[0] < 0.9 * full_NT) > 0.3  # and K has an effect


@pytest.mark.parametrize("name", DIVERGENCES)
def test_what_the_bucket_hides_is_the_divergence_within_it(name):
    student_HV, teacher_HV = tables()
    ours, textbook = DIVERGENCES[name]
    p_NTV, q_NTV = probabilities(student_HV, teacher_HV)
    ids = order("student")[..., 2:]
    p, q = (jnp.take_along_axis(x, ids, axis=-1) for x in (p_NTV, q_NTV))
    p_rest, q_rest = p.sum(-1, keepdims=True), q.sum(-1, keepdims=True)
    within_p, within_q = p / p_rest, q / q_rest
    if name == "topk_jsd":
        mixed = BETA * q + (1 - BETA) * p
        mixed /= mixed.sum(-1, keepdims=True)
        hidden = BETA * q_rest[..., 0] * kl(within_q, mixed) + (1 - BETA) * p_rest[..., 0] * kl(within_p, mixed)
    else:
        hidden = (q_rest if name == "topk_forward_kl" else p_rest)[..., 0] * textbook(within_p, within_q)
    full = textbook(p_NTV, q_NTV)
    np.testing.assert_allclose(full - ours(*candidates(student_HV, teacher_HV, 2)), hidden, atol=1e-13)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("tail", [True, False])
def test_it_is_zero_where_student_and_teacher_agree_and_with_its_tail_so_is_its_gradient(name, tail):
    student_HV, _ = tables()
    ours, _ = DIVERGENCES[name]
    rounding = {"factor": 5000, "scale": 1, "dtype": "float64"}  # what is left of 1 for the rest loses digits
    for k in (1, 3, V):
        loss = jax.value_and_grad(lambda x, k=k: ours(*candidates(x, student_HV, k), tail=tail).sum())
        value, grad = loss(student_HV)
        assert_close(value, 0, **rounding)
        if tail or k == V or name == "topk_jsd":
            assert_close(grad, 0, **rounding)
        else:  # a sum over some tokens has a gradient even where student and teacher agree
            assert np.abs(grad).max() > 0.01


def test_the_limits_of_the_jsd_are_the_forward_and_the_reverse_kl():
    student_HV, teacher_HV = tables()
    both = candidates(student_HV, teacher_HV, 3)
    small = distillation.topk_jsd(*both, beta=1e-7) / 1e-7
    np.testing.assert_allclose(small, distillation.topk_forward_kl(*both), rtol=1e-4, atol=1e-6)
    large = distillation.topk_jsd(*both, beta=1 - 1e-7) / 1e-7
    np.testing.assert_allclose(large, distillation.topk_reverse_kl(*both), rtol=1e-4, atol=1e-6)
    swapped = distillation.topk_jsd(*both[::-1], beta=0.5)
    np.testing.assert_allclose(distillation.topk_jsd(*both, beta=0.5), swapped, rtol=1e-12)


def test_without_the_tail_the_student_gains_by_moving_mass_out_of_the_candidates():
    log_q_K = jnp.log(jnp.array([0.5, 0.3]))
    # The minimum of sum p log(p / q) is -sum q / e at p = q / e: 0.71 of the mass has moved out of the candidates.
    value, grad = jax.value_and_grad(
        lambda x: distillation.topk_reverse_kl(x[None, None], log_q_K[None, None], tail=False)[0, 0]
    )(log_q_K - 1)
    np.testing.assert_allclose(value, -0.8 / np.e, rtol=1e-13)
    np.testing.assert_allclose(grad, 0, atol=1e-13)
    assert (
        distillation.topk_reverse_kl((log_q_K - 1)[None, None], log_q_K[None, None])[0, 0] > 0.5
    )  # with the tail it costs


def test_without_the_tail_the_forward_kl_teaches_that_nothing_happens_outside_the_candidates():
    log_q_V = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    log_renormalized_V = jnp.log(jnp.array([0.625, 0.375, 1e-12, 1e-12]))

    def lost(logits_V, tail):
        both = (jax.nn.log_softmax(logits_V)[None, None, :2], log_q_V[None, None, :2])
        return distillation.topk_forward_kl(*both, tail=tail)[0, 0]

    value, grad = jax.value_and_grad(lost)(log_renormalized_V, False)
    np.testing.assert_allclose(
        value, 0.8 * np.log(0.8), rtol=1e-9
    )  # negative, and lower than where student and teacher agree
    np.testing.assert_allclose(grad, 0, atol=1e-11)
    assert np.abs(jax.grad(lost)(log_renormalized_V, True)).max() > 0.05
    np.testing.assert_allclose(jax.grad(lost)(log_q_V, True), 0, atol=1e-13)


def test_the_jsd_without_its_tail_is_blind_to_how_the_rest_differs():
    log_p, log_q = (jnp.log(jnp.array(x))[None, None] for x in ([0.5, 0.3, 0.2, 1e-9], [0.5, 0.3, 1e-9, 0.2]))
    assert distillation.topk_jsd(log_p, log_q, beta=0.5)[0, 0] > 0.1
    blind = distillation.topk_jsd(log_p[..., :2], log_q[..., :2], beta=0.5, tail=False)
    assert_close(blind, 0, factor=50, scale=1, dtype="float64")
