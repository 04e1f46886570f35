"""Stand-ins that need no engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Self

import numpy as np

from phaseline.runtime.contract import F16, U8, BundleFile, BundleSpec
from phaseline.runtime.source import in_batches


def make_spec(**changes: object) -> BundleSpec:
    """A small valid specification."""
    values: dict[str, object] = {
        "backbone": "fake", "weights": "random:0", "trained": False, "in_channels": 1, "patch_px": 8, "stride_px": 4,
        "tile_px": 64, "embed_dim": 16, "channels": 3, "heads": 2, "precision": "fp32", "max_batch": 4,
        "graphs": {"cpu": "cpu.onnx"}, "files": {"cpu.onnx": BundleFile("0" * 64, 1)},
    }
    return BundleSpec(**{**values, **changes})  # type: ignore[arg-type]


WITH_UPSAMPLER: dict[str, object] = {
    "pixel_graphs": {"cpu": "cpu_pixels.onnx"}, "pixel_channels": 2, "card": "card.md",
    "upsampler": {"name": "fake", "weights": "file:fake.pth", "trained": True, "hidden": 4},
    "files": {name: BundleFile("0" * 64, 1) for name in ("cpu.onnx", "cpu_pixels.onnx", "card.md")},
}
"""Changes for `make_spec`."""


class FakeSource:
    """Each patch's mean, horizontal slope and vertical slope: features that follow shifts and flips as a ViT's do.

    Pixel features, with `WITH_UPSAMPLER`: each pixel's value, and that of the pixel below. `calls` keeps the size of each batch.
    """

    def __init__(self, **changes: object) -> None:
        self.spec = make_spec(**changes)
        self.bundle_hash = self.spec.digest()
        self.engine_choice = "fake"
        self.calls: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def patch_features(self, tiles: U8) -> F16:
        self.calls.append(len(tiles))
        patch, stride = self.spec.patch_px, self.spec.stride_px
        windows = np.lib.stride_tricks.sliding_window_view(tiles.mean(axis=1), (patch, patch), axis=(1, 2))
        patches = windows[:, ::stride, ::stride]
        ramp = np.linspace(-1, 1, patch)
        features = [patches.mean(axis=(3, 4)), (patches * ramp).mean(axis=(3, 4)), (patches * ramp[:, None]).mean(axis=(3, 4))]
        return np.stack(features, axis=1).astype(np.float16)

    def iter_patch_features(self, tiles: Iterable[U8]) -> Iterator[F16]:
        return in_batches(self.patch_features, tiles, self.spec.max_batch)

    def pixel_features(self, tiles: U8) -> F16:
        self.calls.append(len(tiles))
        grey = tiles.mean(axis=1)
        return np.stack([grey, np.roll(grey, -1, axis=1)], axis=1).astype(np.float16)

    def iter_pixel_features(self, tiles: Iterable[U8]) -> Iterator[F16]:
        return in_batches(self.pixel_features, tiles, self.spec.max_batch)

    def attention(self, tiles: U8) -> F16:
        return np.full((len(tiles), self.spec.heads, self.spec.grid, self.spec.grid), 0.5, np.float16)
