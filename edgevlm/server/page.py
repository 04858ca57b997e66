"""The page for people, and what a browser may let it do."""

from __future__ import annotations

import base64
import re
from hashlib import sha256
from importlib.resources import files
from typing import Any

from starlette.responses import Response


def make_page() -> Any:
    """Return the handler of the page, which may load nothing and run nothing but what is in it."""
    html = (files("edgevlm.server") / "page.html").read_bytes()
    scripts, styles = (_hashes(html, tag) for tag in (b"script", b"style"))
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; img-src 'self' data: blob:;"
        " media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "permissions-policy": "camera=(self), microphone=(), geolocation=()",
        "cross-origin-opener-policy": "same-origin",
        "x-frame-options": "DENY",
        "cache-control": "no-cache",
    }

    async def page() -> Response:
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    return page


def _hashes(html: bytes, tag: bytes) -> str:
    """Return the Content-Security-Policy sources of the page's inline elements of one kind."""
    found = re.findall(rb"<" + tag + rb">(.*?)</" + tag + rb">", html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(sha256(text).digest()).decode()}'" for text in found)
