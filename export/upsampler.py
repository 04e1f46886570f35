"""The convolutional upsampler of arXiv 2508.21529 (§3.1, S2): patch features and the image → features of every pixel.

    image ─▶ guidance: n levels of max-pool 2, DoubleConv, and beside the result the image resized to its size
                 │ coarsest first
                 ▼
    patch ─▶ DoubleConv (5×5) ─▶ n × [resize to the guidance, concatenate, DoubleConv, ×2, conv] ─▶ 3×3 ─▶ 1×1 ─▶ resize
    features                                                                                        to the image's size

with n = ceil(log2(patch)) levels. Names and shapes of the parameters are those of the authors' published checkpoints.

A numeric trap: the published guidance is the image in *0–255*, normalised with ImageNet's mean and deviation *for 0–1*, in
training and use alike; the backbone takes 0–1. Ours is standardised instead: relative to the tile's own mean and deviation, so
that a brighter field of view has the same features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from phaseline.export.backbone import IMAGENET_MEAN, IMAGENET_STD
from phaseline.runtime.errors import UsageError

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES: tuple[PaddingMode, ...] = get_args(PaddingMode)
Guide = Literal["published", "standardised"]
GUIDES: tuple[Guide, ...] = get_args(Guide)
SLOPE = 0.01
GUIDANCE_RANGE = 5.0
"""Standardised pixels are clipped to ± this many deviations."""


@dataclass(frozen=True)
class UpsamplerConfig:
    """Sizes of an upsampler: the published checkpoints' keys, and `feature_scale`.

    Attributes
    ----------
    name
        Of the checkpoint.
    k
        Kernel size of the Ups' convolutions.
    n_ch_in, n_ch_hidden, n_ch_out
        Channels of the patch features, inside, and of the pixel features. Hidden −1: as many as go in.
    n_ch_guidance
        Channels of the image; 3.
    n_ch_downsampler
        Channels of a guidance level, next to the image's.
    feat_weight
        At most 0: published networks don't add the patch features again in the first Ups.
    patch_size
        Pixels between patch features.
    padding_mode
        Of the convolutions: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
    weights_init
        How training began; says nothing about the network.
    feature_scale
        None: patch features enter L1-normalised over their channels, and pixel features come out so (published). A number:
        patch features are multiplied by it on the way in and pixel features divided by it, so that both are on one scale.
    guidance
        How the image enters: ``published`` (0–255, normalised with ImageNet's mean and deviation for 0–1), or ``standardised``
        (see `standardised`).
    """

    name: str
    k: int = 3
    n_ch_in: int = 128
    n_ch_hidden: int = -1
    n_ch_out: int = 128
    n_ch_guidance: int = 3
    n_ch_downsampler: int = 64
    feat_weight: float = -1
    patch_size: int = 14
    padding_mode: PaddingMode = "replicate"
    weights_init: str = "default"
    feature_scale: float | None = None
    guidance: Guide = "published"

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise UsageError(f"upsampler: {name} is {getattr(self, name)!r}, expected {expected}")

        for name in ("n_ch_in", "n_ch_out", "n_ch_downsampler"):
            check(_positive(getattr(self, name)), name, "a positive integer")
        check(self.n_ch_hidden == -1 or _positive(self.n_ch_hidden), "n_ch_hidden", "a positive integer, or -1 for n_ch_in")
        check(_positive(self.k) and self.k % 2 == 1, "k", "an odd kernel size")
        check(self.n_ch_guidance == 3, "n_ch_guidance", "3 (grey images are repeated)")
        check(_positive(self.patch_size) and self.patch_size > 1, "patch_size", "an integer of at least 2")
        check(self.padding_mode in PADDING_MODES, "padding_mode", f"one of {', '.join(PADDING_MODES)}")
        check(self.feat_weight <= 0, "feat_weight", "0 or less: adding patch features again is not implemented")
        check(self.guidance in GUIDES, "guidance", f"one of {', '.join(GUIDES)}")
        check(self.feature_scale is None or 0 < self.feature_scale < math.inf, "feature_scale", "a positive number, or none")

    @property
    def levels(self) -> int:
        """Ups, and as many guidance levels: ceil(log2(patch_size))."""
        return math.ceil(math.log2(self.patch_size))

    @property
    def widths(self) -> list[int]:
        """Channels after `inp_conv` and after each Up: linear between hidden and output where input and output differ."""
        hidden = self.n_ch_in if self.n_ch_hidden == -1 else self.n_ch_hidden
        if self.n_ch_in == self.n_ch_out:
            return [hidden] * (1 + self.levels)
        # Both ends are among the Ups' widths, rounded down in between.
        steps = max(self.levels - 1, 1)
        return [hidden, *(int(hidden + (self.n_ch_out - hidden) * i / steps) for i in range(self.levels))]


def standardised(image_0_255: torch.Tensor) -> torch.Tensor:
    """Pixels relative to their tile: (x − mean) / deviation, clipped to ± `GUIDANCE_RANGE`; deviations are at least 1 level.

    Sums are products with ones, since engines split a ReduceSum differently in batches of different sizes.

    Parameters
    ----------
    image_0_255
        float tensor of shape (n, channels, rows, cols), range 0–255. Mean and deviation are those of all channels together.
    """
    channels, rows, cols = image_0_255.shape[1:]
    left = torch.full((1, channels * rows), 1 / (channels * rows), dtype=image_0_255.dtype, device=image_0_255.device)
    right = torch.full((cols, 1), 1 / cols, dtype=image_0_255.dtype, device=image_0_255.device)
    flat = image_0_255.flatten(1, 2)
    centred = flat - left @ (flat @ right)
    variance = left @ ((centred * centred) @ right)
    relative: torch.Tensor = (centred / variance.clamp(min=1.0).sqrt()).clamp(-GUIDANCE_RANGE, GUIDANCE_RANGE)
    return relative.reshape(-1, channels, rows, cols)


class DoubleConv(nn.Module):
    """Twice: convolution, batch norm, LeakyReLU."""

    def __init__(self, entering: int, between: int, leaving: int, kernel: int, padding: PaddingMode) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(entering, between, kernel, padding=kernel // 2, padding_mode=padding),
            nn.BatchNorm2d(between), nn.LeakyReLU(SLOPE),
            nn.Conv2d(between, leaving, kernel, padding=kernel // 2, padding_mode=padding, bias=False),
            nn.BatchNorm2d(leaving), nn.LeakyReLU(SLOPE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, entering, h, w) → (n, leaving, h, w)."""
        out: torch.Tensor = self.double_conv(x)
        return out


class Down(nn.Module):
    """Max-pool 2, DoubleConv."""

    def __init__(self, entering: int, leaving: int, padding: PaddingMode) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(entering, leaving, leaving, 3, padding))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, entering, h, w) → (n, leaving, h // 2, w // 2)."""
        out: torch.Tensor = self.maxpool_conv(x)
        return out


class Up(nn.Module):
    """DoubleConv, bilinear ×2 with aligned corners, convolution."""

    def __init__(self, entering: int, leaving: int, kernel: int, padding: PaddingMode) -> None:
        super().__init__()
        self.conv = DoubleConv(entering, entering, leaving, kernel, padding)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                                nn.Conv2d(leaving, leaving, kernel, padding=kernel // 2, padding_mode=padding))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, entering, h, w) → (n, leaving, 2h, 2w)."""
        out: torch.Tensor = self.up(self.conv(x))
        return out


class Guidance(nn.Module):
    """The learned downsampler: the image at every level, with features of what is around."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        deeper = config.n_ch_downsampler + config.n_ch_guidance
        self.patch = config.patch_size
        self.downsample_layers = nn.ModuleList(
            Down(deeper if level else config.n_ch_guidance, config.n_ch_downsampler, config.padding_mode)
            for level in range(config.levels))

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Normalised image (n, 3, H, W) → levels (n, downsampler + 3, …) of H // patch, H / 2ⁿ⁻¹, …, H / 2 rows."""
        levels, level = [], image
        for layer in self.downsample_layers:
            features = layer(level)
            level = torch.cat([features, functional.interpolate(image, features.shape[2:])], dim=1)
            levels.append(level)
        cells = (image.shape[2] // self.patch, image.shape[3] // self.patch)
        levels[-1] = functional.interpolate(levels[-1], cells)
        return levels[::-1]


class GuidedUps(nn.Module):
    """From patch features, through the guidance's levels, to the pixel features at twice the finest level's size."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        guidance, widths, padding = config.n_ch_downsampler + config.n_ch_guidance, config.widths, config.padding_mode
        self.inp_conv = DoubleConv(config.n_ch_in, widths[0], widths[0], 5, padding)
        self.upsamples = nn.ModuleList(Up(widths[i] + guidance, widths[i + 1], config.k, padding) for i in range(config.levels))
        self.outp_conv = nn.Conv2d(widths[-1], config.n_ch_out, 3, padding=1, padding_mode=padding)
        self.mlp = nn.Conv2d(config.n_ch_out, config.n_ch_out, 1)

    def forward(self, low_res: torch.Tensor, guidance: list[torch.Tensor]) -> torch.Tensor:
        """Patch features (n, n_ch_in, h, w) and the levels of `Guidance` → (n, n_ch_out, 2 (H // 2), 2 (W // 2))."""
        x = self.inp_conv(low_res)
        for layer, level in zip(self.upsamples, guidance, strict=True):
            x = layer(torch.cat([functional.interpolate(x, level.shape[2:]), level], dim=1))
        out: torch.Tensor = self.mlp(self.outp_conv(x))
        return out


class Upsampler(nn.Module):
    """The network. Trainable; batch norms are live in training mode.

    Parameters
    ----------
    config
        Its sizes.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        self.downsampler = Guidance(config)
        self.upsampler = GuidedUps(config)
        # Not among the published parameters.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, image_0_255: torch.Tensor, low_res: torch.Tensor) -> torch.Tensor:
        """Features of every pixel.

        Parameters
        ----------
        image_0_255
            float tensor of shape (n, 3, H, W), or (n, 1, H, W) for grey, range 0–255; H and W of at least 2ⁿ for n levels.
        low_res
            float tensor of shape (n, n_ch_in, h, w), from `normalised`. Any h and w: it is resized, by nearest neighbour, to
            (H // patch, W // patch).

        Returns
        -------
        float tensor of shape (n, n_ch_out, H, W), on the scale of `low_res`.
        """
        image = self.guide(image_0_255).expand(-1, 3, -1, -1)
        # Channels last all the way: twice as fast in training on CPUs.
        guidance = self.downsampler(image.contiguous(memory_format=torch.channels_last))
        return functional.interpolate(self.upsampler(low_res, guidance), image_0_255.shape[2:])

    def guide(self, image_0_255: torch.Tensor) -> torch.Tensor:
        """Pixels (n, 1 or 3, H, W) of 0–255 as the guidance sees them, of the same shape or with 3 channels."""
        if self.config.guidance == "standardised":
            return standardised(image_0_255)
        return (image_0_255.expand(-1, 3, -1, -1) - self.mean) / self.std

    def normalised(self, features: torch.Tensor) -> torch.Tensor:
        """Patch features (n, n_ch_in, h, w) as `forward` takes them: L1-normalised, or times `feature_scale`."""
        if self.config.feature_scale is None:
            return functional.normalize(features, p=1.0, dim=1)
        return features * self.config.feature_scale

    def pixel_features(self, image_0_255: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """`forward` of patch features as they are; with a `feature_scale`, the result is on their scale."""
        out: torch.Tensor = self(image_0_255, self.normalised(features))
        return out if self.config.feature_scale is None else out / self.config.feature_scale


def _positive(value: object) -> bool:
    return isinstance(value, int) and value >= 1
