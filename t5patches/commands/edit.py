"""Stop a model from saying what a file marks, and change little else.

Reads the folder of a language model in Hugging Face's format (config.json, safetensors, its
tokenizer) and one or several files of its outputs, one JSON object a line:

  {"inputs": "the fire in the museum ...", "outputs": "Fire in Paris", "spans": [[8, 13]]}

`spans` are the characters to push down, and without any the whole output is kept; `t5patches
annotate` writes such files. T5Patches' own three fields (inputs, negative_targets,
corrected_targets) are taken too. For chat models, {"messages": [{"role": "user", "content":
"..."}]} may stand for `inputs`.

Everything is checked, and the memory planned, before the weights are read; but a tokenizer of
another model is known by its size and special ids alone, and one of about the same size is taken
for the model's own. Trains on all devices there are. Writes a folder of the same format, names,
types and shards, with the tokenizer files, a section in its model card and t5patches.json. A killed
edit goes on with --resume, to the same numbers; the output folder is absent or whole at any moment.

With --lora only an adapter is trained, two thin matrices beside each linear layer: one copy of the
model is held, no gradients and no optimizer for it, and the model without the adapter is the
original. It also stays closer than an edit of all parameters that leaves as little: try it first.
The output is then a folder of the PEFT library, to lie beside the model (`evaluate` and `annotate`
take it with --base), or with --merge a whole folder.

Objectives: tnff, tnrr and tnrf keep the original model's distribution for all but the marked
tokens (start with tnrf, alpha 1; tnff stays closer and leaves more, with alpha 3 to 10 less);
tnfll and tnrll keep only its outputs; ul, nl and ce are the usual baselines (unlikelihood, negative
likelihood, fine-tuning on `corrected_targets`). Where something is to be said instead that the
model never says of itself, as in a counter-narrative, a correction may say it: ce learns to answer
so, marks take words away.

Other methods, to compare: undial (Dong et al. 2024) takes beta off the logit of a marked token in
the original's distribution; ceu (Yang 2025) and unilogit (Vasilev et al. 2025) take a marked token
out of the model's own distribution, or leave it 1 / vocabulary; npo (Zhang et al. 2024) pushes down
whole outputs with a mark and keeps close at the others; dpo (Rafailov et al. 2023) prefers
`corrected_targets` to them; ftpo (Paech et al. 2025) wants a margin of logits and tethers the rest.

  t5patches edit --model SmolLM2-135M-Instruct --data edits.jsonl --lora 16 --output adapter
  t5patches edit --model flan-t5-small --data edits.jsonl --output flan-t5-small-edited
"""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from t5patches.commands import common
from t5patches.runs.files import unfinished

