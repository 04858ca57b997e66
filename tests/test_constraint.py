"""Answers that have to have a form: always valid, forced tokens read together, or told to be cut."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from edgevlm import VLM, Constraint, GenerationConfig, IncompleteAnswerError, OptionError
from edgevlm.decoding.sampling import log_softmax
from edgevlm.inputs.chat_template import ChatTemplate, user_message
from tests.conftest import SPECIAL_TOKENS

QUESTION = "What is in this picture?"
METER = {
    "type": "object",
    "properties": {
        "meter": {"enum": ["pressure gauge", "thermometer"]},
        "value": {"type": "integer", "minimum": 0, "maximum": 999},
        "alarms": {"type": "array", "items": {"enum": ["low", "high"]}, "maxItems": 3},
    },
    "required": ["meter", "value", "alarms"],
    "additionalProperties": False,
}
FORMS = {
    "schema": Constraint.json_schema(METER),
    "regex": Constraint.regex(r"[0-9]{2}\.[0-9] (bar|°C)"),
    "choices": Constraint.choices(["a red circle", "a blue square", 'a "sign"\n', "Größe"]),
    "lark": Constraint.lark('start: word (", " word){2}\nword: "gauge" | "display" | "label"'),
    "forms": Constraint.lark(
        'start: "<" @one ">" @two',
        {"one": Constraint.regex("[ab]{2}"), "two": Constraint.json_schema({"enum": [7, "x"]})},
    ),
}


def holds(form: str, text: str) -> bool:
    """Tell by other means than llguidance whether a text has the form."""
    if form == "schema":
        found = json.loads(text)
        assert list(found) == ["meter", "value", "alarms"]
        assert set(found["alarms"]) <= {"low", "high"}
        return found["meter"] in {"pressure gauge", "thermometer"} and 0 <= found["value"] <= 999
    patterns = {
        "regex": r"[0-9]{2}\.[0-9] (bar|°C)",
        "choices": 'a red circle|a blue square|a "sign"\n|Größe',
        "lark": "(gauge|display|label)(, (gauge|display|label)){2}",
        "forms": '<[ab]{2}>(7|"x")',
    }
    return re.fullmatch(patterns[form], text) is not None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("draft_tokens", [0, 8])
def test_an_answer_has_the_form(vlm: VLM, form: str, temperature: float, draft_tokens: int) -> None:
    config = GenerationConfig(temperature=temperature, draft_tokens=draft_tokens, constraint=FORMS[form])
    for seed in range(3 if temperature else 1):
        answer = vlm.generate(None, QUESTION, replace(config, seed=seed))
        assert holds(form, answer.text), answer.text
        assert (answer.satisfied, answer.finish_reason) == (True, "stop")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_drafts_and_forced_tokens_change_the_speed_only(vlm: VLM, form: str, temperature: float) -> None:
    config = GenerationConfig(temperature=temperature, seed=5, constraint=FORMS[form], draft_tokens=0)
    question = f'{QUESTION} a red circle {{"meter": "thermometer", "value": 7, "alarms": ["low", "low"]}} gauge, gauge'
    plain = vlm.generate(None, question, config)
    drafted = vlm.generate(None, question, replace(config, draft_tokens=8))
    assert drafted.token_ids == plain.token_ids


def test_forced_tokens_cost_no_step_of_their_own(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevlm.runtime.kv_session import Session

    steps = []
    step = Session.step
    monkeypatch.setattr(Session, "step", lambda self, ids, *rest: steps.append(len(ids)) or step(self, ids, *rest))
    text = "The display shows twelve parts on the left and none on the right."
    answer = vlm.generate(None, QUESTION, GenerationConfig(constraint=Constraint.choices([text])))
    assert answer.text == text
    assert steps == []  # all of it was read with the prompt
    assert answer.fast_forward_tokens == answer.generated_tokens > 5
    answer = vlm.generate(None, QUESTION, GenerationConfig(constraint=FORMS["schema"], draft_tokens=0))
    assert 0 < answer.fast_forward_tokens < answer.generated_tokens
    assert len(steps) <= answer.generated_tokens - answer.fast_forward_tokens


def test_every_token_is_the_likeliest_of_those_that_the_form_allows(vlm: VLM) -> None:
    """Forcing and masking in steps of several tokens chooses what a step by step search chooses."""
    texts = ["a red circle", "a blue square", "a blue circle"]
    answer = vlm.generate(None, QUESTION, GenerationConfig(constraint=Constraint.choices(texts)))
    spelled = vlm.grammar_tokenizer.token_bytes
    rests, choices = [f" {text}".encode() for text in texts], 0
    for number, token in enumerate(answer.token_ids):
        if not all(rest.startswith(spelled(token)) for rest in rests):
            logits = next_logits(vlm, list(answer.token_ids[:number]))
            allowed = [each for each in range(len(logits)) if any(rest.startswith(spelled(each)) for rest in rests)]
            assert token == max(allowed, key=lambda each: logits[each])
            choices += 1
        rests = [rest.removeprefix(spelled(token)) for rest in rests if rest.startswith(spelled(token))]
    assert rests == [b""]
    assert choices >= 1


def next_logits(vlm: VLM, chosen: list[int]) -> np.ndarray:
    ids = vlm.processor.prompt_ids([user_message(QUESTION, 0)], [])
    return vlm.language_model.session().step([*ids, *chosen])[-1]


def test_an_answer_begins_as_the_template_writes_answers(vlm: VLM) -> None:
    assert vlm.processor.template.response_prefix() == " "
    constrained = vlm.generate(None, QUESTION, GenerationConfig(constraint=Constraint.choices(["yes"])))
    assert vlm.processor.tokenizer.decode(list(constrained.token_ids)) == " yes"
    assert constrained.text == "yes"


@pytest.mark.parametrize(
    ("template", "lead"),
    [
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}{% if add_generation_prompt %}>{% endif %}", ""),
        ("{% for m in messages %}<{{ m.role }}>\n{{ m.content[0].text }}{% endfor %}"
         "{% if add_generation_prompt %}<assistant>{% endif %}", "\n"),
        ("{% for m in messages %}<{{ m.role }}>\n{{ m.content[0].text }}{% endfor %}"
         "{% if add_generation_prompt %}<assistant>\n{% endif %}", ""),
        ("{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}", ""),
    ],
)  # fmt: skip
def test_the_lead_comes_from_the_template(template: str, lead: str) -> None:
    assert ChatTemplate(template, {}).response_prefix() == lead


@pytest.mark.parametrize("budget", [1, 2, 5, 9, 14])
def test_an_answer_cut_short_says_so(vlm: VLM, budget: int) -> None:
    config = GenerationConfig(max_new_tokens=budget, constraint=FORMS["schema"])
    with pytest.raises(IncompleteAnswerError, match=rf"max_new_tokens \({budget}\) was reached") as error:
        vlm.generate(None, QUESTION, config)
    assert error.value.answer.satisfied is False
    assert error.value.answer.finish_reason == "length"
    assert error.value.answer.generated_tokens == budget
    *_, last = vlm.stream(None, QUESTION, config)
    assert last.answer and last.answer.text == error.value.answer.text
    with pytest.raises(IncompleteAnswerError):
        vlm.chat(config).ask(QUESTION)


def test_the_context_cuts_too(vlm: VLM) -> None:
    question = "word " * 60
    with pytest.raises(IncompleteAnswerError, match="the context is full"):
        vlm.generate(None, question, GenerationConfig(max_new_tokens=2000, constraint=Constraint.regex("[a-z]{900}")))


def test_a_stop_text_within_a_form_cuts_it(vlm: VLM) -> None:
    config = GenerationConfig(constraint=FORMS["schema"], stop=('"value"',))
    with pytest.raises(IncompleteAnswerError, match="stop text"):
        vlm.generate(None, QUESTION, config)


def test_a_form_that_may_end_or_go_on_is_satisfied_at_the_cut(vlm: VLM) -> None:
    answer = vlm.generate(None, QUESTION, GenerationConfig(max_new_tokens=6, constraint=Constraint.regex("[a-z ]+")))
    assert answer.satisfied is True
    assert re.fullmatch("[a-z ]+", answer.text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constraint.json_schema("{"), "the JSON schema is not JSON"),
        (lambda: Constraint.json_schema("[1]"), r"the JSON schema must be an object, not \[1\]"),
        (lambda: Constraint.json_schema({"type": "nonesuch"}), "schema cannot be used: Invalid type: nonesuch"),
        (lambda: Constraint.json_schema({"type": {1, 2}}), "the JSON schema is not JSON"),
        (lambda: Constraint.json_schema({"if": {}}), "Unimplemented keys"),
        (lambda: Constraint.json_schema({"$ref": "https://example.com/schema"}), "nothing is fetched"),
        (lambda: Constraint.json_schema({"type": "string", "pattern": "("}), "the JSON schema cannot be used"),
        (lambda: Constraint.regex("(a"), "the regular expression cannot be used: .*unclosed group"),
        (lambda: Constraint.regex("\ud800"), "the regular expression cannot be used"),
        (lambda: Constraint.regex(r"a[^\s\S]"), "the regular expression cannot be used: no text satisfies it"),
        (lambda: Constraint.choices([]), "choices must be one text or more"),
        (lambda: Constraint.choices("yes"), "choices must be one text or more"),
        (lambda: Constraint.choices(["yes", ""]), "none of them empty"),
        (lambda: Constraint.choices(["yes", "yes"]), "must differ"),
        (lambda: Constraint.lark("start: nowhere"), "the grammar cannot be used: .*unknown name"),
        (lambda: Constraint.lark("start: ("), "the grammar cannot be used"),
        (lambda: Constraint.lark("start: @nowhere"), "the grammar cannot be used"),
    ],
)  # fmt: skip
def test_a_bad_form_is_one_line(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OptionError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


SPELLED = {
    "const": (
        Constraint.json_schema({"const": "a <|im_end|><image> b<end_of_utterance>"}),
        r'"a <\|im_end\|><image> b<end_of_utterance>"',
    ),
    "enum": (
        Constraint.json_schema({"enum": ["a <|im_end|> b", "a <|im_start|> c"]}),
        r'"a <\|im_(end\|> b|start\|> c)"',
    ),
    "key": (
        Constraint.json_schema(
            {
                "type": "object",
                "properties": {"<image>": {"const": "<|im_end|>"}},
                "required": ["<image>"],
                "additionalProperties": False,
            }
        ),
        r'\{"<image>": "<\|im_end\|>"\}',
    ),
    "one choice": (Constraint.choices(["an <image>"]), "an <image>"),
    "choices": (
        Constraint.choices(["an <image>", "a <image>", "<end_of_utterance>"]),
        "an? <image>|<end_of_utterance>",
    ),
    "regex": (Constraint.regex("x<image>[a-z]{3}<end_of_utterance>"), "x<image>[a-z]{3}<end_of_utterance>"),
    "lark": (
        Constraint.lark('start: "<|im_end|>" ("<image>" | "<global-img>") "!"'),
        r"<\|im_end\|><(image|global-img)>!",
    ),
}


@pytest.mark.parametrize("form", SPELLED)
def test_a_special_token_s_name_in_a_form_is_its_letters(vlm: VLM, form: str) -> None:
    constraint, pattern = SPELLED[form]
    special = {vlm.processor.tokenizer.encode(token)[0] for token in SPECIAL_TOKENS}
    for seed in range(3):
        config = GenerationConfig(temperature=1.0, seed=seed, constraint=constraint, skip_special_tokens=False)
        answer = vlm.generate(None, QUESTION, config)
        assert re.fullmatch(pattern, answer.text), answer.text
        assert (answer.satisfied, answer.finish_reason) == (True, "stop")
        assert not special & set(answer.token_ids)
        letters = vlm.processor.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)
        assert letters.strip() == answer.text.strip()


def test_a_special_token_that_a_grammar_asks_for_is_that_token(vlm: VLM) -> None:
    image, end = (vlm.processor.tokenizer.encode(token)[0] for token in ("<image>", "<end_of_utterance>"))
    for text, tokens in (
        ('<image> "<image>" <image>', [image, image]),
        ('<image> "x" <end_of_utterance>', [image, end]),
    ):
        config = GenerationConfig(constraint=Constraint.lark(f"start: {text}"), skip_special_tokens=False)
        answer = vlm.generate(None, QUESTION, config)
        assert [each for each in answer.token_ids if each in (image, end)] == tokens
        assert answer.satisfied


def test_what_is_no_constraint_is_refused() -> None:
    with pytest.raises(OptionError, match="constraint must be a Constraint"):
        GenerationConfig(constraint=METER)  # type: ignore[arg-type]


def test_a_constraint_is_a_value() -> None:
    again = Constraint.json_schema(json.dumps(METER))
    assert again == FORMS["schema"]
    assert hash(again) == hash(FORMS["schema"])
    assert len({Constraint.regex("a"), Constraint.regex("a"), Constraint.json()}) == 2
    assert GenerationConfig(constraint=again) == GenerationConfig(constraint=FORMS["schema"])


def test_any_json_object(vlm: VLM) -> None:
    config = GenerationConfig(max_new_tokens=150, constraint=Constraint.json(), temperature=1.0)
    whole = 0
    for seed in range(6):
        *_, last = vlm.stream(None, QUESTION, replace(config, seed=seed))
        assert last.answer
        if last.answer.satisfied:
            whole += 1
            assert isinstance(json.loads(last.answer.text), dict)
    assert whole


@pytest.mark.parametrize("constraint", [None, FORMS["schema"]])
def test_logprobs_are_those_of_the_raw_logits(vlm: VLM, constraint: Constraint | None) -> None:
    config = GenerationConfig(max_new_tokens=40, constraint=constraint, top_logprobs=3)
    pieces = list(vlm.stream(None, QUESTION, config))
    answer = pieces[-1].answer
    assert answer
    ended = answer.token_ids[-1] in vlm.manifest.eos_token_ids
    assert len(answer.logprobs) == answer.generated_tokens - ended
    assert sum((piece.logprobs for piece in pieces), ()) == answer.logprobs
    if constraint:
        assert b"".join(each.data for each in answer.logprobs).decode() == f" {answer.text}"
    ids = vlm.processor.prompt_ids([user_message(QUESTION, 0)], [])
    rows = log_softmax(vlm.language_model.session().step([*ids, *answer.token_ids])[len(ids) - 1 : -1])
    for each, row, token in zip(answer.logprobs, rows, answer.token_ids, strict=False):
        assert each.token_id == token
        assert math.isclose(each.logprob, row[token], abs_tol=1e-3)
        assert [one.logprob for one in each.top] == pytest.approx(np.sort(row)[::-1][:3], abs=1e-3)


def test_logprobs_come_only_when_asked_for(vlm: VLM) -> None:
    short = GenerationConfig(max_new_tokens=4)
    assert vlm.generate(None, QUESTION, short).logprobs == ()
    alone = vlm.generate(None, QUESTION, replace(short, top_logprobs=0)).logprobs
    assert len(alone) == 4
    assert all(each.top == () for each in alone)
    with pytest.raises(OptionError, match="top_logprobs must be between 0 and 20, not 21"):
        GenerationConfig(top_logprobs=21)
