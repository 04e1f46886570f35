"""What a job hands to whoever does its blocks: all that decides a block, as plain values.

    Order ─▶ open_input (a region of a volume) · open_segmenter (here, or with servers)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phaseline.clients.jobs.blocks import JobAxes
from phaseline.clients.kserve import Tls
from phaseline.clients.remote import Transport, TritonSource
from phaseline.clients.segmenter import Segmenter
from phaseline.clients.volumes.opening import open_volume
from phaseline.clients.volumes.raw import RawLayout
from phaseline.clients.volumes.reader import Missing
from phaseline.clients.volumes.region import Region, RegionVolume
from phaseline.clients.volumes.volume import Volume

BESIDES = 2
"""Blocks that a process holds besides those that it labels: one is read, one written."""


@dataclass(frozen=True)
class InputOrder:
    """Which voxels.

    Attributes
    ----------
    path
        Of the volume.
    dataset, level, raw, missing_chunks
        As `open_volume` takes them.
    region
        Part and step; None: all.
    """

    path: Path
    dataset: str | None = None
    level: int | None = None
    raw: RawLayout | None = None
    missing_chunks: Missing = "refuse"
    region: Region | None = None

    def volume(self) -> Volume:
        """The voxels; opens on ``with``."""
        volume = open_volume(self.path, dataset=self.dataset, level=self.level, raw=self.raw, missing=self.missing_chunks,
                             as_volume=True)
        return volume if self.region is None else RegionVolume(volume, self.region)


@dataclass(frozen=True)
class EngineOrder:
    """With what they are labelled.

    Attributes
    ----------
    recipe
        Folder.
    bundle
        Where its bundle is, if it was moved.
    servers
        HOST:PORT that compute deep features; empty: computed here.
    transport, timeout_s, tls
        See `TritonSource`.
    device, threads
        For what is computed here.
    """

    recipe: Path
    bundle: str | None = None
    servers: tuple[str, ...] = ()
    transport: Transport = "auto"
    timeout_s: float = 60.0
    tls: Tls | None = None
    device: str = "auto"
    threads: int | None = None

    def segmenter(self) -> Segmenter:
        """Open one; use it inside ``with``."""
        source = None
        if self.servers:
            source = TritonSource(list(self.servers), transport=self.transport, timeout_s=self.timeout_s, tls=self.tls)
        return Segmenter.open(self.recipe, bundle=self.bundle, device=self.device, threads=self.threads, source=source)


@dataclass(frozen=True)
class Order:
    """All that a block needs but its number.

    Attributes
    ----------
    input, engine
        Voxels, and what labels them.
    store
        The working store.
    scratch
        For probabilities between stages; only with three axes.
    axes, slices
        See `stages`.
    confidence, probabilities
        Whether to keep them.
    at_once
        Blocks of one process that may be labelled at the same time; others read or write meanwhile.
    """

    input: InputOrder
    engine: EngineOrder
    store: Path
    scratch: Path
    axes: JobAxes
    slices: int
    confidence: bool
    probabilities: bool
    at_once: int = 1
