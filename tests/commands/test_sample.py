"""`jdistill sample` on a random checkpoint, against the sampler's promises and a full forward pass."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import cli, models
from jdistill.tasks import create_task
from jdistill.tasks.addition import VOCABULARY, write_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample")
    write_model(root / "source", num_layers=1)
    models.save(models.random_init(root / "source", seed=0), root / "model", source=root / "source")
    return root / "model"


def run(capsys, *argv):
    code = cli.main(["sample", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_jsonl_lines_hold_every_completion_with_log_probs_of_the_model(checkpoint, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "12+34="}\n\n{"token_ids": [1, 2, 3]}\n')
    argv = ["--model", checkpoint, "--prompts-file", file, "--num-completions", 3, "--max-new-tokens", 9, "--jsonl"]
    code, out, err = run(capsys, *argv, "--temperature", 0.8, "--max-rows", 4)
    assert code == 0 and "6 completions" in err
    lines = [json.loads(line) for line in out.splitlines()]
    assert {(line["prompt_index"], line["completion_index"]) for line in lines} == {
        (p, c) for p in range(2) for c in range(3)
    }
    decoder = models.load(checkpoint)

    @jax.jit
    def full_logits(tokens):
        return decoder.logits(decoder(tokens, jnp.arange(20)[None])[0])[0]

    for line in lines:
        prompt = [[1, 2, 10, 3, 4, 11], [1, 2, 3]][line["prompt_index"]]
        assert line["prompt_token_ids"] == prompt
        assert line["prompt"] == ["12+34=", "123"][line["prompt_index"]]
        tokens = prompt + line["token_ids"]
        padded = jnp.array([tokens + [0] * (20 - len(tokens))])
        full = jax.nn.log_softmax(full_logits(padded)[len(prompt) - 1 : len(tokens) - 1] / 0.8)
        np.testing.assert_allclose(line["logprobs"], full[np.arange(len(full)), line["token_ids"]], atol=1e-4)
        np.testing.assert_allclose(line["mean_logprob"], np.mean(line["logprobs"]), rtol=1e-5)
        ended = line["token_ids"][-1] == VOCABULARY["<end>"]
        assert line["finish_reason"] == ("stop" if ended else "length")
        names = {i: token for token, i in VOCABULARY.items()}
        assert line["text"] == "".join(names[i] for i in line["token_ids"] if not names[i].startswith("<"))
    again = run(capsys, *argv, "--temperature", 0.8, "--max-rows", 4)[1]
    assert sorted(again.splitlines()) == sorted(out.splitlines())


def test_text_shows_prompt_and_completion(checkpoint, capsys):
    argv = ["--model", checkpoint, "--prompt", "1+1=", "--greedy", "--max-new-tokens", 4]
    code, out, _ = run(capsys, *argv)
    header, text = out.splitlines()
    assert code == 0
    assert header.startswith("-- prompt 0, completion 0: ") and "mean log-prob -" in header
    _, out, _ = run(capsys, *argv, "--jsonl")
    assert text == "1+1=" + json.loads(out)["text"]


def test_stop_tokens_can_be_chosen(checkpoint, capsys):
    argv = ["--model", checkpoint, "--token-ids", "1,2", "--max-new-tokens", 30, "--jsonl"]
    everything = ",".join(map(str, range(len(VOCABULARY))))
    _, out, _ = run(capsys, *argv, "--stop-token-ids", everything)
    line = json.loads(out)
    assert len(line["token_ids"]) == 1 and line["finish_reason"] == "stop"


def test_a_stop_string_ends_a_completion_and_is_left_out_of_its_text(checkpoint, capsys):
    argv = ["--model", checkpoint, "--token-ids", "1,2", "--max-new-tokens", 40, "--jsonl", "--min-new-tokens", 3]
    digits = [flag for digit in range(10) for flag in ("--stop-string", digit)]
    _, out, _ = run(capsys, *argv, *digits)
    line = json.loads(out)
    names = {i: token for token, i in VOCABULARY.items()}
    whole = "".join(names[i] for i in line["token_ids"])
    assert line["finish_reason"] == "stop" and whole[-1].isdigit() and line["text"] == whole[:-1].replace("<pad>", "")
    assert len(line["token_ids"]) > 3
    with_it = json.loads(run(capsys, *argv, *digits, "--include-stop-str-in-output")[1])
    assert with_it["token_ids"] == line["token_ids"] and with_it["text"] == line["text"] + whole[-1]


def test_without_generation_config_a_completion_stops_at_the_ids_of_config_json(checkpoint, capsys, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": [*range(len(VOCABULARY))]}))
    _, out, _ = run(capsys, "--model", model, "--token-ids", "1,2", "--max-new-tokens", 30, "--jsonl")
    assert len(json.loads(out)["token_ids"]) == 1
    assert create_task("addition", {}, model).stop_token_ids == (15, *range(15))  # train and eval read the same


def test_by_default_a_completion_stops_at_the_end_tokens_of_tokenizer_and_generation_config(
    checkpoint, capsys, tmp_path
):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    argv = ["--model", model, "--token-ids", "1,2", "--max-new-tokens", 30, "--jsonl"]
    others = [i for i in range(len(VOCABULARY)) if i != VOCABULARY["<end>"]]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": others}))
    code, out, err = run(capsys, *argv)
    # Any first token stops: <end> by the tokenizer, the others by generation_config.json.
    assert code == 0 and len(json.loads(out)["token_ids"]) == 1
    assert "has no end token" not in err
    (model / "generation_config.json").write_text("{")
    code, _, err = run(capsys, *argv)
    assert code == 2 and f"{model / 'generation_config.json'} is not JSON" in err


def test_a_checkpoint_without_an_end_token_is_a_warning(checkpoint, capsys, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    code, out, err = run(capsys, "--model", model, "--token-ids", "1,2", "--max-new-tokens", 5, "--jsonl")
    assert code == 0 and len(json.loads(out)["token_ids"]) == 5
    assert "has no end token: completions continue to --max-new-tokens" in err
    code, _, err = run(capsys, "--model", model, "--token-ids", "1,2", "--stop-string", "x")
    assert code == 2 and "has no tokenizer: --stop-token-ids" in err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--prompt", "1+1=", "--chat"], "has no chat template, which --chat needs for its prompts"),
        (["--token-ids", "1,2", "--chat"], "a prompt is given as token ids: omit --chat"),
        (["--token-ids", "1;2"], "--token-ids: expected token ids like 5,6,7, got '1;2'"),
        (["--token-ids", "1,99"], "prompt 0, token 1: id 99 is outside the model's vocabulary of 16"),
        (["--prompts-file", "nowhere.txt"], "--prompts-file: no file nowhere.txt"),
        (["--prompt", "1", "--max-new-tokens", "128"], "--max-new-tokens can be at most 127, got 128"),
        (["--prompt", "1" * 128], "the longest prompt has 128 tokens: no position is left for a completion"),
        (["--prompt", "1", "--temperature", "0"], "--temperature must be above 0, got 0.0"),
        (["--prompt", "1", "--num-completions", "0"], "--num-completions must be at least 1, got 0"),
        (["--prompt", "1", "--min-new-tokens", "-1"], "--min-new-tokens must not be negative, got -1"),
        (["--prompt", "1", "--stop-string", ""], "--stop-string must not be empty"),
        (["--prompt", "1", "--max-rows", "0"], "--max-rows must be at least 1, got 0"),
    ],
)
def test_a_wrong_request_is_answered_with_a_remedy_and_exit_code_2(checkpoint, capsys, argv, message):
    code, out, err = run(capsys, "--model", checkpoint, *argv)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "line 1 is not JSON"),
        ('{"prompt": "a\\ud83d"}', "line 1 holds \\ud83d, half of a surrogate pair"),
        ('{"text": "a"}', 'line 1: expected {"prompt": TEXT} or {"token_ids": [..]}, got {"text": "a"}'),
        ('{"token_ids": [1, 2.5]}', "line 1: expected"),
        ("\n", "has no prompts; expected one per line"),
    ],
)
def test_a_bad_prompts_file_is_named_with_its_line(checkpoint, capsys, tmp_path, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    code, _, err = run(capsys, "--model", checkpoint, "--prompts-file", tmp_path / "bad.jsonl")
    assert code == 2 and message in err


def test_a_missing_checkpoint_is_named(capsys, tmp_path):
    code, _, err = run(capsys, "--model", tmp_path / "nowhere", "--prompt", "1")
    assert code == 2 and "no checkpoint directory" in err
