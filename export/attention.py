"""Attention, written three ways: as torch computes it, for ONNX Runtime's CPU engine, and in standard operators.

All take query, key and value of shape (n, heads, tokens, size), and give the same shape and dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def reference_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """torch's own; what exported graphs are verified against."""
    return nn.functional.scaled_dot_product_attention(query, key, value)


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``com.microsoft.MultiHeadAttention``: flash attention on CPUs, no n² matrix.

    To be traced, not run: torch has no such operator and gives zeros.
    """
    heads = query.shape[1]
    # Its layout is (n, tokens, heads × size). Engines cancel these transposes with the module's when loading.
    packed = [t.transpose(1, 2).flatten(2) for t in (query, key, value)]
    attended = torch.onnx.ops.symbolic("com.microsoft::MultiHeadAttention", packed, {"num_heads": heads},
                                       dtype=query.dtype, shape=packed[0].shape)
    return split_axis(attended, 2, (heads, query.shape[3])).transpose(1, 2)


def plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Matrix product, softmax, matrix product. The softmax is computed in float32 whatever the dtype."""
    # Scaling the query first keeps the products inside float16's range.
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    return torch.softmax(scores.float(), dim=-1).to(value.dtype) @ value


def split_axis(x: torch.Tensor, axis: int, sizes: tuple[int, ...]) -> torch.Tensor:
    """One axis as several, of the sizes given."""
    split: torch.Tensor = x.unflatten(axis, sizes)  # type: ignore[no-untyped-call]
    return split
