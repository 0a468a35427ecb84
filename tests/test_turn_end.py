"""Where a turn ends, from checkpoint directories in the state that people have them in."""

import json
import types

import pytest

from jdistill.tasks import create_task
from jdistill.tasks.base import load_tokenizer
from jdistill.turn_end import TurnEnd, read_turn_end
from tests.family_tokenizers import CHATML, FAMILIES, PLAIN, id_of, write_family
from tests.tasks.chat_tokenizer import write_chat_tokenizer

ABSENT = object()


@pytest.mark.parametrize(
    ("tokenizer_eos", "generation_eos", "config_eos", "expected"),
    [
        (7, ABSENT, ABSENT, TurnEnd((7,), 7)),
        (7, None, ABSENT, TurnEnd((7,), 7)),
        (7, 7, ABSENT, TurnEnd((7,), 7)),
        (7, 3, ABSENT, TurnEnd((7, 3), 7)),
        (7, [7, 3], ABSENT, TurnEnd((7, 3), 7)),  # Qwen3
        (7, [5, 3, 7, 3], ABSENT, TurnEnd((7, 5, 3), 7)),  # the tokenizer's first, then the file's order, each once
        (7, [], ABSENT, TurnEnd((7,), 7)),
        (7, -1, ABSENT, TurnEnd((7,), 7)),
        (0, 0, ABSENT, TurnEnd((0,), 0)),  # id 0 is an id
        (None, [5, 3], ABSENT, TurnEnd((5, 3), None)),
        (None, ABSENT, ABSENT, TurnEnd((), None)),
        ("no tokenizer", 3, ABSENT, TurnEnd((3,), None)),
        ("no tokenizer", ABSENT, ABSENT, TurnEnd((), None)),
        # config.json is read where generation_config.json says nothing.
        (0, ABSENT, [0, 2], TurnEnd((0, 2), 0)),
        (0, None, [0, 2], TurnEnd((0, 2), 0)),
        (0, 3, [0, 2], TurnEnd((0, 3), 0)),
        (0, [], [0, 2], TurnEnd((0,), 0)),
        ("no tokenizer", ABSENT, 2, TurnEnd((2,), None)),
    ],
)
def test_the_tokenizers_end_token_is_first_and_appended(tmp_path, tokenizer_eos, generation_eos, config_eos, expected):
    for file, value in (("generation_config.json", generation_eos), ("config.json", config_eos)):
        if value is not ABSENT:
            (tmp_path / file).write_text(json.dumps({"eos_token_id": value}))
    tokenizer = None if tokenizer_eos == "no tokenizer" else types.SimpleNamespace(eos_token_id=tokenizer_eos)
    assert read_turn_end(tmp_path, tokenizer) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"text_config": {"eos_token_id": 106}}, (106,)),
        ({"eos_token_id": None, "text_config": {"eos_token_id": [1, 106]}}, (1, 106)),
        ({"eos_token_id": [1, 106], "text_config": {"eos_token_id": 1}}, (1, 106)),
        ({"text_config": {}}, ()),
    ],
)
def test_a_nested_text_config_is_read_as_transformers_reads_it(tmp_path, config, expected):
    transformers = pytest.importorskip("transformers")
    found = transformers.GenerationConfig.from_model_config(json.loads(json.dumps(config))).eos_token_id
    assert tuple(found if isinstance(found, list) else [] if found is None else [found]) == expected
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_turn_end(tmp_path, None).stop_token_ids == expected


@pytest.mark.parametrize(("has_file", "config_eos"), [(True, [0, 2]), (False, [0, 2]), (False, 3), (True, None)])
def test_the_files_stop_where_transformers_stops(tmp_path, has_file, config_eos):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(vocab_size=9, **sizes, eos_token_id=config_eos)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if has_file:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3]}))
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    expected = expected if isinstance(expected, list) else [] if expected is None else [expected]
    assert list(read_turn_end(tmp_path, None).stop_token_ids) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_ends_with_what_the_chat_template_writes_after_it(tmp_path, name):
    family = FAMILIES[name]
    tokenizer = load_tokenizer(write_family(tmp_path, family))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    last_text = max(i for i, token_id in enumerate(ids) if token_id == tokenizer.convert_tokens_to_ids("o"))
    first_after = next(i for i in ids[last_text + 1 :] if tokenizer.decode([i]).strip())
    found = read_turn_end(tmp_path, tokenizer)
    assert found.appended_id == first_after == id_of(family, family.turn_end)
    listed = (family.turn_end, family.eos, *(family.generation_eos or family.config_eos))
    assert found.stop_token_ids == tuple(dict.fromkeys(id_of(family, token) for token in listed))


