"""Writes the stored results into README.md and bench/README.md, between their markers.

    python -m bench.readme
    python -m bench.readme --demo demo-report/results.json   # takes in a demo's results first

Nothing is measured here. A test holds both to the stored results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import re
import textwrap
from collections.abc import Callable

from bench import answers as answers_
from bench import common
from bench import defaults as defaults_
from bench.frontier_real import ADAPTER
from bench.kl_estimates import KINDS, summary
from bench.t5x_step import VARIANTS as T5X_VARIANTS
from bench.tpu_static import CORES, PUSHED
from bench.tutorial import COMMANDS

DOCUMENTS = (common.RESULTS.parent.parent / "README.md", common.RESULTS.parent / "README.md")


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = "|".join(["---", *["---:"] * (len(header) - 1)])
    lines = ["| " + " | ".join(header) + " |", f"|{rule}|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _setting(setting: dict[str, str]) -> str:
    parts = (f"jax {setting['jax']}", f"Python {setting['python']}", setting["date"])
    return f"{setting['device']}; {', '.join(parts)}"


def _measured(
    caption: str, setting: dict[str, str], header: list[str], rows: list[list[str]]
) -> str:
    """A table under what it shows and what its figures depend on."""
    text = textwrap.fill(f"{caption} {_setting(setting)}.", 99, break_on_hyphens=False)
    return f"{text}\n\n{_table(header, rows)}"


def _stored(name: str) -> dict:
    """A stored result."""
    return json.loads((common.RESULTS / f"{name}.json").read_text())


def _whose(variant: str) -> str:
    """A variant of T5X's step in words."""
    return "T5Patches" if variant == "upstream" else variant


def cpu(result: dict) -> str:
    """README's table of `make bench`: medians."""
    rows = []
    for row in result["rows"]:
        if row["memory"] == "fresh" and row["objective"] in ("tnff", "tnrr", "tnrf"):
            times = (f"{row[f'{what} ms']['median']:.1f}" for what in ("dense", "fused"))
            held = (f"{row[f'{what} temporaries / TV']:.2f}" for what in ("dense", "fused"))
            rows.append([f"`{row['objective']}`", *times, *held])
    return _measured(
        "`make bench`: 512 tokens, V = 32128, float32, streaming XLA beside T5Patches' formula in "
        "plain jnp (dense), median; in a process that reuses its memory the times are "
        "[closer](bench/README.md#losses-on-a-cpu). Arrays held: float32, as large as the logits, "
        "beyond inputs and outputs.",
        result["setting"],
        ["", "dense, ms", "fused, ms", "dense: arrays held", "fused: arrays held"],
        rows,
    )


def host_cpu(result: dict) -> str:
    """The whole table of `make bench`."""
    kept = {row["objective"]: row for row in result["rows"] if row["memory"] == "kept"}
    rows = []
    for row in result["rows"]:
        if row["memory"] == "kept":
            continue
        shown = [f"`{row['objective']}`"]
        for of in (row, kept[row["objective"]]):
            shown += [str(common.Timing(**of[f"{k} ms"])) for k in ("dense", "fused", "entries")]
            shown.append(f"{of['times faster']:.1f}")
        rows.append([*shown, *(f"{row[f'{k} temporaries / TV']:.2f}" for k in ("dense", "fused"))])
    times = ["dense, ms", "fused, ms", "entries, ms", "times faster"]
    header = ["", *times, *(f"reused: {x}" for x in times), "dense, TV", "fused, TV"]
    return _measured(
        '`make bench`: value and gradient, T = 8 x 64, V = 32128, float32, `implementation="xla"` '
        "beside T5Patches' formula in plain jnp, both jitted, in one run; median (quartiles); TV: "
        "one [T, V] float32 array held beyond inputs and outputs. Entries: the exponentials and "
        "the logarithm alone, in one elementwise pass with a fresh result. Reused: a process that "
        "reuses its memory, where by default it gets new pages for each result and temporary.",
        result["setting"],
        header,
        rows,
    )


def tpu(result: dict) -> str:
    """README's table of `make bench-tpu-static`: two chips, the least and the most arithmetic."""
    chips = ("v4", "v6e")
    found = {(r["chip"], r["objective"], r["dtype"], r["V"]): r for r in result["rows"]}
    v, rows = common.VOCABULARIES["T5"], []
    for name, dtype in itertools.product(("tnff", "tnrf"), ("float32", "bfloat16")):
        of = {chip: found[chip, name, dtype, v] for chip in chips}
        passes, ratios = (
            [f"{row[k]:{digits}}" for row in of.values()]
            for k, digits in (("passes", ".3g"), ("ratio", ".2f"))
        )
        fewest = f"{min(_dense_passes(of)):.3g}"
        rows.append([f"`{name}` {dtype} {v}", *passes, fewest, *ratios])
    header = ["", *(f"{chip}: passes" for chip in chips), "dense XLA: passes",
              *(f"{chip}: compute / copies" for chip in chips)]  # fmt: skip
    head = next(
        r
        for r in _stored("tpu_linear")["rows"]
        if (r["chip"], r["objective"], r["V"]) == ("v4", "tnff", common.VOCABULARIES["mT5"])
    )
    return _measured(
        "`make bench-tpu-static`: **static figures of the TPU compiler; nothing ran on a TPU.** "
        "2048 tokens. Passes: how often an array as large as the logits is read or written; dense "
        "XLA: the fewest of both chips, in bfloat16 of v6e alone. Compute / copies: a block's "
        "time, one row pushed down, over that of its copies, without stalls; below 1 the kernel "
        f"waits for memory. From hidden states (v4, V = {head['V']}, {head['T']} tokens): "
        f"{head['chunked_copies_ms']:.0f} ms of copies and "
        f"{head['accumulator_gb'] + head['beyond_gb']:.1f} GB, dense "
        f"{head['dense_copies_ms']:.0f} ms and {head['dense_gb']:.1f} GB.",
        result["setting"],
        header,
        rows,
    )


