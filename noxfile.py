"""The checks that CI runs, each in the environment that it needs: `nox`, or one of them with `nox -s NAME`."""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
TESTS = Path(__file__).parent / "tests"
PARALLEL = ["-n", "auto", "--dist", "loadfile"]
"""A process for each core; a file's tests share what they export."""


@nox.session
def tests(session: nox.Session) -> None:
    """Style, types, imports and tests, beside the reference: transformers 5."""
    session.install("--quiet", "-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports", "--no-cache")
    session.run("python", "-m", "pytest", *(session.posargs or PARALLEL))


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, in build/site: every link and anchor leads somewhere."""
    session.install("--quiet", "-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", "--quiet", "--site-dir", "build/site", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False)
def video(session: nox.Session) -> None:
    """Videos, beside transformers' video processors, which need torchvision: gigabytes, so only when asked for."""
    session.install("--quiet", "-e", ".[dev]", "num2words", "torchvision==0.28.0")
    session.run("python", "-m", "pytest", str(TESTS / "test_video.py"), *session.posargs)


@nox.session
def inspect(session: nox.Session) -> None:
    """Inspect AI's provider; Inspect brings another fsspec along, so that it stands in no extra but its own."""
    session.install("--quiet", "-e", ".[dev,inspect]")
    session.run("python", "-m", "pytest", str(TESTS / "test_inspect.py"), *session.posargs)


@nox.session
def optimum(session: nox.Session) -> None:
    """What goes through optimum-intel, which needs transformers 4."""
    session.install("--quiet", "-e", ".[export-torch]", "pytest>=8.4,<10", "scikit-learn>=1.7,<2")
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "pytest.mark.optimum" in path.read_text("utf-8")]
    session.run("python", "-m", "pytest", "-m", "optimum", *files, *session.posargs)


@nox.session(default=False)
def sbom(session: nox.Session) -> None:
    """What a target has installed, with versions and licences, in CycloneDX's form: build/sbom.json."""
    session.install("--quiet", "cyclonedx-bom>=7,<8")
    target = Path(session.create_tmp()) / "target"
    session.run("python", "-m", "venv", "--clear", str(target))
    session.run("python", "-m", "pip", "--python", str(target), "install", "--quiet", ".[serve,video,watch]")
    output = Path("build", "sbom.json")
    output.parent.mkdir(exist_ok=True)
    session.run(
        "cyclonedx-py", "environment", "--pyproject", "pyproject.toml", "--of", "JSON", "-o", str(output), str(target)
    )
