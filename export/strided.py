"""The module that is traced: a timm ViT with a denser patch stride, from uint8 tiles to projected patch features.

    tiles ─▶ /255 ─▶ patch convolution, stride s ─▶ + position embedding ─▶ blocks ─▶ norm ─▶ D→k ─▶ patch_features
    uint8            (normalisation folded in)      (of the denser grid)      │
                                                                              └─ last block ─▶ attention, facets

Strided patches: arXiv 2112.05814 supplement, arXiv 2410.19836 §2. Nothing of timm is patched: a copy is read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers.attention import Attention
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import nn

from phaseline.export.attention import Attend, reference_attention, split_axis
from phaseline.export.backbone import Backbone
from phaseline.export.projection import Projection
from phaseline.runtime.contract import FACETS, Facet
from phaseline.runtime.errors import ExportError


class Heads(NamedTuple):
    """Query, key and value of one attention layer, each of shape (n, heads, tokens, D / heads)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def fold_normalisation(
    weight: torch.Tensor, bias: torch.Tensor | None, mean: Sequence[float], std: Sequence[float], in_channels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch embedding that takes pixels of range 0–1 as they are, instead of (pixel − mean) / std.

    Exact, because a patch embedding pads nothing: every output sees all its taps.

    Parameters
    ----------
    weight
        float tensor of shape (D, 3, P, P).
    bias
        float tensor of shape (D,), or None.
    mean, std
        Normalisation of the three channels, for pixels of range 0–1.
    in_channels
        1: the input is grey and would have been repeated three times; 3: RGB.

    Returns
    -------
    Weight of shape (D, in_channels, P, P) and bias of shape (D,), in the weight's dtype.
    """
    precise = weight.double() / torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1)
    shift = (precise * torch.tensor(mean, dtype=torch.float64).view(1, -1, 1, 1)).sum(dim=(1, 2, 3))
    if in_channels == 1:
        precise = precise.sum(dim=1, keepdim=True)
    start = torch.zeros_like(shift) if bias is None else bias.double()
    return precise.to(weight.dtype), (start - shift).to(weight.dtype)


def position_constant(vit: Any, grid: int) -> torch.Tensor:
    """What is added to the zero-padded patch tokens: prefix tokens first, then each patch's position embedding.

    The position embedding is interpolated (bicubic) to the denser grid (arXiv 2112.05814, supplement).

    Returns
    -------
    float tensor of shape (1, prefix + grid², D).
    """
    prefix = torch.cat([t for t in (vit.cls_token, getattr(vit, "reg_token", None)) if t is not None], dim=1)
    count = prefix.shape[1]
    if vit.pos_embed is None:
        return torch.cat([prefix, torch.zeros(1, grid * grid, prefix.shape[2])], dim=1)
    inside = 0 if vit.no_embed_class else count
    position: torch.Tensor = resample_abs_pos_embed(
        vit.pos_embed, new_size=[grid, grid], old_size=list(vit.patch_embed.grid_size), num_prefix_tokens=inside)
    if inside:
        return torch.cat([prefix + position[:, :inside], position[:, inside:]], dim=1)
    return torch.cat([prefix, position], dim=1)


class StridedViT(nn.Module):
    """A ViT with patch stride s ≤ P that takes uint8 tiles and gives float16 maps.

    Parameters
    ----------
    backbone
        timm model with its normalisation; copied, not changed.
    stride_px, tile_px
        s and T; T = P + n·s.
    in_channels
        1 or 3.
    projection
        Frozen D→k projection; None leaves all D channels.
    facets
        Which of the last block's query, key and value come out too.
    attend
        How attention is computed, see `phaseline.export.attention`.
    half
        Compute the matrix products in float16, the rest (residual stream, norms, softmax) in float32. For tracing.
    """

    patch_weight: torch.Tensor
    patch_bias: torch.Tensor
    position: torch.Tensor
    rope: torch.Tensor | None

    def __init__(self, backbone: Backbone, *, stride_px: int, tile_px: int, in_channels: int,
                 projection: Projection | None = None, facets: tuple[Facet, ...] = (),
                 attend: Attend = reference_attention, half: bool = False) -> None:
        super().__init__()
        vit: Any = copy.deepcopy(backbone.vit).eval().requires_grad_(False)
        _refuse_unsupported(vit, backbone.name)
        self.stride, self.facets, self.attend = stride_px, facets, attend
        self.grid = 1 + (tile_px - backbone.patch_px) // stride_px
        self.prefix = int(vit.num_prefix_tokens)
        self.work_dtype = torch.float16 if half else torch.float32
        conv = vit.patch_embed.proj
        weight, bias = fold_normalisation(conv.weight, conv.bias, backbone.mean, backbone.std, in_channels)
        self.register_buffer("patch_weight", weight)
        self.register_buffer("patch_bias", bias)
        self.register_buffer("position", position_constant(vit, self.grid))
        rope = getattr(vit, "rope", None)
        self.register_buffer("rope", None if rope is None else rope.get_embed(shape=[self.grid, self.grid]).float())
        self.patch_norm, self.norm_pre, self.norm = vit.patch_embed.norm, vit.norm_pre, vit.norm
        self.blocks = nn.ModuleList(vit.blocks)
        self.projection: nn.Module = nn.Identity() if projection is None else projection.as_linear()
        if half:
            for block in vit.blocks:
                block.mlp.half()
                for name in ("qkv", "q_proj", "k_proj", "v_proj", "proj"):
                    layer = getattr(block.attn, name, None)
                    if layer is not None:
                        layer.half()

    def forward(self, tiles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute all outputs.

        Parameters
        ----------
        tiles
            uint8 tensor of shape (n, in_channels, T, T).

        Returns
        -------
        Patch features, float16 (n, k, h, w); [CLS] attention of the last block, float16 (n, heads, h, w); then each
        facet, float16 (n, D, h, w).
        """
        return tuple(m.to(torch.float16) for m in self.float_maps(tiles))

    def float_maps(self, tiles: torch.Tensor) -> list[torch.Tensor]:
        """What `forward` gives, before its rounding to float16."""
        tokens, heads = self.last_block(tiles)
        features = self.projection(self.norm(tokens[:, self.prefix:]))
        maps = [self._as_map(features.transpose(1, 2)), self._as_map(cls_attention(heads)[:, :, self.prefix:])]
        for name in self.facets:
            patches = heads[FACETS.index(name)][:, :, self.prefix:]
            maps.append(self._as_map(patches.transpose(2, 3).flatten(1, 2)))
        return maps

    def last_block(self, tiles: torch.Tensor) -> tuple[torch.Tensor, Heads]:
        """Tokens after the last block, float32 (n, prefix + h·w, D), and that block's query, key and value."""
        x = nn.functional.conv2d(tiles.float() * (1 / 255), self.patch_weight, self.patch_bias, stride=self.stride)
        x = self.patch_norm(x.flatten(2).transpose(1, 2))
        # Zero padding plus a constant instead of concatenating expanded tokens: no shape is computed in the graph.
        x = self.norm_pre(nn.functional.pad(x, (0, 0, self.prefix, 0)) + self.position)
        heads = None
        for block in self.blocks:
            x, heads = self._block(block, x)
        assert heads is not None  # a ViT without blocks was refused
        return x, heads

    def _block(self, block: Any, x: torch.Tensor) -> tuple[torch.Tensor, Heads]:
        attended, heads = self._attention(block.attn, block.norm1(x).to(self.work_dtype))
        x = x + _scaled(block, 1, attended.float())
        mlp = block.mlp(block.norm2(x).to(self.work_dtype))
        return x + _scaled(block, 2, mlp.float()), heads

    def _attention(self, attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, Heads]:
        split = [split_axis(t, 2, (attn.num_heads, attn.head_dim)).transpose(1, 2) for t in _qkv(attn, x)]
        query, key, value = attn.q_norm(split[0]), attn.k_norm(split[1]), split[2]
        if self.rope is not None:
            query, key = self._rotated(attn, query), self._rotated(attn, key)
        x = self.attend(query, key, value).transpose(1, 2).flatten(2)
        return attn.proj(attn.norm(x)), Heads(query, key, value)

    def _rotated(self, attn: Any, heads: torch.Tensor) -> torch.Tensor:
        assert self.rope is not None
        patches = apply_rot_embed_cat(heads[:, :, self.prefix:].float(), self.rope, half=attn.rotate_half)
        return torch.cat([heads[:, :, :self.prefix], patches.to(heads.dtype)], dim=2)

    def _as_map(self, channels_first: torch.Tensor) -> torch.Tensor:
        return split_axis(channels_first, 2, (self.grid, self.grid))


def cls_attention(heads: Heads) -> torch.Tensor:
    """Attention of the [CLS] token to all tokens, per head: one query's row, never the n² matrix.

    Returns
    -------
    float32 tensor of shape (n, heads, tokens); each row sums to 1.
    """
    query, key = heads.query[:, :, :1].float(), heads.key.float()
    return torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, dim=-1).squeeze(2)


