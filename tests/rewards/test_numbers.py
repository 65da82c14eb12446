"""The number that a text ends on, in every spelling that people and models use, and its one canonical text."""

from __future__ import annotations

import json
import random
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from llmscale.rewards.numbers import canonical, last_number
from llmscale.rewards.rules import final_number

NARROW, THIN, NO_BREAK = "\u202f", "\u2009", "\u00a0"
CASES = {
    # where it stands
    "The answer is 42.": "42",
    "3 apples and 4 pears make 7": "7",
    "9 + 3 = <<9+3=12>>12": "12",
    "(7)": "7", "**42**": "42", "__42__": "42", '"42"': "42", "{42}": "42", "$42$": "42", "x=5": "5", "42!": "42",
    "[1, 2]": "2",
    "in 1999, it was": "1999",
    "<answer>42</answer>": "42",
    "...5": "5", "No.5": "5", "Wait... 5...": "5", "5 -": "5", "the ratio 3 to 4": "4",
    # separators and decimals
    "1,234,567 people": "1234567", "1,234.50": "1234.5", "$1,000.50": "1000.5", "1_000_000": "1000000",
    "1'234'567.8": "1234567.8",
    f"1{NO_BREAK}234{NARROW}567{THIN}890": "1234567890", "100 000": "100000", "1 200 000 people": "1200000",
    "10{,}000": "10000", "10\\,000": "10000", "1,\\!234": "1234", "12,34,567": "1234567", "€1.234,50": "1234.5",
    "1.234.567": "1234567",
    "2.500": "2.5", "10.0": "10", "100": "100", "007": "7", ".5": "0.5", "-.5": "-0.5", "3.14159...": "3.14159",
    "1.000": "1",
    "1, 2, 3": "3", "12,34": "34", "1,2345": "2345", "1,234,56": "56", "100 200": "200", "1 234": "234",
    # signs
    "-7": "-7", "−7": "-7", "–7": "-7", "+7": "7", "x = -0.50": "-0.5", "(-3)": "-3", "[-3, -4]": "-4",
    "3-(-4)": "-4", "-$5": "-5",
    "$-5": "-5", "x = - 7": "-7", "negative 7": "-7", "it is minus 7": "-7", "-0": "0", "-0.00": "0",
    "-1,234": "-1234",
    "8-3": "3", "from 3-5": "5", "3–5": "5", "3 - 4": "4", "10 minus 7": "7", "GPT-4": "4", "COVID-19": "19",
    "- 7 apples": "7",
    # fractions
    "3/4": "0.75", "1/3": "1/3", "2/6": "1/3", "6/2": "3", "-1/2": "-0.5", "0/5": "0", "1 / 2": "0.5",
    "1,234/2": "617", "1.5/2": "0.75",
    "1 1/2": "1.5", "-1 1/2": "-1.5", "5 3/4 inches": "5.75", "½": "0.5", "1½ cups": "1.5", "⅔": "2/3", "3⁄4": "0.75",
    "\\frac{3}{4}": "0.75", "-\\frac{3}{4}": "-0.75", "\\frac{-3}{4}": "-0.75", "\\dfrac34": "0.75",
    "1\\frac{1}{2}": "1.5",
    "2 \\frac{1}{3}": "7/3", "$\\frac{1}{2}$": "0.5", "\\tfrac{1,000}{3}": "1000/3", "2/3 of 9 is 6": "6",
    "1/1024": "0.0009765625",
    "12/25/2023": "2023", "1/2/2020": "2020", "2023-05-01": "1", "1/0": None, "5 and 1/0": None,
    # units
    "42 km": "42", "42km": "42", "15%": "15", "12.5 %": "12.5", "60 km/h": "60", "$5/day": "5", "\\$1,200": "1200",
    "£3.20": "3.2",
    "USD1,200": "1200", "x = EUR 5": "5", "\\(-7\\)": "-7", "$.50": "0.5", "3 - -2": "-2", "|−5|": "-5", "-3^2": "-9",
    "25 cm^2": "25", "25 m²": "25", "25 m^{2}": "25", "1st": "1", "90°": "90", "7/8\"": "0.875", "5k": "5",
    # scientific, powers
    "1.5e3": "1500", "2E-4": "0.0002", "1e-7": "0.0000001", "3 x 10^8": "300000000",
    "3 \\times 10^{8} m/s": "300000000",
    "3×10⁸": "300000000", "1.5·10^{−3}": "0.0015", "10^6": "1000000", "10^-3": "0.001", "2^10": "1024", "5²": "25",
    "1e5x": "1",
    # scripts
    "٤٢": "42", "４２": "42",
    # no number
    "no number": None, "": None, "x2": None, "H2O": None, "x_1": None, "x_{12}": None, "x^2": None, "a2 b3": None,
}  # fmt: skip


