"""Names resolve to the right objective, and every reason for a refusal is true: exact expectations at one position.

Dimension key: V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.losses import distillation, estimators
from tests.close import assert_close

# ---- names ----


@pytest.mark.parametrize(
    ("estimator", "placement", "name"),
    [
        ("k1", "advantage", "sampled_reverse_kl_advantage"),
        ("k1", None, "sampled_reverse_kl_advantage"),
        ("kl", "advantage", "sampled_reverse_kl_advantage"),
        ("sampled_reverse_kl", None, "sampled_reverse_kl_advantage"),
        ("sampled_reverse_kl", "advantage", "sampled_reverse_kl_advantage"),
        ("sampled_reverse_kl", "loss", "sampled_reverse_kl"),
        ("reverse_kl", "loss", "sampled_reverse_kl"),
        ("k2", "loss", "sampled_reverse_kl"),
        ("k2", None, "sampled_reverse_kl"),
        ("mse", "loss", "sampled_reverse_kl"),
        ("k1+", "loss", "straight_through_reverse_kl"),
        ("k3+", "loss", "straight_through_reverse_kl"),
        ("low_var_kl+", None, "straight_through_reverse_kl"),
        ("Straight-Through-Reverse-KL", None, "straight_through_reverse_kl"),
        ("sampled_forward_kl", "loss", "sampled_forward_kl"),
        ("forward_kl", "loss", "sampled_forward_kl"),
        ("topk_reverse_kl", None, "topk_reverse_kl"),
        ("forward_kl_topk", "loss", "topk_forward_kl"),
        ("gkd", None, "topk_jsd"),
    ],
)
def test_a_name_resolves_to_the_objective_that_does_what_it_says(estimator, placement, name):
    assert estimators.resolve(estimator, placement) == name


@pytest.mark.parametrize(
    ("estimator", "placement", "reason", "instead"),
    [
        ("k1", "loss", "teacher drops out", "sampled_reverse_kl_advantage"),
        ("kl", "loss", "teacher drops out", "sampled_reverse_kl "),
        ("sampled_reverse_kl_advantage", "loss", "teacher drops out", "straight_through_reverse_kl"),
        ("k2", "advantage", "k2 .* pushed down", "sampled_reverse_kl_advantage"),
        ("mse", "advantage", "pushed down", "sampled_reverse_kl_advantage"),
        ("k3", "loss", "gradient is the forward KL's", "sampled_forward_kl"),
        ("low_var_kl", "loss", "gradient is the forward KL's", "straight_through_reverse_kl"),
        ("Low-Var-KL", None, "gradient is the forward KL's", "sampled_reverse_kl"),
        ("k3", "advantage", "vanishes", "sampled_reverse_kl_advantage"),
        ("forward_kl", "advantage", "vanishes", "loss"),
        ("straight_through_reverse_kl", "advantage", "k3", "loss"),
        ("abs", "loss", "abs.* total variation.* not that of a KL", "sampled_reverse_kl"),
        ("abs", "advantage", "abs.* pushed down", "sampled_reverse_kl_advantage"),
        ("abs", None, "abs", "sampled_reverse_kl"),
        ("top1_renormalized", "loss", "always zero", "topk_reverse_kl"),
        ("top1_renormalized", "advantage", "always zero", "topk_reverse_kl"),
        ("topk_renormalized", None, "blind to the mass outside", "topk_forward_kl"),
        ("topk_without_tail", None, "mass outside the candidates is free", "tail=False"),
        ("topk_jsd", "advantage", "whichever token was sampled", "loss"),
    ],
)
def test_a_wrong_pair_is_refused_with_the_reason_and_the_right_choice(estimator, placement, reason, instead):
    with pytest.raises(ValueError, match=reason) as error:
        estimators.resolve(estimator, placement)
    assert instead in str(error.value) and estimator in str(error.value)


def test_every_alias_resolves_in_some_placement_or_is_refused_with_a_reason_in_both():
    nowhere = set()
    for alias in estimators.ALIASES:
        found = []
        for placement in ("advantage", "loss"):
            try:
                name = estimators.resolve(alias, placement)
            except ValueError as e:
                # The message names a right choice.
                assert any(right in str(e) for right in (*estimators.OBJECTIVES, "loss"))
                assert "is refused" in str(e)
            else:
                assert estimators.OBJECTIVES[name].placement == placement
                found.append(name)
        if not found:
            nowhere.add(alias)
    assert nowhere == {"abs", "k3", "low_var_kl", "topk_renormalized", "top1_renormalized", "topk_without_tail"}


def test_every_objective_is_found_by_its_own_name():
    for name, objective in estimators.OBJECTIVES.items():
        assert objective.name == name and objective.function is getattr(distillation, name)
        assert estimators.resolve(name, objective.placement) == name
        assert (objective.needs_candidates is not None) == (name in distillation.DISTRIBUTION)
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.placement = "advantage"


def test_adding_an_objective_is_one_line(monkeypatch):
    def skewed_kl(logprobs, teacher_logprobs):
        return logprobs

    monkeypatch.setitem(estimators.OBJECTIVES, "skewed_kl", estimators.Objective("skewed_kl", "loss", None, skewed_kl))
    assert estimators.resolve("skewed_kl") == estimators.resolve("skewed_kl", "loss") == "skewed_kl"
    with pytest.raises(ValueError, match="right only with placement: loss"):
        estimators.resolve("skewed_kl", "advantage")


def test_an_unknown_name_or_placement_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"unknown estimator topk_revers_kl .*did you mean topk_reverse_kl.*topk_jsd"):
        estimators.resolve("topk_revers_kl")
    with pytest.raises(ValueError, match='"advantage" or "loss", got "reward"'):
        estimators.resolve("k1", "reward")


# ---- the reasons ----


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


# The terms are of size 1; some results are differences that should be 0.
ROUNDING = {"factor": 50, "scale": 1, "dtype": "float64"}
LOGITS_V, TEACHER_LOGITS_V = np.random.default_rng(3).normal(size=(2, 5)) * [[1.0], [1.5]]


def in_the_loss(estimator, logits_V, teacher_logits_V):
    """Expected gradient [V] with respect to the logits: the estimator is differentiated at the student's tokens."""

    def expected(logits_V):
        log_p = jax.nn.log_softmax(logits_V)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(log_p)) * estimator(log_p - jax.nn.log_softmax(teacher_logits_V)))

    return jax.grad(expected)(jnp.asarray(logits_V))


