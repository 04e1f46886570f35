"""Training the convolutional upsampler of arXiv 2508.21529 (§3.1, Table S1) for a compact backbone, frozen or tuned.

    image ─▶ tokens at the bundle's stride ─▶ upsampler ─▶ pixel features ─┬─ smooth L1 ─ target
      │                                                                    ├─ episodes: label one field of view from another
      │                                                                    └─ maps: what is known of generated pixels, linearly
      └─▶ target  averaged: tokens of shifted, turned and mirrored views at a finer stride (HR-Dv2, arXiv 2410.19836 §3.1);
                            each step draws some of the views, so that all of them count in the mean
                  implicit: a small network fitted to many views of one image (FeatUp's implicit variant), made beforehand
                  none:     generated materials only

At the end the channels are turned onto their principal axes, which the last 1×1 convolution takes up: trees split one channel at
a time, and the first j channels are the best j.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never, get_args

import numpy as np
import torch
from torch import nn

from phaseline.export.training.implicit import ImplicitTarget, fit_targets
from phaseline.export.training.maps import MAPS, WEIGHTS
from phaseline.export.training.objectives import episode_loss
from phaseline.export.training.phantoms import MAX_PHASES
from phaseline.export.training.samples import Episode, Pool, draw_episode, draw_pixels, draw_scene, turned
from phaseline.export.training.tokens import grid_of, token_maps
from phaseline.export.training.trained import read_backbone
from phaseline.export.training.views import averaged_pixels, draw_views
from phaseline.export.upsampler import Upsampler, UpsamplerConfig
from phaseline.export.upsampler_weights import load_upsampler
from phaseline.export.weights import PROJECTION
from phaseline.runtime.bundle import describe_file
from phaseline.runtime.contract import F32, U8
from phaseline.runtime.errors import UsageError

Target = Literal["averaged", "implicit", "none"]
TARGETS: tuple[Target, ...] = get_args(Target)
_SUPPORT, _QUERIES = 192, 256
_MARGIN_PX = 2
_SCALE_BATCH = 16
_AXES_BATCHES = 24


@dataclass(frozen=True)
class UpsamplerTraining:
    """What is trained, on what kind of batches.

    Attributes
    ----------
    backbone
        Path of the weights of `phaseline train backbone`.
    start
        Path of an upsampler's weights to go on from; empty: from random ones.
    tune_backbone
        Train the backbone's blocks along, its projection excepted.
    target
        ``averaged``, ``implicit`` or ``none``.
    episode_weight, map_weight
        Of the losses on generated materials, next to the target's; both 0: the target only.
    hidden
        Channels inside, and of the guidance's levels; those of `start`, where there is one.
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
    start: str = ""
    tune_backbone: bool = False
    target: Target = "averaged"
    episode_weight: float = 1.0
    map_weight: float = 1.0
    hidden: int = 32
    stride_px: int = 14
    tile_px: int = 294
    crop_px: int = 182
    materials: int = 1200
    episodes: int = 4
    scenes: int = 3
    views: int = 4
    implicit_images: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "stride_px", "materials", "scenes", "views", "implicit_images"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected a positive integer")
        for name in ("episode_weight", "map_weight"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 0 or more")
        if self.target == "none" and not self.has_episodes:
            raise UsageError("target is none, and episodes and maps have no weight: nothing is left to learn; give one of them")
        if self.tune_backbone and self.target != "none":
            raise UsageError(f"the backbone is to be tuned, but target is {self.target}, which is made of the backbone's own "
                             "features; use --target none")
        if self.crop_px % self.stride_px or self.tile_px % self.stride_px or self.crop_px > self.tile_px:
            raise UsageError(f"crop is {self.crop_px}, expected a multiple of the stride, {self.stride_px}, of at most "
                             f"{self.tile_px}")

    @property
    def has_episodes(self) -> bool:
        """Whether generated materials are needed."""
        return bool(self.episode_weight or self.map_weight)


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
        self._backbone.vit.requires_grad_(training.tune_backbone).to(device)
        self._projection = projection.to(device)
        self._tile_grid = grid_of(training.tile_px, self._backbone.patch_px, training.stride_px)
        self._fine_px = training.stride_px // 2
        channels = len(projection)
        self.settings: dict[str, Any] = {**dataclasses.asdict(training), "backbone": digest}
        self.network = self._started() if training.start else self._random(channels)
        # Twice as fast on CPUs as channel after channel.
        self.network.to(device).to(memory_format=torch.channels_last).train()
        self._readout = nn.Conv2d(channels, MAPS, 1).to(device)
        self._map_weights = torch.tensor(WEIGHTS, device=device).view(1, -1, 1, 1)
        self._temperature = nn.ParameterDict({"value": nn.Parameter(torch.tensor(6.0, device=device))})

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
        """All that is trained; ``network`` is kept, and ``vit`` if it is tuned."""
        tuned = {"vit": self._backbone.vit} if self.training.tune_backbone else {}
        return {"network": self.network, "readout": self._readout, "temperature": self._temperature, **tuned}

    def loss(self, random: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of one batch; logs each loss and the share of pixels labelled rightly."""
        training = self.training
        crops, target = self._targets_of(random)
        count, drawn = len(crops), list[Episode]()
        if training.has_episodes:
            drawn = [draw_episode(self._pool, training.crop_px, random) for _ in range(training.episodes)]
            crops = torch.cat([crops, self._tensor(np.concatenate([episode.images for episode in drawn]))])
        found = self._pixel_features(crops, random) * (self.network.config.feature_scale or 1.0)
        total, values = torch.zeros((), device=self._device), dict[str, float]()
        if count:
            target = target * (self.network.config.feature_scale or 1.0)
            covered = torch.isfinite(target)
            total = total + nn.functional.smooth_l1_loss(found[:count][covered], target[covered])
            values["target"] = float(total.detach())
        if training.map_weight:
            known = torch.from_numpy(np.concatenate([episode.maps for episode in drawn if episode.maps is not None]))
            maps = ((self._readout(found[count:]) - known.to(self._device)).square() * self._map_weights).mean()
            total = total + training.map_weight * maps
            values["maps"] = float(maps.detach())
        if training.episode_weight:
            episodes, right = self._episodes(found[count:], np.stack([episode.phases for episode in drawn]), random)
            total = total + training.episode_weight * episodes
            values |= {"episodes": float(episodes.detach()), "right": float(right)}
        return total, values

    @property
    def architecture(self) -> str:
        """The backbone's name."""
        return self._backbone.name

    def backbone_state(self) -> dict[str, torch.Tensor]:
        """The backbone as it is now: timm's tensors, and ``projection.weight`` of shape (k, D)."""
        return {**self._backbone.vit.state_dict(), PROJECTION: self._projection}

    def finish(self) -> None:
        """Turn the channels onto their principal axes, over crops of generated materials, or of micrographs."""
        training, random = self.training, np.random.default_rng([self.training.seed, 4])
        self.network.eval()
        rows = []
        for _ in range(_AXES_BATCHES):
            crops = (draw_episode(self._pool, training.crop_px, random).images if training.has_episodes
                     else np.stack(self._scenes(2, random)))
            with torch.no_grad():
                found = self._pixel_features(self._tensor(crops), random)
            rows.append(found[:, :, ::4, ::4].permute(0, 2, 3, 1).flatten(0, 2).double().cpu())
        turn_onto_axes(self.network, torch.cat(rows))

    def _targets_of(self, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops of micrographs, and what their pixel features are to equal; none without a target."""
        side = self.training.crop_px
        match self.training.target:
            case "averaged":
                return self._averaged(random)
            case "implicit":
                return self._implicit(random)
            case "none":
                channels = self.network.config.n_ch_out
                return (torch.zeros(0, 1, side, side, device=self._device),
                        torch.zeros(0, channels, side, side, device=self._device))
            case _:
                assert_never(self.training.target)

    def _tensor(self, crops: F32) -> torch.Tensor:
        return torch.from_numpy(crops)[:, None].to(self._device)

    def _low_res(self, crops: torch.Tensor, stride_px: int, at: tuple[int, int]) -> torch.Tensor:
        """Projected tokens, with a gradient only if the backbone is tuned."""
        grid = grid_of(self.training.tile_px, self._backbone.patch_px, stride_px)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training.tune_backbone):
            tokens = token_maps(self._backbone, crops, stride_px, grid, at)
            return torch.einsum("ndhw,kd->nkhw", tokens, self._projection)

    def _pixel_features(self, crops: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        room = self._tile_grid - crops.shape[2] // self.training.stride_px
        row, col = (int(start) for start in random.integers(0, room + 1, 2))
        low_res = self._low_res(crops, self.training.stride_px, (row, col))
        # Levels as the graph sees them: 8 bits.
        return self.network.pixel_features(crops * 255, low_res.contiguous(memory_format=torch.channels_last))

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
        pixels = np.stack([draw_pixels(field, _SUPPORT + _QUERIES, _MARGIN_PX, random) for field in fields])
        labels = np.take_along_axis(fields.reshape(len(fields), -1), pixels, axis=1).astype(np.int64)
        where = torch.from_numpy(pixels).to(self._device)[:, None].expand(-1, maps.shape[1], -1)
        features = maps.flatten(2).gather(2, where).transpose(1, 2)
        truth = torch.from_numpy(labels).to(self._device)
        features, truth = (x.reshape(len(phases), -1, *x.shape[1:]) for x in (features, truth))
        return episode_loss(features[:, 0, :_SUPPORT], truth[:, 0, :_SUPPORT],
                            torch.cat([features[:, 0, _SUPPORT:], features[:, 1]], dim=1),
                            torch.cat([truth[:, 0, _SUPPORT:], truth[:, 1]], dim=1), MAX_PHASES, self._temperature["value"])

    def _random(self, channels: int) -> Upsampler:
        hidden = self.training.hidden
        network = Upsampler(UpsamplerConfig(
            name=f"phaseline-{channels}", n_ch_in=channels, n_ch_hidden=hidden, n_ch_out=channels, n_ch_downsampler=hidden,
            patch_size=self.training.stride_px, feature_scale=self._measured_scale(), guidance="standardised"))
        _initialise(network)
        return network

    def _started(self) -> Upsampler:
        training = self.training
        network = load_upsampler(training.start)
        config, channels = network.config, len(self._projection)
        self.settings |= {"start": describe_file(Path(training.start)).sha256, "hidden": config.n_ch_hidden}
        if (config.n_ch_in, config.n_ch_out, config.patch_size) != (channels, channels, training.stride_px):
            raise UsageError(f"{training.start} takes {config.n_ch_in} channels of patches of {config.patch_size} px and gives "
                             f"{config.n_ch_out}, expected {channels} and {training.stride_px}, as {training.backbone} has")
        return network

    def _measured_scale(self) -> float:
        """One over the deviation of patch features, so that they enter and leave the network at about 1."""
        scenes = self._tensor(np.stack(self._scenes(_SCALE_BATCH, np.random.default_rng([self.training.seed, 3]))))
        with torch.no_grad():
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


def turn_onto_axes(network: Upsampler, features: torch.Tensor) -> None:
    """Rotate a network's channels onto the principal axes of its features, the most varying first.

    Parameters
    ----------
    network
        Its last convolution is changed.
    features
        float64 tensor of shape (pixels, n_ch_out): what it gives.
    """
    axes = torch.linalg.eigh(torch.cov(features.T)).eigenvectors.flip(1).T
    # An axis has no sign of its own: its largest entry is made positive.
    largest = axes.abs().argmax(dim=1, keepdim=True)
    axes = axes * axes.gather(1, largest).sign()
    last = network.upsampler.mlp
    assert last.bias is not None
    with torch.no_grad():
        last.weight.copy_((axes @ last.weight[:, :, 0, 0].double().cpu())[:, :, None, None])
        last.bias.copy_(axes @ last.bias.double().cpu())


def _initialise(network: Upsampler) -> None:
    """Kernels for LeakyReLU."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, a=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.normal_(network.upsampler.mlp.weight, std=network.upsampler.mlp.in_channels**-0.5)
