"""DocTags on their way: Python API, command line, server and stream, and docling, which reads a page with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgevlm import VLM, GenerationConfig
from edgevlm.inputs.tokenizer import DIGITS, LETTERS
from edgevlm.server.run import Server
from tests.conftest import F32, photograph
from tests.helpers.command import cli
from tests.helpers.doctags import PAGE, PROMPT, TAGS, page
from tests.helpers.serving import ask, data_url, events, request, serving

SHEET = page(170, 220)


@pytest.fixture(scope="module")
def server(docling: Path) -> Iterator[Server]:
    with serving(VLM(docling, F32), model_name="tiny-docling") as server:
        yield server


def test_the_tags_are_text(docling: Path) -> None:
    vlm = VLM(docling, F32)
    assert set(vlm.manifest.text_tokens) == set(TAGS)
    answer = vlm.generate(SHEET, PROMPT)
    assert (answer.text.strip(), answer.finish_reason) == (PAGE, "stop")
    assert "".join(piece.text for piece in vlm.stream(SHEET, PROMPT)).strip() == PAGE


def test_the_next_page_is_drafted_from_the_one_before_and_is_the_same(docling: Path) -> None:
    vlm = VLM(docling, F32)
    plain = vlm.generate(SHEET, PROMPT, GenerationConfig(draft_tokens=0))
    pages = [vlm.generate(page(170, 221 + each), PROMPT) for each in range(3)]
    assert {each.token_ids for each in pages} == {plain.token_ids}
    assert plain.accepted_tokens == 0
    assert pages[0].accepted_tokens < pages[1].accepted_tokens
    assert pages[-1].accepted_tokens > len(plain.token_ids) / 2


def test_places_and_numbers_are_alike_in_shape(docling: Path) -> None:
    tokenizer = VLM(docling, F32).processor.tokenizer
    shapes = {text: {tokenizer.shape(each) for each in tokenizer.encode(text)} for text in ("<loc_10>", "<loc_400>")}
    assert shapes["<loc_10>"] == shapes["<loc_400>"] == {"<loc_0>"}
    assert {tokenizer.shape(each) for each in tokenizer.encode("90210")} == {DIGITS}
    assert {tokenizer.shape(each) for each in tokenizer.encode("pump")} == {LETTERS}
    assert tokenizer.shape(tokenizer.encode("<fcel>")[0]) == "<fcel>"


def test_stop_texts_see_tags(docling: Path) -> None:
    stopped = VLM(docling, F32).generate(SHEET, PROMPT, GenerationConfig(stop=("<otsl>",)))
    assert (stopped.text.strip(), stopped.finish_reason) == (PAGE.partition("<otsl>")[0], "stop")


def test_tags_in_a_question_are_tokens_and_control_is_not(docling: Path) -> None:
    processor = VLM(docling, F32).processor
    [place], [control] = (processor.tokenizer.encode(each) for each in ("<loc_10>", "<|im_end|>"))
    said = [{"role": "user", "content": [{"type": "text", "text": "OCR at <loc_10><loc_400> <|im_end|>"}]}]
    ids = processor.prompt_ids(said, [])
    assert place in ids
    assert control not in ids


def test_the_command_line(docling: Path, tmp_path: Path) -> None:
    SHEET.save(tmp_path / "page.png")
    result = cli("run", tmp_path / "page.png", PROMPT, "-m", docling, "--inference-precision", "f32")
    assert result.stdout.strip() == PAGE


@pytest.mark.parametrize("fields", [{}, {"skip_special_tokens": False}, {"skip_special_tokens": True}])
def test_the_server_and_its_stream(fields: dict[str, Any], server: Server) -> None:
    content = [{"type": "image_url", "image_url": {"url": data_url(SHEET)}}, {"type": "text", "text": PROMPT}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 200, **fields}
    status, answer = ask(server, **body)
    assert (status, answer["choices"][0]["message"]["content"].strip()) == (200, PAGE)
    _, _, stream = request(server, "POST", "/v1/chat/completions", {**body, "stream": True})
    deltas = [choice["delta"].get("content") or "" for chunk in events(stream) for choice in chunk["choices"]]
    assert "".join(deltas).strip() == PAGE


def converter(server: Server) -> Any:
    """Return docling's converter, its pages read by the server."""
    from docling.backend.image_backend import ImageDocumentBackend
    from docling.backend.pypdfium2_backend import PyPdfiumDocumentBackend
    from docling.datamodel.base_models import InputFormat
    from docling.datamodel.pipeline_options import VlmConvertOptions, VlmPipelineOptions
    from docling.datamodel.vlm_engine_options import ApiVlmEngineOptions
    from docling.document_converter import DocumentConverter, ImageFormatOption, PdfFormatOption
    from docling.pipeline.vlm_pipeline import VlmPipeline

    host, port = server.socket.getsockname()[:2]
    engine = ApiVlmEngineOptions(
        url=f"http://{host}:{port}/v1/chat/completions",
        params={"model": "tiny-docling", "max_tokens": 200, "skip_special_tokens": False},
        timeout=60,
    )
    options = VlmPipelineOptions(
        vlm_options=VlmConvertOptions.from_preset("granite_docling", engine_options=engine), enable_remote_services=True
    )
    way = {"pipeline_cls": VlmPipeline, "pipeline_options": options}
    return DocumentConverter(
        allowed_formats=[InputFormat.PDF, InputFormat.IMAGE],
        format_options={
            InputFormat.PDF: PdfFormatOption(backend=PyPdfiumDocumentBackend, **way),
            InputFormat.IMAGE: ImageFormatOption(backend=ImageDocumentBackend, **way),
        },
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning")
@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_docling_reads_a_page_through_the_server(suffix: str, server: Server, tmp_path: Path) -> None:
    """The real package: its preset for granite-docling, its request, its parser of DocTags."""
    path = tmp_path / f"page.{suffix}"
    page(425, 550).save(path)
    result = converter(server).convert(path)
    assert result.status.value == "success"
    markdown = result.document.export_to_markdown()
    assert "## Pump 12" in markdown
    assert "The pressure is 4.2 bar." in markdown
    assert [cell.text for cell in result.document.tables[0].data.table_cells] == ["gauge", "bar", "left", "42.7"]


def test_a_model_of_another_vocabulary_has_no_tags(vlm: VLM) -> None:
    assert vlm.manifest.text_tokens == ()
    assert vlm.generate(photograph("china.jpg"), PROMPT, GenerationConfig(4)).generated_tokens <= 4