def as_advantage(estimator, logits_V, teacher_logits_V):
    """Expected policy gradient [V] with respect to the logits: the estimator is the cost of a token."""

    def expected(logits_V):
        log_p = jax.nn.log_softmax(logits_V)
        cost = jax.lax.stop_gradient(estimator(log_p - jax.nn.log_softmax(teacher_logits_V)))
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(log_p)) * cost * log_p)

    return jax.grad(expected)(jnp.asarray(logits_V))


def reverse_kl(logits_V, teacher_logits_V):
    log_p, log_q = jax.nn.log_softmax(logits_V), jax.nn.log_softmax(teacher_logits_V)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))


def forward_kl(logits_V, teacher_logits_V):
    return reverse_kl(teacher_logits_V, logits_V)


def k1(d):
    return d


def k2(d):
    return d**2 / 2


def k3(d):
    return jnp.expm1(-d) + d


def test_k1_is_right_as_an_advantage_and_trains_nothing_in_the_loss(float64):
    exact = jax.grad(reverse_kl)(LOGITS_V, TEACHER_LOGITS_V)
    assert np.abs(exact).max() > 0.05
    assert_close(as_advantage(k1, LOGITS_V, TEACHER_LOGITS_V), exact, **ROUNDING)
    assert_close(in_the_loss(k1, LOGITS_V, TEACHER_LOGITS_V), 0, **ROUNDING)
    # The teacher drops out for every single token, not only on average.
    one = jax.grad(lambda x: k1(jax.nn.log_softmax(x) - jax.nn.log_softmax(TEACHER_LOGITS_V))[0])(LOGITS_V)
    other = jax.grad(lambda x: k1(jax.nn.log_softmax(x) - jax.nn.log_softmax(-TEACHER_LOGITS_V))[0])(LOGITS_V)
    np.testing.assert_array_equal(one, other)


def test_k2_is_right_in_the_loss(float64):
    exact = jax.grad(reverse_kl)(LOGITS_V, TEACHER_LOGITS_V)
    assert_close(in_the_loss(k2, LOGITS_V, TEACHER_LOGITS_V), exact, **ROUNDING)


@pytest.mark.parametrize("estimator", [k2, jnp.abs])
def test_an_even_estimator_as_an_advantage_pushes_down_what_the_teacher_likes_better(float64, estimator):
    student, teacher = jnp.zeros(5), jnp.log(jnp.array([0.6, 0.1, 0.1, 0.1, 0.1]))
    found, exact = as_advantage(estimator, student, teacher), jax.grad(reverse_kl)(student, teacher)
    assert found[0] > 0.05 > -0.05 > exact[0]  # gradients of a loss: a step goes in the opposite direction
    # A descent step moves the student away from the teacher.
    assert reverse_kl(student - 0.1 * found, teacher) > reverse_kl(student, teacher) + 1e-3
    assert reverse_kl(student - 0.1 * exact, teacher) < reverse_kl(student, teacher) - 1e-3


