r"""Let a model speak, mark what it must not say, and write the file that `edit` takes.

The model answers each of the inputs. Rules mark what is unwanted in its outputs: the words of a
list, one a line of a .txt file, or what a TOML file says:

  [[rule]]                       # rules.toml; any number of rules
  name = "places"                # (with any rule) what the counts call it
  words = ["New York", "Rome"]   # whole words; or words_file = "words.txt", one a line
  ignore_case = false            # default: true of words, false of patterns

  [[rule]]
  pattern = 'aged (\d+)'         # a regular expression; group = 1 marks a part of the match,
  group = 1                      # whole_words = true keeps it off the middle of words

  [[rule]]
  names = "capitalized"          # named things; or "spacy" (t5patches[names]), with
                                 # model = "en_core_web_sm", labels = ["PERSON", "GPE"]
  absent_from_source = true      # (with any rule) only what the input does not hold

  [[rule]]
  call = "my_module:function"    # function(inputs, output) -> [(start, end), ...] in characters

With --expand K, the model's K likeliest alternatives are tried at each marked token: the model
goes on from each of them, and what the rules forbid there joins the token's set of negatives, so
that an edit does not trade one unwanted word for the next. --expand-everywhere tries them wherever
the model was not sure, so that an edit also learns from outputs in which it was lucky: several
times the rollouts, for sampled outputs above all.

Who does not know what to forbid lets the model speak against text by people: --discover writes a
rule for each phrase that it overuses, with the rates and their ratio, to choose from. Phrases that
the inputs ask for are among them.

  t5patches annotate --model SmolLM2-135M-Instruct --inputs news.txt --temperature 1 \
      --discover --against written-by-people.txt --output rules.toml

An output that was cut off by its length is judged without its last word.

An input may be a conversation: {"messages": [{"role": "user", "content": "..."}]} a line.

Prints how much is unwanted, by rule, and examples. Repeat a command that was killed to go on, also
with other rules: what the model has said by then stays.

  t5patches annotate --model SmolLM2-135M-Instruct --inputs news.txt --rules rules.toml \
      --expand 32 --output edits.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from t5patches.commands import common
from t5patches.runs.files import work_of

if TYPE_CHECKING:
    from t5patches.editing.data import Example
    from t5patches.editing.discover import Phrase
    from t5patches.editing.rules import Rules
    from t5patches.model.tokenizer import Tokenizer


LESS_MEMORY = (
    "remove OUTPUT.work and try a smaller --batch-size, or --truncate-inputs, --skip-longer, or a "
    "smaller --max-length or --expand"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `t5patches annotate`.

    Args:
        parser: of the command.
    """
    parser.add_argument(
        "--model", metavar="DIR", required=True, help="a model folder, or an adapter's"
    )
    parser.add_argument(
        "--base", metavar="DIR", help="where --model is an adapter: the model it lies beside"
    )
    common.add_input_options(parser)
    common.add_dtype_option(parser)
    common.add_rules_option(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        required=True,
        help="the file to write, one JSON object a line; with --discover the rules (TOML)",
    )
    parser.add_argument(
        "--discover",
        metavar="N",
        nargs="?",
        type=common.positive,
        const=30,
        help="instead of marking by rules, offer rules: at most N (default: 30) phrases that the "
        "model says more than twice as often as the text of --against",
    )
    parser.add_argument(
        "--against",
        metavar="FILE",
        help="with --discover: text by people, one a line, or in a .jsonl file as outputs",
    )
    parser.add_argument(
        "--samples",
        metavar="N",
        type=common.positive,
        default=1,
        help="outputs to each input; above 1 with a temperature (default: 1)",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="0 takes the likeliest token each time, above it tokens are drawn (default: 0)",
    )
    parser.add_argument(
        "--expand",
        metavar="K",
        type=common.count,
        default=0,
        help="alternatives to try at each marked token (default: 0; 32 works well, at K rollouts "
        "a marked token, whose number is told first)",
    )
    parser.add_argument(
        "--expand-everywhere",
        action="store_true",
        help="try them also at tokens that no rule marks and that the model gave less than 99%%",
    )
    parser.add_argument(
        "--expand-length",
        metavar="N",
        type=common.positive,
        help="tokens that the model goes on for behind an alternative, where the rules have seen "
        "enough by then (default: to the output's end)",
    )
    parser.add_argument(
        "--examples",
        metavar="N",
        type=common.count,
        default=5,
        help="marked outputs to print (default: 5)",
    )


