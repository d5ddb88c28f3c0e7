"""`t5patches reward`: a scalar head from pairs, and what it scores with."""

import functools
import json
import sys
import types

import editing_samples
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_samples

from t5patches import cli, scorers
from t5patches.editing import reward as reward_module
from t5patches.editing import reward_folder as folder_module
from t5patches.editing.evaluate import Meter, scores_of_several
from t5patches.editing.reward import (
    How,
    Reward,
    pair_arrays,
    pair_loss,
    read_pairs,
    record_text,
    repeats,
    split,
)
from t5patches.editing.scores import ScorerError, score, try_out
from t5patches.model.decoder.model import small_decoder
from t5patches.model.folder import load_model
from t5patches.model.huggingface import save_checkpoint
from t5patches.model.lora import Lora, attached, init_adapter, weights_fingerprint
from t5patches.model.memory import size
from t5patches.model.tokenizer import SentencePieceTokenizer, train_sentencepiece

pytestmark = pytest.mark.usefixtures("shared_programs")

TEXTS = ["a cat sat on a mat", "a dog sat on a cat", "on a mat a dog sat"]
TINY = editing_samples.tiny_model(vocab_size=64, emb_dim=8, head_dim=4)
SPIECE = train_sentencepiece(TEXTS * 20, 30)
TOKENIZER = SentencePieceTokenizer(SPIECE)


@functools.cache
def tiny_params():
    return jax.jit(TINY.init)(jax.random.key(0))


def line(inputs, chosen, rejected):
    return {"inputs": inputs, "chosen": chosen, "rejected": rejected}


def cats(count, seed=0):
    """Pairs in which the one with the cat is chosen, whatever else is said."""
    rng = np.random.default_rng(seed)
    words = ["sat", "on", "a", "mat"]

    def said(animal):
        before, after = (" ".join(rng.choice(words, rng.integers(1, 3))) for _ in range(2))
        return f"{before} {animal} {after}"

    return [line(" ".join(rng.choice(words, 4)), said("cat"), said("dog")) for _ in range(count)]


def write(path, lines):
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


# --- Scorers --------------------------------------------------------------------------------------


def test_a_scorer_is_given_inputs_where_it_asks_for_them():
    assert score(lambda outputs: map(len, outputs), ["a", ""], ["x", "y"]).tolist() == [1, 0]
    asked = score(lambda o, inputs: [len(x) for x in inputs], ["a", "b"], ["x", "yy"])
    assert asked.tolist() == [1, 2]