@pytest.mark.parametrize(
    "template",
    [
        None,
        PLAIN,
        CHATML.replace("<|im_end|>", ""),
        CHATML.replace("<|im_end|>", "<|not_a_token|>"),
        "{{ raise_exception('a system message is required') }}",
        "{{ messages[0].missing.field }}",
        "{{ messages[0].content }}",  # without the assistant's message
        "{% if %}",  # damaged
        "",
    ],
)
def test_a_template_that_writes_no_end_token_adds_none(tmp_path, template):
    family = FAMILIES["qwen2.5 base"]._replace(template=template)
    tokenizer = load_tokenizer(write_family(tmp_path, family))
    eos = id_of(family, "<|endoftext|>")
    assert read_turn_end(tmp_path, tokenizer) == TurnEnd((eos,), eos)


def test_a_tokenizer_without_templates_adds_none():
    class MistralCommon:  # as transformers' MistralCommonBackend
        eos_token_id = 2

        def __getattr__(self, name):
            raise NotImplementedError(name)

    assert read_turn_end("nowhere", MistralCommon()) == TurnEnd((2,), 2)


def test_whitespace_that_is_an_added_token_is_not_an_end(tmp_path):
    # Gemma has added tokens for runs of line feeds.
    family = FAMILIES["gemma"]._replace(special=(*FAMILIES["gemma"].special, "\n\n"))
    family = family._replace(template=family.template.replace("<end_of_turn>\n", "\n\n"))
    tokenizer = load_tokenizer(write_family(tmp_path, family))
    assert read_turn_end(tmp_path, tokenizer).appended_id == id_of(family, "<eos>")


@pytest.mark.parametrize("space", [" ", "\n", "\n\n"])
def test_whitespace_before_the_end_token_is_not_the_end(tmp_path, space):
    family = FAMILIES["qwen2.5 base"]
    template = CHATML.replace("<|im_end|>", f"{space}<|im_end|>")
    family = family._replace(special=(*family.special, "\n\n"), template=template)
    tokenizer = load_tokenizer(write_family(tmp_path, family))
    assert read_turn_end(tmp_path, tokenizer).appended_id == id_of(family, "<|im_end|>")


def test_the_longest_token_is_the_end(tmp_path):
    family = FAMILIES["qwen2.5"]
    family = family._replace(special=("<|im_end", *family.special))
    tokenizer = load_tokenizer(write_family(tmp_path, family))
    assert read_turn_end(tmp_path, tokenizer).appended_id == id_of(family, "<|im_end|>")


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
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_damaged_file_is_an_error_with_its_path(tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        read_turn_end(tmp_path, types.SimpleNamespace(eos_token_id=1))


def test_an_appended_id_that_does_not_stop_is_an_internal_error():
    with pytest.raises(AssertionError):
        TurnEnd((1, 2), 3)


def test_a_task_refuses_a_tokenizer_without_an_end_token(tmp_path):
    path = write_chat_tokenizer(tmp_path / "tokenizer", chat_template=PLAIN)
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    (tmp_path / "data.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}')
    options = {key: str(tmp_path / "data.jsonl") for key in ("train_path", "test_path")}
    with pytest.raises(ValueError, match=r"has no end token, so solutions cannot end: set eos_token in its"):
        create_task("gsm8k", options, path)


def test_a_solution_ends_as_the_chat_template_ends_it(tmp_path):
    """The supervised objective once appended Gemma's `<eos>`, which never follows a turn."""
    (tmp_path / "data.jsonl").write_text('{"question": "1 + 1?", "answer": "1 + 1 = 2\\n#### 2"}')
    options = {key: str(tmp_path / "data.jsonl") for key in ("train_path", "test_path")}
    task = create_task("gsm8k", options, write_family(tmp_path / "gemma", FAMILIES["gemma"]))
    problem = task.train_problem(0)
    content = task.decode(problem.prompt_ids).partition("user\n")[2].partition("<end_of_turn>")[0]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "1 + 1 = 2\n#### 2"}]
    expected = task.tokenizer.apply_chat_template(chat, tokenize=False)
    assert task.decode([*problem.prompt_ids, *task.solution_ids(problem)]) + "\n" == expected
