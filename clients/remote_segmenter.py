"""`RemoteSegmenter`: a published recipe's labels, computed by Triton servers: called as `Segmenter` is.

    image ─▶ segment_NAME ─▶ labels, confidence
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from phaseline.clients.crf import CRFParameters
from phaseline.clients.features import image_channels
from phaseline.clients.kserve import RequestIds, Tls, infer_request, output_arrays
from phaseline.clients.remote_server import Cancellation, Server
from phaseline.clients.remote_servers import Servers
from phaseline.clients.segmenter import Segmentation
from phaseline.clients.served_recipe import ServedRecipe
from phaseline.clients.window import without_equal_channels
from phaseline.runtime.errors import (
    EngineError,
    ImageError,
    RecipeError,
    ServerFailedError,
    ServerUnavailableError,
    UsageError,
)
from phaseline.runtime.protocol import CONFIDENCE, IMAGE_INPUTS, LABELS, PRIORITIES, Priority, segment_model


class RemoteSegmenter:
    """Segments images with a recipe that servers serve; opens on ``with``.

    The recipe is the one that was served at opening: if another is published meanwhile, its labels are refused.

    Parameters
    ----------
    servers
        HOST:PORT, one or several; all must serve the same recipe.
    name
        What the recipe was published as.
    timeout_s
        Seconds for each image, waiting and other attempts included; with several usable servers, one attempt gets half of them.
    priority
        Which requests the server does first: ``interactive`` before ``batch``.
    version
        Which version; empty: the one that is served.
    tls
        Certificates; None: no encryption.

    Raises
    ------
    UsageError
        A parameter is wrong.
    ServerUnavailableError
        On opening: no server answers.
    UnknownModelError
        On opening: a server has no such recipe, or not this version.
    RecipeError
        The servers' recipes differ, or another was published since.
    """

    def __init__(
        self,
        servers: str | Sequence[str],
        name: str,
        *,
        timeout_s: float = 120.0,
        priority: Priority = "batch",
        version: str = "",
        tls: Tls | None = None,
    ) -> None:
        if priority not in PRIORITIES:
            raise UsageError(f"priority is {priority!r}, expected one of {', '.join(PRIORITIES)}")
        self._model = segment_model(name)
        self._servers = Servers(servers, self._check, timeout_s, tls)
        self._priority: Priority = priority
        self._version = version
        self._request_ids = RequestIds()
        self._recipe: ServedRecipe | None = None
        self._reference = ""
        self._versions: dict[str, int] = {}
        self._closed = True
        self._stack = contextlib.ExitStack()

    @property
    def recipe(self) -> ServedRecipe:
        """What is served: hash, classes, and the images that it takes."""
        if self._recipe is None:
            raise EngineError("the segmenter is not open; use it inside `with`")
        return self._recipe

    @property
    def engine_choice(self) -> str:
        """The model, and its servers, in one line."""
        return f"{self._model} version {self.recipe.version}, {self._servers.description}"

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._servers)
            self._servers.open()
            self._stack = stack.pop_all()
        self._closed = False
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed = True
        self._stack.close()

    def segment(
        self,
        image: npt.NDArray[np.generic],
        *,
        probabilities: bool = False,
        crf: CRFParameters | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Segmentation:
        """Segment one image.

        Parameters
        ----------
        image
            Array of shape (rows, cols) or (rows, cols, 3), of uint8, uint16, or real numbers that float32 holds exactly; RGB
            only if the recipe was fitted on RGB, and grey then counts as RGB of equal channels.
        probabilities, crf
            Not to be had over the wire.
        progress
            Called with 1.0 at the end.

        Returns
        -------
        What `Segmenter.segment` gives for the same image and recipe.

        Raises
        ------
        UsageError
            Probabilities or a refinement were asked for.
        ImageError
            The recipe does not take such an image, or it cannot be sent.
        RecipeError
            Another recipe is served meanwhile.
        ServerError
            No server did it within the time, or one refused it or failed.
        """
        if probabilities or crf is not None:
            raise UsageError("servers send labels and confidence only, but probabilities or a CRF refinement were asked for; "
                             "segment with the recipe's folder (--recipe), whose features servers can compute too")
        if not isinstance(image, np.ndarray):
            raise ImageError(f"an image of {type(image).__name__} came, expected an array")
        if self._closed:
            raise EngineError("the segmenter is closed; use it inside `with`")
        planes = self._planes(image)
        inputs = {IMAGE_INPUTS[planes.dtype.name]: planes}

        def work(server: Server, timeout_s: float) -> Segmentation:
            request = infer_request(self._model, inputs, [LABELS, CONFIDENCE], version=self._version,
                                    request_id=self._request_ids.next(), priority=self._priority, queue_timeout_s=timeout_s)
            answer = server.infer(request, timeout_s, Cancellation())
            if answer.model_version != str(self._versions[server.address]):
                # Checked again: the same recipe under another number goes on, another one is an error.
                raise ServerUnavailableError(f"{server.address}: version {answer.model_version} of {self._model} was published")
            return self._segmentation(output_arrays(answer), planes, server)

        result = self._servers.ask(work, Cancellation())
        if progress is not None:
            progress(1.0)
        return result

    def _planes(self, image: npt.NDArray[np.generic]) -> npt.NDArray[Any]:
        """An image as it is sent: (1, rows, cols) or (1, rows, cols, 3)."""
        channels = self.recipe.image_channels
        image = without_equal_channels(image)
        if image_channels([image]) > channels:
            raise ImageError(f"the image has shape {image.shape}, but the recipe was fitted on grey images (rows, cols); convert "
                             "it to grey, or fit a recipe on such images")
        if image.dtype.kind == "f" and image.dtype != np.float32:
            # What float32 cannot hold becomes infinite, and is found unequal.
            with np.errstate(over="ignore"):
                single = image.astype(np.float32)
            if not np.array_equal(single, image):
                raise ImageError(f"the image is {image.dtype}, of values that float32 does not hold exactly: servers would give "
                                 "other labels; convert it to float32, or segment with the recipe's folder (--recipe)")
            image = single
        if channels == 3 and image.ndim == 2:
            image = np.broadcast_to(image[..., None], (*image.shape, 3))
        return self.recipe.planes(image)

    def _segmentation(self, arrays: dict[str, npt.NDArray[Any]], planes: npt.NDArray[Any], server: Server) -> Segmentation:
        labels, confidence = (arrays.get(name, np.empty(0)) for name in (LABELS, CONFIDENCE))
        expected = planes.shape[:3]
        if labels.dtype.kind != "u" or confidence.dtype != np.uint8 or {labels.shape, confidence.shape} != {expected}:
            raise ServerFailedError(f"{server.address}, {self._model}: labels {labels.dtype} {labels.shape} and confidence "
                                    f"{confidence.dtype} {confidence.shape} came, expected shape {expected}; do server and "
                                    "client have the same version of phaseline?")
        return Segmentation(labels[0], confidence[0], None)

    def _check(self, server: Server, timeout_s: float) -> None:
        """Refuse a server of another recipe."""
        recipe = ServedRecipe.from_parameters(server.parameters(self._model, timeout_s, self._version), self._model)
        if self._recipe is None:
            self._recipe, self._reference = recipe, server.address
        elif recipe.hash != self._recipe.hash:
            raise RecipeError(f"{server.address} serves recipe {recipe.hash[:12]} as {self._model}, but {self._reference} served "
                              f"{self._recipe.hash[:12]}; open it again for what is served now, or publish the same everywhere")
        self._versions[server.address] = recipe.version