def tpu_static(result: dict) -> str:
    """The whole table of `make bench-tpu-static`: compute over copies, by chip and objective."""
    found = {(r["chip"], r["objective"], r["dtype"], r["V"]): r for r in result["rows"]}
    chips = [chip for chip in CORES if any(key[0] == chip for key in found)]
    programs = itertools.product(
        (*common.OBJECTIVES, *common.ALONE),
        ("float32", "bfloat16"),
        sorted({r["V"] for r in result["rows"]}),
    )
    rows = []
    for name, dtype, v in programs:
        of = {chip: row for chip in chips if (row := found.get((chip, name, dtype, v)))}
        if not of:
            continue
        passes = sorted({_passes(r) for r in of.values()})
        dense = sorted(_dense_passes(of))
        first = of.get(chips[0], {})
        more = first.get("cycles_of_32_edits_over_1", 0)
        masked = first.get("masked_over_unmasked", 0)
        rows.append(
            [
                f"`{name}` {dtype} {v}",
                "-".join(passes),
                "-".join(f"{x:g}" for x in dict.fromkeys((*dense[:1], *dense[-1:]))),
                *(_ratio(of.get(chip)) for chip in chips),
                f"{masked:.1f}" if masked else "",
                f"{more / first['cycles']:.1%}" if more else "",
            ]
        )
    header = ["", "passes", "XLA on the dense formula", *chips,
              f"masked over unmasked, {chips[0]}", f"32 edits over one, {chips[0]}"]  # fmt: skip
    return _measured(
        "`make bench-tpu-static`: **static, ahead of time, by the TPU compiler; nothing ran on "
        "a TPU.** Value and gradient, T = 2048: passes over [T, V] arrays, and for each chip the "
        "time of a block's instructions over that of its copies: below 1 the kernel is at the "
        "memory roofline. After it the least that these instructions need, the busiest unit of "
        "the core never idle. Kept: a block of kept tokens only, where others have one that is "
        "pushed down; mean: of both, as often as they are where 4% of the tokens are, anywhere. "
        "Blocks without edits, and without masked entries beyond the last "
        "128 columns: the last columns are how many times as long a block with such entries takes, "
        "which is done twice, and what 32 edits on 4% of the tokens add to the instructions of one "
        "edit on each of those. In parentheses: with logits that are the program's arguments, "
        "which XLA copies where V is not a multiple of 128. Passes of XLA on the dense formula: "
        "fewest and most of the chips, in bfloat16 without v4. Clocks and bandwidths as published "
        "or assumed; no stalls counted; tpu7x has no published clock.",
        result["setting"],
        header,
        rows,
    )


def _dense_passes(of: dict[str, dict]) -> set[float]:
    """XLA's passes on the dense formula, by chip.

    Without v4 in bfloat16: that count has copies through the chip's other memory in it.
    """
    return {
        r["dense_passes"]
        for chip, r in of.items()
        if "dense_passes" in r and (chip, r["dtype"]) != ("v4", "bfloat16")
    }


def _passes(row: dict) -> str:
    """Where rows are no whole number of 128 entries: of logits that a product has made here."""
    given = f"{row['passes']:.3g}"
    return f"{row['passes_made']:.3g} ({given})" if "passes_made" in row else given


def _ratio(row: dict | None) -> str:
    if row is None:
        return ""
    if "ratio" not in row:
        return f"{row['cycles']:.0f} cycles"
    least = f" ≥ {row['least_ratio']:.2f}" if "least_ratio" in row else ""
    shown = f"{row['ratio']:.2f}{least}"
    if "kept_over_pushed" in row:
        (kernel,) = row["kernels"].values()
        kept = row["kept_over_pushed"] * row["ratio"]
        share = (1 - PUSHED) ** kernel["rows"]  # of blocks
        shown += f", kept {kept:.2f}, mean {share * kept + (1 - share) * row['ratio']:.2f}"
    return shown


def tpu_linear(result: dict) -> str:
    """The table of heads of `make bench-tpu-static`."""
    rows = [
        [
            f"{row['chip']}, `{row['objective']}`, T = {row['T']}, D = {row['D']}, V = {row['V']}",
            f"{row['accumulator_gb']:.2f} + {row['beyond_gb']:.3f}",
            f"{row['dense_gb']:.2f}",
            f"{row['chunks']} x {row['rows']}",
            *(f"{row[f'{k}_ms']:.1f}" for k in ("chunked_copies", "products", "dense_copies",
                                                "in_kernel_products")),
        ]
        for row in sorted(result["rows"], key=lambda row: [*CORES].index(row["chip"]))
    ]  # fmt: skip
    header = ["bfloat16", "held, GB", "dense, GB", "chunks", "copies, ms", "products, ms",
              "dense: copies, ms", "in-kernel: products, ms"]  # fmt: skip
    return _measured(
        "From hidden states to the loss and both gradients, **static** too. Held: the float32 "
        "gradient of the kernel, and what is held beyond it; dense: XLA on whole float32 logits. "
        "Copies are the compiler's count of bytes at the chip's bandwidth, products the matrix "
        "unit's at its full rate: each the least that its part can take.",
        result["setting"],
        header,
        rows,
    )


def gpu_static(result: dict) -> str:
    """The table of `make bench-gpu-static`."""
    rows = [
        [
            f"`{r['objective']}` {r['dtype']}",
            f"{r['dense passes']:g}",
            f"{r['xla passes']:g}",
            f"{r['dense temporaries']:.3f}",
            f"{r['xla temporaries']:.4f}",
            str(r["registers"]),
            str(r["spilled bytes"]),
        ]
        for r in result["rows"]
        if "registers" in r
    ]
    header = ["", "dense, passes", "XLA, passes", "dense, TV held", "XLA, TV held",
              "kernel's registers", "spilled"]  # fmt: skip
    return _measured(
        "`make bench-gpu-static`: **static, ahead of time, compiled for an H200.** Value and "
        "gradient, T = 2048, V = 32128: passes over [T, V] arrays counted in the optimised "
        "program, and what it holds; registers and spilled bytes of the Mosaic GPU kernel.",
        result["setting"],
        header,
        rows,
    )


