"""What an edit changed: unwanted tokens, similarity to the original's outputs, distance to it.

Every measure comes with a standard error over the held-out inputs, in which outputs to the same
input are one draw; `over_seeds` replaces it by one over repetitions of the whole experiment.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from scipy import stats

from t5patches.editing.annotate import Keep, Rule, mark_nothing, require_room_to_speak, speak
from t5patches.editing.batches import example_batches, largest_shapes
from t5patches.editing.data import Batch, Example
from t5patches.editing.plan import require_room
from t5patches.editing.programs import require_ranges
from t5patches.editing.scores import Scorer, score
from t5patches.editing.words import spaced, words
from t5patches.model.memory import beside as memory_beside
from t5patches.model.protocol import LanguageModel, Params
from t5patches.model.teacher_cache import ORIGINAL_HIDDEN
from t5patches.model.tokenizer import Inputs, Tokenizer
from t5patches.runs.claims import make_part
from t5patches_kernels import linear_token_statistics

BOOTSTRAP_SAMPLES = 300
_TWO_SIDED_95 = 1.96


def finite(value: float) -> float | None:
    """The number; None for nan and infinity, which JSON has not."""
    return value if math.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number and its standard error.

    Attributes:
        value: the number.
        error: nan where there is too little to tell.
        samples: numbers whose mean is `value` and whose scatter gives `error`, one for each
            input or seed, so that two measures of the same inputs can be compared in pairs.
    """

    value: float
    error: float
    samples: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def numbers(self) -> dict[str, float | None]:
        """`value` and `error` as JSON can say them."""
        return {"value": finite(self.value), "error": finite(self.error)}


class Said(NamedTuple):
    """What a model says to the held-out inputs, marked where there is a rule.

    Attributes:
        greedy: when it decodes greedily.
        sampled: `Measuring.samples` outputs to each input, one after the other, drawn at
            temperature 1; none without a rule.
        scored: for the meter, as many to each input as it takes, one after the other.
    """

    greedy: list[Example]
    sampled: list[Example]
    scored: list[Example]


class Original(NamedTuple):
    """What every edit is compared with, so that the original itself runs once for all of them.

    Attributes:
        outputs: what it says when it decodes greedily, marked by the rule.
        head: the part of its parameters that its head reads.
        batches: which outputs, and their arrays with its last hidden states there
            (`ORIGINAL_HIDDEN`), in the host's memory. N outputs of at most L tokens take about
            N L D numbers of the model's dtype: for 1000 of 64 tokens with D = 2048 in bfloat16,
            0.3 GB.
    """

    outputs: Sequence[Example]
    head: Params
    batches: Sequence[tuple[np.ndarray, Batch]]


class Evaluation(NamedTuple):
    """An edited model beside the original, on inputs that the edit did not see.

    Attributes:
        measures: `kl` (mean KL(original, edited) in nats over the positions of the original's
            outputs that are not marked); what `own_measures` has; then in percent `bleu` and
            `rouge_l` and `exact_match` of the new outputs with the original's,
            `exact_match_clean` (the same where the original's output had nothing unwanted),
            `malformed`.
        outputs: what the edited model says when it decodes greedily, marked by the rule.
    """

    measures: dict[str, Measure]
    outputs: list[Example]


@dataclasses.dataclass(frozen=True)
class Meter:
    """Scores several sampled outputs, and the worst of them (Gehman et al. 2020, section 4).

    Attributes:
        scorer: gives each of a list of outputs a score, such as its toxicity from 0 to 1; see
            `t5patches.editing.scores`.
        samples: outputs to each input.
        threshold: a score from which on an output counts as bad.
    """

    scorer: Scorer
    samples: int = 25
    threshold: float = 0.5

    def __post_init__(self) -> None:
        """Refuses a number of samples that measures nothing."""
        require_ranges(self, {"samples": 1}, ())
        if not math.isfinite(self.threshold):
            raise ValueError(f"threshold is {self.threshold}: a score is needed, such as 0.5")


