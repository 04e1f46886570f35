"""What goes into a frame stream, and what comes out of it.

    Frame ──▶ ServedRecipe.planes: (planes, rows, cols[, 3]) ──▶ segment_NAME ──▶ FrameResult
      └─────▶ Busy, when there is no room
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from phaseline.runtime.contract import U8
from phaseline.runtime.errors import ServerError, UsageError

Status = Literal["done", "late", "failed"]


@dataclass(frozen=True)
class Frame:
    """One image, or stack of images, to segment.

    Attributes
    ----------
    id
        Its name, e.g. ``scan12-00042``; no two frames that wait at the same time have the same.
    image
        uint8, uint16 or float32 array of shape (rows, cols), or (planes, rows, cols) with at most `MAX_PLANES` planes; for a
        recipe of RGB images (rows, cols, 3) or (planes, rows, cols, 3).
    timestamp
        When it was taken, in any unit and from any zero; given back as it came.
    metadata
        Whatever belongs to it; given back as it came, and not sent.
    """

    id: str
    image: npt.NDArray[Any]
    timestamp: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise UsageError(f"a frame's id is {self.id!r}, expected a text that is not empty")
        try:
            self.id.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"a frame's id is {self.id!r}, which UTF-8 cannot hold ({error.reason}); give it another") from error


@dataclass(frozen=True)
class FrameResult:
    """What became of a frame.

    Attributes
    ----------
    id, timestamp, metadata
        The frame's.
    status
        ``done``; ``late``: not done within the deadline; ``failed``: the server refused it or failed on it.
    seconds
        From its acceptance to its end.
    labels
        uint8 or uint16 array of shape ([planes,] rows, cols), in the user's own label values; None unless done.
    confidence
        uint8 array of the same shape, round(255 × (p₁ - p₂)); None unless done and asked for.
    version
        Version of the recipe that made them, a number of that server's; None unless done.
    recipe_hash
        Names the recipe that made them, on whatever server; None unless done.
    error
        Why it is late (`ServerTimeoutError`) or failed; None if done.
    """

    id: str
    timestamp: float | None
    metadata: Mapping[str, Any]
    status: Status
    seconds: float
    labels: npt.NDArray[np.unsignedinteger[Any]] | None = None
    confidence: U8 | None = None
    version: int | None = None
    recipe_hash: str | None = None
    error: ServerError | None = None


class Results(AsyncIterator[FrameResult]):
    """Results, each once. An `anext` that is cancelled, as a timeout does, loses none and ends nothing: repeat it.

    Parameters
    ----------
    take
        Waits for the next result and takes it; None at the end. Does both or, if it is cancelled, none.
    """

    def __init__(self, take: Callable[[], Awaitable[FrameResult | None]]) -> None:
        self._take = take

    async def __anext__(self) -> FrameResult:
        if (result := await self._take()) is None:
            raise StopAsyncIteration
        return result


@dataclass(frozen=True)
class Busy:
    """A frame that was not accepted, since as many wait as may.

    Attributes
    ----------
    id
        The frame's.
    retry_after_s
        After how many seconds room is to be expected, if results are read.
    """

    id: str
    retry_after_s: float


@dataclass(frozen=True)
class Counts:
    """Where all frames are: sent = done + late + failed + busy + waiting.

    Attributes
    ----------
    sent
        Frames that were offered or sent, without those that raised an error.
    done, late, failed
        Delivered results, by status.
    busy
        Frames that were not accepted.
    waiting
        Frames whose result is not delivered.
    """

    sent: int = 0
    done: int = 0
    late: int = 0
    failed: int = 0
    busy: int = 0
    waiting: int = 0
