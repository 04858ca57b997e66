"""`/v1/convert/file` and `/v1/convert/source`: documents, as docling-serve's clients send and read them."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from PIL import Image

from edgevlm import VLM
from edgevlm.inputs import page_process
from edgevlm.jobs.convert import Conversion, convert
from edgevlm.server.run import Server
from tests.conftest import F32
from tests.helpers.doctags import PAGE, page
from tests.helpers.serving import PATIENCE_S, Braked, ask, request, serving, shown, wait_until
from tests.test_convert import BAD, sheets

CONTENTS = {
    "md": "md_content",
    "html": "html_content",
    "json": "json_content",
    "text": "text_content",
    "doctags": "doctags_content",
}
PAPERLESS_GPT = {"to_formats": "md", "do_ocr": "true", "pipeline": "vlm", "image_export_mode": "embedded"}
"""What paperless-gpt's provider writes into its form, in Go."""


@pytest.fixture(scope="module")
def model(docling: Path) -> VLM:
    return VLM(docling, F32)


@pytest.fixture(scope="module")
def server(model: VLM) -> Iterator[Server]:
    with serving(model, model_name="tiny-docling", max_pages=4) as server:
        yield server


def url(server: Server, path: str = "/v1/convert/file") -> str:
    host, port = server.socket.getsockname()[:2]
    return f"http://{host}:{port}{path}"


def send(server: Server, data: bytes, name: str = "document.pdf", **fields: Any) -> tuple[int, Any]:
    """Send a form as requests does, and return status and JSON."""
    answer = requests.post(url(server), files={"files": (name, data)}, data=fields, timeout=PATIENCE_S)
    return answer.status_code, answer.json()


def converted(server: Server, data: bytes, name: str = "document.pdf", **fields: Any) -> Any:
    status, answer = send(server, data, name, **fields)
    assert status == 200, answer
    return answer


def pdf(count: int = 1, size: tuple[int, int] = (170, 220)) -> bytes:
    """Return a PDF of pages that differ in a mark."""
    first, *others = sheets(count, size)
    with BytesIO() as file:
        first.save(file, "PDF", save_all=True, append_images=others, resolution=144)
        return file.getvalue()


def tiff(*pictures: Image.Image) -> bytes:
    with BytesIO() as file:
        pictures[0].save(file, "TIFF", save_all=True, append_images=pictures[1:])
        return file.getvalue()


def png() -> bytes:
    with BytesIO() as file:
        page(170, 220).save(file, "PNG")
        return file.getvalue()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # docling's, of its own fields
def test_a_document_is_what_the_command_makes_of_it(server: Server, docling: Path, tmp_path: Path) -> None:
    """Byte for byte, in every format; the answer is what docling's own data model takes."""
    from docling.datamodel.service.responses import ConvertDocumentResponse

    data = pdf(2)
    (tmp_path / "report.pdf").write_bytes(data)
    answer = converted(server, data, "/home/somebody/report.pdf", to_formats=list(CONTENTS))
    assert (answer["status"], answer["errors"], answer["document"]["filename"]) == ("success", [], "report.pdf")
    for name, target in {
        "md": "markdown",
        "html": "html",
        "json": "json",
        "text": "text",
        "doctags": "doctags",
    }.items():
        what = Conversion(tmp_path, target, model=str(docling), runtime=F32)  # type: ignore[arg-type]
        text = convert([tmp_path / "report.pdf"], what).written[0].read_text(encoding="utf-8")
        assert answer["document"][CONTENTS[name]] == (json.loads(text) if name == "json" else text)
    read = ConvertDocumentResponse.model_validate(answer)
    assert read.document.json_content is not None
    assert [table.prov[0].page_no for table in read.document.json_content.tables] == [1, 2]


@pytest.mark.parametrize(("name", "data"), [("scan.tiff", tiff(*sheets(3))), ("photo.png", png()), ("a.pdf", pdf())])
def test_open_webui_reads_markdown(server: Server, name: str, data: bytes, tmp_path: Path) -> None:
    """Its loader's request: the path as a name, one field, and no format."""
    path = tmp_path / name
    path.write_bytes(data)
    with path.open("rb") as file:
        answer = requests.post(
            url(server),
            files={"files": (str(path), file, "application/octet-stream")},
            data={"image_export_mode": "placeholder"},
            headers={},
            timeout=PATIENCE_S,
        )
    assert answer.ok
    document = answer.json()["document"]
    assert document.get("md_content").count("## Pump 12") == (3 if name == "scan.tiff" else 1)
    assert document["html_content"] is None and document["json_content"] is None


