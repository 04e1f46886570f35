"""The processes of a running Triton server."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from pathlib import Path

from phaseline.triton_models.installation import STUB

# Run before tritonserver, in its process: it shall end with the keeper's, whatever ends that (1 is PR_SET_PDEATHSIG), and what
# it makes, shared memory with frames in it above all, is for its user alone.
EXEC = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.umask(0o077)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the keeper is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def stub_models(server_pid: int) -> list[str]:
    """The model of each live back-end process of a server."""
    models = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        # Processes come and go while they are listed, and some machines hide those of others.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            state, parent = (folder / "stat").read_bytes().rpartition(b")")[2].split()[:2]
            if int(parent) != server_pid or state == b"Z":
                continue
            command = os.fsdecode((folder / "cmdline").read_bytes()).split("\0")
            if Path(command[0]).name == STUB:
                models.append(Path(command[1]).parents[1].name)
    return models


@functools.cache
def has_client_shm_switch(binary: Path, environment: tuple[tuple[str, str], ...]) -> bool:
    """Whether this server has clients' shared memory off by default (from 2026-04 on)."""
    # --help ends with a status of its own; only its text counts.
    text = subprocess.run([binary, "--help"], env=dict(environment), capture_output=True, text=True, check=False)
    return "--allow-client-shm" in text.stdout + text.stderr
