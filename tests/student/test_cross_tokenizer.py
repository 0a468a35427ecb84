"""Alignment of two tokenisations, for several kinds of tokenizers and any text."""

import json
import pathlib

import numpy as np
import pytest

pytest.importorskip("transformers")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jdistill.student.cross_tokenizer import CrossTokenizer, scatter
from jdistill.student.token_bytes import TokenBytes
from jdistill.tasks.base import load_tokenizer
from jdistill.turn_end import read_turn_end
from tests.family_tokenizers import FAMILIES, id_of, write_family

END = "<end>"
CORPUS = [
    "Natalia sold 48/2 = 24 clips in May. She sold 48+24 = 72 altogether in April and May.",
    "the lowest lower low newer newest wide wider widest, the hello held hell",
    "日本語のテキスト 日本語 テキスト 🙂🙃🙂 café café naïve Ελληνικά",
] * 4


def wrap(tokenizer):
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def byte_level(vocab_size, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet))
    return wrap(tokenizer)


def sentencepiece():
    """BPE with byte fallback and a space added before every text, as in Llama 2 and Mistral."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"]))
    model = json.loads(trained.to_str())["model"]
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    for token in model["vocab"]:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(tokenizer)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


def characters():
    letters = sorted(set("".join(CORPUS)))
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(["<unk>", *letters])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return wrap(tokenizer)


def gemma():
    """BPE with byte fallback and added tokens for runs of spaces and line feeds, as in Gemma 3."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"]))
    model = json.loads(trained.to_str())["model"]
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    merges = [("▁", "▁"), ("▁▁", "▁"), ("▁▁", "▁▁"), *map(tuple, model["merges"])]
    for token in ("▁", "▁▁", "▁▁▁", "▁▁▁▁", "\n", *model["vocab"]):
        vocab.setdefault(token, len(vocab))
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    added = ["▁▁", "▁▁▁", "▁▁▁▁", "\n\n", "\n\n\n", "<table>"]
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    return wrap(backend)


def with_added(make, **options):
    """A tokenizer with added tokens that are text: of spaces, of the byte alphabet's characters, of whole words."""

    def made():
        found = make()
        contents = ["  ", "    ", "low", " held", "\n\n", "é", "Ġlow", "▁▁", "<think>"]
        found.backend_tokenizer.add_tokens([AddedToken(content, **options) for content in contents])
        return found

    return made


KINDS = {
    "bytes": lambda: byte_level(256),
    "bpe": lambda: byte_level(300),
    "bpe_large": lambda: byte_level(420),
    "bpe_nfc": lambda: byte_level(420, normalizers.NFC()),
    "bpe_lowercase": lambda: byte_level(420, normalizers.Lowercase()),
    "sentencepiece": sentencepiece,
    "unigram": unigram,
    "characters": characters,
    "gemma": gemma,
    "bpe_added": with_added(lambda: byte_level(300), normalized=False),
    "bpe_normalized": with_added(lambda: byte_level(300, normalizers.NFC()), normalized=True),
    "bpe_strip": with_added(lambda: byte_level(300), normalized=False, lstrip=True, rstrip=True),
    "sentencepiece_added": with_added(sentencepiece, normalized=False),
    "unigram_added": with_added(unigram, normalized=True),
}
_made = {}


def tokenizer(kind):
    if kind not in _made:
        _made[kind] = KINDS[kind]()
    return _made[kind]


_bytes = {}


def token_bytes(kind):
    if kind not in _bytes:
        _bytes[kind] = TokenBytes(tokenizer(kind))
    return _bytes[kind]


def cross(student, teacher, **kwargs):
    student, teacher = tokenizer(student), tokenizer(teacher)
    kwargs = {"max_length": 10_000} | kwargs
    return CrossTokenizer(
        student, teacher, student_stop_ids=[student.eos_token_id], teacher_stop_id=teacher.eos_token_id, **kwargs
    )


_crosses = {}


def kept_cross(student, teacher):
    if (student, teacher) not in _crosses:
        _crosses[student, teacher] = cross(student, teacher)
    return _crosses[student, teacher]


def ids_of(kind, text, *, end=True):
    found = tokenizer(kind)
    ids = found.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return np.array([*ids, found.eos_token_id] if end else ids, np.int32)


PROMPT = np.array([7, 8, 9], np.int32)


