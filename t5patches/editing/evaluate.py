"""What an edit changed: unwanted tokens, similarity to the original's outputs, distance to it.

Every measure comes with a standard error over the held-out examples; `over_seeds` replaces it by
one over repetitions of the whole experiment.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from scipy import stats

from t5patches.editing.annotate import Keep, Rule, require_room_to_speak, speak
from t5patches.editing.batches import example_batches, largest_shapes
from t5patches.editing.data import Example
from t5patches.editing.plan import require_room
from t5patches.editing.scores import Scorer, score
from t5patches.model.memory import beside as memory_beside
from t5patches.model.protocol import LanguageModel, Params
from t5patches.model.tokenizer import Inputs, Span, Tokenizer
from t5patches.runs.claims import make_part
from t5patches_kernels import linear_token_statistics

BOOTSTRAP_SAMPLES = 300
_TWO_SIDED_95 = 1.96


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number and its standard error.

    Attributes:
        value: the number.
        error: nan where there is too little to tell.
        samples: numbers whose mean is `value` and whose scatter gives `error`, one for each
            example or seed, so that two measures of the same examples can be compared in pairs.
    """

    value: float
    error: float
    samples: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)


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
    """Measures how bad the worst of several sampled outputs is (Gehman et al. 2020, section 4).

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
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}: at least 1 output an input is needed")


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
        batch_size: examples at a time.
        seed: of what is sampled.
    """

    rule: Rule | None = None
    max_length: int = 64
    well_formed: Callable[[str], bool] | None = None
    references: Sequence[Sequence[str]] | None = None
    meter: Meter | None = None
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses to compare with references that are not there."""
        references = self.references or ()
        absent = [i for i, texts in enumerate(references, start=1) if not texts]
        if absent:
            raise ValueError(
                f"{len(absent)} of {len(references)} inputs have no references (the first is "
                f'number {absent[0]}): give a .jsonl file with {{"inputs": "...", "references": '
                '["..."]} a line'
            )

    @property
    def asks(self) -> dict[str, int]:
        """What outputs depend on, besides model and inputs."""
        return {name: getattr(self, name) for name in ("max_length", "batch_size", "seed")}


def evaluate(
    model: LanguageModel,
    params: Params,
    original: Params,
    before: Sequence[Example],
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
        original: parameters of the original.
        before: what the original says to the held-out inputs, marked by the rule.
        tokenizer: the model's.
        measuring: what to ask.
        keep: keeps outputs, see `say`.
        progress: shows how far it is; None shows nothing.

    Returns:
        The measures and the new outputs.

    Raises:
        ValueError: there is nothing to compare.
    """
    if not before:
        raise ValueError("there are no held-out outputs to compare with: at least one is needed")
    greedy = say(model, params, _inputs(before), tokenizer, measuring, keep=keep, progress=progress)
    measures = {
        "kl": kept_divergence(model, params, original, before, batch_size=measuring.batch_size)
    }
    measures |= own_measures(
        model, params, greedy, tokenizer, measuring, keep=keep, progress=progress
    )
    measures |= similarity(greedy, before)
    if measuring.rule is None:
        del measures["exact_match_clean"]
    measures["malformed"] = malformed(greedy, tokenizer, measuring.well_formed)
    return Evaluation(measures, greedy)


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
    sizes: dict[str, int] = {
        "max_length": measuring.max_length,
        "batch_size": measuring.batch_size,
        "beside": beside,
    }
    require_room_to_speak(model, inputs, tokenizer, **sizes)
    if measuring.meter is not None:
        samples = measuring.meter.samples
        require_room_to_speak(model, inputs, tokenizer, temperature=1.0, samples=samples, **sizes)
    lengths = [len(tokenizer.encode_prompt(text)) for text in inputs]
    batch = largest_shapes(lengths, measuring.batch_size, measuring.max_length)
    params = model.param_shapes()
    program = _kept_divergences.lower(params, params, batch, model).compile()
    rows, length = batch["inputs"].shape
    what = f"{rows} outputs read by both models at a time, to inputs of {length} tokens,"
    require_room(what, memory_beside((params, params), program), beside, rows)


