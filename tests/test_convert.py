"""`edgevlm convert`: pages to documents; nothing lost, nothing twice, and one bad file harms no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pypdfium2
import pytest
from PIL import Image, ImageDraw

from edgevlm import OptionError, OutputError
from edgevlm.decoding.config import GenerationConfig
from edgevlm.inputs.pages import LONGEST_SIDE, open_document
from edgevlm.jobs.convert import Conversion, PageReader, convert, parse_pages
from edgevlm.jobs.doclang import read_doclang
from edgevlm.jobs.documents import Figures, assemble
from edgevlm.jobs.markdown_pages import PageText, as_document
from tests.conftest import F32
from tests.helpers.batches import lines, read, wait_for
from tests.helpers.command import COMMAND, POSIX, cli
from tests.helpers.doctags import PAGE, page

MODEL = ["--device", "CPU", "--inference-precision", "f32", "--no-cache", "--detail", "low", "--kv-cache", "stateful"]
ENCRYPTED = b"""%%PDF-1.4
1 0 obj <</Type /Catalog /Pages 2 0 R>> endobj
2 0 obj <</Type /Pages /Kids [] /Count 0>> endobj
3 0 obj <</Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s>>> endobj
trailer <</Root 1 0 R /Encrypt 3 0 R /ID [<00> <00>]>>
""" % (b"11" * 32, b"22" * 32)


def empty_pdf() -> bytes:
    """Return a PDF without pages."""
    with BytesIO() as file:
        pypdfium2.PdfDocument.new().save(file)
        return file.getvalue()


def sheets(count: int, size: tuple[int, int] = (170, 220)) -> list[Image.Image]:
    """Sheets that differ in a mark."""
    made = []
    for number in range(count):
        made.append(page(*size))
        ImageDraw.Draw(made[-1]).point((number % size[0], number // size[0]), "black")
    return made


def save(path: Path, pictures: Sequence[Image.Image], **options: Any) -> Path:
    """Write pictures as the pages of one file."""
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)
    return path


def test_a_page_of_doctags_becomes_every_format(docling: Path, tmp_path: Path) -> None:
    save(tmp_path / "report.pdf", [page(170, 220)] * 2, resolution=72)
    found = {}
    for target, suffix in {
        "markdown": "md",
        "html": "html",
        "json": "json",
        "doctags": "doctags",
        "text": "txt",
    }.items():
        arguments = ["convert", tmp_path / "report.pdf", "--to", target, "-o", tmp_path / "made", "-m", docling, *MODEL]
        result = cli(*arguments, "--dpi", 72)
        assert result.exit_code == 0, result.output
        made = tmp_path / "made" / f"report.{suffix}"
        assert result.stdout.strip() == str(made)
        found[target] = made.read_text(encoding="utf-8")
    assert found["doctags"].count(PAGE) == 2
    assert found["markdown"].count("## Pump 12") == 2
    assert found["markdown"].count("| left    |  42.7 |") == 2
    assert "<td>left</td>" in found["html"] and "4.2 bar" in found["text"]
    document = json.loads(found["json"])
    assert sorted(document["pages"]) == ["1", "2"]
    assert [each["prov"][0]["page_no"] for each in document["tables"]] == [1, 2]
    assert len(read(tmp_path / "made" / "report.pages.jsonl")) == 2  # read once for all of them


@pytest.mark.parametrize("suffix", ["tiff", "pdf"])
def test_pages_of_a_file_are_its_pictures(tmp_path: Path, suffix: str) -> None:
    pictures = [Image.fromarray(np.full((60, 40, 3), each, np.uint8)) for each in (10, 120, 250)]
    document = open_document(
        save(tmp_path / f"a.{suffix}", pictures, **({"resolution": 72} if suffix == "pdf" else {}))
    )
    assert document.pages == 3
    for number, each in enumerate((10, 120, 250), 1):
        found = document.page(number, 72)
        assert found.shape == (60, 40, 3)
        np.testing.assert_allclose(found.astype(int), each, atol=2)


def test_a_pdf_is_rasterized_at_its_resolution_within_bounds(tmp_path: Path) -> None:
    save(tmp_path / "poster.pdf", [Image.new("RGB", (500, 100), "white")], resolution=2.54)  # five metres wide
    assert open_document(tmp_path / "poster.pdf").page(1).shape[1] == LONGEST_SIDE
    save(tmp_path / "sheet.pdf", [Image.new("RGB", (100, 200), "white")], resolution=100)
    assert open_document(tmp_path / "sheet.pdf").page(1, 200).shape == (400, 200, 3)


def test_a_document_in_markdown_keeps_the_order(tmp_path: Path) -> None:
    pages = [PageText(1, "# One\n\n| a | b |\n|---|---|\n| 1 | 2 |", (1, 1)), PageText(2, "<b>Two</b>\n", (1, 1))]
    figures = Figures(tmp_path, lambda _: np.zeros((1, 1, 3), np.uint8))
    made = {to: assemble("x", pages, to, figures) for to in ("markdown", "html", "json", "text")}
    assert made["markdown"] == f"{pages[0].text}\n\n<b>Two</b>\n"
    assert "<td>1</td>" in made["html"] and "&lt;b&gt;Two" in made["html"]
    assert [each["page"] for each in json.loads(made["json"])["pages"]] == [1, 2]
    with pytest.raises(OptionError, match="writes Markdown, not DocTags"):
        assemble("x", pages, "doctags", figures)


def test_figures_are_cropped_beside_the_document(tmp_path: Path) -> None:
    sheet = np.full((200, 100, 3), 255, np.uint8)
    sheet[50:100, 20:80] = (200, 0, 0)
    figure = "<picture><loc_100><loc_125><loc_400><loc_250></picture>"
    tags = f"<doctag>{figure}<text><loc_0><loc_0><loc_9><loc_9>Hi</text></doctag>"
    figures = Figures(tmp_path / "a_artifacts", lambda _: sheet)
    made = assemble("a", [PageText(4, tags, (100, 200))], "markdown", figures, "doctags")
    assert "](a_artifacts/page-4-figure-1.png)" in made and "Hi" in made
    crop = np.asarray(Image.open(tmp_path / "a_artifacts" / "page-4-figure-1.png").convert("RGB"))
    assert crop.shape == (50, 60, 3) and (crop == (200, 0, 0)).all()
    assert "base64" not in assemble("a", [PageText(4, tags, (100, 200))], "json", figures, "doctags")


def test_tables_in_otsl_alone_become_every_format(tmp_path: Path) -> None:
    pytest.importorskip("docling_core")
    otsl = "<fcel>gauge<lcel><nl><fcel>left & low<fcel>42.7<nl><ucel><ecel><nl>"
    pages, figures = [PageText(1, otsl, (100, 50))] * 2, Figures(tmp_path, lambda _: np.zeros((1, 1, 3), np.uint8))
    made = {to: assemble("a", pages, to, figures) for to in ("markdown", "html", "json", "doctags")}
    assert made["markdown"].count("42.7 |") == 2 and "cel>" not in made["markdown"]
    assert (
        made["html"].count('<td colspan="2">gauge</td>')
        == made["html"].count('<td rowspan="2">left &amp; low</td>')
        == 2
    )
    assert len(json.loads(made["json"])["tables"]) == 2
    assert made["doctags"] == f"<doctag><otsl>{otsl}</otsl></doctag>\n" * 2
    assert assemble("a", [PageText(1, f"<otsl>{otsl}</otsl>", (100, 50))] * 2, "doctags", figures) == made["doctags"]


@pytest.fixture
def no_figures(tmp_path: Path) -> Figures:
    return Figures(tmp_path, lambda _: np.zeros((1, 1, 3), np.uint8))


MIXED = (
    "# Pump 12\n\nReadings of <b>today</b>:\n"
    "<otsl><ched>gauge<lcel><nl><fcel>left | low<fcel>4 < 5 & 6<nl><ucel><ecel><nl></otsl> The end."
    "\n\n<fcel>cut<fcel>off"
)


def test_tables_in_otsl_among_text_become_tables(no_figures: Figures) -> None:
    pytest.importorskip("docling_core")
    pages = [PageText(1, MIXED, (100, 50)), PageText(2, "No table.\n", (100, 50))]
    made = {to: assemble("a", pages, to, no_figures) for to in ("markdown", "html", "json", "text")}
    assert made["markdown"] == made["text"]
    assert made["markdown"].startswith("# Pump 12\n\nReadings of <b>today</b>:\n\n| gauge")
    assert "| left &#124; low | 4 < 5 & 6 |" in made["markdown"]
    assert "\n\nThe end.\n\n| cut   | off   |\n|-------|-------|\n\nNo table.\n" in made["markdown"]
    assert "<h1>Pump 12</h1>" in made["html"] and "&lt;b&gt;today" in made["html"]
    assert '<th colspan="2">gauge</th>' in made["html"]
    assert '<td rowspan="2">left | low</td><td>4 &lt; 5 &amp; 6</td>' in made["html"]
    first, second = json.loads(made["json"])["pages"]
    assert first["text"] in made["markdown"]
    assert [table["num_rows"] for table in first["tables"]] == [3, 1]
    assert [cell["text"] for cell in first["tables"][0]["grid"][2]] == ["left | low", ""]
    assert second == {"page": 2, "text": "No table.\n"}
    with pytest.raises(OptionError, match="writes Markdown, not DocTags"):
        assemble("a", pages, "doctags", no_figures)


def test_a_document_of_docling_core_has_text_and_tables_in_order() -> None:
    pytest.importorskip("docling_core")
    document = as_document("a", [PageText(4, MIXED, (100, 50)), PageText(7, "No table.\n", (300, 20))])
    items = [item for item, _ in document.iterate_items()]
    assert [item.label.value for item in items] == ["text", "table", "text", "table", "text"]
    assert [item.prov[0].page_no for item in items] == [4, 4, 4, 4, 7]
    assert items[2].text == "The end."
    assert [items[index].data.num_rows for index in (1, 3)] == [3, 1]
    assert items[4].prov[0].bbox.as_tuple() == (0, 0, 300, 20)


PLACES = [100, 200, 300, 200, 300, 400, 100, 400]
CORNERS = "".join(f"<|LOC_{each}|>" for each in PLACES)
SPOTTED = {
    "as it comes": f"Pump 12{CORNERS}\n4.2 bar{CORNERS}cut<|LOC_1|><|LOC_2|>",
    "delimited": "".join(
        f"<|TEXT_START|>{text}<|TEXT_END|><|LOC_BEGIN|>{places}<|LOC_END|>"
        for text, places in (("Pump 12", CORNERS), ("4.2 bar", CORNERS), ("cut", "<|LOC_1|><|LOC_2|>"))
    ),
}


@pytest.mark.parametrize("written", SPOTTED)
def test_spotted_lines_have_their_places_in_json_alone(written: str, no_figures: Figures) -> None:
    pages = [PageText(1, SPOTTED[written], (500, 1000))]
    assert assemble("a", pages, "markdown", no_figures) == "Pump 12\n\n4.2 bar\n\ncut\n"
    assert "<p>Pump 12</p>\n<p>4.2 bar</p>" in assemble("a", pages, "html", no_figures)
    [page] = json.loads(assemble("a", pages, "json", no_figures))["pages"]
    polygon = [[50, 200], [150, 200], [150, 400], [50, 400]]
    assert page["text"] == "Pump 12\n\n4.2 bar\n\ncut"
    assert page["lines"] == [
        {"text": "Pump 12", "polygon": polygon},
        {"text": "4.2 bar", "polygon": polygon},
        {"text": "cut", "polygon": []},
    ]


def test_mixed_up_otsl_keeps_its_words(no_figures: Figures) -> None:
    pytest.importorskip("docling_core")
    random = np.random.default_rng(0)
    tags = ["<fcel>", "<ecel>", "<lcel>", "<ucel>", "<xcel>", "<ched>", "<nl>", "<otsl>", "</otsl>", "\n\n", "<", "w w"]
    for _ in range(60):
        words = [f"word{number}" for number in range(12)]
        text = "".join(f"{random.choice(tags)}{random.choice(tags)}{word}" for word in words)
        for target in ("markdown", "html", "json"):
            made = assemble("a", [PageText(1, text, (100, 50))], target, no_figures)
            assert not [word for word in words if word not in made], text


HEAD = '<location value="0"/><location value="128"/><location value="512"/><location value="256"/>'
DOCLANG = (
    f'<doclang><heading level="2">{HEAD}Pump & valve</heading><picture>{HEAD}</picture>'
    "<table><ched/>gauge<ched/>bar<nl/><fcel/>left<fcel/>42.7<nl/></table>"
    "<text>The pressure is 4.2 bar.</text></doclang>"
)


def test_a_page_of_doclang_becomes_every_format(tmp_path: Path) -> None:
    """Places are pixels of the page, of which DocLang counts 512 a side; figures are cropped."""
    sheet = np.full((200, 100, 3), 255, np.uint8)
    sheet[50:100] = (200, 0, 0)
    figures = Figures(tmp_path / "a_artifacts", lambda _: sheet)
    pages = [PageText(number, f"Here it is: {DOCLANG} Done.", (100, 200)) for number in (4, 5)]
    made = {to: assemble("a", pages, to, figures, "doclang") for to in ("markdown", "html", "json", "text")}
    assert made["markdown"].count("Pump &amp; valve") == 2
    assert made["markdown"].count("| left    |  42.7 |") == 2
    assert "](a_artifacts/page-5-figure-1.png)" in made["markdown"]
    assert "<td>left</td>" in made["html"] and "4.2 bar" in made["text"]
    crop = np.asarray(Image.open(tmp_path / "a_artifacts" / "page-4-figure-1.png").convert("RGB"))
    assert crop.shape == (50, 100, 3) and (crop == (200, 0, 0)).all()
    document = json.loads(made["json"])
    assert document["pages"]["5"]["size"] == {"width": 100, "height": 200}
    box = document["texts"][0]["prov"][0]["bbox"]
    assert [box[side] for side in "ltrb"] == [0, 50, 100, 100]
    with pytest.raises(OptionError, match="writes DocLang, not DocTags"):
        assemble("a", pages, "doctags", figures, "doclang")


@pytest.mark.parametrize("markup", ["doctags", "doclang"])
def test_pages_keep_the_numbers_of_their_file(markup: Any, no_figures: Figures) -> None:
    pytest.importorskip("docling_core")
    texts = {"doctags": [PAGE, "<doctag></text>mixed up", PAGE], "doclang": [DOCLANG, "no markup", DOCLANG]}[markup]
    pages = [PageText(number, text, (100, 200)) for number, text in zip((4, 7, 8), texts, strict=True)]
    document = json.loads(assemble("a", pages, "json", no_figures, markup))
    assert {number: page["page_no"] for number, page in document["pages"].items()} == {"4": 4, "7": 7, "8": 8}
    places = [place["page_no"] for kind in ("texts", "tables") for item in document[kind] for place in item["prov"]]
    assert {*places} == {4, 8}  # what is mixed up has no places


def test_a_page_break_within_a_page_makes_no_other_page(no_figures: Figures) -> None:
    pytest.importorskip("docling_core")
    broken = DOCLANG.replace("</table>", "</table><page_break/>").replace("<text>", f"<text>{HEAD}")
    pages = [PageText(4, broken, (100, 200)), PageText(7, DOCLANG, (100, 200))]
    document = json.loads(assemble("a", pages, "json", no_figures, "doclang"))
    assert {number: page["size"]["height"] for number, page in document["pages"].items()} == {"4": 200, "7": 200}
    assert [each["prov"][0]["page_no"] for each in document["texts"] if each["prov"]] == [4, 4, 7]


def test_a_page_of_doclang_that_was_cut_is_read_up_to_there() -> None:
    for end in range(len("<doclang><he"), len(DOCLANG), 5):
        words = read_doclang(DOCLANG[:end], "a", (100, 200)).export_to_markdown()
        assert ("valve" in words) == ("valve" in DOCLANG[:end]), end
        assert ("| left" in words) == ("left" in DOCLANG[:end]), end


def test_what_is_no_doclang_is_words() -> None:
    document = read_doclang("<doclang><text>Pump</heading> 12", "a", (100, 200))
    assert "Pump  12" in document.export_to_text()


BAD = {
    "damaged.pdf": (b"%PDF-1.4 and nothing else", "cannot be read as a PDF"),
    "encrypted.pdf": (ENCRYPTED, "is encrypted; save it without a password first"),
    "empty.pdf": (empty_pdf(), "cannot be read as a PDF: it is damaged, or has no pages"),
    "cut.tiff": (b"II*\0", "cannot be opened as an image|is not an image"),
    "none.png": (b"", "is empty, not an image"),
}


def test_bad_files_are_told_and_harm_no_other(docling: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, (data, _) in BAD.items():
        (folder / name).write_bytes(data)
    save(folder / "good.pdf", [page(170, 220)], resolution=72)
    arguments = ["convert", folder, "--to", "text", "-o", tmp_path / "out", "-m", docling, "--dpi", "72", *MODEL]
    result = cli(*arguments, "--json")
    assert result.exit_code == 1
    told = result.stderr.strip().splitlines()
    assert len([line for line in told if "in" in line and any(name in line for name in BAD)]) == len(BAD)
    assert "Traceback" not in result.output
    summary = json.loads(result.stdout)
    assert (summary["files"], summary["failed_files"], summary["pages"]) == (6, 5, 1)
    assert (tmp_path / "out" / "good.txt").read_text(encoding="utf-8")
    missing = cli("convert", tmp_path / "none.pdf", "-m", docling)
    assert missing.exit_code == 1 and "none.pdf" in missing.stderr


@pytest.mark.parametrize("name", BAD)
def test_every_bad_file_has_its_line(tmp_path: Path, name: str) -> None:
    data, told = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Exception, match=told) as raised:
        open_document(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_pages_that_were_cut_are_told(exported: Path, tmp_path: Path) -> None:
    data = save(tmp_path / "a.tiff", sheets(3)).read_bytes()
    (tmp_path / "a.tiff").write_bytes(data)
    told: list[str] = []
    what = Conversion(
        tmp_path, model=str(exported), runtime=F32, config=GenerationConfig(max_new_tokens=2), prompt="x" * 9
    )
    summary = convert([tmp_path / "a.tiff"], what, told.append)
    assert (summary.pages, summary.cut_pages, summary.failed_pages) == (3, 3, 0)
    assert all("may be incomplete: --max-new-tokens was reached" in line for line in told) and len(told) == 3


def test_a_page_that_cannot_be_read_leaves_the_others(exported: Path, tmp_path: Path) -> None:
    first, second, third = sheets(3)
    save(tmp_path / "a.tiff", [first, second.convert("F"), third])
    told: list[str] = []
    what = Conversion(tmp_path, model=str(exported), runtime=F32, config=GenerationConfig(max_new_tokens=2))
    summary = convert([tmp_path / "a.tiff"], what, told.append)
    assert (summary.pages, summary.failed_pages, len(summary.written)) == (3, 1, 1)
    assert [line for line in told if "page 2" in line and "floating-point pixels" in line]
    assert [row["page"] for row in read(tmp_path / "a.pages.jsonl") if "answer" in row] == [1, 3]


def test_another_format_loads_no_model(docling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page(170, 220).save(tmp_path / "a.png")
    convert([tmp_path / "a.png"], Conversion(tmp_path, model=str(docling), runtime=F32))
    monkeypatch.setattr(PageReader, "vlm", property(lambda _: pytest.fail("the model was loaded")))
    convert([tmp_path / "a.png"], Conversion(tmp_path, "html", model=str(docling), runtime=F32))
    assert "<td>left</td>" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_nothing_half_written_is_left(exported: Path, tmp_path: Path) -> None:
    page(40, 40).save(tmp_path / "a.png")
    (tmp_path / "a.md").mkdir()
    config = GenerationConfig(max_new_tokens=1)
    with pytest.raises(OutputError, match=r"cannot write .*a\.md"):
        convert([tmp_path / "a.png"], Conversion(tmp_path, model=str(exported), runtime=F32, config=config))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.md", "a.pages.jsonl", "a.png"]


BROKEN = {
    "a cell behind its table's end": PAGE.replace("bar<nl><fcel>left", "bar<nl><fcel></otsl>left"),
    "a place upside down": PAGE.replace("<otsl>", "<picture><loc_10><loc_400><loc_10><loc_0></picture><otsl>"),
    "a place that is cut": PAGE.replace("<otsl>", "<picture><loc_400></picture><otsl>"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tags_that_a_model_has_mixed_up_keep_their_words(name: str, tmp_path: Path) -> None:
    figures = Figures(tmp_path / "a_artifacts", lambda _: np.zeros((220, 170, 3), np.uint8))
    for target in ("markdown", "html", "json", "text"):
        made = assemble("a", [PageText(1, BROKEN[name], (170, 220))], target, figures, "doctags")
        assert "Pump 12" in made and "4.2 bar" in made


def test_some_pages_and_names(exported: Path, tmp_path: Path) -> None:
    assert [list(each) for each in parse_pages("1-3, 7")] == [[1, 2, 3], [7]]
    assert 10**6 in parse_pages("10-")[0] and 9 not in parse_pages("10-")[0]
    for text in ("", "0", "3-1", "a", "1-2-3", "1,,2"):
        with pytest.raises(OptionError, match="--pages takes"):
            parse_pages(text)
    save(tmp_path / "a.tiff", sheets(5))
    config = GenerationConfig(max_new_tokens=1)
    what = Conversion(tmp_path / "o", model=str(exported), runtime=F32, config=config, pages=parse_pages("2-3,5-"))
    convert([tmp_path / "a.tiff"], what)
    assert [row["page"] for row in read(tmp_path / "o" / "a.pages.jsonl")] == [2, 3, 5]
    page(9, 9).save(tmp_path / "a.png")
    with pytest.raises(OptionError, match="would both become a;"):
        convert([tmp_path], what)
    with pytest.raises(OptionError, match="knows no task 'poem'; it knows page, text"):
        convert([tmp_path / "a.png"], Conversion(tmp_path / "p", task="poem", model=str(exported), runtime=F32))
    with pytest.raises(OptionError, match="dpi must be"):
        Conversion(tmp_path, dpi=5)


@POSIX
def test_killed_and_run_again_no_page_is_lost_or_read_twice(exported: Path, tmp_path: Path) -> None:
    save(tmp_path / "book.tiff", sheets(40))
    command = [*COMMAND, "convert", "book.tiff", "-m", str(exported), *MODEL, "--max-new-tokens", "4"]
    rows = tmp_path / "book.pages.jsonl"
    for _ in range(2):
        before = lines(rows)
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True)
        wait_for(lambda before=before: lines(rows) > before + 3, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "book.md").exists()
    known = rows.read_bytes()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert rows.read_bytes().startswith(known[: known.rfind(b"\n") + 1])
    assert [row["page"] for row in read(rows)] == list(range(1, 41))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["book.md", "book.pages.jsonl", "book.tiff"]


def test_a_hundred_pages_take_the_memory_of_a_few(exported: Path, tmp_path: Path) -> None:
    save(tmp_path / "long.pdf", sheets(100, (850, 1100)), resolution=100)
    config, resident = GenerationConfig(max_new_tokens=2), {}

    def note(done: int, total: int) -> None:
        resident[done] = psutil.Process().memory_info().rss
        assert total == 100

    convert(
        [tmp_path / "long.pdf"], Conversion(tmp_path, model=str(exported), runtime=F32, config=config), on_progress=note
    )
    assert len(resident) == 101
    assert resident[100] - resident[30] < 16 * 2**20  # a page's picture has 2.8 MB at 100 dpi, 5.8 MB at 144
