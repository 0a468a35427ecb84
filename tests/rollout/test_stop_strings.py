"""The end of a completion at a stop string: hand-written cases, and vLLM's own detokenizer where vLLM is installed."""

import random
import types

import numpy as np
import pytest

from jdistill.rollout.completion import Completion
from jdistill.rollout.stop_strings import StopStringEnd, StopStrings


def characters(ids):
    """Decodes one byte per token, as a byte-level tokenizer: an incomplete character is U+FFFD."""
    return bytes(int(i) for i in ids).decode(errors="replace")


def ids_of(text):
    return np.array(list(text.encode()), np.int32)


@pytest.mark.parametrize(
    ("pieces", "strings", "min_new_tokens", "expected"),
    [
        (["72", "#", "a"], ["#"], 0, (2, (2, 3))),
        (["72", "#", "a"], ["#", "2"], 0, (1, (1, 2))),  # the string that is complete first, not the one listed first
        (["72", "#", "a"], ["b"], 0, None),
        (["72", ",,", "a"], [","], 0, (2, (2, 3))),  # within a token
        (["72", "\n", "Q", ":"], ["\nQ"], 0, (3, (2, 4))),  # over several tokens
        (["ab", "b\nQ", "a"], ["b\n", "\nQ"], 0, (2, (2, 4))),  # both in one token
        (["#", "#", "#"], ["#"], 1, (2, (1, 2))),  # the one complete within min_new_tokens is text
        (["#", "#", "#"], ["#"], 2, (3, (2, 3))),
        (["#", "#", "#"], ["#"], 3, None),
        (["a", "b", "c"], ["abc"], 2, (3, (0, 3))),  # begins within them, is complete after them
        (["a"], ["a"], 1, None),
        ([], ["a"], 0, None),
    ],
)
def test_the_first_complete_string_ends_a_completion(pieces, strings, min_new_tokens, expected):
    def decode(ids):
        return "".join(pieces[i] for i in ids)

    found = StopStrings(tuple(strings), decode, min_new_tokens).find(np.arange(len(pieces)), 0)
    assert found == (None if expected is None else StopStringEnd(*expected))


def test_a_character_whose_bytes_have_not_all_come_is_no_text_yet():
    find = StopStrings(("é",), characters, 0).find
    ids = ids_of("aé!")
    assert find(ids[:2], 0) is None
    assert find(ids[:3], 2) == find(ids, 0) == StopStringEnd(3, (1, 2))


def test_chunks_find_what_the_whole_finds():
    draw = random.Random(0)
    for _ in range(400):
        ids = ids_of("".join(draw.choice("aé🙂b") for _ in range(12)))
        strings = tuple("".join(draw.choice("aé🙂b") for _ in range(draw.randint(1, 3))) for _ in range(2))
        find = StopStrings(strings, characters, draw.choice([0, 0, 3, 9])).find
        whole, size, found = find(ids, 0), draw.randint(1, 7), None
        for begin in range(0, len(ids), size):
            if (found := find(ids[: begin + size], begin)) is not None:
                break
        assert found == whole


@pytest.mark.parametrize(
    ("finish_reason", "span", "include_stop", "text"),
    [
        ("length", None, False, "72 #\n"),
        ("length", None, True, "72 #\n"),
        ("stop", None, False, "72 #"),  # the last token is a stop token
        ("stop", None, True, "72 #\n"),
        ("stop", (2, 4), False, "72"),
        ("stop", (2, 4), True, "72 #"),
    ],
)
def test_text_leaves_out_what_ended_the_completion(finish_reason, span, include_stop, text):
    ids = np.concatenate([np.zeros(2, np.int32), ids_of("72 #\n")])
    completion = Completion(0, ids, 2, np.zeros(5, np.float32), None, finish_reason, span, include_stop)
    assert completion.text(characters) == text


def test_a_completion_cut_at_the_limit_has_no_stop_string():
    with pytest.raises(AssertionError):
        Completion(0, np.zeros(2, np.int32), 1, np.zeros(1, np.float32), None, "length", (0, 1))


@pytest.mark.vllm
@pytest.mark.filterwarnings("default")  # vLLM's imports raise deprecation warnings of other libraries
@pytest.mark.parametrize("include_stop", [False, True])
def test_vllm_ends_completions_at_the_same_token_with_the_same_text(include_stop):
    pytest.importorskip("vllm", reason="compares with vLLM's detokenizer, so it needs vLLM's environment")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from vllm import SamplingParams
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "Ċ"), ("Ċ", "Ċ"), ("Ã", "©"), ("b", "Ċ")]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    end = tokenizer.eos_token_id
    usual = [vocab[token] for token in ("a", "b", "ab", "Ċ", "ĊĊ", "bĊ", "abĊ", "Ã", "©", "Ã©")]

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    draw, num_ended = random.Random(1), 0
    for _ in range(1500):
        ids = [draw.choice(usual) for _ in range(draw.randint(1, 14))] + draw.choice([[], [end]])
        strings = ["".join(draw.choice("ab\né") for _ in range(draw.randint(1, 3))) for _ in range(draw.randint(1, 2))]
        least = draw.choice([0, 0, 0, 2, 5])
        params = SamplingParams(
            stop=strings, min_tokens=least, include_stop_str_in_output=include_stop, skip_special_tokens=False
        )
        request = types.SimpleNamespace(sampling_params=params, request_id="0", prompt_token_ids=[vocab["a"]])
        theirs = FastIncrementalDetokenizer(tokenizer, request)
        num_taken = 0
        for token in ids:
            num_taken += 1
            if stopped := theirs.update([token], token == end):
                break
        found = StopStrings(tuple(strings), decode, least).find(np.array(ids[:-1] if ids[-1] == end else ids), 0)
        assert (found is None) == (stopped is None), (ids, strings, least)
        num_ended += found is not None
        taken = len(ids) if found is None else found.num_tokens
        assert taken == num_taken
        token_ids = np.array([0, *ids[:taken]], np.int32)
        reason = "stop" if found or ids[-1] == end else "length"
        span = None if found is None else found.span
        ours = Completion(0, token_ids, 1, np.zeros(taken, np.float32), None, reason, span, include_stop)
        # Of incomplete characters at the end, for which we have U+FFFD, vLLM leaves out some.
        assert ours.text(decode).rstrip("\ufffd") == theirs.output_text.rstrip("\ufffd")
    assert num_ended > 300
