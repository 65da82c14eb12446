"""Which number a text ends on, and one spelling for each number.

Read are: thousands separators (1,234,567; 12,34,567; 1_000; 1'000; thin and no-break spaces; 100 000; LaTeX's {,} and \\,;
and points where a decimal comma or a second group settles it: 1.234.567,89), decimals (.5 too), signs (ASCII, Unicode minus,
en dash, "negative 7", "= - 7"), fractions (3/4, 1 1/2, ½, \\frac{3}{4}, \\frac34), scientific notation (1.5e3, 3 x 10^8,
3 \\times 10^{8}, 10⁸) and powers (2^10). What stands around a number is a unit and left out: $1,200.50 is 1200.5, 42 km is 42,
15% is 15.

Not read, because a person would not either: a number that is part of a word (x2, H2O), an exponent of a unit (cm^2), a
sign that joins (8-3, GPT-4). A lone comma is never a decimal one (3,5 is a list), 5/12/2023 is no fraction, and 2 million is 2.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

MAX_DIGITS = 1000  # what is longer is no number: Python's int() gives up at 4300 digits

_SIGN = r"[-+\u2212\u2010\u2011\u2013\uFE63\uFF0D]"
_GROUP = r"[,_'’\u00a0\u2009\u202f]"  # a plain space only where 000 follows: 100 200 is two numbers
_WHOLE = rf"(?:\d{{1,3}}(?:[ ]\d{{3}})*[ ]000(?!\d)|\d{{1,3}}(?:{_GROUP}\d{{3}})+(?!\d)|\d{{1,2}}(?:,\d\d)+,\d{{3}}(?!\d)|\d+)"
# Points in groups of three, where a comma with decimals or a second group shows that they are no decimal points.
_EUROPEAN = r"\d{1,3}(?:(?:\.\d{3})+,\d+(?![\d,])|(?:\.\d{3}){2,}(?![\d.]))"
_PLAIN = rf"(?:{_EUROPEAN}|{_WHOLE}(?:\.\d+)?|(?<![\w.])\.\d+)"
_FRAC = rf"\\[dt]?frac\s?(?:\{{\s?({_SIGN}?{_PLAIN})\s?\}}\s?\{{\s?({_SIGN}?{_PLAIN})\s?\}}|(\d)\s?(\d))"
_TIMES = r"\s?(?:[xX×*·⋅]|\\times|\\cdot)\s?"
_EXPONENT = rf"\^\s?\{{?\s?({_SIGN}?\d{{1,3}})(?!\d)\s?\}}?"
# Not inside a word, a version (1.2.3), an exponent or an index (a letter and an underscore make one); after a currency's code.
_CODES = "USD|EUR|GBP|JPY|CNY|INR|CHF|AUD|CAD"
_START = rf"(?:(?<={_CODES})|(?<![^\W_])(?<![^\W_]_)(?<!\d\.)(?<!\^)(?<![_^]\{{))"
_NUMBER = re.compile(
    rf"""{_START}(?P<sign>(?<![\w)\]}}]){_SIGN})?(?:\\?[$€£¥₹]\s?(?P<sign2>{_SIGN})?)?
    (?:
        (?P<mixed>\d+)?(?(mixed)\s{{0,2}}){_FRAC}
      | (?P<whole>\d+)\s{{1,2}}(?P<over>\d+)\s?[/⁄∕]\s?(?P<under>\d+)(?![\d/⁄∕.,]*\d)
      | (?<!\d/)(?P<top>{_PLAIN})\s{{0,2}}[/⁄∕]\s{{0,2}}(?P<bottom>{_PLAIN})(?!\s?/\s?\d)
      | (?P<plain>{_PLAIN})(?:[eE](?P<e>{_SIGN}?\d{{1,3}})(?!\w)|{_TIMES}10\s?{_EXPONENT}|{_EXPONENT})?
    )""",
    re.VERBOSE,
)
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SPOKEN_SIGN = re.compile(
    r"(?:\bnegative\s{1,3}|(?:^|[^\d\s)\]}])\s{0,3}\bminus\s{1,3}|[=≈]\s{0,3}[-\u2212\u2013]\s{1,3})$", re.I
)


def last_number(text: str) -> Fraction | None:
    """The value of the last number in the text; None without one, or where it is none after all, as 1/0."""
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\,", "\u2009").replace("\\ ", " ")
    text = re.sub("[¼-¾⅐-⅞]", lambda m: f" {unicodedata.normalize('NFKC', m[0])}", text)  # 1½ -> 1 1⁄2
    text = re.sub("[⁰¹²³⁴-⁹⁻⁺]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPT)}}}", text)
    match = next(iter(deque(_NUMBER.finditer(text), maxlen=1)), None)
    value = _value(match) if match is not None else None
    if match is None or value is None:
        return None
    return -value if _SPOKEN_SIGN.search(text, max(0, match.start() - 20), match.start()) else value


def canonical(value: Fraction) -> str:
    """One text for each number: a decimal without needless zeros where it ends, else the reduced fraction: 1234.5, -7, 0.75,
    1/3. So 3/4, 0.75 and 75e-2 are one text, and no digit is lost."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    text = f"{digits[:-places]}.{digits[-places:]}" if places else digits
    return f"-{text}" if value < 0 else text


def _value(match: re.Match[str]) -> Fraction | None:
    """None for what is no number after all: a division by zero, or far too long."""
    if len(match[0]) > MAX_DIGITS:
        return None
    numbers = dict(_parts(match))
    if numbers.get("bottom") == 0:
        return None
    value = numbers["top"] / numbers.get("bottom", Fraction(1)) + numbers.get("whole", Fraction(0))
    power = numbers.get("power")
    if power is not None:
        if (value == 0 and power < 0) or len(match[0]) * abs(power) > MAX_DIGITS:
            return None
        value = value ** int(power)
    value *= Fraction(10) ** int(numbers.get("ten", 0))
    signs = [s for s in (match["sign"], match["sign2"]) if s]
    return -value if sum(s != "+" for s in signs) % 2 else value


def _parts(match: re.Match[str]) -> Iterator[tuple[str, Fraction]]:
    """The numbers that a match is made of, by what they do."""
    frac_top, frac_bottom, digit_top, digit_bottom, ten, power = (match[g] for g in _UNNAMED)
    named = {
        "whole": match["mixed"] or match["whole"],
        "top": match["over"] or match["top"] or match["plain"] or frac_top or digit_top,
        "bottom": match["under"] or match["bottom"] or frac_bottom or digit_bottom,
        "ten": match["e"] or ten,
        "power": power,
    }
    return ((name, _read(text)) for name, text in named.items() if text is not None)


_NAMED = set(_NUMBER.groupindex.values())
_UNNAMED = [g for g in range(1, _NUMBER.groups + 1) if g not in _NAMED]


def _read(text: str) -> Fraction:
    negative = text[0] in "-\u2212\u2010\u2011\u2013\ufe63\uff0d"
    text = text.lstrip("-+\u2212\u2010\u2011\u2013\ufe63\uff0d")
    if re.fullmatch(_EUROPEAN, text):
        text = text.replace(".", "").replace(",", ".")
    value = Fraction(Decimal(re.sub(f"{_GROUP}| ", "", text)))
    return -value if negative else value
