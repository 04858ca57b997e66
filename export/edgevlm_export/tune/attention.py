"""Attention as a CPU trains it in BF16: plain products, whose backward pass is faster than that of PyTorch's fused one.

At 576 image tokens the fused attention took 64 % of a step of 2.7 s, its backward pass alone 46 %; with plain products
the step takes 1.65 s (the bundled model, 16 rows, two cores of an AMD EPYC with AVX512-BF16, quiet).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

BLOCKS = 4
"""Into how many blocks of rows causal attention is parted: each is scored against what lies before its end."""


class Attend(torch.autograd.Function):  # type: ignore[misc]
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


def is_fused(query: Any) -> bool:
    """Tell whether PyTorch's fused attention is the faster one: in float32, and on a GPU."""
    return bool(query.is_cuda) or query.dtype == torch.float32


def look(_module: Any, query: Any, key: Any, value: Any, _mask: Any, scaling: float, **_: Any) -> tuple[Any, None]:
    """Let every patch `(B, H, S, D)` see every other; return `(B, S, H, D)`."""
    if is_fused(query):
        return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2).contiguous(), None
    seen = Attend.apply(*(each.flatten(0, 1) for each in (query * scaling, key, value)), 0)
    return seen.unflatten(0, query.shape[:2]).transpose(1, 2).contiguous(), None


def causal(query: Any, key: Any, value: Any) -> Any:
    """Return what scaled queries `(B, KV, G, P, D)` see of the first P keys `(B, KV, S, D)`: none that comes later."""
    if is_fused(query):
        keys, values = (each[:, :, None, : query.shape[3]].expand_as(query).flatten(1, 2) for each in (key, value))
        seen = scaled_dot_product_attention(query.flatten(1, 2), keys, values, is_causal=True, scale=1.0)
        return seen.unflatten(1, query.shape[1:3])
    queries, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    blocks, first = [], 0
    for rows in (len(each) for each in torch.arange(query.shape[3]).tensor_split(BLOCKS)):
        last = first + rows
        seen = Attend.apply(queries[:, :, first:last].flatten(1, 2), key[:, :last], value[:, :last], rows)
        blocks.append(seen.unflatten(1, (-1, rows)))
        first = last
    return torch.cat(blocks, 2).unflatten(0, query.shape[:2])


def read(_module: Any, query: Any, key: Any, value: Any, _mask: Any, scaling: float, **_: Any) -> tuple[Any, None]:
    """Let every token `(B, H, S, D)` see those before it; return `(B, S, H, D)`. Rows are filled up on the right alone.

    A single query stands after all keys.
    """
    shared = key.shape[1]
    query = (query * scaling).to(value.dtype).unflatten(1, (shared, -1))
    key, value = key.to(value.dtype).contiguous(), value.contiguous()
    if query.shape[3] == 1:
        seen = scaled_dot_product_attention(query.flatten(2, 3), key, value, scale=1.0).unflatten(2, (-1, 1))
    else:
        seen = causal(query, key, value)
    return seen.flatten(1, 2).transpose(1, 2).contiguous(), None


def install(model: Any) -> None:
    """Have an Idefics3's tower look and its text part read like this."""
    AttentionInterface.register("edgevlm_look", look)
    AttentionInterface.register("edgevlm_read", read)
    model.set_attn_implementation({"vision_config": "edgevlm_look", "text_config": "edgevlm_read"})