def gpu_clusters(result: dict) -> str:
    """The table of `python -m bench.gpu_static --clusters`."""
    rows = [
        [
            f"`{r['objective']}` {r['dtype']} {r['vocabulary']}",
            f"{r['passes, one block']:.2f}" if "passes, one block" in r else "",
            f"{r['passes']:.2f}",
            str(r["cluster"]),
            str(r["blocks an SM"]),
            f"{sum(r['shared memory'].values()) / 2**10:.0f}",
            str(r["registers"]),
            str(r["spilled bytes"]),
        ]
        for r in result["rows"]
    ]
    header = ["", "one block's passes", "a cluster's passes", "blocks a row", "blocks an SM",
              "KB a block", "registers", "spilled"]  # fmt: skip
    return _measured(
        "`python -m bench.gpu_static --clusters`: **static; no cluster has run on a card.** Value "
        "and gradient of rows that `BlockSizes()` spreads over a cluster of thread blocks: the "
        "plan's passes over [T, V] arrays, beside those of one block a row (which takes at most "
        "262144 columns), and its blocks; registers and spilled bytes as compiled for an H200.",
        result["setting"],
        header,
        rows,
    )


GPU_PROGRAMS = {
    "dense": "dense, ms",
    "torch": "torch.compile, ms",
    "xla": "streaming XLA, ms",
    "pallas_gpu": "kernel, ms",
}


def _timed_on_gpu(result: dict, tokens: int) -> dict[tuple, dict[str, dict]]:
    """What was timed at so many tokens with the kernel among it, by shape and program."""
    keys = ("objective", "dtype", "vocabulary", "tokens")
    found: dict[tuple, dict[str, dict]] = {}
    for row in (*result["rows"], *_stored("gpu-torch")["rows"]):
        found.setdefault(tuple(row[k] for k in keys), {})[row["what"]] = row
    return {of: at for of, at in found.items() if of[3] == tokens and "pallas_gpu" in at}


def _gpu_times(of: tuple, at: dict[str, dict]) -> list[str]:
    times = (f"{at[name]['ms']:.3g}" if name in at else "" for name in GPU_PROGRAMS)
    return ["`{}` {} {}".format(*of), *times]


def gpu(result: dict) -> str:
    """README's table of `make bench-gpu-table`: times."""
    of_t5 = [common.VOCABULARIES[name] for name in ("T5", "mT5")]
    timed = _timed_on_gpu(result, 8192)
    rows = [_gpu_times(of, at) for of, at in timed.items() if of[2] in of_t5]
    linear = _stored("gpu-linear")
    head = {(r["objective"], r["what"]): r for r in linear["rows"]}
    dense, ours = (head["tnff", what] for what in ("dense", "pallas_gpu"))
    return _measured(
        "`make bench-gpu-table`: 8192 tokens, device time, median; T5Patches' formula in JAX "
        "(dense) and by `torch.compile`, streaming XLA and an earlier kernel. From hidden states "
        f"at V = {dense['vocabulary']} (`tnff`, bfloat16): {ours['ms']:.0f} ms and "
        f"{ours['temporary_bytes'] / 2**30:.1f} GiB, dense {dense['ms']:.0f} ms and "
        f"{dense['temporary_bytes'] / 2**30:.1f} GiB. Empty: not timed.",
        result["about"],
        ["", *GPU_PROGRAMS.values()],
        rows,
    )


def _gpu_table(caption: str, result: dict, tokens: int) -> str:
    """What was timed on a card at so many tokens: each program beside the others."""
    rows = []
    for of, at in _timed_on_gpu(result, tokens).items():
        ours = at["pallas_gpu"]
        rows.append(
            [
                *_gpu_times(of, at),
                f"{at['dense']['ms'] / ours['ms']:.1f}",
                f"{at['xla']['ms'] / ours['ms']:.2f}",
                f"{ours['gb_per_second'] / result['about']['copy_gb_per_second']:.0%}",
                *(
                    f"{at[k]['temporary_bytes'] / 2**20:.1f}"
                    for k in ("dense", "xla", "pallas_gpu")
                ),
            ]
        )
    header = ["", *GPU_PROGRAMS.values(), "dense / kernel", "XLA / kernel", "of a copy's speed",
              "dense, MiB", "XLA, MiB", "kernel, MiB"]  # fmt: skip
    return _measured(caption, result["about"], header, rows)


def gpu_all(result: dict) -> str:
    """The whole table of `make bench-gpu-table`."""
    speed = result["about"]["copy_gb_per_second"]
    return _gpu_table(
        "`make bench-gpu-table`: value and gradient of T = 8192 tokens, device time, median; "
        "T5Patches' formula in JAX and by `torch.compile`, streaming XLA and an earlier kernel. Of "
        "a copy's speed: two arrays read and one written, in the kernel's time, over a "
        f"device-to-device copy in the same process ({speed:.0f} GB/s). "
        "MiB: held beyond inputs and outputs.",
        result,
        8192,
    )


def gpu_fewer_tokens(result: dict) -> str:
    """More of it."""
    return _gpu_table("`make bench-gpu-table`, the same for T = 2048.", result, 2048)


def gpu_linear(result: dict) -> str:
    """The head's part of `make bench-gpu-table`."""
    rows = [
        [
            f"`{row['objective']}` {row['what']}",
            f"{row['ms']:.1f} ({row['least']:.1f}-{row['most']:.1f})",
            f"{row['temporary_bytes'] / 2**20:.0f}",
        ]
        for row in result["rows"]
    ]
    of = result["rows"][0]
    return _measured(
        f"`make bench-gpu-table`, hidden states to loss and both gradients, T = {of['tokens']}, "
        f"D = {of['width']}, V = {of['vocabulary']}, bfloat16: logits whole (dense), or made in "
        "chunks of 512 MiB and given to streaming XLA or the kernel. Milliseconds, median "
        "(least-most); MiB beyond inputs and outputs.",
        result["about"],
        ["", "ms", "MiB held"],
        rows,
    )


