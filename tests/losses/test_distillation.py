"""Distillation terms: the return-to-go by a plain loop, AReaL's values, and numbers at the edges by hand."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.losses import distillation, masked, policy_gradient


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
    # Values at unscored targets are not read: NaN there changes nothing.
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


# ---- another implementation ----

FIXTURE = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "areal_losses.json"


def areal(name):
    """(the case, its inputs, its mask); loss and gradient are reduced by token mean."""
    if not FIXTURE.exists():
        pytest.skip(f"AReaL's values are not beside this checkout: {FIXTURE}")
    (case,) = (c for c in json.loads(FIXTURE.read_text())["cases"] if c["name"] == name)
    inputs = {key: jnp.asarray(value, jnp.float32) for key, value in case["inputs"].items()}
    return case, inputs, inputs["mask"] > 0


def test_pure_distillation_by_the_advantage_equals_areals():
    case, inputs, mask = areal("kd_reverse_kl_importance/0")

    def loss(logprobs):
        advantages = distillation.sampled_reverse_kl_advantage(logprobs, inputs["teacher_logprobs"], mask)
        per_token = policy_gradient.ppo_clip(logprobs, inputs["behavior_logprobs"], advantages, clip_low=1e6)
        return masked.masked_mean(per_token, mask)

    value, grad = jax.value_and_grad(loss)(inputs["logprobs"])
    np.testing.assert_allclose(value, case["loss"], atol=1e-5)
    np.testing.assert_allclose(grad, case["grad_logprobs"], atol=1e-5)


def test_areals_joint_loss_is_k1_in_the_loss_whose_gradient_does_not_depend_on_the_teacher():
    case, inputs, mask = areal("kdrl_joint_k1_penalty/0")
    weight = case["params"]["distill_loss_weight"]

    def loss(logprobs):
        policy = policy_gradient.ppo_clip(logprobs, inputs["proximal_logprobs"], inputs["advantages"])
        return masked.masked_mean(policy, mask) + weight * masked.masked_mean(logprobs, mask)

    value, grad = jax.value_and_grad(loss)(inputs["logprobs"])
    np.testing.assert_allclose(grad, case["grad_logprobs"], atol=1e-6)
    np.testing.assert_allclose(
        value - weight * masked.masked_mean(inputs["teacher_logprobs"], mask), case["loss"], atol=1e-6
    )


# ---- by hand ----


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [  # d = log 2: the student gives the token twice the teacher's probability
        ("sampled_reverse_kl", math.log(2) ** 2 / 2, math.log(2)),
        ("straight_through_reverse_kl", math.log(2) - 0.5, math.log(2)),
        ("sampled_forward_kl", math.log(2) - 0.5, 0.5),
    ],
)
def test_a_sampled_token_by_hand(name, value, slope):
    found = jax.value_and_grad(lambda x: getattr(distillation, name)(x, jnp.full((1, 1), math.log(0.25))).sum())(
        jnp.full((1, 1), math.log(0.5))
    )
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    np.testing.assert_allclose(found[1], [[slope]], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "worst", "slope"),  # where the student samples what the teacher rules out, and the reverse
    [
        ("sampled_reverse_kl", (200.0, 200.0), (20.0, -20.0)),
        ("straight_through_reverse_kl", (19.0, np.exp(20) - 21), (20.0, -20.0)),
        ("sampled_forward_kl", (19.0, np.exp(20) - 21), (1.0, 1 - np.exp(20))),
    ],
)
@pytest.mark.parametrize("gap", [25.0, 1e4, np.inf])
def test_a_gap_beyond_20_nats_has_the_gradient_of_20_nats(name, worst, slope, gap):
    student, teacher = jnp.array([[-1.0, -1.0 - min(gap, 1e30)]]), jnp.array([[-1.0 - gap, -1.0]])
    values, pullback = jax.vjp(lambda x: getattr(distillation, name)(x, teacher), student)
    np.testing.assert_allclose(values[0], worst, rtol=1e-5)
    np.testing.assert_allclose(pullback(jnp.ones((1, 2)))[0][0], slope, rtol=1e-5)


HALF, QUARTER = math.log(0.5), math.log(0.25)
INF = math.inf
# The student at (1/2, 1/4, rest 1/4); the teacher rules out the second candidate, or its other tokens.
RULED_OUT = {
    "a candidate": [HALF, -INF],
    "the other tokens": [HALF, HALF],
}


@pytest.mark.parametrize("name", sorted(distillation.DISTRIBUTION))
@pytest.mark.parametrize("what", RULED_OUT)
def test_a_token_that_the_teacher_rules_out_has_a_large_finite_cost(name, what):
    options = {"beta": 0.5} if name == "topk_jsd" else {}
    teacher = jnp.array([[RULED_OUT[what]]])
    value, grad = jax.value_and_grad(lambda x: distillation.DISTRIBUTION[name](x, teacher, **options).sum())(
        jnp.array([[[HALF, QUARTER]]])
    )
    assert np.isfinite(grad).all()
    floor = {"a candidate": -100.0, "the other tokens": math.log(16 * np.finfo(np.float32).eps)}[what]
    rest = 0.5  # of the teacher, where the candidate is ruled out; else of the second candidate
    expected = {
        "topk_reverse_kl": 0.25 * (QUARTER - floor) + 0.25 * math.log(0.25 / rest),
        "topk_forward_kl": rest * math.log(rest / 0.25),
        "topk_jsd": 0.5 * (rest * math.log(rest / 0.375) + 0.25 * math.log(0.25 / 0.375) + 0.25 * math.log(2)),
    }[name]
    # The floor keeps a mass of 16 eps, whose log is -13: up to 3e-5 that `expected` leaves out.
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=16 * np.finfo(np.float32).eps * 20)


@pytest.mark.parametrize("name", sorted(distillation.DISTRIBUTION))
def test_a_token_that_the_student_rules_out_costs_according_to_the_teachers_mass(name):
    options = {"beta": 0.5} if name == "topk_jsd" else {}
    value, grad = jax.value_and_grad(
        lambda x: distillation.DISTRIBUTION[name](x, jnp.array([[[HALF, QUARTER]]]), **options).sum()
    )(jnp.array([[[HALF, -INF]]]))
    assert np.isfinite(grad).all()
    expected = {
        "topk_reverse_kl": 0.5 * math.log(2),  # the rest: 1/2 to 1/4
        "topk_forward_kl": 0.25 * (QUARTER + 100) + 0.25 * math.log(0.5),
        "topk_jsd": 0.5 * (0.25 * math.log(2) + 0.25 * math.log(0.25 / 0.375) + 0.5 * math.log(0.5 / 0.375)),
    }[name]
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_a_student_that_is_too_sure_for_float32_is_still_pulled_towards_the_other_tokens():
    # All of the student's mass is on the candidate (rest 1e-9, 0 in float32), but only two thirds of the teacher's.
    teacher = jnp.log(jnp.array([[[2 / 3]]]))
    for name in ("topk_reverse_kl", "topk_forward_kl"):
        grad = jax.grad(lambda x, name=name: distillation.DISTRIBUTION[name](x, teacher).sum())(jnp.zeros((1, 1, 1)))
        assert grad[0, 0, 0] > 10  # the candidate's log-prob should fall


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5])
def test_a_beta_at_which_the_jsd_is_zero_is_refused(beta):
    with pytest.raises(ValueError, match=r"strictly between 0 and 1, got .*topk_forward_kl .*topk_reverse_kl"):
        distillation.topk_jsd(jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1)), beta=beta)