def check(student, teacher, found, completion_ids):
    """Checks what must hold for any pair of tokenizers and any completion; returns the segments' bytes."""
    assert found.token_ids.dtype == found.segment_ids.dtype == found.teacher_segment_ids.dtype == np.int32
    np.testing.assert_array_equal(found.token_ids[:3], PROMPT)
    assert found.spans == ((3, len(found.token_ids)),) and len(found.token_ids) > 3
    assert len(found.segment_ids) == len(completion_ids)
    teacher_ids = found.token_ids[3:]
    assert len(found.teacher_segment_ids) == len(teacher_ids)
    used = found.segment_ids[found.segment_ids >= 0]
    num_segments = int(used.max(initial=-1)) + 1
    # Segments are numbered in order, exist on both sides and are contiguous.
    for ids in (found.segment_ids, found.teacher_segment_ids):
        kept = ids[ids >= 0]
        assert np.all(np.isin(np.diff(kept), [0, 1])) and set(kept) == set(range(num_segments))
        for number in range(num_segments):
            assert np.all(np.diff(np.flatnonzero(ids == number)) == 1)
    sides = [
        (token_bytes(student), completion_ids, found.segment_ids, tokenizer(student).eos_token_id),
        (token_bytes(teacher), teacher_ids, found.teacher_segment_ids, tokenizer(teacher).eos_token_id),
    ]
    spelled = [
        [
            b"".join(b"<END>" if i == end else pieces[i] for i in ids[segments == number])
            for number in range(num_segments)
        ]
        for pieces, ids, segments, end in sides
    ]
    assert spelled[0] == spelled[1]
    # A teacher whose scores encode position and token.
    logprobs = -(np.arange(len(teacher_ids)) * 1000.0 + teacher_ids)
    sums, segment_ids = scatter(found, logprobs)
    np.testing.assert_array_equal(segment_ids, found.segment_ids)
    assert sums.dtype == np.float32
    for number in range(num_segments):
        places = np.flatnonzero(segment_ids == number)
        assert sums[places[-1]] == np.float32(logprobs[found.teacher_segment_ids == number].sum())
        assert not sums[places[:-1]].any()
    assert not sums[segment_ids < 0].any()
    return spelled[0]


texts = st.one_of(
    st.text(alphabet="ehlot wrs.0123+=", max_size=24),
    st.text(max_size=12),
    st.text(alphabet="  \n\nlowheld▁é<think>Ġ", max_size=24),
    st.text(alphabet="🙂🙃é日本語é ̈🏳️‍🌈 \n", max_size=12),
)


STUDENTS = ["bpe", "sentencepiece", "characters", "unigram", "gemma", "bpe_added", "sentencepiece_added"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_every_token_are_those_of_the_tokenizers_decoder(kind):
    found, pieces = tokenizer(kind), token_bytes(kind)
    before = found.convert_tokens_to_ids("l")
    num_checked = 0
    for token_id in range(len(found)):
        if (piece := pieces[token_id]) is None:
            assert token_id == found.unk_token_id or found.added_tokens_decoder[token_id].special
        elif "\ufffd" not in (text := found.backend_tokenizer.decode([before, token_id, before])):
            assert text.encode() == b"l" + piece + b"l"
            num_checked += 1
        else:
            with pytest.raises(UnicodeDecodeError):
                piece.decode()
        assert piece is None or pieces.are_decoded([token_id])
    assert num_checked > 40


@pytest.mark.parametrize("student", ["bpe", "gemma", "bpe_added"])
@pytest.mark.parametrize("text", ["a  low    b", "    low\n\n        lower", "low\n\n\nhello  <table> x", " ▁▁ low"])
def test_the_teacher_reads_the_students_text(student, text):
    """Gemma's tokens for runs of spaces were once aligned as the literal character U+2581, all of it usable."""
    ids = ids_of(student, text)
    sampled = tokenizer(student).backend_tokenizer.decode(list(ids[:-1]))
    found = kept_cross(student, "gemma").retokenize(PROMPT, ids)
    read = tokenizer("gemma").backend_tokenizer.decode(list(found.token_ids[3:-1]), skip_special_tokens=False)
    if "▁" in sampled:  # Gemma has no token for this character: its text is another, and these segments are left out
        assert read != sampled and (found.segment_ids < 0).any()
    else:
        assert read == sampled and (found.segment_ids >= 0).all()
    check(student, "gemma", found, ids)


@pytest.mark.parametrize("odd", ["student", "teacher"])
def test_a_completion_that_is_decoded_to_other_bytes_is_not_usable(odd):
    # A decoder that rewrites the text over several tokens, so that no token has bytes of its own.
    rewriting = byte_level(256)
    rewriting.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("lower", "LOWER")])
    student, teacher = (rewriting, tokenizer("bpe")) if odd == "student" else (tokenizer("bpe"), rewriting)
    stops = {"student_stop_ids": [student.eos_token_id], "teacher_stop_id": teacher.eos_token_id}
    both = CrossTokenizer(student, teacher, **stops, max_length=100)
    for text, is_usable in (("hello lower", False), ("hello low", True)):
        found = both.retokenize(PROMPT, ids_of("bytes" if odd == "student" else "bpe", text))
        assert ((found.segment_ids >= 0) == is_usable).all() and ((found.teacher_segment_ids >= 0) == is_usable).all()


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("teacher", KINDS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=texts, end=st.booleans())
@example(text="", end=True)
@example(text=" ", end=True)
@example(text="🙂", end=False)
def test_segments_spell_the_same_bytes_for_any_text(student, teacher, text, end):
    ids = ids_of(student, text, end=end)
    found = kept_cross(student, teacher).retokenize(PROMPT, ids)
    spelled = check(student, teacher, found, ids)
    if end and teacher == "bytes":
        # Every byte of a text is a token of this teacher, so only tokens without bytes and segments of more than 16
        # tokens are left out.
        pieces = token_bytes(student)
        long = [i for i in ids[:-1] if pieces[i] is not None and len(pieces[i]) > 16]
        if None not in [pieces[i] for i in ids[:-1]] and not long:
            assert b"".join(spelled) == b"".join(pieces[i] for i in ids[:-1]) + b"<END>"