def real(result: dict) -> str:
    """README's table of `make real`, and texts."""
    shown = {"kl": 4, "prevalence": 1, "prevalence_sampled": 1, "exact_match_clean": 1}
    habits = {
        "about": "talks *about* the article",
        "names": "says *names* that are not in it",
    }
    parts = ("annotate", "edit", "evaluate")
    rows = []
    for row in result["rows"]:
        name = f"{row['habit']}: {row['edit'] or 'before'}"
        measures = row["measures"]
        numbers = (
            f"{measures[k]['value']:.{n}f}" if k in measures else "" for k, n in shown.items()
        )
        rows.append([name, *numbers, f"{row['perplexity']:.2f}"])
    minutes = sum(row.get(f"{part}_s", 0.0) for row in result["rows"] for part in parts) / 60
    peak = max(row.get(f"{part}_gib", 0.0) for row in result["rows"] for part in parts)
    first = next(row["edit"] for row in result["rows"] if row["edit"])
    found = " and ".join(
        habits[name] for name in dict.fromkeys(row["habit"] for row in result["rows"])
    )
    table = _measured(
        f"`make real`: asked for a sentence about news, SmolLM2-135M-Instruct {found}. After "
        f"{result['steps']} updates (UL: {result['steps'] // 4}) of an adapter on its sampled "
        f"outputs (`--lora 8`, alpha 3, batches of 8), by {result['measured']} other articles: "
        "KL at unmarked tokens, unwanted outputs (greedy ± 6, sampled ± 3), clean ones that stayed "
        "word for word, perplexity of other news. Most names stay: they come from anywhere. "
        f"{minutes:.0f} minutes, {peak:.1f} GiB.",
        result["setting"],
        ["", "KL", "unwanted, %", "sampled, %", "clean kept, %", "perplexity"],
        rows,
    )
    text = result["rows"][0]["texts"][0]
    before, after = (" ".join(text[name].split()) for name in ("before", first))
    return f"{table}\n\nBefore, and after {first}:\n\n> {before}\n>\n> → {after}"


def demo(result: dict) -> str:
    """The whole table of `make demo`."""
    shown = {"kl": "KL", "prevalence": "unwanted, %", "prevalence_sampled": "sampled, %",
             "exact_match_clean": "clean kept, %", "reference_exact": "good, %", "bleu": "BLEU",
             "malformed": "malformed, %"}  # fmt: skip

    def cell(measures: dict, name: str) -> str:
        if name not in measures:
            return ""
        digits = 4 if name == "kl" else 1
        value, error = (measures[name][k] for k in ("value", "error"))
        return f"{value:.{digits}f} ± {error:.{digits}f}"

    named = [("before", result["before"]), *((r["name"], r["measures"]) for r in result["rows"])]
    rows = [[name, *(cell(measures, m) for m in shown)] for name, measures in named]
    return _measured(
        "`make demo`: a tiny T5 that names places its source does not name, edited on its own "
        "marked outputs; KL from the original on unmarked positions; clean kept: outputs that had "
        "nothing unwanted and stayed word for word; good: a summary without inventions; BLEU with "
        f"the original's outputs; standard errors {result['errors']}.",
        result["setting"],
        ["", *shown.values()],
        rows,
    )


def frontier(result: dict) -> str:
    """The tables of `make frontier`."""
    return _frontier(
        "`make frontier SEEDS=3`: the task of `make demo`, each method at some strengths, weak to "
        "strong.",
        result,
        column="good: one of the four wordings of the summary without inventions",
        tuning="3000 new pairs, Adam at 1e-4",
        shown="pairs as they come, habit and all",
        unshown="pairs whose news say where it happened, which do not show it",
    )


def frontier_real(result: dict) -> str:
    """The tables of `make frontier-real`, habit by habit."""

    def trained(settings: dict) -> str:
        return (
            f"{settings['optimizer'].capitalize()} at {settings['learning_rate']:g}, or for an "
            f"adapter, of rank {ADAPTER['rank']} and merged before it is measured, at "
            f"{ADAPTER['learning_rate']:g}"
        )

    return _of_habits(result, "make frontier-real", "each edit", trained)


def frontier_adapters(result: dict) -> str:
    """The tables of `bench.frontier_real --adapters`."""

    def trained(settings: dict) -> str:
        optimizer = settings["optimizer"].capitalize()
        return f"{optimizer} at {ADAPTER['learning_rate']:g}, and is merged before it is measured"

    command = "python -m bench.frontier_real --adapters --habits about"
    return _of_habits(result, command, f"an adapter of rank {ADAPTER['rank']}", trained)


def _of_habits(result: dict, command: str, edit: str, trained: Callable[[dict], str]) -> str:
    """The tables of a pretrained model's habits."""

    def updates(row: dict) -> str:
        numbers = [point["updates"] for of in row["rows"] for point in of["points"]]
        return f"{min(numbers)} to {max(numbers)} updates"

    return "\n\n".join(
        _frontier(
            f"`{command}`, the habit *{row['habit']}*: {edit} makes {updates(row)} "
            f"on outputs to {row['settings']['edit_inputs']} pieces of news, "
            f"{trained(row['settings'])}; all is measured on "
            f"{row['settings']['held_out']} others, with {row['settings']['samples']} sampled "
            "outputs to each.",
            row | {"setting": result["setting"] | {k: row[k] for k in ("date", "commit")}},
            column="malformed: not at its end after 20 tokens",
            tuning=f"{row['settings']['later']} of the model's own outputs, "
            f"{row['settings']['optimizer'].capitalize()} at {row['settings']['learning_rate']:g}",
            shown="outputs as they come, habit and all",
            unshown="outputs without it",
        )
        for row in result["rows"]
    )


