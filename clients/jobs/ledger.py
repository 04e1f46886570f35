"""What of a job is done: lines of JSON, appended, each safe on disk before anybody relies on it.

    {"format": 1, "recipe": …, "input": …, "region": …, "axes": …, "slices": …}      what decides the output
    {"stage": "segment", "block": 0, "state": "done", "outputs": {"labels": "1f…"}, "statistics": …, …}
    {"stage": "segment", "block": 1, "state": "failed", "errors": {"17": "…"}, "attempt": 3, …}
    {"finished": …}

The last line of a block counts. A line cut short by a kill is ignored, and its block is done again. Only who holds the lock
appends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any, Self

from phaseline.runtime.errors import JobError, OutputError, OutputExistsError, PhaselineError

LEDGER = "ledger.jsonl"
LEDGER_FORMAT = 1
Line = dict[str, Any]


class Ledger:
    """The ledger of one job, held by this process inside ``with``.

    Parameters
    ----------
    path
        From `Ledger.create` or `Ledger.resume`.
    """

    def __init__(self, path: Path, header: Line, lines: list[Line], *, new: bool) -> None:
        self.path, self.header = path, header
        self._lines, self._new = lines, new
        self._stack = contextlib.ExitStack()
        self._descriptor = -1

    @classmethod
    def create(cls, folder: Path, header: Line) -> Self:
        """A new ledger, with its first line; nothing must be there.

        Raises
        ------
        OutputExistsError
            There is a ledger already.
        OutputError
            It cannot be written.
        """
        if has_begun(folder):
            raise _exists(folder / LEDGER)
        return cls(folder / LEDGER, {"format": LEDGER_FORMAT, **header}, [], new=True)

    @classmethod
    def resume(cls, folder: Path) -> Self:
        """The ledger of a job that was begun.

        Raises
        ------
        JobError
            There is none, or it cannot be understood.
        """
        header, lines = read_ledger(folder)
        return cls(folder / LEDGER, header, lines, new=False)

    def __enter__(self) -> Self:
        """Take hold of the job, with all that others have done of it until now.

        Raises
        ------
        JobError
            Another process has it, or began it anew.
        OutputExistsError
            It was to be a new one, but another process was faster.
        """
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._stack.callback(os.close, self._descriptor)
            with contextlib.ExitStack() as undo:
                undo.enter_context(self._stack)
                try:
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise _held(self.path) from error
                self._begin()
                self._stack = undo.pop_all()
        except OSError as error:
            if isinstance(error, PhaselineError):
                raise
            raise OutputError(f"{self.path} cannot be written ({error.strerror}); free space, or choose another output"
                              ) from error
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _begin(self) -> None:
        """Now that nobody else writes: the first line, or those that are there."""
        if self._new:
            if has_begun(self.path.parent):
                raise _exists(self.path)
            # A kill may have left half of a first line.
            os.ftruncate(self._descriptor, 0)
            self._write(self.header)
            return
        header, self._lines = read_ledger(self.path.parent)
        if header != self.header:
            raise JobError(f"{self.path} was begun anew by another process; go on with its job, or choose another output")
        if not self.path.read_bytes().endswith(b"\n"):
            # A kill left half a line: the next one must not be glued to it.
            os.write(self._descriptor, b"\n")

    @property
    def lines(self) -> dict[tuple[str, int], Line]:
        """The last line of each block, by stage and number."""
        return last_lines(self._lines)

    @property
    def history(self) -> list[Line]:
        """All lines but the first, in their order."""
        return list(self._lines)

    @property
    def finished(self) -> Line | None:
        """The line that ended the job, or None; blocks that came after it make it void."""
        last = self._lines[-1] if self._lines else {}
        return last if "finished" in last else None

    def append(self, line: Line) -> None:
        """Add a line, and return when it is safe.

        Raises
        ------
        OutputError
            It cannot be written.
        """
        try:
            self._write(line)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written ({error.strerror}); free space, and go on with --resume") from error
        self._lines.append(line)

    def _write(self, line: Line) -> None:
        data = (json.dumps(line, sort_keys=True) + "\n").encode()
        length = os.fstat(self._descriptor).st_size
        try:
            while data:
                # Where a part of it found room, writing the rest says why not all did.
                data = data[os.write(self._descriptor, data):]
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, length)
            raise


def has_begun(folder: Path) -> bool:
    """Whether a ledger's first line is there; of a job that was killed at once it is not, or half of it."""
    try:
        with (folder / LEDGER).open("rb") as stream:
            return stream.readline().endswith(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return False


def read_ledger(folder: Path) -> tuple[Line, list[Line]]:
    """The first line, and the others that are whole.

    Raises
    ------
    JobError
        There is no ledger, or its first line cannot be understood.
    """
    path = folder / LEDGER
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise JobError(f"no job at {folder}: {path.name} cannot be read ({error.strerror}); was it begun, and is this its output?"
                       ) from error
    lines = [line for text in texts if (line := _parse(text)) is not None]
    if not lines or lines[0].get("format") != LEDGER_FORMAT:
        raise JobError(f"{path} does not begin with a line of format {LEDGER_FORMAT}; it is of another phaseline, or was "
                       "stopped at once: begin anew with --overwrite")
    return lines[0], lines[1:]


def last_lines(lines: list[Line]) -> dict[tuple[str, int], Line]:
    """The last line of each block, by stage and number."""
    return {(line["stage"], line["block"]): line for line in lines if "stage" in line}


def bad_planes(lines: dict[tuple[str, int], Line]) -> dict[int, str]:
    """Planes that could not be used, ascending, and why; from the last lines of blocks, of which several may hold a plane."""
    found = dict[int, str]()
    for _, line in sorted(lines.items(), key=lambda item: (item[0][0] != "plane", item[0])):
        for plane, error in line.get("errors", {}).items():
            found.setdefault(int(plane), error)
    return dict(sorted(found.items()))


def failed_blocks(lines: dict[tuple[str, int], Line]) -> list[str]:
    """For people: blocks that could not be done at all, and why."""
    return [f"block {block} of stage {stage}: {line['error']}" for (stage, block), line in sorted(lines.items())
            if "error" in line]


def check_free(folder: Path) -> None:
    """Refuse a job that another process works on.

    Raises
    ------
    JobError
        One does.
    """
    path = folder / LEDGER
    if not path.exists():
        return
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _held(path) from error


def _held(path: Path) -> JobError:
    return JobError(f"{path} is held by another process that works on this job; wait for it, or stop it")


def _exists(path: Path) -> OutputExistsError:
    return OutputExistsError(f"{path} exists, of an earlier job; go on with --resume, begin anew with --overwrite, or choose "
                             "another output")


def differing(then: Line, now: Line) -> list[str]:
    """Names of what is not the same in two first lines."""
    return [name for name in sorted({*then, *now} - {"format"}) if then.get(name) != now.get(name)]


def check_same(path: Path, then: Line, now: Line) -> None:
    """Refuse to go on with a job that would give something else now.

    Raises
    ------
    JobError
        Naming what differs.
    """
    if changed := differing(then, now):
        what = "; ".join(f"{name} was {_short(then.get(name))}, is {_short(now.get(name))}" for name in changed)
        raise JobError(f"{path} was begun with another {', '.join(changed)} ({what}); --resume needs the same: put it back, or "
                       "begin anew with --overwrite")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _parse(text: str) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
