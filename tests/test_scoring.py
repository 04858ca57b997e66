"""Choices rated from the logits: the formula, shared prefixes, and what the command line prints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import VLM, ImageError, OptionError, PromptError
from edgevlm.decoding.sampling import log_softmax
from edgevlm.inputs.messages import user_message
from tests.conftest import noise
from tests.helpers.command import cli

QUESTION = "What is in this picture?"
CHOICES = ["yes", "yes, two", "no", "a red circle above a blue square", "a red circle", "Größe 🙂"]


def by_hand(vlm: VLM, choice: str) -> float:
    """Return a choice's log-likelihood from one pass over the prompt and the choice."""
    tokenizer = vlm.processor.tokenizer
    prompt = vlm.processor.prompt_ids([user_message(QUESTION, 0)], [])
    ids = [*tokenizer.encode(" " + choice), vlm.manifest.eos_token_ids[0]]
    rows = log_softmax(vlm.language_model.session().step([*prompt, *ids])[len(prompt) - 1 : -1])
    return float(rows[np.arange(len(ids)), ids].sum())


def test_the_scores_are_those_of_separate_passes(vlm: VLM) -> None:
    scores = vlm.score(None, QUESTION, CHOICES)
    assert list(scores.log_likelihoods) == CHOICES
    for choice in CHOICES:
        assert math.isclose(scores.log_likelihoods[choice], by_hand(vlm, choice), abs_tol=2e-3), choice
    weights = [math.exp(by_hand(vlm, choice)) for choice in CHOICES]
    assert list(scores.probabilities.values()) == pytest.approx([each / sum(weights) for each in weights], abs=1e-3)
    assert math.isclose(sum(scores.probabilities.values()), 1.0)
    assert math.isclose(scores.total_probability, sum(weights), rel_tol=1e-2)
    assert scores.best == CHOICES[int(np.argmax(weights))]


def test_the_order_of_choices_and_what_else_is_asked_change_nothing(vlm: VLM, china: Path) -> None:
    forward = vlm.score(china, QUESTION, CHOICES).log_likelihoods
    vlm.generate(china, QUESTION, max_new_tokens=16)  # after more than the prompt's length the pool keeps that answer
    backward = vlm.score(china, QUESTION, CHOICES[::-1])
    assert backward.cached_tokens == backward.prompt_tokens - 1
    for choice in CHOICES:
        assert math.isclose(forward[choice], backward.log_likelihoods[choice], abs_tol=2e-3)
        alone = vlm.score(china, QUESTION, [choice])
        assert math.isclose(forward[choice], alone.log_likelihoods[choice], abs_tol=2e-3)
        assert alone.probabilities == {choice: 1.0}