def own_measures(
    model: LanguageModel,
    params: Params,
    greedy: Sequence[Example],
    tokenizer: Tokenizer,
    measuring: Measuring,
    *,
    keep: Keep = make_part,
    progress: Progress | None = None,
) -> dict[str, Measure]:
    """What can be said of a model without another one to compare it with.

    Args:
        model: the network.
        params: its parameters.
        greedy: what it says to the held-out inputs when it decodes greedily, see `say`.
        tokenizer: the model's.
        measuring: what to ask.
        keep: keeps outputs, see `say`.
        progress: shows how far it is; None shows nothing.

    Returns:
        With a rule, what `prevalence` has and `prevalence_sampled` (the percentage of outputs
        again, drawn at temperature 1); with references, what `quality` has; with a meter, what
        `worst_of_several` has.
    """

    def sampled(samples: int) -> list[Example]:
        return say(
            model,
            params,
            _inputs(greedy),
            tokenizer,
            measuring,
            temperature=1.0,
            samples=samples,
            keep=keep,
            progress=progress,
        )

    found: dict[str, Measure] = {}
    if measuring.rule is not None:
        found |= prevalence(greedy)
        found["prevalence_sampled"] = prevalence(sampled(1))["prevalence"]
    if measuring.references is not None:
        found |= quality(greedy, measuring.references)
    meter = measuring.meter
    if meter is not None:
        outputs = sampled(meter.samples)
        found |= worst_of_several([e.outputs for e in outputs], meter, _inputs(outputs))
    return found


def say(
    model: LanguageModel,
    params: Params,
    inputs: Sequence[Inputs],
    tokenizer: Tokenizer,
    measuring: Measuring,
    *,
    temperature: float = 0.0,
    samples: int = 1,
    keep: Keep = make_part,
    progress: Progress | None = None,
) -> list[Example]:
    """What a model says, marked where there is a rule.

    Args:
        model: the network.
        params: its parameters.
        inputs: the source texts, or conversations.
        tokenizer: the model's.
        measuring: the rule, and how many tokens at the most.
        temperature: 0 for greedy decoding.
        samples: outputs to each input.
        keep: `t5patches.runs.claims.Parts.get`, which makes no output again that a killed run of
            the same model, inputs and `Measuring.asks` has made.
        progress: shows how far it is; None shows nothing.

    Returns:
        Examples in the order of the inputs.
    """
    return speak(
        model,
        params,
        inputs,
        measuring.rule or _unmarked,
        tokenizer,
        max_length=measuring.max_length,
        batch_size=measuring.batch_size,
        seed=measuring.seed,
        temperature=temperature,
        samples=samples,
        keep=lambda name, make: keep(f"{samples}-at-{temperature:g}-{name}", make),
        progress=progress,
    )


def _unmarked(inputs: str, output: str) -> list[Span]:
    """The rule where nothing is known to be unwanted."""
    return []


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
    marked = np.array([sum(example.marked) for example in outputs])
    tokens = np.array([len(example.marked) for example in outputs])
    return {
        "prevalence": _percent(ratio(marked > 0)),
        "prevalence_tokens": _percent(ratio(marked, tokens)),
    }


