"""Turn a GGUF file or a T5X checkpoint into a model folder, or a T5's folder into T5X's.

Which of them it is, --model says: a file with the ending .gguf, of Llama's or Gemma 3's kind,
becomes a Hugging Face folder with its tokenizer, whose README.md says how the weights were
quantised (needs the package gguf); a T5's folder with a config.json becomes a T5X model directory
with checkpoint_STEP in it (Orbax's format, which T5X reads; with a fresh Adafactor, so that it can
be trained on); a T5X checkpoint, or a model directory, of which the latest step is taken, becomes
a Hugging Face folder. Checkpoints in T5X's first format (msgpack and zarr, as T5's were published)
are read too. T5X is not needed.

A T5X checkpoint holds no tokenizer and no config. With --like, a Hugging Face folder of the same
sizes, the new one has its config, names, types and shards, and its tokenizer. Without, weights are
float32, --tokenizer gives the sentencepiece model, and sizes are read off the parameters, or off
the config.json that this command leaves in t5patches/ beside the checkpoints that it writes. Gates
(of T5 1.1, Flan-T5, mT5) need that or --like: parameters do not show of which kind they are.

  t5patches convert --model gemma-3-1b-it-Q8_0.gguf --output gemma-3-1b-it
  t5patches convert --model t5x/base/checkpoint_1000000 --like t5-v1_1-base --output base
  t5patches convert --model base-edited --output t5x/base-edited --step 1000000
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from t5patches.commands import common

AGAIN = "nothing is kept"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `t5patches convert`.

    Args:
        parser: of the command.
    """
    parser.add_argument("--model", metavar="PATH", required=True, help="what to convert")
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="where to; nothing is overwritten"
    )
    parser.add_argument(
        "--like", metavar="DIR", help="to a folder: one of the same sizes, see above"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="to a folder: becomes its spiece.model")
    parser.add_argument(
        "--step",
        metavar="N",
        type=common.int31,
        help="to T5X: the step to count from (default: 0; T5 1.1 was published at 1000000, and "
        "its fine-tuning configs count on from there)",
    )