def test_the_prompt_is_read_once(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevlm.runtime.kv_session import Session

    read = []
    prefill = Session.prefill
    monkeypatch.setattr(
        Session, "prefill", lambda self, embeds, *rest: read.append(embeds.shape[1]) or prefill(self, embeds, *rest)
    )
    scores = vlm.score(None, "How many parts are there, and where?", CHOICES)
    lengths = [len(vlm.grammar_tokenizer.encode(choice)) for choice in CHOICES]
    assert read[0] == scores.prompt_tokens - scores.cached_tokens
    assert sum(read[1:]) < sum(lengths)  # what two choices begin with in common is read once too


def test_a_special_token_s_name_in_a_choice_is_its_letters(vlm: VLM) -> None:
    tokenizer = vlm.processor.tokenizer
    letters = vlm.grammar_tokenizer.encode("an <image>")
    assert tokenizer.decode(letters) == "an <image>"
    assert letters == tokenizer.encode(tokenizer.escape("an <image>"), add_special_tokens=False)
    scores = vlm.score(None, QUESTION, ["an <image>", "yes"])
    assert 0 < scores.probabilities["an <image>"] < 1


def test_bad_choices(vlm: VLM) -> None:
    for choices in ([], [""], ["a", "a"], "yes"):
        with pytest.raises(OptionError, match="choices must"):
            vlm.score(None, QUESTION, choices)
    with pytest.raises(OptionError, match="a choice is not valid Unicode text"):
        vlm.score(None, QUESTION, ["\ud800"])
    with pytest.raises(PromptError, match="the model's context holds 512"):
        vlm.score(None, QUESTION, ["yes", "word " * 300])
    with pytest.raises(ImageError):
        vlm.score("nonesuch.png", QUESTION, ["yes"])


LABELS = ["a red circle", "a gauge", "{label}", "Größe 🙂"]


@pytest.mark.parametrize(
    ("question", "ending"),
    [('Is "{label}" in this picture?', ""), (QUESTION, '\nDoes the label "{label}" apply? Answer yes or no.')],
)
def test_each_label_is_judged_as_if_it_were_asked_about_alone(vlm: VLM, question: str, ending: str) -> None:
    picture = noise(70, 120)
    scores = vlm.score_labels(picture, question, LABELS, cache_salt="labels" + question)
    assert list(scores.probabilities) == LABELS
    tokens = 0
    for label in LABELS:
        alone = vlm.score(picture, (question + ending).replace("{label}", label), ["yes", "no"])
        assert scores.log_likelihoods[label] == pytest.approx(dict(alone.log_likelihoods), abs=2e-3), label
        assert scores.probabilities[label] == pytest.approx(alone.probabilities["yes"], abs=1e-3)
        assert scores.total_probabilities[label] == pytest.approx(alone.total_probability, rel=1e-2)
        tokens += alone.prompt_tokens
    assert (scores.prompt_tokens, scores.views) == (tokens, alone.views)
    assert scores.image_tokens == len(LABELS) * alone.image_tokens
    threshold = sorted(scores.probabilities.values())[2]
    assert scores.above(threshold) == [label for label in LABELS if scores.probabilities[label] >= threshold]
    assert len(scores.above(threshold)) == 2 and scores.above(0.0) == LABELS


def test_for_all_labels_the_picture_is_encoded_and_prefilled_once(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = vlm.vision.encode

    def counted(views: Iterable[Any]) -> Iterator[Any]:
        for view in views:
            encoded.append(view)
            yield from encode([view])

    monkeypatch.setattr(vlm.vision, "encode", counted)
    monkeypatch.setattr(vlm._vision_cache, "_limit", 0)
    scores = vlm.score_labels(noise(80, 130), QUESTION, LABELS, cache_salt="once")
    assert len(encoded) == scores.views > 0 and scores.cached_views == 0
    image_tokens = scores.image_tokens // len(LABELS)
    assert scores.cached_tokens >= (len(LABELS) - 1) * image_tokens > 0


def test_the_two_answers_to_a_label_s_question_may_be_others(vlm: VLM) -> None:
    scores = vlm.score_labels(None, "Ist {label} im Bild?", ["Rost"], answers=("ja", "nein"))
    alone = vlm.score(None, "Ist Rost im Bild?", ["ja", "nein"])
    assert scores.probabilities["Rost"] == pytest.approx(alone.probabilities["ja"], abs=1e-3)


def test_bad_labels(vlm: VLM) -> None:
    for labels in ([], [""], ["a", "a"], "yes"):
        with pytest.raises(OptionError, match="labels must"):
            vlm.score_labels(None, QUESTION, labels)
    with pytest.raises(OptionError, match="answers must be two"):
        vlm.score_labels(None, QUESTION, ["a"], answers=("yes",))  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="the model's context holds 512"):
        vlm.score_labels(None, "{label}?", ["yes", "word " * 300])
    with pytest.raises(PromptError, match="labels need a question"):
        list(vlm.score_labels_steps([{"role": "system", "content": [{"type": "text", "text": "a"}]}], [], ["b"]))


def test_a_temperature_scales_and_never_reorders(vlm: VLM) -> None:
    own = vlm.score(None, QUESTION, CHOICES)
    assert own.temperature == 1
    for temperature in (0.4, 2.5):
        scaled = vlm.score(None, QUESTION, CHOICES, calibration_temperature=temperature)
        logits = np.array(list(scaled.log_likelihoods.values())) / temperature
        expected = np.exp(logits) / np.exp(logits).sum()
        assert list(scaled.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-9)
        assert (scaled.best, scaled.temperature) == (own.best, temperature)
        assert sorted(CHOICES, key=scaled.probabilities.__getitem__) == sorted(CHOICES, key=own.probabilities.get)
        assert scaled.total_probability == pytest.approx(own.total_probability, rel=1e-2)
        label = vlm.score_labels(None, QUESTION, ["a"], calibration_temperature=temperature)
        odds = (label.log_likelihoods["a"]["yes"] - label.log_likelihoods["a"]["no"]) / temperature
        assert label.probabilities["a"] == pytest.approx(1 / (1 + math.exp(-odds)), abs=1e-9)
    for bad in (0, -1, math.nan, math.inf, 0.01, 21, "2"):
        with pytest.raises(OptionError, match=r"calibration_temperature must be between 0\.05 and 20"):
            vlm.score(None, QUESTION, CHOICES, calibration_temperature=bad)


def test_the_command_prints_probabilities(exported: Path, china: Path, vlm: VLM) -> None:
    options = ["-m", exported, "--device", "CPU", "--inference-precision", "f32", "--no-cache"]
    wanted = vlm.score(china, QUESTION, ["yes", "no, two"]).probabilities
    arguments = ["run", china, QUESTION, *options, "--choices", 'yes, "no, two"']
    found = json.loads(cli(*arguments, "--json").stdout)
    assert found["probabilities"] == pytest.approx(wanted, abs=1e-4)
    assert found["answer"] == max(wanted, key=wanted.__getitem__)
    first, second = cli(*arguments).stdout.splitlines()
    assert first.endswith(found["answer"])
    assert float(first.split("%")[0]) >= float(second.split("%")[0])


def test_the_command_answers_in_the_form_asked_for(exported: Path, tmp_path: Path) -> None:
    options = ["-m", exported, "--device", "CPU", "--no-cache"]
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"enum": ["open", "shut"]}), encoding="utf-8")
    done = cli("run", QUESTION, *options, "--schema", schema)
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout) in {"open", "shut"}
    assert cli("run", QUESTION, *options, "--regex", "[0-9]{3}").stdout.strip().isdigit()
    cut = cli("run", QUESTION, *options, "--regex", "[0-9]{30}", "--max-new-tokens", 5, "--json")
    assert cut.exit_code == 1
    assert json.loads(cut.stdout)["satisfied"] is False
    assert cut.stderr.startswith("Error: the answer is not whole and does not satisfy the constraint")
    assert cut.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--schema", "nonesuch.json"], 1, "Error: no such schema file: nonesuch.json"),
        (["--schema", "."], 1, "Error: cannot read the schema ."),
        (["--regex", "("], 1, "Error: the regular expression cannot be used"),
        (["--choices", ""], 1, "Error: choices must be one text or more"),
        (["--choices", "yes,no", "--regex", "a"], 2, "Error: --choices and --regex exclude each other"),
    ],
)
def test_a_form_that_cannot_be_is_told_before_the_model_is_loaded(options: list[str], code: int, message: str) -> None:
    result = cli("run", QUESTION, *options)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.splitlines()[-1].startswith(message)
