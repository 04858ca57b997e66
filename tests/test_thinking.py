"""Thinking models: the thought told from the answer, by tokens; bounded, left out, constrained after it."""

from __future__ import annotations

import json
import os
import random
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import VLM, Constraint, GenerationConfig, IncompleteAnswerError, OptionError, ThinkingError
from edgevlm.decoding.sampling import greedy
from edgevlm.decoding.stop_text import StopText
from edgevlm.decoding.thinking import ThoughtSelector, ThoughtSplitter
from edgevlm.inputs.chat_template import ChatTemplate
from edgevlm.inputs.messages import text_message, user_message
from edgevlm.inputs.thinking import Opening, Thinking, Thought
from edgevlm.inputs.tokenizer import Tokenizer
from edgevlm.jobs.batch import Batch, run_batch
from edgevlm.jobs.sinks import SqliteSink
from edgevlm.jobs.spec import Defaults
from tests.conftest import CHAT_TEMPLATE, F32
from tests.helpers.batches import read, write
from tests.helpers.command import cli
from tests.helpers.damage import copy_export, reseal
from tests.helpers.thinking import ALWAYS, TEMPLATE, Script

QUESTION = "What is it?"
YES = Constraint.choices(["yes", "no, it is not"])
_PUBLISHED = os.environ.get("EDGEVLM_PUBLISHED_CONFIGS")


@pytest.fixture(scope="module")
def tokenizer(thinker: VLM) -> Tokenizer:
    return thinker.processor.tokenizer


@pytest.fixture(scope="module")
def script(tokenizer: Tokenizer) -> Script:
    return Script(tokenizer)


@pytest.fixture(scope="module")
def texts(tokenizer: Tokenizer, script: Script) -> tuple[str, str]:
    """The thought and the answer of the script."""
    return tokenizer.decode(script.thought).strip(), tokenizer.decode(script.answer).strip()


def variant(folder: Path, target: Path, template: str, markers: tuple[str, str] = ("<think>", "</think>")) -> VLM:
    """Return the model with another chat template, and its markers called otherwise."""
    copy_export(folder, target)
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    file = target / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    text = text.replace('"<think>"', json.dumps(markers[0])).replace('"</think>"', json.dumps(markers[1]))
    file.write_text(text, encoding="utf-8")
    reseal(target)
    return VLM(target, F32)


# Told apart


def test_the_thought_is_told_from_the_answer(thinker: VLM, script: Script, texts: tuple[str, str]) -> None:
    pieces = list(thinker.stream(None, QUESTION))
    answer = pieces[-1].answer
    assert answer is not None
    assert (answer.reasoning_content, answer.text) == texts
    assert answer.token_ids == (*script.thought, script.close, script.blank, *script.answer, script.end)
    assert answer.reasoning_tokens == len(script.thought) + 1
    assert answer.finish_reason == "stop"
    assert "".join(piece.reasoning_content for piece in pieces) == texts[0]
    assert "".join(map(str, pieces)) == "".join(piece.text for piece in pieces) == texts[1]
    assert not any(piece.text and piece.reasoning_content for piece in pieces)
    assert len([piece for piece in pieces if piece.reasoning_content]) > 3  # as it comes, and not at its end
    assert not any("\ufffd" in piece.text + piece.reasoning_content for piece in pieces)
    shown = answer.to_dict()
    assert (shown["answer"], shown["reasoning_content"]) == texts[::-1]
    assert shown["reasoning_tokens"] == answer.reasoning_tokens


def test_log_probabilities_are_those_of_the_answer(thinker: VLM, script: Script) -> None:
    pieces = list(thinker.stream(None, QUESTION, top_logprobs=0))
    answer = pieces[-1].answer
    assert answer is not None
    assert [each.token_id for each in answer.logprobs] == [script.blank, *script.answer]
    assert tuple(each for piece in pieces for each in piece.logprobs) == answer.logprobs
    assert not any(piece.logprobs for piece in pieces if piece.reasoning_content)


def test_stop_texts_end_the_answer_alone(thinker: VLM, tokenizer: Tokenizer, script: Script) -> None:
    in_thought = "漢"
    whole = thinker.generate(None, QUESTION)
    assert in_thought in whole.reasoning_content
    assert in_thought not in whole.text
    assert thinker.generate(None, QUESTION, stop=(in_thought,)).text == whole.text
    in_answer = tokenizer.decode(script.answer[2:3])
    cut = thinker.generate(None, QUESTION, stop=(in_answer,))
    assert (cut.text, cut.reasoning_content) == (whole.text.partition(in_answer)[0], whole.reasoning_content)


