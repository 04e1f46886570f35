"""Bundles on disk: the folder that `export` writes, verified byte for byte before anything is run from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from phaseline.runtime.contract import BundleFile, BundleSpec, GraphForm
from phaseline.runtime.errors import BundleError, MissingInputError, UsageError

MANIFEST = "bundle.json"
DEFAULT_BUNDLE = Path(__file__).parent / "default_bundle"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Attributes
    ----------
    path
        Its folder.
    spec
        What `bundle.json` says.
    hash
        Its name, 64 hexadecimal digits.
    """

    path: Path
    spec: BundleSpec
    hash: str

    def graph(self, form: GraphForm) -> Path:
        """File of the graph in one form.

        Raises
        ------
        BundleError
            The bundle has no such form.
        """
        if form not in self.spec.graphs:
            raise BundleError(f"{self.path} ({self.spec.precision}) has no {form} graph, only "
                              f"{', '.join(self.spec.graphs)}; use --device cpu, or export with --precision fp16")
        return self.path / self.spec.graphs[form]

    def pixel_graph(self, form: GraphForm) -> Path:
        """File of the fused graph, tiles → pixel features, in one form.

        Raises
        ------
        UsageError
            The bundle has no upsampler.
        BundleError
            The bundle has no such form.
        """
        if not self.spec.has_upsampler:
            raise UsageError(f"{self.path} has no upsampler, so it gives no pixel features; use bilinear interpolation, or "
                             "export a bundle with --upsampler")
        self.graph(form)
        return self.path / self.spec.pixel_graphs[form]


def describe_file(path: Path) -> BundleFile:
    """Hash and size of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return BundleFile(sha256=digest, size_bytes=path.stat().st_size)


def open_bundle(path: Path | str) -> Bundle:
    """Read and verify a bundle.

    Parameters
    ----------
    path
        Its folder, or ``default`` for the one that comes with phaseline.

    Raises
    ------
    MissingInputError
        There is no such folder.
    BundleError
        `bundle.json` is missing or damaged, or a file's content does not match its hash.
    """
    folder = DEFAULT_BUNDLE if str(path) == "default" else Path(path)
    if not folder.is_dir():
        raise MissingInputError(f"no bundle at {folder}: expected a folder written by `phaseline export`, or 'default'")
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{folder / MANIFEST} cannot be read ({error}); is this a bundle?") from error
    try:
        spec = BundleSpec.from_json(text)
    except BundleError as error:
        raise BundleError(f"{folder}: {error}") from error
    for name, expected in spec.files.items():
        file = folder / name
        if not file.is_file():
            raise BundleError(f"{file} is missing from the bundle; copy or export the bundle again")
        if describe_file(file) != expected:
            raise BundleError(f"{file} is damaged: its content does not match the hash in {MANIFEST}; "
                              "copy or export the bundle again")
    return Bundle(path=folder, spec=spec, hash=spec.digest())
