"""The graphs of a bundle: which module is traced for which form, and how precision changes it.

                    patch features, attention, facets    pixel features (with an upsampler)
    cpu             cpu.onnx                             cpu_pixels.onnx
    portable        portable.onnx                        portable_pixels.onnx
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import nn

from phaseline.export import graphs, int8, int8_convolutions
from phaseline.export.attention import flash_attention, plain_attention, reference_attention
from phaseline.export.backbone import Backbone
from phaseline.export.pixel import CellFeatures, PixelFeatures, PixelReference
from phaseline.export.projection import Projection
from phaseline.export.strided import StridedViT
from phaseline.export.upsampler import Upsampler
from phaseline.runtime.contract import ATTENTION, PATCH_FEATURES, PIXEL_FEATURES, U8, Facet, GraphForm, Precision

_ATTENTION = {"cpu": flash_attention, "portable": plain_attention}


def forms_of(precision: Precision) -> tuple[GraphForm, ...]:
    """The forms that a bundle of some precision has."""
    return ("cpu",) if precision == "int8" else ("cpu", "portable")


def pixel_name(form: GraphForm) -> str:
    """Name of a form's fused graph among a bundle's graphs."""
    return f"{form}_pixels"


@dataclass(frozen=True)
class Parts:
    """What a bundle is made of.

    Attributes
    ----------
    backbone, projection, upsampler
        The last two may be None.
    stride_px, tile_px, in_channels
        s, T, and 1 or 3.
    facets
        Which of the last block's facets come out.
    """

    backbone: Backbone
    projection: Projection | None
    upsampler: Upsampler | None
    stride_px: int
    tile_px: int
    in_channels: int
    facets: tuple[Facet, ...] = ()

    def patch_module(self, form: GraphForm | None = None, *, half: bool = False) -> StridedViT:
        """Tiles → patch features, attention and facets: in torch's own form, or in one to be traced."""
        return StridedViT(self.backbone, stride_px=self.stride_px, tile_px=self.tile_px, in_channels=self.in_channels,
                          projection=self.projection, facets=self.facets, half=half,
                          attend=reference_attention if form is None else _ATTENTION[form]).eval()

    def pixel_module(self, form: GraphForm | None = None, *, half: bool = False) -> PixelFeatures:
        """Tiles → pixel features: likewise."""
        assert self.upsampler is not None
        return PixelFeatures(self._cells(form, half=half), self.upsampler, in_channels=self.in_channels, half=half).eval()

    def pixel_reference(self) -> PixelReference:
        """What `pixel_module` is verified against."""
        assert self.upsampler is not None
        return PixelReference(self._cells(), self.upsampler).eval()

    def _cells(self, form: GraphForm | None = None, *, half: bool = False) -> CellFeatures:
        return CellFeatures(self.patch_module(form, half=half), patch_px=self.backbone.patch_px, tile_px=self.tile_px)


def trace_graph(parts: Parts, form: GraphForm, precision: Precision, max_batch: int, views: Sequence[U8], *, pixels: bool
                ) -> ir.Model:
    """Trace one graph of a bundle.

    Parameters
    ----------
    parts
        What to trace.
    form, precision
        Which attention, and which arithmetic.
    max_batch
        The most tiles in one call.
    views
        uint8 arrays of shape (1, channels, T, T), from which 8-bit convolutions take their ranges.
    pixels
        The fused graph, tiles → pixel features, instead of the one of patch features.

    Raises
    ------
    ExportError
        It cannot be traced or quantised.
    """
    half = form == "portable" and precision == "fp16"
    module: nn.Module = parts.pixel_module(form, half=half) if pixels else parts.patch_module(form, half=half)
    if precision == "fp16":
        module = graphs.round_to_half(module)
    names = [PIXEL_FEATURES] if pixels else [PATCH_FEATURES, ATTENTION, *parts.facets]
    model = graphs.trace(module, (parts.in_channels, parts.tile_px, parts.tile_px), names, max_batch=max_batch)
    if precision == "fp16":
        graphs.store_half(model)
    if precision == "int8":
        int8.quantise_blocks(model, sum(isinstance(layer, nn.Linear) for layer in parts.backbone.vit.blocks.modules()))
        if pixels:
            runnable = parts.pixel_module()
            int8_convolutions.quantise_convolutions(model, runnable, int8_convolutions.measure_ranges(runnable, views))
    return model


def trace_forms(parts: Parts, precision: Precision, max_batch: int, views: Sequence[U8], say: Callable[[str], None]
                ) -> dict[str, ir.Model]:
    """Trace every graph of a bundle: name to graph, forms and with an upsampler their `pixel_name`. See `trace_graph`."""
    models: dict[str, ir.Model] = {}
    for form in forms_of(precision):
        say(f"tracing the {form} graph")
        models[form] = trace_graph(parts, form, precision, max_batch, views, pixels=False)
        if parts.upsampler is not None:
            say(f"tracing the {form} graph of pixel features")
            models[pixel_name(form)] = trace_graph(parts, form, precision, max_batch, views, pixels=True)
    return models
