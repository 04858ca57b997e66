"""The page, in a real Chromium: as a person with a mouse, a keyboard, a phone or a camera uses it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm import VLM, GenerationConfig
from edgevlm.server.models import Source
from edgevlm.server.run import Server
from tests.families import qwen_vl
from tests.helpers.serving import Braked, request, serving, wait_until

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
ROOT = Path(__file__).parents[1]
KEY = "a-key-of-some-length"
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["circle", "square"]}},
    "required": ["kind"],
    "additionalProperties": False,
}
DROP = """([name, data]) => {
  const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, {type: "image/png"}));
  const paste = new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true});
  const drop = new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
  document.body.dispatchEvent(name.startsWith("pasted") ? paste : drop);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=camera)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(vlm: VLM) -> Iterator[Server]:
    with serving(vlm) as server:
        yield server


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """A tiny Qwen2.5-VL, which writes boxes."""
    return qwen_vl.tiny_vlm(tmp_path_factory.mktemp("boxes"), "qwen2_5_vl")


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    yield from open_page(browser, server)


def open_page(browser: Any, server: Server, **context: Any) -> Iterator[Any]:
    """Open the page, and see to it that it asks nobody else and breaks none of its own rules."""
    opened = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, "permissions": ["camera"], **context})
    page = opened.new_page()
    page.set_default_timeout(20_000)
    wrong: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
    page.on("request", lambda sent: asked.append(sent.url))
    page.goto(server.url)
    yield page
    opened.close()
    assert wrong == []
    assert all(url.startswith((server.url, "data:")) for url in asked)


def ready(page: Any) -> None:
    sync_api.expect(page.locator("#model")).to_have_text("tiny")


def ask(page: Any, question: str, answers: int = 1) -> str:
    """Type a question, wait for the whole answer and return its text."""
    page.locator("#question").fill(question)
    page.keyboard.press("Enter")
    return whole_answer(page, answers)


def whole_answer(page: Any, answers: int = 1) -> str:
    answer = page.locator(".answer").nth(answers - 1)
    sync_api.expect(answer.locator(".facts")).not_to_be_empty()
    return str(answer.locator(".text").text_content())


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shown") / "red.png"
    Image.new("RGB", (90, 70), (200, 30, 30)).save(path)
    return path


def test_a_picture_a_question_and_another(page: Any, vlm: VLM, picture: Path) -> None:
    ready(page)
    page.locator("#file").set_input_files(picture)
    sync_api.expect(page.get_by_alt_text("Your picture: red.png")).to_be_visible()
    sync_api.expect(page.locator("#question")).to_be_focused()
    first = ask(page, "What is it?")
    assert first == vlm.generate(picture, "What is it?", GenerationConfig(max_new_tokens=256)).text
    facts = page.locator(".facts").first.text_content()
    assert re.search(r"first word after [\d.]+ s · \d+ tokens/s · [\d.]+ s in all · read \d+ of \d+ tokens anew", facts)
    assert "cut: allow a longer answer" in facts
    chat = vlm.chat(GenerationConfig(max_new_tokens=12))
    page.locator("summary").click()
    page.locator("#tokens").fill("12")
    page.get_by_role("button", name="Start over").click()
    texts = [ask(page, "What is it?", 1), ask(page, "And now?", 2)]
    assert texts == [chat.ask("What is it?", picture).text, chat.ask("And now?").text]
    assert page.locator("[aria-live=polite]").text_content() == texts[-1]


@pytest.mark.parametrize("way", ["dropped", "pasted"])
def test_a_picture_dropped_or_pasted(page: Any, picture: Path, way: str) -> None:
    import base64

    ready(page)
    page.evaluate(DROP, [f"{way}.png", base64.b64encode(picture.read_bytes()).decode()])
    sync_api.expect(page.get_by_alt_text(f"Your picture: {way}.png")).to_be_visible()


def test_a_photo(page: Any) -> None:
    ready(page)
    page.get_by_role("button", name="Take a photo").click()
    sync_api.expect(page.get_by_role("dialog", name="Camera")).to_be_visible()
    sync_api.expect(page.locator("#video")).to_have_js_property("paused", False)
    while not page.get_by_alt_text("Your photo").is_visible():  # the first frame takes its time
        page.get_by_role("button", name="Take the photo").click()
    sync_api.expect(page.get_by_role("dialog")).to_be_hidden()
    assert page.evaluate("picture.startsWith('data:image/jpeg')")
    assert ask(page, "What is it?")


