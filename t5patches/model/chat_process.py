"""The process in which a folder's chat template runs: a program from a stranger.

It reads a template, then a conversation a line, and writes a text a line. Jinja's sandbox keeps the
template from Python's insides; that it ends, and fits into memory, the process does: each rendering
has so many seconds, after which the process is killed by the system.

This file is run by its path and imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import resource
import signal
import sys
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_BYTES = 2**30  # of memory


class _Generation(Extension):
    """`{% generation %}` tells trainers which part the model says; here it is that part."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja has it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """The names and settings that templates in model folders are written for."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    found.filters["tojson"] = _to_json
    found.globals["raise_exception"] = _raise
    return found


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Without the escapes of HTML that Jinja's own has."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def main() -> None:
    """Answers until nobody asks.

    The first line of the standard input is an object with `template`, `seconds` and `characters`;
    each other one holds the `names` that the template is given, and the time that it is told.
    Each is answered by a line, an object with `text` or `error`.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):  # where a system has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    template: Any = None
    limits: dict[str, Any] = {}
    for line in sys.stdin:
        asked, text = json.loads(line), ""
        limits = limits or asked
        signal.setitimer(signal.ITIMER_REAL, limits["seconds"])
        try:
            if template is None:
                template = environment().from_string(asked["template"])
            else:
                now = datetime.datetime.fromisoformat(asked["now"])
                text = template.render(asked["names"] | {"strftime_now": now.strftime})
            if len(text) > limits["characters"]:
                raise ValueError(f"it makes a text of {len(text)} characters")
            said = {"text": text}
        except SecurityError as error:
            said = {"error": f"it does what no template may: {error}"}
        except Exception as error:  # of any kind: it is the template's
            words = " ".join(str(error).split())[:300]
            said = {"error": f"{type(error).__name__}: {words}" if words else type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
