"""Where models and compiled models are: XDG folders through platformdirs, `EDGEVLM_HOME` above them, and the package.

The package brings one model of its own, `panel`, which answers when none is named.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from edgevlm.errors import ModelNotFoundError

MANIFEST = "edgevlm.json"
DEFAULT_MODEL = "panel"
DEFAULT_NOTICE = (
    "panel answers: the small bundled model, for lights, switches, gauges, shapes, counts, displays, labels and charts;"
    " it learned from drawings alone. For other pictures: edgevlm export HuggingFaceTB/SmolVLM-256M-Instruct, then"
    " name it with -m."
)
_BUNDLED = Path(__file__).parent / "models"


def models_dir() -> Path:
    """Return the folder that holds exported models by short name."""
    home = os.environ.get("EDGEVLM_HOME")
    return (Path(home) if home else platformdirs.user_data_path("edgevlm", appauthor=False)) / "models"


def cache_dir() -> Path:
    """Return the folder for what can be made again."""
    home = os.environ.get("EDGEVLM_HOME")
    return Path(home) / "cache" if home else platformdirs.user_cache_path("edgevlm", appauthor=False)


def list_models() -> list[Path]:
    """Return the exported folders that have a short name: the bundled ones, then the user's, which go first by name."""
    found = {path.parent.name: path.parent for folder in (_BUNDLED, models_dir()) for path in _exports(folder)}
    return [found[name] for name in sorted(found)]


def _exports(folder: Path) -> list[Path]:
    """Return the manifests one level below `folder`; unfinished exports are hidden."""
    return [path for path in folder.glob(f"*/{MANIFEST}") if not path.parent.name.startswith(".")]


def is_there(path: Path) -> bool:
    """Tell whether there is a file or folder; there is none under a name that is too long for one."""
    try:
        return path.exists()
    except OSError:
        return False


def find_model(name: str | os.PathLike[str] | None) -> Path:
    """Return the exported folder that `name` means: a folder, a short name, or, for None, the bundled model.

    Raises `ModelNotFoundError`.
    """
    if name is None:
        return default_model()
    for folder in (Path(name), models_dir() / name, _BUNDLED / name):
        if is_there(folder) and folder.is_dir():
            return folder
    if is_there(Path(name)):
        raise ModelNotFoundError(f"{name} is a file; a model is the folder that `edgevlm export` writes")
    raise ModelNotFoundError(
        f"no model {str(name)!r}: not a folder here and not under {models_dir()}; `edgevlm models` lists what is there"
    )


def default_model() -> Path:
    """Return the folder of the bundled model. Raises `ModelNotFoundError`."""
    folder = _BUNDLED / DEFAULT_MODEL
    if not is_there(folder):
        raise ModelNotFoundError(f"{folder}, the bundled model, is missing; name another with -m, or reinstall edgevlm")
    return folder
