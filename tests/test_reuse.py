"""What is known is not computed again (embeddings, KV prefixes, drafts), and the answer is always a fresh one's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgevlm.runtime.kv_stateful
from benchmarks.page_drafts import html, replay, report, tables, tokenizer_with
from edgevlm import VLM, GenerationConfig, OptionError, PromptError, RuntimeConfig
from edgevlm.answer import result_of
from edgevlm.decoding.prompt_lookup import LONGEST_ANSWER, EarlierAnswers, PromptLookup
from edgevlm.families.base import IMAGE_EMBEDS, PIXEL_VALUES, ImageBudget, LanguageInputs, View, Visual
from edgevlm.families.imaging import normalised
from edgevlm.inputs.image import content_digest
from edgevlm.inputs.prompt import Prompt
from edgevlm.inputs.vision_cache import EncodedImage, PreprocessedImage, VisionCache
from edgevlm.model_store import default_model
from edgevlm.runtime.kv_session import common_length
from edgevlm.runtime.kv_stateful import StatefulSession
from tests.conftest import F32, TILE, photograph

QUESTION = "What is in this picture?"
SHORT = GenerationConfig(max_new_tokens=16)
FORGETFUL = replace(F32, image_cache_bytes=0, kept_sessions=0)


@pytest.fixture(scope="module")
def fresh(exported: Path) -> VLM:
    """A model that knows nothing of what it was asked before."""
    return VLM(exported, FORGETFUL)


@pytest.fixture
def vlm(exported: Path) -> VLM:
    """A model that has not been asked anything yet."""
    return VLM(exported, F32)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """A photograph of 4 x 3 tiles and a global view."""
    return photograph("china.jpg")


def changed(picture: np.ndarray) -> np.ndarray:
    """The picture with something new in its lower right tile."""
    other = picture.copy()
    other[-40:, -40:] = 255 - other[-40:, -40:]
    return other


def test_the_next_question_on_a_picture_reads_only_the_question(vlm: VLM, fresh: VLM, picture: np.ndarray) -> None:
    first = vlm.generate(picture, QUESTION, SHORT)
    assert (first.cached_views, first.cached_tokens) == (0, 0)
    second = vlm.generate(picture, "How many parts are there?", SHORT)
    assert second.cached_views == second.views == 13
    assert second.cached_tokens >= second.image_tokens
    assert second.prompt_tokens - second.cached_tokens < 60
    wanted = fresh.generate(picture, "How many parts are there?", SHORT)
    assert second.token_ids == wanted.token_ids
    assert (wanted.cached_views, wanted.cached_tokens) == (0, 0)


def test_the_same_question_again_reads_one_token(vlm: VLM, picture: np.ndarray) -> None:
    first = vlm.generate(picture, QUESTION, SHORT)
    again = vlm.generate(picture, QUESTION, SHORT)
    assert again.token_ids == first.token_ids
    assert again.cached_tokens == again.prompt_tokens - 1


def test_of_a_changed_picture_only_the_changed_tiles_are_encoded(vlm: VLM, fresh: VLM, picture: np.ndarray) -> None:
    vlm.generate(picture, QUESTION, SHORT)
    answer = vlm.generate(changed(picture), QUESTION, SHORT)
    assert answer.cached_views == 11  # all but the lower right one and the global view
    assert answer.cached_tokens >= 11 * 4
    assert answer.token_ids == fresh.generate(changed(picture), QUESTION, SHORT).token_ids


def test_pictures_and_prompts_in_any_order_are_answered_as_if_alone(vlm: VLM, fresh: VLM, picture: np.ndarray) -> None:
    random = np.random.default_rng(0)
    flower = photograph("flower.jpg")
    asked = [picture, changed(picture), flower[:300], None, [picture, flower[:, :200]], [flower[:, :200], picture]]
    questions = [QUESTION, "Describe the gauge.", "What is in this picture? A red circle."]
    wanted = {}
    for _ in range(24):
        which, question = int(random.integers(len(asked))), questions[random.integers(3)]
        answer = vlm.generate(asked[which], question, SHORT)
        if (which, question) not in wanted:
            wanted[which, question] = fresh.generate(asked[which], question, SHORT).token_ids
        assert answer.token_ids == wanted[which, question]


def test_threads_share_what_is_known_and_nothing_else(vlm: VLM, fresh: VLM, picture: np.ndarray) -> None:
    asked = [
        (picture, QUESTION),
        (changed(picture), QUESTION),
        (picture, "Describe the label."),
        (None, "Name a river."),
    ]
    wanted = [fresh.generate(image, question, SHORT).token_ids for image, question in asked]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: vlm.generate(*each, SHORT).token_ids, asked * 4))
    assert found == wanted * 4


def test_noise_within_the_tolerance_is_not_looked_at_again(exported: Path, fresh: VLM, picture: np.ndarray) -> None:
    vlm = VLM(exported, replace(F32, view_tolerance=1.0))
    first = vlm.generate(picture, QUESTION, SHORT)
    noise = np.random.default_rng(1).integers(-1, 2, picture.shape)
    noisy = (picture.astype(int) + noise).clip(0, 255).astype(np.uint8)
    again = vlm.generate(noisy, QUESTION, SHORT)
    assert again.cached_views == 13
    assert again.token_ids == first.token_ids
    assert again.cached_tokens == again.prompt_tokens - 1
    other = vlm.generate(changed(noisy), QUESTION, SHORT)
    assert other.cached_views == 11
    exact = VLM(exported, F32)
    exact.generate(picture, QUESTION, SHORT)
    assert exact.generate(noisy, QUESTION, SHORT).cached_views == 0


def encoder(calls: list[int]):  # type: ignore[no-untyped-def]
    def encode(views: Iterable[View]) -> Iterator[dict[str, np.ndarray]]:
        for view in views:
            calls.append(len(calls))
            yield {IMAGE_EMBEDS: np.full((4, 8), view.inputs()[PIXEL_VALUES].mean(), np.float32)}

    return encode


def encoded(cache: VisionCache, key: str, visual: Visual, calls: list[int]) -> EncodedImage:
    """Return a picture encoded through the cache."""
    return result_of(cache.encode(PreprocessedImage(key, visual), encoder(calls)))


def tiles(*levels: int) -> Visual:
    """One tile of each grey level."""
    lookup = np.broadcast_to(np.arange(256, dtype=np.float32), (3, 256))
    pixels = [np.full((TILE, TILE, 3), level, np.uint8) for level in levels]
    views = [View(each, lambda each=each: {PIXEL_VALUES: normalised(each, lookup)}) for each in pixels]
    return Visual(views, (1, len(levels)))


def test_slow_change_is_noticed_within_the_tolerance() -> None:
    cache, calls = VisionCache(2**20, tolerance=2.0), []
    for level in range(100, 110):
        encoded(cache, str(level), tiles(level), calls)
    assert len(calls) == 4  # at 100, 103, 106, 109: each time against what was encoded, not against the last picture


def test_the_cache_holds_no_more_than_its_bytes() -> None:
    one = 4 * 8 * 4
    cache, calls = VisionCache(3 * one), []
    for level in (1, 2, 3, 1, 4):  # 2 is now the one longest unused
        encoded(cache, str(level), tiles(level), calls)
    assert len(calls) == 4
    assert cache.picture("1") is not None
    assert cache.picture("2") is None
    encoded(cache, "2", tiles(2), calls)
    assert len(calls) == 5
    nothing = VisionCache(0)
    assert encoded(nothing, "7", tiles(7, 8), calls).encoded == 2
    assert nothing.picture("7") is None


def test_a_picture_of_equal_tiles_is_encoded_once() -> None:
    calls: list[int] = []
    found = encoded(VisionCache(2**20), "x", tiles(5, 5, 6, 5), calls)
    assert (len(found), found.encoded, len(calls)) == (4, 2, 2)
    assert [float(view.outputs[IMAGE_EMBEDS][0, 0]) for view in found.views] == [5, 5, 6, 5]
    with pytest.raises(ValueError, match="read-only"):
        found.views[0].outputs[IMAGE_EMBEDS][0, 0] = 1


def test_a_digest_names_content_and_shape() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    digests = [content_digest(pixels), content_digest(pixels[::-1]), content_digest(pixels.reshape(2, 8, 3))]
    assert len(set(digests)) == 3
    assert content_digest(pixels.copy()) == content_digest(np.asfortranarray(pixels)) == digests[0]


@pytest.mark.parametrize(
    ("first", "second", "length"), [("", "a", 0), ("abc", "abd", 2), ("ab", "abc", 2), ("x", "y", 0)]
)
def test_common_length(first: str, second: str, length: int) -> None:
    assert common_length(first, second) == common_length(second, first) == length


def test_a_session_that_went_back_is_as_one_that_never_went_there(vlm: VLM) -> None:
    there, straight = vlm.language_model.session(), vlm.language_model.session()
    there.step(range(50, 90))
    there.rewind(20)
    assert there.length == 20
    there.step(range(60, 100))
    there.rewind(30)
    straight.step([*range(50, 70), *range(60, 70)])
    assert there.prefix_keys == straight.prefix_keys
    np.testing.assert_allclose(there.step([77, 78]), straight.step([77, 78]), atol=1e-4)


def test_stale_entries_are_cut_out_when_there_are_many(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = VLM(exported, replace(F32, kv_cache="stateful"))
    monkeypatch.setattr(edgevlm.runtime.kv_stateful, "_MOST_STALE", 25)
    session, straight = vlm.language_model.session(), vlm.language_model.session()
    assert isinstance(session, StatefulSession)
    session.step(range(50, 70))
    lengths = []
    for _ in range(7):
        session.step([100, 101, *range(110, 116)], drafted=6)
        session.take_back(6)
        lengths.append(session._mask.shape[1] - session.length)
    assert lengths == [6, 12, 18, 24, 0, 6, 12]  # within an answer, too
    assert session.reuse_prefix([*range(50, 70), 100, 101, 102, 5]) == 22
    assert session._mask.shape[1] - session.length <= 25
    straight.step([*range(50, 70), 100, 101])
    np.testing.assert_allclose(session.step([5, 6]), straight.step([5, 6]), atol=1e-4)


def test_much_that_is_new_is_read_from_the_beginning(vlm: VLM) -> None:
    session = vlm.language_model.session()
    before = [number % 50 + 50 for number in range(600)]
    session.step(before)
    assert session.reuse_prefix([*before[:560], *range(10, 50)]) == 560
    assert session.reuse_prefix([*before[:100], 7, *before[:499]]) == 0


def test_sessions_at_rest_are_few_and_the_best_is_taken(vlm: VLM) -> None:
    pool = vlm._sessions
    with pool.take([1, 2, 3, 4]) as first:
        first.step([1, 2, 3, 4])
    with pool.take([1, 9, 9, 9]) as second:
        assert second is not first
        second.step([1, 9, 9, 9])
    with pool.take([1, 2, 3, 5]) as again:
        assert again is first
    with pool.take([7, 7]) as third:
        assert third in (first, second)
    assert len(pool._idle) == 2


def test_an_error_costs_the_session_but_a_reader_who_leaves_does_not(vlm: VLM, picture: np.ndarray) -> None:
    with pytest.raises(ZeroDivisionError), vlm._sessions.take([1]):
        raise ZeroDivisionError
    assert vlm._sessions._idle == []
    pieces = vlm.stream(picture, QUESTION, GenerationConfig(max_new_tokens=60))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert len(vlm._sessions._idle) == 1
    assert vlm.generate(picture, QUESTION, SHORT).cached_tokens > 0


REPEATING = "one two three four five six seven. " * 3


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("question", [QUESTION, REPEATING, "Describe the gauge, the display and the label. " * 4])
def test_drafts_change_the_speed_only(fresh: VLM, question: str, temperature: float) -> None:
    config = GenerationConfig(max_new_tokens=120, temperature=temperature, seed=3)
    plain = fresh.generate(None, question, replace(config, draft_tokens=0))
    drafted = fresh.generate(None, question, config)
    assert drafted.token_ids == plain.token_ids
    assert (plain.drafted_tokens, plain.accepted_tokens) == (0, 0)
    assert drafted.accepted_tokens <= drafted.drafted_tokens


def test_drafts_come_true_where_text_repeats(fresh: VLM) -> None:
    answer = fresh.generate(None, REPEATING, GenerationConfig(max_new_tokens=250))
    assert len(set(answer.token_ids)) < 150  # so small a model of chance falls into a loop
    assert answer.accepted_tokens > 20


def test_a_draft_never_goes_beyond_the_budget_or_the_context(exported: Path) -> None:
    vlm = VLM(exported, F32)
    for budget in (1, 2, 3, 7, 64):
        assert vlm.generate(None, REPEATING, GenerationConfig(max_new_tokens=budget)).generated_tokens <= budget
    answer = vlm.generate(None, REPEATING * 4, GenerationConfig(max_new_tokens=1000))
    assert answer.prompt_tokens + answer.generated_tokens <= 512


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_is_drafted_from_earlier_ones_to_the_question(vlm: VLM, fresh: VLM, temperature: float) -> None:
    config = GenerationConfig(max_new_tokens=20, temperature=temperature, seed=3)
    frames = [photograph("china.jpg")[: TILE + 8 * each, :TILE] for each in (0, 0, 0, 1)]
    answers = [vlm.generate(frame, QUESTION, config) for frame in frames]
    for frame, answer in zip(frames, answers, strict=True):
        assert answer.token_ids == fresh.generate(frame, QUESTION, replace(config, draft_tokens=0)).token_ids
    assert answers[2].accepted_tokens > 10  # two were alike, so this one is drafted from its first token
    if temperature:  # a greedy answer of chance is a loop, which is drafted anyway
        assert answers[0].accepted_tokens < answers[1].accepted_tokens < answers[2].accepted_tokens


def test_answers_of_another_salt_and_to_other_questions_are_no_drafts(vlm: VLM, picture: np.ndarray) -> None:
    for _ in range(2):
        vlm.generate(picture, QUESTION, SHORT)
    again = vlm.generate(picture, QUESTION, SHORT)
    assert again.accepted_tokens > 0
    for question, salt in (("Which one?", ""), (QUESTION, "another client")):
        answer = vlm.generate(picture, question, SHORT, cache_salt=salt)
        assert answer.accepted_tokens < again.accepted_tokens


def test_few_earlier_answers_are_kept() -> None:
    kept = EarlierAnswers(2)
    prompts = [as_prompt([1, 2, each]) for each in range(3)]
    for prompt in prompts:
        kept.add(prompt, [7, 8, 9])
        kept.add(prompt, [7, 8, 10])
    assert not kept.of(prompts[0])
    assert [[*answer] for answer in kept.of(prompts[1])] == [[7, 8, 9], [7, 8, 10]]
    kept.add(prompts[1], range(2 * LONGEST_ANSWER))
    assert [len(answer) for answer in kept.of(prompts[1])] == [3, LONGEST_ANSWER]
    kept = EarlierAnswers(0)
    kept.add(prompts[0], [7])
    assert not kept.of(prompts[0])


def as_prompt(ids: list[int], images: Sequence[range] = (), salt: str = "") -> Prompt:
    keys = np.zeros((1, len(ids), 1), np.float32)
    return Prompt(keys, ids, ids, LanguageInputs(np.zeros((1, len(ids)), np.int64), {}), images, 0, 0, 0, salt)


def test_a_question_is_the_text_around_the_pictures() -> None:
    kept = EarlierAnswers()
    kept.add(as_prompt([1, 50, 50, 2, 3], [range(1, 3)]), [7])
    assert [*kept.of(as_prompt([1, 50, 50, 50, 60, 50, 2, 3], [range(1, 6)]))[0]] == [7]
    assert not kept.of(as_prompt([1, 50, 50, 2, 4], [range(1, 3)]))
    assert not kept.of(as_prompt([1, 50, 50, 2, 3], [range(1, 3)], "salt"))


def lookup(answer: Sequence[int], longest: int = 8, **options: Any) -> PromptLookup:
    """Return the drafter of an answer as far as it is known."""
    drafter = PromptLookup(options.pop("prompt", ()), longest, **options)
    for token in answer:
        drafter.add(token)
    return drafter


def test_what_repeats_is_drafted() -> None:
    assert lookup([*range(9)] * 3).draft(20) == [*range(8)]
    assert lookup([*range(9)] * 3).draft(3) == [0, 1, 2]
    assert lookup([*range(9)] * 3, longest=5).draft(20) == [*range(5)]
    assert lookup([*range(9)] * 3, longest=0).draft(20) == lookup([]).draft(20) == []
    assert lookup([*range(5, 9)], prompt=[*range(99)]).draft(20) == [9]  # the likelier, the further
    assert lookup([*range(5, 25)], prompt=[*range(99)]).draft(20) == [*range(25, 33)]


def test_an_earlier_answer_is_drafted_from_its_first_token() -> None:
    first, second = [*range(20)], [*range(12), 99, *range(13, 20)]
    assert lookup([], earlier=[first, second]).first_draft(20) == [*range(8)]
    assert lookup([], earlier=[first, second]).first_draft(3) == [0, 1, 2]
    assert lookup([], earlier=[first]).first_draft(20) == []
    assert lookup([0, 1], earlier=[first, first]).draft(20) == [*range(2, 10)]
    assert lookup([0, 1], earlier=[first, second]).draft(20) == [*range(2, 10)]
    assert lookup([0, 1], earlier=[first]).draft(20)[:1] == [2]


def test_what_never_repeats_is_not_drafted() -> None:
    chance = np.random.default_rng(0).integers(0, 40_000, 2000).tolist()
    drafter, drafted = lookup([]), 0
    for token in chance:
        drafter.add(token)
        drafted += len(drafter.draft(20))
    assert drafted == 0


def test_drafts_end_while_they_are_wrong_and_come_back() -> None:
    drafter, drafted = lookup([1, 2, 3, 4] * 50), []
    for token in np.random.default_rng(0).integers(0, 5, 300).tolist():
        drafter.add(token)
        drafted.append(len(drafter.draft(8)))
    assert sum(drafted[:50]) > sum(drafted[-50:])
    for token in [1, 2, 3, 4] * 20:
        drafter.add(token)
    assert drafter.draft(8) == [1, 2, 3, 4] * 2


def test_pages_of_tables_take_half_the_steps() -> None:
    texts = [tables(page, html) for page in report(1)[:3]]
    tokenizer = tokenizer_with(default_model(), texts, "(?!)")
    pages = [tokenizer.encode(text) for text in texts if text]
    drafted, plain = (replay(pages, tokenizer.shape, drafts) for drafts in (8, 0))  # which checks their tokens
    assert [len(steps) for steps in plain] == [len(page) for page in pages]
    assert sum(map(len, drafted)) < sum(map(len, plain)) / 2
    assert max(size for steps in drafted for size in steps) == 1 + 8


CELL, ROW_END, POINT = 20, 21, 22


def test_a_table_s_rows_foretell_where_cells_and_rows_end() -> None:
    """No number comes twice, and the columns have their own decimals."""
    digit = np.random.default_rng(0).integers

    def row() -> list[list[int]]:
        return [[CELL, *digit(0, 10, 3).tolist(), POINT, *digit(0, 10, n).tolist()] for n in (2, 1, 3)]

    answer = [token for _ in range(8) for token in (*(each for cell in row() for each in cell), ROW_END)]
    expected = [[CELL], [CELL], [ROW_END, CELL]]
    drafter = lookup(answer, shape=lambda token: "0" if token < 10 else str(token))
    for cell, end in zip(row(), expected, strict=True):
        for token in cell:
            drafter.add(token)
        assert drafter.draft(8)[: len(end)] == end


def test_a_chat_answers_as_a_fresh_run_of_the_whole_conversation(vlm: VLM, fresh: VLM, picture: np.ndarray) -> None:
    chat = vlm.chat(SHORT, system="Be brief.")
    wanted = fresh.chat(SHORT, system="Be brief.")
    seen = []
    for question, image in (
        (QUESTION, picture),
        ("And the number?", None),
        ("Compare.", photograph("flower.jpg")[:200]),
    ):
        answer, want = chat.ask(question, image), wanted.ask(question, image)
        assert answer.token_ids == want.token_ids
        assert want.cached_tokens == 0
        seen.append((answer.cached_tokens, answer.prompt_tokens))
    assert seen[1][0] >= seen[0][1] - 1  # the first prompt is read once
    assert seen[2][0] >= seen[1][1] - 1
    assert [len(turn.images) for turn in chat.turns] == [1, 0, 1]
    chat.reset()
    assert chat.turns == []
    assert chat.ask("Name a river.").token_ids == fresh.chat(SHORT, system="Be brief.").ask("Name a river.").token_ids


def test_a_chat_that_outgrows_the_context_forgets_its_oldest_words_but_no_picture(
    vlm: VLM, picture: np.ndarray
) -> None:
    config = GenerationConfig(max_new_tokens=60)
    budget = ImageBudget("low")
    chat = vlm.chat(config, image_budget=budget)
    chat.ask(QUESTION, picture)
    for number in range(12):
        chat.ask(f"Question {number}: describe the display, the gauge and the label.")
    assert len(chat.turns) < 13
    assert sum(len(turn.images) for turn in chat.turns) == 1
    assert len(chat.turns[0].images) == 1
    assert chat.turns[-1].question.startswith("Question 11")
    before = list(chat.turns)
    with pytest.raises(PromptError, match="tokens and the model's context holds 512"):
        chat.ask("word " * 600)
    assert chat.turns == before


def test_a_broken_off_answer_is_part_of_the_conversation(vlm: VLM) -> None:
    chat = vlm.chat(GenerationConfig(max_new_tokens=60))
    pieces = chat.stream("Name a river.")
    shown = [next(pieces).text, next(pieces).text]
    pieces.close()  # type: ignore[attr-defined]
    [turn] = chat.turns
    assert (turn.question, turn.answer) == ("Name a river.", "".join(shown))


def test_count_tokens_is_the_prompt_s_length(vlm: VLM, picture: np.ndarray) -> None:
    from edgevlm.inputs.chat_template import user_message

    assert vlm.count_tokens([user_message(QUESTION, 1)], [picture]) == vlm.generate(picture, QUESTION).prompt_tokens


@pytest.mark.parametrize("name", ["image_cache_bytes", "view_tolerance", "kept_sessions"])
def test_limits_are_checked(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} must be 0 or more, not -1"):
        RuntimeConfig(**{name: -1})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="draft_tokens must be between 0 and 64"):
        GenerationConfig(draft_tokens=65)


def test_the_tolerance_is_known_by_its_old_name_too() -> None:
    assert RuntimeConfig(tile_tolerance=1.5) == RuntimeConfig(view_tolerance=1.5)
    assert replace(RuntimeConfig(view_tolerance=1.5), threads=2).view_tolerance == 1.5
