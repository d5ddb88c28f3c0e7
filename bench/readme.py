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

from bench import common
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


def _measured(setting: dict[str, str], header: list[str], rows: list[list[str]]) -> str:
    """A table under what its figures depend on."""
    return f"{_setting(setting)}.\n\n" + _table(header, rows)


def _whose(variant: str) -> str:
    """A variant of T5X's step in words."""
    return "T5Patches" if variant == "upstream" else variant


def host_cpu(result: dict) -> str:
    """The table of `make bench`."""
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
    header = ["", *times, *(f"kept: {x}" for x in times), "dense, TV", "fused, TV"]
    return (
        '`make bench`: value and gradient, T = 8 x 64, V = 32128, float32, `implementation="xla"`\n'
        "beside T5Patches' formula in plain jnp, both jitted, in one run; median (quartiles); TV:\n"
        "one [T, V] float32 array held beyond inputs and outputs. Entries: the exponentials and\n"
        "the logarithm alone, in one elementwise pass with a fresh result. Kept: a process that\n"
        "keeps its memory, where by default it gets fresh pages for each result and temporary.\n"
        + _measured(result["setting"], header, rows)
    )


def tpu_static(result: dict) -> str:
    """The table of `make bench-tpu-static`: compute over copies, by chip and objective."""
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
        # In bfloat16 the count on v4 has copies through another memory in it: not traffic.
        counted = [r for r in of.values() if r["dtype"] == "float32"]
        dense = sorted({r["dense_passes"] for r in counted})
        more = of.get(chips[0], {}).get("cycles_of_32_edits_over_1", 0)
        rows.append(
            [
                f"`{name}` {dtype} {v}",
                "-".join(passes),
                "-".join(f"{x:g}" for x in (*dense[:1], *dense[1:][-1:])),
                *(_ratio(of.get(chip)) for chip in chips),
                f"{more / of[chips[0]]['cycles']:.1%}" if more else "",
            ]
        )
    header = ["", "passes", "XLA on the dense formula", *chips, f"32 edits over one, {chips[0]}"]
    return (
        "`make bench-tpu-static`: **static, ahead of time, by the TPU compiler; nothing ran on\n"
        "a TPU.** Value and gradient, T = 2048: passes over [T, V] arrays, and for each chip the\n"
        "time of a block's instructions over that of its copies: below 1 the kernel is at the\n"
        "memory roofline. After it the least that these instructions need, the busiest unit of\n"
        "the core never idle. Kept: a block of kept tokens only, where others have one that is\n"
        "pushed down; mean: of both, as often as they are where 4% of the tokens are, anywhere.\n"
        "Blocks without edits; the last column: what 32 edits on 4% of\n"
        "tokens add to the instructions of one edit on each of those. In parentheses: with logits\n"
        "that are the program's arguments, which XLA copies where V is not a multiple of 128.\n"
        "Clocks and bandwidths as published or assumed; no stalls counted; tpu7x has no published\n"
        "clock.\n" + _measured(result["setting"], header, rows)
    )


def tpu_kernels(result: dict) -> str:
    """The part of that table with T5's vocabulary."""
    rows = [row for row in result["rows"] if row["V"] == common.VOCABULARIES["T5"]]
    return tpu_static(result | {"rows": rows})


def _passes(row: dict) -> str:
    """Where rows are no whole number of 128 entries: of logits that a product has made here."""
    given = f"{row['passes']:g}"
    return f"{row['passes_made']:g} ({given})" if "passes_made" in row else given