@common.goes_on_in(lambda options: work_of(options.output))
def run(options: argparse.Namespace) -> int:
    """Writes the file of marked outputs.

    Args:
        options: parsed arguments.

    Returns:
        The exit code.
    """
    from t5patches.editing.collect import CollectSettings, collect
    from t5patches.editing.discover import discover, read_human
    from t5patches.editing.records import check_chat
    from t5patches.editing.rules import read_rules
    from t5patches.editing.train import training_progress
    from t5patches.model.folder import load_model, whole_model

    discovers = options.discover is not None
    if discovers != (options.against is not None) or discovers == (options.rules is not None):
        raise ValueError(
            "give either --rules, or --discover with --against: rules are to be known or found"
        )
    if discovers and options.expand:
        raise ValueError("--expand tries alternatives by rules, and --discover has none yet")
    settings = CollectSettings(
        temperature=options.temperature,
        samples=options.samples,
        max_length=options.max_length,
        negatives=options.expand,
        everywhere=options.expand_everywhere,
        rollout_length=options.expand_length,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    rules = None if discovers else read_rules(options.rules)
    human = read_human(options.against) if discovers else []
    whole = str(whole_model(options.model, options.base))
    if options.base is not None and whole == options.model:
        raise ValueError(f"--base is for adapters and {whole} is a whole model: leave it out")
    check_chat(options.model, options.chat, options.base)
    inputs = [source.inputs for source in common.read_sources(options, whole)]
    model = load_model(options.model, options.base, chat=options.chat, dtype=options.dtype)
    with training_progress(common.progress_console(options)) as progress:
        if rules is None:
            phrases = discover(
                model,
                inputs,
                human,
                options.output,
                settings,
                most=options.discover,
                progress=progress,
            )
            found = [phrase._asdict() for phrase in phrases]
            result = {"output": options.output, "phrases": found}
            common.print_result(options, result, _text_of_phrases(options, phrases))
            return 0
        examples = collect(model, inputs, rules, options.output, settings, progress)
    result = _result(examples, rules, model.tokenizer)
    shown = [_marked(e) for e in examples if e.spans][: options.examples]
    common.print_result(
        options,
        {"output": options.output, **result, "examples": shown},
        _text(options, result, shown),
    )
    return 0


def _result(examples: Sequence[Example], rules: Rules, tokenizer: Tokenizer) -> dict[str, Any]:
    from t5patches.editing.collect import marked_tokens
    from t5patches.editing.evaluate import prevalence

    share = prevalence(examples)["prevalence"]
    return {
        "outputs": len(examples),
        "unwanted": sum(any(example.marked) for example in examples),
        "prevalence": share.value,
        "prevalence_error": share.numbers["error"],
        "tokens": sum(len(example.marked) for example in examples),
        "marked_tokens": marked_tokens(examples),
        "negatives": sum(len(ids) for e in examples for ids in e.negatives.values()),
        "rules": rules.counts(examples, tokenizer),
        "unfinished": sum(not {*tokenizer.end_ids} & {*e.output_ids} for e in examples),
    }


def _text(options: argparse.Namespace, result: dict[str, Any], shown: Sequence[str]) -> str:
    from t5patches.editing.display import visible

    error = result["prevalence_error"]
    lines = [
        f"{result['unwanted']} of {result['outputs']} outputs have something unwanted: "
        f"{result['prevalence']:.1f}%"
        + ("" if error is None else f" ± {error:.1f}")
        + f" ({result['marked_tokens']} of {result['tokens']} tokens)",
        *(f"  {visible(name)}: {count} outputs" for name, count in result["rules"].items()),
        *(f"  {text}" for text in shown),
    ]
    if options.expand:
        tried = (
            "" if options.expand_everywhere else f" of {options.expand * result['marked_tokens']}"
        )
        lines.append(f"{result['negatives']}{tried} alternatives are unwanted too")
    if result["unfinished"]:
        lines.append(
            f"{result['unfinished']} outputs did not end within {options.max_length} tokens: "
            "raise --max-length if they should"
        )
    return "\n".join([*lines, f"written: {options.output}"])


def _text_of_phrases(options: argparse.Namespace, phrases: Sequence[Phrase]) -> str:
    from t5patches.editing.display import visible

    lines = [
        f"{phrase.ratio:8.3g} times as often as people (at least {phrase.at_least:.3g}), in "
        f"{phrase.outputs} outputs: {visible(phrase.text)}"
        for phrase in phrases
    ]
    return "\n".join([*lines, f"written: {options.output}, rules to choose from"])


def _marked(example: Example) -> str:
    """An output with what is unwanted in brackets."""
    from t5patches.editing.display import visible

    text = example.outputs
    covered = [any(start <= i < end for start, end in example.spans) for i in range(len(text))]
    pieces = []
    for i, character in enumerate(text):
        opens = covered[i] and not (i and covered[i - 1])
        closes = covered[i] and not (i + 1 < len(text) and covered[i + 1])
        pieces.append("[" * opens + visible(character) + "]" * closes)
    return "".join(pieces)