def _frontier(
    caption: str,
    result: dict,
    *,
    column: str,
    tuning: str,
    shown: str,
    unshown: str,
) -> str:
    """Closeness where as much is left, then one point a method."""

    def number(measure: list | None, digits: int, *, error: bool = True) -> str:
        if measure is None or measure[0] is None:
            return ""
        told = f"{measure[0]:.{digits}f}"
        return told if not error or measure[1] is None else f"{told} ± {measure[1]:.{digits}f}"

    def listed(texts: list[str]) -> str:
        return "\n".join(
            textwrap.fill(f"- {text}", 99, subsequent_indent="  ", break_on_hyphens=False)
            for text in texts
        )

    def paragraph(text: str) -> str:
        return textwrap.fill(text, 99, break_on_hyphens=False)

    rows = result["rows"]
    curves = _measured(
        f"{caption} "
        "The least KL from the original, at unmarked positions, with which at most 10, 5 and 2% of "
        "sampled outputs have something unwanted (between two strengths by a line in log KL; "
        "empty: not reached). Elsewhere: the same over the unmarked positions where the original "
        "gave less than 1% to all tokens together that begin something unwanted. Then how "
        "much was left at each strength. ± standard errors "
        f"{result['errors']}.",
        result["setting"],
        ["", *(f"KL, {x}% left" for x in rows[0]["at"]),
         *(f"elsewhere, {x}% left" for x in rows[0]["elsewhere"]), "sampled, %"],
        [
            [row["method"], *(number(kl, 4) for kl in row["at"].values()),
             *(number(kl, 5) for kl in row["elsewhere"].values()),
             " / ".join(number(x["prevalence_sampled"], 1, error=False) for x in row["points"])]
            for row in rows
        ],
    )  # fmt: skip
    closest = {"prevalence_sampled": ("sampled, %", 1), "kl": ("KL", 4),
             "kl_needed": ("of it needed", 4), "kl_elsewhere": ("KL elsewhere", 5),
             "exact_match_clean": ("clean kept, %", 1), "reference_exact": ("good, %", 1),
             "bleu": ("BLEU", 1), "malformed": ("malformed, %", 1),
             "seconds": ("s", 0)}  # fmt: skip
    after = {"distinct_1": ("words, %", 2), "distinct_2": ("pairs, %", 2),
             "repetition": ("repeated, %", 2), "prevalence_relearned": ("relearned, %", 1),
             "prevalence_stated": ("came back, %", 1), "prevalence_int4": ("4 bits, %", 1),
             "kl_int4": ("4 bits, KL", 4)}  # fmt: skip
    models = [("before", result["before"]), ("before, constrained", result["ceiling"]),
              *((row["method"], row["further"]) for row in rows)]  # fmt: skip

    def table(columns: dict[str, tuple[str, int]], named: list) -> str:
        columns = {k: v for k, v in columns.items() if any(k in of for _, of in named)}
        return _table(
            ["", *(heading for heading, _ in columns.values())],
            [[name, *(number(of.get(k), digits) for k, (_, digits) in columns.items())]
             for name, of in named],
        )  # fmt: skip

    near = paragraph(
        "Of each method the point nearest to 2% left. Clean kept: outputs that had nothing "
        f"unwanted and stayed word for word; {column}; BLEU with the original's outputs. "
        "Constrained: the original, decoded so that nothing unwanted can be said; its KL is 0 by "
        "definition, as its weights are the original's. Needed: the part of the KL that is the "
        "removal itself, where the original might have said something unwanted and did not (KL "
        "between whether the one and the other begin such a thing)."
        + " s: seconds of training."
        * any("seconds" in row["further"] for row in rows)
    )
    then = paragraph(
        "The same points: different words and pairs of words in the sampled outputs, pairs that "
        "stood in the same output before; then what is unwanted when sampled after one epoch of "
        f"ordinary fine-tuning ({tuning}) on {shown} (relearned), and on {unshown} (came back), "
        "and after rounding all matrices to 4 bits (symmetric, a scale for 32 numbers), with the "
        "KL of that."
    )
    found = [
        curves, listed(result["said"]), "And by the KL elsewhere:",
        listed(result["said_elsewhere"]), near, table(closest, models),
    ]  # fmt: skip
    if any(k in row["further"] for row in rows for k in after):
        found += [then, table(after, [models[0], *models[2:]])]
    return "\n\n".join(found)


def kl_estimates(result: dict) -> str:
    """The table of `python -m bench.kl_estimates`."""
    several = result["seeds"] > 1

    def cell(of: dict, name: str, digits: int) -> str:
        mean, error = of[name]
        return f"{mean:.{digits}f}" + f" ± {error:.{digits}f}" * several

    columns = {"divergence share": 2, "divergence variance": 2, "all variance": 2, "kl": 3,
               "score": 2}  # fmt: skip
    rows = []
    for kind in KINDS:
        of = summary(result["rows"], kind)
        rows.append([kind, *(cell(of, name, digits) for name, digits in columns.items())])
    over = f"Mean and standard error over {result['seeds']} seeds." if several else "One seed."
    settings = result["settings"]
    return _measured(
        "`python -m bench.kl_estimates`: the loop of `t5patches align` on the demo's model, "
        f"{settings['steps']} steps of {settings['inputs_per_step']} inputs with "
        f"{settings['samples']} outputs each, LoRA of rank {settings['lora']['rank']}, coefficient "
        f"{settings['kl_coefficient']:g}; only the divergence in the loss differs. Gradients: of "
        f"{settings['batches']} batches of {settings['update_size']} outputs sampled where the "
        "exact one ends; how much of the exact mean gradient is in the mean one (1 is right), and "
        "variances, summed over parameters, in units of the squared length of the exact mean. KL "
        "in nats a token and score (the share of summaries without a place of their own), means "
        f"over the last five steps. {over}",
        result["setting"],
        ["", "of the KL: share", "of the KL: variance", "of all: variance", "KL reached", "score"],
        rows,
    )


