"""What models and people wrote, made fit to be shown."""

from __future__ import annotations

import unicodedata

# Control characters (a terminal obeys them) and halves of characters (a file name has them where
# it is not UTF-8; nothing can write them).
_SPELLED = ("Cc", "Cs")


def visible(text: str) -> str:
    r"""A text in which all is seen and nothing is obeyed.

    Markup is not touched: what reads markup (rich, matplotlib, a browser) must be told that this is
    none, or have it escaped.

    Args:
        text: a model's output, or the name of a file or folder.

    Returns:
        The text with control characters spelled as in a Python string.

    Example:
        >>> print(visible("a\tb\x1b[31m [red]"))
        a\tb\x1b[31m [red]
    """
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _SPELLED else c
        for c in text
    )
