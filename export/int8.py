"""8-bit matrix products of the transformer blocks, for CPUs with VNNI (AVX-512 or AVX-VNNI).

Weights are symmetric int8, one scale a column; activations are quantised when they are computed, one scale for the
whole tensor. A tile's features would so depend on its neighbours in a batch: int8 bundles take one tile a call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from phaseline.export.graphs import drop_unused
from phaseline.runtime.contract import F32
from phaseline.runtime.errors import ExportError

MAX_BATCH = 1


def quantise_blocks(model: ir.Model, count: int) -> None:
    """Replace the products with constant matrices by ``com.microsoft.DynamicQuantizeMatMul``, in place.

    Parameters
    ----------
    model
        A ``cpu`` graph in float32.
    count
        Products of the blocks, which come first; what follows stays in float32: the projection is small, and what users see.

    Raises
    ------
    ExportError
        The graph has fewer.
    """
    graph = model.graph
    # Nodes are in order of computation, and the projection needs every block.
    products = [node for node in graph if node.op_type == "MatMul" and _is_matrix(node.inputs[1])][:count]
    if len(products) < count:
        raise ExportError(f"the graph has {len(products)} products with constant matrices, expected the blocks' {count}; use the "
                          "tested versions of torch and onnxscript, or export with --precision fp16")
    for node in products:
        data, weight = node.inputs
        assert weight is not None and weight.const_value is not None
        quantised, scale = quantise_columns(weight.const_value.numpy())
        constants = [_initializer(graph, f"{weight.name}_int8", quantised),
                     _initializer(graph, f"{weight.name}_scale", scale)]
        replacement = ir.node("DynamicQuantizeMatMul", [data, *constants], domain="com.microsoft", version=1)
        old, new = node.outputs[0], replacement.outputs[0]
        new.name, new.shape, new.type = old.name, old.shape, old.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], [replacement], [old], [new])
    model.opset_imports["com.microsoft"] = 1
    drop_unused(model)


def quantise_columns(matrix: F32) -> tuple[npt.NDArray[np.int8], F32]:
    """Symmetric int8 with one scale a column.

    Parameters
    ----------
    matrix
        float32 array of shape (rows, cols).

    Returns
    -------
    int8 array of shape (rows, cols), range −127…127, and float32 scales of shape (cols,): their product is `matrix`,
    to within half a scale.
    """
    peaks = np.abs(matrix).max(axis=0)
    scale = np.where(peaks > 0, peaks / 127, 1).astype(np.float32)
    return np.rint(matrix / scale).clip(-127, 127).astype(np.int8), scale


def _is_matrix(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None else None
    return tensor is not None and len(tensor.shape) == 2 and tensor.dtype == ir.DataType.FLOAT


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.initializers[name] = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape),
                                            type=ir.TensorType(tensor.dtype))
    return graph.initializers[name]
