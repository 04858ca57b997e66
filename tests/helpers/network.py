"""What would reach for the network."""

from __future__ import annotations

NETWORK_CLIENTS = {
    "aiohttp",
    "hf_xet",
    "httpcore",
    "httpcore2",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "requests",
    "urllib3",
}
"""tokenizers brings some of them along, and imports none unless a tokenizer is fetched by name."""
