r"""Reads the number that a solution gives as its answer, in the ways in which models write it.

A form is read as the one number that it can mean, or as none: `7,2`, `1.234,56`, `2 dozen` and `3-5` are no numbers. So
the number's digits are the only digits of the answer, and nothing before or after them may change their value.
"""

from __future__ import annotations

import decimal
import re
import unicodedata
from typing import Literal

AnswerFormat = Literal["####", "boxed"]

# Stands for markup that was taken away. Whitespace, but no thousands separator: `1\text{234}` is not 1234.
_MARK = "\x1f"
_OPENERS = "*_`\"'\u201c\u2018[{"
_CLOSERS = "*_`\"'\u201d\u2019]}"
_CURRENCY = r"(?:US|A|C|NZ|HK|S)?[$€£¥₹₩₽]|(?:USD|EUR|GBP|JPY|INR|CAD|AUD|CHF|CNY|Rs\.?)(?![a-z])"
_NUMBER = re.compile(
    rf"""
    (?P<before>
        [\s${re.escape(_OPENERS)}]*+
        (?: (?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*+[:=]? [\s$*_]*+ )?
        (?: (?:[a-z]\s*+)?= )?
        [\s${re.escape(_OPENERS)}]*+
        (?P<sign>[-+](?!\s))?+ (?:(?:{_CURRENCY})\s*+)? [${re.escape(_OPENERS)}]*+ (?P<inner_sign>[-+](?!\s))?+
    )
    (?P<digits>
        # Groups of three after commas, spaces (also no-break and thin ones) or apostrophes.
        [1-9][0-9]{{0,2}} (?: (?:,[0-9]{{3}})++ | (?:[ \u00a0\u2009\u202f][0-9]{{3}})++ | (?:['\u2019][0-9]{{3}})++ )
        (?:\.[0-9]+)?
        | [0-9]++ (?:\.[0-9]+)?
        | \.[0-9]+
    )
    (?P<after> .*+ )
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
# What may follow: closing markup, then nothing, a full stop at the end, or a unit. A full stop and words may not:
# `1. Add` is the first item of a list.
_AFTER = re.compile(
    rf"(?P<close>[\s${re.escape(_CLOSERS)}]*+)"
    rf"(?: [.,;:\u3002]?+[\s${re.escape(_CLOSERS)}]*+ | ,?+[\s$]*+(?P<unit>[(\w%°€£¥₹₩₽¢\u2705\u2713\u2714].*+) )",
    re.VERBOSE | re.DOTALL,
)
# Words that make another number of the digits before them.
_NUMBER_WORDS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds hundredth hundredths "
    "thousand thousands thousandth thousandths million millions millionth billion billions trillion trillions dozen "
    "dozens gross half halves third thirds fourth fourths fifth fifths tenth tenths twice double doubled triple "
    "squared cubed factorial point or mil mille mln mrd bn lakh lakhs crore crores".split()
)
_VARIABLES = frozenset({"x", "y", "z", "n", "i", "e", "k", "K", "M", "B", "T", "π"})
_MARKUP = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\[,;: ]|(?<=\w)~(?=[\w\\])|\\q?quad(?![a-z])"), "\u2009"),
    (re.compile(r"\\([$%€£])"), r"\1"),
    (re.compile(r"\\pounds(?![a-z])"), "£"),
    (re.compile(r"\^\{?\\circ\}?|\\degree(?![a-z])"), "°"),
    (re.compile(r"\\[()\[\]]|\$\$|\n|</?[A-Za-z]+/?>"), _MARK),
    (
        re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|operatorname|boxed|fbox)\s*\{([^{}]*)\}"),
        rf"{_MARK}\1{_MARK}",
    ),
)
# What may stand on the lines between `####` and the number: delimiters of mathematics, or a heading.
_LEAD = re.compile(
    r"(?:\s|\$\$|\\\[|[*_]+(?=\s)|[*_]*(?:the )?(?:final )?answer(?: is)?[*_:]*[ \t]*\n)*", re.IGNORECASE
)


def final_number(text: str, answer_format: AnswerFormat) -> decimal.Decimal | None:
    r"""Returns the number after the last `####`, or in the last `\boxed{}`; None if there is none to read.

    After `####` it is on the same line or on the next one with text. It does not fall back to the last number of the
    text, which would reward a format that the prompt did not ask for.
    """
    if answer_format == "boxed":
        boxed = _last_boxed(text)
        # In mathematics a space after the sign says nothing; in plain text `- 5` may be an item of a list.
        return None if boxed is None else read_number(re.sub(r"^\s*([-+])\s+", r"\1", boxed))
    _, marker, rest = text.rpartition("####")
    if not marker:
        return None
    lead = _LEAD.match(rest)
    assert lead is not None
    return read_number(rest[lead.end() :].partition("\n")[0])


def read_number(answer: str) -> decimal.Decimal | None:
    """Returns the number that an answer is, with its currency or unit; None if it is not one number."""
    match = _NUMBER.fullmatch(_plain(answer))
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    after = _AFTER.fullmatch(match["after"])
    if after is None or not _closes(match["before"], after["close"]) or not _is_unit(after["unit"] or ""):
        return None
    value = decimal.Decimal(re.sub(r"[^0-9.]", "", match["digits"]))
    return -value if "-" in (match["sign"], match["inner_sign"]) else value


def _plain(answer: str) -> str:
    """Returns the answer with ASCII digits, without the markup of LaTeX and HTML."""
    digits = (str(unicodedata.decimal(c)) if c.isdecimal() else c for c in answer)
    # U+2212 is the minus sign of typeset text; the others are full-width forms.
    text = "".join(digits).translate(str.maketrans("\u2212\uff0d\uff0b\uff0c\uff0e\uff04\uff05", "--+,.$%"))
    before = None
    while before != text:  # braces within braces: from the innermost outwards
        before = text
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
    return text.strip()


def _closes(before: str, close: str) -> bool:
    """Returns whether each closing mark closes an open one: in `2*` nothing was open."""
    opened = before.translate(str.maketrans(_OPENERS, _CLOSERS))
    return all(close.count(mark) <= opened.count(mark) for mark in _CLOSERS)


def _is_unit(text: str) -> bool:
    """Returns whether text after a number leaves its value as it is."""
    text = re.sub(r"(?<=[^\W\d_])(?:[²³]|\^\{?[23]\}?)", "", text)  # square metres
    if any(unicodedata.category(c).startswith("N") for c in text):
        return False
    words = re.findall(r"[^\W\d_]+", text)
    if any(word.lower() in _NUMBER_WORDS for word in words) or re.search("[十百千万萬亿億]", text):
        return False
    return not words or words[0] not in _VARIABLES


def _last_boxed(text: str) -> str | None:
    """Returns the content of the last `\\boxed{...}` with balanced braces; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return None
