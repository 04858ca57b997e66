"""Text on its way in and out: tokenizer, streaming detokenizer, stop texts, chat template."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from edgevlm import VLM, DamagedModelError, GenerationConfig, PromptError
from edgevlm.decoding.stop_text import StopText
from edgevlm.inputs.chat_template import ChatTemplate, user_message
from edgevlm.inputs.tokenizer import Tokenizer
from tests.conftest import F32
from tests.helpers.damage import copy_export, reseal

WHOLE = [
    "a",
    "é",
    "ß",
    "東",
    "京",
    "🙂",
    "👩‍👩‍👧",
    "e\u0301",
    "Größe 42.7",
    " ",
    "\n",
    "<",
    "picture",
    "\N{NO-BREAK SPACE}",
]


@pytest.fixture(scope="module")
def tokenizer(exported: Path) -> Tokenizer:
    """The tiny export's tokenizer, which splits most characters beyond ASCII into bytes."""
    return Tokenizer(exported)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    """Return what streaming shows at each id, and what is left at the end."""
    detokenizer = tokenizer.detokenizer()
    return [detokenizer.add(token_id) for token_id in ids], detokenizer.finish()


def test_characters_of_several_tokens_come_whole(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("👩‍👩‍👧")) > 3
    shuffle = random.Random(1)
    for _ in range(300):
        text = "".join(shuffle.choices(WHOLE, k=shuffle.randint(1, 15)))
        shown, rest = pieces(tokenizer, tokenizer.encode(text))
        assert ("".join(shown), rest) == (text, "")
        assert not any("\ufffd" in piece for piece in shown)


def test_a_character_is_shown_by_its_last_token_and_not_before(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a漢")
    assert len(ids) == 4
    assert pieces(tokenizer, ids) == (["a", "", "", "漢"], "")


def test_an_incomplete_character_at_the_end_is_shown_as_one_replacement(tokenizer: Tokenizer) -> None:
    shown, rest = pieces(tokenizer, tokenizer.encode("ok🙂")[:-1])
    assert ("".join(shown), rest) == ("ok", "\ufffd")


def test_a_replacement_character_of_the_text_itself_survives(tokenizer: Tokenizer) -> None:
    shown, rest = pieces(tokenizer, tokenizer.encode("a\ufffdb\ufffd"))
    assert "".join(shown) + rest == "a\ufffdb\ufffd"


def test_any_token_ids_stream_to_the_text_that_they_decode_to(tokenizer: Tokenizer) -> None:
    dice = random.Random(2)
    for _ in range(500):
        ids = [dice.randrange(420) for _ in range(dice.randint(1, 30))]
        shown, rest = pieces(tokenizer, ids)
        assert "".join(shown) + rest == tokenizer.decode(ids)


def test_special_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<end_of_utterance>b<row_1_col_1>")
    assert len(ids) == 4
    assert pieces(tokenizer, ids) == (["a", "", "b", ""], "")


def test_text_that_is_no_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match=r"^the question is not valid Unicode text; write it in UTF-8$"):
        tokenizer.encode("\udcff")


def show(text: str, stops: tuple[str, ...], cuts: list[int]) -> tuple[str, bool]:
    """Feed `text` cut at `cuts` to a `StopText`; return what it showed and whether it stopped."""
    stopper = StopText(stops)
    ends = [*sorted(cuts), len(text)]
    shown = "".join(stopper.add(text[start:end]) for start, end in zip([0, *ends], ends, strict=False))
    shown += stopper.finish()
    assert shown == stopper.shown
    return shown, stopper.stopped


