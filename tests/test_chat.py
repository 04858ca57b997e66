"""`edgevlm chat`, line by line."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgevlm import VLM
from edgevlm.cli.main import main
from tests.conftest import F32

OPTIONS = ["--max-new-tokens", "8", "--inference-precision", "f32"]


def chat(model: Path, *lines: str, arguments: tuple[str, ...] = ()) -> Result:
    """Run the command with `lines` on stdin."""
    text = "".join(f"{line}\n" for line in lines)
    return CliRunner().invoke(main, ["chat", *arguments, "-m", str(model), *OPTIONS], input=text)


@pytest.fixture(scope="module")
def answers(exported: Path, china: Path) -> list[str]:
    """What the API answers in the same conversation."""
    from edgevlm import GenerationConfig

    talk = VLM(exported, F32).chat(GenerationConfig(max_new_tokens=8))
    return [talk.ask("What is this?", china).text, talk.ask("And this?").text]


def test_questions_in_answers_out(exported: Path, china: Path, answers: list[str]) -> None:
    result = chat(exported, "What is this?", "", "And this?", arguments=(str(china),))
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(f"{answer}\n" for answer in answers)


def test_a_picture_may_come_later(exported: Path, china: Path, answers: list[str], tmp_path: Path) -> None:
    spaced = tmp_path / "my picture.png"
    spaced.write_bytes(china.read_bytes())
    result = chat(exported, f'/image "{spaced}"', "What is this?", "/history", "/exit", "never asked")
    assert result.stdout == f"{answers[0]}\n> What is this? [1 picture]\n{answers[0]}\n"


def test_reset_begins_anew(exported: Path, china: Path, answers: list[str]) -> None:
    lines = ("Something else.", "/reset", f"/image {china}", "What is this?")
    assert chat(exported, *lines).stdout.endswith(f"{answers[0]}\n")


def test_commands_answer_on_stderr_and_mistakes_do_not_end_the_talk(exported: Path) -> None:
    result = chat(exported, "/nonesuch", "/image", "/image nonesuch.png", "/stats", "Hello.", "/stats", "/help")
    assert result.exit_code == 0
    told = result.stderr
    assert "no command /nonesuch; /help lists them" in told
    assert "which file? /image FILE" in told
    assert "Error: no such image file: nonesuch.png" in told
    assert "timings are on" in told
    assert "TTFT" in told
    assert "timings are off" in told
    assert "/image FILE..." in result.stdout


def test_a_bad_picture_is_told_before_the_model_is_loaded(exported: Path) -> None:
    result = chat(exported, "What is this?", arguments=("nonesuch.png",))
    assert result.exit_code == 1
    assert result.stderr == "Error: no such image file: nonesuch.png\n"
