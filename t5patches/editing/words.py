r"""What a word is, in any script: letters and digits with the marks that combine with them.

`\w` of `re` has no combining marks, and so cuts words of Hindi, and "café" where its accent is a
character of its own. Thai, Lao, Burmese, Khmer, Japanese and Chinese put no spaces between words:
there each character stands for one.
"""

from __future__ import annotations

import itertools
import re
import unicodedata

_BEHIND_THE_MARKS = 0x20000  # all further ones are variation selectors


def _marks() -> str:
    """Unicode's combining marks in ranges, but those that only choose how a character looks."""
    numbers = [
        number
        for number in range(_BEHIND_THE_MARKS)
        if unicodedata.category(chr(number)).startswith("M") and not 0xFE00 <= number <= 0xFE0F
    ]
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ranges = ([number for _, number in run] for _, run in runs)
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in ranges)


MARKS = _marks()
"""Combining marks, to stand in a character class of `re`."""

UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese
    "\u3100-\u312f\u31a0-\u31bf\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese
)
"""Scripts that put no spaces between words, to stand in a character class of `re`."""

WORD = re.compile(rf"[^\W_](?:[^\W_]|[{MARKS}'’\-])*")
"""A word with the apostrophes and hyphens in it."""

_UNSPACED_CHARACTER = re.compile(rf"(?=[{UNSPACED}])\w[{MARKS}]*")
_LETTERS_AND_DIGITS = re.compile(rf"(?:[^\W_]+[{MARKS}]*)+")


def spaced(text: str) -> str:
    """Puts spaces around the characters of scripts that have none between words.

    Args:
        text: in any scripts.

    Returns:
        The text; the same where it has no such characters.

    Example:
        >>> spaced("in 東京, Japan").split()
        ['in', '東', '京', ',', 'Japan']
    """
    return _UNSPACED_CHARACTER.sub(r" \g<0> ", text)


def words(text: str) -> list[str]:
    """The words of a text to compare them by.

    Args:
        text: in any scripts.

    Returns:
        Runs of letters, their marks and digits, in small letters and in one spelling (NFC) each;
        single characters in scripts without spaces.

    Example:
        >>> words("The mayor's 2nd café")
        ['the', 'mayor', 's', '2nd', 'café']
    """
    return _LETTERS_AND_DIGITS.findall(spaced(unicodedata.normalize("NFC", text.lower())))