def rewards(result: dict) -> str:
    """The table of `make bench-rewards`."""
    shown = {"score_mean": 2, "prevalence_sampled": 1, "prevalence": 1, "kl": 4,
             "exact_match_clean": 1}  # fmt: skip
    rows = []
    for row in result["rows"]:
        found = row["measures"]
        rows.append([
            f"{row['habit']}: {row['way'] or 'before'}",
            *(
                f"{found[k]['value']:.{n}f} ± {found[k]['error']:.{n}f}" if k in found else ""
                for k, n in shown.items()
            ),
            f"{row['tokens']} + {row['rollouts']}" if row["way"] == "edit" else
            str(row.get("tokens", "")),
            f"{row['seconds'] / 60:.0f}" if row["way"] else "",
            f"{row['gib']:.1f}" if row["way"] else "",
        ])  # fmt: skip
    minutes = sum(row["seconds"] for row in result["rows"]) / 60
    return _measured(
        f"`make bench-rewards`: SmolLM2-135M-Instruct, {result['inputs']} inputs to learn from and "
        f"{result['measured']} others to measure: mean score of {result['samples']} sampled "
        "outputs to each; unwanted by the rule, sampled and greedy; KL from the original at "
        "unmarked tokens; clean outputs that stayed word for word. ± standard errors over inputs. "
        "Tokens that the model said to learn from (+ rollouts of alternatives); all minutes of the "
        f"way; the most that it held. {minutes:.0f} minutes in all.",
        result["setting"],
        ["", "score", "sampled, %", "greedy, %", "KL", "clean kept, %", "tokens", "minutes", "GiB"],
        rows,
    )


def answers(result: dict) -> str:
    """The table of `python -m bench.answers`."""
    settings = result["settings"]
    shown = [answers_.cells(row) for row in result["rows"]]
    rows = [[row["name"], *of.values()] for row, of in zip(result["rows"], shown, strict=True)]
    was, now = next(row["example"] for row in result["rows"] if row["name"] == answers_.SHOWN)
    table = _measured(
        f"`python -m bench.answers`: {settings['updates']} updates each, Adam, learning rate "
        f"{settings['learning_rate']:g}; {result['held_out']} held-out inputs. Unwanted, and "
        "unwanted when sampled: as above. Of the inputs where the original named a place that the "
        'news does not: the share that is answered, and that stops. The same where it said "in the '
        'area", and where it named the place that the news states: there an answer is wrong. Clean '
        "kept: of outputs with nothing unwanted, word for word. KL from the original at unmarked "
        "tokens. ± standard errors over inputs.",
        result["setting"],
        ["", *shown[0]],
        rows,
    )
    return f"{table}\n\n> {was}\n>\n> → {now}"


def defaults(result: dict) -> str:
    """The table of `python -m bench.defaults`."""
    names = dict.fromkeys(row["name"] for row in result["rows"])
    seeds = len({row["seed"] for row in result["rows"]})
    shown = {name: defaults_.cells(defaults_.summary(result["rows"], name)) for name in names}
    over = f", ± over {seeds} orders of the data" if seeds > 1 else ""
    return _measured(
        f"`python -m bench.defaults --seeds {seeds}`: the tutorial's edit (TNRF, sets of all "
        "alternatives tried, Adafactor at 0.001, 100 updates of 32 examples), and the same with "
        f"one option changed; the same 600 held-out inputs for all{over}.",
        result["setting"],
        ["", *next(iter(shown.values()))],
        [[name, *cells.values()] for name, cells in shown.items()],
    )


def tutorial(result: dict) -> str:
    """The four commands and what they printed."""
    of_four = result["rows"][: len(COMMANDS)]
    return (
        "`make tutorial` runs these commands and prints this.\n"
        f"{_setting(result['setting'])}.\n\n" + _console(of_four, of_four)
    )


def rounds(result: dict) -> str:
    """The commands of a second round and what the last one printed."""
    rows = result["rows"][len(COMMANDS) :]
    return (
        "`make tutorial` runs these commands too.\n"
        f"{_setting(result['setting'])}.\n\n" + _console(rows, rows[-1:])
    )


def _console(rows: list[dict], printed: list[dict]) -> str:
    lines = []
    for row in rows:
        lines.append(f"$ {row['command']}")
        if row in printed:
            lines += [*(line.rstrip() for line in row["printed"]), ""]
    return "```console\n" + "\n".join(lines).rstrip() + "\n```"


def ignored(result: dict) -> str:
    """Ignored tokens on a CPU."""
    shares = [name for name in result["rows"][0] if name.endswith(" / not")]
    rows = [
        [
            f"{row['of']}, `{row['objective']}`, {row['V']}",
            f"{row['not skipping ms']['median']:.0f}",
            *(f"{row[name]:.2f}" for name in shares),
        ]
        for row in result["rows"]
    ]
    return _measured(
        "`python -m bench.ignored`: value and gradient, 1024 tokens (hidden states: D = 512), "
        "float32; medians, and with `skip_ignored` the share of the time without it. Where half of "
        "the tokens are ignored, it is every other one, or 64 of 128 in a row. The zeros alone: a "
        "program that makes those of the gradients and does nothing else.",
        result["setting"],
        [
            "",
            "not skipping, ms",
            *(name.removesuffix(" / not").replace("all", "none ignored") for name in shares),
        ],
        rows,
    )


def heads(result: dict) -> str:
    """Heads on a CPU."""
    rows = []
    for row in result["rows"]:
        shown = [f"{row['head']}: D = {row['D']}, V = {row['V']}"]
        for name in ("dense", "fused", "fused, 16 MiB"):
            tokens = row.get(f"{name} tokens")
            shown.append(f"{row[f'{name} ms']['median']:.0f}")
            shown.append(f"{row[f'{name} GiB']:.2f}" + (f" ({tokens} tokens)" if tokens else ""))
        rows.append(shown)
    return _measured(
        "`python -m bench.heads`: value and gradient of `tnff`, to hidden states and kernel, 512 "
        "tokens, float32; medians, and what is held beyond inputs and outputs, in GiB. Dense: "
        "T5Patches' formula on whole logits. Fused: chunks as the loss makes them by itself, and "
        "of 16 MiB; in brackets how many tokens that is.",
        result["setting"],
        ["", "dense, ms", "GiB", "fused, ms", "GiB", "fused, 16 MiB, ms", "GiB"],
        rows,
    )