def test_special_tokens_that_are_kept_are_no_markers(thinker: VLM, texts: tuple[str, str]) -> None:
    answer = thinker.generate(None, QUESTION, skip_special_tokens=False)
    assert (answer.reasoning_content, answer.text) == texts


def test_a_thought_that_never_ends_leaves_no_answer(thinker: VLM, tokenizer: Tokenizer, script: Script) -> None:
    endless = GenerationConfig(max_new_tokens=60, chat_template_kwargs={"start": "L"})
    plain, drafted = (thinker.generate(None, QUESTION, replace(endless, draft_tokens=n)) for n in (0, 8))
    assert (plain.text, plain.finish_reason, plain.reasoning_tokens) == ("", "length", 60)
    assert plain.reasoning_content == tokenizer.decode(script.loop * 12).strip()
    assert drafted.accepted_tokens > 20
    assert (drafted.token_ids, drafted.reasoning_content) == (plain.token_ids, plain.reasoning_content)


def test_a_model_that_does_not_think_has_no_thought(vlm: VLM) -> None:
    answer = vlm.generate(None, QUESTION, max_new_tokens=4, thinking_budget=0)
    assert (answer.reasoning_content, answer.reasoning_tokens) == (None, 0)
    assert answer.text == vlm.generate(None, QUESTION, max_new_tokens=4, think=False).text
    assert answer.text == vlm.generate(None, QUESTION, max_new_tokens=4).text
    with pytest.raises(ThinkingError, match=r"^this model does not think before it answers; leave out"):
        vlm.generate(None, QUESTION, think=True)


# With and without


def test_the_template_s_variable_keeps_the_model_from_thinking(thinker: VLM, texts: tuple[str, str]) -> None:
    ids = prompt(thinker, thinker.processor.thinking.opening(False, {}))
    for config in (
        GenerationConfig(think=False),
        GenerationConfig(chat_template_kwargs={"enable_thinking": False}),
        GenerationConfig(think=False, chat_template_kwargs={"enable_thinking": True}),
    ):
        answer = thinker.generate(None, QUESTION, config)
        assert (answer.text, answer.reasoning_content, answer.prompt_tokens) == (texts[1], None, len(ids))
    thought = thinker.generate(None, QUESTION, think=True, chat_template_kwargs={"enable_thinking": False})
    assert thought.reasoning_content == texts[0]


def test_a_thought_that_the_template_opens_whatever_it_is_told_is_closed(
    exported_thinker: Path, tmp_path: Path, thinker: VLM, texts: tuple[str, str]
) -> None:
    always = variant(exported_thinker, tmp_path / "always", ALWAYS)
    assert always.processor.thinking.supported
    assert always.generate(None, QUESTION).reasoning_content == texts[0]
    answer = always.generate(None, QUESTION, think=False)
    assert (answer.text, answer.reasoning_content) == (texts[1], None)
    without, with_variable = (prompt(model, model.processor.thinking.opening(False, {})) for model in (always, thinker))
    assert without == with_variable
    assert always.score(None, QUESTION, ["yes"]).prompt_tokens == len(without)


def prompt(model: VLM, opening: Opening) -> list[int]:
    return model.processor.prompt_ids([user_message(QUESTION, 0)], [], opening.variables, opening.suffix)


def test_scores_are_without_a_thought(thinker: VLM, script: Script, texts: tuple[str, str]) -> None:
    scores = thinker.score(None, QUESTION, [texts[1], "yes"])
    assert scores.prompt_tokens == len(prompt(thinker, thinker.processor.thinking.opening(False, {})))
    assert thinker.score(None, QUESTION, [texts[1], "yes"], think=True).log_likelihoods == scores.log_likelihoods


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_at_its_budget_the_thought_is_closed(
    thinker: VLM, tokenizer: Tokenizer, script: Script, texts: tuple[str, str], budget: int
) -> None:
    answer = thinker.generate(None, QUESTION, thinking_budget=budget)
    ending = (script.one("\n"), script.close)
    assert answer.token_ids[: budget + 2] == (*script.thought[:budget], *ending)
    assert answer.reasoning_content == tokenizer.decode(script.thought[:budget]).strip()
    assert (answer.text, answer.finish_reason) == (texts[1], "stop")
    assert (answer.fast_forward_tokens, answer.reasoning_tokens) == (2, budget + 2)


