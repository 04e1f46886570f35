"""Segment the frames of a scan on one or several phaseline servers, and go on where a killed run stopped.

    python beamline.py 127.0.0.1:8001 cells scan12.tif labels

    FRAMES             a folder of images, or a TIFF file with one frame a page
       │  read one by one, as there is room
       ▼
    FrameStream        at most --in-flight frames at once, each with a --deadline
       │  results, in the frames' order
       ▼
    OUT/ID.tif         the labels, written whole or not at all
    OUT/ledger.jsonl   the recipe, then a line for each frame, added after its labels: what it does not hold as done is done
                       again, if the recipe is the same

At a detector, replace `frames_of` by what gives its images. If the detector cannot wait, replace `await stream.send(frame)` by
`stream.offer(frame)`: without room it returns `Busy` at once, and you decide what becomes of the frame.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
import tifffile

from phaseline.clients.images import list_images, read_image, write_labels
from phaseline.clients.stream import Counts, Frame, FrameResult, FrameStream
from phaseline.runtime.errors import ImageError, PhaselineError, UsageError


def frames_of(path: Path) -> Iterator[tuple[str, Callable[[], npt.NDArray[Any]]]]:
    """Id of each frame, in order, and how to read it. Ids become names of files."""
    if not path.is_file() or path.suffix.lower() not in (".tif", ".tiff"):
        # It refuses two images of one stem, whose labels would be one file.
        for image in list_images(path):
            yield image.stem, functools.partial(read_image, image)
        return
    try:
        with tifffile.TiffFile(path) as tiff:
            check_pages(tiff, path)
            for number, page in enumerate(tiff.pages):
                yield f"{path.stem}-{number:05d}", page.asarray
    except tifffile.TiffFileError as error:
        raise ImageError(f"{path} cannot be read ({error}); expected a TIFF file") from error


def check_pages(tiff: tifffile.TiffFile, path: Path) -> None:
    """Refuse a file that was cut short: its pages are a chain, and tifffile takes what it finds of it for all."""
    layout, last = tiff.tiff, tiff.pages[len(tiff.pages) - 1]
    with path.open("rb") as stream:
        stream.seek(last.offset)
        (tags,) = struct.unpack(layout.tagnoformat, stream.read(layout.tagnosize))
        stream.seek(last.offset + layout.tagnosize + tags * layout.tagsize)
        (following,) = struct.unpack(layout.offsetformat, stream.read(layout.offsetsize))
    if following:
        raise ImageError(f"{path} is truncated: after {len(tiff.pages)} pages another one should follow; copy the file again")


class Ledger:
    """What became of each frame: a file of JSON lines, the first of which names the recipe; lines are only ever added."""

    def __init__(self, path: Path, recipe_hash: str) -> None:
        content = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        entries = list(_entries(content))
        begun_with = entries[0].get("recipe") if entries else recipe_hash
        if begun_with != recipe_hash:
            raise UsageError(f"{path} was begun with recipe {(begun_with or 'unknown')[:12]}, but the servers have "
                             f"{recipe_hash[:12]} under this name; publish the former again, or choose another folder")
        self.done = {entry["id"] for entry in entries if entry.get("status") == "done"}
        self.unusable = 0
        self._file = path.open("a", encoding="utf-8")
        if content and not content.endswith("\n"):
            self._file.write("\n")
        if not entries:
            self._write({"recipe": recipe_hash})

    def add(self, frame_id: str, status: str, **more: Any) -> None:
        """Add a line, and see it on the disk."""
        self._write({"id": frame_id, "status": status, **more})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _entries(content: str) -> Iterator[dict[str, Any]]:
    """A ledger's lines, without any that a kill cut short: their frames are done again."""
    for line in content.splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


async def feed(stream: FrameStream, path: Path, ledger: Ledger) -> None:
    """Send the frames that are not done, as there is room."""
    done_before = frozenset(ledger.done)
    for frame_id, read in frames_of(path):
        if frame_id in done_before:
            continue
        try:
            # Disks are slow: they are waited for in a thread, so that results are taken meanwhile.
            await stream.send(Frame(frame_id, await asyncio.to_thread(read)))
        except ImageError as error:
            # One frame that cannot be read or segmented does not stop the others.
            ledger.unusable += 1
            ledger.add(frame_id, "failed", error=str(error))
    stream.end_input()


async def keep(result: FrameResult, out: Path, ledger: Ledger) -> None:
    """Write the labels, then say so in the ledger: after a kill in between, the frame is done again."""
    seconds = round(result.seconds, 3)
    if result.labels is None:
        ledger.add(result.id, result.status, error=str(result.error), seconds=seconds)
        return
    path = out / f"{result.id}.tif"
    await asyncio.to_thread(write_labels, path, result.labels)
    ledger.add(result.id, "done", labels=path.name, recipe_version=result.version, seconds=seconds)


async def segment(arguments: argparse.Namespace) -> tuple[Counts, Ledger]:
    """Feed and keep side by side; what goes wrong in one of them ends both."""
    stream = FrameStream(arguments.servers, arguments.recipe, in_flight=arguments.in_flight, deadline_s=arguments.deadline)
    try:
        async with stream:
            ledger = Ledger(arguments.out / "ledger.jsonl", stream.recipe.hash)
            with contextlib.closing(ledger):
                async with asyncio.TaskGroup() as group:
                    group.create_task(feed(stream, arguments.frames, ledger))
                    async for result in stream.results():
                        await keep(result, arguments.out, ledger)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return stream.counts, ledger


def main() -> int:
    """0: all frames are done. 1: some failed or were late. 2: asked for wrongly."""
    parser = argparse.ArgumentParser(description="Segment a scan's frames on phaseline servers; go on after a kill.")
    parser.add_argument("servers", help="HOST:PORT of the server's gRPC, several separated by commas")
    parser.add_argument("recipe", help="name under which the recipe is served")
    parser.add_argument("frames", type=Path, help="a folder of images, or a TIFF file with one frame a page")
    parser.add_argument("out", type=Path, help="folder for the labels and the ledger")
    parser.add_argument("--in-flight", type=int, default=8, help="the most frames at once (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds after which a frame is late (default: %(default)s)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        counts, ledger = asyncio.run(segment(arguments))
    except PhaselineError as error:
        print(f"beamline: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(f"done {counts.done}, done before {len(ledger.done)}, late {counts.late}, failed {counts.failed}, "
          f"unusable {ledger.unusable}")
    return 1 if counts.late or counts.failed or ledger.unusable else 0


if __name__ == "__main__":
    sys.exit(main())
