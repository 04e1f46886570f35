"""The module that is traced for pixel features: backbone, projection and upsampler in one graph.

    tiles ─┬─▶ StridedViT ─▶ float16 and back ─▶ onto the guidance's cells ─▶ normalised ─▶ Ups ─▶ pixel_features
           └─▶ guidance levels (the normalisation of pixels is folded into the convolutions) ─┘

Rounding the patch features to float16 makes this what a caller would get who upsampled those that the other graph gives him.

Tokens onto cells: the upsampler counts T // s cells of s px, and token i is centred at i·s + P/2. With s < P there are fewer
tokens than cells; cells take from the tokens around their centre, linearly, and at the border the nearest.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from phaseline.export.strided import StridedViT
from phaseline.export.upsampler import GUIDANCE_RANGE, SLOPE, DoubleConv, Down, Up, Upsampler, standardised
from phaseline.runtime.errors import UsageError
from phaseline.runtime.geometry import sampling_matrix, token_positions

# 8-bit convolutions of other numbers of channels are twice as slow in ONNX Runtime; zeros fill up.
_MULTIPLE = 4


def check_upsampler(upsampler: Upsampler, *, channels: int, stride_px: int, tile_px: int) -> None:
    """Refuse an upsampler that does not go with a bundle's patch features.

    Raises
    ------
    UsageError
        It was made for another stride or another number of channels, or the tile is too small for it.
    """
    config = upsampler.config
    if config.patch_size != stride_px:
        raise UsageError(f"stride is {stride_px}, but upsampler {config.name} takes patch features every {config.patch_size} px; "
                         f"export with --stride {config.patch_size}, or another upsampler")
    if config.n_ch_in != channels:
        raise UsageError(f"channels is {channels}, but upsampler {config.name} takes {config.n_ch_in}; export with --channels "
                         f"{config.n_ch_in}, or another upsampler")
    if tile_px < 2**config.levels:
        raise UsageError(f"tile is {tile_px}, but upsampler {config.name} halves it {config.levels} times; expected at least "
                         f"{2**config.levels}")


def cell_matrix(tile_px: int, tokens: int, patch_px: int, stride_px: int) -> torch.Tensor | None:
    """Linear operator from tokens to the upsampler's cells along one axis, (cells, tokens); None where they coincide."""
    centres = token_positions(tile_px, tokens, patch_px, stride_px, "centred")
    cells = tile_px // stride_px
    # A cell's centre lies between pixels when s is even.
    positions = np.array([np.interp(j * stride_px + stride_px / 2, np.arange(tile_px) + 0.5, centres) for j in range(cells)])
    matrix = sampling_matrix(positions, tokens, "bilinear")
    return None if cells == tokens and np.allclose(matrix, np.eye(cells)) else torch.from_numpy(matrix)