def test_k3_in_the_loss_has_the_gradient_of_the_forward_kl(float64):
    found = in_the_loss(k3, LOGITS_V, TEACHER_LOGITS_V)
    assert_close(found, jax.grad(forward_kl)(LOGITS_V, TEACHER_LOGITS_V), **ROUNDING)
    assert np.abs(found - jax.grad(reverse_kl)(LOGITS_V, TEACHER_LOGITS_V)).max() > 0.05


def test_k3_as_an_advantage_has_the_gradient_of_a_difference_of_two_kls_which_vanishes_near_the_teacher(float64):
    def difference(logits_V, teacher_V):
        return reverse_kl(logits_V, teacher_V) - forward_kl(logits_V, teacher_V)

    found = as_advantage(k3, LOGITS_V, TEACHER_LOGITS_V)
    assert_close(found, jax.grad(difference)(LOGITS_V, TEACHER_LOGITS_V), **ROUNDING)
    shares = []
    for distance in (1e-2, 1e-3):
        near = TEACHER_LOGITS_V + distance * LOGITS_V
        exact = jax.grad(reverse_kl)(near, TEACHER_LOGITS_V)
        shares.append(float(jnp.linalg.norm(as_advantage(k3, near, TEACHER_LOGITS_V)) / jnp.linalg.norm(exact)))
    assert shares[0] < 0.02
    np.testing.assert_allclose(shares[1] / shares[0], 0.1, rtol=0.1)  # proportional to the distance


def test_the_value_of_the_straight_through_estimator_is_k3(float64):
    d = jnp.asarray(LOGITS_V)[None]
    np.testing.assert_allclose(distillation.straight_through_reverse_kl(d, 0 * d), k3(d), rtol=1e-12)


def test_abs_in_the_loss_has_the_gradient_of_twice_the_total_variation(float64):
    def sum_abs(logits_V):
        return jnp.sum(jnp.abs(jax.nn.softmax(logits_V) - jax.nn.softmax(TEACHER_LOGITS_V)))

    found = in_the_loss(jnp.abs, LOGITS_V, TEACHER_LOGITS_V)
    assert_close(found, jax.grad(sum_abs)(LOGITS_V), **ROUNDING)
    for divergence in (reverse_kl, forward_kl):
        assert np.abs(found - jax.grad(divergence)(LOGITS_V, TEACHER_LOGITS_V)).max() > 0.05


@pytest.mark.parametrize("name", sorted(distillation.DISTRIBUTION))
def test_a_divergence_of_the_whole_position_as_an_advantage_has_no_expected_gradient(float64, name):
    options = {"beta": 0.5} if name == "topk_jsd" else {}

    def cost(d):  # equal for every token; computed from the tables, not from d
        both = (jax.nn.log_softmax(x)[None, None, :3] for x in (LOGITS_V, TEACHER_LOGITS_V))
        return jnp.full_like(d, distillation.DISTRIBUTION[name](*both, **options)[0, 0])

    assert cost(jnp.zeros(1))[0] > 0.05
    assert_close(as_advantage(cost, LOGITS_V, TEACHER_LOGITS_V), 0, **ROUNDING)


def test_renormalised_top_1_is_zero_and_renormalised_top_k_is_blind_to_the_rest(float64):
    def renormalised(logits_V, teacher_V, k):
        return reverse_kl(logits_V[:k], teacher_V[:k])  # a softmax over the candidates alone

    value, grad = jax.value_and_grad(renormalised)(LOGITS_V, TEACHER_LOGITS_V, 1)
    assert_close([value, *grad], 0, **ROUNDING)
    # The student has mass 0.001 on the candidates, the teacher 0.999, and yet value and gradient are zero.
    student, teacher = jnp.log(jnp.array([0.0006, 0.0004, 0.999])), jnp.log(jnp.array([0.5994, 0.3996, 0.001]))
    value, grad = jax.value_and_grad(renormalised)(student, teacher, 2)
    assert_close([value, *grad], 0, **ROUNDING)
    assert distillation.topk_reverse_kl(student[None, None, :2], teacher[None, None, :2])[0, 0] > 5
