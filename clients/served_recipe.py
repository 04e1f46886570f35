"""What a server says of a recipe that it serves, and which images it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from phaseline.clients.kserve import json_parameter
from phaseline.clients.labels import ClassTable
from phaseline.runtime.errors import ImageError, ServerRefusedError
from phaseline.runtime.protocol import IMAGE_INPUTS, MAX_PIXELS_PARAMETER, MAX_PLANES, RECIPE_PARAMETER


@dataclass(frozen=True)
class ServedRecipe:
    """What a server says of the recipe that it serves.

    Attributes
    ----------
    hash
        Names the recipe.
    version
        Its number on that server.
    classes
        Label values, their names and colours.
    image_channels
        1: grey frames, 3: RGB frames.
    window_kind
        The frames' only dtype, ``float`` for float32; None: any.
    max_pixels
        The most pixels in one frame, all planes together.
    """

    hash: str
    version: int
    classes: ClassTable
    image_channels: int
    window_kind: str | None
    max_pixels: int

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], model: str) -> Self:
        """Read a model's parameters.

        Raises
        ------
        ServerRefusedError
            They are not those of a recipe.
        """
        recipe = json_parameter(parameters, RECIPE_PARAMETER, model)
        try:
            return cls(recipe["hash"], recipe["version"], ClassTable(**recipe["classes"]), recipe["image_channels"],
                       recipe["window_kind"], int(parameters[MAX_PIXELS_PARAMETER]))
        except (KeyError, TypeError, ValueError) as error:
            raise ServerRefusedError(f"the description of model {model} cannot be understood ({error!r}); do server and client "
                                     "have the same version of phaseline?") from error

    def planes(self, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A frame's image as it is sent.

        Parameters
        ----------
        image
            uint8, uint16 or float32 array of shape (rows, cols) or (planes, rows, cols); for a recipe of RGB images with a
            last axis of 3.

        Returns
        -------
        Array of shape (planes, rows, cols[, 3]) in native byte order; one plane for a single image.

        Raises
        ------
        ImageError
            An image that this recipe cannot segment.
        """
        if not isinstance(image, np.ndarray) or image.dtype.name not in IMAGE_INPUTS:
            came = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
            raise ImageError(f"an image of {came} came, expected an array of {', '.join(IMAGE_INPUTS)}; convert it")
        kind = "float" if image.dtype.kind == "f" else image.dtype.name
        if self.window_kind not in (None, kind):
            raise ImageError(f"an image of {image.dtype} came, but the recipe was fitted on {self.window_kind} images; send "
                             "such, or fit a recipe on these")
        is_rgb = image.ndim >= 3 and image.shape[-1] == 3
        plane_ndim = 2 if self.image_channels == 1 else 3
        if is_rgb != (self.image_channels == 3) or image.ndim not in (plane_ndim, plane_ndim + 1) or not image.size:
            colour = ", 3" if self.image_channels == 3 else ""
            raise ImageError(f"an image of shape {image.shape} came, expected (rows, cols{colour}) or (planes, rows, "
                             f"cols{colour}): the recipe was fitted on {'RGB' if colour else 'grey'} images")
        planes = image[None] if image.ndim == plane_ndim else image
        pixels = int(np.prod(planes.shape[:3]))
        if len(planes) > MAX_PLANES or pixels > self.max_pixels:
            raise ImageError(f"an image of shape {image.shape} came, expected at most {MAX_PLANES} planes and {self.max_pixels} "
                             "pixels; send fewer planes at once, or start the server with a larger --max-pixels")
        if kind == "float" and not np.isfinite(image).all():
            raise ImageError("an image has NaN or infinite pixels; replace them by real values")
        return planes.astype(image.dtype.newbyteorder("="), copy=False)
