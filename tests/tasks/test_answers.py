"""The forms in which models write a number, and the number that each is; None where it is none or could be two."""

import re
import unicodedata
from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jdistill.tasks.answers import final_number, read_number

NUMBERS = {
    # Plain numbers.
    "72": "72",
    "72.": "72",
    "72,": "72",
    "72.00": "72",
    "18.50": "18.5",
    ".5": "0.5",
    "007": "7",
    "+5": "5",
    "-5": "-5",
    "-.5": "-0.5",
    "\u22125": "-5",
    "7\u3002": "7",
    # Thousands.
    "1,234": "1234",
    "1,234,567": "1234567",
    "1,234.50.": "1234.5",
    "10 000": "10000",
    "1\u202f234\u202f567": "1234567",
    "1\u00a0234": "1234",
    "1\u2009234.5": "1234.5",
    "1'234": "1234",
    # Other digits.
    "\uff17\uff12": "72",
    "\uff04\uff17\uff12\uff0e\uff15": "72.5",
    "\u0667\u0662": "72",
    # Markdown, quotes, brackets.
    "**72**": "72",
    "**72**.": "72",
    "**72.**": "72",
    "**$72**": "72",
    "**72** dollars": "72",
    "__72__": "72",
    "*72*": "72",
    "* 72": "72",
    "`72`": "72",
    '"72"': "72",
    "[72]": "72",
    "**Answer: 72**": "72",
    "**Answer:** 72": "72",
    "The final answer is 72.": "72",
    "72</answer>": "72",
    "<b>72</b>": "72",
    "72<br>": "72",
    "= 72": "72",
    "x = 72": "72",
    # Money.
    "$72": "72",
    "$ 72": "72",
    "$1,234.50": "1234.5",
    "-$5": "-5",
    "$-5": "-5",
    "72$": "72",
    "72 $": "72",
    "72\u20ac": "72",
    "72 \u20ac": "72",
    "\u20ac72": "72",
    "\u00a372": "72",
    "US$72": "72",
    "USD 72": "72",
    "72 USD": "72",
    "Rs. 72": "72",
    "72\u00a2": "72",
    # Units and words.
    "18 dollars": "18",
    "18 dollars.": "18",
    "18 dollars!": "18",
    "18 (dollars)": "18",
    "18 apples are left, and 'no' pears": "18",
    "18, as shown above": "18",
    "50%": "50",
    "50 %": "50",
    "50 percent": "50",
    "72km": "72",
    "72 km/h": "72",
    "72 m\u00b2": "72",
    "72 m^2": "72",
    "20\u00b0": "20",
    "20 \u00b0C": "20",
    "72\u5186": "72",
    "72 \u2705": "72",
    # LaTeX.
    "$72$": "72",
    "$72$.": "72",
    "$$72$$": "72",
    "\\(72\\)": "72",
    "\\[72\\]": "72",
    "\\$72": "72",
    "$\\$72$": "72",
    "\\text{72}": "72",
    "\\text{72 dollars}": "72",
    "72\\text{ dollars}": "72",
    "72\\,\\text{cm}": "72",
    "72~\\mathrm{cm}": "72",
    "\\mathbf{72}": "72",
    "\\textbf{\\text{72}}": "72",
    "{72}": "72",
    "50\\%": "50",
    "20^\\circ": "20",
    "20^{\\circ}\\text{C}": "20",
    "\\$1{,}234": "1234",
    "1\\,234\\text{ dollars}": "1234",
    "1,\\!234": "1234",
    "\\pounds 72": "72",
}
NONE = [
    # Commas and stops that mean one thing here and another there.
    *("7,2", "7,20", "0,5", "0,123", "1.234,56", "1.234.567", "1 234,56", "12,34,567", "1,2345", "1,234 567", "1 2345"),
    "1,234'567",
    # Several numbers, or a calculation.
    *(
        "18 or 19",
        "18 or more",
        "18 19",
        "18-19",
        "18/3",
        "18 / 3",
        "1/2",
        "2 1/2",
        "3 + 4 = 7",
        "2*36",
        "2* 300",
        "2** 300",
    ),
    *(
        "*2* 300",
        "2^3",
        "7\u00b2",
        "7\u00bd",
        "7 \u00bd",
        "10^2",
        "2x = 72",
        "72x",
        "72 x",
        "72 - x",
        "72/x",
        "72 \u00d7 y",
        "72=x",
        "72!",
    ),
    *("1.2.3", "0.(3)", "3.33...", "3.3\u2026", "7:20", "--5", "-$-5", "7e3", "7.2e3", "72\u03c0", "7i"),
    # Words that make another number of it.
    *(
        "2 dozen",
        "1.5 million",
        "1.5 Million dollars",
        "5 thousand",
        "5k",
        "$5M",
        "72 and a half",
        "2 thirds",
        "7\u4e07",
    ),
    *("72 dollars and fifty cents", "72 point five", "72 squared", "5 mil"),
    # A list, or a heading.
    *("1. Add them", "1: Add them", "1) Add them", "- 5", "Step 1", "#5"),
    # Not exact, or not a number.
    *(
        "~72",
        "\u224872",
        "about 72",
        ">72",
        "seventy-two",
        "",
        "-",
        "$",
        "**",
        "none",
        "(72)",
        "72)",
        "72*",
        "72_",
        "x72",
    ),
    # LaTeX.
    *(
        "\\frac{1}{2}",
        "72\\frac{1}{2}",
        "72\\pi",
        "72\\sqrt{x}",
        "2\\cdot 36",
        "1\\text{234}",
        "1\\,23",
        "2\\boxed{72}",
        "\\text{7}2",
        "7<sup>2</sup>",
    ),
]


