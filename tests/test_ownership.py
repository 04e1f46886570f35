"""Names that tell who made a thing, and removing what killed processes left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phaseline.runtime import ownership
from phaseline.runtime.ownership import is_abandoned, owned_name, sweep


def name_of_a_dead_process(kind: str) -> str:
    code = f"from phaseline.runtime.ownership import owned_name; print(owned_name({kind!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout.strip()


def test_a_live_process_keeps_its_own() -> None:
    name = owned_name("client")
    assert str(os.getpid()) in name and name != owned_name("client")
    assert not is_abandoned(name, "client") and not is_abandoned(f"{name}-more", "client")


def test_a_dead_process_has_abandoned_its_own() -> None:
    name = name_of_a_dead_process("client")
    assert is_abandoned(name, "client") and is_abandoned(f"{name}-more", "client")
    assert not is_abandoned(name, "serve")


def test_a_number_that_is_used_again_is_another_process() -> None:
    parts = owned_name("serve").split("-")
    parts[4] = str(int(parts[4]) + 1)
    assert is_abandoned("-".join(parts), "serve")


def test_other_namespaces_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    name = name_of_a_dead_process("serve")
    monkeypatch.setattr(ownership, "_namespace", lambda: 1)
    assert not is_abandoned(name, "serve")


@pytest.mark.parametrize("name", ["", "phaseline", "phaseline-serve-1-2-3", "other-serve-1-2-3-ab", "phaseline-serve-x-2-3-ab"])
def test_foreign_names_are_not_judged(name: str) -> None:
    assert not is_abandoned(name, "serve")


def test_sweeping(tmp_path: Path) -> None:
    dead = name_of_a_dead_process("serve")
    (tmp_path / dead / "inside").mkdir(parents=True)
    (tmp_path / f"{dead}-region").touch()
    (tmp_path / f"{dead}-link").symlink_to(tmp_path)
    kept = [owned_name("serve"), name_of_a_dead_process("client"), "something else"]
    for name in kept:
        (tmp_path / name).touch()
    assert sweep(tmp_path, "serve") == sorted([dead, f"{dead}-region", f"{dead}-link"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    assert sweep(tmp_path / "missing", "serve") == []