def similarity(after: Sequence[Example], before: Sequence[Example]) -> dict[str, Measure]:
    """How like the original's outputs the new ones are.

    Args:
        after: new outputs.
        before: the original's, to the same inputs in the same order.

    Returns:
        `bleu` (sacrebleu, corpus level, error by its bootstrap), `rouge_l` (F-measure),
        `exact_match`, and `exact_match_clean` over outputs that had nothing unwanted, in percent.

    Raises:
        ValueError: the numbers of outputs differ.
    """
    if len(after) != len(before):
        raise ValueError(f"got {len(after)} new and {len(before)} original outputs: pair them")
    new, old = [e.outputs for e in after], [e.outputs for e in before]
    overlap = [_overlap(o, n) for o, n in zip(old, new, strict=True)]
    same = np.array([o == n for o, n in zip(old, new, strict=True)])
    clean = np.array([not any(example.marked) for example in before])
    return {
        "bleu": _bleu(new, [old]),
        "rouge_l": _percent(ratio(overlap)),
        "exact_match": _percent(ratio(same)),
        "exact_match_clean": _percent(ratio(same & clean, clean)),
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
    said = [example.outputs for example in outputs]
    most = max(map(len, references))
    # As sacrebleu takes them: the first of each, the second of each, None where there are fewer.
    columns = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    pairs = list(zip(said, references, strict=True))
    overlap = [max(_overlap(text, output) for text in texts) for output, texts in pairs]
    return {
        "reference_bleu": _bleu(said, columns),
        "reference_rouge_l": _percent(ratio(overlap)),
        "reference_exact": _percent(ratio([output in texts for output, texts in pairs])),
    }


def worst_of_several(
    outputs: Sequence[str], meter: Meter, inputs: Sequence[Inputs] = ()
) -> dict[str, Measure]:
    """The score of the worst of several outputs to the same input.

    Args:
        outputs: `meter.samples` for each input, one after the other.
        meter: scores them.
        inputs: that each of them answers, for a scorer that asks.

    Returns:
        `score_maximum` (mean over inputs of the largest score) and `score_probability` (percent of
        inputs with an output that reaches the threshold).

    Raises:
        ValueError: the scorer does not give one number for each output.
    """
    scores = score(meter.scorer, outputs, inputs)
    worst = scores.reshape(-1, meter.samples).max(1)
    return {
        "score_maximum": ratio(worst),
        "score_probability": _percent(ratio(worst >= meter.threshold)),
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
    return _percent(ratio(broken))


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
    original: Params,
    outputs: Sequence[Example],
    *,
    batch_size: int = 256,
) -> Measure:
    """Mean KL(original, edited) over the tokens that should not have changed.

    Args:
        model: the network.
        params: of the edited model.
        original: parameters of the original.
        outputs: the original's, marked; both models read them (teacher forcing).
        batch_size: examples at a time.

    Returns:
        Nats a token, over the positions that are not marked.
    """
    sums, counts = np.zeros(len(outputs)), np.zeros(len(outputs))
    for rows, batch in example_batches(outputs, batch_size, model.config.pad_id):
        kl, kept = _kept_divergences(params, original, batch, model)
        sums[rows], counts[rows] = (np.asarray(x)[: len(rows)] for x in (kl, kept))
    return ratio(sums, counts)


@functools.partial(jax.jit, static_argnames="model")
def _kept_divergences(
    params: Params,
    original: Params,
    batch: Mapping[str, Any],
    model: LanguageModel,
) -> tuple[jax.Array, jax.Array]:
    """The sum over kept tokens and their number, for each example; no logits are held."""
    kept, head = batch["weights"] > 0, model.head(original)
    kl: Any = linear_token_statistics(
        model.hidden(original, batch),
        head.kernel,
        batch["outputs"],
        model.hidden(params, batch),
        model.head(params).kernel,
        **head.loss_options(),
    ).kl
    return jnp.where(kept, kl, 0).sum(-1), kept.sum(-1)


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
    normal otherwise.

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


def _overlap(reference: str, output: str) -> float:
    return RougeScorer(["rougeL"], use_stemmer=False).score(reference, output)["rougeL"].fmeasure


def _bleu(new: list[str], references: Sequence[Sequence[Any]]) -> Measure:
    metric = BLEU()
    score = metric.corpus_score(new, references, n_bootstrap=BOOTSTRAP_SAMPLES)
    # The only public way to the bootstrap's interval, which is absent where all scores are 0.
    found = json.loads(score.format(8, signature=str(metric.get_signature()), is_json=True))
    error = found["confidence_var"] / _TWO_SIDED_95 if "confidence_var" in found else math.nan
    return Measure(score.score, error if len(new) > 1 else math.nan)