def test_a_budget_beyond_the_thought_changes_nothing(thinker: VLM) -> None:
    free = thinker.generate(None, QUESTION)
    assert thinker.generate(None, QUESTION, thinking_budget=free.reasoning_tokens).token_ids == free.token_ids


@pytest.mark.parametrize("draft_tokens", [0, 8])
def test_a_budget_holds_in_the_middle_of_a_draft(thinker: VLM, script: Script, draft_tokens: int) -> None:
    config = GenerationConfig(thinking_budget=33, draft_tokens=draft_tokens, chat_template_kwargs={"start": "L"})
    answer = thinker.generate(None, QUESTION, config)
    assert answer.token_ids[:33] == tuple((script.loop * 7)[:33])
    assert answer.token_ids[33:36] == (script.one("\n"), script.close, script.blank)
    assert bool(answer.accepted_tokens) == bool(draft_tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"think": "yes"}, r"^think must be True, False or None, not 'yes'$"),
        ({"thinking_budget": -1}, r"^thinking_budget must be 0 or more, not -1$"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GenerationConfig(**options)


# Constraints


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("budget", [None, 2])
def test_a_constraint_begins_after_the_thought(
    thinker: VLM, tokenizer: Tokenizer, script: Script, temperature: float, budget: int | None
) -> None:
    config = GenerationConfig(constraint=YES, temperature=temperature, seed=1, thinking_budget=budget)
    answer = thinker.generate(None, QUESTION, config)
    assert answer.text in ("yes", "no, it is not")
    assert (answer.satisfied, answer.finish_reason) == (True, "stop")
    thought = script.thought[:budget]
    assert answer.reasoning_content == tokenizer.decode(thought).strip()
    assert answer.token_ids[: len(thought)] == tuple(thought)


def test_white_space_that_a_constraint_asks_for_is_kept(thinker: VLM) -> None:
    answer = thinker.generate(None, QUESTION, constraint=Constraint.regex(r"  yes"))
    assert answer.text == "  yes"


def test_without_a_thought_the_constraint_begins_at_once(thinker: VLM) -> None:
    answer = thinker.generate(None, QUESTION, constraint=YES, think=False)
    assert (answer.reasoning_content, answer.satisfied) == (None, True)
    assert answer.text in ("yes", "no, it is not")


def test_an_end_token_in_the_thought_ends_all_but_an_answer_that_must_have_a_form(thinker: VLM, script: Script) -> None:
    config = GenerationConfig(chat_template_kwargs={"start": "E"})
    plain = thinker.generate(None, QUESTION, config)
    assert (plain.text, plain.reasoning_content, plain.finish_reason) == ("", "", "stop")
    answer = thinker.generate(None, QUESTION, config, constraint=YES)
    assert (answer.satisfied, answer.reasoning_content) == (True, "")
    assert script.close in answer.token_ids


def test_an_answer_that_a_thought_left_no_room_for_is_told(thinker: VLM) -> None:
    config = GenerationConfig(max_new_tokens=9, constraint=Constraint.regex("a*"), chat_template_kwargs={"start": "L"})
    with pytest.raises(IncompleteAnswerError, match=r"\(9\) was reached; allow more, or a thinking_budget$"):
        thinker.generate(None, QUESTION, config)


def test_nothing_satisfies_a_constraint_while_the_model_thinks(thinker: VLM, tokenizer: Tokenizer) -> None:
    """Not even where an empty answer would, and the template writes nothing between thought and answer."""
    thought = thought_of(tokenizer, opened=True)
    matcher = thinker.grammar_tokenizer.matcher(Constraint.regex("a*"), greedy)
    selector = ThoughtSelector(greedy, thought, matcher)
    logits = np.zeros(thinker.manifest.vocab_size, np.float32)
    found = []
    for token in (tokenizer.encode("b")[0], thought.closing_id):
        found.append(selector.satisfied)
        logits[:], logits[token] = 0, 1
        assert selector.select(logits) == token
    assert [*found, selector.satisfied] == [False, False, True]


# The splitter


def thought_of(tokenizer: Tokenizer, *, opened: bool, heading: str = "") -> Thought:
    ids = [tokenizer.added_id(each) for each in ("<think>", "</think>")]
    assert ids[0] is not None
    assert ids[1] is not None
    return Thought(ids[0], ids[1], heading, opened, asked=False, ending=(ids[1],), separator="\n\n")


def split(tokenizer: Tokenizer, thought: Thought, ids: list[int]) -> tuple[str | None, str]:
    """Feed a splitter; return both texts, which are those of its pieces."""
    text = StopText(())
    splitter = ThoughtSplitter(tokenizer, thought, text)
    pieces = [*(splitter.add(token) for token in ids), splitter.finish()]
    assert "".join(piece[0] for piece in pieces) == (splitter.reasoning_content or "")
    assert "".join(piece[1] for piece in pieces) == text.shown
    return splitter.reasoning_content, text.shown


@pytest.mark.parametrize("opened", [True, False])
def test_any_tokens_split_at_the_closing_token(tokenizer: Tokenizer, opened: bool) -> None:
    """Tokens that no model would say included: half a character on either side stays on its side."""
    thought = thought_of(tokenizer, opened=opened)
    dice = random.Random(4)
    for _ in range(300):
        parts = [[dice.randrange(46, 420) for _ in range(dice.randint(0, 12))] for _ in range(2)]
        head = [] if opened else [thought.opening_id]
        found = split(tokenizer, thought, [*head, *parts[0], thought.closing_id, *parts[1]])
        assert found == (tokenizer.decode(parts[0]).strip(), tokenizer.decode(parts[1]).lstrip())
        if not opened and parts[0]:
            text = tokenizer.decode([*parts[0], thought.opening_id, *parts[1]])
            assert split(tokenizer, thought, [*parts[0], thought.opening_id, *parts[1]]) == (None, text)


def test_characters_of_several_tokens_come_whole_on_both_sides(tokenizer: Tokenizer) -> None:
    thought = thought_of(tokenizer, opened=True)
    splitter = ThoughtSplitter(tokenizer, thought, StopText(()))
    ids = tokenizer.encode(" \n a漢 \n</think>\n\n漢b", add_special_tokens=False)
    pieces = [splitter.add(token) for token in ids]
    assert [piece for piece in pieces if any(piece)] == [("a", ""), ("漢", ""), ("", "漢"), ("", "b")]
    half = tokenizer.encode("漢", add_special_tokens=False)[:1]
    assert split(tokenizer, thought, [*half, thought.closing_id, *half]) == ("\ufffd", "\ufffd")


def test_a_thought_may_be_opened_twice_and_closed_once(tokenizer: Tokenizer) -> None:
    thought = thought_of(tokenizer, opened=True)
    ids = tokenizer.encode("<think>why</think>so</think>", add_special_tokens=False)
    assert split(tokenizer, thought, ids) == ("why", "so</think>")


def test_a_channel_s_name_is_no_part_of_the_thought(tokenizer: Tokenizer) -> None:
    thought = thought_of(tokenizer, opened=False, heading="thought\n")
    for said, told in (
        ("<think>thought\nwhy</think>so", ("why", "so")),
        ("<think>thought\n</think>so", ("", "so")),
        ("<think>thoughtful</think>so", ("thoughtful", "so")),
        ("so", (None, "so")),
    ):
        assert split(tokenizer, thought, tokenizer.encode(said, add_special_tokens=False)) == told


# What the templates say


def opening(source: str, tokenizer: Tokenizer, think: bool | None = None, **variables: Any) -> Opening:
    return Thinking(ChatTemplate(source, {"bos_token": "<|im_start|>"}), tokenizer).opening(think, variables)


def test_whether_a_prompt_opens_the_thought_is_found_by_rendering(tokenizer: Tokenizer) -> None:
    assert opening(TEMPLATE, tokenizer).thinks
    assert opening(TEMPLATE, tokenizer, True).variables == {"enable_thinking": True}
    assert not opening(TEMPLATE, tokenizer, False).thinks
    assert opening(TEMPLATE, tokenizer, False).suffix == ""
    assert not opening(TEMPLATE, tokenizer, enable_thinking=False).thinks
    assert opening(ALWAYS, tokenizer).thinks
    assert opening(ALWAYS, tokenizer, False).suffix == "\n</think>\n\n"
    other = TEMPLATE.replace("enable_thinking", "thinking")
    assert opening(other, tokenizer, False).variables == {"thinking": False}
    with pytest.raises(ThinkingError):
        opening(CHAT_TEMPLATE, tokenizer, True)
    assert not opening(CHAT_TEMPLATE, tokenizer).thinks
    found = opening(TEMPLATE, tokenizer).thought
    assert found is not None
    assert (tokenizer.decode(list(found.ending)), found.separator) == ("\n</think>", "\n\n")


def test_a_tokenizer_without_the_tokens_knows_no_thought(vlm: VLM) -> None:
    thinking = Thinking(ChatTemplate(TEMPLATE, {}), vlm.processor.tokenizer)
    assert not thinking.supported
    assert thinking.opening(None, {}).thought is None
    assert thinking.opening(False, {}).variables == {"enable_thinking": False}


def test_channels_are_thoughts_too(exported_thinker: Path, tmp_path: Path) -> None:
    """Gemma 4's way: the template opens no thought but says that there may be one, or closes an empty one."""
    model = variant(exported_thinker, tmp_path / "channels", CHANNELS, ("<|channel>", "<channel|>"))
    assert model.processor.thinking.supported
    asked, without = (model.processor.thinking.opening(think, {}) for think in (True, False))
    assert not asked.thinks
    assert asked.thought is not None
    assert asked.thought.asked
    assert (asked.thought.heading, without.suffix) == ("thought\n", "")
    assert model.generate(None, QUESTION, think=True, constraint=YES).satisfied
    if _PUBLISHED and (gemma := Path(_PUBLISHED) / "_chat_templates" / "ovms_chat_template_gemma.jinja").is_file():
        published = ChatTemplate(gemma.read_text(encoding="utf-8"), {"bos_token": "<|im_start|>"})
        asked = Thinking(published, model.processor.tokenizer).opening(True, {})
        assert (asked.thinks, asked.variables, asked.suffix) == (False, {"enable_thinking": True}, "")
        assert asked.thought is not None
    said = model.processor.tokenizer.encode("<|channel>thought\nwhy<channel|>so", add_special_tokens=False)
    assert split(model.processor.tokenizer, asked.thought, said) == ("why", "so")


CHANNELS = (
    "{% if enable_thinking is defined and enable_thinking %}<|im_start|>system\nthink<end_of_utterance>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n"
    "{% if not enable_thinking | default(false) %}<|channel>thought\n<channel|>{% endif %}{% endif %}"
)


@pytest.mark.skipif(not _PUBLISHED, reason="EDGEVLM_PUBLISHED_CONFIGS is not set")
@pytest.mark.parametrize(
    ("name", "default", "supported"),
    [
        ("trl_qwen3_5_think", True, True),
        ("trl_qwen3_5_nothink", False, True),
        ("trl_qwen3_6", True, True),
        ("ovms_chat_template_qwen36", True, True),
        ("trl_qwen3_vl", False, False),
        ("trl_lfm2_2_5", False, False),
    ],
)
def test_published_templates(tokenizer: Tokenizer, name: str, default: bool, supported: bool) -> None:
    path = Path(str(_PUBLISHED)) / "_chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    source = path.read_text(encoding="utf-8")
    thinking = Thinking(ChatTemplate(source, {"bos_token": "<s>"}), tokenizer)
    assert thinking.supported == supported
    assert thinking.opening(None, {}).thinks == default
    assert not thinking.opening(False, {}).thinks
    if supported:
        found = thinking.opening(True, {}).thought
        assert found is not None
        assert found.opened
        assert (tokenizer.decode(list(found.ending)), found.separator) == ("\n</think>", "\n\n")


# Conversations


CONVERSATION = [
    user_message("Is it red?", 0),
    text_message("assistant", "No.", "It looks blue."),
    user_message("Is it blue?", 0),
]


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"preserve_thinking": True}])
def test_prompts_of_a_conversation_are_those_of_transformers(
    exported_thinker: Path, thinker: VLM, variables: dict[str, Any]
) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(exported_thinker)
    wanted = reference.apply_chat_template(
        CONVERSATION, chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False, **variables
    )
    assert thinker.processor.prompt_ids(CONVERSATION, [], variables) == wanted


