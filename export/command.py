"""`phaseline export`: trace a backbone, verify it, write a bundle. Found by `phaseline` as an entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from phaseline.runtime.contract import Facet, Precision
from phaseline.runtime.errors import MissingExtraError, UsageError

ENGINES = ("onnx", "tensorrt")


def export_command(
    backbone: Annotated[str, typer.Argument(metavar="BACKBONE",
        help="A ViT of timm, e.g. vit_small_patch14_dinov2, or sizes WIDTH-DEPTH-HEADS-PATCH, e.g. vit-192-8-3-p14.")],
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder to write the bundle to.")],
    weights: Annotated[str, typer.Option(
        help="'hub' (timm's download), 'random:SEED' (untrained), or a safetensors or .pth file with timm's or Meta's "
             "names.")] = "hub",
    stride: Annotated[int, typer.Option(
        help="Pixels between patches, at most the patch size; smaller is finer and slower.")] = 7,
    tile: Annotated[int, typer.Option(
        help="Side of a tile in pixels: patch size plus a multiple of the stride.")] = 518,
    channels: Annotated[int, typer.Option(
        help="Channels after the frozen projection; the backbone's width for none.")] = 32,
    in_channels: Annotated[int, typer.Option(help="1: grey images, 3: RGB.")] = 1,
    precision: Annotated[str, typer.Option(
        help="fp32; fp16: stored, and on GPUs computed, in half precision; int8: matrix products, for CPUs.")] = "fp32",
    upsampler: Annotated[str | None, typer.Option(metavar="FILE",
        help="An upsampler, for pixel features: a published checkpoint, a file of `phaseline train upsampler`, or "
             "random:SEED.")] = None,
    pixel_channels: Annotated[int | None, typer.Option(
        help="Pixel features, the first ones of the upsampler; all if not given.")] = None,
    card: Annotated[Path | None, typer.Option(help="Markdown file: the model card to put into the bundle.")] = None,
    facets: Annotated[str, typer.Option(help="Also write the last block's facets: some of key,query,value.")] = "",
    max_batch: Annotated[int, typer.Option(help="The most tiles in one call (int8: always 1).")] = 8,
    calibration: Annotated[Path | None, typer.Option(
        help="Folder of images to fit the projection on and verify with; scikit-image's own if not given.")] = None,
    engine: Annotated[str, typer.Option(help="onnx, or tensorrt to build a TensorRT plan for this GPU too.")] = "onnx",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that exists.")] = False,
    tolerance: Annotated[float | None, typer.Option(
        help="Largest deviation from torch, relative to the output's scale; the precision's own if not given.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="On an error, print the traceback.")] = False,
) -> None:
    """Export a Vision Transformer to a bundle, and verify it against torch."""
    del debug
    # torch and timm take seconds to import; --help must not.
    try:
        from phaseline.export import trt_plan
        from phaseline.export.bundle_writer import ExportOptions, write_bundle
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "export", "exporting a backbone") from error

    def say(line: str) -> None:
        if not quiet:
            typer.echo(line, err=True)

    if engine not in ENGINES:
        raise UsageError(f"engine is {engine!r}, expected one of {', '.join(ENGINES)}")
    options = ExportOptions(
        backbone=backbone, weights=weights, stride_px=stride, tile_px=tile, channels=channels, in_channels=in_channels,
        precision=cast(Precision, precision), facets=tuple(cast(Facet, name) for name in facets.split(",") if name),
        upsampler=upsampler, pixel_channels=pixel_channels, card=card, max_batch=max_batch, calibration=calibration,
        tolerance=tolerance)
    if engine == "tensorrt":
        trt_plan.require_tensorrt(options.precision)
    bundle = write_bundle(options, out, overwrite=overwrite, say=say)
    if engine == "tensorrt":
        for pixels in (False, True) if bundle.spec.has_upsampler else (False,):
            say(f"wrote {trt_plan.build_plan(bundle, pixels=pixels)}")