def test_paperless_gpt_reads_text(server: Server) -> None:
    """Its form, byte for byte as Go's mime/multipart writes it; the file is called document.pdf, whatever it is."""
    boundary = "6a6d7c1a" * 7
    parts = [b'name="files"; filename="document.pdf"\r\nContent-Type: application/octet-stream\r\n\r\n' + png()]
    parts += [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in PAPERLESS_GPT.items()]
    body = b"".join(
        b"%s--%s\r\nContent-Disposition: form-data; %s" % (b"\r\n" if number else b"", boundary.encode(), part)
        for number, part in enumerate(parts)
    )
    body += f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Accept": "application/json"}
    status, _, answer = request(server, "POST", "/v1/convert/file", body, headers)
    told = json.loads(answer)
    assert (status, told["status"], told["errors"]) == (200, "success", [])
    assert "The pressure is 4.2 bar." in (told["document"]["text_content"] or told["document"]["md_content"])
    assert told["ignored"] == ["pipeline", "do_ocr"]


def test_a_source_in_json(server: Server) -> None:
    source = {"kind": "file", "base64_string": base64.b64encode(png()).decode(), "filename": "a.png"}
    body = {
        "sources": [source],
        "options": {"to_formats": ["doctags"], "table_mode": "fast"},
        "target": {"kind": "inbody"},
    }
    status, _, answer = request(server, "POST", "/v1/convert/source", body)
    told = json.loads(answer)
    assert (status, told["status"], told["ignored"]) == (200, "success", ["table_mode"])
    assert told["document"]["doctags_content"] == PAGE + "\n"


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_has_its_line(server: Server, name: str) -> None:
    data, told = BAD[name]
    answer = converted(server, data, name)
    assert answer["status"] == "failure"
    [error] = answer["errors"]
    assert error["component_type"] == "document_backend" and "\n" not in error["error_message"]
    assert any(each in error["error_message"] for each in told.split("|"))
    assert answer["document"] == {"filename": name, **dict.fromkeys(CONTENTS.values())}


def test_a_page_that_cannot_be_read_leaves_the_others(server: Server) -> None:
    first, second, third = sheets(3)
    answer = converted(server, tiff(first, second.convert("F"), third), "a.tiff")
    assert answer["status"] == "partial_success"
    [error] = answer["errors"]
    assert error["page_no"] == 2 and "floating-point pixels" in error["error_message"]
    assert answer["document"]["md_content"].count("## Pump 12") == 2


def test_pages_that_were_cut_are_told(server: Server) -> None:
    answer = converted(server, tiff(*sheets(2)), "a.tiff", max_tokens=3)
    assert answer["status"] == "partial_success"
    assert [each["page_no"] for each in answer["errors"]] == [1, 2]
    assert answer["errors"][0]["error_message"] == "page 1 may be incomplete: max_tokens was reached"


def test_a_poster_of_five_metres(server: Server) -> None:
    with BytesIO() as file:
        page(500, 300).save(file, "PDF", resolution=2.54)
        assert converted(server, file.getvalue())["status"] == "success"


def test_pages_are_chosen_and_counted(server: Server) -> None:
    status, answer = send(server, pdf(6))
    assert (status, answer["error"]["code"]) == (413, "too_many_pages")
    assert answer["detail"] == "the document has 6 pages, more than the limit of 4; choose with page_range"
    chosen = converted(server, pdf(6), page_range=[5, 2**63 - 1])
    assert chosen["document"]["md_content"].count("## Pump 12") == 2
    none = converted(server, pdf(1), page_range=[2, 3])
    assert (none["status"], none["errors"][0]["component_type"]) == ("failure", "user_input")