BAD = {
    "raises": (lambda o: 1 / 0, "the scorer failed on 2 outputs: ZeroDivisionError: division"),
    "too few": (lambda o: [1.0], "the scorer gave 1 numbers for 2 outputs"),
    "a table": (lambda o: [[1.0], [2.0]], r"gave numbers of the shape \(2, 1\) for 2 outputs"),
    "nan": (lambda o: [1.0, float("nan")], "1 of them not finite.* nan for number 2, 'b' to the i"),
    "infinite": (lambda o: [float("-inf"), 1.0], "-inf for number 1, 'a' to the input 'x'"),
    "beyond float32": (lambda o: [0.0, -1e200], "1 of them not finite in float32.* -1e.200 for"),
    "words": (lambda o: ["good", "bad"], "ValueError: could not convert string to float"),
    "nothing": (lambda o: None, "TypeError: 'NoneType' object is not iterable"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_scorer_does_wrong_is_told(name):
    scorer, said = BAD[name]
    with pytest.raises(ScorerError, match=said):
        score(scorer, ["a", "b"], ["x", "y"])
    with pytest.raises(ValueError, match="mine fails on a sample: "):
        try_out(scorer if name != "a table" else lambda o: [[1.0]] * 3, "mine")


def test_the_toxicity_meter_says_what_to_install_or_scores(monkeypatch):
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(
        ValueError, match=r"fails on a sample: ImportError: .*t5patches\[toxicity\]"
    ):
        try_out(scorers.toxicity, "t5patches.scorers:toxicity")
    fake = types.SimpleNamespace(predict_prob=lambda texts: np.array([0.25] * len(texts)))
    monkeypatch.setitem(sys.modules, "profanity_check", fake)
    assert scorers.toxicity(["a", ""]) == [0.25, 0.25]
    assert scorers.harmlessness(["a"]) == [0.75]


def test_the_toxicity_meter_itself():
    pytest.importorskip("profanity_check")
    good, bad, empty = scorers.toxicity(["have a nice day", "you stupid piece of shit", ""])
    assert good < 0.2 < 0.9 < bad
    assert empty < 0.5


# --- Pairs ----------------------------------------------------------------------------------------


def test_bad_lines_are_named(tmp_path):
    lines = [
        line("a", "a cat", "a dog"),
        line("a", "a cat", "a cat"),
        line("a", "a  cat", "a cat"),  # the tokenizer joins spaces
        {"inputs": "a", "chosen": "a cat"},
        line("a", "", ""),
        line("a", "", "a dog"),
        line("a", 3, "a dog"),
    ]
    with pytest.raises(ValueError, match="5 bad lines") as raised:
        read_pairs(write(tmp_path / "pairs.jsonl", lines), TOKENIZER)
    said = str(raised.value)
    for number in (2, 3, 5):
        assert f"line {number}: 'chosen' and 'rejected' are the same to the model: a tie" in said
    assert "line 4: got the fields ['chosen', 'inputs']; needed are 'inputs'" in said
    assert "line 7: 'chosen' must be a text" in said
    found = read_pairs(write(tmp_path / "pairs.jsonl", [lines[0], lines[5]]), TOKENIZER)
    assert found[1].chosen.output_ids == (1,)  # nothing but its end


def test_repeats_are_counted_and_never_on_both_sides(tmp_path):
    pair = line("a", "a cat", "a dog")
    other = line("a", "a dog", "a cat")
    lines = [pair, pair, other, line("sat", "a cat", "a dog"), line("mat", "a cat", "a dog")]
    pairs = read_pairs(write(tmp_path / "pairs.jsonl", lines), TOKENIZER)
    assert repeats(pairs) == (1, 3)
    assert repeats(pairs[2:]) == (0, 0)
    for seed in range(8):
        trained, held = split(pairs, 0.2, seed)
        assert len(trained) + len(held) == 5
        assert len(held) in (1, 3)
        of = [{pair.chosen.inputs for pair in side} for side in (trained, held)]
        assert not of[0] & of[1]
    assert split(pairs, 0.0, 0)[1] == []
    with pytest.raises(ValueError, match=r"3 pairs are of 1 input, and with 0\.2 of them held"):
        split(pairs[:3], 0.2, 0)


# --- The loss -------------------------------------------------------------------------------------


def test_the_loss_is_that_of_rewards_read_one_by_one(tmp_path):
    """Unpadded, each alone: the state that predicts the end token, times the head."""
    rng = np.random.default_rng(0)
    # Of two lengths, each with both prompts: few programs.
    lines = [line("sat on", "a mat sat", "mat a"), line("on sat", "sat a mat", "a mat")]
    pairs = read_pairs(write(tmp_path / "pairs.jsonl", lines), TOKENIZER)
    how = How(0.1, Lora(2))
    below = jax.tree.map(
        lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32),
        init_adapter(TINY, how.lora, 0),
    )
    weight = rng.standard_normal(8).astype(np.float32)
    params = attached(tiny_params(), below, how.lora)
    hidden = jax.jit(TINY.hidden)

    def reward(example):
        batch = {
            "inputs": np.array([example.input_ids], np.int32),
            "outputs": np.array([example.output_ids], np.int32),
        }
        return np.asarray(hidden(params, batch)[0, -1], np.float64) @ weight

    rewards = np.array([[reward(example) for example in pair] for pair in pairs])
    margin = rewards[:, 0] - rewards[:, 1]
    loss_of = jax.jit(functools.partial(pair_loss, model=TINY, how=how))
    trained = {"weight": jnp.asarray(weight), "below": below}
    loss, right = loss_of(trained, tiny_params(), pair_arrays(pairs, 0))
    assert loss == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-4)
    assert right == pytest.approx((margin > 0).mean())
    # The control: with the two the other way round it is another loss.
    arrays = pair_arrays(pairs, 0)
    arrays = arrays | {"chosen": arrays["rejected"], "rejected": arrays["chosen"]}
    loss, _ = loss_of(trained, tiny_params(), arrays | {"ends": arrays["ends"][:, ::-1]})
    assert loss == pytest.approx(np.log1p(np.exp(margin)).mean(), rel=1e-4)


# --- The command ----------------------------------------------------------------------------------

SMALL = ("--batch-size", "8", "--learning-rate", "0.03", "--lora", "2", "--epochs", "4")
SMALL += ("--checkpoint-every", "3", "--held-out", "0.25")


