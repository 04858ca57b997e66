"""Attention as training needs it: nothing that a mask throws away, and weights only for those who are told by them.

At 576 image tokens transformers' own attention takes more of a step than all matrix products together: it scores every
position against every other, in float32, and multiplies most of it by nothing. Where nobody asks for weights, tuning's
attention is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import rms_norm
from transformers import AttentionInterface

from edgevlm_export.tune.attention import causal, look


def read(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, prefix: int, **_: Any
) -> tuple[Any, Any]:
    """Let the first `prefix` positions of `(B, H, S, D)` see those before them, and the others what `mask` shows them.

    Returns `(B, S, H, D)` and the others' weights `(B, H, S - prefix, S)`. Of the last layer nobody looks at what it
    makes of the prefix, and it is zero.
    """
    batch, heads, length, size = query.shape
    shared = key.shape[1]
    query = (query * scaling).to(value.dtype).unflatten(1, (shared, -1))  # (B, KV, H / KV, S, D)
    key, value = key.to(value.dtype).contiguous(), value.contiguous()
    asking = query[..., prefix:, :].flatten(2, 3)
    scores = (asking @ key.transpose(2, 3)).reshape(batch, heads, -1, length)
    weights = torch.softmax(scores + mask[:, :, prefix:], -1)
    answers = (weights.to(value.dtype).reshape(*asking.shape[:3], length) @ value).reshape(batch, heads, -1, size)
    if module.layer_idx == module.config.num_hidden_layers - 1:
        before = answers.new_zeros(batch, heads, prefix, size)
    else:
        before = causal(query[..., :prefix, :], key, value).reshape(batch, heads, prefix, size)
    return torch.cat([before, answers], 2).transpose(1, 2), weights


def _rms(norm: Any) -> Any:
    """Return what an RMS norm does, as the one operation that it is on a GPU."""
    return lambda hidden: rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def _once(_module: Any, _inputs: Any, output: Any) -> Any:
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output


class _Whole:
    """What a tower's patch embeddings do for whole pictures: patch i stands at place i, and no mask is looked at."""

    def __init__(self, embeddings: Any) -> None:
        self._embeddings = embeddings

    def __call__(self, pixel_values: Any, patch_attention_mask: Any) -> Any:  # noqa: ARG002
        """Return `(B, patches, width)`."""
        patches = self._embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + self._embeddings.position_embedding.weight


def install(model: Any) -> None:
    """Have an Idefics3's tower look and its text part read like this.

    What a norm gives is turned into BF16 once, not by each of the products that take it: a step is 8 % shorter.
    """
    embeddings = model.model.vision_model.embeddings
    embeddings.forward = _Whole(embeddings)
    AttentionInterface.register("panel_look", look)
    AttentionInterface.register("panel_read", read)
    model.set_attn_implementation({"vision_config": "panel_look", "text_config": "panel_read"})
    for layer in model.model.vision_model.encoder.layers:
        layer.layer_norm1.register_forward_hook(_once)
        layer.layer_norm2.register_forward_hook(_once)
    model.model.text_model.norm.forward = _rms(model.model.text_model.norm)
    for layer in model.model.text_model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = _rms(norm)
            norm.register_forward_hook(_once)
