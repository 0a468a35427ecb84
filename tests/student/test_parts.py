"""A step in parts (accumulation) or without padding (packing) against the same step at once."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill.config import ConfigError
from jdistill.student.optimizer import make_optimizer
from jdistill.student.placement import balanced_order
from jdistill.student.recipe import make_recipe
from jdistill.student.state import init_state
from jdistill.student.step import make_train_step
from tests.student.factories import make_params, random_batch, train_config

CASES = {
    "default": {},
    "sequence_mean, sampled": {"reduction": "sequence_mean", "distillation": "sampled_reverse_kl", "policy": "gspo"},
    "constant, gae, reference": {
        "reduction": "constant",
        "advantage": "gae",
        "distill_loss_weight": 0.0,
        "reference": {"path": "unused", "weight": 0.3},
        "proximal": "recomputed",
        "behavior": {"level": "sequence"},
    },
    "segments": {"distillation": "sampled_reverse_kl", "distill_discount": 0.9},
}


def uneven_batch(case):
    """16 rows: the first ones have far more tokens, and one has no scored token."""
    batch = random_batch(16)
    batch.loss_mask[:4, 1:] = True
    batch.loss_mask[9] = False
    if case == "segments":
        segments_BT = np.cumsum(np.random.default_rng(1).random(batch.loss_mask.shape) < 0.7, axis=1)
        return batch._replace(teacher_segments=np.where(segments_BT % 4 == 3, -1, segments_BT).astype(np.int32))
    rewards_BT = np.zeros(batch.loss_mask.shape, np.float32)
    for row in range(16):
        scored = np.flatnonzero(batch.loss_mask[row])
        rewards_BT[row, scored[-1:]] = row % 3
    return batch._replace(token_rewards=rewards_BT)


def run(batch, objective, recipe_changes=None, **optimizer):
    """Runs two steps: the second shows that the first made the same update."""
    teacher = {} if batch.teacher_segments is None else {"tokenizer": "another"}
    config = train_config(objective=objective, optimizer={"clip_norm": 1e9, **optimizer}, teacher=teacher)
    recipe = dataclasses.replace(make_recipe(config), **recipe_changes or {})
    graphdef, params = make_params()
    reference = make_params()[1] if config.objective.reference else None
    maker = make_optimizer(config.optimizer, config.num_steps)
    state = init_state(params, maker, value_width=16 if config.objective.advantage == "gae" else None)
    step = make_train_step(graphdef, config, maker, recipe=recipe, reference=reference)
    state, first = step(state, batch)
    state, second = step(state, batch)
    return first, second


@pytest.mark.parametrize("case", CASES)
def test_parts_and_packing_change_no_number(case):
    batch, objective = uneven_batch(case), CASES[case]
    expected = run(batch, objective, minibatches=2)
    for optimizer in ({"accumulate": 4}, {"accumulate": 2, "packing": True}):
        found = run(batch, objective, minibatches=2, **optimizer)
        for a, b, tolerance in zip(found, expected, (2e-4, 5e-3), strict=True):
            assert set(a) == set(b)
            assert a["padding_share"] < b["padding_share"] if "packing" in optimizer else True
            for name in set(a) - {"padding_share"}:
                np.testing.assert_allclose(a[name], b[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("case", [{"reduction": "sequence_mean", "reference": {"path": "unused"}}, {"policy": "gspo"}])
def test_parts_that_arrive_one_by_one_give_the_same_step(case):
    batch = uneven_batch("")
    batch.loss_mask[4:10, 8:] = False
    expected, _ = run(batch, case)
    config = train_config(objective=case, optimizer={"clip_norm": 1e9, "accumulate": 4, "packing": True})
    graphdef, params = make_params()
    maker = make_optimizer(config.optimizer, config.num_steps)
    reference = make_params()[1] if config.objective.reference else None
    step, state = make_train_step(graphdef, config, maker, reference=reference), init_state(params, maker)
    gradient = step.begin(state, num_tokens=int(batch.loss_mask.sum()), num_sequences=15)
    # Parts with another number of rows and shorter rows, whose completions ended earlier.
    for rows, num_targets in ((slice(0, 4), 12), (slice(4, 10), 8), (slice(10, 16), 12)):
        with pytest.raises(ValueError, match=r"scored tokens in .* sequences have come, but begin"):
            step.apply(state, gradient)
        part = batch._replace(tokens=batch.tokens[:, : num_targets + 1])
        part = part._replace(
            **{k: v[:, :num_targets] for k, v in part._asdict().items() if k != "tokens" and v is not None}
        )
        gradient = step.add(state, gradient, jax.tree.map(lambda x, rows=rows: x[rows], part))
    state, found = step.apply(state, gradient)
    assert int(state.step) == 1 and set(found) == set(expected)
    for name in set(found) - {"padding_share"}:
        np.testing.assert_allclose(found[name], expected[name], rtol=2e-4, atol=2e-5, err_msg=name)
    assert found["padding_share"] < expected["padding_share"]


def test_accumulation_takes_less_memory_and_packing_less_work():
    batch = random_batch(32, 64)
    batch.loss_mask[:] = False
    batch.loss_mask[:, :8] = True
    batch.loss_mask[:2] = True  # 368 of 2,048 tokens

    def compiled(**optimizer):
        config = train_config(optimizer=optimizer)
        graphdef, params = make_params()
        maker = make_optimizer(config.optimizer, config.num_steps)
        step = make_train_step(graphdef, config, maker)
        packed = step.placement.pack(batch, 1, 1) if config.optimizer.packing else (batch, None)
        return jax.jit(step.program.step).lower(init_state(params, maker), packed[0], step.frozen, packed[1]).compile()

    plain = compiled()
    assert compiled(accumulate=8).memory_analysis().temp_size_in_bytes < plain.memory_analysis().temp_size_in_bytes / 3
    # A quarter of the places. But attention is unchanged, and XLA counts the loop over log-prob chunks as one chunk.
    assert compiled(packing=True).cost_analysis()["flops"] < 0.6 * plain.cost_analysis()["flops"]


def test_packed_batches_of_similar_size_compile_once():
    config = train_config(optimizer={"packing": True})
    graphdef, params = make_params()
    maker = make_optimizer(config.optimizer, config.num_steps)
    step, state = make_train_step(graphdef, config, maker), init_state(params, maker)
    shares = []
    for lengths in ([5, 6, 7, 5, 6, 7, 5, 6], [6, 6, 6, 5, 6, 7, 4, 6], [12, 5, 5, 5, 5, 5, 5, 5], [12] * 8):
        batch = random_batch()
        batch.loss_mask[:] = np.arange(12) < np.array(lengths)[:, None]  # 47, 46, 47 and 96 of 96 tokens
        state, metrics = step(state, batch)
        shares.append(float(metrics["padding_share"]))
    assert step._compiled._cache_size() == 2
    np.testing.assert_allclose(shares, [1 / 48, 2 / 48, 1 / 48, 0], atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([(1, 1, 1), (2, 3, 2), (1, 4, 1), (4, 1, 2)]), st.integers(1, 4), st.integers(0, 2**31))
def test_rows_stay_in_their_update_and_groups_are_balanced(sizes, rows_each, seed):
    U, A, G = sizes
    lengths_B = np.random.default_rng(seed).integers(0, 50, U * A * G * rows_each)
    order = balanced_order(lengths_B, U, A, G)
    assert sorted(order) == list(range(len(order)))
    assert np.all(order % U == np.arange(len(order)) % U)
    for update in range(U):
        tokens = [lengths_B[order][u :: U * A].reshape(G, -1).sum(axis=1) for u in range(update, U * A, U)]
        assert np.max(tokens) - np.min(tokens) <= 50


def test_configurations_that_parts_do_not_support_are_refused():
    for changes in ({"accumulate": 1}, {"accumulate": 2, "minibatches": 2}):
        config = train_config(optimizer=changes)
        graphdef, params = make_params()
        maker = make_optimizer(config.optimizer, 10)
        with pytest.raises(ValueError, match=r"steps by parts need optimizer.accumulate > 1, minibatches: 1"):
            make_train_step(graphdef, config, maker).begin(init_state(params, maker), num_tokens=1, num_sequences=1)
    for objective, key in (
        ({"distill_entropy_weight": 1.0}, "distill_entropy_weight"),
        ({"proximal": "recomputed", "behavior": {"action": "mask"}}, "behavior.action: mask"),
    ):
        config = train_config(objective=objective, optimizer={"accumulate": 2})
        with pytest.raises(ConfigError, match=rf"optimizer\.accumulate: objective\.{key} is relative to all tokens"):
            make_train_step(make_params()[0], config, make_optimizer(config.optimizer, 10))
    with pytest.raises(ConfigError, match=r"minibatches = 2 \* optimizer.accumulate = 3 does not divide rollout"):
        train_config(optimizer={"minibatches": 2, "accumulate": 3})
    with pytest.raises(ConfigError, match=r"accumulate = 3 does not divide optimizer.batch_size = 64"):
        train_config(objective={"kind": "supervised"}, optimizer={"accumulate": 3})
    config = train_config(optimizer={"packing": True})
    graphdef, params = make_params()
    maker = make_optimizer(config.optimizer, 10)
    with pytest.raises(ValueError, match="rows are packed on the host: give the batch as numpy arrays"):
        batch = jax.tree.map(jax.numpy.asarray, random_batch())
        make_train_step(graphdef, config, maker)(init_state(params, maker), batch)


@pytest.mark.parametrize("case", ["default", "constant, reference", "sampled"])
def test_gradients_within_a_chunk_equal_gradients_after_all_scores(case):
    keys = {
        "default": {"distill_beta": 0.3, "distillation": "topk_jsd"},
        "constant, reference": {"reduction": "constant", "reference": {"path": "unused", "weight": 0.3}},
        "sampled": {"distillation": "sampled_reverse_kl", "policy": "cispo", "reduction": "sequence_mean"},
    }[case]
    batch, optimizer = uneven_batch(""), {"minibatches": 2, "accumulate": 2, "packing": True}
    assert make_recipe(train_config(objective=keys)).adds_over_targets
    within, after = run(batch, keys, **optimizer), run(batch, keys, {"adds_over_targets": False}, **optimizer)
    for a, b in zip(within, after, strict=True):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)
