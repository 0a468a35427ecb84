"""The configured loss: each term against its formula, and through the compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdistill.config import ConfigError, ObjectiveSection, ScheduleSection, parse
from jdistill.losses import advantages, distillation, masked, off_policy, policy_gradient
from jdistill.student import objective, recipe
from jdistill.student.checkpoint import Checkpoints
from jdistill.student.objective import Scored
from jdistill.student.optimizer import make_optimizer
from jdistill.student.state import init_state
from jdistill.student.step import make_train_step
from tests.student.factories import copy, make_params, plain_logprobs, random_batch, train_config


def section(**keys):
    return parse(ObjectiveSection, keys)


def scored_of(batch, seed=3):
    rng = np.random.default_rng(seed)
    shape = batch.loss_mask.shape
    logprobs = jnp.asarray(batch.sampler_logprobs + 0.3 * rng.normal(size=shape), jnp.float32)
    candidates = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(*shape, 5)), jnp.float32))[..., :4]
    return Scored(logprobs, candidates, jnp.asarray(rng.random(shape), jnp.float32))


def loss_of(scored, batch, step=0, **keys):
    config = train_config(objective={"rl_loss_weight": 0.8, "distill_loss_weight": 0.5} | keys)
    return objective.loss(
        config, recipe.make_recipe(config), scored, jax.tree.map(jnp.asarray, batch), jnp.asarray(step)
    )


# ---- sums over targets ----

SEQUENCE_KEYS = {"proximal": "recomputed", "behavior": {"level": "sequence"}}
OBJECTIVES = [
    *({"policy": policy, "reduction": "sequence_mean"} for policy in policy_gradient.POLICIES),
    {"dual_clip": 3.0, "clip_high": 0.28, "reduction": "constant"},
    {"proximal": "recomputed", "behavior": {"action": "clamp", "level": "token", "upper": 1.1}},
    {"proximal": "recomputed", "behavior": {"action": "mask", "level": "token", "upper": 1.1}},
    SEQUENCE_KEYS,
    {"reference": {"path": "unused", "weight": 0.3}, "distill_loss_weight": 0.0},
    {"distillation": "sampled_reverse_kl", "distill_clip": 2.0},
    {"distillation": "sampled_reverse_kl", "distill_discount": 0.9},
    {"distillation": "sampled_reverse_kl", "segments": True},
    {"distillation": "sampled_reverse_kl", "rl_loss_weight": 0.0, **SEQUENCE_KEYS},
    {"distillation": "k2", "distill_placement": "loss"},
    {"distillation": "straight_through_reverse_kl", "rl_loss_weight": 0.0, **SEQUENCE_KEYS},
    {"distillation": "sampled_forward_kl", "rl_loss_weight": 0.0},
    *({"distillation": name, "rl_loss_weight": 0.0} for name in ("topk_reverse_kl", "topk_forward_kl")),
    {"distillation": "topk_jsd", "distill_beta": 0.3, "distill_tail": False},
    {"distillation": "topk_reverse_kl", "distill_entropy_weight": 1.0},
]
NOT_A_SUM = [1, 6, 7, 10, 11, 12, 19]


@pytest.mark.parametrize("number", range(len(OBJECTIVES)))
def test_gradients_at_some_targets_depend_on_the_others_unless_the_loss_adds_over_targets(number):
    keys = dict(OBJECTIVES[number])
    batch = random_batch()._replace(reference_logprobs=random_batch(seed=5).sampler_logprobs)
    teacher = {}
    if keys.pop("segments", False):
        teacher = {"tokenizer": "another"}
        batch = batch._replace(teacher_segments=np.cumsum(np.arange(12) % 3 == 0) * np.ones((8, 1), np.int32))
        batch = batch._replace(teacher_segments=batch.teacher_segments.astype(np.int32))
    config = train_config(objective={"rl_loss_weight": 0.8, "distill_loss_weight": 0.5} | keys, teacher=teacher)
    resolved = recipe.make_recipe(config)
    scored, batch = scored_of(batch), jax.tree.map(jnp.asarray, batch)

    def grad(scored):
        def loss(logprobs, candidates):
            here = scored._replace(logprobs=logprobs, candidate_logprobs=candidates)
            return objective.loss(config, resolved, here, batch, 0)[0]

        return jax.grad(loss, argnums=(0, 1))(scored.logprobs, scored.candidate_logprobs)

    whole = grad(scored)
    assert any(np.abs(x).max() > 1e-6 for x in whole)
    here_BT = jnp.arange(12) % 2 == jnp.arange(8)[:, None] % 2  # every other target
    alone = grad(jax.tree.map(lambda x: jnp.where(here_BT.reshape(here_BT.shape + (1,) * (x.ndim - 2)), x, 0), scored))
    same = all(np.allclose(a[here_BT], b[here_BT], rtol=1e-5, atol=1e-8) for a, b in zip(alone, whole, strict=True))
    assert same == resolved.adds_over_targets == (number not in NOT_A_SUM)


# ---- the composition ----


def test_a_scheduled_weight_is_taken_at_the_current_step():
    batch = random_batch()
    scored = scored_of(batch)
    (rl, _), (both, _) = (loss_of(scored, batch, distill_loss_weight=weight) for weight in (1e-9, 1.0))
    schedule = {"kind": "linear", "begin": 1.0, "end": 0.25}
    for step, weight in ((0, 1.0), (3, 0.75), (9, 0.25)):  # of 10 steps
        total, metrics = loss_of(scored, batch, step, distill_loss_weight=schedule)
        np.testing.assert_allclose(metrics["distill_loss_weight"], weight, rtol=1e-6)
        np.testing.assert_allclose(total, rl + weight * (both - rl), rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        ({"kind": "linear", "begin": 2.0, "end": 0.0, "num_steps": 4}, {0: 2.0, 1: 1.5, 4: 0.0, 8: 0.0}),
        ({"kind": "cosine", "begin": 2.0, "end": 0.0, "num_steps": 4}, {0: 2.0, 2: 1.0, 4: 0.0, 8: 0.0}),
        ({"kind": "kdrl", "begin": 1.0, "end": 0.5, "decrement": 0.2}, {0: 1.0, 1: 0.8, 2: 0.6, 3: 0.5, 9: 0.5}),
    ],
)
def test_schedules_from_the_configuration_by_hand(schedule, weights):
    for step, expected in weights.items():
        found = objective.weight_at(parse(ScheduleSection, schedule), jnp.asarray(step), 100)
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["topk_reverse_kl", "topk_forward_kl", "topk_jsd"])
def test_distill_weights_scale_a_distribution_loss_per_row(kind):
    batch = random_batch()
    scored = scored_of(batch)
    weights = np.where(batch.loss_mask, np.arange(8)[:, None] % 3, 0).astype(np.float32)
    options = {"beta": 0.5} if kind == "topk_jsd" else {}
    kl = getattr(distillation, kind)(
        masked.fill(scored.candidate_logprobs, batch.loss_mask),
        masked.fill(jnp.asarray(batch.teacher_candidate_logprobs), batch.loss_mask),
        **options,
    )
    total, metrics = loss_of(
        scored, batch._replace(distill_weights=weights), rl_loss_weight=0.0, distillation=kind, distill_clip=1e6
    )
    np.testing.assert_allclose(total, 0.5 * masked.masked_mean(weights * kl, jnp.asarray(batch.loss_mask)), rtol=1e-5)
    np.testing.assert_allclose(metrics["distill_loss"], masked.masked_mean(kl, jnp.asarray(batch.loss_mask)), rtol=1e-5)


def test_a_sampled_loss_is_weighted_by_the_ratio_to_the_sampler():
    batch = random_batch()
    scored = scored_of(batch)
    kl = distillation.sampled_reverse_kl(scored.logprobs, jnp.asarray(batch.teacher_logprobs))
    ratio = jnp.exp(scored.logprobs - batch.sampler_logprobs)
    total, _ = loss_of(scored, batch, rl_loss_weight=0.0, distillation="k2", distill_placement="loss")
    np.testing.assert_allclose(total, 0.5 * masked.masked_mean(ratio * kl, jnp.asarray(batch.loss_mask)), rtol=1e-5)


@pytest.mark.parametrize("policy", ["gspo", "cispo", "sapo"])
def test_every_policy_uses_the_joint_advantage(policy):
    batch = random_batch()
    scored = scored_of(batch)
    mask = jnp.asarray(batch.loss_mask)
    joint = 0.8 * jnp.asarray(batch.advantages) + 0.5 * distillation.sampled_reverse_kl_advantage(
        scored.logprobs, jnp.asarray(batch.teacher_logprobs), mask
    )
    sampler = jnp.asarray(batch.sampler_logprobs)
    expected = policy_gradient.POLICIES[policy].function(masked.fill(scored.logprobs, mask), sampler, joint, mask)
    total, _ = loss_of(scored, batch, policy=policy, distillation="sampled_reverse_kl")
    np.testing.assert_allclose(total, masked.masked_mean(expected, mask), rtol=1e-5)


@pytest.mark.parametrize("action", ["clamp", "mask"])
def test_behavior_weights_or_rejects_tokens_of_an_older_policy(action):
    batch = random_batch()
    scored, mask = scored_of(batch), jnp.asarray(batch.loss_mask)
    weight, kept = off_policy.behavior_weight(
        masked.fill(scored.logprobs, mask), jnp.asarray(batch.sampler_logprobs), mask, action=action, upper=1.1
    )
    assert 0 < int(kept.sum()) and (int(kept.sum()) < int(mask.sum())) == (action == "mask")
    # With one update per step the proximal policy is the current one, so the ratio is 1.
    expected = masked.masked_mean(-weight * 0.8 * batch.advantages, kept)
    total, metrics = loss_of(
        scored,
        batch,
        distill_loss_weight=0.0,
        proximal="recomputed",
        behavior={"action": action, "upper": 1.1},
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["behavior_kept_share"], kept.sum() / mask.sum(), rtol=1e-5)


# ---- what the step adds before its first update ----


def run_step(batch, *, value=False, reference=None, steps=1, **sections):
    config = train_config(**sections)
    graphdef, params = make_params()
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    step = make_train_step(graphdef, config, optimizer, reference=reference)
    state = init_state(copy(params), optimizer, value_width=16 if value else None)
    found = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        found.append(metrics)
    return state, found


def test_the_kl_to_the_reference_is_zero_at_the_reference_and_positive_elsewhere():
    batch = random_batch()
    graphdef, params = make_params()
    other = jax.tree.map(lambda x: x * 1.1, params)
    keys = {"reference": {"path": "unused", "weight": 0.5, "estimator": "k2"}}
    (_, (same,)), (_, (moved,)) = (run_step(batch, reference=ref, objective=keys) for ref in (params, other))
    assert float(same["reference_kl"]) < 1e-10
    mask = batch.loss_mask
    ours, theirs = (
        np.take_along_axis(np.asarray(plain_logprobs(graphdef, p, batch, 0.7)), batch.tokens[:, 1:, None], -1)[..., 0]
        for p in (params, other)
    )
    np.testing.assert_allclose(moved["reference_kl"], (0.5 * (ours - theirs) ** 2)[mask].mean(), rtol=1e-3)
    np.testing.assert_allclose(moved["loss"] - same["loss"], 0.5 * moved["reference_kl"], rtol=1e-3)


def test_a_reference_term_and_reference_parameters_require_each_other():
    graphdef, params = make_params()
    config = train_config()
    with pytest.raises(ValueError, match="give both or none"):
        make_train_step(graphdef, config, make_optimizer(config.optimizer, 10), reference=params)


def test_recomputed_proximal_log_probs_are_those_at_the_start_of_the_step():
    batch = random_batch()
    wrong = batch._replace(sampler_logprobs=batch.sampler_logprobs - 0.4)  # a sampler that rounds badly
    keys = {"objective": {"distill_loss_weight": 0.0}, "optimizer": {"minibatches": 2}}
    recomputed = {**keys, "objective": {"distill_loss_weight": 0.0, "proximal": "recomputed"}}
    graphdef, params = make_params()
    exact = np.take_along_axis(np.asarray(plain_logprobs(graphdef, params, batch, 0.7)), batch.tokens[:, 1:, None], -1)[
        ..., 0
    ]
    right = batch._replace(sampler_logprobs=np.where(batch.loss_mask, exact, 0).astype(np.float32))
    (state, (metrics,)), (expected_state, (expected,)) = run_step(wrong, **recomputed), run_step(right, **keys)
    np.testing.assert_allclose(metrics["policy_loss"], expected["policy_loss"], rtol=1e-4, atol=1e-6)
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4)


def test_a_value_head_learns_the_returns_and_gives_gae_advantages():
    batch = random_batch()
    last = batch.loss_mask & (np.cumsum(batch.loss_mask, 1) == batch.loss_mask.sum(1, keepdims=True))
    rewards = np.where(last, np.arange(8)[:, None] % 2, 0).astype(np.float32)
    batch = batch._replace(token_rewards=rewards, advantages=None)
    keys = {"advantage": "gae", "distill_loss_weight": 0.0, "gae_lambda": 0.9, "value_loss_weight": 1.0}
    state, found = run_step(batch, value=True, steps=30, objective=keys)
    # The head starts at 0, so its values are 0 and the first step's advantages are the whitened discounted rewards.
    gae, returns = advantages.gae(
        jnp.asarray(rewards), jnp.zeros(rewards.shape), jnp.asarray(batch.loss_mask), discount=1.0, gae_lambda=0.9
    )
    expected = advantages.whiten(gae, jnp.asarray(batch.loss_mask))
    _, (plain,) = run_step(batch._replace(advantages=np.asarray(expected)), objective={"distill_loss_weight": 0.0})
    np.testing.assert_allclose(found[0]["policy_loss"], plain["policy_loss"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        found[0]["value_loss"], masked.masked_mean(0.5 * returns**2, jnp.asarray(batch.loss_mask)), rtol=1e-4
    )
    assert found[-1]["value_loss"] < 0.5 * found[0]["value_loss"]
    assert found[-1]["explained_variance"] > 0.3 > found[0]["explained_variance"]
    assert state.value_head.kernel.shape == (16,)


def test_a_value_head_is_saved_and_restored(tmp_path):
    batch = random_batch()._replace(token_rewards=np.ones((8, 12), np.float32))
    state, _ = run_step(batch, value=True, objective={"advantage": "gae", "distill_loss_weight": 0.0})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    config = train_config()
    blank = init_state(make_params()[1], make_optimizer(config.optimizer, config.num_steps), value_width=16)
    restored, _ = checkpoints.restore(blank)
    checkpoints.close()
    assert float(jnp.abs(restored.value_head.kernel).max()) > 0
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)
    nnx.merge(make_params()[0], restored.params)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"behavior": {}}, "set proximal: recomputed"),
        ({"value_clip": 0.2}, "advantage: gae"),
        ({"policy": "gspo", "dual_clip": 3.0}, "dual_clip belongs to policy: ppo_clip"),
        ({"advantage": "gae", "rl_loss_weight": 0.0, "distill_loss_weight": 1.0}, "no reward for its value head"),
        ({"distill_loss_weight": {"kind": "kdrl", "begin": 1.0, "end": 0.0}}, "decrement"),
        ({"distill_loss_weight": {"kind": "linear", "begin": 1.0, "end": 0.0, "decrement": 0.1}}, "decrement"),
        ({"rl_loss_weight": 0.0, "distill_loss_weight": 0.0}, "nothing would be trained"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        section(**keys)
