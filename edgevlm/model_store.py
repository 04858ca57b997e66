"""Where models and compiled models lie: XDG folders through platformdirs, or `EDGEVLM_HOME`, and the package.

The package brings one model of its own, `panel`, which answers when none is named.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from edgevlm.errors import ModelError, ModelNotFoundError

MANIFEST = "edgevlm.json"
DEFAULT_MODEL = "panel"
DEFAULT_NOTICE = "panel answers, the bundled model for drawings of instruments; for other pictures: edgevlm export"
_BUNDLED = Path(__file__).parent / "models"


def models_dir() -> Path:
    """Return the folder that holds exported models by short name."""
    home = os.environ.get("EDGEVLM_HOME")
    return (Path(home) if home else platformdirs.user_data_path("edgevlm", appauthor=False)) / "models"


def cache_dir() -> Path:
    """Return the cache folder."""
    home = os.environ.get("EDGEVLM_HOME")
    return Path(home) / "cache" if home else platformdirs.user_cache_path("edgevlm", appauthor=False)


def list_models() -> list[Path]:
    """Return the exported folders that have a short name: the bundled ones, then the user's, which go first by name.

    Raises `ModelError` where the models folder cannot be read.
    """
    found = {path.parent.name: path.parent for folder in (_BUNDLED, models_dir()) for path in _exports(folder)}
    return [found[name] for name in sorted(found)]


def _exports(folder: Path) -> list[Path]:
    """Return the manifests one level below `folder`; unfinished exports are hidden."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ModelError(f"the models folder {folder} cannot be read: {error.strerror or error}") from None
    paths = [folder / name / MANIFEST for name in names if not name.startswith(".")]
    return [path for path in paths if is_there(path) or is_barred(path)]


def is_there(path: Path) -> bool:
    """Tell whether a file or folder can be seen; none is under a name that is too long for one."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def is_barred(path: Path) -> bool:
    """Tell whether the system keeps from us if there is a file or folder."""
    try:
        path.stat()
    except PermissionError:
        return True
    except (OSError, ValueError):
        pass
    return False


def find_model(name: str | os.PathLike[str] | None) -> Path:
    """Return the exported folder that `name` means: a folder, a short name, or, for None, the bundled model.

    Raises `ModelNotFoundError`, and `ModelError` for one that may not be read.
    """
    if name is None:
        return default_model()
    places = (Path(name), models_dir() / name, _BUNDLED / name)
    for folder in places:
        if is_there(folder) and folder.is_dir():
            return folder
    if barred := [folder for folder in places if is_barred(folder)]:
        raise ModelError(f"{barred[0]} cannot be read: permission denied")
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