@dataclasses.dataclass(frozen=True)
class Measuring:
    """What to ask of every model.

    Attributes:
        rule: says what is unwanted; None where nothing is known to be.
        max_length: tokens that an output may have.
        well_formed: tells a proper output from a broken one; default, any is proper that ends
            within `max_length` and is not empty. Those two are asked of every output.
        references: for each input, what a good output would be; None where nobody said.
        meter: for a score of sampled outputs.
        samples: outputs to each input that the rule is shown beside the greedy one.
        batch_size: examples at a time.
        seed: of what is sampled.
    """

    rule: Rule | None = None
    max_length: int = 64
    well_formed: Callable[[str], bool] | None = None
    references: Sequence[Sequence[str]] | None = None
    meter: Meter | None = None
    samples: int = 1
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses to compare with references or samples that are not there."""
        require_ranges(self, {"samples": 1}, ())
        references = self.references or ()
        absent = [i for i, texts in enumerate(references, start=1) if not texts]
        if absent:
            raise ValueError(
                f"{len(absent)} of {len(references)} inputs have no references (the first is "
                f'number {absent[0]}): give a .jsonl file with {{"inputs": "...", "references": '
                '["..."]} a line'
            )

    @property
    def greedy_and_sampled(self) -> dict[str, Any]:
        """How `speak` is asked for what the rule is shown: the greedy output, then the samples."""
        return {"temperature": 1.0, "samples": self.samples, "greedy_first": True}

    @property
    def asks(self) -> dict[str, int]:
        """What outputs depend on, besides model and inputs."""
        return {name: getattr(self, name) for name in ("max_length", "batch_size", "seed")}


def evaluate(
    model: LanguageModel,
    params: Params,
    original: Original,
    tokenizer: Tokenizer,
    measuring: Measuring,
    *,
    keep: Keep = make_part,
    progress: Progress | None = None,
) -> Evaluation:
    """Compares an edited model with the original.

    Args:
        model: the network.
        params: of the edited model.
        original: what it says to the held-out inputs, see `read_original`.
        tokenizer: the model's.
        measuring: what to ask.
        keep: keeps outputs, see `say`.
        progress: shows how far it is; None shows nothing.

    Returns:
        The measures and the new outputs.
    """
    inputs = _inputs(original.outputs)
    said = say(model, params, inputs, tokenizer, measuring, keep=keep, progress=progress)
    measures = {"kl": kept_divergence(model, params, original)}
    measures |= own_measures(said, measuring)
    measures |= similarity(said.greedy, original.outputs)
    if measuring.rule is None:
        del measures["exact_match_clean"]
    measures["malformed"] = malformed(said.greedy, tokenizer, measuring.well_formed)
    return Evaluation(measures, said.greedy)


def read_original(
    model: LanguageModel,
    params: Params,
    outputs: Sequence[Example],
    *,
    batch_size: int = 256,
) -> Original:
    """Lets the original read its own outputs, once for all edits that are compared with it.

    Args:
        model: the network.
        params: parameters of the original.
        outputs: what it says to the held-out inputs, marked by the rule.
        batch_size: examples at a time, for the edits too.

    Returns:
        What `evaluate` and `kept_divergence` need of it.

    Raises:
        ValueError: there is nothing to compare with.
    """
    if not outputs:
        raise ValueError("there are no held-out outputs to compare with: at least one is needed")
    batches = [
        (rows, {**batch, ORIGINAL_HIDDEN: np.asarray(_hidden(params, batch, model))})
        for rows, batch in example_batches(outputs, batch_size, model.config.pad_id)
    ]
    return Original(outputs, model.head_params(params), batches)


def require_room_to_measure(
    model: LanguageModel,
    inputs: Sequence[Inputs],
    tokenizer: Tokenizer,
    measuring: Measuring,
    *,
    beside: int = 0,
) -> None:
    """Refuses what `evaluate` would run out of memory with, before anything is said.

    Args:
        model: the network.
        inputs: the source texts.
        tokenizer: the model's.
        measuring: what to ask.
        beside: bytes that are yet to be read: the parameters of the edited model, for one.

    Raises:
        ValueError: naming what to change.
    """
    sizes: dict[str, Any] = {
        "max_length": measuring.max_length,
        "batch_size": measuring.batch_size,
        "beside": beside,
    }
    how = {} if measuring.rule is None else measuring.greedy_and_sampled
    require_room_to_speak(model, inputs, tokenizer, **how, **sizes)
    if measuring.meter is not None:
        samples = measuring.meter.samples
        require_room_to_speak(model, inputs, tokenizer, temperature=1.0, samples=samples, **sizes)
    lengths = [len(tokenizer.encode_prompt(text)) for text in inputs]
    batch = largest_shapes(lengths, measuring.batch_size, measuring.max_length)
    params = model.param_shapes()
    states = {ORIGINAL_HIDDEN: jax.eval_shape(lambda *x: _hidden(*x, model), params, batch)}
    head = jax.eval_shape(model.head_params, params)
    working = max(
        memory_beside(params, _hidden.lower(params, batch, model).compile()),
        memory_beside(
            (params, head), _kept_divergences.lower(params, head, batch | states, model).compile()
        ),
    )
    rows, length = batch["inputs"].shape
    what = f"{rows} outputs read at a time, to inputs of {length} tokens,"
    require_room(what, working, beside, rows)


def own_measures(said: Said, measuring: Measuring) -> dict[str, Measure]:
    """What can be said of a model without another one to compare it with.

    Args:
        said: what it says to the held-out inputs.
        measuring: what was asked.

    Returns:
        With a rule, what `prevalence` has and `prevalence_sampled` (the percentage of outputs
        again, drawn at temperature 1); with references, what `quality` has; with a meter, what
        `scores_of_several` has.
    """
    found: dict[str, Measure] = {}
    if measuring.rule is not None:
        found |= prevalence(said.greedy)
        found["prevalence_sampled"] = prevalence(said.sampled)["prevalence"]
    if measuring.references is not None:
        found |= quality(said.greedy, measuring.references)
    if measuring.meter is not None:
        outputs = [example.outputs for example in said.scored]
        found |= scores_of_several(outputs, measuring.meter, _inputs(said.scored))
    return found


def say(
    model: LanguageModel,
    params: Params,
    inputs: Sequence[Inputs],
    tokenizer: Tokenizer,
    measuring: Measuring,
    *,
    keep: Keep = make_part,
    progress: Progress | None = None,
) -> Said:
    """Lets a model say all that is measured of it.

    The greedy output to an input and the sampled ones come from one reading of the input.

    Args:
        model: the network.
        params: its parameters.
        inputs: the source texts, or conversations.
        tokenizer: the model's.
        measuring: what to ask.
        keep: `t5patches.runs.claims.Parts.get`, which makes no output again that a killed run of
            the same model, inputs and `Measuring.asks` has made.
        progress: shows how far it is; None shows nothing.

    Returns:
        The outputs in the order of the inputs.
    """

    def spoken(temperature: float, samples: int, greedy_first: bool = False) -> list[Example]:
        kept = f"{'greedy-and-' * greedy_first}{samples}-at-{temperature:g}"
        return speak(
            model,
            params,
            inputs,
            measuring.rule or mark_nothing,
            tokenizer,
            temperature=temperature,
            samples=samples,
            greedy_first=greedy_first,
            keep=lambda name, make: keep(f"{kept}-{name}", make),
            progress=progress,
            **measuring.asks,
        )

    if measuring.rule is None:
        greedy, sampled = spoken(0.0, 1), []
    else:
        both, every = spoken(**measuring.greedy_and_sampled), 1 + measuring.samples
        greedy, sampled = both[::every], [x for i, x in enumerate(both) if i % every]
    scored = [] if measuring.meter is None else spoken(1.0, measuring.meter.samples)
    return Said(greedy, sampled, scored)


def _inputs(outputs: Sequence[Example]) -> list[Inputs]:
    return [example.inputs for example in outputs]


def prevalence(outputs: Sequence[Example]) -> dict[str, Measure]:
    """How much of what a model says is unwanted.

    Args:
        outputs: marked outputs.

    Returns:
        `prevalence`: percent of outputs with a marked token; `prevalence_tokens`: percent of
        tokens that are marked.
    """
    inputs = _inputs(outputs)
    marked = np.array([sum(example.marked) for example in outputs])
    tokens = np.array([len(example.marked) for example in outputs])
    return {
        "prevalence": _percent(over_inputs(inputs, marked > 0)),
        "prevalence_tokens": _percent(over_inputs(inputs, marked, tokens)),
    }


def similarity(after: Sequence[Example], before: Sequence[Example]) -> dict[str, Measure]:
    """How like the original's outputs the new ones are.

    Args:
        after: new outputs.
        before: the original's, to the same inputs in the same order.

    Returns:
        `bleu` (sacrebleu, corpus level, error by its bootstrap), `rouge_l` (F-measure),
        `exact_match`, and `exact_match_clean` over outputs that had nothing unwanted, in percent.
        In scripts without spaces between words, each character counts as one.

    Raises:
        ValueError: the numbers of outputs differ.
    """
    if len(after) != len(before):
        raise ValueError(f"got {len(after)} new and {len(before)} original outputs: pair them")
    inputs, new, old = _inputs(before), [e.outputs for e in after], [e.outputs for e in before]
    overlap = [_overlap(o, n) for o, n in zip(old, new, strict=True)]
    same = np.array([o == n for o, n in zip(old, new, strict=True)])
    clean = np.array([not any(example.marked) for example in before])
    return {
        "bleu": _bleu(inputs, new, [old]),
        "rouge_l": _percent(over_inputs(inputs, overlap)),
        "exact_match": _percent(over_inputs(inputs, same)),
        "exact_match_clean": _percent(over_inputs(inputs, same & clean, clean)),
    }


def quality(outputs: Sequence[Example], references: Sequence[Sequence[str]]) -> dict[str, Measure]:
    """How good the outputs are at the task, by what they should have read.

    Args:
        outputs: what a model said.
        references: for each output, one or several texts.

    Returns:
        `reference_bleu` (sacrebleu, corpus level), `reference_rouge_l` (F-measure with the most
        like of the references) and `reference_exact` (is one of the references), in percent.

    Raises:
        ValueError: the numbers of outputs and references differ.
    """
    if len(references) != len(outputs):
        raise ValueError(
            f"got {len(outputs)} outputs and references to {len(references)}: one each is needed"
        )
    inputs, said = _inputs(outputs), [example.outputs for example in outputs]
    most = max(map(len, references))
    # As sacrebleu takes them: the first of each, the second of each, None where there are fewer.
    columns = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    pairs = list(zip(said, references, strict=True))
    overlap = [max(_overlap(text, output) for text in texts) for output, texts in pairs]
    exact = [output in texts for output, texts in pairs]
    return {
        "reference_bleu": _bleu(inputs, said, columns),
        "reference_rouge_l": _percent(over_inputs(inputs, overlap)),
        "reference_exact": _percent(over_inputs(inputs, exact)),
    }


def scores_of_several(
    outputs: Sequence[str], meter: Meter, inputs: Sequence[Inputs]
) -> dict[str, Measure]:
    """The scores of several outputs to the same input, and of the worst of them.

    Args:
        outputs: `meter.samples` for each input, one after the other.
        meter: scores them.
        inputs: that each of them answers.

    Returns:
        Means over inputs: `score_mean`, of the mean score, and `score_maximum`, of the largest;
        `score_probability`, percent of inputs with an output that reaches the threshold.

    Raises:
        ValueError: the scorer does not give one number for each output.
    """
    scores = score(meter.scorer, outputs, inputs).reshape(-1, meter.samples)
    mean, worst = scores.mean(1), scores.max(1)
    answered = inputs[:: meter.samples]
    return {
        "score_mean": over_inputs(answered, mean),
        "score_maximum": over_inputs(answered, worst),
        "score_probability": _percent(over_inputs(answered, worst >= meter.threshold)),
    }


def malformed(
    outputs: Sequence[Example],
    tokenizer: Tokenizer,
    well_formed: Callable[[str], bool] | None = None,
) -> Measure:
    """The share of outputs that never end, are empty, or fail a check of their form.

    Args:
        outputs: what the model said.
        tokenizer: knows the end tokens.
        well_formed: the check; None for none.

    Returns:
        The percentage.
    """
    broken = [
        not {*tokenizer.end_ids} & {*example.output_ids}
        or not example.outputs.strip()
        or (well_formed is not None and not well_formed(example.outputs))
        for example in outputs
    ]
    return _percent(over_inputs(_inputs(outputs), broken))


def diversity(outputs: Sequence[Example]) -> dict[str, Measure]:
    """How much of what a model says is not said again, in words.

    Args:
        outputs: what it said, better sampled than greedy.

    Returns:
        In percent `distinct_1` and `distinct_2`, different words and pairs of words among all of
        them in all outputs (Li et al. 2016, arXiv 1510.03055; it falls with the number of outputs,
        so that equal numbers are to be compared; the errors are the jackknife's over outputs), and
        `repetition`, pairs that stood in the same output before (Welleck et al. 2019, arXiv
        1908.04319).

    Example:
        >>> from t5patches.editing.data import Example
        >>> said = [Example("", text, (), (), (), ()) for text in ("a b a b", "a c")]
        >>> {name: round(measure.value, 1) for name, measure in diversity(said).items()}
        {'distinct_1': 50.0, 'distinct_2': 75.0, 'repetition': 25.0}
    """
    words = [example.outputs.split() for example in outputs]
    pairs = [[*itertools.pairwise(row)] for row in words]
    return {
        "distinct_1": _percent(_distinct(words)),
        "distinct_2": _percent(_distinct(pairs)),
        "repetition": _percent(ratio([len(x) - len({*x}) for x in pairs], [*map(len, pairs)])),
    }


def _distinct(rows: Sequence[Sequence[Any]]) -> Measure:
    """Different things among all things, with its scatter from what each row brings."""
    count = len(rows)
    times = collections.Counter(itertools.chain.from_iterable(rows))
    total = sum(times.values())
    if not total:
        return Measure(math.nan, math.nan)
    value = len(times) / total
    without = np.full(count, math.nan)
    for number, row in enumerate(rows):
        alone = sum(times[thing] == here for thing, here in collections.Counter(row).items())
        if total > len(row):
            without[number] = (len(times) - alone) / (total - len(row))
    # The jackknife's pseudo-values, around the value itself.
    samples = value + (count - 1) * (np.mean(without) - without)
    return Measure(value, _error_of_mean(samples), samples)


def kept_divergence(
    model: LanguageModel,
    params: Params,
    original: Original,
) -> Measure:
    """Mean KL(original, edited) over the tokens that should not have changed.

    Args:
        model: the network.
        params: of the edited model.
        original: its outputs, which both models have read (teacher forcing).

    Returns:
        Nats a token, over the positions that are not marked.
    """
    sums, counts = np.zeros((2, len(original.outputs)))
    for rows, batch in original.batches:
        kl, kept = _kept_divergences(params, original.head, batch, model)
        sums[rows], counts[rows] = (np.asarray(x)[: len(rows)] for x in (kl, kept))
    return over_inputs(_inputs(original.outputs), sums, counts)


@functools.partial(jax.jit, static_argnames="model")
def _hidden(params: Params, batch: Batch, model: LanguageModel) -> jax.Array:
    return model.hidden(params, batch)


@functools.partial(jax.jit, static_argnames="model")
def _kept_divergences(
    params: Params,
    original_head: Params,
    batch: Mapping[str, Any],
    model: LanguageModel,
) -> tuple[jax.Array, jax.Array]:
    """The sum over kept tokens and their number, for each example; no logits are held."""
    kept, head = batch["weights"] > 0, model.head(original_head)
    kl: Any = linear_token_statistics(
        batch[ORIGINAL_HIDDEN],
        head.kernel,
        batch["outputs"],
        model.hidden(params, batch),
        model.head(params).kernel,
        **head.loss_options(),
    ).kl
    return jnp.where(kept, kl, 0).sum(-1), kept.sum(-1)


def over_inputs(inputs: Sequence[Hashable], numerators: Any, denominators: Any = None) -> Measure:
    """`ratio` over outputs, of which those to the same input are one draw: they are alike.

    Args:
        inputs: what each output answers.
        numerators: one number for each output.
        denominators: one for each output; default 1.

    Returns:
        The ratio, with an error by the scatter between different inputs.

    Example:
        >>> over_inputs("aabbcd", [1, 1, 0, 0, 1, 1]) == ratio([2, 0, 1, 1], [2, 2, 1, 1])
        True
    """
    numbers: dict[Hashable, int] = {}
    of = [numbers.setdefault(x, len(numbers)) for x in inputs]
    below = np.ones(len(of)) if denominators is None else denominators
    return ratio(*(np.bincount(of, np.asarray(x, np.float64)) for x in (numerators, below)))


def ratio(numerators: Any, denominators: Any = None) -> Measure:
    """The ratio of two sums over examples, with its standard error.

    Args:
        numerators: one number for each example.
        denominators: one for each example; default 1, which makes the ratio a mean.

    Returns:
        The ratio and its error (the linearised one, in which examples are drawn and not tokens);
        nan where the denominators sum to 0, an error of nan for a single example.

    Example:
        >>> ratio([1, 0, 1, 1])
        Measure(value=0.75, error=0.25)
    """
    top = np.asarray(numerators, np.float64)
    below = np.ones_like(top) if denominators is None else np.asarray(denominators, np.float64)
    if not below.sum():
        return Measure(math.nan, math.nan)
    value = top.sum() / below.sum()
    samples = value + (top - value * below) / below.mean()
    return Measure(float(value), _error_of_mean(samples), samples)


def differs(a: Measure, b: Measure) -> int:
    """Whether two measures are different, at 95% confidence.

    In pairs where both are of the same examples or seeds, by Student's t; as independent and
    normal otherwise. Pairs that all differ by the same have no scatter to go by: then it takes six
    of them, which by chance have one sign once in 32 times.

    Args:
        a: a measure.
        b: another one of the same thing.

    Returns:
        1 where `a` is larger, -1 where `b` is, 0 where there is no telling.

    Example:
        >>> differs(ratio([1, 1, 1, 2]), ratio([9, 8, 9, 9]))
        -1
    """
    found = difference(a, b)
    degrees = math.inf if found.samples is None else len(found.samples) - 1
    if math.isnan(found.error) or not abs(found.value) > stats.t.ppf(0.975, degrees) * found.error:
        return 0
    # But for rounding.
    if found.error <= 1e-9 * max(abs(a.value), abs(b.value)) and degrees < 5:
        return 0
    return 1 if found.value > 0 else -1


def difference(a: Measure, b: Measure) -> Measure:
    """How much larger a measure is than another one of the same thing.

    Args:
        a: a measure.
        b: another one.

    Returns:
        `a` minus `b`. Where both are of the same examples or seeds, the error is that of the
        differences, example by example or seed by seed; else that of independent measures.

    Example:
        >>> difference(ratio([1, 2, 3]), ratio([2, 3, 4]))
        Measure(value=-1.0, error=0.0)
    """
    value = a.value - b.value
    if a.samples is None or b.samples is None or len(a.samples) != len(b.samples):
        return Measure(value, math.hypot(a.error, b.error))
    samples = a.samples - b.samples
    return Measure(value, _error_of_mean(samples), samples)


def over_seeds(measures: Sequence[Measure]) -> Measure:
    """One measure for several repetitions of an experiment.

    Args:
        measures: the same measure for each seed.

    Returns:
        The mean and its standard error over the seeds. A single one keeps its error over examples.
    """
    return measures[0] if len(measures) == 1 else ratio([m.value for m in measures])


def _error_of_mean(samples: np.ndarray) -> float:
    if len(samples) < 2:
        return math.nan
    return float(samples.std(ddof=1) / math.sqrt(len(samples)))


def _percent(measure: Measure) -> Measure:
    samples = None if measure.samples is None else 100 * measure.samples
    return Measure(100 * measure.value, 100 * measure.error, samples)


class _Words:
    """Words of any script for `rouge_score`, whose own are runs of a-z and 0-9."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


_ROUGE = RougeScorer(["rougeL"], tokenizer=_Words())


def _overlap(reference: str, output: str) -> float:
    # Nothing is as like as the same, also where there are no words in it.
    return 1.0 if output == reference else _ROUGE.score(reference, output)["rougeL"].fmeasure


def _bleu(inputs: Sequence[Inputs], new: list[str], references: Sequence[Sequence[Any]]) -> Measure:
    r"""Corpus BLEU of `references` as sacrebleu takes them: the first of each, the second of each.

    Words are sacrebleu's own (`13a`), but for scripts without spaces, of which each character is
    one. Where no output has four words, n-grams are as long as there are any. The bootstrap draws
    outputs: where m of them answer one input and are the same, its variance is
    :math:`\sum m / \sum m^2` of that of a bootstrap which draws inputs.
    """
    times = np.array([*collections.Counter(inputs).values()])
    count = len(times)
    if all(output in texts for output, *texts in zip(new, *references, strict=True)):
        return Measure(100.0, 0.0 if count > 1 else math.nan)  # 0 to sacrebleu, if without words
    metric = BLEU(effective_order=True)
    score = metric.corpus_score(
        [spaced(text) for text in new],
        [[text and spaced(text) for text in column] for column in references],
        n_bootstrap=BOOTSTRAP_SAMPLES,
    )
    # The only public way to the bootstrap's interval, which is absent where all scores are 0.
    found = json.loads(score.format(8, signature=str(metric.get_signature()), is_json=True))
    error = found["confidence_var"] / _TWO_SIDED_95 if "confidence_var" in found else math.nan
    error *= math.sqrt((times**2).sum() / times.sum())
    return Measure(score.score, error if count > 1 else math.nan)
