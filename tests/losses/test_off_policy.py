"""Behaviour weights by hand, and their invariances. test_policy_enumeration.py checks their gradients."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.losses import off_policy

# Two sequences; ratios (2, 1/2, 2 and a hole) and (1, 4): geometric means 2^(1/3) and 2.
PROXIMAL = jnp.log(jnp.array([[0.2, 0.1, 0.4, jnp.nan], [0.3, jnp.nan, 0.8, jnp.nan]]))
SAMPLER = jnp.log(jnp.array([[0.1, 0.2, 0.2, 0.0], [0.3, 1.0, 0.2, jnp.nan]]))
MASK = jnp.array([[True, True, True, False], [True, False, True, False]])


@pytest.mark.parametrize(
    ("options", "weight", "kept"),
    [
        ({}, [[2, 0.5, 2, 0], [1, 0, 4, 0]], None),
        ({"upper": 3.0}, [[2, 0.5, 2, 0], [1, 0, 3, 0]], None),
        ({"lower": 0.8, "upper": 1.5}, [[1.5, 0.8, 1.5, 0], [1, 0, 1.5, 0]], None),
        ({"action": "mask", "upper": 3.0}, [[2, 0.5, 2, 0], [1, 0, 0, 0]], [[1, 1, 1, 0], [1, 0, 0, 0]]),
        ({"action": "mask", "lower": 0.8}, [[2, 0, 2, 0], [1, 0, 4, 0]], [[1, 0, 1, 0], [1, 0, 1, 0]]),
        ({"level": "sequence"}, [[2 ** (1 / 3)] * 3 + [0], [2, 0, 2, 0]], None),
        ({"level": "sequence", "upper": 1.5}, [[2 ** (1 / 3)] * 3 + [0], [1.5, 0, 1.5, 0]], None),
        (
            {"level": "sequence", "action": "mask", "upper": 1.5},
            [[2 ** (1 / 3)] * 3 + [0], [0, 0, 0, 0]],
            [[1, 1, 1, 0], [0, 0, 0, 0]],
        ),
    ],
)
def test_weights_by_hand(options, weight, kept):
    found, found_mask = off_policy.behavior_weight(PROXIMAL, SAMPLER, MASK, **options)
    np.testing.assert_allclose(found, weight, rtol=1e-5)
    np.testing.assert_array_equal(found_mask, MASK if kept is None else np.array(kept, bool))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "mask"}, "rejects what is outside lower and upper, and neither is given"),
        ({"lower": 1.1}, r"1, the weight on-policy, must be within lower and upper, got \[1.1, None\]"),
        ({"upper": 0.9}, "must be within lower and upper"),
        ({"level": "prompt"}, 'level must be "token" or "sequence", got "prompt"'),
        ({"action": "drop"}, 'action must be "clamp" or "mask", got "drop"'),
    ],
)
def test_invalid_bounds_and_options_are_refused(options, message):
    # Annotations are checked in these tests but not in a user's run, so call the undecorated function.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(off_policy.behavior_weight)(PROXIMAL, SAMPLER, MASK, **options)


COMBINATIONS = [
    {"level": level, "action": action, "lower": 0.5, "upper": 1.5}
    for level in ("token", "sequence")
    for action in ("clamp", "mask")
]
SEEDS = st.integers(0, 2**32 - 1)


@functools.cache
def compiled(index):
    return jax.jit(functools.partial(off_policy.behavior_weight, **COMBINATIONS[index]))


@pytest.mark.parametrize("index", range(len(COMBINATIONS)))
@given(seed=SEEDS, spread=st.sampled_from([0.3, 30.0, 1e4, 1e30]))
@settings(max_examples=15, deadline=None)
def test_weights_are_within_bounds_and_independent_of_unscored_targets(index, seed, spread):
    rng = np.random.default_rng(seed)
    proximal, sampler = (spread * rng.normal(size=(2, 3, 5))).astype(np.float32)
    mask = rng.random((3, 5)) < 0.6
    weight, kept = (np.asarray(x) for x in compiled(index)(proximal, sampler, mask))
    assert np.all(weight[~kept] == 0) and not np.any(kept & ~mask)
    assert np.all((weight[kept] >= 0.5) & (weight[kept] <= 1.5))
    order = rng.permutation(3)

    def spoil(x):
        x = np.where(mask, x, rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32), x.shape))
        return np.pad(x, ((0, 0), (0, 2)), constant_values=np.nan)[order]

    other, other_kept = compiled(index)(spoil(proximal), spoil(sampler), np.pad(mask, ((0, 0), (0, 2)))[order])
    np.testing.assert_allclose(other[:, :5], weight[order], rtol=1e-5)
    np.testing.assert_array_equal(other_kept, np.pad(kept, ((0, 0), (0, 2)))[order])


def test_no_gradient_flows_through_the_weight():
    for options in COMBINATIONS:
        grads = jax.grad(lambda p, s, o=options: off_policy.behavior_weight(p, s, MASK, **o)[0].sum(), (0, 1))(
            jnp.full((2, 4), -1.0), jnp.full((2, 4), -1.1)
        )
        for grad in grads:
            np.testing.assert_array_equal(grad, 0)
