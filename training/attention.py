"""Attention as training needs it: nothing that a mask throws away, and weights only for those who are told by them.

At 576 image tokens transformers' own attention takes more of a step than all matrix products together: it scores every
position against every other, in float32, and multiplies most of it by nothing. Where nobody asks for weights, PyTorch's
fused attention is twice as fast in float32, and what a GPU wants; in BF16 its backward pass on a CPU is slower than
plain products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import AttentionInterface

BLOCKS = 4
"""Into how many blocks of rows the prefix is parted: each is scored against what lies before its end."""


class _Attend(torch.autograd.Function):  # type: ignore[misc]
    """`softmax(query @ key.T) @ value` of `(N, R, D)`, `(N, S, D)` and `(N, S, D)`, which keeps its weights alone."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, rows: int) -> Any:
        """Return `(N, R, D)`; of every `rows` queries, if not 0, the last stands where the last key does."""
        scores = torch.bmm(query, key.transpose(1, 2))
        if rows:
            later = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu(1)
            scores.unflatten(1, (-1, rows))[..., -rows:].masked_fill_(later, -torch.inf)
        weights = torch.softmax(scores, -1)
        ctx.save_for_backward(query, key, value, weights)
        return torch.bmm(weights, value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients of query, key and value."""
        query, key, value, weights = ctx.saved_tensors
        (grad,) = grads
        scores = torch._softmax_backward_data(torch.bmm(grad, value.transpose(1, 2)), weights, -1, weights.dtype)
        return (
            torch.bmm(scores, key),
            torch.bmm(scores.transpose(1, 2), query),
            torch.bmm(weights.transpose(1, 2), grad),
            None,
        )


def _fused(query: Any) -> bool:
    return bool(query.is_cuda) or query.dtype == torch.float32


def look(_module: Any, query: Any, key: Any, value: Any, _mask: Any, scaling: float, **_: Any) -> tuple[Any, None]:
    """Let every patch `(B, H, S, D)` see every other; return `(B, S, H, D)`."""
    if _fused(query):
        return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2).contiguous(), None
    seen = _Attend.apply(*(each.flatten(0, 1) for each in (query * scaling, key, value)), 0)
    return seen.unflatten(0, query.shape[:2]).transpose(1, 2).contiguous(), None


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
        before = _prefix(query[..., :prefix, :], key, value).reshape(batch, heads, prefix, size)
    return torch.cat([before, answers], 2).transpose(1, 2), weights


def _prefix(query: Any, key: Any, value: Any) -> Any:
    """Return what the prefix' queries `(B, KV, G, P, D)` see of themselves and what lies before them."""
    if _fused(query):
        keys, values = (each[:, :, None, : query.shape[3]].expand_as(query).flatten(1, 2) for each in (key, value))
        seen = scaled_dot_product_attention(query.flatten(1, 2), keys, values, is_causal=True, scale=1.0)
        return seen.unflatten(1, query.shape[1:3])
    queries, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    blocks, first = [], 0
    for rows in (len(each) for each in torch.arange(query.shape[3]).tensor_split(BLOCKS)):
        last = first + rows
        seen = _Attend.apply(queries[:, :, first:last].flatten(1, 2), key[:, :last], value[:, :last], rows)
        blocks.append(seen.unflatten(1, (-1, rows)))
        first = last
    return torch.cat(blocks, 2).unflatten(0, query.shape[:2])


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
