"""Writes the stored results into README.md, between its markers: `python -m bench.readme`.

Nothing is measured here. A test holds README.md to the stored results.
"""

from __future__ import annotations

import json
import re

from bench import common

README = common.RESULTS.parent.parent / "README.md"


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = "|".join(["---", *["---:"] * (len(header) - 1)])
    lines = ["| " + " | ".join(header) + " |", f"|{rule}|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _setting(setting: dict[str, str]) -> str:
    parts = (f"jax {setting['jax']}", f"Python {setting['python']}", setting["date"])
    return f"{setting['device']}; {', '.join(parts)}"


def host_cpu(result: dict) -> str:
    """The table of `make bench`."""

    def milliseconds(row: dict, of: str) -> str:
        t = row[f"{of} ms"]
        return f"{t['median']:.1f} ({t['low']:.1f}-{t['high']:.1f})"

    rows = [
        [
            f"`{row['objective']}`",
            milliseconds(row, "dense"),
            milliseconds(row, "fused"),
            f"{row['times faster']:.1f}",
            f"{row['dense temporaries / TV']:.2f}",
            f"{row['fused temporaries / TV']:.2f}",
        ]
        for row in result["rows"]
    ]
    header = ["", "dense, ms", "fused, ms", "times faster", "dense, TV held", "fused, TV held"]
    return (
        '`make bench`: value and gradient, T = 8 x 64, V = 32128, float32, `implementation="xla"`\n'
        "beside T5Patches' formula in plain jnp, both jitted, in one run; median (quartiles); TV:\n"
        f"one [T, V] float32 array held beyond inputs and outputs.\n"
        f"{_setting(result['setting'])}.\n\n" + _table(header, rows)
    )


SECTIONS = {"host-cpu": host_cpu}


def rendered(text: str) -> str:
    """`text` with every section whose result is stored brought up to date."""
    for name, render in SECTIONS.items():
        path = common.RESULTS / f"{name}.json"
        if path.exists():
            body = render(json.loads(path.read_text()))
            block = f"<!-- {name} -->\n{body}\n<!-- end -->"
            pattern = rf"<!-- {name} -->\n.*?<!-- end -->"
            text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
