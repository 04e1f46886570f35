"""The backbone to export: any ViT that timm has, or a compact one given by its sizes.

    vit_small_patch14_dinov2    timm's name
    vit-192-8-3-p14             width 192, 8 blocks, 3 heads, patches of 14 px; like DINOv2 without registers, and with
                                tokens centred on their mean (`TokenCentring`)
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from phaseline.runtime.errors import ExportError, UsageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_COMPACT = re.compile(r"vit-(\d+)-(\d+)-(\d+)-p(\d+)")
# DINOv2's native grid; position embeddings of a compact ViT are drawn on it.
_COMPACT_GRID = 37


class TokenCentring(nn.Module):
    """Subtracts the mean patch token of a tile, in compact ViTs, before their blocks.

    Features then say how a patch differs from its surroundings, whatever the image's brightness. A trained ViT finds such
    context by attention; random blocks do not, and without this their features added nothing to the classical ones on the Ni
    micrographs (export/README.md).

    Parameters
    ----------
    prefix
        Tokens before the patch tokens, which stay as they are.
    """

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Centre tokens of shape (n, prefix + patches, D)."""
        patches = tokens[:, self.prefix:]
        # A product, since engines split the sum of a ReduceMean differently in batches of different sizes.
        share = torch.full((1, 1, patches.shape[1]), 1 / patches.shape[1], dtype=tokens.dtype, device=tokens.device)
        return torch.cat([tokens[:, :self.prefix], patches - share @ patches], dim=1)


@dataclass(frozen=True)
class Backbone:
    """A timm ViT and what the exporter must know of it.

    Attributes
    ----------
    name
        As asked for.
    vit
        timm's `VisionTransformer` or `Eva`, without classifier, in evaluation mode.
    patch_px
        P, side of a patch.
    mean, std
        Normalisation of its three input channels, for pixels of range 0–1.
    """

    name: str
    vit: Any
    patch_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def embed_dim(self) -> int:
        """D, width of a token."""
        return int(self.vit.embed_dim)

    @property
    def heads(self) -> int:
        """Attention heads of the last block."""
        return int(self.vit.blocks[-1].attn.num_heads)


def create_backbone(name: str, *, pretrained: bool = False) -> Backbone:
    """Build the architecture; its weights are timm's random ones unless `pretrained`.

    Parameters
    ----------
    name
        A timm ViT, with or without the tag of its weights, or ``vit-DIM-DEPTH-HEADS-pPATCH``.
    pretrained
        Let timm download its weights.

    Raises
    ------
    UsageError
        No such name, or impossible sizes.
    ExportError
        Not a ViT with square patches.
    """
    compact = _COMPACT.fullmatch(name)
    vit: Any
    if compact:
        if pretrained:
            raise UsageError(f"nobody has published weights of {name}; give --weights FILE, or --weights random:0 for "
                             "an untrained backbone")
        vit = _compact_vit(name, *(int(number) for number in compact.groups()))
    else:
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models("*vit*"), n=3) or ["vit_small_patch14_dinov2"]
            raise UsageError(f"unknown backbone {name!r}; expected a timm ViT (nearest: {', '.join(close)}) or sizes "
                             "such as vit-192-8-3-p14")
        architecture = name.split(".", maxsplit=1)[0]
        if name != architecture and name not in timm.list_pretrained(f"{architecture}.*"):
            raise UsageError(f"timm has no weights named {name!r}; expected {architecture}, with one of its tags or without")
        vit = timm.create_model(name, pretrained=pretrained, num_classes=0)
    if not isinstance(vit, VisionTransformer | Eva):
        raise ExportError(f"{name} is a {type(vit).__name__}, not a plain Vision Transformer; choose one, "
                          "e.g. vit_small_patch14_dinov2 or vit_small_patch16_224.dino")
    patch = vit.patch_embed.patch_size
    if patch[0] != patch[1]:
        raise ExportError(f"{name} has patches of {patch[0]}×{patch[1]} px, expected square ones")
    config: Any = {} if compact else vit.pretrained_cfg
    return Backbone(name=name, vit=vit.eval().requires_grad_(False), patch_px=int(patch[0]),
                    mean=tuple(config.get("mean", IMAGENET_MEAN)), std=tuple(config.get("std", IMAGENET_STD)))


def randomise(backbone: Backbone, seed: int) -> None:
    """Draw all weights anew, reproducibly, at the scale that training leaves them at.

    LayerScale is drawn from 0.1–1: at timm's 1e-5 an untrained ViT is the identity, and its export proves nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in backbone.vit.named_parameters():
            if re.search(r"(ls\d\.gamma|gamma_\d)$", name):
                tensor.uniform_(0.1, 1.0, generator=generator)
            elif name.endswith("patch_embed.proj.weight"):
                tensor.normal_(0.0, (3 * tensor[0].numel()) ** -0.5, generator=generator)
            elif tensor.ndim == 1:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                tensor.normal_(0.0, 0.02, generator=generator)


def _compact_vit(name: str, dim: int, depth: int, heads: int, patch: int) -> VisionTransformer:
    if min(dim, depth, heads, patch) < 1 or dim % heads:
        raise UsageError(f"{name}: {dim} channels cannot be divided among {heads} heads; expected positive sizes with "
                         "DIM a multiple of HEADS, e.g. vit-192-8-3-p14")
    # No final norm: it would blow up the noise of featureless regions to the size of structure.
    vit = VisionTransformer(img_size=_COMPACT_GRID * patch, patch_size=patch, embed_dim=dim, depth=depth,
                            num_heads=heads, num_classes=0, init_values=1e-5, final_norm=False)
    vit.norm_pre = TokenCentring(vit.num_prefix_tokens)
    return vit