def wanted(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """Read character by character until some stop text is whole, then take off the longest that is."""
    for end in range(len(text) + 1):
        whole = [stop for stop in stops if text[:end].endswith(stop)]
        if whole:
            return text[: end - max(map(len, whole))], True
    return text, False


def test_stop_texts_in_any_pieces() -> None:
    dice = random.Random(3)
    stopped = 0
    for _ in range(5000):
        text = "".join(dice.choices("ab\n", k=dice.randint(0, 12)))
        stops = tuple("".join(dice.choices("ab\n", k=dice.randint(1, 4))) for _ in range(dice.randint(0, 3)))
        cuts = [dice.randint(0, len(text)) for _ in range(dice.randint(0, 5))]
        shown = show(text, stops, cuts)
        assert shown == wanted(text, stops), (text, stops, cuts)
        assert not any(stop in shown[0] for stop in stops)
        stopped += shown[1]
    assert 1000 < stopped < 4500


def test_text_that_cannot_begin_a_stop_text_is_not_held_back() -> None:
    stopper = StopText(("END",))
    assert [stopper.add(text) for text in ("one", "E", "N", "x", "EN", "D more")] == ["one", "", "", "ENx", "", ""]
    assert stopper.stopped
    assert stopper.add("more") == stopper.finish("still more") == ""


def test_a_stop_text_within_the_last_text() -> None:
    stopper = StopText(("\ufffd",))
    assert (stopper.add("ok"), stopper.finish("\ufffd"), stopper.stopped) == ("ok", "", True)


TEMPLATES = [
    ("{{ ''.__class__.__mro__ }}", "attribute '__class__' of 'str' object is unsafe"),
    ("{{ cycler.__init__.__globals__ }}", "is unsafe"),
    ("{{ ().__class__.__base__.__subclasses__() }}", "is unsafe"),
    ("{{ (lipsum | attr('__globals__'))['os'] }}", "is unsafe"),
    ("{{ '{0.__class__.__mro__}'.format('') }}", "is unsafe"),
    ("{{ messages.append(1) }}", "is unsafe"),
    ("{{ messages[0].update(role='system') }}", "is unsafe"),
    ("{{ raise_exception('one picture\n at most') }}", "one picture at most"),
    ("{{ nonesuch.attribute }}", "'nonesuch' is undefined"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ 1 + 'a' }}", "unsupported operand"),
    ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
]


@pytest.mark.parametrize(("source", "why"), TEMPLATES)
def test_a_template_cannot_leave_its_sandbox_nor_crash(source: str, why: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(PromptError, match=r"^the model's chat template refuses the conversation: ") as caught:
        template.render([user_message("hi", 0)])
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["{% if %}", "{{ 'a' | nonesuch }}", "{% include 'other' %}{% endfor %}"])
def test_a_template_that_does_not_parse(source: str) -> None:
    with pytest.raises(DamagedModelError, match=r"^the model's chat template does not parse: [^\n]+$"):
        ChatTemplate(source, {})


def test_what_templates_of_checkpoints_use() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | tojson }}"
        "{% endfor %}{% if add_generation_prompt %}>{% endif %}{{ strftime_now('%Y') | length }}"
    )
    rendered = ChatTemplate(source, {"bos_token": "<s>"}).render([{"role": "a"}, {"role": "ü"}])
    assert rendered == '<s>{"role": "ü"}>4'


def test_a_hostile_template_in_an_export_is_a_prompt_error(exported: Path, tmp_path: Path) -> None:
    folder = copy_export(exported, tmp_path / "tiny")
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}", encoding="utf-8")
    reseal(folder)
    with pytest.raises(PromptError, match="unsafe"):
        VLM(folder, F32).generate(None, "hi")


def test_a_template_that_loses_the_picture_is_a_prompt_error(exported: Path, china: Path, tmp_path: Path) -> None:
    folder = copy_export(exported, tmp_path / "tiny")
    (folder / "chat_template.jinja").write_text("User: look!", encoding="utf-8")
    reseal(folder)
    vlm = VLM(folder, F32)
    with pytest.raises(PromptError, match=r"^the prompt has 0 image placeholders for 1 images$"):
        vlm.generate(china, "hi")
    assert vlm.generate(None, "hi", GenerationConfig(max_new_tokens=1)).generated_tokens == 1
