"""Where edgevlm keeps models and compiled models: XDG folders through platformdirs, `EDGEVLM_HOME` above them."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from edgevlm.errors import ModelNotFoundError

MANIFEST = "edgevlm.json"


def models_dir() -> Path:
    """Return the folder that holds exported models by short name."""
    home = os.environ.get("EDGEVLM_HOME")
    return (Path(home) if home else platformdirs.user_data_path("edgevlm", appauthor=False)) / "models"


def cache_dir() -> Path:
    """Return the folder for what can be made again."""
    home = os.environ.get("EDGEVLM_HOME")
    return Path(home) / "cache" if home else platformdirs.user_cache_path("edgevlm", appauthor=False)


def list_models() -> list[Path]:
    """Return the exported folders in the models folder, by name; unfinished ones are hidden."""
    folder = models_dir()
    if not folder.is_dir():
        return []
    return sorted(path.parent for path in folder.glob(f"*/{MANIFEST}") if not path.parent.name.startswith("."))


def is_there(path: Path) -> bool:
    """Tell whether there is a file or folder; there is none under a name that is too long for one."""
    try:
        return path.exists()
    except OSError:
        return False


def find_model(name: str | os.PathLike[str] | None) -> Path:
    """Return the exported folder that `name` means: a folder, a short name, or, for None, the only model there is.

    Raises `ModelNotFoundError`.
    """
    if name is None:
        return _only_model()
    for folder in (Path(name), models_dir() / name):
        if is_there(folder) and folder.is_dir():
            return folder
    if is_there(Path(name)):
        raise ModelNotFoundError(f"{name} is a file; a model is the folder that `edgevlm export` writes")
    raise ModelNotFoundError(
        f"no model {str(name)!r}: not a folder here and not under {models_dir()}; `edgevlm models` lists what is there"
    )


def _only_model() -> Path:
    models = list_models()
    if len(models) == 1:
        return models[0]
    if not models:
        raise ModelNotFoundError("no model has been exported yet; make one with `edgevlm export SOURCE --int4`")
    names = ", ".join(path.name for path in models)
    raise ModelNotFoundError(f"several models are there, name one with -m: {names}")
