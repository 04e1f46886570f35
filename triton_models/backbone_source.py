"""`BackboneSource`: the features of the models `backbone` and `features` of the server that this process belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Self

import numpy as np
import triton_python_backend_utils as pb_utils

from phaseline.clients.kserve import error_by_text
from phaseline.runtime.contract import ATTENTION, F16, PATCH_FEATURES, PIXEL_FEATURES, TILES, U8, BundleSpec
from phaseline.runtime.errors import ServerFailedError
from phaseline.runtime.protocol import model_of
from phaseline.runtime.source import check_tiles, in_batches, pixel_batch


class BackboneSource:
    """A `FeatureSource` over Triton's business-logic scripting: tiles go through the models' queues, as everybody's do.

    Parameters
    ----------
    spec
        Of the server's bundle.
    """

    def __init__(self, spec: BundleSpec) -> None:
        self.spec = spec
        self.bundle_hash = spec.digest()
        self.engine_choice = "Triton's models"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def patch_features(self, tiles: U8) -> F16:
        """Projected patch features: float16 array of shape (n, k, h, w) of uint8 tiles (n, in_channels, T, T)."""
        return self._output(tiles, PATCH_FEATURES, self.spec.max_batch)

    def iter_patch_features(self, tiles: Iterable[U8]) -> Iterator[F16]:
        """See `FeatureSource.iter_patch_features`; takes `max_batch` tiles ahead."""
        return in_batches(self.patch_features, tiles, self.spec.max_batch)

    def pixel_features(self, tiles: U8) -> F16:
        """Features of every pixel: float16 array of shape (n, k', T, T)."""
        return self._output(tiles, PIXEL_FEATURES, pixel_batch(self.spec))

    def iter_pixel_features(self, tiles: Iterable[U8]) -> Iterator[F16]:
        """See `FeatureSource.iter_pixel_features`; takes `pixel_batch` tiles ahead."""
        return in_batches(self.pixel_features, tiles, pixel_batch(self.spec))

    def attention(self, tiles: U8) -> F16:
        """[CLS] attention of the last block: float16 array of shape (n, heads, h, w)."""
        return self._output(tiles, ATTENTION, self.spec.max_batch)

    def _output(self, tiles: U8, name: str, batch: int) -> F16:
        check_tiles(tiles, self.spec)
        parts = [self._ask(tiles[i : i + batch], name) for i in range(0, len(tiles), batch)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _ask(self, tiles: U8, name: str) -> F16:
        model = model_of(name)
        response = pb_utils.InferenceRequest(
            model_name=model, requested_output_names=[name], inputs=[pb_utils.Tensor(TILES, np.ascontiguousarray(tiles))]
        ).exec()
        if response.has_error():
            text = response.error().message()
            raise error_by_text(f"{model}: {text}", text) or ServerFailedError(f"{model}: {text}")
        # A copy: the response's memory goes back to Triton with it.
        features: F16 = np.array(pb_utils.get_output_tensor_by_name(response, name).as_numpy())
        return features
