"""From a backbone's name to a verified bundle on disk: the whole road of an export.

    backbone ─▶ weights ─▶ projection ─▶ upsampler ─▶ trace ─▶ write ─▶ verify ─▶ rename into place
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from phaseline.export import calibration, int8, onnx_file, verify
from phaseline.export.backbone import Backbone
from phaseline.export.forms import Parts, forms_of, pixel_name, trace_forms
from phaseline.export.pixel import check_upsampler
from phaseline.export.projection import Projection, fit_projection
from phaseline.export.upsampler import Upsampler
from phaseline.export.upsampler_weights import create_upsampler, first_channels
from phaseline.export.weights import load_backbone, trained_projection
from phaseline.runtime.bundle import MANIFEST, Bundle, describe_file, open_bundle
from phaseline.runtime.contract import (
    ATTENTION,
    FACETS,
    PATCH_FEATURES,
    PIXEL_FEATURES,
    PRECISIONS,
    U8,
    BundleSpec,
    Facet,
    Precision,
)
from phaseline.runtime.errors import MissingInputError, UsageError
from phaseline.runtime.output import check_folder, new_folder

CARD = "MODEL_CARD.md"
Facts = dict[str, float | int | str]
_PACKAGES = ("phaseline", "torch", "timm", "onnx-ir", "onnxruntime", "numpy")


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes
    ----------
    backbone
        timm's name of a ViT, or sizes such as ``vit-192-8-3-p14``.
    weights
        ``hub``, ``random:SEED``, or the path of a safetensors or .pth file.
    stride_px, tile_px
        s and T; T = P + n·s.
    channels
        k; the backbone's width for no projection.
    in_channels
        1 (grey) or 3 (RGB).
    precision
        ``fp32``, ``fp16`` or ``int8``.
    upsampler
        Path of an upsampler's checkpoint, ``random:SEED``, or None for a bundle without pixel features.
    pixel_channels
        How many pixel features, the first ones; None for all that the upsampler has.
    card
        Markdown file to go into the bundle as its model card.
    facets
        Which of the last block's ``query``, ``key``, ``value`` come out too.
    max_batch
        The most tiles in one call; int8 bundles always take one.
    calibration
        Folder of images to fit the projection on and to verify with; None for scikit-image's.
    tolerance
        Largest deviation from torch relative to the output's scale; None for the precision's own.
    """

    backbone: str
    weights: str = "hub"
    stride_px: int = 7
    tile_px: int = 518
    channels: int = 32
    in_channels: int = 1
    precision: Precision = "fp32"
    upsampler: str | None = None
    pixel_channels: int | None = None
    card: Path | None = None
    facets: tuple[Facet, ...] = ()
    max_batch: int = 8
    calibration: Path | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise UsageError(f"{name.replace('_px', '')} is {getattr(self, name)!r}, expected {expected}")

        for name in ("stride_px", "tile_px", "channels", "max_batch"):
            check(getattr(self, name) >= 1, name, "a positive integer")
        check(self.in_channels in (1, 3), "in_channels", "1 (grey) or 3 (RGB)")
        check(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
        check(set(self.facets) <= set(FACETS) and len(set(self.facets)) == len(self.facets), "facets",
              f"some of {', '.join(FACETS)}, each once")
        check(self.pixel_channels is None or (self.upsampler is not None and self.pixel_channels >= 1), "pixel_channels",
              "a positive integer, and an upsampler")
        check(self.tolerance is None or self.tolerance >= 0, "tolerance", "0 or more")


def write_bundle(options: ExportOptions, out: Path, *, overwrite: bool = False,
                 say: Callable[[str], None] = lambda line: None) -> Bundle:
    """Export, verify, and write a bundle. Until everything is verified nothing lies at `out`.

    Parameters
    ----------
    options
        What to export.
    out
        Folder to create.
    overwrite
        Replace a folder that exists.
    say
        Receives lines of progress and of measured deviations.

    Raises
    ------
    UsageError, OutputExistsError, MissingInputError
        Asked for wrongly.
    ExportError, WeightsError, ParityError
        The backbone cannot be exported, its weights do not fit, or a graph deviates from torch.
    OutputError
        `out` cannot be written.
    """
    check_folder(out, overwrite, MANIFEST)
    card = _read_card(options.card)
    images = calibration.load_images(options.calibration, options.in_channels)
    backbone, source, trained = load_backbone(options.backbone, options.weights)
    _check_geometry(options, backbone)
    if not trained:
        say(f"{options.backbone} has random weights: the bundle is marked untrained")
    upsampler, upsampler_facts = _load_upsampler(options, say)

    parts = Parts(backbone, None, upsampler, options.stride_px, options.tile_px, options.in_channels, options.facets)
    views = [view for image in images for view in calibration.views_of(image, options.tile_px)]
    projection, facts = _fit(options, parts, views, len(images), say)
    parts = dataclasses.replace(parts, projection=projection)
    max_batch = int8.MAX_BATCH if options.precision == "int8" else options.max_batch
    models = trace_forms(parts, options.precision, max_batch, views, say)
    with new_folder(out, overwrite, MANIFEST) as folder:
        files = onnx_file.write_graphs(models, folder)
        if card:
            (folder / CARD).write_text(card, encoding="utf-8")
        comparisons = _compare(parts, options, folder, files, views[::len(calibration.VIEWS)], max_batch)
        for comparison in comparisons:
            say(str(comparison))
        verify.judge(comparisons, options.precision, options.tolerance)
        forms = forms_of(options.precision)
        pixel_channels = 0 if upsampler is None else upsampler.upsampler.mlp.out_channels
        spec = BundleSpec(
            backbone=options.backbone, weights=source, trained=trained, in_channels=options.in_channels,
            patch_px=backbone.patch_px, stride_px=options.stride_px, tile_px=options.tile_px,
            embed_dim=backbone.embed_dim, channels=options.channels, heads=backbone.heads, precision=options.precision,
            max_batch=max_batch, graphs={form: files[form] for form in forms},
            files={f.name: describe_file(f) for f in sorted(folder.iterdir())}, facets=options.facets,
            pixel_graphs={form: files[pixel_name(form)] for form in forms} if upsampler is not None else {},
            pixel_channels=pixel_channels, upsampler=upsampler_facts, card=CARD if card else "", projection=facts,
            parity=verify.parity_numbers(comparisons), versions={name: metadata.version(name) for name in _PACKAGES})
        (folder / MANIFEST).write_text(spec.to_json(), encoding="utf-8")
    bundle = open_bundle(out)
    size = sum(f.size_bytes for f in spec.files.values()) / 1e6
    say(f"wrote {out}, {size:.1f} MB, {bundle.hash[:12]}")
    return bundle


def nearest_tiles(tile_px: int, patch_px: int, stride_px: int) -> tuple[int, int]:
    """The nearest valid tile sizes P + n·s at or below, and above, `tile_px`."""
    steps = max(0, (tile_px - patch_px) // stride_px)
    return patch_px + steps * stride_px, patch_px + (steps + 1) * stride_px


def _check_geometry(options: ExportOptions, backbone: Backbone) -> None:
    patch, stride, tile = backbone.patch_px, options.stride_px, options.tile_px
    if stride > patch:
        raise UsageError(f"stride {stride} leaves gaps between the patches of {options.backbone}; expected at most "
                         f"{patch}, their side")
    if tile < patch or (tile - patch) % stride:
        below, above = nearest_tiles(tile, patch, stride)
        raise UsageError(f"tile {tile} cannot be covered by patches of {patch} px at stride {stride}; the nearest "
                         f"sizes that can are {below} and {above}")
    if options.channels > backbone.embed_dim:
        raise UsageError(f"channels is {options.channels}, expected at most the width of {options.backbone}, "
                         f"{backbone.embed_dim} (which means no projection)")


def _read_card(path: Path | None) -> str:
    if path is None:
        return ""
    if not path.is_file():
        raise MissingInputError(f"no model card at {path}; expected a Markdown file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"model card {path} is not UTF-8 text ({error}); expected a Markdown file") from error
    if not text.strip():
        raise UsageError(f"model card {path} is empty; expected a Markdown file")
    return text


def _load_upsampler(options: ExportOptions, say: Callable[[str], None]) -> tuple[Upsampler | None, Facts]:
    if options.upsampler is None:
        return None, {}
    upsampler, source, trained = create_upsampler(options.upsampler, channels=options.channels, patch_px=options.stride_px)
    check_upsampler(upsampler, channels=options.channels, stride_px=options.stride_px, tile_px=options.tile_px)
    if options.pixel_channels is not None:
        upsampler = first_channels(upsampler, options.pixel_channels)
    if not trained:
        say("the upsampler has random weights: it is marked untrained")
    config = upsampler.config
    return upsampler, {"name": config.name, "weights": source, "trained": trained, "hidden": config.widths[0]}


def _fit(options: ExportOptions, parts: Parts, views: Sequence[U8], images: int, say: Callable[[str], None]
         ) -> tuple[Projection | None, Facts]:
    dim = parts.backbone.embed_dim
    if options.channels == dim:
        return None, {}
    weight = trained_projection(options.weights)
    if weight is not None and len(weight) == options.channels:
        say(f"taking the projection {dim} → {options.channels} that was trained with the backbone")
        return Projection.trained(weight), {"source": "trained with the backbone"}
    module = dataclasses.replace(parts, facets=()).patch_module()
    say(f"fitting the projection {dim} → {options.channels} on {images} images in {len(calibration.VIEWS)} views")

    def tokens() -> Iterator[npt.NDArray[np.float32]]:
        for tile in views:
            with torch.inference_mode():
                features = module.float_maps(torch.from_numpy(tile))[0]
            yield features[0].flatten(1).T.numpy()

    projection = fit_projection(tokens(), dim, options.channels)
    say(f"{options.channels} channels hold {projection.explained_variance:.1%} of the variance of "
        f"{projection.tokens} tokens")
    source = "scikit-image" if options.calibration is None else "folder"
    return projection, {"source": source, "images": images, "views": len(calibration.VIEWS),
                        "tokens": projection.tokens, "explained_variance": projection.explained_variance}


def _compare(parts: Parts, options: ExportOptions, folder: Path, files: Mapping[str, str], tiles: Sequence[U8], max_batch: int
             ) -> list[verify.Comparison]:
    forms = forms_of(options.precision)
    found = verify.compare_graphs(
        parts.patch_module().float_maps, [PATCH_FEATURES, ATTENTION, *options.facets],
        {form: folder / files[form] for form in forms}, tiles, max_batch=max_batch)
    if parts.upsampler is not None:
        reference = parts.pixel_reference()
        found += verify.compare_graphs(lambda batch: [reference(batch)], [PIXEL_FEATURES],
                                       {form: folder / files[pixel_name(form)] for form in forms}, tiles, max_batch=max_batch)
    return found