def _ratio(row: dict | None) -> str:
    if row is None:
        return ""
    if "ratio" not in row:
        return f"{row['cycles']:.0f} cycles"
    least = f" ≥ {row['least_ratio']:.2f}" if "least_ratio" in row else ""
    shown = f"{row['ratio']:.2f}{least}"
    if "kept_over_pushed" in row:
        kept = row["kept_over_pushed"] * row["ratio"]
        share = (1 - PUSHED) ** row["kernels"]["visit"]["rows"]  # of blocks
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
    return (
        "From hidden states to the loss and both gradients, **static** too. Held: the float32\n"
        "gradient of the kernel, and what is held beyond it; dense: XLA on whole float32 logits.\n"
        "Copies are the compiler's count of bytes at the chip's bandwidth, products the matrix\n"
        "unit's at its full rate: each the least that its part can take.\n"
        + _measured(result["setting"], header, rows)
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
    header = ["", "dense, passes", "XLA form, passes", "dense, TV held", "XLA form, TV held",
              "kernel's registers", "spilled"]  # fmt: skip
    return (
        "`make bench-gpu-static`: **static, ahead of time, compiled for an H200.** Value and\n"
        "gradient, T = 2048, V = 32128: passes over [T, V] arrays counted in the optimised\n"
        "program, and what it holds; registers and spilled bytes of the Mosaic GPU kernel.\n"
        + _measured(result["setting"], header, rows)
    )


def _gpu_table(result: dict, tokens: int) -> str:
    """What was timed on a card at so many tokens: each program beside the others."""
    torch = json.loads((common.RESULTS / "gpu-torch.json").read_text())
    measured = (*result["rows"], *torch["rows"])
    keys = ("objective", "dtype", "vocabulary", "tokens", "what")
    found = {tuple(row[k] for k in keys): row for row in measured}
    names = ("dense", "torch", "xla", "pallas_gpu")
    rows = []
    for of in dict.fromkeys(key[:4] for key in found if key[3] == tokens):
        at = {name: found[*of, name] for name in names if (*of, name) in found}
        if "pallas_gpu" not in at:
            continue
        ours = at["pallas_gpu"]
        rows.append(
            [
                "`{}` {} {}".format(*of),
                *(f"{at[name]['ms']:.3g}" if name in at else "" for name in names),
                f"{at['dense']['ms'] / ours['ms']:.1f}",
                f"{at['xla']['ms'] / ours['ms']:.2f}",
                f"{ours['gb_per_second'] / result['about']['copy_gb_per_second']:.0%}",
                *(
                    f"{at[k]['temporary_bytes'] / 2**20:.1f}"
                    for k in ("dense", "xla", "pallas_gpu")
                ),
            ]
        )
    header = ["", "dense, ms", "torch.compile, ms", "XLA form, ms", "kernel, ms",
              "dense / kernel", "XLA form / kernel", "of a copy's speed",
              "dense, MiB", "XLA form, MiB", "kernel, MiB"]  # fmt: skip
    return _measured(result["about"], header, rows)


def gpu(result: dict) -> str:
    """The table of `make bench-gpu`."""
    about = result["about"]
    return (
        "`make bench-gpu`, on an NVIDIA H100: value and gradient of T = 8192 tokens, device time,\n"
        "median; T5Patches' formula in JAX and by `torch.compile`, the streaming XLA form and the\n"
        "kernel. Of a copy's speed: two arrays read and one written, in the kernel's time, over a\n"
        f"device-to-device copy in the same process ({about['copy_gb_per_second']:.0f} GB/s).\n"
        "MiB: held beyond inputs and outputs.\n" + _gpu_table(result, 8192)
    )


def gpu_fewer_tokens(result: dict) -> str:
    """More of it."""
    return "`make bench-gpu`, the same for T = 2048.\n" + _gpu_table(result, 2048)


def gpu_linear(result: dict) -> str:
    """The head's part of `make bench-gpu`."""
    rows = [
        [
            f"`{row['objective']}` {row['what']}",
            f"{row['ms']:.1f} ({row['least']:.1f}-{row['most']:.1f})",
            f"{row['temporary_bytes'] / 2**20:.0f}",
        ]
        for row in result["rows"]
    ]
    of = result["rows"][0]
    return (
        f"`make bench-gpu`, hidden states to loss and both gradients, T = {of['tokens']}, "
        f"D = {of['width']}, V = {of['vocabulary']},\nbfloat16: logits whole (dense), or made in "
        "chunks of 512 MiB and given to the XLA form or the\nkernel. Milliseconds, median "
        "(least-most); MiB beyond inputs and outputs.\n"
        + _measured(result["about"], ["", "ms", "MiB held"], rows)
    )


def demo(result: dict) -> str:
    """The table of `make demo`."""
    shown = {"kl": "KL", "prevalence": "unwanted, %", "prevalence_sampled": "sampled, %",
             "bleu": "BLEU", "rouge_l": "ROUGE-L", "exact_match": "exact, %",
             "malformed": "malformed, %"}  # fmt: skip

    def cell(measures: dict, name: str) -> str:
        if name not in measures:
            return ""
        digits = 4 if name == "kl" else 1
        value, error = (measures[name][k] for k in ("value", "error"))
        return f"{value:.{digits}f} ± {error:.{digits}f}"

    named = [("before", result["before"]), *((r["name"], r["measures"]) for r in result["rows"])]
    rows = [[name, *(cell(measures, m) for m in shown)] for name, measures in named]
    return (
        "`make demo`: a tiny T5 that names places its source does not name, edited on its own\n"
        "marked outputs; KL from the original on unmarked positions; BLEU, ROUGE-L and exact\n"
        f"match of new with original outputs; standard errors {result['errors']}.\n"
        + _measured(result["setting"], ["", *shown.values()], rows)
    )


def tutorial(result: dict) -> str:
    """The four commands and what they printed."""
    of_four = result["rows"][: len(COMMANDS)]
    return (
        "`make tutorial` runs these four commands, and those of the rounds, and prints this.\n"
        f"{_setting(result['setting'])}.\n\n" + _console(of_four, of_four)
    )


def rounds(result: dict) -> str:
    """The commands of a second round and what the last one printed."""
    rows = result["rows"][len(COMMANDS) :]
    return _console(rows, rows[-1:])


def _console(rows: list[dict], printed: list[dict]) -> str:
    lines = []
    for row in rows:
        lines.append(f"$ {row['command']}")
        if row in printed:
            lines += [*(line.rstrip() for line in row["printed"]), ""]
    return "```console\n" + "\n".join(lines).rstrip() + "\n```"


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
    return (
        "`make bench-edit`: `t5patches edit` of a T5 1.1 small (77 million parameters, random\n"
        "weights), 20 updates of 8 examples of 128 and 64 tokens, TNRF, Adafactor, from reading\n"
        "the folder to the edited one; dense: `--implementation reference`. Processes that took\n"
        f"turns, medians of {result['turns']}; load of the machine {before:.1f} before and\n"
        f"{after:.1f} after.\n"
        + _measured(result["setting"], ["", *(n for n, _ in shown.values())], rows)
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
    return (
        "`make bench-t5x`: a whole training step of T5X's trainer, T5 1.1 small in float32, batch\n"
        "of 8 x (64 + 64) tokens, Adafactor, in turns in one run, median (quartiles); load of the\n"
        f"machine {result['load']:.0f}. Fused head: with `t5patches.network` in place of T5X's.\n"
        + _measured(result["setting"], header, rows)
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
    return (
        "**Static, by the TPU compiler for one v4; nothing ran on a TPU.** The step of T5 1.1\n"
        "base in bfloat16, batch of 32 x (64 + 64), in GiB; all: arguments, outputs that take no\n"
        "argument's place, temporaries and program. T5Patches' program holds the original as\n"
        "constants (by their size in bfloat16); ours gets it as a float32 argument, which a mesh\n"
        "splits like the model.\n"
        + _measured(result["setting"], ["", *shown, "compiling, s"], rows)
    )


def teacher_cache(result: dict) -> str:
    """The table of `make bench-teacher`."""
    from bench.teacher_cache import VARIANTS, shown

    header = ["T5 1.1", "update", "ms", "times plain", "GFLOP", "times plain"]
    rows = [[row["size"], name, *shown(row, name)] for row in result["rows"] for name in VARIANTS]
    return (
        "`make bench-teacher`: one update of 8 x 64 tokens, plain fine-tuning beside TNRF with\n"
        "the original model run live and read from a cache. Milliseconds on this machine, in\n"
        "turn in one process; operations by the TPU compiler for "
        f"{result['rows'][0]['chip']}, ahead of time,\nbut for those that are compiled for "
        "tokens of different cotangents and never run here.\n"
        + _measured(result["setting"], header, rows)
    )


def pods(result: dict) -> str:
    """The table of `make bench-pods`."""
    from bench import pods

    last = max((row["setting"] for row in result["rows"]), key=lambda setting: setting["date"])
    return (
        "`make bench-pods`: **static, ahead of time, by the TPU compiler; nothing ran on a TPU.**\n"
        "T5X's step of TNRF on v4 slices, inputs of 512 tokens and targets of 128, parameters in\n"
        "float32 and activations in bfloat16, Adafactor. GiB of a chip, each time T5Patches' loss\n"
        "/ ours / ours with a fused head, the original an argument in all three. Numbers a token:\n"
        "of four bytes, what the loss moves over `model`, and in how many collectives. ≈: by a\n"
        "straight line through fewer layers of encoder and decoder, 1 and 3, as the largest batch\n"
        f"is through two batches, for {pods.HBM_GIB} GiB of a chip's 32; on 64 and 512 chips one\n"
        "program is compiled, and what it needs beyond the same one on 8 chips is added to what\n"
        "is known of those. -: not compiled yet.\n"
        + "".join(
            f"{row['size']}, {row['chips']} chips, {_whose(row['variant'])}, "
            f"{row['layers']} layers: {row['temporaries GiB']:.2f} GiB of temporaries,\n"
            f"by the line {expected:.2f}.\n"
            for row, expected in pods.lines_held(result["rows"])
        )
        + _measured(last, [*pods.HEADER], pods.table(result["rows"]))
    )


def take_in_demo(path: pathlib.Path) -> None:
    """Stores what README.md shows of a demo's results."""
    result = json.loads(path.read_text())
    rows = [{k: row[k] for k in ("name", "measures")} for row in result["rows"]]
    kept = {k: result[k] for k in ("errors", "settings", "before")}
    common.save("demo", rows, **kept)


# The text of a document between `<!-- NAME -->` and `<!-- end -->`: what is stored, and its form.
SECTIONS = {
    "tutorial": ("tutorial", tutorial),
    "rounds": ("tutorial", rounds),
    "demo": ("demo", demo),
    "edit-small": ("edit-small", edit_small),
    "host-cpu": ("host-cpu", host_cpu),
    "tpu_kernels": ("tpu_static", tpu_kernels),
    "tpu_static": ("tpu_static", tpu_static),
    "tpu_linear": ("tpu_linear", tpu_linear),
    "gpu": ("gpu", gpu),
    "gpu_fewer_tokens": ("gpu", gpu_fewer_tokens),
    "gpu_linear": ("gpu-linear", gpu_linear),
    "h200-static": ("h200-static", gpu_static),
    "t5x-step": ("t5x-step", t5x_step),
    "t5x-step-static": ("t5x-step-static", t5x_step_static),
    "teacher-cache": ("teacher-cache", teacher_cache),
    "pods": ("pods", pods),
}


def rendered(text: str) -> str:
    """`text` with every section whose result is stored brought up to date."""
    for name, (stored, render) in SECTIONS.items():
        path = common.RESULTS / f"{stored}.json"
        if path.exists():
            body = render(json.loads(path.read_text()))
            block = f"<!-- {name} -->\n{body}\n<!-- end -->"
            pattern = rf"<!-- {name} -->\n.*?<!-- end -->"
            text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--demo", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args()
    if options.demo:
        take_in_demo(options.demo)
    for document in DOCUMENTS:
        document.write_text(rendered(document.read_text()))