def test_by_keyboard_alone(page: Any, picture: Path) -> None:
    page.on("filechooser", lambda _: None)  # asked for in time: the browser is told of it while the key is on its way
    ready(page)
    page.keyboard.press("Tab")
    sync_api.expect(page.get_by_role("button", name="Choose a picture")).to_be_focused()
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(picture)
    sync_api.expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("Two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines?")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator(".question")).to_have_text("Two\nlines?")
    whole_answer(page)
    sync_api.expect(page.locator("#question")).to_be_focused()
    page.keyboard.press("Tab")
    sync_api.expect(page.get_by_role("button", name="Ask")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    sync_api.expect(page.get_by_label("Detail")).to_be_visible()


def test_detail_and_schema(page: Any, picture: Path) -> None:
    ready(page)
    page.locator("#file").set_input_files(picture)
    page.locator("summary").click()
    page.get_by_label("Detail").select_option("low")
    page.get_by_label("JSON schema").fill(json.dumps(SCHEMA))
    with page.expect_request("**/v1/chat/completions") as sent:
        text = ask(page, "What is it?")
    assert json.loads(text)["kind"] in ("circle", "square")
    assert text == json.dumps(json.loads(text), indent=2)
    content = sent.value.post_data_json["messages"][0]["content"]
    assert content[0]["image_url"]["detail"] == "low"
    page.get_by_label("JSON schema").fill("{oops")
    page.locator("#question").fill("Again?")
    page.keyboard.press("Enter")
    sync_api.expect(page.get_by_role("alert")).to_contain_text("The JSON schema is not JSON")
    sync_api.expect(page.locator("#question")).to_have_value("Again?")


def test_a_thought_is_folded_away_above_the_answer(browser: Any, page: Any, thinker: VLM) -> None:
    ready(page)
    page.locator("summary").click()
    sync_api.expect(page.locator("#detail")).to_be_visible()
    sync_api.expect(page.get_by_label("Think first")).to_be_hidden()  # of a model that does not
    wanted = thinker.generate(None, "What is it?")
    with serving(thinker) as server:
        for thinking in open_page(browser, server):
            ready(thinking)
            assert ask(thinking, "What is it?") == wanted.text
            thought = thinking.locator(".thought div")
            sync_api.expect(thought).to_be_hidden()
            thinking.get_by_text("Thought", exact=True).click()
            sync_api.expect(thought).to_have_text(wanted.reasoning_content)
            thinking.get_by_text("Options").click()
            thinking.get_by_label("Think first").select_option("no")
            assert ask(thinking, "What is it?", 2) == wanted.text
            assert thinking.locator(".thought").count() == 1


def test_an_error_is_told_and_the_question_kept(page: Any, tmp_path: Path) -> None:
    ready(page)
    (tmp_path / "broken.png").write_bytes(b"no picture at all")
    page.locator("#file").set_input_files(tmp_path / "broken.png")
    page.locator("#question").fill("What is it?")
    page.keyboard.press("Enter")
    sync_api.expect(page.get_by_role("alert")).to_contain_text("is not an image in a format that edgevlm reads")
    sync_api.expect(page.locator("#question")).to_have_value("What is it?")
    sync_api.expect(page.locator(".answer")).to_have_count(0)


def test_an_answer_is_stopped(browser: Any, vlm: VLM) -> None:
    model = Braked(vlm)
    model.stop_at = 12
    with serving(model) as server:
        for page in open_page(browser, server):
            ready(page)
            page.locator("#question").fill("What is it?")
            page.keyboard.press("Enter")
            wait_until(lambda: model.holding)
            sync_api.expect(page.locator(".answer .text")).not_to_be_empty()
            [job] = server.worker.current
            page.keyboard.press("Escape")
            sync_api.expect(page.locator(".facts")).to_have_text("stopped")
            wait_until(job.abandoned.is_set)
            model.release()
            ask(page, "Go on.", 2)


def test_what_the_model_says_is_text_and_no_markup(page: Any) -> None:
    ready(page)
    markup = "<img src=x onerror=alert(1)>"
    page.locator("summary").click()
    page.get_by_label("JSON schema").fill(json.dumps({"const": markup}))
    assert json.loads(ask(page, markup)) == markup
    assert page.locator("#turns img").count() == 0


def test_a_key_is_asked_for(browser: Any, vlm: VLM) -> None:
    with serving(vlm, api_keys=(KEY,)) as server:
        for page in open_page(browser, server):
            sync_api.expect(page.locator("#model")).to_have_text("needs an API key")
            sync_api.expect(page.get_by_label("API key")).to_be_focused()
            page.keyboard.type(KEY)
            page.keyboard.press("Tab")
            ready(page)
            sync_api.expect(page.get_by_label("API key")).to_be_hidden()
            assert ask(page, "What is it?")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 860), (390, 844), (320, 480)], ids=["desktop", "phone", "small"])