@pytest.mark.parametrize(("text", "number"), CASES.items())
def test_final_number(text: str, number: str | None):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is \\boxed{42}, as step 3 says", "42"),
        ("\\boxed{\\frac{3}{4}} of 9", "0.75"),
        ("\\boxed{x = 5} or not, 6", "5"),
        ("\\boxed{3} then \\boxed{4}, and 5", "4"),
        ("\\boxed{\\text{none}} but 5", "5"),
        ("\\boxed{1,234\\text{ km}}. 7", "1234"),
        ("\\boxed{5", "5"),
        ("some 3 steps\n#### 18", "18"),
        ("#### 18\nQuestion: Tom has 5 apples", "18"),
        ("#### $1,200.50 \nand 7 more", "1200.5"),
        ("#### -3 apples.\n7", "-3"),
        ("#### Step 2\nso it is 9", "9"),  # a heading
        ("#### 2. Compute\nit is 9", "9"),
        ("#### 2) Compute\nit is 9", "9"),
        ("#### 5\n\\boxed{6}", "6"),
        ("#### 18.\n\n7", "18"),
        ("#### \\frac{1}{3}\n7", "1/3"),
    ],
)
def test_a_marked_answer_goes_before_the_last_number(text: str, number: str):
    assert final_number(text) == number


@pytest.mark.realdata
def test_every_reference_of_grade_school_mathematics(shared_data: Path):
    """What stands behind "####" is what is read out of the whole solution."""
    for file in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        lines = (shared_data / "math" / file).read_text(encoding="utf-8").splitlines()
        assert len(lines) > 1000
        for solution in (json.loads(line)["answer"] for line in lines):
            number = solution.rpartition("####")[2].strip().replace(",", "")
            assert final_number(solution) == canonical(Fraction(number))


def spellings(value: Fraction, rng: random.Random) -> list[str]:
    """Ways to write a number."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    top, bottom = size.numerator * (k := rng.randint(1, 9)), size.denominator * k
    found = [f"{sign}{top}/{bottom}", f"{sign}\\frac{{{top}}}{{{bottom}}}", f"\\frac{{{sign}{top:,}}}{{{bottom}}}"]
    if size > 1 and size.denominator > 1:
        whole, rest = divmod(size.numerator, size.denominator)
        found += [f"{sign}{whole} {rest}/{size.denominator}", f"{sign}{whole}\\frac{{{rest}}}{{{size.denominator}}}"]
    if 10**6 % size.denominator == 0:  # a decimal of at most six places
        plain = format(Decimal(size.numerator) / Decimal(size.denominator), "f")
        whole, point, places = plain.partition(".")
        found += [f"{sign}{plain}", f"{sign}{int(whole):,}{point}{places}", f"−{plain}" if sign else f"+{plain}"]
        found += [
            f"{sign}${plain}",
            f"{sign}{plain}%",
            f"\\boxed{{{sign}{plain}}}",
            f"{sign}{plain}000" if point else f"{sign}{plain}.0",
        ]
        found += [
            f"{sign}{int(whole):_}{point}{places}",
            f"{sign}{size * 10**7 // 1}e-7",
            f"{sign}{size * 10**7 // 1} × 10^{{-7}}",
        ]
    return found  # fmt: skip


def test_equal_numbers_are_equal_texts_and_others_are_not():
    rng = random.Random(0)
    seen: dict[str, Fraction] = {}
    for _ in range(500):
        value = Fraction(
            rng.randint(-(10 ** rng.randint(0, 7)), 10 ** rng.randint(0, 7)),
            rng.choice([1, 2, 3, 7, 8, 12, 100, 10**6]),
        )
        text = canonical(value)
        assert seen.setdefault(text, value) == value, "one text, one number"
        for spelt in spellings(value, rng):
            for around in ("{}", "The answer is {}.", "{} apples", "#### {}", "so ({})"):
                assert final_number(around.format(spelt)) == text, around.format(spelt)


def test_the_canonical_text_is_itself_and_exact():
    rng = random.Random(1)
    for _ in range(2000):
        value = Fraction(rng.randint(-(10**12), 10**12), rng.choice([1, 2**20, 5**9, 10**15, 3, 7 * 10**4]))
        assert final_number(canonical(value)) == canonical(value)
        assert Fraction(canonical(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        *(
            "1" * 50_000,
            "1,111" * 20_000,
            "1 " * 50_000,
            "1/" * 50_000,
            "1 1/" * 30_000,
            "1.111" * 20_000,
            "2^" * 50_000,
        ),
        *("\\frac{" * 20_000, "\\boxed{" * 20_000, "\\boxed{" * 500 + "1" + "}" * 500, "#### 1 1 1" * 9_000),
        *("1" + " " * 99_999 + "2", "-" * 99_999, "#### 1\n" * 9_000),
    ],
)
def test_long_texts_take_no_time(text: str):
    started = time.process_time()
    final_number(text)
    assert time.process_time() - started < 3


def test_a_number_beyond_all_measure_is_none():
    assert last_number("9" * 5000) is None and last_number("9^999") is None
    assert final_number("1e999") == "1" + "0" * 999
