"""TensorRT: what its ONNX parser takes, and building a plan from a bundle's portable graph."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import onnx_ir as ir

from phaseline.runtime.bundle import Bundle
from phaseline.runtime.contract import TILES, Precision
from phaseline.runtime.errors import EngineError, EngineUnavailableError, UsageError

PLANS = "plans"
MAX_OPSET = 20

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
_ANY = _FLOATS | {ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL}
# Operators of TensorRT 10's parser that a ViT or a convolutional upsampler can come to need, with the element types
# that its documentation lists for them (bfloat16, float8 and quantised types left out: phaseline writes none).
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Abs", "Neg", "ReduceMax", "ReduceMean", "ReduceSum")
_FUNCTIONS = (
    "AveragePool", "BatchNormalization", "Clip", "Conv", "ConvTranspose", "Cos", "Erf", "Exp", "Gelu", "Gemm",
    "GlobalAveragePool", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LeakyRelu", "MatMul",
    "MaxPool", "Pow", "Reciprocal", "Relu", "Resize", "Sigmoid", "Sin", "Softmax", "Sqrt", "Tanh")
_REARRANGEMENTS = ("Concat", "Constant", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split",
                   "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where")
SUPPORTED: dict[str, frozenset[ir.DataType]] = {
    **dict.fromkeys(_ARITHMETIC, _FLOATS | {ir.DataType.INT32}),
    **dict.fromkeys(_FUNCTIONS, _FLOATS),
    **dict.fromkeys(_REARRANGEMENTS, _ANY),
    # uint8 may enter a network, and must be cast first.
    "Cast": _FLOATS | {ir.DataType.INT32, ir.DataType.UINT8},
}
# Inputs that say where, not what: shapes, axes, starts. int64 constants are welcome there.
_INDEX_INPUTS: dict[str, tuple[int, ...]] = {
    "Reshape": (1,), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,), "Unsqueeze": (1,), "Expand": (1,),
    "Pad": (1, 3), "Tile": (1,), "Gather": (1,), "ReduceMean": (1,), "ReduceSum": (1,), "ReduceMax": (1,),
    "Resize": (1, 2, 3)}


def unsupported(model: ir.Model) -> list[str]:
    """What in a graph TensorRT 10 would refuse, or would have to compute in int64 or float64.

    Parameters
    ----------
    model
        The graph, with types and shapes noted on its values.

    Returns
    -------
    One line for each offence; empty if there is none.
    """
    opset = model.opset_imports.get("", 0)
    found = [f"operator set {opset}, expected at most {MAX_OPSET}"] if opset > MAX_OPSET else []
    for value in [*model.graph.inputs, *model.graph.outputs]:
        found += _dynamic_shape(value)
    for node in model.graph.all_nodes():
        label = f"{node.op_type} {node.name or '?'}"
        if node.domain or node.op_type not in SUPPORTED:
            found.append(f"{label}: operator {node.domain or 'ai.onnx'}::{node.op_type}")
            continue
        for position, given in enumerate(node.inputs):
            if given is None:
                continue
            if position in _INDEX_INPUTS.get(node.op_type, ()):
                if given.const_value is None:
                    found.append(f"{label}: input {given.name} is computed, expected a constant")
            else:
                found += _wrong_type(label, given, SUPPORTED[node.op_type])
        for made in node.outputs:
            found += _wrong_type(label, made, SUPPORTED[node.op_type])
            found += _dynamic_shape(made)
    return found


def plan_path(bundle: Bundle, tensorrt_version: str, gpu: str, *, pixels: bool = False) -> Path:
    """Where a plan lies: named by the graph's content, the TensorRT that built it, and the GPU it is for.

    `pixels` asks for the fused graph's, tiles → pixel features.
    """
    graph = hashlib.sha256()
    weights = [name for name in bundle.spec.files if name.endswith(".bin")]
    for name in [(bundle.spec.pixel_graphs if pixels else bundle.spec.graphs)["portable"], *sorted(weights)]:
        graph.update(bundle.spec.files[name].sha256.encode())
    device = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-")
    return bundle.path / PLANS / f"{graph.hexdigest()}_trt{tensorrt_version}_{device}.plan"


def require_tensorrt(precision: Precision) -> Any:
    """The `tensorrt` module.

    Raises
    ------
    UsageError
        The precision has no graph for GPUs.
    EngineUnavailableError
        TensorRT or a GPU is missing.
    """
    if precision == "int8":
        raise UsageError("int8 bundles are for CPUs; for TensorRT choose --precision fp16 or fp32")
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise EngineUnavailableError(
            f"TensorRT is not usable here ({error}); install it with pip install '.[tensorrt]' on a "
            "machine with an NVIDIA GPU, or export with --engine onnx") from error
    import torch

    if not torch.cuda.is_available():
        raise EngineUnavailableError("TensorRT is installed but no NVIDIA GPU was found; a plan is built on the GPU "
                                     "that it is for")
    return tensorrt


def build_plan(bundle: Bundle, *, pixels: bool = False) -> Path:
    """Build the TensorRT plan of one of a bundle's graphs for this machine's GPU, unless it is there already.

    Parameters
    ----------
    bundle
        With a portable graph. Its types decide: the network is strongly typed, float16 where it was verified.
    pixels
        Of the fused graph, tiles → pixel features.

    Returns
    -------
    The plan's file, in the bundle's folder ``plans``; no part of the bundle's content or hash.

    Raises
    ------
    UsageError, EngineUnavailableError
        See `require_tensorrt`.
    EngineError
        TensorRT refused the graph.
    """
    trt = require_tensorrt(bundle.spec.precision)
    import torch

    graph = bundle.pixel_graph("portable") if pixels else bundle.graph("portable")
    plan = plan_path(bundle, str(trt.__version__), torch.cuda.get_device_name(), pixels=pixels)
    if plan.exists():
        return plan
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        reasons = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise EngineError(f"TensorRT {trt.__version__} refused {graph}: {reasons}")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    spec = bundle.spec
    tile = (spec.in_channels, spec.tile_px, spec.tile_px)
    profile.set_shape(TILES, (1, *tile), (spec.max_batch, *tile), (spec.max_batch, *tile))
    config.add_optimization_profile(profile)
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        raise EngineError(f"TensorRT {trt.__version__} could not build a plan of {graph}; "
                          "see its messages above")
    plan.parent.mkdir(exist_ok=True)
    partial = plan.with_suffix(".partial")
    partial.write_bytes(bytes(serialised))
    partial.replace(plan)
    return plan


def _wrong_type(label: str, value: ir.Value, allowed: frozenset[ir.DataType]) -> list[str]:
    if value.dtype is None:
        return [f"{label}: {value.name} has no type"]
    # Constants of an index type are folded; values computed in one are not.
    if value.dtype not in allowed or (value.dtype == ir.DataType.INT64 and value.const_value is None):
        return [f"{label}: {value.name} is {value.dtype.name}"]
    return []


def _dynamic_shape(value: ir.Value) -> list[str]:
    if value.shape is None:
        return [f"{value.name} has no shape"]
    dynamic = [axis for axis, size in enumerate(value.shape) if axis > 0 and not isinstance(size, int)]
    return [f"{value.name} has a dynamic axis {dynamic[0]}, expected only the batch to be"] if dynamic else []
