"""Training a compact backbone, without labels that anybody drew.

    generated materials ─▶ episodes: from some pixels of one field of view, label another      ┐
    micrographs ─▶ pairs of recordings of one place: the same tokens (VICReg, on tokens)        ├─▶ one loss
                                                                                                ┘
The pixels' features in the episodes are those that a bundle gives: tokens at the same stride, a linear D→k projection that
is trained along and becomes the bundle's frozen one, bilinear between the tokens' centres.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from phaseline.export.backbone import create_backbone
from phaseline.export.training.objectives import episode_loss, invariance_loss, sample_pixels
from phaseline.export.training.phantoms import MAX_PHASES
from phaseline.export.training.samples import Pool, draw_episode, draw_pair, draw_pixels
from phaseline.export.training.tokens import grid_of, token_maps
from phaseline.export.training.views import turned_back
from phaseline.runtime.contract import U8
from phaseline.runtime.errors import UsageError

_LAYER_SCALE = 0.2
_POSITION_SCALE = 0.3
_SUPPORT = 96
_MARGIN_PX = 4
_PAIR_TOKENS = 128


@dataclass(frozen=True)
class BackboneTraining:
    """What is trained, on what kind of batches.

    Attributes
    ----------
    architecture
        A compact ViT, ``vit-DIM-DEPTH-HEADS-pPATCH``.
    channels
        k of the projection that is trained along.
    stride_px, tile_px
        Of the bundles that will be made; position embeddings are trained on their grid.
    crop_px
        Side of the training crops, patch size plus a multiple of the stride, at most the tile.
    materials
        Generated materials to draw episodes from.
    episodes, pairs
        Of one batch: two crops each.
    invariance
        Weight of the pairs' loss; 0 without.
    seed
        Decides all.
    """

    architecture: str = "vit-192-6-6-p14"
    channels: int = 32
    stride_px: int = 14
    tile_px: int = 294
    crop_px: int = 182
    materials: int = 1200
    episodes: int = 8
    pairs: int = 4
    invariance: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("channels", "stride_px", "materials", "episodes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected a positive integer")
        if self.pairs < 0 or self.invariance < 0:
            raise UsageError(f"pairs and invariance are {self.pairs} and {self.invariance}, expected 0 or more")


class BackboneTask:
    """See `loop.Task`.

    Parameters
    ----------
    training
        Settings.
    pool
        Makes the generated materials; called before the first step.
    micrographs
        uint8 arrays of shape (rows, cols).
    device
        Where to compute.

    Raises
    ------
    UsageError
        Not a compact ViT, or sizes that do not fit each other.
    """

    def __init__(self, training: BackboneTraining, pool: Callable[[], Pool], micrographs: Sequence[U8], device: torch.device
                 ) -> None:
        self.training, self._make_pool, self._micrographs, self._device = training, pool, micrographs, device
        torch.manual_seed(training.seed)
        backbone = create_backbone(training.architecture)
        if not training.architecture.startswith("vit-"):
            raise UsageError(f"{training.architecture} is no compact ViT; expected sizes such as vit-192-6-6-p14")
        self._backbone, self._patch = backbone, backbone.patch_px
        steps = training.crop_px - self._patch
        if steps < training.stride_px or steps % training.stride_px or training.crop_px > training.tile_px:
            raise UsageError(f"crop is {training.crop_px}, expected {self._patch} + n × {training.stride_px}, at most "
                             f"{training.tile_px}")
        self._grid, self._tile_grid = (grid_of(side, self._patch, training.stride_px)
                                       for side in (training.crop_px, training.tile_px))
        dim = backbone.embed_dim
        vit: Any = backbone.vit.requires_grad_(True).train()
        _initialise(vit, self._patch)
        self._vit = vit
        self._projection = nn.Linear(dim, training.channels, bias=False)
        nn.init.orthogonal_(self._projection.weight)
        self._temperature = _Scalar(4.0)
        self._expander = nn.Sequential(nn.Linear(dim, 512), nn.LayerNorm(512), nn.GELU(), nn.Linear(512, 256))
        for module in self.modules.values():
            module.to(device)

    @functools.cached_property
    def _pool(self) -> Pool:
        return self._make_pool()

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All that is trained; only ``vit`` and ``projection`` are kept."""
        return {"vit": self._vit, "projection": self._projection, "temperature": self._temperature, "expander": self._expander}

    def loss(self, random: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of one batch; logs both objectives and the share of pixels labelled rightly."""
        training = self.training
        episodes_drawn = [draw_episode(self._pool, training.crop_px, random) for _ in range(training.episodes)]
        crops, phases = [e.images for e in episodes_drawn], [e.phases for e in episodes_drawn]
        pairs, turns = [], []
        for _ in range(training.pairs if training.invariance else 0):
            views, turned = draw_pair(self._micrographs, training.crop_px, random)
            pairs.append(views)
            turns += turned
        images = torch.from_numpy(np.concatenate([*crops, *pairs]))[:, None].to(self._device)
        # A crop may lie anywhere in the tile.
        row, col = (int(start) for start in random.integers(0, self._tile_grid - self._grid + 1, 2))
        maps = token_maps(self._backbone, images, training.stride_px, self._tile_grid, (row, col))
        drawn = len(crops) * crops[0].shape[0]
        episodes, right = self._episodes(maps[:drawn], np.stack(phases), random)
        values = {"episodes": float(episodes.detach()), "right": float(right)}
        if not turns:
            return episodes, values
        invariance = self._invariance(maps[drawn:], turns, random)
        values["invariance"] = float(invariance.detach())
        return episodes + training.invariance * invariance, values

    def state(self) -> dict[str, torch.Tensor]:
        """What an export needs: timm's tensors, and ``projection.weight`` of shape (k, D)."""
        state = {name: tensor.detach().cpu() for name, tensor in self._vit.state_dict().items()}
        return {**state, "projection.weight": self._projection.weight.detach().cpu()}

    def _episodes(self, maps: torch.Tensor, phases: U8, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        training = self.training
        side = training.crop_px
        fields = phases.reshape(-1, side, side)
        pixels = np.stack([draw_pixels(field, 2 * _SUPPORT, _MARGIN_PX, random) for field in fields])
        labels = np.take_along_axis(fields.reshape(len(fields), -1), pixels, axis=1).astype(np.int64)
        where = torch.from_numpy(pixels).to(self._device)
        projected = self._projection(maps.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, maps.shape[2:])
        features = sample_pixels(projected, where // side, where % side, self._patch, training.stride_px)
        truth = torch.from_numpy(labels).to(self._device)
        features, truth = (x.reshape(len(phases), -1, *x.shape[1:]) for x in (features, truth))
        first, second, first_truth, second_truth = features[:, 0], features[:, 1], truth[:, 0], truth[:, 1]
        return episode_loss(first[:, :_SUPPORT], first_truth[:, :_SUPPORT], torch.cat([first[:, _SUPPORT:], second], dim=1),
                            torch.cat([first_truth[:, _SUPPORT:], second_truth], dim=1), MAX_PHASES, self._temperature.value)

    def _invariance(self, maps: torch.Tensor, turns: list[int], random: np.random.Generator) -> torch.Tensor:
        back = torch.stack([turned_back(map_, turn) for map_, turn in zip(maps, turns, strict=True)])
        tokens = back.flatten(2).transpose(1, 2)
        some = torch.from_numpy(random.permutation(tokens.shape[1])[:_PAIR_TOKENS]).to(self._device)
        first, second = (self._expander(tokens[view::2][:, some].flatten(0, 1)) for view in range(2))
        return invariance_loss(first, second)


class _Scalar(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))


def _initialise(vit: Any, patch_px: int) -> None:
    """Sines as positions, so that neighbours are alike from the start, and blocks that count from the start."""
    side, dim = vit.patch_embed.grid_size[0], vit.embed_dim
    quarter = dim // 4
    frequency = 1.5 / 100 ** (torch.arange(quarter) / quarter)
    rows, cols = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    waves = [wave(axis.flatten()[:, None] * frequency) for axis in (rows, cols) for wave in (torch.sin, torch.cos)]
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.pos_embed[:, 1:, : 4 * quarter] = _POSITION_SCALE * torch.cat(waves, dim=1)
        for block in vit.blocks:
            block.ls1.gamma.fill_(_LAYER_SCALE)
            block.ls2.gamma.fill_(_LAYER_SCALE)
        nn.init.normal_(vit.patch_embed.proj.weight, std=(3 * patch_px**2) ** -0.5)
