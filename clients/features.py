"""The one road from an image to the features of its pixels, taken by fitting and by segmenting alike.

    uint8 image ─┬─▶ classical features of each colour channel ───────────────────┐
                 │                                                               ├─▶ bands of rows (channels, rows, cols)
                 └─▶ tiles ─▶ views ─▶ FeatureSource ─▶ average ─▶ blend tiles ───┘

Bands come out from top to bottom as soon as no later tile can change them, so memory grows with an image's width, not
with its height.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from phaseline.clients.classical import ClassicalFeatures
from phaseline.clients.window import to_channels
from phaseline.runtime.average import PixelSampling, ViewAverage
from phaseline.runtime.contract import F32, U8, BundleSpec, FeatureSource
from phaseline.runtime.errors import ImageError, UsageError
from phaseline.runtime.tiles import TileAxis, cut_tile
from phaseline.runtime.transforms import TransformSet

FEATURES_VERSION = 1
"""Raised whenever the same settings give other numbers: recipes of other versions are refused."""

BAND_PX = 512
"""Rows of a band when no bundle sets a tile size."""


@dataclass(frozen=True)
class DeepFeatures:
    """How a bundle's features become pixel features.

    Attributes
    ----------
    transforms
        Name of the transform set, see `TransformSet.parse`.
    overlap_px
        Pixels that neighbouring tiles share, over which they are blended.
    sampling
        Alignment, interpolation and boundary.
    """

    transforms: str = "none"
    overlap_px: int = 0
    sampling: PixelSampling = field(default_factory=PixelSampling)

    @classmethod
    def for_bundle(
        cls,
        spec: BundleSpec,
        transforms: str = "none",
        sampling: PixelSampling | None = None,
        overlap_px: int | None = None,
    ) -> Self:
        """Settings for a bundle; unless told otherwise, an upsampler is used, and tiles overlap by an eighth of their side."""
        overlap_px = spec.tile_px // 8 if overlap_px is None else overlap_px
        return cls(transforms, overlap_px, sampling or PixelSampling.for_bundle(spec))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**content, "sampling": PixelSampling(**content["sampling"])})


@dataclass(frozen=True)
class FeatureSettings:
    """Which features a pixel has. Part of the recipe.

    Attributes
    ----------
    image_channels
        1 for grey images, 3 for RGB. Classical features are computed of each channel; a bundle of one channel sees luma.
    classical
        The filter bank, or None.
    deep
        How the bundle's features are used, or None.
    """

    image_channels: int
    classical: ClassicalFeatures | None = field(default_factory=ClassicalFeatures)
    deep: DeepFeatures | None = None

    def __post_init__(self) -> None:
        if self.image_channels not in (1, 3):
            raise UsageError(f"images of {self.image_channels} channels were asked for, expected 1 (grey) or 3 (RGB)")
        if self.classical is None and self.deep is None:
            raise UsageError("neither classical nor deep features were asked for; expected at least one")

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        classical, deep = content["classical"], content["deep"]
        return cls(
            image_channels=content["image_channels"],
            classical=None if classical is None else ClassicalFeatures.from_dict(classical),
            deep=None if deep is None else DeepFeatures.from_dict(deep),
        )


def is_trained(spec: BundleSpec) -> bool:
    """Whether all of a bundle's weights are trained, its upsampler's included."""
    return spec.trained and bool(spec.upsampler.get("trained", True))


def image_channels(images: Sequence[npt.NDArray[np.generic]]) -> int:
    """Channels of a set of images.

    Parameters
    ----------
    images
        Arrays of shape (rows, cols) or (rows, cols, 3).

    Returns
    -------
    3 when any image is RGB, else 1.

    Raises
    ------
    ImageError
        An array of another shape or type, without pixels, or with NaN or infinite ones.
    """
    for image in images:
        if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)) or not image.size:
            raise ImageError(f"an image has shape {image.shape}, expected (rows, cols) or (rows, cols, 3)")
        if image.dtype.kind not in "uif":
            raise ImageError(f"an image has pixels of type {image.dtype}, expected integers or real numbers; convert it")
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise ImageError("an image has NaN or infinite pixels; replace them by real values")
    return 3 if any(image.ndim == 3 for image in images) else 1


class PixelFeatures:
    """Computes the features of an image's pixels.

    Parameters
    ----------
    settings
        Which features.
    source
        An open source; needed, and allowed, only with deep features.
    threads
        For the classical features; None: one for each core.

    Raises
    ------
    UsageError
        Deep features without a source, or the other way round; a transform set or overlap that does not fit the tile; learned
        pixel features of a bundle without upsampler.
    """

    def __init__(self, settings: FeatureSettings, source: FeatureSource | None, threads: int | None = None) -> None:
        if (settings.deep is None) != (source is None):
            raise UsageError("deep features need a bundle, and a bundle is of use only with deep features")
        self.settings = settings
        self._source = source
        self._threads = threads
        self._transforms = TransformSet.parse("none", 1)
        if source is not None and settings.deep is not None:
            self._transforms = TransformSet.parse(settings.deep.transforms, source.spec.stride_px)
            self._transforms.check_fits(source.spec.tile_px)
            TileAxis(1, source.spec.tile_px, settings.deep.overlap_px)
            settings.deep.sampling.check_bundle(source.spec)

    @property
    def names(self) -> tuple[str, ...]:
        """One for each feature, in their order."""
        names: list[str] = []
        if self.settings.classical is not None:
            colours = [""] if self.settings.image_channels == 1 else ["red ", "green ", "blue "]
            names += [colour + name for colour in colours for name in self.settings.classical.names]
        if self._source is not None and self.settings.deep is not None:
            names += [f"deep {i}" for i in range(self.settings.deep.sampling.channels(self._source.spec))]
        return tuple(names)

    def bands(self, image: U8, wanted: npt.NDArray[np.bool_] | None = None) -> Iterator[tuple[slice, F32]]:
        """Features of all pixels, band by band.

        Parameters
        ----------
        image
            uint8 array of shape (rows, cols) or (rows, cols, 3), as `image_channels` says.
        wanted
            bool array of shape (rows, cols): pixels whose features will be read; None for all. Bands without any are left
            out, and elsewhere the features of other pixels may be wrong.

        Yields
        ------
        The rows, and a float32 array of shape (features, rows, cols).
        """
        planes = np.ascontiguousarray(image[None] if image.ndim == 2 else image.transpose(2, 0, 1))
        if len(planes) != self.settings.image_channels:
            raise UsageError(f"the image has {len(planes)} channels, expected {self.settings.image_channels}")
        deep = None
        if self._source is not None and self.settings.deep is not None:
            deep = self._deep_bands(image, wanted, self._source, self.settings.deep)
        axis = self._axis(image.shape[0])
        n_features = len(self.names)
        for start, end in itertools.pairwise((*axis.starts, image.shape[0])):
            # The generator keeps the tiles' running sum, so it is advanced for bands that are left out too.
            deep_band = None if deep is None else next(deep)
            if wanted is not None and not wanted[start:end].any():
                continue
            features = np.empty((n_features, end - start, image.shape[1]), np.float32)
            if deep_band is not None:
                features[n_features - len(deep_band) :] = deep_band
            if self.settings.classical is not None:
                self._classical_band(planes, start, end, features)
            yield slice(start, end), features

    def _axis(self, length_px: int) -> TileAxis:
        if self._source is None or self.settings.deep is None:
            return TileAxis(length_px, BAND_PX, 0)
        return TileAxis(length_px, self._source.spec.tile_px, self.settings.deep.overlap_px)

    def _classical_band(self, planes: U8, start: int, end: int, out: F32) -> None:
        bank = self.settings.classical
        assert bank is not None
        top, bottom = max(start - bank.halo_px, 0), min(end + bank.halo_px, planes.shape[1])
        for i, plane in enumerate(planes):
            features = bank.compute(plane[top:bottom], threads=self._threads)
            out[i * bank.channels : (i + 1) * bank.channels] = features[:, start - top : end - top]

    def _deep_bands(
        self, image: U8, wanted: npt.NDArray[np.bool_] | None, source: FeatureSource, deep: DeepFeatures
    ) -> Iterator[F32]:
        """Blended deep features, a view of shape (channels, rows of the band, cols) for each row of tiles."""
        spec = source.spec
        seen = to_channels(image, spec.in_channels)
        planes = np.ascontiguousarray(seen[None] if seen.ndim == 2 else seen.transpose(2, 0, 1))
        rows, cols = self._axis(planes.shape[1]), self._axis(planes.shape[2])
        row_weights, col_weights = rows.weights(), cols.weights()
        total = np.zeros((deep.sampling.channels(spec), rows.size_px, cols.length_px), np.float32)
        needed = [
            [j for j, col in enumerate(cols.starts)
             if wanted is None or wanted[start : start + rows.size_px, col : col + cols.size_px].any()]
            for start in rows.starts
        ]
        # One iterator for all of the image: a remote source then works ahead, beyond the end of a row.
        starts = [(rows.starts[i], cols.starts[j]) for i, js in enumerate(needed) for j in js]
        averages = self._averages(planes, starts, source, deep)
        for i, (start, end) in enumerate(itertools.pairwise((*rows.starts, rows.length_px))):
            for j in needed[i]:
                weighted = next(averages)[:, : rows.size_px, : cols.size_px]
                weighted *= row_weights[i][:, None]
                weighted *= col_weights[j]
                total[:, :, cols.starts[j] : cols.starts[j] + cols.size_px] += weighted
            yield total[:, : end - start]
            done = end - start
            total[:, : total.shape[1] - done] = total[:, done:].copy()
            total[:, total.shape[1] - done :] = 0

    def _averages(
        self, planes: U8, starts: Sequence[tuple[int, int]], source: FeatureSource, deep: DeepFeatures
    ) -> Iterator[F32]:
        """Averaged pixel features, float32 of shape (channels, T, T), of the tiles that start at these pixels."""
        spec, sampling = source.spec, deep.sampling
        views = (
            transform.apply(tile, sampling.boundary)
            for tile in (cut_tile(planes, row, col, spec.tile_px) for row, col in starts)
            for transform in self._transforms.transforms
        )
        features = source.iter_pixel_features(views) if sampling.is_learned else source.iter_patch_features(views)
        side = (spec.tile_px, spec.tile_px)
        for _ in starts:
            average = ViewAverage(side, sampling.channels(spec), spec.patch_px, spec.stride_px, sampling)
            for transform in self._transforms.transforms:
                average.add(transform, next(features))
            yield average.mean()