@pytest.mark.parametrize("teacher", KINDS)
@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 301), max_size=20))
@example(ids=[300])
def test_segments_spell_the_same_bytes_for_any_tokens(teacher, ids):
    # Sampled tokens may not be UTF-8, nor the tokenizer's own split of their text; 301 is not a token.
    ids = np.array(ids, np.int32)
    found = kept_cross("bpe", teacher).retokenize(PROMPT, ids)
    check("bpe", teacher, found, ids)


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_the_same_tokenizer_uses_every_token(text):
    ids = ids_of("bpe", text)
    found = kept_cross("bpe", "bpe").retokenize(PROMPT, ids)
    np.testing.assert_array_equal(found.token_ids[3:], ids)
    np.testing.assert_array_equal(found.segment_ids, np.arange(len(ids)))


def test_the_worked_example_of_the_docstring():
    student = tokenizer("characters")
    ids = ids_of("characters", "hello hell")
    found = kept_cross("characters", "bpe_large").retokenize(PROMPT, ids)
    spelled = check("characters", "bpe_large", found, ids)
    assert b"".join(spelled) == b"hello hell<END>" and len(spelled) < len(ids) and student.decode(ids).endswith(END)


def test_sentencepiece_adds_no_space_before_the_completion():
    # SentencePiece would tokenize "hello" as " hello".
    ids = ids_of("bpe", "hello lower")
    found = kept_cross("bpe", "sentencepiece").retokenize(PROMPT, ids)
    assert b"".join(check("bpe", "sentencepiece", found, ids)) == b"hello lower<END>"
    for text in (" hello", "  hello", "\nhello"):
        ids = ids_of("bpe", text)
        found = kept_cross("bpe", "sentencepiece").retokenize(PROMPT, ids)
        assert b"".join(check("bpe", "sentencepiece", found, ids)) == f"{text}<END>".encode()


def test_text_that_the_teachers_tokenizer_changes_is_left_out():
    ids = ids_of("bpe", "low Low low")
    found = kept_cross("bpe", "bpe_lowercase").retokenize(PROMPT, ids)
    spelled = b"".join(check("bpe", "bpe_lowercase", found, ids))
    assert b"L" not in spelled and spelled.startswith(b"low") and spelled.endswith(b" low<END>")
    decomposed = ids_of("bpe", "low e\u0301 low")
    found = kept_cross("bpe", "bpe_nfc").retokenize(PROMPT, decomposed)
    spelled = b"".join(check("bpe", "bpe_nfc", found, decomposed))
    assert b"\xcc\x81" not in spelled and spelled.startswith(b"low") and spelled.endswith(b"<END>")


def test_a_truncated_completion_loses_only_its_last_segment():
    ids = ids_of("bpe", "hello lower", end=False)
    found = kept_cross("bpe", "bpe").retokenize(PROMPT, ids)
    np.testing.assert_array_equal(found.segment_ids, [*range(len(ids) - 1), -1])


def test_bytes_that_are_not_utf8_are_left_out():
    half = ids_of("bytes", "a🙂b")
    ids = np.delete(half, 2)  # one of the four bytes
    found = kept_cross("bytes", "bpe").retokenize(PROMPT, ids)
    assert check("bytes", "bpe", found, ids) == [b"a", b"b", b"<END>"]