REFUSED = {
    "to_formats": {"to_formats": ["yaml"]},
    "image_export_mode": {"image_export_mode": "referenced"},
    "do_picture_description": {"do_picture_description": "true"},
    "vlm_pipeline_model": {"vlm_pipeline_model": "granite_docling"},
    "page_range": {"page_range": [3, 1]},
    "model": {"model": "other"},
    "task": {"task": "poem"},
    "surprise": {"surprise": "1"},
}


@pytest.mark.parametrize("param", REFUSED)
def test_what_is_not_honoured_is_refused_by_its_name(server: Server, param: str) -> None:
    status, answer = send(server, png(), "a.png", **REFUSED[param])
    assert status in (400, 404)
    assert answer["error"]["param"] == param
    assert answer["detail"] == answer["error"]["message"]
    assert converted(server, png(), "a.png", do_picture_description="false")["ignored"] == []


def test_one_document_and_no_url(server: Server) -> None:
    two = [("files", ("a.png", png())), ("files", ("b.png", png()))]
    answer = requests.post(url(server), files=two, timeout=PATIENCE_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_documents")
    remote = {"sources": [{"kind": "http", "url": "http://example.com/a.pdf"}]}
    status, _, body = request(server, "POST", "/v1/convert/source", remote)
    assert (status, json.loads(body)["error"]["code"]) == (400, "remote_source_refused")
    broken = {"sources": [{"kind": "file", "base64_string": "%", "filename": "a"}]}
    status, _, body = request(server, "POST", "/v1/convert/source", broken)
    assert (status, json.loads(body)["error"]["param"]) == (400, "sources.0.base64_string")


@pytest.mark.parametrize(
    "body", [b"", b"--x", b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\nabc\r\n--x--']
)
def test_forms_that_are_none(server: Server, body: bytes) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    status, _, answer = request(server, "POST", "/v1/convert/file", body, kind)
    assert status == 400, answer
    cut = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nabc'
    assert request(server, "POST", "/v1/convert/file", cut, kind)[0] == 400
    for headers in ({"Content-Type": "multipart/form-data"}, {"Content-Type": "application/json"}):
        status, _, answer = request(server, "POST", "/v1/convert/file", body, headers)
        assert status == (415 if "json" in headers["Content-Type"] else 400)
    assert request(server, "POST", "/v1/convert/source", body, kind)[0] == 415


def test_figures_are_in_the_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cropped from the page, which is rasterized once more; a mark stands in their place unless they are asked for."""
    figure = PAGE.replace("<otsl>", "<picture><loc_10><loc_10><loc_400><loc_400></picture><otsl>")
    import edgevlm.server.convert as module

    real = module.PageText
    monkeypatch.setattr(module, "PageText", lambda number, _, size: real(number, figure, size))
    marked = converted(server, pdf(), to_formats="md")["document"]["md_content"]
    assert "<!-- image -->" in marked and "base64" not in marked
    whole = converted(server, pdf(), to_formats="md", image_export_mode="embedded")["document"]["md_content"]
    data = base64.b64decode(whole.partition("data:image/png;base64,")[2].partition(")")[0])
    assert Image.open(BytesIO(data)).size == (133, 172)


def test_nothing_is_written_to_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))  # whoever writes there fails
    padded = pdf() + b"%" * (4 * 2**20)
    assert converted(server, padded)["status"] == "success"


@pytest.mark.parametrize(("library", "name"), [("pypdfium2", "a.pdf"), ("docling_core", "a.png")])
def test_what_is_not_installed(server: Server, library: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    status, answer = send(server, pdf() if name == "a.pdf" else png(), name)
    assert (status, answer["error"]["code"]) == (501, "not_installed")
    assert library in answer["detail"] and "pip install 'edgevlm[convert]'" in answer["detail"]


def test_a_pdf_that_takes_too_long_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_process, "SECONDS", 0.01)
    answer = converted(server, pdf())
    assert answer["status"] == "failure" and "takes more than 0.01 s" in answer["errors"][0]["error_message"]
    wait_until(lambda: not page_processes())


def page_processes(busy_s: float = 0.0) -> list[int]:
    """Return the processes that open PDFs, and have been at it for so many seconds of CPU time."""
    found = []
    for each in psutil.Process().children():
        with suppress(psutil.Error):  # it has just ended
            if page_process.__name__ in each.cmdline() and each.cpu_times().user >= busy_s:
                found.append(each.pid)
    return found


def test_a_pdf_that_needs_too_much_memory_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the process that opens it, here memory, ends nothing else."""
    monkeypatch.setattr(page_process, "__name__", "os.abort()")
    answer = converted(server, pdf())
    assert answer["status"] == "failure" and "too much memory or is damaged" in answer["errors"][0]["error_message"]


def test_its_key_and_host(model: VLM) -> None:
    keys = ("a" * 20, "b" * 20)
    with serving(model, api_keys=keys) as server:
        files = {"files": ("a.png", png())}
        for headers, status in {
            "": 401,
            "X-Api-Key: wrong": 401,
            f"X-Api-Key: {keys[1]}": 200,
            f"Authorization: Bearer {keys[0]}": 200,
            f"Authorization: Bearer wrong\nX-Api-Key: {keys[0]}": 401,
        }.items():
            sent = dict(line.split(": ") for line in headers.splitlines())
            answer = requests.post(url(server), files=files, data={}, headers=sent, timeout=PATIENCE_S)
            assert answer.status_code == status, headers
        for header in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
            answer = requests.post(
                url(server), files=files, headers={"X-Api-Key": keys[0], **header}, timeout=PATIENCE_S
            )
            assert answer.status_code == 403


def test_a_document_larger_than_the_body_limit(model: VLM) -> None:
    with serving(model, max_body_bytes=2**16) as server:
        status, answer = send(server, b"%PDF-" + b"0" * 2**17)
        assert (status, answer["error"]["code"]) == (413, "body_too_large")


class _HeldLater(Braked):
    """Holds every page but the first."""

    def steps(self, *request: Any) -> Any:
        self.stop_at = 3 if self.tokens else -1
        return super().steps(*request)


def test_the_time_limit(model: VLM) -> None:
    """Pages that were read by then are in the answer; with none it is an error."""
    held = _HeldLater(model)
    with serving(held, max_running=1) as server:  # type: ignore[arg-type]
        answer = converted(server, tiff(*sheets(3)), "a.tiff", document_timeout=4)
        assert answer["status"] == "partial_success"
        assert answer["document"]["md_content"].count("## Pump 12") == 1
        [error] = answer["errors"]
        assert error["category"] == "timeout" and "the time limit of 4 s was reached" in error["error_message"]
        status, answer = send(server, png(), "a.png", document_timeout=0.1)
        assert (status, answer["error"]["code"]) == (504, "time_limit")
        held.release()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning")
def test_docling_service_client_converts_a_document(model: VLM) -> None:
    """The real client: it begins a task, asks how far it is, and rebuilds docling's result from the answer."""
    pytest.importorskip("websockets", reason="docling's client needs it")
    from docling.datamodel.service.options import ConvertDocumentsOptions
    from docling.service_client import ConversionError, DoclingServiceClient, ServiceError
    from docling_core.types.io import DocumentStream

    key = "a" * 20
    with serving(model, api_keys=(key,)) as server, DoclingServiceClient(url(server, ""), key) as client:

        def read(data: bytes, **options: Any) -> Any:
            return client.convert(
                DocumentStream(name="report.pdf", stream=BytesIO(data)), options=ConvertDocumentsOptions(**options)
            )

        result = read(pdf(2), do_ocr=False)
        assert result.status.value == "success"
        assert result.document.export_to_markdown().count("## Pump 12") == 2
        with pytest.raises(ConversionError, match="cannot be read as a PDF"):
            read(BAD["damaged.pdf"][0])
        with pytest.raises(ServiceError) as refused:
            read(pdf(), do_picture_description=True)
        assert "do_picture_description: is not made here" in str(refused.value.detail)


def test_a_task_is_its_callers_alone(model: VLM) -> None:
    keys = ("a" * 20, "b" * 20)
    with serving(model, api_keys=keys, max_pages=1) as server:
        own, other = ({"X-Api-Key": key} for key in keys)

        def begin(data: bytes) -> str:
            path = url(server, "/v1/convert/file/async")
            answer = requests.post(path, files={"files": ("a.tiff", data)}, headers=own, timeout=PATIENCE_S)
            assert (answer.status_code, answer.json()["task_status"]) == (200, "started")
            return str(answer.json()["task_id"])

        def get(path: str, headers: dict[str, str] = own) -> tuple[int, Any]:
            status, _, body = request(server, "GET", path, headers=headers)
            return status, json.loads(body)

        task = begin(png())
        assert get(f"/v1/status/poll/{task}?wait=20")[1]["task_status"] == "success"
        assert get(f"/v1/result/{task}")[1]["document"]["md_content"].startswith("## Pump 12")
        for path in (f"/v1/status/poll/{task}", f"/v1/result/{task}"):
            status, answer = get(path, other)
            assert (status, answer["detail"], answer["error"]["code"]) == (404, "Task not found.", "task_not_found")
        failed = begin(tiff(*sheets(2)))
        status, answer = get(f"/v1/status/poll/{failed}?wait=20")
        assert (status, answer["task_status"]) == (200, "failure")
        assert answer["error_message"] == "the document has 2 pages, more than the limit of 1; choose with page_range"
        assert get(f"/v1/result/{failed}")[0] == 404
        assert get(f"/v1/status/poll/{failed}?wait=nan")[0] == 200
        for _ in range(16):
            get(f"/v1/status/poll/{begin(b'')}?wait=20")
        assert get(f"/v1/result/{task}")[0] == 404  # forgotten


def test_callers_take_turns_between_pages(model: VLM) -> None:
    keys = ("a" * 20, "b" * 20)
    braked = Braked(model)
    with serving(braked, api_keys=keys, max_queue=1, max_running=1) as server:  # type: ignore[arg-type]
        answers: dict[str, Any] = {}

        def convert_pages() -> None:
            files = {"files": ("a.tiff", tiff(*sheets(3)))}
            headers = {"X-Api-Key": keys[0]}
            answers["a"] = requests.post(url(server), files=files, headers=headers, timeout=PATIENCE_S).json()

        def chat() -> None:
            answers["b"] = ask(server, {"Authorization": f"Bearer {keys[1]}"}, messages=shown(), max_tokens=1)

        threads = [threading.Thread(target=convert_pages)]
        threads[0].start()
        wait_until(lambda: braked.holding)
        threads.append(threading.Thread(target=chat))
        threads[1].start()
        wait_until(lambda: server.worker.waiting == 1)
        assert ask(server, {"Authorization": f"Bearer {keys[1]}"})[0] == 503  # the queue is full
        braked.release()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert answers["a"]["status"] == "success" and answers["b"][0] == 200
        assert braked.callers[:2] == ["key-0", "key-1"] and braked.callers.count("key-0") == 3


def test_a_document_keeps_its_place_between_two_pages(model: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, go, answers = threading.Event(), threading.Event(), dict[str, Any]()

    async def slow(data: bytes, name: str, number: int) -> Any:
        if number == 2:
            opened.set()
            while not go.is_set():
                await asyncio.sleep(0.01)
        return await page_process.rasterize(data, name, number)

    monkeypatch.setattr("edgevlm.server.convert.rasterize", slow)
    held = _HeldLater(model)
    with serving(held, max_queue=1, max_running=1) as server:  # type: ignore[arg-type]
        threads = [threading.Thread(target=lambda: answers.update(a=send(server, pdf(2))))]
        threads[0].start()
        assert opened.wait(PATIENCE_S)
        threads.append(threading.Thread(target=lambda: answers.update(b=ask(server, messages=shown()))))
        threads[1].start()
        wait_until(lambda: held.holding)  # the document has one place, and this the other
        assert ask(server)[0] == 503
        go.set()
        wait_until(lambda: server.worker.waiting == 1)
        held.release()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert [status for status, _ in answers.values()] == [200, 200]
        assert answers["a"][1]["status"] == "success"


def test_a_client_that_hangs_up_ends_its_document(model: VLM) -> None:
    braked = Braked(model)
    with serving(braked, max_running=1) as server:  # type: ignore[arg-type]
        body = (
            b"--x\r\nContent-Disposition: form-data; name=files; filename=a\r\n\r\n"
            + tiff(*sheets(3))
            + b"\r\n--x--\r\n"
        )
        connection = http.client.HTTPConnection(*server.socket.getsockname()[:2], timeout=PATIENCE_S)
        connection.request("POST", "/v1/convert/file", body, {"Content-Type": "multipart/form-data; boundary=x"})
        wait_until(lambda: braked.holding)
        connection.close()
        [job] = server.worker.current
        wait_until(job.abandoned.is_set)
        braked.release()
        wait_until(lambda: not server.worker.held)
        assert ask(server, messages=shown(), max_tokens=1)[0] == 200
        assert len(braked.tokens) == 2  # one page of three, and the question


def endless_pdf() -> bytes:
    """Return a PDF of 200 KB on whose page PDFium draws for a minute."""
    drawn = zlib.compress(b"0 0 m 500 500 l 0 500 500 0 250 250 c S " * 2_000_000)
    sheet = b"<</Type /Page /Parent 2 0 R /MediaBox [0 0 500 500] /Contents 4 0 R>>"
    objects = [
        b"<</Type /Catalog /Pages 2 0 R>>",
        b"<</Type /Pages /Kids [3 0 R] /Count 1>>",
        sheet,
        b"<</Filter /FlateDecode /Length %d>> stream\n%b\nendstream" % (len(drawn), drawn),
    ]
    body = b"".join(b"%d 0 obj %b endobj\n" % each for each in enumerate(objects, 1))
    return b"%%PDF-1.4\n%btrailer <</Root 1 0 R>>\n" % body


def test_a_client_that_hangs_up_ends_the_process_that_opens_its_pdf(server: Server) -> None:
    data = endless_pdf()
    body = b"--x\r\nContent-Disposition: form-data; name=files; filename=a\r\n\r\n" + data + b"\r\n--x--\r\n"
    connection = http.client.HTTPConnection(*server.socket.getsockname()[:2], timeout=PATIENCE_S)
    connection.request("POST", "/v1/convert/file", body, {"Content-Type": "multipart/form-data; boundary=x"})
    wait_until(lambda: page_processes(busy_s=1.0))  # it draws
    assert ask(server, max_tokens=1)[0] == 200  # others are answered meanwhile
    connection.close()
    wait_until(lambda: not page_processes())


def test_a_model_of_markdown(vlm: VLM) -> None:
    """Its words as they are; docling's clients want a DoclingDocument all the same."""
    from docling_core.types.doc.document import DoclingDocument

    with serving(vlm) as server:
        answer = converted(server, png(), "a.png", to_formats="md;json,html", max_tokens=6, prompt="Read this.")
        document = DoclingDocument.model_validate(answer["document"]["json_content"])
        [text] = document.texts
        assert text.text == answer["document"]["md_content"].strip() and text.prov[0].page_no == 1
        assert answer["document"]["html_content"].startswith("<!DOCTYPE html>")
        status, refused = send(server, png(), "a.png", to_formats="doctags")
        assert (status, refused["error"]["param"]) == (400, "to_formats")
        assert "this model writes Markdown, not DocTags" in refused["detail"]


def test_fields_of_a_page_as_json(server: Server) -> None:
    """OpenAI's client: `response_format` holds for a page as for any picture, also with a model of DocTags."""
    from openai import OpenAI

    schema = {
        "type": "object",
        "properties": {"pressure": {"type": "integer", "minimum": 0, "maximum": 9}, "unit": {"enum": ["bar", "psi"]}},
        "required": ["pressure", "unit"],
        "additionalProperties": False,
    }
    with OpenAI(base_url=url(server, "/v1"), api_key="none") as client:
        sheet = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
        made = client.chat.completions.create(
            model="tiny-docling",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": sheet}},
                        {"type": "text", "text": "Read the gauge."},
                    ],
                }
            ],
            response_format={"type": "json_schema", "json_schema": {"name": "gauge", "schema": schema, "strict": True}},
        )
    read = json.loads(made.choices[0].message.content or "")
    assert set(read) == {"pressure", "unit"} and read["unit"] in ("bar", "psi")


def test_openapi_has_the_form(server: Server) -> None:
    document = json.loads(request(server, "GET", "/openapi.json")[2])
    form = document["paths"]["/v1/convert/file"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"files", "to_formats", "page_range", "model"} <= set(form["properties"])
