"""Names that tell which process made a thing, so that what a killed process left behind can be found and removed.

    phaseline-KIND-PIDNAMESPACE-PID-STARTED-RANDOM

Only things of this process namespace are ever judged: containers may share /dev/shm and not see each other's processes.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
_NAME = re.compile(r"phaseline-(?P<kind>[a-z]+)-(?P<namespace>\d+)-(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]+.*")


def owned_name(kind: str) -> str:
    """A new name for something that this process makes; `kind` is of a-z."""
    return f"phaseline-{kind}-{_namespace()}-{os.getpid()}-{_started(os.getpid())}-{secrets.token_hex(4)}"


def is_abandoned(name: str, kind: str) -> bool:
    """Whether a name is of this kind and namespace, and its process is gone."""
    match = _NAME.fullmatch(name)
    if match is None or match["kind"] != kind or int(match["namespace"]) != _namespace():
        return False
    try:
        return _started(int(match["pid"])) != int(match["started"])
    except PermissionError:
        # A process of another user, on a machine that hides them: it is there.
        return False


def sweep(folder: Path, kind: str) -> list[str]:
    """Remove what killed processes left in a folder: files and folders of this user whose names say so.

    Returns
    -------
    Names of what was removed.
    """
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            if not is_abandoned(path.name, kind) or path.lstat().st_uid != os.getuid():
                continue
        except FileNotFoundError:
            continue  # Another process sweeps too.
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path.name)
    return removed


def _namespace() -> int:
    link = Path("/proc/self/ns/pid")
    return link.stat().st_ino if link.exists() else 0


def _started(pid: int) -> int | None:
    """When a process began, in ticks since the machine's start; None if there is no such process."""
    try:
        # The second field, the command's name, may hold anything, brackets included.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # A zombie has ended: it only waits for its parent to ask.
    return None if fields[0] == b"Z" else int(fields[19])
