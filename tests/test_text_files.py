"""Text files that are not what they should be: the error says file, line and remedy."""

import json

import pytest

from jdistill import cli
from jdistill.config import ConfigError, TrainConfig, load
from jdistill.text_files import check_output, read_json_lines, read_json_object, read_lines, read_text

TEXT = '{"question": "Prix en £ 😀?", "n": 1}\r\n\n{"n": 2}\n'
OBJECTS = [(1, {"question": "Prix en £ 😀?", "n": 1}), (3, {"n": 2})]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf8_is_read_with_or_without_a_byte_order_mark_and_with_either_line_end(tmp_path, encoding):
    path = tmp_path / "a.jsonl"
    path.write_bytes(TEXT.encode(encoding))
    assert list(read_json_lines(path, "with n")) == OBJECTS
    assert list(read_lines(path)) == list(enumerate(TEXT.replace("\r", "").split("\n")[:3], 1))
    path.write_text("".join(json.dumps(one) + "\n" for _, one in OBJECTS))  # the emoji as a pair of escapes
    assert [one for _, one in read_json_lines(path, "")] == [one for _, one in OBJECTS]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TEXT.encode("utf-16"), "a.jsonl is UTF-16, expected UTF-8: iconv -f UTF-16"),
        (TEXT.encode("utf-32"), "a.jsonl is UTF-32, expected UTF-8"),
        (b'{"n": 1}\n{"n": "\xa3"}', r"a.jsonl line 2 is not UTF-8 \(byte 8 is 0xa3\).*iconv -f LATIN1"),
        (b'{"n": 1}\n{"n": "\\ud83d"}', r"line 2 holds \\ud83d, half of a surrogate pair"),
        (b'{"n": 1}\n{"\\udc00": 1}', r"line 2 holds \\udc00, half of a surrogate pair"),
        (b'{"n": 1}\n[1]', "line 2: expected an object, with n, got list"),
        (b'{"n": 1}\n\n{"n": ', "line 3 is not JSON: .*; expected with n"),
        (b"\x00\x01\x02", "line 1 is not JSON"),
    ],
)
def test_what_is_not_json_lines_in_utf8_is_named_with_its_line(tmp_path, data, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(read_json_lines(path, "with n"))


def test_a_configuration_is_read_by_the_same_rules(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"seed: 0\nrun_dir: \xe9\n")
    with pytest.raises(ConfigError, match=r"a.yaml line 2 is not UTF-8"):
        load(TrainConfig, path)
    path.write_bytes("run_dir: é\n".encode("utf-8-sig"))
    assert read_text(path) == "run_dir: é\n"
    with pytest.raises(ConfigError, match="missing key"):  # the mark is not part of the first key
        load(TrainConfig, path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON .*: half written"), ("[1]", "expected a JSON object")]
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"config.json.* {message}"):
        read_json_object(tmp_path / "config.json")
    for argv in (["export", str(tmp_path), "--to", str(tmp_path / "new")], ["plot", str(tmp_path)]):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        assert cli.main(argv) == 2


def test_an_output_is_checked_before_the_work_begins(tmp_path):
    check_output("--output", tmp_path / "new")
    for path, message in ((tmp_path, "it is a directory"), (tmp_path / "no" / "new", "there is no directory")):
        with pytest.raises(ValueError, match=f"--output {path}: {message}"):
            check_output("--output", path)
