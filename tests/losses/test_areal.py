"""Policy losses and behaviour weights against AReaL's own functions: values and gradients on random inputs."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill.losses import masked, off_policy, policy_gradient

FIXTURE = pathlib.Path(__file__).parents[3] / "shared" / "fixtures" / "areal_losses.json"


@functools.cache
def cases():
    if not FIXTURE.exists():
        pytest.skip(f"AReaL's values are not beside this checkout: {FIXTURE}")
    return {case["name"]: case for case in json.loads(FIXTURE.read_text())["cases"]}


def close(loss, inputs, case):
    value, grad = jax.value_and_grad(loss)(inputs["logprobs"])
    np.testing.assert_allclose(value, case["loss"], atol=1e-5)
    np.testing.assert_allclose(grad, case["grad_logprobs"], atol=1e-5)
    assert np.abs(case["grad_logprobs"]).max() > 1e-2


def load(name):
    case = cases()[name]
    inputs = {key: jnp.asarray(value, jnp.float32) for key, value in case["inputs"].items()}
    return case, inputs, inputs["mask"] > 0


POLICY_CASES = {
    # case -> (policy, our names of its params)
    "ppo_token/0": ("ppo_clip", {}),
    "ppo_clip_higher/0": ("ppo_clip", {}),
    "ppo_dual_clip/0": ("ppo_clip", {}),
    "gspo_sequence/0": ("gspo", {"level": None}),
    "cispo/0": ("cispo", {}),
    "sapo/0": ("sapo", {"tau_pos": "tau_positive", "tau_neg": "tau_negative"}),
}


@pytest.mark.parametrize("name", POLICY_CASES)
def test_a_policy_equals_areals(name):
    case, inputs, mask = load(name)
    policy, names = POLICY_CASES[name]
    options = {names.get(key, key): value for key, value in case["params"].items()}
    options.pop(None, None)
    advantages = inputs["advantages"]
    if policy == "gspo":  # one advantage per sequence: the mean of the per-token advantages
        advantages = jnp.where(mask, advantages, 0).sum(1, keepdims=True) / mask.sum(1, keepdims=True)
        advantages = jnp.broadcast_to(advantages, mask.shape)

    def loss(logprobs):
        per_token = policy_gradient.POLICIES[policy].function(
            logprobs, inputs["proximal_logprobs"], advantages, mask, **options
        )
        return masked.masked_mean(per_token, mask)

    close(loss, inputs, case)


@pytest.mark.parametrize("name", ["decoupled_clamp/0", "decoupled_mask/0", "decoupled_sequence_mask/0"])
def test_decoupled_ppo_equals_areals(name):
    case, inputs, mask = load(name)
    params = dict(case["params"])
    clip_low = params.pop("clip_low")
    weight, kept = off_policy.behavior_weight(
        inputs["proximal_logprobs"], inputs["behavior_logprobs"], mask, action=params.pop("behavior_ratio"), **params
    )
    assert ("mask" in name) == bool((kept != mask).any()) and kept.any()

    def loss(logprobs):
        per_token = weight * policy_gradient.POLICIES["ppo_clip"].function(
            logprobs, inputs["proximal_logprobs"], inputs["advantages"], kept, clip_low=clip_low
        )
        return masked.masked_mean(per_token, mask)  # rejected targets count as 0

    close(loss, inputs, case)


def test_every_policy_case_of_areal_is_tested():
    others = {"kd_reverse_kl_importance/0", "kdrl_joint_k1_penalty/0"}
    decoupled = {name for name in cases() if name.startswith("decoupled")}
    assert set(cases()) == set(POLICY_CASES) | decoupled | others
