"""From a backbone's name to a verified bundle on disk: the whole road of an export.

    backbone ─▶ weights ─▶ projection ─▶ trace ─▶ write ─▶ verify ─▶ rename into place
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from phaseline.export import calibration, graphs, int8, onnx_file, verify
from phaseline.export.attention import flash_attention, plain_attention, reference_attention
from phaseline.export.backbone import Backbone
from phaseline.export.projection import Projection, fit_projection
from phaseline.export.strided import StridedViT
from phaseline.export.weights import load_backbone
from phaseline.runtime.bundle import MANIFEST, Bundle, describe_file, open_bundle
from phaseline.runtime.contract import FACETS, PRECISIONS, U8, BundleSpec, Facet, GraphForm, Precision
from phaseline.runtime.errors import UsageError
from phaseline.runtime.output import check_folder, new_folder

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
    images = calibration.load_images(options.calibration, options.in_channels)
    backbone, source, trained = load_backbone(options.backbone, options.weights)
    _check_geometry(options, backbone)
    if not trained:
        say(f"{options.backbone} has random weights: the bundle is marked untrained")

    projection, facts = _fit(options, backbone, images, say)
    reference = _module(options, backbone, projection)
    max_batch = int8.MAX_BATCH if options.precision == "int8" else options.max_batch
    models = _trace_forms(options, backbone, projection, max_batch, say)
    tiles = [next(calibration.views_of(image, options.tile_px)) for image in images]
    with new_folder(out, overwrite, MANIFEST) as folder:
        files = onnx_file.write_graphs(models, folder)
        comparisons = verify.compare_graphs(reference, {form: folder / name for form, name in files.items()}, tiles,
                                            max_batch=max_batch)
        for comparison in comparisons:
            say(str(comparison))
        verify.judge(comparisons, options.precision, options.tolerance)
        spec = BundleSpec(
            backbone=options.backbone, weights=source, trained=trained, in_channels=options.in_channels,
            patch_px=backbone.patch_px, stride_px=options.stride_px, tile_px=options.tile_px,
            embed_dim=backbone.embed_dim, channels=options.channels, heads=backbone.heads, precision=options.precision,
            max_batch=max_batch, graphs=files, files={f.name: describe_file(f) for f in sorted(folder.iterdir())},
            facets=options.facets, projection=facts, parity=verify.parity_numbers(comparisons),
            versions={name: metadata.version(name) for name in _PACKAGES})
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


def _module(options: ExportOptions, backbone: Backbone, projection: Projection | None, form: GraphForm | None = None
            ) -> StridedViT:
    """The module in torch's own form, or in one to be traced."""
    attend = {"cpu": flash_attention, "portable": plain_attention, None: reference_attention}[form]
    return StridedViT(backbone, stride_px=options.stride_px, tile_px=options.tile_px, in_channels=options.in_channels,
                      projection=projection, facets=options.facets,
                      attend=attend, half=form == "portable" and options.precision == "fp16").eval()


def _fit(options: ExportOptions, backbone: Backbone, images: list[U8], say: Callable[[str], None]
         ) -> tuple[Projection | None, dict[str, float | int | str]]:
    if options.channels == backbone.embed_dim:
        return None, {}
    module = _module(dataclasses.replace(options, facets=()), backbone, None)
    say(f"fitting the projection {backbone.embed_dim} → {options.channels} on {len(images)} images in "
        f"{len(calibration.VIEWS)} views")

    def tokens() -> Iterator[npt.NDArray[np.float32]]:
        for image in images:
            for tile in calibration.views_of(image, options.tile_px):
                with torch.inference_mode():
                    features = module.float_maps(torch.from_numpy(tile))[0]
                yield features[0].flatten(1).T.numpy()

    projection = fit_projection(tokens(), backbone.embed_dim, options.channels)
    say(f"{options.channels} channels hold {projection.explained_variance:.1%} of the variance of "
        f"{projection.tokens} tokens")
    source = "scikit-image" if options.calibration is None else "folder"
    return projection, {"source": source, "images": len(images), "views": len(calibration.VIEWS),
                        "tokens": projection.tokens, "explained_variance": projection.explained_variance}


def _trace_forms(options: ExportOptions, backbone: Backbone, projection: Projection | None, max_batch: int,
                 say: Callable[[str], None]) -> dict[GraphForm, ir.Model]:
    forms: tuple[GraphForm, ...] = ("cpu",) if options.precision == "int8" else ("cpu", "portable")
    models: dict[GraphForm, ir.Model] = {}
    for form in forms:
        say(f"tracing the {form} graph")
        module = _module(options, backbone, projection, form)
        if options.precision == "fp16":
            module = graphs.round_to_half(module)
        models[form] = graphs.trace(module, max_batch=max_batch)
        if options.precision == "fp16":
            graphs.store_half(models[form])
    if options.precision == "int8":
        count = int8.quantise_blocks(models["cpu"], projected=projection is not None)
        say(f"quantised {count} matrix products")
    return models