@pytest.mark.parametrize(
    ("student", "teacher"), [("qwen2.5", "gemma"), ("gemma", "llama3"), ("mistral", "qwen2.5 base")]
)
def test_a_turn_ends_on_both_sides_with_what_the_chat_templates_write(tmp_path, student, teacher):
    """Gemma's end of a turn was once scored as `<eos>`, which never follows a turn."""
    ends, loaded = [], []
    for side in (student, teacher):
        loaded.append(load_tokenizer(write_family(tmp_path / side, FAMILIES[side])))
        ends.append(read_turn_end(tmp_path / side, loaded[-1]))
    both = CrossTokenizer(
        *loaded, student_stop_ids=ends[0].stop_token_ids, teacher_stop_id=ends[1].appended_id, max_length=100
    )
    chats = [
        one.apply_chat_template(
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "72 low"}], return_dict=True
        )["input_ids"]
        for one in loaded
    ]
    # From the answer to the end of the turn, as each template writes it.
    spans = []
    for one, ids, end, side in zip(loaded, chats, ends, (student, teacher), strict=True):
        begin = max(i for i, token_id in enumerate(ids) if one.decode([token_id]) == "7")
        stop = max(i for i, token_id in enumerate(ids) if token_id == id_of(FAMILIES[side], FAMILIES[side].turn_end))
        assert ids[stop] in end.stop_token_ids
        spans.append(ids[begin : stop + 1])
    found = both.retokenize(PROMPT, np.array(spans[0], np.int32))
    assert found.token_ids[3:].tolist() == spans[1]
    assert (found.segment_ids >= 0).all() and (found.teacher_segment_ids >= 0).all()


def test_after_a_special_token_nothing_is_scored():
    end = tokenizer("bpe").eos_token_id
    ids = np.array([*ids_of("bpe", "low", end=False), end, *ids_of("bpe", "low")], np.int32)
    found = kept_cross("bpe", "bpe_large").retokenize(PROMPT, ids)
    assert check("bpe", "bpe_large", found, ids) == [b"lo"]  # "w", cut off by it, is the last
    only = np.array([end, end], np.int32)
    check("bpe", "bpe_large", kept_cross("bpe", "bpe_large").retokenize(PROMPT, only), only)


def test_text_that_spells_a_special_token_stays_text():
    ids = ids_of("bytes", f"low {'<'}end> low"[:4], end=False)
    ids = np.concatenate([ids, [tokenizer("bytes").convert_tokens_to_ids(c) for c in END], ids_of("bytes", " low")])
    found = kept_cross("bytes", "bpe").retokenize(PROMPT, ids.astype(np.int32))
    assert b"".join(check("bytes", "bpe", found, ids)) == b"low <end> low<END>"
    assert list(found.token_ids[3:]).count(tokenizer("bpe").eos_token_id) == 1


def test_long_segments_and_long_sequences_are_left_out():
    ids = ids_of("bpe", "hello lower hello")
    whole = cross("bpe", "bytes").retokenize(PROMPT, ids)
    cut = cross("bpe", "bytes", max_length=10).retokenize(PROMPT, ids)
    assert len(cut.token_ids) == 10 and len(whole.token_ids) == 3 + 18
    assert b"".join(check("bpe", "bytes", cut, ids)) in b"hello lo"
    short = cross("bpe", "bytes", max_segment_tokens=1).retokenize(PROMPT, ids)
    assert all(len(piece) == 1 or piece == b"<END>" for piece in check("bpe", "bytes", short, ids))
    with pytest.raises(ValueError, match="raise the teacher's max_sequence_length"):
        cross("bpe", "bytes", max_length=3).retokenize(PROMPT, ids)


def test_tokenizers_whose_tokens_depend_on_neighbours_are_refused():
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "low": 1, "##er": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece"):
        CrossTokenizer(wrap(words), tokenizer("bpe"), student_stop_ids=[0], teacher_stop_id=0, max_length=10)
    words.decoder = None
    with pytest.raises(ValueError, match="has no decoder, so a token's text depends on its neighbours"):
        CrossTokenizer(wrap(words), tokenizer("bpe"), student_stop_ids=[0], teacher_stop_id=0, max_length=10)
    with pytest.raises(ValueError, match="no fast implementation"):
        CrossTokenizer(object(), tokenizer("bpe"), student_stop_ids=[0], teacher_stop_id=0, max_length=10)


def test_usable_share_on_published_solutions():
    path = pathlib.Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else []
    if not files:
        pytest.skip("no GSM8K beside the project")
    lines = [json.loads(line)["answer"] for line in files[0].read_text().splitlines()[:400]]

    def trained(vocab_size, texts):
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet))
        return wrap(bpe)

    student, teacher = trained(2000, lines[:200]), trained(1200, lines[200:])
    both = CrossTokenizer(
        student, teacher, student_stop_ids=[student.eos_token_id], teacher_stop_id=teacher.eos_token_id, max_length=9999
    )
    shares, alone = [], []
    for line in lines:
        ids = np.array([*student(line)["input_ids"], student.eos_token_id], np.int32)
        found = both.retokenize(PROMPT, ids)
        shares.append(np.mean(found.segment_ids >= 0))
        alone.append(np.mean(np.bincount(found.segment_ids) == 1))
    print(f"usable {np.mean(shares):.4f}, of segments with one student token {np.mean(alone):.3f}")
    assert np.mean(shares) > 0.99