def test_a_chat_hands_earlier_thoughts_to_the_template(
    thinker: VLM, tokenizer: Tokenizer, texts: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    prompt_ids = thinker.processor.prompt_ids

    def spy(*given: Any) -> list[int]:
        ids = prompt_ids(*given)
        prompts.append(tokenizer.decode(ids))
        return ids

    monkeypatch.setattr(thinker.processor, "prompt_ids", spy)
    for variables, kept in (({}, False), ({"preserve_thinking": True}, True)):
        chat = thinker.chat(chat_template_kwargs=variables)
        chat.ask(QUESTION)
        assert (chat.turns[0].reasoning_content, chat.turns[0].answer) == texts
        chat.ask("And now?")
        assert texts[1] in prompts[-1]
        assert (texts[0] in prompts[-1]) == kept


def test_a_turn_broken_off_in_the_thought_is_kept(thinker: VLM) -> None:
    chat = thinker.chat()
    stream = chat.stream(QUESTION)
    first = next(piece for piece in stream if piece.reasoning_content)
    stream.close()
    [turn] = chat.turns
    assert (turn.answer, turn.reasoning_content) == ("", first.reasoning_content)
    assert chat.ask("And now?").text


# Command line


def run(folder: Path, *arguments: object) -> Any:
    return cli("run", *arguments, "-m", folder, "--inference-precision", "f32", "--no-cache")


def test_the_command_line_shows_the_thought_apart(exported_thinker: Path, texts: tuple[str, str]) -> None:
    shown = run(exported_thinker, QUESTION)
    assert (shown.exit_code, shown.stdout, shown.stderr) == (0, f"{texts[1]}\n", f"{texts[0]}\n")
    without = run(exported_thinker, QUESTION, "--no-think")
    assert (without.stdout, without.stderr) == (f"{texts[1]}\n", "")
    found = json.loads(run(exported_thinker, QUESTION, "--json", "--think", "--thinking-budget", "1").stdout)
    assert (found["answer"], found["reasoning_tokens"]) == (texts[1], 3)
    assert texts[0].startswith(found["reasoning_content"])
    cut = run(exported_thinker, QUESTION, "--max-new-tokens", "2", "--stats")
    assert cut.stdout == "\n"
    assert "(cut: --max-new-tokens was reached while the model was thinking)" in cut.stderr
    assert "2 tokens, 2 of them of the thought (length)" in cut.stderr
    formed = run(exported_thinker, QUESTION, "--regex", "yes|no")
    assert formed.stdout in ("yes\n", "no\n")
    assert formed.stderr == f"{texts[0]}\n"
    assert "thought" not in run(exported_thinker, QUESTION, "--choices", "yes,no", "--json").stdout


def test_a_thought_of_a_model_that_does_not_think_is_an_error_in_one_line(exported: Path) -> None:
    refused = run(exported, QUESTION, "--think")
    assert refused.exit_code == 1
    assert refused.stderr == "Error: this model does not think before it answers; leave out what asks it to\n"


def test_chat_shows_the_thought_apart(exported_thinker: Path, texts: tuple[str, str]) -> None:
    command = ("chat", "-m", exported_thinker, "--inference-precision", "f32", "--no-cache")
    shown = cli(*command, stdin=f"{QUESTION}\n/history\n".encode())
    assert shown.stdout == f"{texts[1]}\n> {QUESTION}\n{texts[1]}\n"
    assert shown.stderr == f"{texts[0]}\n"


def test_a_batch_s_rows_have_the_thought(exported_thinker: Path, tmp_path: Path, texts: tuple[str, str]) -> None:
    jobs = write(tmp_path / "jobs.jsonl", [{"question": QUESTION}])
    for think, thought in ((None, texts[0]), (False, None)):
        output = tmp_path / f"{think}.jsonl"
        defaults = Defaults(config=GenerationConfig(think=think))
        run_batch(Batch(jobs, output, str(exported_thinker), F32, defaults))
        [row] = read(output)
        assert (row["answer"], row.get("reasoning_content")) == (texts[1], thought)


def test_outputs_from_before_there_were_thoughts_are_resumed(exported_thinker: Path) -> None:
    """The digest of a batch that asks for nothing of thoughts does not know of them."""
    plain = Defaults(config=GenerationConfig())
    assert "think" not in plain.config_digest(str(exported_thinker))
    told = {Defaults(config=GenerationConfig(**each)).config_digest(str(exported_thinker)) for each in (
        {}, {"think": False}, {"think": True}, {"thinking_budget": 0},
    )}  # fmt: skip
    assert len(told) == 4


def test_a_database_from_before_there_were_thoughts_takes_them(tmp_path: Path) -> None:
    path = tmp_path / "answers.db"
    row = {"time": "now", "path": "a.png", "sha256": ["1"], "size": 1, "mtime_ns": 1, "job": "j", "question": QUESTION}
    with SqliteSink(path) as sink:
        sink.add(row | {"answer": "red"})
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("ALTER TABLE answers DROP COLUMN reasoning_content")
    with SqliteSink(path) as sink:
        sink.add(row | {"path": "b.png", "answer": "blue", "reasoning_content": "The sky."})
    with closing(sqlite3.connect(path)) as database:
        found = database.execute("SELECT answer, reasoning_content FROM answers ORDER BY path").fetchall()
    assert found == [("red", None), ("blue", "The sky.")]