class CellFeatures(nn.Module):
    """Tiles → the patch features that callers get, in float32, on the upsampler's cells.

    Parameters
    ----------
    vit
        Backbone and projection.
    patch_px, tile_px
        P and T.
    """

    matrix: torch.Tensor | None

    def __init__(self, vit: StridedViT, *, patch_px: int, tile_px: int) -> None:
        super().__init__()
        self.vit = vit
        self.register_buffer("matrix", cell_matrix(tile_px, vit.grid, patch_px, vit.stride))

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 (n, in_channels, T, T) → float32 (n, k, T // s, T // s)."""
        features = self.vit.float_maps(tiles)[0].half().float()
        if self.matrix is None:
            return features
        return self.matrix @ (features @ self.matrix.T)


class PixelReference(nn.Module):
    """What the fused graph is verified against: the upsampler as it was trained, batch norms and all."""

    def __init__(self, cells: CellFeatures, upsampler: Upsampler) -> None:
        super().__init__()
        self.cells, self.upsampler = cells, upsampler

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 (n, in_channels, T, T) → float32 (n, k', T, T)."""
        return self.upsampler.pixel_features(tiles.float(), self.cells(tiles))


class PixelFeatures(nn.Module):
    """Tiles → pixel features, in as few and as plain operations as come out the same.

    Batch norms, the normalisation of pixels and the scale of features are folded into convolutions; the last two convolutions are
    one; nearest resizes are an edge padding or a selection of rows and columns.

    Parameters
    ----------
    cells
        Gives the features.
    upsampler
        In evaluation mode; copied, not changed.
    in_channels
        1 or 3.
    half
        Compute convolutions in float16. For tracing.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, cells: CellFeatures, upsampler: Upsampler, *, in_channels: int, half: bool = False) -> None:
        super().__init__()
        config = upsampler.config
        self.cells, self.patch, self.scale = cells, config.patch_size, config.feature_scale
        self.work_dtype = torch.float16 if half else torch.float32
        mean, std = upsampler.mean.double().flatten(), upsampler.std.double().flatten()
        self.standardised = config.guidance == "standardised"
        if self.standardised:
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        # Padding with zeros would pad normalised pixels: then they are normalised beforehand.
        self.raw = config.padding_mode != "zeros" or self.standardised
        self.image_channels = in_channels if self.raw else 3
        # Of the image as the convolutions see it.
        if self.standardised:
            self.image_range = (-GUIDANCE_RANGE, GUIDANCE_RANGE)
        else:
            self.image_range = (0.0, 255.0) if self.raw else (float((-mean / std).min()), float(((255 - mean) / std).max()))
        self.register_buffer("mean", mean.float().view(1, 3, 1, 1))
        self.register_buffer("std", std.float().view(1, 3, 1, 1))

        def convolution(layer: nn.Conv2d, norm: nn.BatchNorm2d | None, segments: list[int], *, image: bool = False
                        ) -> Convolution:
            weight, bias = fold_norm(layer, norm)
            if image and self.raw:
                weight, bias = fold_pixels(weight, bias, mean, std, in_channels)
                segments = [*segments[:-1], in_channels]
            return Convolution(widened(weight, segments), widened(bias, []), layer.padding_mode, active=norm is not None)

        def double(module: DoubleConv, segments: list[int], *, image: bool = False) -> nn.Sequential:
            one, norm, _, two, last, _ = module.double_conv
            one, norm, two, last = cast(tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d], (one, norm, two, last))
            return nn.Sequential(convolution(one, norm, segments, image=image), convolution(two, last, [two.in_channels]))

        guide, widths = [config.n_ch_downsampler, config.n_ch_guidance], config.widths
        downs = [cast(Down, layer).maxpool_conv[1] for layer in upsampler.downsampler.downsample_layers]
        self.downs = nn.ModuleList(double(cast(DoubleConv, conv), guide if level else guide[1:], image=True)
                                   for level, conv in enumerate(downs))
        ups = [cast(Up, layer) for layer in upsampler.upsampler.upsamples]
        self.mixes = nn.ModuleList(double(up.conv, [width, *guide], image=True) for up, width in zip(ups, widths, strict=False))
        self.smooths = nn.ModuleList(convolution(cast(nn.Conv2d, up.up[1]), None, [width])
                                     for up, width in zip(ups, widths[1:], strict=True))
        self.start = double(upsampler.upsampler.inp_conv, [config.n_ch_in])
        self.end = Convolution(*merge_last(upsampler, widths[-1]), config.padding_mode, active=False)
        if half:
            for part in (self.downs, self.mixes, self.smooths, self.start, self.end):
                part.half()
        self.requires_grad_(False)

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 (n, in_channels, T, T) → float16 (n, k', T, T)."""
        return self.float_map(tiles).half()

    def float_map(self, tiles: torch.Tensor) -> torch.Tensor:
        """What `forward` gives, before its last rounding to float16."""
        features = self.cells(tiles)
        if self.scale is None:
            # A product, since engines split a ReduceSum differently in batches of different sizes.
            ones = torch.ones(1, features.shape[1], dtype=features.dtype)
            total = ones @ features.abs().flatten(2)
            features = features / total.clamp(min=1e-12).unflatten(2, features.shape[2:])
        else:
            features = features * self.scale
        image = self._image(tiles)
        side = tiles.shape[2]
        x = self.start(_filled(features.to(self.work_dtype)))
        levels = self._guidance(image)
        for level, mix, smooth in zip(levels, self.mixes, self.smooths, strict=True):
            x = mix(torch.cat([nearest(x, level.shape[2]), level], dim=1))
            x = smooth(functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True))
        x = nearest(self.end(x).float(), side)
        return x if self.scale is None else x * (1 / self.scale)

    def _image(self, tiles: torch.Tensor) -> torch.Tensor:
        image = tiles.float()
        if self.standardised:
            image = standardised(image)
        elif not self.raw:
            image = (image.repeat(1, 3 // image.shape[1], 1, 1) - self.mean) / self.std
        return _filled(image.to(self.work_dtype))

    def _guidance(self, image: torch.Tensor) -> list[torch.Tensor]:
        levels, level = [], image
        for down in self.downs:
            features = down(functional.max_pool2d(level, 2))
            level = torch.cat([features, nearest(image, features.shape[2])], dim=1)
            levels.append(level)
        levels[-1] = nearest(levels[-1], image.shape[2] // self.patch)
        return levels[::-1]


class Convolution(nn.Module):
    """Convolution, same size, then LeakyReLU if `active`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, padding_mode: str, *, active: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
        self.padding_mode, self.active = padding_mode, active
        self.reach = weight.shape[-1] // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, entering, h, w) → (n, leaving, h, w)."""
        outside = 0
        if self.padding_mode == "zeros":
            outside = self.reach
        else:
            x = functional.pad(x, (self.reach,) * 4, mode=self.padding_mode)
        x = functional.conv2d(x, self.weight, self.bias, padding=outside)
        return functional.leaky_relu(x, SLOPE) if self.active else x


def nearest_indices(before: int, after: int) -> list[int]:
    """Which row each row of a nearest-neighbour resize comes from, with torch's arithmetic in float32."""
    scale = np.float32(before) / np.float32(after)
    taken = np.floor(np.arange(after, dtype=np.float32) * scale).astype(int)
    return [int(index) for index in taken.clip(max=before - 1)]


def nearest(x: torch.Tensor, side: int) -> torch.Tensor:
    """torch's nearest-neighbour resize of square maps, as an edge padding or a selection of rows and columns."""
    taken, ahead = nearest_indices(x.shape[2], side), side - x.shape[2]
    if ahead == 0:
        return x
    if taken == [max(0, index - ahead) for index in range(side)]:
        return functional.pad(x, (ahead, 0, ahead, 0), mode="replicate")
    rows = torch.tensor(taken)
    return x.index_select(2, rows).index_select(3, rows)


def fold_norm(layer: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias, float64, of a convolution with the batch norm behind it."""
    weight = layer.weight.detach().double()
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
    if norm is None:
        return weight, bias
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return weight * factor.view(-1, 1, 1, 1), (bias - norm.running_mean.double()) * factor + norm.bias.detach().double()


def fold_pixels(weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, in_channels: int
                ) -> tuple[torch.Tensor, torch.Tensor]:
    """The same convolution where the last 3 input channels are pixels of 0–255 as they are, RGB or grey (then they become 1).

    Exact where the padding repeats pixels, and max-pooling commutes with it, since deviations are positive.
    """
    rest, image = weight[:, :-3], weight[:, -3:] / std.view(1, 3, 1, 1)
    bias = bias - (image * mean.view(1, 3, 1, 1)).sum(dim=(1, 2, 3))
    return torch.cat([rest, image.sum(dim=1, keepdim=True) if in_channels == 1 else image], dim=1), bias


def merge_last(upsampler: Upsampler, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last 3×3 and 1×1 convolutions as one 3×3."""
    first, last = fold_norm(upsampler.upsampler.outp_conv, None), fold_norm(upsampler.upsampler.mlp, None)
    mix = last[0][:, :, 0, 0]
    weight = torch.einsum("om,miyx->oiyx", mix, first[0])
    filled = torch.zeros(len(weight), _rounded_up(width), *weight.shape[2:], dtype=weight.dtype)
    filled[:, :width] = weight
    return filled, mix @ first[1] + last[1]


def widened(tensor: torch.Tensor, segments: list[int]) -> torch.Tensor:
    """Rows, and each segment of the columns, filled up with zeros to a multiple of 4."""
    if segments:
        tensor = torch.cat([functional.pad(part, (0, 0, 0, 0, 0, -part.shape[1] % _MULTIPLE))
                            for part in torch.split(tensor, segments, dim=1)], dim=1)
    more = -len(tensor) % _MULTIPLE
    return torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])]) if more else tensor


def _rounded_up(count: int) -> int:
    return count + -count % _MULTIPLE


def _filled(x: torch.Tensor) -> torch.Tensor:
    more = -x.shape[1] % _MULTIPLE
    return functional.pad(x, (0, 0, 0, 0, 0, more)) if more else x
