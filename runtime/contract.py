"""What the parts of phaseline promise each other: the bundle's specification and the one seam, `FeatureSource`.

    uint8 tiles (n, channels, T, T) ──▶ FeatureSource ──▶ float16 patch features (n, k, h, w)
                                                     ├──▶ float16 [CLS] attention (n, heads, h, w)
                                                     └──▶ float16 pixel features (n, k', T, T)

with h = w = 1 + (T - P) // s for patch size P and stride s. Pixel features are what the convolutional upsampler makes of
patch features and tile (arXiv 2508.21529 §3.1), in bundles that hold one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
import numpy.typing as npt

from phaseline.runtime.errors import BundleError

BUNDLE_FORMAT = 2
Precision = Literal["fp32", "fp16", "int8"]
GraphForm = Literal["cpu", "portable"]
Facet = Literal["query", "key", "value"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
FACETS: tuple[Facet, ...] = get_args(Facet)

# Names of a graph's input and outputs; facets come out under their own names.
TILES = "tiles"
PATCH_FEATURES = "patch_features"
ATTENTION = "attention"
PIXEL_FEATURES = "pixel_features"

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BundleFile:
    """A file of the bundle.

    Attributes
    ----------
    sha256
        Hash of the content, hexadecimal.
    size_bytes
        Length of the content.
    """

    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or not set(self.sha256) <= set("0123456789abcdef"):
            raise BundleError(f"bundle.json holds {self.sha256!r} where 64 hexadecimal digits were expected")


@dataclass(frozen=True)
class BundleSpec:
    """Everything that `bundle.json` says. Square tiles, square patches; lengths in pixels.

    Attributes
    ----------
    backbone
        timm's name of the architecture, or ``vit`` with its sizes, e.g. ``vit-192-8-3-p14``.
    weights
        Where they came from: ``hub``, ``random:SEED``, or ``file:NAME``.
    trained
        False for random weights; said at every use.
    in_channels
        1 (grey) or 3 (RGB).
    patch_px, stride_px, tile_px
        P, s and T.
    embed_dim
        D, channels before the projection.
    channels
        k, channels of the patch features. k = D means that there is no projection.
    heads
        Attention heads of the last block.
    precision
        ``fp32``; ``fp16``: weights stored, and on GPU engines computed with, in half precision; ``int8``: matrix products
        of the transformer blocks in 8 bits on CPUs.
    max_batch
        The most tiles in one call.
    facets
        Which of the last block's ``query``, ``key``, ``value`` come out too, float16 of shape (n, D, h, w)
        (arXiv 2112.05814 §3).
    graphs
        Form to file name. ``cpu`` uses ONNX Runtime's own operators; ``portable`` is standard ONNX for GPUs and TensorRT
        (absent from int8 bundles).
    files
        Every file of the bundle but `bundle.json`, by name.
    pixel_graphs
        Form to file name of the fused graph, tiles → pixel features: backbone, projection and upsampler. Empty without
        upsampler.
    pixel_channels
        k', channels of the pixel features; 0 without upsampler.
    upsampler
        Of the upsampler: ``name``, ``weights`` (where they came from, as above), ``trained`` (bool), ``hidden`` (channels); empty
        without.
    card
        File name of the model card; empty if there is none.
    projection
        How the frozen D→k projection was fitted: ``source``, and unless it was trained with the backbone ``images``, ``views``,
        ``tokens``, ``explained_variance``; empty if k = D.
    parity
        Deviation of the written graph from torch, measured at export: ``max_abs``, ``max_rel``, ``cosine``, for
        attention ``attention_max_abs``, and with an upsampler ``pixel_max_abs`` and ``pixel_cosine``.
    versions
        Versions of the packages that wrote it.
    """

    backbone: str
    weights: str
    trained: bool
    in_channels: int
    patch_px: int
    stride_px: int
    tile_px: int
    embed_dim: int
    channels: int
    heads: int
    precision: Precision
    max_batch: int
    graphs: Mapping[str, str]
    files: Mapping[str, BundleFile]
    facets: tuple[Facet, ...] = ()
    pixel_graphs: Mapping[str, str] = field(default_factory=dict)
    pixel_channels: int = 0
    upsampler: Mapping[str, float | int | str] = field(default_factory=dict)
    card: str = ""
    projection: Mapping[str, float | int | str] = field(default_factory=dict)
    parity: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    format: int = BUNDLE_FORMAT

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise BundleError(f"bundle.json: {name} is {getattr(self, name)!r}, expected {expected}; "
                                  "export the bundle again")

        check(self.format == BUNDLE_FORMAT, "format", f"{BUNDLE_FORMAT} (this version of phaseline reads only that)")
        check(self.in_channels in (1, 3), "in_channels", "1 or 3")
        for name in ("patch_px", "stride_px", "tile_px", "embed_dim", "channels", "heads", "max_batch"):
            value = getattr(self, name)
            check(isinstance(value, int) and value >= 1, name, "a positive integer")
        check(self.stride_px <= self.patch_px, "stride_px", f"at most the patch size, {self.patch_px}")
        check(self.tile_px >= self.patch_px and (self.tile_px - self.patch_px) % self.stride_px == 0, "tile_px",
              f"patch size plus a multiple of the stride ({self.patch_px} + n × {self.stride_px})")
        check(self.channels <= self.embed_dim, "channels", f"at most embed_dim, {self.embed_dim}")
        check(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
        check(all(f in FACETS for f in self.facets), "facets", f"some of {', '.join(FACETS)}")
        check("cpu" in self.graphs and set(self.graphs.values()) <= set(self.files), "graphs",
              "a 'cpu' graph, and only graphs that are listed in files")
        check(set(self.pixel_graphs) in (set(), set(self.graphs)) and set(self.pixel_graphs.values()) <= set(self.files),
              "pixel_graphs", "the same forms as graphs, or none, and only graphs that are listed in files")
        check((self.pixel_channels > 0) == bool(self.pixel_graphs), "pixel_channels",
              "a positive integer, or 0 without upsampler")
        check(not self.card or self.card in self.files, "card", "a file that is listed in files, or none")

    @property
    def grid(self) -> int:
        """h = w, tokens along a tile's side."""
        return 1 + (self.tile_px - self.patch_px) // self.stride_px

    @property
    def has_upsampler(self) -> bool:
        """Whether the bundle gives pixel features."""
        return bool(self.pixel_graphs)

    def digest(self) -> str:
        """Hash that names the bundle, 64 hexadecimal digits: over the whole specification, hence over every file."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def to_json(self) -> str:
        """The text of `bundle.json`."""
        return json.dumps({"hash": self.digest(), **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read `bundle.json`, and refuse one that was edited or damaged.

        Raises
        ------
        BundleError
            Not JSON, a field missing or of a wrong value, or a content that does not match its hash.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            expected_hash = content.pop("hash")
            content["files"] = {name: BundleFile(**entry) for name, entry in content["files"].items()}
            content["facets"] = tuple(content["facets"])
            spec = cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, BundleError):
                raise
            raise BundleError(f"bundle.json cannot be understood ({error!r}); export the bundle again") from error
        if spec.digest() != expected_hash:
            raise BundleError("bundle.json does not match its own hash: it was edited or damaged; export the bundle again")
        return spec


class FeatureSource(Protocol):
    """Array in, array out. Local, remote and fake sources interchange; all are used inside ``with``."""

    @property
    def spec(self) -> BundleSpec:
        """What the source computes."""
        ...

    @property
    def bundle_hash(self) -> str:
        """Digest of the bundle behind it."""
        ...

    def patch_features(self, tiles: U8) -> F16:
        """Projected patch features.

        Parameters
        ----------
        tiles
            uint8 array of shape (n, in_channels, T, T), any n ≥ 1; the source splits batches above `max_batch`.

        Returns
        -------
        float16 array of shape (n, k, h, w).
        """
        ...

    def iter_patch_features(self, tiles: Iterable[U8]) -> Iterator[F16]:
        """Projected patch features of tiles that are made as they are wanted.

        Parameters
        ----------
        tiles
            uint8 arrays of shape (in_channels, T, T). The source takes a bounded number of them ahead: as many as it works on at
            once.

        Yields
        ------
        float16 array of shape (k, h, w) for each tile, in their order.
        """
        ...

    def pixel_features(self, tiles: U8) -> F16:
        """Features of every pixel, by the bundle's upsampler.

        Parameters
        ----------
        tiles
            As `patch_features`.

        Returns
        -------
        float16 array of shape (n, k', T, T).

        Raises
        ------
        UsageError
            The bundle has no upsampler.
        """
        ...

    def iter_pixel_features(self, tiles: Iterable[U8]) -> Iterator[F16]:
        """As `iter_patch_features`: float16 array of shape (k', T, T) for each tile."""
        ...

    def attention(self, tiles: U8) -> F16:
        """[CLS] attention of the last block: float16 array of shape (n, heads, h, w), each head summing to at most 1."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...
