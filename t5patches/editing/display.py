"""What models and people wrote, made fit to be shown."""

from __future__ import annotations

import unicodedata

# Control characters (a terminal obeys them), halves of characters (a file name has them where it is
# not UTF-8; nothing can write them), ends of lines and paragraphs, and what gives a text its form
# without being seen: it may turn what stands beside it round, or hide in it.
_SPELLED = ("Cc", "Cs", "Zl", "Zp", "Cf")
# Of the last, scripts and emoji need the two joiners, and some signs of Arabic and Syriac are seen.
_SHOWN = frozenset("\u200c\u200d\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2")


def visible(text: str) -> str:
    r"""A text in which all is seen and nothing is obeyed.

    Markup is not touched: what reads markup (rich, matplotlib, a browser) must be told that this is
    none, or have it escaped.

    Args:
        text: a model's output, or the name of a file or folder.

    Returns:
        The text with control characters, and others that are not seen, spelled as in a Python
        string.

    Example:
        >>> print(visible("a\tb\x1b[31m [red] \u202ec"))
        a\tb\x1b[31m [red] \u202ec
    """
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in _SPELLED and c not in _SHOWN
        else c
        for c in text
    )
