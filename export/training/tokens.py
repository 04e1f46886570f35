"""Tokens of training crops, as a bundle's graph would give them at some place in its tile."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn

from phaseline.export.backbone import Backbone


def grid_of(length_px: int, patch_px: int, stride_px: int) -> int:
    """Tokens along a side."""
    return 1 + (length_px - patch_px) // stride_px


def token_maps(backbone: Backbone, crops: torch.Tensor, stride_px: int, tile_grid: int, at: tuple[int, int]) -> torch.Tensor:
    """Tokens after the last block.

    Parameters
    ----------
    backbone
        A compact ViT, or another with learned positions and one prefix token; gradients flow if its parameters want them.
    crops
        float tensor of shape (n, 1, side, side), range 0–1.
    stride_px
        s.
    tile_grid
        Tokens along the side of the tile that the crops are a part of.
    at
        Row and column of the crops' first token in the tile.

    Returns
    -------
    float tensor of shape (n, D, h, w).
    """
    vit: Any = backbone.vit
    mean, std = (torch.tensor(values, device=crops.device).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
    conv = vit.patch_embed.proj
    x = nn.functional.conv2d((crops.expand(-1, 3, -1, -1) - mean) / std, conv.weight, conv.bias, stride=stride_px)
    rows, cols = x.shape[2:]
    position = resample_abs_pos_embed(vit.pos_embed, new_size=[tile_grid, tile_grid],
                                      old_size=list(vit.patch_embed.grid_size), num_prefix_tokens=1)
    placed = position[:, 1:].unflatten(1, (tile_grid, tile_grid))[:, at[0] : at[0] + rows, at[1] : at[1] + cols]
    x = x.flatten(2).transpose(1, 2) + placed.flatten(1, 2)
    x = vit.norm_pre(torch.cat([(vit.cls_token + position[:, :1]).expand(len(x), -1, -1), x], dim=1))
    for block in vit.blocks:
        x = block(x)
    found: torch.Tensor = vit.norm(x[:, 1:]).transpose(1, 2).unflatten(2, (rows, cols))
    return found