@pytest.mark.parametrize(("answer", "number"), [*NUMBERS.items(), *((answer, None) for answer in NONE)])
def test_the_number_that_an_answer_is(answer, number):
    assert read_number(answer) == (None if number is None else Decimal(number))
    assert final_number(f"Add them.\n#### {answer}", "####") == read_number(answer)
    if "boxed" not in answer and answer != "- 5" and answer.count("{") == answer.count("}"):
        assert final_number(f"So it is $\\boxed{{{answer}}}$.", "boxed") == read_number(answer)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 70 + 2 = 72.\n#### 72", "72"),
        ("####72", "72"),
        ("#### 18\nIs that right?", "18"),
        ("#### 17\nNo:\n#### 18", "18"),
        ("####\n18", "18"),
        ("####\n\n**18**", "18"),
        ("####\n\\[\n18\n\\]", "18"),
        ("####\n$$\n18\n$$", "18"),
        ("#### Final Answer\n18", "18"),
        ("#### **Answer:**\n18", "18"),
        ("#### \\boxed{18}", "18"),
        ("####\n1. Add them\n18", None),
        ("####\nSo it is\n18", None),
        ("18", None),  # another format than the one asked for
        ("**Answer: 18**", None),
        ("\\boxed{18}", None),
        ("#### ", None),
        ("#### 18\n#### Check", None),
    ],
)
def test_the_answer_follows_the_last_hashes(text, number):
    assert final_number(text, "####") == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is $\\boxed{72}$.", "72"),
        ("\\boxed{17} no, \\boxed{18}", "18"),
        ("\\boxed{\n72\n}", "72"),
        ("\\boxed{- 5}", "-5"),
        ("\\boxed{1\n234}", None),
        ("\\boxed{\\frac{1}{2}}", None),
        ("\\boxed{72", None),
        ("\\boxed{}", None),
        ("#### 72", None),
    ],
)
def test_the_answer_is_in_the_last_box(text, number):
    assert final_number(text, "boxed") == (None if number is None else Decimal(number))


numbers = st.decimals(-10_000_000, 10_000_000, places=2) | st.integers(-(10**9), 10**9).map(Decimal)


@settings(max_examples=300, deadline=None)
@given(
    number=numbers,
    form=st.sampled_from(
        [form for form, value in NUMBERS.items() if value == "72" and "72" in form and form != "72.00"]
    ),
)
def test_every_form_is_read_for_any_number_or_not_at_all(number, form):
    for text in (f"{number:f}", f"{number:,f}", f"{number:,f}".replace(",", "\u202f")):
        found = read_number(form.replace("72", text))
        # After an opening quote or bracket and before a currency sign a minus may not be one.
        assert found == number or (found is None and number < 0)
        assert found is not None or form not in ("72", "**72**", "$72", "$72$", "72 USD")


pieces = st.sampled_from(
    [
        *"0123456789  ,,..**_$%'-+/^=xkmM()[]{}\n",
        "\u00b2",
        "\u00bd",
        "\u202f",
        "\\text{",
        "\\,",
        "\\",
        " dollars",
        " dozen",
    ]
)


@settings(max_examples=1500, deadline=None)
@given(answer=st.lists(pieces, max_size=9).map("".join))
@example(answer="1\\text{234}")
@example(answer="2** 300")
def test_no_text_is_read_as_another_number(answer):
    """The number has every digit of the text, in one piece, with separators between groups of three alone."""
    if (found := read_number(answer)) is None:
        return
    answer = re.sub(r"(?<=[a-zA-Z])(\^\{?[23]|\u00b2)", "", answer).replace(
        "\\,", "\u202f"
    )  # square metres, thin spaces
    whole, *fraction = re.fullmatch(r"[^0-9.]*([0-9,' \u202f]*[0-9])?(?:\.([0-9]+))?\D*", answer).groups(default="")
    assert abs(found) == Decimal(f"{re.sub('[^0-9]', '', whole)}.{fraction[0]}")
    assert (found < 0) == ("-" in answer.partition((whole or fraction[0])[0])[0]) or not found
    groups = re.split(r"[,' \u202f]", whole.lstrip(",' \u202f"))
    assert len(groups) == 1 or (0 < len(groups[0]) <= 3 and all(len(group) == 3 for group in groups[1:]))
    assert not any(unicodedata.category(c) == "No" for c in answer)


def test_reading_takes_linear_time():
    for piece in ("$ ", " ", "*_", "1,234", "1 ", "\x1f", "answer ", "\\text{", "{", "\n* ", "- ", "1 234 "):
        assert final_number("#### " + piece * 20_000 + "x", "####") is None  # minutes, if it went back
