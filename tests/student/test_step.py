"""The training step against plain formulas: log-probs, objectives, minibatches, meshes, NaN."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jdistill import models
from jdistill.losses import distillation, masked, policy_gradient
from jdistill.student.batch import TrainBatch
from jdistill.student.logprobs import target_logprobs
from jdistill.student.optimizer import make_optimizer, make_schedule
from jdistill.student.state import init_state
from jdistill.student.step import make_train_step
from tests.devices import run_on_devices
from tests.student.factories import K, V, copy, decoder_config, make_params, plain_logprobs, random_batch, train_config


@functools.cache
def default_step():
    """The compiled step of train_config(), and a function for its first state; shared because compiling is slow."""
    config = train_config()
    graphdef, params = make_params()
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    return make_train_step(graphdef, config, optimizer), lambda: init_state(copy(params), optimizer)


def assert_trees_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_logprobs_and_gradients_equal_the_plain_log_softmax(chunk_tokens, temperature):
    rng = np.random.default_rng(1)
    batch = random_batch()
    hidden = jnp.asarray(rng.normal(size=(8, 12, 16)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(16, V)), jnp.float32)
    weight_BT1 = rng.normal(size=(8, 12, 1 + K))
    targets, mask = jnp.asarray(batch.tokens[:, 1:]), jnp.asarray(batch.loss_mask)
    ids = jnp.concatenate([targets[..., None], batch.candidate_ids], -1)

    def plain(hidden, head):
        logprobs = jax.nn.log_softmax(hidden @ head / temperature)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, -1)
        chosen = jnp.take_along_axis(logprobs, ids, -1)
        return jnp.sum(jnp.where(mask[..., None], weight_BT1 * chosen, 0)), (chosen, entropy)

    def chunked(hidden, head):
        out = target_logprobs(
            hidden, head, targets, mask, batch.candidate_ids, temperature=temperature, chunk_tokens=chunk_tokens
        )
        chosen = jnp.concatenate([out.logprobs[..., None], out.candidate_logprobs], -1)
        # Unscored targets are not masked here: their gradient must be 0 for any use.
        return jnp.sum(weight_BT1 * chosen), (chosen, out.entropy)

    (_, expected), expected_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(hidden, head)
    (_, got), grads = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(hidden, head)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x)[batch.loss_mask], np.asarray(y)[batch.loss_mask], atol=1e-5)
        assert np.all(np.asarray(x)[~batch.loss_mask] == 0)
    assert_trees_close(grads, expected_grads, atol=3e-5)
    assert np.all(np.asarray(grads[0])[~batch.loss_mask] == 0)


def test_no_array_of_all_tokens_by_the_vocabulary_is_ever_made():
    vocab, num_targets, chunk = 512, 48, 16
    batch = random_batch(8, num_targets, vocab=vocab)
    graphdef, params = make_params(vocab_size=vocab)
    config = train_config(objective={"chunk_tokens": chunk})
    optimizer = make_optimizer(config.optimizer, 10)
    step = make_train_step(graphdef, config, optimizer)
    jaxpr = jax.make_jaxpr(step.program.step)(init_state(params, optimizer), batch, step.frozen)

    sizes = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            sizes.extend(v.aval.size for v in equation.outvars if vocab in getattr(v.aval, "shape", ()))
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jaxpr.jaxpr)
    # The largest are one chunk's logits and the head's gradient (width 16, equal to the chunk here).
    assert max(sizes) == chunk * vocab


@pytest.mark.parametrize("kind", ["topk_reverse_kl", "sampled_reverse_kl", "rl_only", "distill_only", "sequence_mean"])
def test_one_step_equals_the_written_formula(kind):
    objective = {"distillation": "sampled_reverse_kl", "distill_discount": 0.5} if kind == "sampled_reverse_kl" else {}
    objective |= {"rl_only": {"distill_loss_weight": 0.0}, "distill_only": {"rl_loss_weight": 0.0}}.get(kind, {})
    objective |= {"reduction": "sequence_mean"} if kind == "sequence_mean" else {}
    config = train_config(objective=objective)
    rl, kd = config.objective.rl_loss_weight, config.objective.distill_loss_weight
    graphdef, params = make_params()
    batch = jax.tree.map(jnp.asarray, random_batch())
    mask = batch.loss_mask
    sampled = config.objective.distillation == "sampled_reverse_kl"
    reduce = masked.masked_sequence_mean if kind == "sequence_mean" else masked.masked_mean

    def loss(params):
        all_BTV = plain_logprobs(graphdef, params, batch, 0.7)
        logprobs = jnp.take_along_axis(all_BTV, jnp.asarray(batch.tokens[:, 1:, None]), -1)[..., 0]
        advantages = rl * batch.advantages
        if sampled:
            advantages += kd * distillation.sampled_reverse_kl_advantage(
                logprobs, batch.teacher_logprobs, mask, discount=0.5
            )
        total = reduce(policy_gradient.ppo_clip(logprobs, batch.sampler_logprobs, advantages), mask)
        kl = None
        if kd and not sampled:
            candidates = jnp.take_along_axis(all_BTV, jnp.asarray(batch.candidate_ids), -1)
            kl_BT = distillation.topk_reverse_kl(candidates, jnp.asarray(batch.teacher_candidate_logprobs))
            total, kl = total + kd * reduce(kl_BT, mask), masked.masked_mean(kl_BT, mask)
        elif sampled:
            kl = masked.masked_mean(logprobs - batch.teacher_logprobs, mask)
        return total, (kl, logprobs, -jnp.sum(jnp.exp(all_BTV) * all_BTV, -1))

    (value, (kl, logprobs, entropy)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    expected = optax.apply_updates(params, updates)
    expected_norm = float(optax.tree.norm(grads))

    state, metrics = make_train_step(graphdef, config, optimizer)(init_state(params, optimizer), batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected_norm, rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], masked.masked_mean(entropy, mask), rtol=1e-5)
    gap = np.abs(np.asarray(logprobs - batch.sampler_logprobs))[np.asarray(mask)]
    np.testing.assert_allclose(metrics["sampler_gap_mean"], gap.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["sampler_gap_max"], gap.max(), rtol=1e-4)
    assert ("reverse_kl" in metrics) == (kl is not None)
    if kl is not None:
        np.testing.assert_allclose(metrics["reverse_kl"], kl, rtol=1e-4)
    assert bool(metrics["finite"]) and int(state.step) == 1
    # Adam's first update is lr * sign(gradient) where the gradient is well above eps and noise.
    assert_trees_close(state.params, expected, atol=2e-4)


def test_supervised_step_is_the_mean_cross_entropy_at_temperature_one():
    config = train_config(objective={"kind": "supervised"})
    graphdef, params = make_params()
    full = random_batch()
    batch = TrainBatch(full.tokens, full.loss_mask)
    all_BTV = plain_logprobs(graphdef, params, batch, 1.0)
    logprobs = np.take_along_axis(np.asarray(all_BTV), batch.tokens[:, 1:, None], -1)[..., 0]
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    step, state, losses = make_train_step(graphdef, config, optimizer), init_state(params, optimizer), []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[0], -logprobs[batch.loss_mask].mean(), rtol=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    assert set(metrics) == {"loss", "entropy", "grad_norm", "learning_rate", "padding_share", "finite"}


@functools.cache
def step_of_four_updates():
    config = train_config(optimizer={"minibatches": 4, "warmup_steps": 2, "schedule": "linear"})
    graphdef, params = make_params()
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    return make_train_step(graphdef, config, optimizer), lambda: init_state(copy(params), optimizer)


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("minibatches", [1, 4])
def test_nan_or_infinity_leaves_the_state_unchanged(bad, minibatches):
    step, start = default_step() if minibatches == 1 else step_of_four_updates()
    state, _ = step(start(), random_batch())
    before = copy(state)
    batch = random_batch(seed=1)
    batch.advantages[3, np.flatnonzero(batch.loss_mask[3])[0]] = float(bad)  # row 3: the last of four minibatches
    state, metrics = step(state, batch)
    assert not metrics["finite"]
    assert_trees_close(state, before, rtol=0, atol=0)
    state, metrics = step(state, random_batch(seed=2))
    assert metrics["finite"] and int(state.step) == 2


def test_values_at_unscored_targets_change_no_bit():
    step, start = default_step()
    batch = random_batch()
    hole = ~batch.loss_mask
    spoiled = batch._replace(
        sampler_logprobs=np.where(hole, -np.inf, batch.sampler_logprobs),
        advantages=np.where(hole, np.nan, batch.advantages),
        teacher_logprobs=np.where(hole, -np.inf, batch.teacher_logprobs),
        teacher_candidate_logprobs=np.where(hole[..., None], np.nan, batch.teacher_candidate_logprobs),
        candidate_ids=np.where(hole[..., None], 0, batch.candidate_ids),
    )
    results = [step(start(), b) for b in (batch, spoiled)]
    assert_trees_close(results[0], results[1], rtol=0, atol=0)
    assert results[1][1]["finite"]


def test_rows_of_padding_targets_and_row_order_do_not_change_the_step():
    step, start = default_step()
    batch = random_batch()
    order = np.random.default_rng(5).permutation(8)
    longer = jax.tree.map(
        lambda x: np.pad(x, ((0, 0), (0, 6)) + ((0, 0),) * (x.ndim - 2), constant_values=0)[order], batch
    )
    (state, metrics), (other_state, other_metrics) = (step(start(), b) for b in (batch, longer))
    for name in set(metrics) - {"padding_share"}:
        np.testing.assert_allclose(metrics[name], other_metrics[name], rtol=2e-5, atol=1e-6, err_msg=name)
    assert_trees_close(state.params, other_state.params, atol=2e-4)


def test_each_minibatch_is_one_update_on_every_nth_row():
    four, start = step_of_four_updates()
    config = train_config(optimizer={"minibatches": 4, "warmup_steps": 2, "schedule": "linear"})
    batch = random_batch()
    together, metrics = four(start(), batch)
    # The same optimizer (its schedule counts four updates per step), with one update per call.
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    single, state, losses = make_train_step(make_params()[0], train_config(), optimizer), start(), []
    for first in range(4):
        state, part = single(state, jax.tree.map(lambda x, first=first: x[first::4], batch))
        losses.append(float(part["loss"]))
    assert_trees_close(together.params, state.params, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(metrics["learning_rate"], 0.005)  # the first of two warm-up steps
    assert int(together.step) == 1


def test_the_step_compiles_once_per_shape():
    config = train_config()
    graphdef, params = make_params()
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    step = make_train_step(graphdef, config, optimizer)
    state = init_state(params, optimizer)
    traces = []
    traced = step.program.step
    step.program.step = lambda *args: traces.append(args[1].tokens.shape) or traced(*args)
    for num_targets, seed in [(12, 0), (12, 1), (18, 0), (12, 2), (18, 1)]:
        state, _ = step(state, random_batch(num_targets=num_targets, seed=seed))
    assert traces == [(8, 13), (8, 19)]
    assert step._compiled._cache_size() == 2  # where a state lies is a part of the key


def test_a_batch_that_lacks_a_field_of_the_objective_is_refused():
    graphdef, params = make_params()
    config = train_config(objective={"distillation": "topk_reverse_kl"})
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    batch = random_batch()
    with pytest.raises(ValueError, match="needs candidate_ids, which the batch does not have"):
        make_train_step(graphdef, config, optimizer)(init_state(params, optimizer), batch._replace(candidate_ids=None))
    with pytest.raises(ValueError, match="needs teacher_logprobs"):
        make_train_step(graphdef, train_config(objective={"distillation": "sampled_reverse_kl"}), optimizer)(
            init_state(params, optimizer), batch._replace(teacher_logprobs=None)
        )
    with pytest.raises(ValueError, match="accumulate = 4 does not divide the batch's 6 rows"):
        make_train_step(graphdef, train_config(optimizer={"minibatches": 4}), optimizer)(
            init_state(params, optimizer), jax.tree.map(lambda x: x[:6], batch)
        )
    with pytest.raises(ValueError, match="no target of the batch is scored"):
        make_train_step(graphdef, train_config(), optimizer)(
            init_state(params, optimizer), batch._replace(loss_mask=np.zeros_like(batch.loss_mask))
        )
    with pytest.raises(ValueError, match="must be float32 masters"):
        init_state(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), optimizer)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.6, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.6, 0.2]),
    ],
)
def test_schedule_warms_up_from_its_first_step_and_ends_at_its_last(schedule, expected):
    section = train_config(optimizer={"schedule": schedule, "warmup_steps": 2, "end_factor": 0.2}).optimizer
    rate = make_schedule(section, 5)
    np.testing.assert_allclose([rate(i) / 0.01 for i in range(5)], expected, rtol=1e-5)


def test_norms_do_not_decay_and_matrices_do():
    config = train_config(optimizer={"learning_rate": 0.1, "weight_decay": 0.5})
    _, params = make_params()
    optimizer = make_optimizer(config.optimizer, 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for path, change in nnx.to_flat_state(updates):
        is_norm = "norm" in str(path[-1])
        value = nnx.to_pure_dict(params)
        for key in path:
            value = value[key]
        np.testing.assert_allclose(change[...], 0 if is_norm else -0.1 * 0.5 * value, rtol=1e-5, err_msg=str(path))


def test_eight_devices_equal_one():
    code = (
        "import json; from tests.student import on_meshes; "
        "cube = {'data': 2, 'fsdp': 2, 'tensor': 2}; "
        "runs = [(None, {}), ({'data': 8}, {}), (cube, {}), (cube, {'packing': True, 'accumulate': 2})]; "
        "print(json.dumps([on_meshes.step_metrics(mesh, **optimizer) for mesh, optimizer in runs]))"
    )
    one, *meshes = json.loads(run_on_devices(8, code).splitlines()[-1])
    for other in meshes:
        for a, b in zip(one, other, strict=True):
            for name in set(a) - {"padding_share"}:  # the packed one has less
                # sampler_gap_max and ratio_max depend on a single token, after updates that differ by rounding.
                np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=1e-5, err_msg=name)


def test_bfloat16_compute_keeps_float32_weights_and_nearly_the_same_loss():
    step, start = default_step()
    _, exact = step(start(), random_batch())
    graphdef, params = nnx.split(models.random_init(decoder_config(), 3, compute_dtype="bfloat16"), nnx.Param)
    config = train_config()
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    state, rounded = make_train_step(graphdef, config, optimizer)(init_state(params, optimizer), random_batch())
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(rounded["loss"], exact["loss"], atol=0.02)
    np.testing.assert_allclose(rounded["grad_norm"], exact["grad_norm"], rtol=0.05)
