"""Every file in configs/ and examples/ is loaded by its schema, GSM8K checked as far as that goes without weights."""

import json
import pathlib
import shutil

import pytest

from jdistill import cli, config
from jdistill.tasks import create_task
from tests.tasks import chat_tokenizer
from tests.tasks.responses import respond

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "examples").glob("*/*.yaml")])
GSM8K = ROOT / "configs" / "gsm8k_qwen3_0.6b_from_14b.yaml"

# The published config.json of Qwen/Qwen3-0.6B, and what differs in Qwen/Qwen3-14B's.
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_14B = QWEN3_0_6B | {
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "max_window_layers": 40,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "tie_word_embeddings": False,
}


@pytest.fixture
def student(tmp_path):
    """A directory as Qwen3-0.6B's without the weights, and with a small tokenizer that has a chat template."""
    path = chat_tokenizer.write_chat_tokenizer(tmp_path / "Qwen3-0.6B")
    (path / "config.json").write_text(json.dumps(QWEN3_0_6B))
    return path


@pytest.fixture
def data(tmp_path):
    """The published files where they are at hand, else two lines like theirs."""
    published = ROOT.parent / "shared" / "data" / "gsm8k"
    for name in ("train.jsonl", "test.jsonl"):
        if (published / name).is_file():
            shutil.copy(published / name, tmp_path / name)
        else:
            line = {"question": f"What is 70 plus 2, {name}?", "answer": "70 + 2 = <<70+2=72>>72\n#### 72"}
            (tmp_path / name).write_text(json.dumps(line) + "\n")
    return [f"task.options.{split}_path={tmp_path / split}.jsonl" for split in ("train", "test")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_config_is_loaded_by_its_schema(path):
    is_sidecar = path.parent.name == "configs" and path.stem.startswith("teacher")
    schema = config.TeacherServerConfig if is_sidecar else config.TrainConfig
    loaded = config.load(schema, path)
    if schema is config.TrainConfig:
        assert loaded.run_dir.startswith("runs/")


def test_gsm8k_run_is_the_one_it_is_named_after():
    run = config.load(config.TrainConfig, GSM8K)
    spawn = run.teacher.spawn
    assert pathlib.Path(run.model.path).name == "Qwen3-0.6B" and pathlib.Path(spawn.model).name == "Qwen3-14B"
    assert (spawn.engine, spawn.tensor_parallel_size) == ("vllm", 4)
    assert len(spawn.env["CUDA_VISIBLE_DEVICES"].split(",")) == spawn.tensor_parallel_size
    assert spawn.python not in (None, "python")  # vLLM's own environment
    assert run.objective.rl_loss_weight > 0 and run.objective.distill_loss_weight > 0
    assert spawn.max_sequence_length == run.rollout.max_prompt_tokens + run.rollout.max_new_tokens


def test_gsm8k_runs_task_is_made_from_its_options(student, data):
    run = config.load(config.TrainConfig, GSM8K, data)
    # One token a byte: a question has some 4 times as many as in Qwen3's vocabulary.
    limit = 4 * run.rollout.max_prompt_tokens
    task = create_task(run.task.name, run.task.options, student, seed=run.seed, max_prompt_tokens=limit)
    problem = task.train_problem(0)
    prompt = task.decode(problem.prompt_ids)
    assert prompt.endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )  # enable_thinking: false reached the template
    assert "put your final answer within \\boxed{}" in prompt
    assert task.reward(problem, respond(task, task.solution_ids(problem))) == 1.0
    if task.num_eval > 1:
        assert run.eval.num_prompts == task.num_eval
        assert round(run.num_steps * run.rollout.num_prompts / task.num_train) == 5  # epochs, as the file says


def test_gsm8k_runs_models_are_read_and_fit_each_other(student):
    jax = pytest.importorskip("jax")
    from flax import nnx

    from jdistill import models
    from jdistill.student.teacher import check_teacher
    from jdistill.wire.types import ModelInfo, ServerInfo

    run = config.load(config.TrainConfig, GSM8K)
    decoder_config = models.config_from_hf(student)
    decoder = nnx.eval_shape(lambda: models.Decoder(decoder_config, rngs=nnx.Rngs(0)))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder, nnx.Param)))
    assert num_params == 596_049_920  # what the model card's 0.6 B stands for
    assert decoder_config.rope.theta == 1e6 and decoder_config.qk_norm and decoder_config.tie_word_embeddings

    cache_bytes = (
        run.rollout.num_prompts
        * run.rollout.num_completions
        * run.teacher.spawn.max_sequence_length
        * (2 * decoder_config.num_layers * decoder_config.num_kv_heads * decoder_config.head_dim * 2)
    )
    assert round(cache_bytes / 1e9) == 83  # GB, as the file says

    (student / "config.json").write_text(json.dumps(QWEN3_14B))
    teacher_config = models.config_from_hf(student)
    assert (teacher_config.num_heads, teacher_config.hidden_size) == (40, 5120)
    model = ModelInfo(
        model="Qwen3-14B",
        fingerprint="f",
        tokenizer_fingerprint="t",
        vocab_size=teacher_config.vocab_size,
        max_sequence_length=run.teacher.spawn.max_sequence_length,
        max_top_k=20,
        max_candidate_count=run.objective.distill_top_k,
        any_temperature=False,  # vLLM scores at temperature 1
        dtype="bfloat16",
    )
    info = ServerInfo(
        server_version="0",
        instance_id="one",
        engine="vllm",
        engine_version="0.32.0",
        models=(model,),
        max_request_bytes=2**26,
    )
    check_teacher(run, decoder_config, info)


def test_gsm8k_run_stops_where_the_weights_are_missing(student, data, tmp_path, capsys):
    pytest.importorskip("jax")
    overrides = [f"model.path={student}", f"run_dir={tmp_path / 'run'}", *data]
    assert cli.main(["train", str(GSM8K), *overrides]) == 2
    error = capsys.readouterr().err
    assert str(student) in error and "safetensors" in error