def edit_small(result: dict) -> str:
    """The table of `make bench-edit`."""
    shown = {
        "edit s": ("edit, s", 0),
        "training s": ("of it training, s", 0),
        "peak GiB": ("process at its largest, GiB", 2),
        "working GiB": ("one update beside parameters, GiB", 2),
    }
    rows = [
        [f"{row['losses']} losses", *(f"{row[k]:.{digits}f}" for k, (_, digits) in shown.items())]
        for row in result["rows"]
    ]
    before, after = result["load"]
    return _measured(
        "`make bench-edit`: `t5patches edit` of a T5 1.1 small (77 million parameters, random "
        "weights), 20 updates of 8 examples of 128 and 64 tokens, TNRF, Adafactor, from reading "
        "the folder to the edited one; dense: `--implementation reference`. Processes that took "
        f"turns, medians of {result['turns']}; load of the machine {before:.1f} before and "
        f"{after:.1f} after.",
        result["setting"],
        ["", *(n for n, _ in shown.values())],
        rows,
    )


def _decoder_update(row: dict, adapter: str = "adapter") -> str:
    """What an update of `make bench-decoder` is of, in words."""
    trained, layers, *original = row["variant"]
    of = {"all": "all parameters", "LoRA": adapter}[trained]
    return ", ".join((of, f"layers {layers}", *(f"original {x}" for x in original)))


def decoder(result: dict) -> str:
    """The measured part of `make bench-decoder`."""
    rows: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["what"] not in ("update", "speak"):
            continue
        name = "8 outputs of 32 tokens"
        if row["what"] == "update":
            name = _decoder_update(row, f"an adapter of rank {result['rank']}")
        rows.setdefault(name, [name]).extend((f"{row['seconds']:.1f}", f"{row['working GiB']:.2f}"))
    before, after = result["load"]
    updates = _measured(
        "`make bench-decoder`: SmolLM2-135M's shape, random weights, float32. An update of TNFF "
        f"with Adam, {result['batch']} examples of {result['prompt']} and {result['output']} "
        "tokens, beside the same in torch, transformers and peft on whole logits of the outputs, "
        "with its gradient checkpointing where ours runs layers again; below it greedy outputs. "
        "Seconds: medians of 3; GiB: the process at its largest, without what it had imported, "
        f"parameters, original and optimizer. Load of the machine {before:.1f} before and "
        f"{after:.1f} after.",
        result["setting"],
        ["", "ours, s", "ours, GiB", "torch, s", "torch, GiB"],
        list(rows.values()),
    )
    return updates + _decoder_parts(result)


def _decoder_parts(result: dict) -> str:
    """Where those updates' seconds go, where that was measured."""
    from bench.decoder import PARTS

    columns = (*PARTS, "sum", "update")
    rows = [
        [f"{row['library']}: {_decoder_update(row)}", *(f"{row[x]:.2f}" for x in columns)]
        for row in result["rows"]
        if row["what"] == "parts"
    ]
    if not rows:
        return ""
    return "\n\n" + _measured(
        "Seconds of the parts of these updates, medians of 3. Network: of the model being trained, "
        "forward and backward; head and loss: with their gradients. Torch's update is timed as it "
        "goes; ours is one program, and each part one of its own, so that their sum need not be "
        "the update's. For a cached original both are given its hidden states, torch in memory.",
        result["setting"],
        ["", *columns],
        rows,
    )


def decoder_memory(result: dict) -> str:
    """Its static part."""
    rows: dict[tuple, list[str]] = {}
    for row in result["rows"]:
        if row["what"] != "memory":
            continue
        key = row["shape"], *row["variant"]
        name = f"{row['shape']}: {_decoder_update(row)}"
        rows.setdefault(key, [name]).extend(f"{row[k]:.2f}" for k in ("working", "total"))
    return _measured(
        "`make bench-decoder`: what such an update holds by XLA's figures for this CPU, nothing "
        "run, GiB: working is beside parameters, original and optimizer. The original's states are "
        "live, or read from a cache; dense: `--implementation reference`.",
        result["setting"],
        ["", "working", "in all", "dense: working", "dense: in all"],
        list(rows.values()),
    )


def t5x_step(result: dict) -> str:
    """The table of `make bench-t5x`, this machine's part."""
    rows = []
    for row in result["rows"]:
        for variant in T5X_VARIANTS:
            t = row[f"{variant} ms"]
            rows.append(
                [
                    f"{row['objective']}, {_whose(variant)}",
                    f"{t['median'] / 1e3:.2f} ({t['low'] / 1e3:.2f}-{t['high'] / 1e3:.2f})",
                    f"{row[f'{variant} temporaries MiB']:.0f}",
                    f"{row[f'{variant} constants MiB']:.0f}",
                    f"{row[f'{variant} compile s']:.0f}",
                ]
            )
    header = ["", "step, s", "temporaries, MiB", "constants, MiB", "compiling, s"]
    return _measured(
        "`make bench-t5x`: a whole training step of T5X's trainer, T5 1.1 small in float32, batch "
        "of 8 x (64 + 64) tokens, Adafactor, in turns in one run, median (quartiles); load of the "
        f"machine {result['load']:.0f}. Fused head: with `t5patches.network` in place of T5X's.",
        result["setting"],
        header,
        rows,
    )


