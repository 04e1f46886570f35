"""Published recipes on disk, by name and version: what a server serves, and what outlives it.

    STORE/NAME/1/recipe.json, classifier.*      versions are numbered from 1, never changed, and never numbered again
    STORE/NAME/2/…
    STORE/NAME/current                          the version that is served; absent when NAME was withdrawn
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from phaseline.clients.recipe import MANIFEST, RecipeSettings, installed_versions, read_settings
from phaseline.runtime.errors import MissingInputError, OutputError, PhaselineError, UsageError
from phaseline.runtime.protocol import MAX_RECIPE_BYTES, RECIPE_NAME, segment_model

CURRENT = "current"
LOCK_TIMEOUT_S = 10.0


class RecipeStore:
    """A folder of published recipes. One server writes it.

    Parameters
    ----------
    folder
        Made if it does not exist.

    Raises
    ------
    OutputError
        It cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"the store {folder} cannot be made ({error.strerror}); choose another folder") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[int]:
        """Keep other servers from writing this store; ends with the processes that hold it, however they end.

        Yields
        ------
        The lock's file descriptor, for processes that shall hold it too.

        Raises
        ------
        UsageError
            Another server has it.
        OutputError
            This file system knows no locks.
        """
        # Triton runs on Linux only; the command line, which imports this file, does not.
        import fcntl

        with (self.folder / ".lock").open("w") as stream:
            deadline = time.monotonic() + LOCK_TIMEOUT_S
            try:
                while True:
                    try:
                        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        # A server whose keeper was killed holds it until it has ended.
                        if time.monotonic() > deadline:
                            raise
                        time.sleep(0.2)
            except BlockingIOError as error:
                raise UsageError(f"the store {self.folder} belongs to another running server; give each its own "
                                 "--store") from error
            except OSError as error:
                raise OutputError(f"the store {self.folder} cannot be locked ({error.strerror}); choose a folder on another file "
                                  "system") from error
            for scratch in self.folder.glob("*/.new.*"):
                shutil.rmtree(scratch, ignore_errors=True)  # A kill cut its publishing short.
            yield stream.fileno()

    def names(self) -> list[str]:
        """Names that ever were published, sorted."""
        return sorted(path.name for path in self.folder.iterdir()
                      if RECIPE_NAME.fullmatch(path.name) and path.is_dir() and self.versions(path.name))

    def versions(self, name: str) -> list[int]:
        """Versions of a recipe, ascending."""
        folder = self.path(name)
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []

    def current(self, name: str) -> int | None:
        """The version that is served, or None."""
        file = self.path(name) / CURRENT
        return int(file.read_text(encoding="ascii")) if file.is_file() else None

    def path(self, name: str, version: int | None = None) -> Path:
        """Folder of a recipe, or of one of its versions."""
        segment_model(name)
        return self.folder / name if version is None else self.folder / name / str(version)

    def settings(self, name: str, version: int) -> RecipeSettings:
        """What a version takes and gives.

        Raises
        ------
        MissingInputError
            There is no such version.
        RecipeError
            It cannot be used.
        """
        if version not in self.versions(name):
            raise MissingInputError(f"recipe {name!r} has no version {version}, only "
                                    f"{', '.join(map(str, self.versions(name))) or 'none at all'}; choose one of these")
        return read_settings(self.path(name, version))

    def add(self, name: str, files: Mapping[str, bytes]) -> int:
        """Store a new version, whole or not at all; it is not served yet.

        Parameters
        ----------
        name
            The recipe's name.
        files
            Content of `recipe.json` and of the classifier's files, by name.

        Returns
        -------
        The new version.

        Raises
        ------
        UsageError
            A name that cannot be served, or files that are no recipe's.
        RecipeError
            `recipe.json` cannot be used.
        OutputError
            The store cannot be written.
        """
        parent = self.path(name)
        if MANIFEST not in files:
            raise UsageError(f"the files {', '.join(sorted(files)) or '(none)'} came, expected a recipe's, with {MANIFEST}; "
                             "publish a folder that `phaseline fit` wrote")
        for file in files:
            if file in ("", ".", "..") or "/" in file or "\0" in file or file.startswith("."):
                raise UsageError(f"a file named {file!r} came, expected plain names; publish a folder that `phaseline fit` wrote")
        if (size := sum(map(len, files.values()))) > MAX_RECIPE_BYTES:
            raise UsageError(f"the recipe has {size} bytes, expected at most {MAX_RECIPE_BYTES}")
        try:
            parent.mkdir(exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=".new.", dir=parent))
        except OSError as error:
            raise OutputError(f"{parent} cannot be written ({error.strerror}); free space, or give another --store") from error
        try:
            for file, content in files.items():
                _write(scratch / file, content)
            settings = read_settings(scratch)
            if set(files) != {MANIFEST, *settings.files}:
                raise UsageError(f"the files {', '.join(sorted(files))} came, expected those that {MANIFEST} lists: "
                                 f"{', '.join(sorted(settings.files))}; publish the whole folder")
            version = max(self._numbers_used(parent), default=0) + 1
            _write(parent / ".last", str(version).encode())
            scratch.chmod(0o755)
            scratch.rename(parent / str(version))
        except OSError as error:
            if isinstance(error, PhaselineError):
                raise
            raise OutputError(f"{parent} cannot be written ({error.strerror}); free space, or give another --store") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return version

    def find(self, name: str, files: Mapping[str, bytes]) -> int | None:
        """The newest version that consists of exactly these files, if there is one."""
        for version in reversed(self.versions(name)):
            if {path.name: path.read_bytes() for path in self.path(name, version).iterdir()} == dict(files):
                return version
        return None

    def is_tried(self, name: str, version: int) -> bool:
        """Whether a version passed its trial with the packages that are installed now."""
        mark = self.path(name) / f".tried.{version}"
        return mark.is_file() and mark.read_text(encoding="utf-8") == json.dumps(installed_versions())

    def mark_tried(self, name: str, version: int) -> None:
        """Note that a version passed its trial."""
        _write(self.path(name) / f".tried.{version}", json.dumps(installed_versions()).encode())

    def serve(self, name: str, version: int | None) -> None:
        """Note which version is served from now on; None: none."""
        file = self.path(name) / CURRENT
        if version is None:
            file.unlink(missing_ok=True)
        else:
            _write(file, str(version).encode())

    def discard(self, name: str, version: int) -> None:
        """Remove a version that turned out to be unusable. Its number stays used."""
        shutil.rmtree(self.path(name, version))

    def _numbers_used(self, parent: Path) -> list[int]:
        last = parent / ".last"
        return [*self.versions(parent.name), *([int(last.read_text(encoding="ascii"))] if last.is_file() else [])]


def _write(path: Path, content: bytes) -> None:
    """Write a file whole: under its name stands the old content or the new, also after a crash."""
    scratch = path.with_name(f".{path.name}.part")
    with scratch.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    scratch.rename(path)
