"""A student and a teacher with vocabularies of different sizes: every divergence against the two whole distributions.

Dimension key: B rows, T targets, V ids of the student, W ids of the teacher, K candidates.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from jdistill import config
from jdistill.config import ConfigError
from jdistill.rollout.completion import Completion
from jdistill.student import metrics, train
from jdistill.student.batch import make_batch
from jdistill.student.optimizer import make_optimizer
from jdistill.student.recipe import TeacherCapabilities, make_recipe
from jdistill.student.state import init_state
from jdistill.student.step import make_train_step
from jdistill.student.teacher import check_teacher
from jdistill.student.teacher_process import TeacherProcess
from jdistill.wire.types import ModelInfo, ServerInfo, TokenScores
from tests.student.factories import (
    V,
    copy,
    decoder_config,
    make_params,
    plain_logprobs,
    random_batch,
    train_config,
)

REPO = pathlib.Path(__file__).parents[2]
K, PROMPT, LENGTH = 5, 3, 9


def capabilities(vocab_size):
    return TeacherCapabilities("able 1.0", max_top_k=64, max_candidate_count=64, vocab_size=vocab_size)


def divergence(name, logprobs_BTV, teacher_BTW, ids_BTK, num_shared):
    """The divergence after all tokens but the shared candidates are merged into one, from all probabilities."""
    p_BTV, q_BTW = jnp.exp(logprobs_BTV), jnp.exp(teacher_BTW)
    is_shared_BTK = ids_BTK < num_shared
    ids_BTK = np.where(is_shared_BTK, ids_BTK, 0)
    p_BTK, q_BTK = (jnp.where(is_shared_BTK, jnp.take_along_axis(x, ids_BTK, axis=-1), 0) for x in (p_BTV, q_BTW))
    p, q = (jnp.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p_BTK, q_BTK))

    def kl(a, b):
        return jnp.sum(jnp.where(a > 0, a * (jnp.log(jnp.where(a > 0, a, 1)) - jnp.log(jnp.where(b > 0, b, 1))), 0), -1)

    m = (p + q) / 2
    return {"topk_reverse_kl": kl(p, q), "topk_forward_kl": kl(q, p), "topk_jsd": (kl(p, m) + kl(q, m)) / 2}[name]


@pytest.mark.parametrize("teacher_size", [V - 6, V + 6])
@pytest.mark.parametrize("candidates", ["student", "teacher"])
@pytest.mark.parametrize("name", ["topk_reverse_kl", "topk_forward_kl", "topk_jsd"])
def test_ids_that_one_side_lacks_count_into_the_bucket(name, candidates, teacher_size):
    asked = train_config(
        objective={"rl_loss_weight": 0, "distill_loss_weight": 1, "distillation": name, "distill_top_k": K}
        | {"distill_candidates": candidates}
    )
    recipe = make_recipe(asked, vocab_size=V, teachers=[capabilities(teacher_size)])
    num_shared = min(V, teacher_size)
    assert recipe.num_shared_ids == num_shared
    rng = np.random.default_rng(0)
    graphdef, params = make_params()
    tokens_BS = rng.integers(0, num_shared, (4, LENGTH)).astype(np.int32)
    teacher_BTW = np.asarray(jax.nn.log_softmax(rng.normal(size=(4, LENGTH - 1, teacher_size)).astype(np.float32)))
    whole = TokenScoresBatch(tokens_BS)
    student_BTV = plain_logprobs(graphdef, params, whole, asked.rollout.temperature)
    by = student_BTV if candidates == "student" else teacher_BTW
    ids_BTK = np.asarray(jnp.argsort(by, axis=-1)[..., ::-1][..., :K]).astype(np.int32)
    assert (ids_BTK < num_shared).all() == (candidates == ("student" if teacher_size > V else "teacher"))

    completions, scores = [], []
    for b, tokens_S in enumerate(tokens_BS):
        scored = slice(PROMPT - 1, LENGTH - 1)
        zeros = np.zeros(LENGTH - PROMPT, np.float32)
        ids_TK = ids_BTK[b, scored]
        # A teacher that lacks an id was asked for id 0 in its place.
        found_TK = np.take_along_axis(teacher_BTW[b, scored], np.where(ids_TK < teacher_size, ids_TK, 0), axis=-1)
        by_student = candidates == "student"
        completions.append(Completion(b, tokens_S, PROMPT, zeros, ids_TK if by_student else None, "stop"))
        top, given = ((None, None), found_TK) if by_student else ((ids_TK, found_TK), None)
        scores.append(TokenScores(zeros, *top, given, token_crc=0))
    batch = make_batch(completions, np.zeros(4), scores, max_length=LENGTH, num_shared_ids=recipe.num_shared_ids)
    mask_BT = batch.loss_mask[:, : LENGTH - 1]

    def expected(params):
        logprobs_BTV = plain_logprobs(graphdef, params, whole, asked.rollout.temperature)
        return jnp.mean(divergence(name, logprobs_BTV, teacher_BTW, ids_BTK, num_shared)[mask_BT])

    loss, grads = jax.value_and_grad(expected)(params)
    optimizer = make_optimizer(asked.optimizer, asked.num_steps)
    step = make_train_step(graphdef, asked, optimizer, recipe=recipe)
    found = step(init_state(copy(params), optimizer), batch)[1]
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(found["grad_norm"], optax.tree.norm(grads), rtol=1e-3)
    missing = np.mean((ids_BTK >= num_shared)[mask_BT])
    np.testing.assert_allclose(found["unshared_candidates_share"], missing, rtol=1e-6)
    assert found["finite"]


class TokenScoresBatch:
    """Rows of tokens, as `plain_logprobs` reads them."""

    def __init__(self, tokens_BS):
        self.tokens = tokens_BS


def test_equal_vocabularies_have_no_shared_part_and_no_metric():
    asked = train_config()
    assert make_recipe(asked, vocab_size=V, teachers=[capabilities(V)]).num_shared_ids is None
    assert make_recipe(asked, vocab_size=V, teachers=[capabilities(V + 1), capabilities(V - 1)]).num_shared_ids == V - 1
    supervised = train_config(objective={"kind": "supervised"})
    assert make_recipe(supervised, vocab_size=V, teachers=[capabilities(V + 1)]).num_shared_ids is None


def test_an_id_that_the_student_lacks_is_never_an_index():
    asked = train_config()
    graphdef, params = make_params()
    optimizer = make_optimizer(asked.optimizer, asked.num_steps)
    step, state = make_train_step(graphdef, asked, optimizer), init_state(params, optimizer)

    for name, value in (("candidate_ids", V), ("candidate_ids", -1), ("tokens", V)):
        batch = random_batch()
        getattr(batch, name)[1, 2] = value
        with pytest.raises(ValueError, match=rf"{name} of the batch hold ids from .* and the student has {V}"):
            step(state, batch)


def info(vocab_size):
    model = ModelInfo("teacher", "f", "t", vocab_size, 4096, 20, 20, any_temperature=True, dtype="float32")
    return ServerInfo("0", "one", "jax", "1", (model,), 2**26)


def test_padding_rows_may_differ_and_tokens_may_not():
    asked, student = train_config(), decoder_config(vocab_size=152_064)
    check_teacher(asked, student, info(151_936), num_token_ids=151_665)
    check_teacher(asked, decoder_config(vocab_size=151_936), info(152_064), num_token_ids=151_665)
    with pytest.raises(ConfigError, match="vocabulary has 151940 ids, the teacher's 151936: it cannot score all"):
        check_teacher(asked, student, info(151_936), num_token_ids=151_940)
    with pytest.raises(ConfigError, match="vocabulary has 152064 ids"):
        check_teacher(asked, student, info(151_936))


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"distill_loss": np.nan, "reverse_kl": np.nan}, "the teacher's numbers or token ids are the cause"),
        ({"distill_loss": np.inf}, "the teacher's numbers"),
        ({"entropy": np.nan, "distill_loss": np.nan, "sampler_gap_mean": np.nan}, "Lower optimizer.learning_rate"),
        ({"policy_loss": np.inf}, "Lower optimizer.learning_rate"),
        ({}, "Lower optimizer.learning_rate"),
    ],
)
def test_the_remedy_for_nan_is_that_of_its_cause(broken, says):
    fine = {"entropy": 1.0, "sampler_gap_mean": 0.0, "policy_loss": 0.1, "distill_loss": 0.1}
    message = train.not_finite(3, {"loss": np.nan, "grad_norm": np.nan} | fine | broken)
    assert says in message and "of step 3" in message and all(name in message for name in broken)
    assert ("learning_rate" in message) != ("teacher's" in message)


# ---- with real sidecars ----


def padded(name, directory, num_rows):
    """The demo's model with rows beyond its tokenizer that are always among the most likely."""
    path = shutil.copytree(REPO / "examples/addition" / name, directory / f"{name}-{num_rows}")
    found = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(found | {"vocab_size": num_rows, "tie_word_embeddings": False}))
    tensors = load_file(path / "model.safetensors")
    (embedding,) = [tensors[key] for key in tensors if "embed_tokens" in key]
    extra = np.zeros((num_rows - len(embedding), embedding.shape[1]), embedding.dtype)  # logit 0
    rows = np.concatenate([embedding, extra])
    save_file(tensors | {"model.embed_tokens.weight": rows, "lm_head.weight": rows}, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("student_rows", "teacher_rows", "keys"),
    [
        (16, 24, ["objective.distillation=topk_forward_kl"]),
        (16, 24, ["objective.distillation=topk_jsd", "objective.distill_candidates=teacher", "optimizer.accumulate=2"]),
        (24, 16, ["objective.distillation=topk_reverse_kl", "objective.rl_loss_weight=0", "rollout.top_k=1"]),
    ],
)
def test_a_run_counts_the_ids_that_one_side_lacks(student_rows, teacher_rows, keys, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(REPO)
    student, teacher = padded("student", tmp_path, student_rows), padded("teacher", tmp_path, teacher_rows)
    section = config.SpawnSection(engine="jax", model=str(teacher), dtype="float32")
    with TeacherProcess(section, tmp_path / "teacher.log") as sidecar:
        small = ["num_steps=2", "rollout.num_prompts=2", "rollout.num_completions=4", "eval.every=0"]
        at = ["teacher.spawn=null", f"teacher.endpoints=['{sidecar.endpoint}']", f"model.path={student}"]
        where = [f"run_dir={tmp_path / 'run'}"]
        train.train(config.load(config.TrainConfig, "configs/demo.yaml", [*small, *at, *where, *keys]))
        if student_rows > teacher_rows:
            hot = ["rollout.temperature=9.0", "objective.distillation=topk_reverse_kl", f"run_dir={tmp_path / 'hot'}"]
            with pytest.raises(ValueError, match=r"the student sampled token .* the teacher has no id from 16 on"):
                train.train(config.load(config.TrainConfig, "configs/demo.yaml", [*small, *at, *hot]))
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert all(0 < line["unshared_candidates_share"] < 1 for line in lines)
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    larger = "teacher" if teacher_rows > student_rows else "student"
    assert capfd.readouterr().err.count(f"the {larger} has 8 token ids more than the other side") >= 1
