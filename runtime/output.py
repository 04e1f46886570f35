"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from phaseline.runtime.errors import OutputError, OutputExistsError


def check_folder(path: Path, overwrite: bool, manifest: str) -> None:
    """Refuse an output folder before any work is done for it.

    Parameters
    ----------
    path
        The folder that will be written.
    overwrite
        Whether a folder that is there may be replaced.
    manifest
        A file that every folder of this kind holds: a folder without it is something else, and is never replaced.

    Raises
    ------
    OutputExistsError
        It exists and may not be replaced.
    OutputError
        Its parent cannot be made or written.
    """
    if not os.path.lexists(path):
        _scratch(path).rmdir()
        return
    if not overwrite:
        raise OutputExistsError(f"{path} exists; choose another name, or replace it with --overwrite")
    if not (path / manifest).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise OutputExistsError(f"{path} exists and holds no {manifest}, so it is not replaced; choose another name")


def _scratch(path: Path) -> Path:
    """A new hidden folder beside `path`, on the same file system."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); choose a folder that can") from error


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool, manifest: str) -> Iterator[Path]:
    """Fill a folder beside its final place, and move it there only when the block ends without an error.

    Yields
    ------
    The temporary folder to write into.

    Raises
    ------
    OutputExistsError
        As `check_folder`.
    OutputError
        The folder cannot be written.
    """
    check_folder(path, overwrite, manifest)
    scratch = _scratch(path)
    try:
        fresh = scratch / "new"
        fresh.mkdir()
        yield fresh
        old = scratch / "old"
        if path.exists():
            path.rename(old)
        try:
            fresh.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
