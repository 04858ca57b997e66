"""What README and docs say is what the commands do."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from edgevlm.families.base import DETAILS
from edgevlm.runtime.config import KV_CACHE_PRECISIONS, KV_CACHES, PRECISIONS, VISION_ARITHMETICS
from tests.helpers.command import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "structured-output.md"]


def consoles() -> list[tuple[str, str]]:
    """Return the commands of all console blocks that are about the pictures in examples/, each with its output."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for part in re.split(r"(?m)^\$ ", block)[1:]:
                command, _, output = part.partition("\n")
                if "examples/" in command:
                    found.append((command, output))
    return found


@pytest.mark.parametrize(("command", "output"), consoles())
def test_a_command_of_the_docs_prints_what_they_show(
    command: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    name, *arguments = shlex.split(command)
    assert name == "edgevlm"
    shown = cli(*arguments).stdout
    # A probability may differ in its last digits between CPUs.
    assert re.sub(r"[\d.]+%", "%", shown) == re.sub(r"[\d.]+%", "%", output)


def test_there_are_such_commands() -> None:
    assert len(consoles()) >= 5


def test_the_reference_of_the_command_line_is_what_help_prints() -> None:
    page = ROOT / "docs" / "cli.md"
    made = runpy.run_path(str(page.with_name("cli_reference.py")))["reference"]()
    assert page.read_text(encoding="utf-8") == made, "run python docs/cli_reference.py"


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("--detail", DETAILS),
        ("--inference-precision", PRECISIONS),
        ("--vision-arithmetic", VISION_ARITHMETICS),
        ("--kv-cache", KV_CACHES),
        ("--kv-cache-precision", KV_CACHE_PRECISIONS),
    ],
)
def test_the_choices_of_an_option_are_those_of_the_api(option: str, choices: tuple[str, ...]) -> None:
    shown = re.search(rf"{option} \[(.*?)\]", cli("run", "--help").stdout)
    assert shown is not None
    assert set(shown[1].split("|")) == set(choices)


def test_every_page_is_linked_and_every_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)|src=\"([^\"]+)\"", text):
            path = target[0] or target[1]
            assert path.startswith("http") or (page.parent / path).exists(), (page.name, path)
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in navigation
