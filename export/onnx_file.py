"""Writing graphs to disk: all of them beside one file of weights, in which equal tensors are stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

WEIGHTS_FILE = "weights.bin"
# Smaller tensors stay inside the graph's own file.
_INLINE_BYTES = 1024
# Engines map the file into memory; this keeps vector loads aligned.
_ALIGNMENT = 64


def write_graphs(models: Mapping[str, ir.Model], folder: Path) -> dict[str, str]:
    """Write ``NAME.onnx`` for each graph, and the weights that they share.

    Parameters
    ----------
    models
        Name to graph; changed in that their tensors afterwards lie on disk.
    folder
        Existing folder.

    Returns
    -------
    Name to file name.
    """
    offsets: dict[str, int] = {}
    with (folder / WEIGHTS_FILE).open("wb") as stream:
        for model in models.values():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _INLINE_BYTES:
                    continue
                content = tensor.tobytes()
                key = hashlib.sha256(content).hexdigest()
                if key not in offsets:
                    stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
                    offsets[key] = stream.tell()
                    stream.write(content)
                value.const_value = ir.ExternalTensor(
                    WEIGHTS_FILE, offsets[key], len(content), tensor.dtype, shape=ir.Shape(tensor.numpy().shape),
                    name=value.name or "", base_dir=folder)
    files: dict[str, str] = {}
    for name, model in models.items():
        files[name] = f"{name}.onnx"
        model.producer_name, model.producer_version = "phaseline", None
        ir.save(model, folder / files[name])
    return files