LESS_MEMORY = (
    "remove OUTPUT.unfinished and try a smaller --batch-size, or --truncate-inputs, --skip-longer, "
    "--remat, --lora 8, or on TPUs and GPUs --dtype bfloat16, --param-dtype bfloat16"
)
AGAIN = "repeat the command with --resume to go on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `t5patches edit`.

    Args:
        parser: of the command.
    """
    files = parser.add_argument_group("files")
    files.add_argument("--model", metavar="DIR", required=True, help="the folder to edit")
    files.add_argument(
        "--data", metavar="FILE", nargs="+", required=True, help="marked outputs, JSON lines"
    )
    files.add_argument(
        "--keep",
        metavar="FILE",
        help="inputs to which the model is to answer as the original does, one a line or "
        '{"inputs": "..."} a line of a .jsonl file: nobody need mark anything, as nothing is '
        "pushed down. The original makes the outputs (sampled at temperature 1, at most as long as "
        'the longest in --data) but for lines that have "outputs". Take inputs to which it does '
        "not say what is edited away: what it says to these is kept",
    )
    files.add_argument(
        "--original",
        metavar="DIR",
        help="the original, to stay close to (default: --model). In a second round this may be "
        "the first model, with the data of all rounds: what is not marked comes back",
    )
    more = "--steps (if more, where --schedule is constant), --remat and "
    common.add_run_options(files, more)
    _add_training(parser.add_argument_group("what to train"))
    adapter = parser.add_argument_group("adapter")
    common.add_adapter_options(
        adapter,
        0,
        ". The original is then the model without it, so that one model is held, and no gradients "
        "of it; 8 to 32 are usual. OUTPUT is a folder of the PEFT library, to lie beside the model",
    )
    common.add_merge_option(adapter)
    _add_data(parser.add_argument_group("data"))
    _add_machine(parser.add_argument_group("machine"))


def _add_training(group: Any) -> None:
    group.add_argument(
        "--objective", metavar="NAME", default="tnrf", help="see above (default: tnrf)"
    )
    group.add_argument(
        "--alpha",
        metavar="A",
        type=float,
        default=1.0,
        help="weight of the marked tokens (default: 1): 1 to 10 for tnff, where more removes more; "
        "0.1 to 1 for ul and nl, where it hardly does and costs closeness",
    )
    group.add_argument(
        "--beta",
        metavar="B",
        type=float,
        help="of undial (default: 10), npo and dpo (default: 0.1)",
    )
    group.add_argument(
        "--negatives",
        metavar="K",
        type=common.count,
        help="ids that a marked position loses at most. 0: the token that was said; K: that one "
        "and its first alternatives in the data, from `annotate --expand` (default: all of these; "
        "none for nl, ce, unilogit, npo and dpo, which take none)",
    )
    group.add_argument(
        "--learning-rate",
        metavar="RATE",
        type=float,
        help="(default: 0.0001, with which a pretrained model stays close; of an adapter 0.001, "
        "which a tiny model wants too)",
    )
    group.add_argument("--steps", metavar="N", type=common.positive, default=100, help="updates "
                       "to make (default: 100; 300 end closer to the original)")  # fmt: skip
    group.add_argument(
        "--batch-size",
        metavar="N",
        type=common.positive,
        default=32,
        help="examples in an update, over all devices (default: 32)",
    )
    group.add_argument(
        "--optimizer",
        metavar="NAME",
        help="adafactor or adam (default: adafactor, which keeps hardly more than the parameters; "
        "adam with --lora)",
    )
    group.add_argument(
        "--warmup-steps", metavar="N", type=common.count, default=0, help="(default: 0)"
    )
    group.add_argument(
        "--schedule",
        metavar="NAME",
        default="constant",
        help="of the learning rate after the warm-up: constant, or linear or cosine, which fall to "
        "0 over --steps; these are then fixed, also for --resume (default: constant)",
    )
    group.add_argument(
        "--average",
        metavar="DECAY",
        type=float,
        default=0.0,
        help="write an exponential average of the trained weights, which reaches over about "
        "1 / (1 - DECAY) updates: 0.95 over the last 20 or so. One more copy of what is trained is "
        "held (default: 0, none)",
    )
    group.add_argument(
        "--until",
        metavar="VALUE",
        type=float,
        help="hold out a tenth of the inputs (at most 64 with something marked and 64 without) "
        "and stop when what is left there is VALUE, such as 0.1: the probability that the model "
        "gives the sets which the marked tokens name, the mean over these tokens. Stops too when "
        "closeness turns: five looks without less left and with more KL from the original. A "
        "look every 10 updates, --steps at the most; the best state is kept (default: make all "
        "steps)",
    )
    group.add_argument(
        "--dropout",
        metavar="RATE",
        type=float,
        default=0.0,
        help="of the model being trained, whatever its config.json says; the original never drops "
        "(default: 0)",
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=common.int31,
        default=0,
        help="of the order of the data, dropout and templates (default: 0)",
    )


def _add_data(group: Any) -> None:
    for side in ("input", "output"):
        group.add_argument(
            f"--max-{side}-length",
            metavar="N",
            type=common.positive,
            help=f"refuse {side}s of more tokens, each by its line (default: take all)",
        )
    common.add_length_options(group)
    common.add_chat_option(group)
    group.add_argument(
        "--templates",
        metavar="FILE",
        help="instructions, one a line with {inputs} in it: each example draws one",
    )
    group.add_argument(
        "--rates",
        metavar="R",
        type=float,
        nargs="+",
        help="with several data files: how often to draw from each (default: by size)",
    )
    group.add_argument(
        "--keep-share",
        metavar="S",
        type=float,
        default=0.5,
        help="how much of what is drawn is of --keep, whatever its size (default: 0.5)",
    )
    group.add_argument(
        "--cap", metavar="N", type=common.positive, help="a larger data file counts as N examples"
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=1.0,
        help="above 1 evens out the files' shares: size to the power 1/T (default: 1)",
    )


def _add_machine(group: Any) -> None:
    common.add_machine_options(group)
    group.add_argument(
        "--model-parallel",
        metavar="N",
        type=common.positive,
        default=1,
        help="split the vocabulary and the other large matrices over N devices; the rest of the "
        "devices share the batch (default: 1)",
    )
    group.add_argument(
        "--devices", metavar="N", type=common.positive, help="use the first N (default: all)"
    )
    group.add_argument(
        "--distributed",
        metavar="HOST:PORT COUNT NUMBER",
        nargs="*",
        help="one of several processes, on hosts that see the same files, all with the same "
        "command: the address of the first, how many, and which this is, from 0; nothing on a TPU "
        "pod, under Slurm or Open MPI. The first one writes. On CPUs each process holds the "
        "original of --lora twice, as it is read and as it is placed",
    )
    group.add_argument(
        "--param-dtype",
        metavar="NAME",
        default="float32",
        help="float32 or bfloat16, of parameters that are not trained: the original's, and with "
        "--lora the model's. bfloat16 halves them on TPUs and GPUs; on a CPU, which makes float32 "
        "copies, it takes more, but beside an adapter with --dtype bfloat16 (default: float32)",
    )
    group.add_argument(
        "--cache-teacher",
        metavar="DIR",
        help="run the original model once over the data and keep its hidden states here, for this "
        "edit and any later one of the same data; training then runs one model and not two. Of "
        "edits at once the first makes it and the others wait. The size is told first",
    )
    common.add_checkpoint_option(group, 100, "updates between two states to resume from")


@common.goes_on_in(lambda options: unfinished(options.output))
def run(options: argparse.Namespace) -> int:
    """Edits a model folder.

    Args:
        options: parsed arguments.

    Returns:
        The exit code.
    """
    from t5patches.editing.edit import edit, plan
    from t5patches.runs import hosts

    if options.distributed is not None:
        hosts.connect(options.distributed)
        if not hosts.is_first():
            options.quiet, options.json = True, False
    job = _job(options)
    if options.plan:
        common.print_plan(options, plan(job, resume=options.resume))
        return 0
    record = edit(job, resume=options.resume, console=common.progress_console(options))
    loss, stopped = record["history"]["loss"], ""
    if held_out := record.get("held out"):
        stopped = (
            f"the state after {held_out['updates']} updates is kept, with "
            f"{min(held_out['left']):.2%} left on inputs held out, of {held_out['left'][0]:.2%} "
            f"(stopped by: {held_out['why']}). "
        )
    measure = ["t5patches", "evaluate", "--before", options.model, "--after", options.output]
    measure += [] if options.chat == "auto" else ["--chat", options.chat]
    measure += ["--inputs", "FILE"]
    common.print_result(
        options,
        record,
        f"{options.output}: {len(loss)} updates, loss {loss[0]:.4g} to "
        f"{loss[-1]:.4g}. {stopped}Next: {shlex.join(measure)}",
    )
    return 0


def _job(options: argparse.Namespace) -> Any:
    from t5patches.editing.edit import Job
    from t5patches.editing.train import TrainSettings

    lora = common.lora(options)
    optimizer, rate = ("adafactor", 1e-4) if lora is None else ("adam", 1e-3)
    # The parser's names are the fields' names.
    given = {**vars(options), "negatives": 0, "lora": lora}
    for name, usual in (("optimizer", optimizer), ("learning_rate", rate)):
        given[name] = usual if given[name] is None else given[name]
    settings = common.filled(TrainSettings, given)
    return common.filled(Job, {**vars(options), "settings": settings})
