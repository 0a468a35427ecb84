"""The planned memory of a run against XLA's memory analysis of the compiled step."""

import json

import jax
import pytest

from jdistill import cli, models
from jdistill.config import ConfigError
from jdistill.student import plan
from tests.student.factories import train_config


def decoder_config(num_layers=4, width=256, vocab_size=8192, **changes):
    sizes = {"intermediate_size": 2 * width, "num_layers": num_layers, "num_heads": 8, "num_kv_heads": 4}
    sizes |= {"vocab_size": vocab_size, "hidden_size": width, "head_dim": width // 8, "max_position_embeddings": 4096}
    return models.DecoderConfig(family="qwen3", qk_norm=True, initializer_range=0.02, **(sizes | changes))


def run_config(num_rows, num_tokens, **sections):
    half = num_tokens // 2
    rollout = {"num_prompts": num_rows // 2, "num_completions": 2, "max_prompt_tokens": half, "max_new_tokens": half}
    sections["objective"] = {"chunk_tokens": 64} | sections.get("objective", {})
    # bfloat16 only when planning for GPUs or TPUs: XLA's CPU backend computes it in float32 copies.
    sections["model"] = {"compute_dtype": "float32"} | sections.get("model", {})
    return train_config(**sections | {"rollout": rollout | sections.get("rollout", {})})


@pytest.mark.parametrize(
    ("num_rows", "num_tokens", "sections"),
    [
        (8, 64, {"model": {"remat": "none"}}),
        (32, 256, {"model": {"remat": "layer"}}),
        (32, 128, {"model": {"remat": "none"}, "objective": {"distill_loss_weight": 0.0}}),
        (32, 128, {"model": {"remat": "layer"}, "optimizer": {"accumulate": 4, "moment_dtype": "bfloat16"}}),
        (32, 128, {"model": {"remat": "layer", "lora": {"rank": 8}}, "objective": {"reference": {"path": "unused"}}}),
    ],
)
def test_the_planned_memory_is_near_that_of_the_compiled_step(num_rows, num_tokens, sections):
    config = run_config(num_rows, num_tokens, **sections)
    found = plan.make_plan(config, 1, decoder_config())
    compiled = plan.compiled_bytes(plan.make_shapes(config, decoder_config()))
    assert sum(item.num_bytes for item in found.always) == pytest.approx(compiled["arguments"], rel=0.01)
    assert 0.8 < found.peak_training / compiled["peak"] < 1.3


def test_a_large_model_is_planned_for_devices_that_do_not_exist():
    # Qwen3-4B's sizes, on 8 devices that this machine does not have.
    sizes = {"intermediate_size": 9728, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    model = decoder_config(36, 2560, 151_936, tie_word_embeddings=True, **sizes)
    config = run_config(
        64,
        4096,
        model={"compute_dtype": "bfloat16", "remat": "layer"},
        mesh={"data": 1, "fsdp": 8},
        rollout={"max_rows": 32},
    )
    found = plan.make_plan(config, 8, model)
    items = {item.name: item.num_bytes for item in (*found.always, *found.training, *found.sampling)}
    num_params = 4_022_468_096  # of the published checkpoint
    assert items["parameters (float32 masters)"] == pytest.approx(4 * num_params / 8, rel=1e-3)
    assert items["optimizer state (adamw)"] == pytest.approx(8 * num_params / 8, rel=1e-3)
    # remat: layer keeps the input of each layer, for 8 rows per device.
    kept = items["activations kept for the backward pass"]
    assert 36 * 8 * 4095 * 2560 * 2 < kept < 1.4 * 36 * 8 * 4095 * 2560 * 2
    assert items["cache of keys and values"] == 2 * 36 * (32 // 8) * 4096 * 8 * 128 * 2
    assert found.peak == max(found.peak_training, found.peak_sampling)


def test_a_mesh_that_does_not_fit_the_devices_or_rows_is_refused():
    with pytest.raises(ConfigError, match=r"fsdp = 3, .* does not fit 8"):
        plan.make_plan(run_config(8, 64, mesh={"fsdp": 3}), 8, decoder_config())
    with pytest.raises(ConfigError, match=r"has 8 rows, which do not split over mesh.data \* mesh.fsdp = 16"):
        plan.make_plan(run_config(8, 64), 16, decoder_config())


def test_the_command_prints_a_table_json_and_whether_it_fits(capsys):
    demo = "configs/demo.yaml"
    assert cli.main(["plan", demo, "--devices", "3"]) == 0
    text = capsys.readouterr().out
    assert "3 devices, of which teacher.spawn takes 1; the student's 2 device(s)" in " ".join(text.split())
    assert "activations kept for the backward pass" in text and "data 2" in text and "while sampling" in text
    assert cli.main(["plan", demo, "--json", "--compile", "--devices", "1", "num_steps=3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.8 < found["peak_training"] / found["compiled"]["peak"] < 1.3
    assert cli.main(["plan", demo, "--device-memory", "1 MiB"]) == 1
    assert "it does not fit" in capsys.readouterr().out
    assert cli.main(["plan", demo, "--device-memory", "80GiB"]) == 0
    assert "of 80.00 GiB on each device: it fits" in capsys.readouterr().out
    for wrong, message in (
        (["--device-memory", "lots"], "expected a number and a unit"),
        (["--compile", "--devices", "3"], "--compile compiles for one device"),
        (["--devices", "0"], "expected at least 1"),
    ):
        assert cli.main(["plan", demo, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert jax.device_count() == 1