def _qkv(attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value, each (n, tokens, D), of timm's `Attention` or `EvaAttention`."""
    if attn.qkv is None:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    bias = attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]).to(x.dtype)
    return nn.functional.linear(x, attn.qkv.weight, bias).chunk(3, dim=-1)


def _scaled(block: Any, number: int, x: torch.Tensor) -> torch.Tensor:
    """LayerScale of a timm `Block` (module ``ls1``) or `EvaBlock` (parameter ``gamma_1``)."""
    if hasattr(block, f"ls{number}"):
        scaled: torch.Tensor = getattr(block, f"ls{number}")(x)
        return scaled
    gamma = getattr(block, f"gamma_{number}")
    return x if gamma is None else x * gamma


def _refuse_unsupported(vit: Any, name: str) -> None:
    def refuse(what: str) -> None:
        raise ExportError(f"{name} cannot be exported: {what}; choose another backbone, e.g. vit_small_patch14_dinov2")

    if vit.cls_token is None:
        refuse("it has no [CLS] token, whose attention is part of a bundle")
    if len(vit.blocks) == 0:
        refuse("it has no transformer block")
    if getattr(vit, "rope_mixed", False):
        refuse("its rotary position embedding differs from block to block")
    if not isinstance(vit.norm_pre, nn.Module) or not hasattr(vit.patch_embed, "proj"):
        refuse("its patch embedding is not a convolution")
    for index, block in enumerate(vit.blocks):
        attn: Any = getattr(block, "attn", None)
        if type(attn) not in (Attention, EvaAttention) or not all(hasattr(block, n) for n in ("norm1", "norm2", "mlp")):
            refuse(f"block {index} is a {type(block).__name__} with {type(attn).__name__}, "
                   "expected pre-norm blocks with timm's Attention or EvaAttention")
        if attn.gate is not None:
            refuse(f"block {index} gates its attention")