def command(*more, output="reward"):
    given = ["--model", "tiny", "--preferences", "pairs.jsonl", "--output", output]
    try:
        with jax.numpy_dtype_promotion("standard"):
            return cli.main(["reward", *given, *SMALL, *map(str, more)])
    except SystemExit as left:
        return left.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, preferences, and what was made of them."""
    path = tmp_path_factory.mktemp("reward")
    files = {"spiece.model": SPIECE, "README.md": "# A model\n"}
    save_checkpoint(path / "tiny", TINY, tiny_params(), files=files)
    write(path / "pairs.jsonl", cats(60))
    (path / "inputs.txt").write_text("a cat sat\non a mat\na dog\nsat\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(path)
        assert command("--quiet") == 0
    return path


@pytest.fixture
def place(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def test_a_reward_model_tells_pairs_apart_that_it_has_not_seen(place):
    record = json.loads((place / "reward" / "reward.json").read_text())
    assert record["pairs"] + record["held_out"] == 60
    assert record["held_out"] >= 15
    assert record["accuracy"]["value"] > 0.9
    assert record["history"]["loss"][0] == pytest.approx(np.log(2), abs=1e-6)
    assert record["history"]["loss"][-1] < 0.3
    card = (place / "reward" / "README.md").read_text()
    assert card.startswith("# A model\n\n## A reward model\n\n")
    assert "of the held-out pairs" in card
    load_model(place / "reward")
    # As a scorer: of new texts, in any order and number.
    reward, new = Reward(place / "reward", batch_size=4), cats(20, seed=7)
    inputs = [pair["inputs"] for pair in new]
    chosen, rejected = (
        score(reward, [pair[name] for pair in new], inputs) for name in ("chosen", "rejected")
    )
    assert (chosen > rejected).mean() > 0.85
    again = score(reward, [pair["chosen"] for pair in new][::-1], inputs[::-1])
    np.testing.assert_allclose(again[::-1], chosen, rtol=1e-4, atol=1e-5)
    meter = Meter(reward, samples=2)
    outputs = ["a cat sat", "", "a dog sat", "a dog"]
    worst = scores_of_several(outputs, meter, ["sat"] * 4)["score_maximum"]
    expected = score(reward, outputs, ["sat"] * 4).reshape(2, 2).max(1).mean()
    assert worst.value == pytest.approx(expected)
    assert not (place / "reward.unfinished").exists()


@pytest.mark.slow
def test_a_killed_one_goes_on_to_the_same_numbers(place, monkeypatch, capsys):
    update, calls = reward_module.compiled_update, []

    def killed(*arguments):
        calls.append(0)
        if len(calls) == 6:  # of which the first is the plan's
            raise KeyboardInterrupt
        return update(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(reward_module, "compiled_update", killed)
        patched.setattr(folder_module, "compiled_update", killed)
        assert command(output="again") == 130
    assert command("--resume", "--held-out", "0.5", output="again") == 2
    assert "held_out (0.25 there, 0.5 asked for)" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "_accuracy", None)  # written, not measured
        with pytest.raises(TypeError):
            command("--resume", output="again")
    assert not (place / "again").exists()
    assert command("--resume", output="again") == 0
    files = [place / name / "model.safetensors" for name in ("again", "reward")]
    assert files[0].read_bytes() == files[1].read_bytes()
    records = [json.loads((place / x / "reward.json").read_text()) for x in ("again", "reward")]
    assert records[0] | {"seconds": 0} == records[1] | {"seconds": 0}
    assert command(output="again") == 2
    assert "again exists: nothing is overwritten" in capsys.readouterr().err


@pytest.mark.slow
def test_it_scores_in_the_other_commands(place, capsys):
    asked = ("--inputs", "inputs.txt", "--max-length", "8", "--reward", "reward")
    small = ("--steps", "1", "--inputs-per-step", "4", "--samples", "8", "--update-size", "16")
    made = ("--lora", "2", "--most-kl", "50", "--output", "aligned", "--quiet", "--json")
    with jax.numpy_dtype_promotion("standard"):
        assert cli.main(["align", "--model", "tiny", *asked, *small, *made]) == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["job"]["reward"]) == 64
    assert "towards `reward`" in (place / "aligned" / "README.md").read_text()
    more = ("--samples", "2", "--quiet", "--json", "--batch-size", "8")
    assert cli.main(["evaluate", "--before", "tiny", "--after", "tiny", *asked, *more]) == 0
    assert "score_maximum" in json.loads(capsys.readouterr().out)["before"]


def test_what_is_no_reward_model_is_refused(place, tmp_path, capsys):
    def refused(folder):
        asked = ["--model", "tiny", "--inputs", "inputs.txt", "--output", str(tmp_path / "none")]
        assert cli.main(["align", *asked, "--reward", str(folder)]) == 2
        return capsys.readouterr().err

    assert "tiny is no reward model, as it has no reward.json" in refused("tiny")
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for file in (place / "reward").iterdir():
        (spoilt / file.name).write_bytes(file.read_bytes())
    record = json.loads((spoilt / "reward.json").read_text())
    for weight in (record["weight"][1:], [*record["weight"][1:], float("nan")]):
        (spoilt / "reward.json").write_text(json.dumps(record | {"weight": weight}))
        assert "8 finite numbers are needed as the weight of the head" in refused(spoilt)
    # As `edit` or `align --merge` leave it, who copy what they do not know.
    (spoilt / "reward.json").write_text(json.dumps(record))
    (spoilt / "model.safetensors").write_bytes((place / "tiny/model.safetensors").read_bytes())
    assert "the head there was trained on other weights" in refused(spoilt)
    wrong = ({"weight": "x"}, {"weight": [10**400] * 8}, {"job": {"chat": []}})
    for content in ("{", "[]", "{}", *(json.dumps(record | x) for x in wrong)):
        (spoilt / "reward.json").write_text(content)
        assert "reward.json cannot be read" in refused(spoilt)
    for name in ("reward.json", "more.safetensors"):
        (spoilt / "reward.json").write_text(json.dumps(record))
        (spoilt / name).unlink(missing_ok=True)
        (spoilt / name).symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").write_text(json.dumps(record))
        assert f"{name} is a link to" in refused(spoilt)
        (spoilt / name).unlink()
    assert not (tmp_path / "none.unfinished").exists()


def test_a_reward_model_needs_room_for_the_outputs(tmp_path):
    model = small_decoder(vocab_size=336, width=4, layers=1, begin_id=0, max_positions=9)
    files = {"tokenizer.json": tokenizer_samples.tokenizer_json("byte-level")}
    save_checkpoint(tmp_path / "made", model, model.init(jax.random.key(0)), files=files)
    head = record_text(
        {"job": {"chat": None}}, np.arange(4), weights_fingerprint(tmp_path / "made")
    )
    (tmp_path / "made" / "reward.json").write_text(head)
    reward = Reward(tmp_path / "made")
    assert len(reward._tokenizer.encode_prompt("zz")) == 2
    reward.require_inputs(["z", "zz"], 7)  # and an end token, which is read of no place of its own
    with pytest.raises(ValueError, match="cannot be given input 2: a prompt has 2 tokens and its"):
        reward.require_inputs(["z", "zz"], 8)
    # What is longer all the same, as another tokenizer counts otherwise, is read as far as it goes.
    said = "xqzjkvwyxqzj"
    assert len(reward._tokenizer.encode(said).ids) == len(said)
    fits = reward([said[:7]], ["zz"])
    with pytest.warns(UserWarning, match=r"positions \(9\): they are scored without their last w"):
        longer = reward([said, said[:6]], ["zz", "zz"])
    assert longer[0] == pytest.approx(fits[0], rel=1e-5)
    assert longer[1] != pytest.approx(fits[0], rel=1e-3)
    with pytest.raises(ValueError, match="a prompt has 10 tokens and its output may have 1"):
        reward(["z"], ["z" * 10])


def test_what_is_wrong_is_told_before_weights_are_read(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder_module, "load_checkpoint", None)

    def refused(*more):
        assert command(*more, output="none") == 2
        assert not (place / "none.unfinished").exists()
        return capsys.readouterr().err

    ties = write(tmp_path / "ties.jsonl", [line("a", "a cat", "a cat")])
    assert "line 1: 'chosen' and 'rejected' are the same" in refused("--preferences", ties)
    one = write(tmp_path / "one.jsonl", [line("a", "a cat", "a dog")])
    assert "1 pairs are of 1 input" in refused("--preferences", one)
    assert "held_out is 1.0" in refused("--held-out", "1")
    assert "learning_rate is 0.0" in refused("--learning-rate", "0")
    assert "learning_rate is 1e+39" in refused("--learning-rate", "1e39")
    assert "No such file" in refused("--preferences", "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "has no preferences" in refused("--preferences", tmp_path / "empty.jsonl")
    both = write(tmp_path / "both.jsonl", [*cats(60), *cats(1), line("a", "a", "sat")])
    assert command("--plan", "--preferences", both, "--json", output="none") == 0
    capsys.readouterr()
    assert command("--plan", "--preferences", both, output="none") == 0
    said = capsys.readouterr().out
    assert "1 pairs repeat another one, and count each time" in said
    assert "pairs to train on, " in said
    assert "memory on each of 1 x" in said
    # What training starts from is held beside what is trained, where that is all of it.
    assert command("--plan", "--lora", "0", "--json", output="none") == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["parameters"] == 2 * size(tiny_params()) + 4 * 8
    (place / "none").mkdir()
    assert "none exists: nothing is overwritten" in refused("--plan")
    (place / "none").rmdir()
