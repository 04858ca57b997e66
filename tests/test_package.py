"""What is in the wheel, what an import brings along, and what is public."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import edgevlm
import edgevlm.errors
from edgevlm import families
from edgevlm_export import families as exporters
from tests.helpers.network import NETWORK_CLIENTS

ROOT = Path(__file__).parents[1]
EXPORTER_ONLY = {"torch", "transformers", "optimum", "nncf", "onnx", "onnxruntime"}
SERVER_ONLY = {"fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "opentelemetry"}
HEAVY = EXPORTER_ONLY | SERVER_ONLY | {"numpy", "openvino", "PIL", "rich", "click", "tokenizers", "jinja2"}

MODULES_AFTER_IMPORT = """
import edgevlm, json, sys
print(json.dumps(sorted(sys.modules)))
"""
MODULES_AFTER_ANSWER = """
import json, socket, sys

WATCHED = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "subprocess.Popen", "os.fork")
attempts = []

def refuse(event, args):
    if event in WATCHED:
        attempts.append([event, repr(args)])
        raise OSError("no network in this test")

sys.addaudithook(refuse)
from edgevlm import VLM, GenerationConfig, RuntimeConfig

vlm = VLM(sys.argv[1], RuntimeConfig(device="CPU", cache=False))
answer = vlm.generate(sys.argv[2], "What is in this picture?", GenerationConfig(max_new_tokens=4))
loaded = sorted(name for name, module in sys.modules.items() if module is not None)
found = {"modules": loaded, "attempts": list(attempts), "tokens": answer.generated_tokens}
try:
    socket.create_connection(("127.0.0.1", 9))  # the watch itself works
except OSError as error:
    found["watch"] = str(error)
print(json.dumps(found))
"""


EXPORT_WITHOUT_TORCH = """
import json, sys

for name in ("torch", "transformers", "optimum", "onnx", "onnxruntime"):
    sys.modules[name] = None  # importing it fails, as where it is not installed
from pathlib import Path
from edgevlm_export import ExportOptions, export

if __name__ == "__main__":
    report = export(sys.argv[1], Path(sys.argv[2]), ExportOptions("int4"))
    loaded = sorted(name for name, module in sys.modules.items() if module is not None)
    print(json.dumps({"modules": loaded, **report.to_dict()}))
