"""llama.cpp through xllamacpp, on `text.gguf`, `mmproj.gguf` and the chat template in one folder.

Beside xllamacpp this needs the standard library alone.
"""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """One answer; seconds, from the picture still a file."""

    ttft_s: float
    tpot_s: float
    total_s: float
    prompt_tokens: int
    """Those of its KV cache included."""
    text: str


class LlamaCpp:
    """A model that answers greedily, and with exactly as many tokens as asked for."""

    def __init__(self, folder: Path, threads: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.mmproj.path = str(folder / "text.gguf"), str(folder / "mmproj.gguf")
        params.n_ctx, params.n_parallel, params.warmup, params.cache_ram_mib = 4096, 1, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.use_jinja, params.chat_template = True, (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self._server = xllamacpp.Server(params)

    def ask(self, picture: Path, question: str, tokens: int, *, reuse: bool) -> Reply:
        """Answer a question about a picture; with `reuse` the KV cache of the last prompt's beginning is kept."""
        started = time.perf_counter()
        url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode('ascii')}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        request = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": reuse,
            "stream": True,
        }
        chunks: list[tuple[float, dict[str, Any]]] = []
        self._server.handle_chat_completions(request, lambda chunk: chunks.append((time.perf_counter(), chunk)))
        total_s = time.perf_counter() - started
        timings = next(chunk["timings"] for _, chunk in chunks if "timings" in chunk)
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for _, chunk in chunks if chunk["choices"])
        count = timings["prompt_n"] + timings["cache_n"]
        return Reply(chunks[0][0] - started, timings["predicted_per_token_ms"] / 1000, total_s, count, text)