def run(options: argparse.Namespace) -> int:
    """Converts a checkpoint.

    Args:
        options: parsed arguments.

    Returns:
        The exit code.
    """
    from t5patches.model.lora import require_whole

    for folder in (options.model, options.like):
        if folder is not None:
            require_whole(folder)
    idle: tuple[str, ...]
    if Path(options.model).suffix == ".gguf":
        kind, idle, convert = "GGUF file", ("like", "tokenizer", "step"), _from_gguf
    elif (Path(options.model) / "config.json").exists():
        kind, idle, convert = "Hugging Face folder", ("like", "tokenizer"), _to_t5x
    else:
        kind, idle, convert = "T5X checkpoint", ("step",), _to_folder
    given = [f"--{name}" for name in idle if getattr(options, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} says nothing here: {options.model} is a {kind}")
    result = convert(options)
    common.print_result(options, result, f"{result['output']} ({result['parameters']} parameters)")
    return 0


def _from_gguf(options: argparse.Namespace) -> dict[str, Any]:
    from t5patches.model.gguf_format import load_gguf
    from t5patches.model.huggingface import save_checkpoint

    made = load_gguf(options.model)
    save_checkpoint(options.output, made.model, made.params, files=made.files)
    return _result(options.output, made.model, made.params, 0) | {"quantised": made.types}


def _to_t5x(options: argparse.Namespace) -> dict[str, Any]:
    from t5patches.model.huggingface import config_file, load_checkpoint, read_config
    from t5patches.model.t5x_format import save_t5x
    from t5patches.runs.files import folder_for_output, write_file

    model = read_config(options.model)
    if model.family.name != "T5":
        raise ValueError(f"a T5X checkpoint holds a T5, and {options.model} a {model.family.name}")
    model, params = load_checkpoint(options.model)
    record = Path(options.output) / _RECORD / "config.json"

    def there() -> bool:
        """Whether there are checkpoints: a record without one is of a run that was killed."""
        return any(Path(options.output).glob("checkpoint_*"))

    if there() and not (record.exists() and read_config(record.parent) == model):
        what = f"another model, by {record}" if record.exists() else "which nothing says the model"
        raise ValueError(f"{options.output} holds checkpoints of {what}: give another --output")
    with folder_for_output(record.parent):
        # First, so that there is no checkpoint without it. Not the folder's own: part of what that
        # says, only the names of the folder's tensors show.
        if not there():
            write_file(record, config_file(model))
        try:
            output = save_t5x(options.output, params, options.step or 0)
        except BaseException:
            if not there():
                record.unlink()
            raise
    return _result(output, model, params, options.step or 0)


def _to_folder(options: argparse.Namespace) -> dict[str, Any]:
    from t5patches.model.huggingface import inspect_checkpoint, read_config, save_checkpoint
    from t5patches.model.t5x_format import find_t5x, infer_model, load_t5x
    from t5patches.model.tokenizer import SentencePieceTokenizer

    if options.like is not None and options.tokenizer is not None:
        raise ValueError("--like brings its own tokenizer: leave --tokenizer out")
    like = None if options.like is None else inspect_checkpoint(options.like)
    tokenizer = None if options.tokenizer is None else SentencePieceTokenizer(options.tokenizer)
    checkpoint = load_t5x(options.model)
    record = find_t5x(options.model).parent / _RECORD
    if like is not None:
        model = like
    elif (record / "config.json").exists():
        model = read_config(record)
    else:
        model = infer_model(checkpoint.params)
    files: dict[str, str | bytes] = {}
    without: tuple[str, ...] = ()
    if tokenizer is not None:
        _check_tokenizer(tokenizer, model.config, options.tokenizer)
        files["spiece.model"] = Path(options.tokenizer).read_bytes()
    if like is not None:
        files, without = _card_of_another(options.like, checkpoint.params)
    save_checkpoint(
        options.output, model, checkpoint.params, like=options.like, files=files, without=without
    )
    return _result(options.output, model, checkpoint.params, checkpoint.step)


_RECORD = "t5patches"
"""Beside the checkpoints of a T5X model directory: what they do not say of the model."""


def _check_tokenizer(tokenizer: Any, config: Any, path: str) -> None:
    """Refuses one that cannot be this model's."""
    from t5patches.model.folder import check_tokenizer

    check_tokenizer(tokenizer, config, path)
    # T5 adds 100 sentinels and fills up to a multiple of 128; twice that leaves room for others.
    if config.vocab_size > 2 * tokenizer.vocab_size + 256:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids and the model's embedding "
            f"{config.vocab_size} rows: the tokenizer is of another model"
        )


def _card_of_another(like: str, params: Any) -> tuple[dict[str, str | bytes], tuple[str, ...]]:
    """What a folder says of the runs that made its weights, taken out for other weights.

    Returns:
        Files to write instead of the folder's, and names of files to leave out.
    """
    from t5patches.editing.outputs import CARD, HEADINGS
    from t5patches.editing.records import card_before_edits
    from t5patches.model.huggingface import load_checkpoint
    from t5patches.runs.fingerprints import fingerprint

    records = tuple(name for name in HEADINGS if (Path(like) / name).exists())
    if not records or fingerprint(load_checkpoint(like)[1]) == fingerprint(params):
        return {}, ()
    card = card_before_edits(like)
    return ({CARD: f"{card}\n"} if card else {}), (*records, CARD)


def _result(output: Any, model: Any, params: Any, step: int) -> dict[str, Any]:
    import jax

    count = sum(x.size for x in jax.tree.leaves(params))
    sizes = {name: str(value) for name, value in vars(model.config).items()}
    return {"output": str(output), "parameters": count, "step": step, "sizes": sizes}
