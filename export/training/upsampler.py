"""Training the convolutional upsampler of arXiv 2508.21529 (§3.1, Table S1) for a frozen compact backbone.

    image ─▶ tokens at the bundle's stride ─▶ upsampler ─▶ pixel features ─┬─ smooth L1 ─ target
      │                                                                     └─ episodes: label one field of view from another
      └─▶ target  averaged: tokens of shifted, turned and mirrored views at a finer stride (HR-Dv2, arXiv 2410.19836 §3.1);
                            each step draws some of the views, so that all of them count in the mean
                  implicit: a small network fitted to many views of one image (FeatUp's implicit variant), made beforehand
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from phaseline.export.training.implicit import ImplicitTarget, fit_targets
from phaseline.export.training.objectives import episode_loss
from phaseline.export.training.phantoms import MAX_PHASES
from phaseline.export.training.samples import Pool, draw_episode, draw_pixels, draw_scene, turned
from phaseline.export.training.tokens import grid_of, token_maps
from phaseline.export.training.trained import read_backbone
from phaseline.export.training.views import averaged_pixels, draw_views
from phaseline.export.upsampler import Upsampler, UpsamplerConfig
from phaseline.runtime.contract import F32, U8
from phaseline.runtime.errors import UsageError

Target = Literal["averaged", "implicit"]
TARGETS: tuple[Target, ...] = get_args(Target)
_SUPPORT = 96
_MARGIN_PX = 2
_SCALE_BATCH = 16


@dataclass(frozen=True)
class UpsamplerTraining:
    """What is trained, on what kind of batches.

    Attributes
    ----------
    backbone
        Path of the weights of `phaseline train backbone`.
    target
        ``averaged`` or ``implicit``.
    episode_weight
        Of the episodes' loss, next to the target's; 0: the target only.
    hidden
        Channels inside, and of the guidance's levels.
    stride_px, tile_px
        Of the bundles that will be made.
    crop_px
        Side of the training crops.
    materials
        Generated materials to draw episodes from.
    episodes, scenes
        Of one batch: episodes of two crops each, and crops of micrographs.
    views
        Of a crop, at each step.
    implicit_images
        Crops that implicit targets are made of.
    seed
        Decides all.
    """

    backbone: str
    target: Target = "averaged"
    episode_weight: float = 1.0
    hidden: int = 32
    stride_px: int = 14
    tile_px: int = 294
    crop_px: int = 140
    materials: int = 1200
    episodes: int = 5
    scenes: int = 3
    views: int = 4
    implicit_images: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "stride_px", "materials", "scenes", "views", "implicit_images"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected a positive integer")
        if self.episode_weight < 0:
            raise UsageError(f"episodes is {self.episode_weight}, expected 0 or more")
        if self.crop_px % self.stride_px or self.tile_px % self.stride_px or self.crop_px > self.tile_px:
            raise UsageError(f"crop is {self.crop_px}, expected a multiple of the stride, {self.stride_px}, of at most "
                             f"{self.tile_px}")


class UpsamplerTask:
    """See `loop.Task`.

    Parameters
    ----------
    training
        Settings.
    pool
        Makes the generated materials; called before the first step that has episodes.
    micrographs
        uint8 arrays of shape (rows, cols).
    device
        Where to compute.
    """

    def __init__(self, training: UpsamplerTraining, pool: Callable[[], Pool], micrographs: Sequence[U8], device: torch.device
                 ) -> None:
        self.training, self._make_pool, self._micrographs, self._device = training, pool, micrographs, device
        torch.manual_seed(training.seed)
        self._backbone, projection, digest = read_backbone(Path(training.backbone))
        if self._backbone.patch_px != training.stride_px:
            raise UsageError(f"{training.backbone} has patches of {self._backbone.patch_px} px, but stride is "
                             f"{training.stride_px}; an upsampler works between patches that touch")
        self._backbone.vit.to(device)
        self._projection = projection.to(device)
        self._tile_grid = grid_of(training.tile_px, self._backbone.patch_px, training.stride_px)
        self._fine_px = training.stride_px // 2
        channels = len(projection)
        scale = self._measured_scale()
        self.network = Upsampler(UpsamplerConfig(
            name=f"phaseline-{channels}", n_ch_in=channels, n_ch_hidden=training.hidden, n_ch_out=channels,
            n_ch_downsampler=training.hidden, patch_size=training.stride_px, feature_scale=scale))
        _initialise(self.network)
        self.network.to(device).train()
        self._temperature = nn.ParameterDict({"value": nn.Parameter(torch.tensor(4.0, device=device))})
        self.settings: dict[str, Any] = {**dataclasses.asdict(training), "backbone": digest}

    @functools.cached_property
    def _pool(self) -> Pool:
        return self._make_pool()

    @functools.cached_property
    def _targets(self) -> list[ImplicitTarget]:
        training = self.training
        scenes = self._scenes(training.implicit_images, np.random.default_rng([training.seed, 2]), training.stride_px)
        return fit_targets(scenes, training.crop_px, lambda crops: self._low_res(crops, training.stride_px, (0, 0)),
                           patch_px=self._backbone.patch_px, stride_px=training.stride_px, device=self._device,
                           seed=training.seed)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All that is trained; only ``network`` is kept."""
        return {"network": self.network, "temperature": self._temperature}

    def loss(self, random: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of one batch; logs both losses and the share of pixels labelled rightly."""
        training = self.training
        crops, target = self._averaged(random) if training.target == "averaged" else self._implicit(random)
        count = len(crops)
        phases: list[U8] = []
        if training.episode_weight:
            fields, truths = zip(*(draw_episode(self._pool, training.crop_px, random) for _ in range(training.episodes)),
                                 strict=True)
            crops = torch.cat([crops, self._tensor(np.concatenate(fields))])
            phases = list(truths)
        found = self._pixel_features(crops, random)
        scale = self.network.config.feature_scale or 1.0
        covered = torch.isfinite(target)
        regression = nn.functional.smooth_l1_loss((found[:count] * scale)[covered], (target * scale)[covered])
        values = {"target": float(regression.detach())}
        if not phases:
            return regression, values
        episodes, right = self._episodes(found[count:] * scale, np.stack(phases), random)
        values |= {"episodes": float(episodes.detach()), "right": float(right)}
        return regression + training.episode_weight * episodes, values

    def _tensor(self, crops: F32) -> torch.Tensor:
        return torch.from_numpy(crops)[:, None].to(self._device)

    def _low_res(self, crops: torch.Tensor, stride_px: int, at: tuple[int, int]) -> torch.Tensor:
        """Projected tokens, no gradient."""
        grid = grid_of(self.training.tile_px, self._backbone.patch_px, stride_px)
        with torch.no_grad():
            tokens = token_maps(self._backbone, crops, stride_px, grid, at)
            return torch.einsum("ndhw,kd->nkhw", tokens, self._projection)

    def _pixel_features(self, crops: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        room = self._tile_grid - crops.shape[2] // self.training.stride_px
        row, col = (int(start) for start in random.integers(0, room + 1, 2))
        low_res = self._low_res(crops, self.training.stride_px, (row, col))
        # Levels as the graph sees them: 8 bits.
        return self.network.pixel_features(crops * 255, low_res)

    def _scenes(self, count: int, random: np.random.Generator, margin_px: int = 0) -> list[F32]:
        return [draw_scene(self._micrographs, self.training.crop_px + margin_px, random) for _ in range(count)]

    def _averaged(self, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops of micrographs, and the mean of some of their views' features at each pixel; NaN where no view was."""
        training, margin = self.training, self.training.stride_px
        scenes = self._tensor(np.stack(self._scenes(training.scenes, random, margin)))
        views = draw_views(training.views, margin, random)
        fine = grid_of(training.tile_px, self._backbone.patch_px, self._fine_px)
        side = grid_of(training.crop_px, self._backbone.patch_px, self._fine_px)
        at = tuple(int(start) for start in random.integers(0, fine - side + 1, 2))
        target = averaged_pixels(scenes, views, training.crop_px, lambda view: self._low_res(view, self._fine_px, (at[0], at[1])),
                                 patch_px=self._backbone.patch_px, stride_px=self._fine_px)
        half = margin // 2
        return scenes[:, :, half : half + training.crop_px, half : half + training.crop_px], target

    def _implicit(self, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = random.integers(0, len(self._targets), self.training.scenes)
        turns = random.integers(0, 8, len(chosen))
        crops = np.stack([turned(self._targets[i].crop, int(turn)) for i, turn in zip(chosen, turns, strict=True)])
        target = np.stack([turned(self._targets[i].features, int(turn)) for i, turn in zip(chosen, turns, strict=True)])
        return self._tensor(crops), torch.from_numpy(target).to(self._device)

    def _episodes(self, maps: torch.Tensor, phases: U8, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        fields = phases.reshape(-1, *phases.shape[2:])
        pixels = np.stack([draw_pixels(field, 2 * _SUPPORT, _MARGIN_PX, random) for field in fields])
        labels = np.take_along_axis(fields.reshape(len(fields), -1), pixels, axis=1).astype(np.int64)
        where = torch.from_numpy(pixels).to(self._device)[:, None].expand(-1, maps.shape[1], -1)
        features = maps.flatten(2).gather(2, where).transpose(1, 2)
        truth = torch.from_numpy(labels).to(self._device)
        features, truth = (x.reshape(len(phases), -1, *x.shape[1:]) for x in (features, truth))
        return episode_loss(features[:, 0, :_SUPPORT], truth[:, 0, :_SUPPORT],
                            torch.cat([features[:, 0, _SUPPORT:], features[:, 1]], dim=1),
                            torch.cat([truth[:, 0, _SUPPORT:], truth[:, 1]], dim=1), MAX_PHASES, self._temperature["value"])

    def _measured_scale(self) -> float:
        """One over the deviation of patch features, so that they enter and leave the network at about 1."""
        scenes = self._tensor(np.stack(self._scenes(_SCALE_BATCH, np.random.default_rng([self.training.seed, 3]))))
        return float(1 / self._low_res(scenes, self.training.stride_px, (0, 0)).std())


def check_target(target: str) -> Target:
    """Refuse a target that is none of `TARGETS`.

    Raises
    ------
    UsageError
        An unknown name.
    """
    for known in TARGETS:
        if target == known:
            return known
    raise UsageError(f"target is {target!r}, expected one of {', '.join(TARGETS)}")


def _initialise(network: Upsampler) -> None:
    """Kernels for LeakyReLU; those that read normalised levels of 0–255 begin a hundredth as large."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, a=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
            if name.endswith("double_conv.0") and "inp_conv" not in name:
                with torch.no_grad():
                    layer.weight[:, -3:] /= 400
    nn.init.normal_(network.upsampler.mlp.weight, std=network.upsampler.mlp.in_channels**-0.5)