"""


def run_python(code: str, *arguments: str) -> object:
    """Run `code` in a fresh interpreter, away from the tree, and return the JSON that it prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=Path(sys.prefix), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def top_level(modules: list[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def test_importing_the_package_brings_no_library_along() -> None:
    modules = run_python(MODULES_AFTER_IMPORT)
    assert "edgevlm" in modules
    assert not top_level(modules) & HEAVY


def test_an_answer_needs_neither_the_exporter_nor_the_network(exported: Path, china: Path) -> None:
    found = run_python(MODULES_AFTER_ANSWER, str(exported), str(china))
    assert found["tokens"] == 4
    assert {"openvino", "numpy", "PIL", "tokenizers", "jinja2"} <= top_level(found["modules"])
    unneeded = EXPORTER_ONLY | SERVER_ONLY | NETWORK_CLIENTS | {"openvino_telemetry", "edgevlm_export"}
    assert not top_level(found["modules"]) & unneeded
    assert (found["attempts"], found["watch"]) == ([], "no network in this test")


def test_an_int4_export_needs_no_torch(idefics3: Path, china: Path, tmp_path: Path) -> None:
    found = run_python(EXPORT_WITHOUT_TORCH, str(idefics3), str(tmp_path / "out"))
    assert not top_level(found["modules"]) & {"torch", "transformers", "optimum", "onnx", "onnxruntime"}
    assert "nncf" in top_level(found["modules"])
    assert found["verification"]["parts"]["language"]["cosine"] > 0.9
    answer = edgevlm.VLM(tmp_path / "out").generate(china, "What is in this picture?")
    assert answer.generated_tokens > 0


def test_every_public_name_is_there_and_documented() -> None:
    for name in edgevlm.__all__:
        assert getattr(edgevlm, name).__doc__, name
        assert not getattr(edgevlm, name).__doc__.startswith(f"{name}("), name  # what a dataclass makes up
    assert dir(edgevlm) == sorted(edgevlm.__all__)


def test_every_error_that_is_defined_is_public() -> None:
    defined = {name for name, each in vars(edgevlm.errors).items() if isinstance(each, type)}
    assert {name for name in defined if name.endswith("Error")} == {
        name for name in edgevlm.__all__ if name.endswith("Error")
    }


def test_the_python_reference_shows_what_is_public_and_nothing_else() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: edgevlm\.(\w+)$", page, re.MULTILINE))
    assert shown == {name for name in edgevlm.__all__ if not name.endswith("Error")} | {"errors"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'edgevlm' has no attribute 'nonesuch'"):
        getattr(edgevlm, "nonesuch")  # noqa: B009


@pytest.mark.parametrize("name", [name for name in edgevlm.__all__ if name.endswith("Error")])
def test_every_error_has_the_one_base(name: str) -> None:
    assert issubclass(getattr(edgevlm, name), edgevlm.EdgeVLMError)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a clean copy of the tree."""
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist", ".*")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
        elif path.name in {"edgevlm", "export", "tests", "benchmarks", "training", "docs"}:
            shutil.copytree(path, tree / path.name, ignore=ignored)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def modules_of_tree() -> set[str]:
    runtime = {path.relative_to(ROOT).as_posix() for path in (ROOT / "edgevlm").rglob("*.py")}
    return runtime | {path.relative_to(ROOT / "export").as_posix() for path in (ROOT / "export").rglob("*.py")}


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    info = f"edgevlm-{edgevlm.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"edgevlm", "edgevlm_export", info}
    assert {name for name in names if name.endswith(".py")} == modules_of_tree()
    assert {"edgevlm/py.typed", "edgevlm_export/py.typed"} <= names


def test_the_wheel_holds_the_calibration_set(wheel: zipfile.ZipFile) -> None:
    folder = "edgevlm_export/calibration/"
    packed = {name.removeprefix(folder) for name in wheel.namelist() if name.startswith(folder)}
    assert packed == {path.name for path in (ROOT / "export" / folder).iterdir() if path.is_file()}
    assert "calibration.jsonl" in packed


def test_the_wheel_holds_the_page_the_unit_and_the_questions(wheel: zipfile.ZipFile) -> None:
    files = {"edgevlm/server/page.html", "edgevlm/server/edgevlm.service", "edgevlm/evals/suites/real.jsonl"}
    assert files <= set(wheel.namelist())


def test_the_wheel_holds_the_default_model_in_twelve_megabytes(wheel: zipfile.ZipFile) -> None:
    folder = "edgevlm/models/panel/"
    packed = [info for info in wheel.infolist() if info.filename.startswith(folder)]
    names = {info.filename.removeprefix(folder) for info in packed}
    assert names == {path.name for path in (ROOT / folder).iterdir()}
    assert {"edgevlm.json", "openvino_language_model.bin", "tokenizer.json", "README.md"} <= names
    assert sum(info.compress_size for info in packed) <= 12e6


def test_only_the_export_extra_requires_the_exporter_s_libraries(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(f"edgevlm-{edgevlm.__version__}.dist-info/METADATA").decode()
    required = Parser().parsestr(text).get_all("Requires-Dist", [])
    runtime, extras = (
        {re.split(r"[^\w.-]", line)[0] for line in required if ("extra ==" in line) == extra} for extra in (False, True)
    )
    assert {"openvino", "numpy", "pillow", "tokenizers", "jinja2", "click"} <= runtime
    assert not runtime & {"fastapi", "uvicorn", "prometheus-client"}
    assert {"fastapi", "uvicorn", "prometheus-client"} <= extras
    assert not runtime & {"torch", "transformers", "optimum", "optimum-intel", "nncf", "onnx", "onnxruntime"}
    assert {"torch", "transformers", "optimum-intel", "nncf"} <= extras


def test_the_export_extra_has_no_torch(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(f"edgevlm-{edgevlm.__version__}.dist-info/METADATA").decode()
    lines = Parser().parsestr(text).get_all("Requires-Dist", [])
    needed = {re.split(r"[^\w.-]", line)[0] for line in lines if re.search(r"extra == [\"']export[\"']", line)}
    assert needed == {"huggingface-hub", "nncf", "safetensors"}


def test_the_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    entry_points = wheel.read(f"edgevlm-{edgevlm.__version__}.dist-info/entry_points.txt").decode()
    assert "edgevlm = edgevlm.cli.main:main" in entry_points


def test_the_readme_s_table_of_families_is_the_code_s() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| family | `model_type` |") :].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    routes = {name: row[2:] for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    assert routes.keys() == families.FAMILIES.keys() == exporters.FAMILIES.keys()
    for name, family in exporters.FAMILIES.items():
        native, optimum, onnx = (cell != "no" for cell in routes[name])
        assert (native, optimum, onnx) == (True, family.encode_in_torch is not None, family.covers_onnx)
