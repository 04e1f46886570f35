"""The file of a trained compact backbone: timm's tensors, a projection, and the architecture's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from phaseline.export.backbone import Backbone, create_backbone
from phaseline.export.weights import PROJECTION, halved, load_state, read_state
from phaseline.runtime.bundle import describe_file
from phaseline.runtime.errors import MissingInputError, WeightsError


def save_backbone(state: Mapping[str, torch.Tensor], architecture: str, path: Path) -> None:
    """Write a backbone, tensors of 4096 values and more in float16.

    Parameters
    ----------
    state
        timm's tensors, and ``projection.weight`` of shape (k, D).
    architecture
        A compact ViT's name.
    path
        A ``.safetensors`` file; its folder exists.

    Raises
    ------
    WeightsError
        A value is not finite, or beyond float16: nothing is written.
    """
    save_file(halved(state), path, metadata={"architecture": architecture})


def read_backbone(path: Path) -> tuple[Backbone, torch.Tensor, str]:
    """A trained compact backbone, frozen.

    Returns
    -------
    The backbone; its projection, float tensor of shape (k, D); SHA-256 of the file.

    Raises
    ------
    MissingInputError
        No such file.
    WeightsError
        It is not a file of `phaseline train backbone`.
    """
    if not path.is_file():
        raise MissingInputError(f"no backbone at {path}; expected backbone.safetensors of `phaseline train backbone`")
    try:
        with safe_open(path, "pt") as stored:
            architecture = (stored.metadata() or {})["architecture"]
    except (OSError, SafetensorError, KeyError) as error:
        raise WeightsError(f"{path} names no architecture ({error}); expected backbone.safetensors of `phaseline train backbone`"
                           ) from error
    backbone, state = create_backbone(architecture), read_state(path)
    if PROJECTION not in state:
        raise WeightsError(f"{path} has no tensor {PROJECTION}; expected backbone.safetensors of `phaseline train backbone`")
    projection = state.pop(PROJECTION).float()
    load_state(backbone, state, origin=str(path))
    return backbone, projection, describe_file(path).sha256