def test_it_fits_every_screen(browser: Any, server: Server, picture: Path, size: tuple[int, int], scheme: str) -> None:
    context = {"viewport": {"width": size[0], "height": size[1]}, "color_scheme": scheme, "has_touch": size[0] < 500}
    for page in open_page(browser, server, **context):
        ready(page)
        page.locator("#file").set_input_files(picture)
        ask(page, "What is it?")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for name in ("#question", "#send", "#again"):
            sync_api.expect(page.locator(name)).to_be_in_viewport(ratio=1)
        sync_api.expect(page.locator(".facts")).to_be_in_viewport()
        for foreground, background in (
            ("body", "body"),
            (".answer", ".answer"),
            (".facts", ".answer"),
            ("#send", "#send"),
        ):
            assert contrast(page, foreground, background) >= 4.5, (foreground, background)


def contrast(page: Any, foreground: str, background: str) -> float:
    """Return the contrast ratio (WCAG 2.1, 1.4.3) of two elements' colours."""

    def luminance(selector: str, name: str) -> float:
        colour = page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{name}")
        levels = [int(level) / 255 for level in re.findall(r"\d+", colour)[:3]]
        linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
        return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])

    bright, dark = sorted((luminance(foreground, "color"), luminance(background, "backgroundColor")), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_no_other_page_may_frame_it_or_read_from_it(browser: Any, server: Server, tmp_path: Path) -> None:
    _, headers, body = request(server, "GET", "/")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert not re.search(rb"(src|href)=\"(?!data:)", body)
    (tmp_path / "evil.html").write_text(f'<iframe src="{server.url}"></iframe>', encoding="utf-8")
    context = browser.new_context()
    page = context.new_page()
    page.goto((tmp_path / "evil.html").as_uri())
    read = page.evaluate(
        "url => fetch(url + '/v1/models', {mode: 'no-cors'}).then(answer => answer.text(), () => 'refused')", server.url
    )
    assert "tiny" not in read
    assert page.frames[1].locator("#question").count() == 0
    context.close()


def test_the_bundled_model_s_answers_are_true(browser: Any, panel: VLM) -> None:
    with serving(panel, model_name="panel") as server:
        for page in open_page(browser, server):
            sync_api.expect(page.locator("#model")).to_have_text("panel")
            page.locator("#file").set_input_files(ROOT / "examples" / "light.png")
            assert ask(page, "What colour is the tower light showing?") == "green"
            assert ask(page, "Is the red lamp lit?", answers=2) == "no"


BOXES = "document.querySelectorAll('#places :not(.halo):not(text)')"
PLACES = f"Array.from({BOXES}, shape => [shape.tagName, shape.getBoundingClientRect().toJSON()])"


def middles(page: Any) -> list[tuple[float, float]]:
    """Return the middle of each place that is drawn, as shares of the picture's sides as they are shown."""
    shown = page.locator("#picture").bounding_box()
    return [
        (
            (place["x"] + place["width"] / 2 - shown["x"]) / shown["width"],
            (place["y"] + place["height"] / 2 - shown["y"]) / shown["height"],
        )
        for _, place in page.evaluate(PLACES)
    ]


@pytest.mark.parametrize("size", [(1280, 860), (390, 844), (320, 480)], ids=["desktop", "phone", "small"])
def test_a_point_is_drawn_where_it_is(browser: Any, panel: VLM, tmp_path: Path, size: tuple[int, int]) -> None:
    image = Image.open(ROOT / "examples" / "shape.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the file is turned, the page shows it upright
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    [place] = panel.locate(tmp_path / "turned.jpg", "the green square").locations
    with serving(panel, model_name="panel") as server:
        for page in open_page(browser, server, viewport={"width": size[0], "height": size[1]}):
            sync_api.expect(page.locator("#model")).to_have_text("panel")
            button = page.get_by_role("button", name="Locate")
            sync_api.expect(button).to_be_hidden()  # there is no picture yet
            page.locator("#file").set_input_files(tmp_path / "turned.jpg")
            page.locator("#question").fill("the green square")
            button.click()
            x, y = place.point or (0, 0)
            assert whole_answer(page) == f"1  point {x:.1f} {y:.1f}  score {place.score:.2f}"
            [(across, down)] = middles(page)
            assert (across, down) == pytest.approx((x / image.width, y / image.height), abs=0.01)
            sync_api.expect(page.get_by_role("img", name="the green square: 1 marked")).to_be_visible()
            sync_api.expect(page.locator("#places circle").last).to_be_in_viewport(ratio=0.9)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            sync_api.expect(page.locator("#send")).to_be_in_viewport(ratio=1)
            assert ask(page, "What colour is the square?", 2)  # a conversation goes on beside it
            assert page.evaluate("messages.length") == 2
            page.get_by_role("button", name="Start over").click()
            assert middles(page) == []


def test_boxes_are_drawn_and_errors_told(browser: Any, boxes: VLM, tmp_path: Path) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (80, 120, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    phrase = "the <red> valve"
    found = boxes.locate(tmp_path / "noise.png", phrase).locations
    with serving(boxes) as server:
        for page in open_page(browser, server):
            ready(page)
            page.locator("#file").set_input_files(tmp_path / "noise.png")
            page.locator("#question").fill(phrase)
            page.get_by_role("button", name="Locate").click()
            assert whole_answer(page).count("box") == len(found)
            expected = [((b[0] + b[2]) / 240, (b[1] + b[3]) / 160) for each in found if (b := each.box)]
            assert [pytest.approx(middle, abs=0.02) for middle in middles(page)] == expected
            page.locator("#question").fill("valve " * 100)
            page.get_by_role("button", name="Locate").click()
            sync_api.expect(page.get_by_role("alert")).to_contain_text("phrase")
            assert middles(page) == []


def test_a_model_that_cannot_locate_has_no_button(page: Any, picture: Path) -> None:
    ready(page)
    page.locator("#file").set_input_files(picture)
    sync_api.expect(page.get_by_alt_text("Your picture: red.png")).to_be_visible()
    sync_api.expect(page.get_by_role("button", name="Locate")).to_be_hidden()


def test_what_fails_in_the_server_is_shown(browser: Any, vlm: VLM) -> None:
    class Failing(Braked):
        def steps(self, *_: Any) -> Any:
            raise SystemExit  # no Exception, as the panic of a library in Rust is none

    with serving(Failing(vlm)) as server:
        for page in open_page(browser, server):
            page.wait_for_selector("#model:has-text('tiny')")
            page.fill("#question", "What is it?")
            page.click("#send")
            assert page.inner_text(".wrong") == "the server failed on this request; its log says where"
            page.context.set_offline(True)
            page.click("#send")
            page.wait_for_selector(".wrong >> nth=1")
            assert page.inner_text(".wrong >> nth=1") == "The server does not answer."


def test_a_model_is_picked_where_there_are_several(browser: Any, vlm: VLM, boxes: VLM, picture: Path) -> None:
    source = Source("boxes", lambda: boxes, boxes.manifest)
    with serving(vlm, source) as server:
        for page in open_page(browser, server, viewport={"width": 390, "height": 844}):
            picker, button = page.get_by_label("Model", exact=True), page.get_by_role("button", name="Locate")
            sync_api.expect(picker.locator("option")).to_have_text(["tiny", "boxes"])
            page.locator("#file").set_input_files(picture)
            for name, locates in (("tiny", False), ("boxes", True)):
                picker.select_option(name)
                sync_api.expect(button).to_be_visible(visible=locates)
                with page.expect_request("**/v1/chat/completions") as sent:
                    ask(page, "What is it?", 1 + locates)
                assert sent.value.post_data_json["model"] == name
            page.locator("#question").fill("the valve")
            with page.expect_request("**/v1/locate") as sent:
                button.click()
            assert sent.value.post_data_json["model"] == "boxes"
            whole_answer(page, 3)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_one_model_is_not_picked(page: Any, picture: Path) -> None:
    ready(page)
    sync_api.expect(page.get_by_label("Model", exact=True)).to_be_hidden()
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "What is it?")
    assert "model" not in sent.value.post_data_json
