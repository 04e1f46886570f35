"""torch → ONNX, in two forms that differ only in how attention is written and in which type the blocks compute.

    cpu        com.microsoft.MultiHeadAttention: flash attention in ONNX Runtime's CPU engine, no n² matrix; float32
    portable   standard operators only, for CUDA and TensorRT; float32 or float16

Shapes are static but the batch.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TypeVar

import onnx_ir as ir
import torch
from torch import nn

from phaseline.runtime.contract import TILES
from phaseline.runtime.errors import ExportError

# The newest that TensorRT 10 reads entirely; it has Gelu and LayerNormalization as single operators.
OPSET = 20
# Tensors below this many values stay as they are: halving saves nothing, and biases and norms keep their precision.
HALF_FROM_SIZE = 4096

Module = TypeVar("Module", bound=nn.Module)


def trace(module: nn.Module, tile: tuple[int, int, int], outputs: Sequence[str], *, max_batch: int) -> ir.Model:
    """Trace a module to ONNX.

    Parameters
    ----------
    module
        Takes uint8 tiles; in one of the forms.
    tile
        Shape of a tile, (channels, T, T).
    outputs
        Names of what it gives.
    max_batch
        The most tiles in one call.

    Raises
    ------
    ExportError
        torch could not trace it.
    """
    example = torch.zeros(2, *tile, dtype=torch.uint8)
    batch = torch.export.Dim("n", min=1, max=max(2, max_batch))
    with _quiet_exporter():
        try:
            program = torch.onnx.export(
                module, (example,), dynamo=True, dynamic_shapes={"tiles": {0: batch}}, opset_version=OPSET,
                verbose=False, input_names=[TILES], output_names=list(outputs))
        except (torch.onnx.errors.OnnxExporterError, torch.fx.experimental.symbolic_shapes.ConstraintViolationError,
                RuntimeError) as error:
            raise ExportError(f"torch could not write the graph: {_root_cause(error)}") from error
    assert program is not None  # only optional for torch's older exporter
    model = program.model
    if model.opset_imports[""] != OPSET:
        raise ExportError(f"torch wrote opset {model.opset_imports['']}, expected {OPSET}; use the tested versions of "
                          "torch and onnxscript")
    _drop_traces(model)
    return model


def round_to_half(module: Module) -> Module:
    """A copy whose large tensors hold only values that float16 has, so that storing them halved loses nothing more.

    Raises
    ------
    ExportError
        A value beyond float16's range.
    """
    rounded = copy.deepcopy(module)
    with torch.no_grad():
        for name, tensor in [*rounded.named_parameters(), *rounded.named_buffers()]:
            if tensor.numel() >= HALF_FROM_SIZE and tensor.is_floating_point():
                half = tensor.half()
                if not torch.isfinite(half).all():
                    raise ExportError(f"{name} holds values beyond float16's ±65504; export with --precision fp32")
                tensor.copy_(half.to(tensor.dtype))
    return rounded


def store_half(model: ir.Model) -> None:
    """Store large float32 initialisers as float16 followed by a Cast; engines fold it when they load the graph.

    Only those that lose nothing by it (see `round_to_half`).
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < HALF_FROM_SIZE:
            continue
        array = tensor.numpy()
        half = array.astype("float16")
        if (half.astype("float32") != array).any():
            continue
        stored = ir.Value(name=f"{name}_half", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT16),
                          const_value=ir.tensor(half, name=f"{name}_half"))
        cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.FLOAT.value})
        cast.outputs[0].name, cast.outputs[0].shape = f"{name}_single", value.shape
        cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        del graph.initializers[name]
        graph.initializers[f"{name}_half"] = stored
        graph.insert_before(graph[0], cast)


def drop_unused(model: ir.Model) -> None:
    """Remove initialisers that no node reads."""
    graph = model.graph
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n", maxsplit=1)[0]


def _drop_traces(model: ir.Model) -> None:
    """Remove what torch notes of source files: no part of the graph, and it would put this machine's paths in it."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = model.doc_string = None


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep torch's exporter from printing progress, and from warning of its own deprecated internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnxscript|onnx_ir|copyreg)\b.*")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|onnxscript|copyreg)\b.*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


