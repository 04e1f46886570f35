"""8-bit convolutions of the upsampler, for CPUs with VNNI (AVX-512 or AVX-VNNI): three to four times as fast as float32.

Written as pairs of QuantizeLinear and DequantizeLinear, which ONNX Runtime merges with the operators between them. Weights are
symmetric int8, one scale an output channel. Activations are uint8, with scales fixed at export by what the calibration images
give, so that a tile's features don't depend on its neighbours: one a tensor, and one a channel for the pixel features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from phaseline.export.graphs import drop_unused
from phaseline.export.int8 import quantise_columns
from phaseline.export.pixel import Convolution, PixelFeatures
from phaseline.export.upsampler import SLOPE
from phaseline.runtime.contract import F32, U8
from phaseline.runtime.errors import ExportError

# Operators that only select values, and work on 8 bits as on reals; and those that are written between reals. ONNX Runtime's
# Resize is faster so.
_PASSING = frozenset({"Pad", "Gather", "MaxPool"})
_REAL = frozenset({"LeakyRelu", "Concat", "Resize"})
_FEATURES, _FIRST, _IMAGE, _LAST = "start", "start.0", "downs.0.0", "end"
Range = tuple[F32, F32]


@dataclass(frozen=True)
class Scale:
    """real = step · (stored − zero), stored in 0…255."""

    step: float
    zero: int

    @classmethod
    def of(cls, low: float, high: float) -> Self:
        """The finest that holds low…high, and zero exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / 255 or 1.0
        return cls(step, round(-low / step))

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest value that it holds."""
        return -self.zero * self.step, (255 - self.zero) * self.step


def measure_ranges(module: PixelFeatures, tiles: Iterable[U8]) -> dict[str, Range]:
    """Smallest and largest value of every channel that leaves a convolution, before its LeakyReLU.

    Parameters
    ----------
    module
        In float32.
    tiles
        uint8 arrays of shape (1, channels, T, T).

    Returns
    -------
    Name of the convolution to float32 arrays of shape (channels,); under ``start``, what enters the first one.
    """
    ranges: dict[str, Range] = {}

    def note(name: str, values: torch.Tensor, slope: float) -> None:
        low, high = (extreme.numpy() for extreme in torch.aminmax(values.transpose(0, 1).flatten(1), dim=1))
        low = np.where(low < 0, low / slope, low)
        before = ranges.get(name, (low, high))
        ranges[name] = (np.minimum(before[0], low), np.maximum(before[1], high))

    def watch(name: str, layer: Convolution) -> torch.utils.hooks.RemovableHandle:
        slope = SLOPE if layer.active else 1.0
        return layer.register_forward_hook(lambda _, given, made: note(name, made, slope))

    handles = [watch(name, layer) for name, layer in _convolutions(module).items()]
    handles.append(module.start.register_forward_pre_hook(lambda _, given: note(_FEATURES, given[0], 1.0)))
    try:
        with torch.inference_mode():
            for tile in tiles:
                module(torch.from_numpy(tile))
    finally:
        for handle in handles:
            handle.remove()
    return ranges


def quantise_convolutions(model: ir.Model, module: PixelFeatures, ranges: Mapping[str, Range]) -> None:
    """Quantise the upsampler in a ``cpu`` graph of float32, in place.

    Parameters
    ----------
    model
        Traced from `module`.
    module
        Says which convolutions are the upsampler's.
    ranges
        From `measure_ranges`.

    Raises
    ------
    ExportError
        The graph is not as expected.
    """
    names = set(_convolutions(module))
    quantiser = _Quantiser(model.graph, ranges, names, module.image_range)
    quantiser.run()
    if quantiser.found != names:
        raise ExportError(f"the graph has no convolution {min(names - quantiser.found)}; use the tested versions of torch and "
                          "onnxscript, or export with --precision fp16")
    drop_unused(model)


def _convolutions(module: nn.Module) -> dict[str, Convolution]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Convolution)}


@dataclass(frozen=True)
class _Stored:
    """A value that is stored in 8 bits.

    Attributes
    ----------
    value
        The uint8 one.
    scale
        How to read it; that gives the real value over its channel's peak, so that channels of all sizes share one scale.
    peaks
        float64 array of shape (channels,).
    """

    value: ir.Value
    scale: Scale
    peaks: npt.NDArray[np.float64]


class _Quantiser:
    """Walks a graph once, in order of computation."""

    def __init__(self, graph: ir.Graph, ranges: Mapping[str, Range], names: set[str], image: tuple[float, float]) -> None:
        self.graph, self.ranges, self.names, self.image = graph, ranges, names, image
        self.found: set[str] = set()
        self.stored: dict[ir.Value, _Stored] = {}

    def run(self) -> None:
        nodes = list(self.graph)
        for node in nodes:
            if (name := self._name(node)) in {_FIRST, _IMAGE}:
                self._enter(node.inputs[0], name == _IMAGE)
        for node in nodes:
            entering = [self.stored[value] for value in node.inputs if value in self.stored]
            if not entering:
                continue
            if (name := self._name(node)) is not None:
                self._convolution(node, name, entering[0])
            elif _passes(node):
                node.replace_input_with(0, entering[0].value)
                node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
                self.stored[node.outputs[0]] = replace(entering[0], value=node.outputs[0])
            elif node.op_type in _REAL:
                self._real(node, entering)

    def _name(self, node: ir.Node) -> str | None:
        if node.op_type != "Conv" or node.inputs[1] is None:
            return None
        name = (node.inputs[1].name or "").removesuffix(".weight")
        return name if name in self.names else None

    def _enter(self, source: ir.Value | None, is_image: bool) -> None:
        """The value where 8 bits begin: what reaches a convolution through operators that pass."""
        while source is not None and (node := source.producer()) is not None and _passes(node):
            source = node.inputs[0]
        assert source is not None and source.shape is not None and isinstance(source.shape[1], int)
        low, high = self.ranges[_FEATURES]
        if is_image:
            low, high = (np.full(source.shape[1], extreme, np.float32) for extreme in self.image)
        peaks, scale = _common_scale(low, high)
        self.stored[source] = self._quantised(source, scale, peaks, steps=scale.step * peaks)

    def _real(self, node: ir.Node, entering: list[_Stored]) -> None:
        """Operators between a dequantised and a quantised value."""
        scale, peaks = entering[0].scale, entering[0].peaks
        if node.op_type == "LeakyRelu":
            scale = Scale.of(scale.range[0] * SLOPE, scale.range[1])
        elif node.op_type == "Concat":
            scale = Scale.of(min(e.scale.range[0] for e in entering), max(e.scale.range[1] for e in entering))
            peaks = np.concatenate([e.peaks for e in entering])
        for position, value in enumerate(node.inputs):
            if value in self.stored:
                node.replace_input_with(position, self._dequantised(node, self.stored[value]))
        self.stored[node.outputs[0]] = self._quantised(node.outputs[0], scale, peaks)

    def _convolution(self, node: ir.Node, name: str, entering: _Stored) -> None:
        weight, bias = (_content(value) for value in node.inputs[1:])
        peaks, scale = _common_scale(*self.ranges[name])
        weight = weight * entering.peaks[:, None, None] / peaks[:, None, None, None]
        columns, steps = quantise_columns(weight.reshape(len(weight), -1).T.astype(np.float32))
        bias_steps = (steps * np.float32(entering.scale.step)).astype(np.float32)
        bias = np.rint(bias / peaks / bias_steps).astype(np.int32)
        node.replace_input_with(0, self._dequantised(node, entering))
        node.replace_input_with(1, self._constant(node, f"{name}.weight", columns.T.reshape(weight.shape), steps))
        node.replace_input_with(2, self._constant(node, f"{name}.bias", bias, bias_steps))
        out = node.outputs[0]
        readers = list(out.uses())
        self.stored[out] = self._quantised(out, scale, peaks)
        if name == _LAST:
            for reader, position in readers:
                reader.replace_input_with(position, self._dequantised(reader, self.stored[out], steps=scale.step * peaks))
            del self.stored[out]
        self.found.add(name)

    def _quantised(self, value: ir.Value, scale: Scale, peaks: npt.NDArray[np.float64],
                   steps: npt.NDArray[np.float64] | None = None) -> _Stored:
        """`value` in 8 bits; it holds real values over their peaks, or, with `steps`, one for each channel, as they are."""
        node = ir.node("QuantizeLinear", [value, *self._parameters(f"{value.name}_uint8", scale, steps)], attributes={"axis": 1})
        producer = value.producer()
        assert producer is not None
        self.graph.insert_after(producer, node)
        return _Stored(_named(node, f"{value.name}_uint8", ir.DataType.UINT8, value.shape), scale, peaks)

    def _dequantised(self, reader: ir.Node, stored: _Stored, steps: npt.NDArray[np.float64] | None = None) -> ir.Value:
        name = f"{stored.value.name}_{reader.name}"
        node = ir.node("DequantizeLinear", [stored.value, *self._parameters(name, stored.scale, steps)], attributes={"axis": 1})
        self.graph.insert_before(reader, node)
        return _named(node, f"{name}_real", ir.DataType.FLOAT, stored.value.shape)

    def _parameters(self, name: str, scale: Scale, steps: npt.NDArray[np.float64] | None) -> list[ir.Value]:
        step = np.array(scale.step, np.float32) if steps is None else steps.astype(np.float32)
        return [self._initializer(f"{name}_step", step),
                self._initializer(f"{name}_zero", np.full(step.shape, scale.zero, np.uint8))]

    def _constant(self, node: ir.Node, name: str, array: npt.NDArray[Any], steps: F32) -> ir.Value:
        inputs = [self._initializer(f"{name}_int8", np.ascontiguousarray(array)), self._initializer(f"{name}_step", steps),
                  self._initializer(f"{name}_zero", np.zeros(len(steps), array.dtype))]
        real = ir.node("DequantizeLinear", inputs, attributes={"axis": 0})
        self.graph.insert_before(node, real)
        return _named(real, f"{name}_real", ir.DataType.FLOAT, array.shape)

    def _initializer(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
        self.graph.initializers[name] = value
        return value


def _common_scale(low: F32, high: F32) -> tuple[npt.NDArray[np.float64], Scale]:
    """Each channel's largest absolute value, and the scale that then holds all of them."""
    peaks = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
    peaks[peaks == 0] = 1
    return peaks, Scale.of(float((low / peaks).min()), float((high / peaks).max()))


def _content(value: ir.Value | None) -> npt.NDArray[np.float64]:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def _passes(node: ir.Node) -> bool:
    # Constant padding fills up channels, before anything is stored.
    mode = node.attributes.get("mode")
    return node.op_type in _PASSING and (node.op_type != "Pad" or (mode is not None and mode.as_string() != "constant"))


def _named(node: ir.Node, name: str, dtype: ir.DataType, shape: Any) -> ir.Value:
    value = node.outputs[0]
    value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
    return value
