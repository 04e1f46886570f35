"""What a phaseline server and its clients promise each other: names of models, tensors and parameters (KServe v2).

    backbone          tiles (n, c, T, T) uint8 ──▶ patch_features (n, k, h, w), attention (n, heads, h, w) float16
    features          tiles (n, c, T, T) uint8 ──▶ pixel_features (n, k', T, T) float16; if the bundle has an upsampler
    segment_NAME      image_DTYPE (planes, rows, cols[, 3]) ──▶ labels, confidence (planes, rows, cols)
    recipes           request (JSON), files ──▶ answer (JSON): publish, rollback, withdraw, list
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from phaseline.runtime.contract import PIXEL_FEATURES, BundleSpec
from phaseline.runtime.errors import UsageError

BACKBONE = "backbone"
FEATURES = "features"
RECIPES = "recipes"
SEGMENT_PREFIX = "segment_"

# Inputs and outputs of segment_NAME. Exactly one image comes, by the input that bears its dtype.
IMAGE_INPUTS = {"uint8": "image_uint8", "uint16": "image_uint16", "float32": "image_float32"}
LABELS = "labels"
CONFIDENCE = "confidence"

# Inputs and output of recipes.
REQUEST = "request"
FILE_NAMES = "file_names"
FILE_CONTENTS = "file_contents"
ANSWER = "answer"

# Parameters in a model's configuration, all text.
BUNDLE_PARAMETER = "bundle"
"""Of backbone and features: the text of `bundle.json`."""
RECIPE_PARAMETER = "recipe"
"""Of segment_NAME: JSON with ``hash``, ``bundle``, ``classes``, ``image_channels``, ``window_kind`` and ``version``."""
MAX_PIXELS_PARAMETER = "max_pixels"
"""Of segment_NAME: the most pixels in one request, all planes together."""

RECIPE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
MAX_PLANES = 64
"""The most planes in one request."""
MAX_RECIPE_BYTES = 64 << 20
"""The most bytes of a recipe that can be published."""

Priority = Literal["interactive", "batch"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
PRIORITY_LEVELS: dict[Priority, int] = {"interactive": 1, "batch": 2}
"""Triton's levels: the lower number goes first."""


def network_models(spec: BundleSpec) -> tuple[str, ...]:
    """The models that run a bundle's graphs."""
    return (BACKBONE, FEATURES) if spec.has_upsampler else (BACKBONE,)


def model_of(output: str) -> str:
    """The model that gives an output of a bundle's graphs."""
    return FEATURES if output == PIXEL_FEATURES else BACKBONE


def segment_model(name: str) -> str:
    """Name of the model that serves a recipe.

    Raises
    ------
    UsageError
        A name that no model can have.
    """
    if not RECIPE_NAME.fullmatch(name):
        raise UsageError(f"recipe name {name!r} cannot be served; expected 1 to 63 of a-z, 0-9, '-' and '_', beginning with a "
                         "letter or digit; give another with NAME=PATH or --name")
    return SEGMENT_PREFIX + name
