"""What the server is allowed to do, and where its bounds are."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from ipaddress import ip_address
from math import inf
from pathlib import Path

from edgevlm.errors import OptionError

SHORTEST_KEY = 16
ANY_ORIGIN = "*"
_POSITIVE = (
    "max_loaded_models",
    "max_body_bytes",
    "max_images",
    "max_pixels",
    "max_pages",
    "max_prompt_chars",
    "max_schema_chars",
    "max_queue",
    "max_running",
    "max_tokens",
    "time_limit_s",
    "body_timeout_s",
    "stop_timeout_s",
)


@dataclass(frozen=True)
class ServeConfig:
    """Where the server listens, whom it lets in, and its bounds. Raises `OptionError`."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free port."""
    api_keys: tuple[str, ...] = ()
    """A caller must send one of them as `Authorization: Bearer KEY`; none asks for no key."""
    allow_anyone: bool = False
    """Listen beyond this machine without an API key."""
    allowed_hosts: tuple[str, ...] = ()
    """Names of this machine, beside its addresses and `localhost`, that a request may call it by."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages (`https://kiosk.example`) that may use the server from a browser; its own page always may.

    `*` is every page, and needs an API key, as does `null`, which many pages are called by.
    """
    image_folder: Path | None = None
    """Pictures under it may be named by path or `file:` URL; None lets no file be read."""
    model_names: tuple[str, ...] = ()
    """What callers call the models, in their order; one without is called by its folder's name."""
    max_loaded_models: int = 3
    """Models in memory at the same time; the least recently used one makes room for another."""
    unload_after_s: float = 300.0
    """How long a model stays in memory after its last use; inf keeps it. The first model stays in any case."""
    max_body_bytes: int = 32 * 2**20
    max_images: int = 8
    """Pictures of one request."""
    max_pixels: int = 50_000_000
    """Pixels of one picture, told from its header before anything is decoded."""
    max_pages: int = 100
    """Pages of one document that are read."""
    max_prompt_chars: int = 200_000
    """Characters of a request's texts; their tokens are bounded by the model's context."""
    max_schema_chars: int = 50_000
    """Characters of a request's JSON schemas, those of its tools included."""
    max_queue: int = 16
    """Requests that are held beside one that is answered: those that wait, and others that are answered with it."""
    max_running: int = 4
    """Answers that are decoded together, where the KV cache lies under paged attention; else there is one at a time."""
    max_tokens: int = 512
    """Longest answer of a request that does not say."""
    time_limit_s: float = 300.0
    """From a request's last byte to its answer's last, waiting included."""
    body_timeout_s: float = 30.0
    """From a request's header to its last byte."""
    stop_timeout_s: float = 10.0
    """How long an answer may go on after SIGTERM."""
    log_content: bool = False
    """Write questions and answers into the log."""

    def __post_init__(self) -> None:
        for name in (*_POSITIVE, "unload_after_s"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} must be above 0, not {getattr(self, name)}")
            if getattr(self, name) == inf and name in _POSITIVE:
                raise OptionError(f"{name} must be finite")
        if not 0 <= self.port <= 65535:
            raise OptionError(f"port must be between 0 and 65535, not {self.port}")
        if any(len(key) < SHORTEST_KEY for key in self.api_keys):
            raise OptionError(
                f"an API key must have at least {SHORTEST_KEY} characters; make one with:"
                ' python -c "import secrets; print(secrets.token_urlsafe(32))"'
            )
        if any(not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise OptionError("an API key must be of printable ASCII characters without spaces")
        if self.image_folder is not None:
            _check_folder(self.image_folder)
        for origin in self.allowed_origins:
            self._check_origin(origin)
        if not (self.is_local or self.api_keys or self.allow_anyone):
            raise OptionError(
                f"listening on {self.host} lets other machines in: set an API key (EDGEVLM_API_KEY or --api-key-file),"
                " or say --allow-anyone"
            )

    def _check_origin(self, origin: str) -> None:
        """Raise `OptionError` for an origin that no browser would ever name, or that stands for strangers."""
        if origin in (ANY_ORIGIN, "null"):
            if not self.api_keys:
                raise OptionError(
                    f"--allow-origin {origin} lets any web page use the server: set an API key (EDGEVLM_API_KEY or"
                    " --api-key-file), or name the pages"
                )
            return
        scheme, _, rest = origin.lower().partition("://")
        host = rest.partition("/")[0].removesuffix({"http": ":80", "https": ":443"}.get(scheme, "/"))
        plain = host and origin.isascii() and "*" not in origin
        if not plain or origin != f"{scheme}://{host}":
            written = f"{scheme}://{host}" if plain else "https://shop.example"
            raise OptionError(f"--allow-origin {origin} is no origin as a browser writes it, such as {written}")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"


def _check_folder(folder: Path) -> None:
    try:
        mode = folder.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except OSError as error:
        raise OptionError(f"image folder {folder} cannot be read: {error.strerror or error}") from None
    if not stat.S_ISDIR(mode):
        raise OptionError(f"image folder {folder} is no folder")
    if not os.access(folder, os.X_OK):
        raise OptionError(f"image folder {folder} cannot be read: permission denied")


def read_keys(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the API keys in a file, one a line; empty lines and lines that begin with # do not count.

    Raises `OptionError`.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise OptionError(f"API key file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise OptionError(f"API key file {path} holds no key")
    return keys
