"""Where a turn ends, from checkpoint directories in the state that people have them in."""

import json
import types

import pytest

from jdistill.tasks import create_task
from jdistill.turn_end import TurnEnd, read_turn_end
from tests.tasks.chat_tokenizer import write_chat_tokenizer

ABSENT = object()


@pytest.mark.parametrize(
    ("tokenizer_eos", "generation_eos", "expected"),
    [
        (7, ABSENT, TurnEnd((7,), 7)),  # no generation_config.json
        (7, None, TurnEnd((7,), 7)),
        (7, 7, TurnEnd((7,), 7)),
        (7, 3, TurnEnd((7, 3), 7)),
        (7, [7, 3], TurnEnd((7, 3), 7)),  # Qwen3
        (7, [5, 3, 7, 3], TurnEnd((7, 5, 3), 7)),  # the tokenizer's first, then the file's order, each once
        (7, [], TurnEnd((7,), 7)),
        (0, 0, TurnEnd((0,), 0)),  # id 0 is an id
        (None, [5, 3], TurnEnd((5, 3), None)),
        (None, ABSENT, TurnEnd((), None)),
        ("no tokenizer", 3, TurnEnd((3,), None)),
        ("no tokenizer", ABSENT, TurnEnd((), None)),
    ],
)
def test_the_tokenizers_end_token_is_first_and_appended(tmp_path, tokenizer_eos, generation_eos, expected):
    if generation_eos is not ABSENT:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    # Not read: pretrained models often name another token here.
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 99}))
    tokenizer = None if tokenizer_eos == "no tokenizer" else types.SimpleNamespace(eos_token_id=tokenizer_eos)
    assert read_turn_end(tmp_path, tokenizer) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON .*half written"),
        ("[1]", "expected a JSON object, got list"),
        ('{"eos_token_id": "</s>"}', "expected eos_token_id to be a token id or a list of ids, got '</s>'"),
        ('{"eos_token_id": [1, 2.5]}', r"got \[1, 2.5\]"),
        ('{"eos_token_id": true}', "got True"),
    ],
)
def test_a_damaged_generation_config_is_an_error_with_its_path(tmp_path, text, message):
    file = tmp_path / "generation_config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        read_turn_end(tmp_path, types.SimpleNamespace(eos_token_id=1))


def test_an_appended_id_that_does_not_stop_is_an_internal_error():
    with pytest.raises(AssertionError):
        TurnEnd((1, 2), 3)


def test_a_task_refuses_a_tokenizer_without_an_end_token(tmp_path):
    path = write_chat_tokenizer(tmp_path / "tokenizer")
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    (tmp_path / "data.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}')
    options = {key: str(tmp_path / "data.jsonl") for key in ("train_path", "test_path")}
    with pytest.raises(ValueError, match=r"has no end token, so solutions cannot end: set eos_token in its"):
        create_task("gsm8k", options, path)