def t5x_step_static(result: dict) -> str:
    """The table of `make bench-t5x`, the TPU compiler's part."""
    shown = ("arguments", "program", "temporaries", "peak", "all")
    rows = [
        [
            f"{row['objective']}, {_whose(row['variant'])}",
            *(f"{row[f'{name} GiB']:.2f}" for name in shown),
            f"{row['compile s']:.0f}",
        ]
        for row in sorted(
            result["rows"], key=lambda r: (r["objective"], T5X_VARIANTS.index(r["variant"]))
        )
    ]
    return _measured(
        "**Static, by the TPU compiler for one v4; nothing ran on a TPU.** The step of T5 1.1 "
        "base in bfloat16, batch of 32 x (64 + 64), in GiB; all: arguments, outputs that take no "
        "argument's place, temporaries and program. T5Patches' program holds the original as "
        "constants (by their size in bfloat16); ours gets it as a float32 argument, which a mesh "
        "splits like the model.",
        result["setting"],
        ["", *shown, "compiling, s"],
        rows,
    )


def teacher_cache(result: dict) -> str:
    """The table of `make bench-teacher`."""
    from bench.teacher_cache import VARIANTS, shown

    header = ["T5 1.1", "update", "ms", "times plain", "GFLOP", "times plain"]
    rows = [[row["size"], name, *shown(row, name)] for row in result["rows"] for name in VARIANTS]
    return _measured(
        "`make bench-teacher`: one update of 8 x 64 tokens, plain fine-tuning beside TNRF with "
        "the original model run live and read from a cache. Milliseconds on this machine, in "
        "turn in one process; operations by the TPU compiler for "
        f"{result['rows'][0]['chip']}, ahead of time, but for those that are compiled for "
        "tokens of different cotangents and never run here.",
        result["setting"],
        header,
        rows,
    )


def pods(result: dict) -> str:
    """The table of `make bench-pods`."""
    from bench import pods

    last = max((row["setting"] for row in result["rows"]), key=lambda setting: setting["date"])
    days: dict[str, set[str]] = {}
    for row in result["rows"]:
        days.setdefault(_whose(row["variant"]), set()).add(row["setting"]["date"])
    compiled = (f"{whose}, {' to '.join(sorted({min(x), max(x)}))}" for whose, x in days.items())
    return _measured(
        "`make bench-pods`: **static, ahead of time, by the TPU compiler; nothing ran on a TPU.** "
        "T5X's step of TNRF on v4 slices, inputs of 512 tokens and targets of 128, parameters in "
        "float32 and activations in bfloat16, Adafactor. GiB of a chip, each time T5Patches' loss "
        "/ ours / ours with a fused head, the original an argument in all three. Numbers a token: "
        "of four bytes, what the loss moves over `model`, and in how many collectives. ≈: by a "
        "straight line through fewer layers of encoder and decoder, 1 and 3; the largest batch by "
        f"one through two batches, to {pods.HBM_GIB} GiB of a chip's 32. On 64 and 512 chips one "
        "program is compiled, and what it needs beyond the same one on 8 chips is added to what "
        f"is known of those. -: not compiled yet. Compiled: {'; '.join(compiled)}. "
        + "".join(
            f"{row['size']}, {row['chips']} chips, {_whose(row['variant'])}, "
            f"{row['layers']} layers: {row['temporaries GiB']:.2f} GiB of temporaries, "
            f"by the line {expected:.2f}. "
            for row, expected in pods.lines_held(result["rows"])
        ),
        last,
        [*pods.HEADER],
        pods.table(result["rows"]),
    )


def take_in_demo(path: pathlib.Path) -> None:
    """Stores what the documents show of a demo's results."""
    result = json.loads(path.read_text())
    rows = [{k: row[k] for k in ("name", "measures")} for row in result["rows"]]
    kept = {k: result[k] for k in ("errors", "settings", "before")}
    common.save("demo", rows, **kept)


# The text of a document between `<!-- NAME -->` and `<!-- end -->`: what is stored, and its form.
SECTIONS = {
    # README.md: one number a cell
    "tutorial": ("tutorial", tutorial),
    "real": ("real", real),
    "cpu": ("host-cpu", cpu),
    "tpu": ("tpu_static", tpu),
    "gpu": ("gpu", gpu),
    # bench/README.md: all of them
    "rounds": ("tutorial", rounds),
    "demo": ("demo", demo),
    "frontier": ("frontier", frontier),
    "frontier-real": ("frontier-real", frontier_real),
    "frontier-adapters": ("frontier-adapters", frontier_adapters),
    "defaults": ("defaults", defaults),
    "kl-estimates": ("kl-estimates", kl_estimates),
    "rewards": ("rewards", rewards),
    "answers": ("answers", answers),
    "host-cpu": ("host-cpu", host_cpu),
    "heads": ("heads", heads),
    "ignored": ("ignored", ignored),
    "edit-small": ("edit-small", edit_small),
    "decoder": ("decoder", decoder),
    "decoder-memory": ("decoder", decoder_memory),
    "tpu_static": ("tpu_static", tpu_static),
    "tpu_linear": ("tpu_linear", tpu_linear),
    "gpu_all": ("gpu", gpu_all),
    "gpu_fewer_tokens": ("gpu", gpu_fewer_tokens),
    "gpu_linear": ("gpu-linear", gpu_linear),
    "h200-static": ("h200-static", gpu_static),
    "gpu-clusters": ("gpu-clusters", gpu_clusters),
    "t5x-step": ("t5x-step", t5x_step),
    "t5x-step-static": ("t5x-step-static", t5x_step_static),
    "teacher-cache": ("teacher-cache", teacher_cache),
    "pods": ("pods", pods),
}


def rendered(text: str) -> str:
    """`text` with every section brought up to date."""

    def block(found: re.Match) -> str:
        stored, render = SECTIONS[found[1]]
        return f"<!-- {found[1]} -->\n{render(_stored(stored))}\n<!-- end -->"

    return re.sub(r"<!-- (\S+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--demo", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    if options.demo:
        take_in_demo(options.demo)
    for document in DOCUMENTS:
        document.write_text(rendered(document.read_text()))
