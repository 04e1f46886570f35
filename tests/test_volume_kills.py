"""Jobs that are killed at any moment, or whose disk fills up: gone on with, they give the same bytes, and the ledger is clean."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import volume_soak
from benchmarks.volume_soak import Variant, check_ledger
from phaseline.clients.__main__ import run
from phaseline.clients.jobs import plan as plan_module
from phaseline.clients.jobs.job import Step, VolumeJob
from phaseline.clients.jobs.request import job_folder
from phaseline.runtime.errors import OutputError
from tests.volumes import ALL, blocks_of, command, files, make_recipe, one_line, request, save, tiff_file, tomogram

pytestmark = pytest.mark.slow

# Two levels of pyramid, four blocks of planes.
SHAPE = (10, 16, 260)
KILLS = 25
OUTPUTS = ("o.ome.zarr", "o.h5", "o.tif")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("volume") / "v.npy", tomogram(SHAPE))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes") / "recipe"
    make_recipe(tomogram(SHAPE)).save(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, source: Path, recipe: Path) -> dict[str, dict[str, bytes]]:
    """What jobs write that nothing interrupts, by their output's name."""
    folder = tmp_path_factory.mktemp("whole")
    for name in OUTPUTS:
        assert run(command(source, recipe, folder / name, *ALL)) == 0
    return {name: written(folder / name) for name in OUTPUTS}


def written(out: Path) -> dict[str, bytes]:
    """All files of an output by name, of TIFF those of the other arrays too."""
    if out.suffix != ".tif":
        return files(out)
    return {path.name: path.read_bytes() for path in (tiff_file(out, name) for name in ("labels", "confidence", "probabilities"))}


def test_kills_at_random_moments(tmp_path: Path, source: Path, recipe: Path) -> None:
    rows = volume_soak.run(source, recipe, tmp_path, kills=KILLS, seed=1)
    assert [row["torn files"] for row in rows] == [0] * 3
    assert [row["outputs that differ"] for row in rows] == [0] * 3
    assert [row["ledgers not clean"] for row in rows] == [0] * 3
    assert [row["blocks done twice"] for row in rows] == [0] * 3
    assert sum(row["kills"] for row in rows) == KILLS
    # They came while something was at stake.
    assert sum(row["amid blocks"] for row in rows) > 0


@pytest.mark.parametrize(("variant", "moments"), [
    (Variant("planes, OME-Zarr", "o.ome.zarr"), lambda changes: range(2, changes, 4)),
    (Variant("planes, HDF5", "o.h5", ("--confidence",)), lambda changes: range(1, changes, 5)),
    # From the last block on: pyramid, report, the file itself, and tidying up.
    (Variant("planes, HDF5", "o.h5", ("--confidence",)), lambda changes: range(changes - 40, changes + 1, 4)),
    (Variant("planes, TIFF", "o.tif", ALL), lambda changes: range(changes - 50, changes + 1, 5)),
    (Variant("three directions, TIFF", "o.tif", ("--axes", "3", "--block", "9")), lambda changes: range(3, changes, 7)),
])
def test_kills_before_changes_of_files(
    tmp_path: Path, source: Path, recipe: Path, variant: Variant, moments: Callable[[int], range]
) -> None:
    """Some of the changes; `python -m benchmarks.volume_soak --changes` has all."""
    row = volume_soak.at_changes(source, recipe, tmp_path / "jobs", variant, moments=moments)
    assert (row["torn files"], row["outputs that differ"], row["ledgers not clean"], row["files left over"]) == (0, 0, 0, 0)
    assert row["kills"] >= 8


def test_a_killed_command(tmp_path: Path, source: Path, recipe: Path, whole: dict[str, dict[str, bytes]]) -> None:
    """The real one, once: started by a shell, killed when it has done a block, and gone on with."""
    out = tmp_path / "o.ome.zarr"
    words = [sys.executable, "-m", "phaseline.clients", *command(source, recipe, out, *ALL, "--block", "1")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        while not (job_folder(out) / "ledger.jsonl").exists() or not blocks_of_killed(out):
            assert process.poll() is None, process.communicate()[1]
        process.kill()
    assert process.returncode == -9
    assert 0 < len(blocks_of_killed(out)) < SHAPE[0]
    end = subprocess.run([*words, "--resume"], capture_output=True, text=True, check=False)
    assert end.returncode == 0 and end.stderr == ""
    assert sorted(blocks_of(out)) == [("segment", i) for i in range(SHAPE[0])]
    uninterrupted = tmp_path / "u.ome.zarr"
    assert run(command(source, recipe, uninterrupted, *ALL, "--block", "1")) == 0
    assert files(out) == files(uninterrupted)


def blocks_of_killed(out: Path) -> list[bytes]:
    return [line for line in (job_folder(out) / "ledger.jsonl").read_bytes().split(b"\n")[:-1] if b'"state": "done"' in line]


# --- disks that fill up -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], capture_output=True, text=True,
                             check=False) if shutil.which("mount") else None
    if mounted is None or mounted.returncode:
        pytest.skip(f"needs the right to mount a small tmpfs ({mounted.stderr.strip() if mounted else 'no mount command'})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Take all space of a disk but so many bytes."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
    size = ballast.stat().st_size
    os.truncate(ballast, size - leave)
    return ballast


def at(moment: str, act: Callable[[], Any]) -> dict[str, Any]:
    """Options of `VolumeJob.run` that do something after the first block, or when the job says something."""
    done: list[Step] = []

    def progress(step: Step) -> None:
        done.append(step)
        if moment == BLOCK and len(done) == 1:
            act()

    return {"progress": progress, "say": lambda line: act() if moment in line else None}


BLOCK, PYRAMID, REPORT, FINISH = "a block is done", "building the pyramid", "writing the report", "writing /"


@pytest.mark.parametrize(("name", "moment", "leave"), [
    *((name, moment, 0) for name in OUTPUTS for moment in (BLOCK, PYRAMID, REPORT)),
    ("o.ome.zarr", BLOCK, 12_288), ("o.h5", REPORT, 65_536),
    ("o.h5", FINISH, 0), ("o.tif", FINISH, 0), ("o.h5", FINISH, 32_768), ("o.tif", FINISH, 32_768),
])
def test_a_disk_that_fills_up(
    small_disk: Path, source: Path, recipe: Path, whole: dict[str, dict[str, bytes]], name: str, moment: str, leave: int
) -> None:
    out, ballast = small_disk / name, list[Path]()
    with VolumeJob.open(request(source, recipe, out, confidence=True, probabilities=True)) as job, \
            pytest.raises(OutputError) as caught:
        job.run(**at(moment, lambda: ballast.append(fill(small_disk, leave))))
    message = str(caught.value)
    assert "\n" not in message and str(small_disk) in message and "No space left on device" in message
    assert not out.exists() or name == "o.ome.zarr"
    ballast[0].unlink()
    assert run(command(source, recipe, out, *ALL, "--resume")) == 0
    assert written(out) == whole[name]
    done, clean = check_ledger(out)
    assert clean and sorted(done.items()) == [(("segment", i), 1) for i in range(4)]
    left = {path.name for path in small_disk.iterdir()} - set(written(out)) - {f"{name}.job", "o.ome.zarr"}
    assert left == set()


def test_a_disk_without_room_for_scratch(
    small_disk: Path, source: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small_disk / "o.h5"
    with VolumeJob.open(request(source, recipe, out, axes="3")) as job, pytest.raises(OutputError, match="No space left"):
        job.run(**at(BLOCK, lambda: fill(small_disk, 100_000)))
    assert blocks_of(out, "failed") == []
    # While there is none, it says so again, before anything else.
    assert run(command(source, recipe, out, "--axes", "3", "--resume")) == 1
    assert "of disk, but" in one_line(capsys)
    (small_disk / "ballast").unlink()
    assert run(command(source, recipe, out, "--axes", "3", "--resume")) == 0
    assert run(command(source, recipe, tmp_path / "o.h5", "--axes", "3")) == 0
    assert files(out) == files(tmp_path / "o.h5")
    assert len(blocks_of(out)) == len(set(blocks_of(out)))


def test_a_disk_that_is_full_before_the_first_line(
    small_disk: Path, source: Path, recipe: Path, whole: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = small_disk / "o.h5"
    ballast = fill(small_disk)
    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "free_bytes", lambda folder: 1 << 40)
        assert run(command(source, recipe, out, *ALL)) == 1
    assert "No space left on device" in one_line(capsys)
    ballast.unlink()
    assert run(command(source, recipe, out, *ALL, "--resume")) == 0
    assert written(out) == whole["o.h5"]


LIMITED = """
import resource, sys
from phaseline.clients.__main__ import run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit", [300, 4_000, 30_000, 150_000])
@pytest.mark.parametrize("name", OUTPUTS)
def test_files_that_may_not_grow(
    tmp_path: Path, source: Path, recipe: Path, whole: dict[str, dict[str, bytes]], name: str, limit: int
) -> None:
    """As a quota does, without the right to mount anything: the first file that exceeds it stops the job."""
    out = tmp_path / "o" / name
    words = command(source, recipe, out, *ALL)
    largest = max(map(len, whole[name].values()))
    end = subprocess.run([sys.executable, "-c", LIMITED, str(limit), *words], capture_output=True, text=True, check=False)
    assert end.returncode == 1, (largest, end.stderr)
    (line,) = end.stderr.splitlines()
    assert line.startswith("phaseline: ") and os.strerror(errno.EFBIG) in line and str(tmp_path) in line
    assert name == "o.ome.zarr" or not out.exists()
    assert run([*words, "--resume"]) == 0
    assert written(out) == whole[name]
    done, clean = check_ledger(out)
    assert clean and sorted(done.items()) == [(("segment", i), 1) for i in range(4)]


def test_nothing_is_lost_when_the_ledger_cannot_be_written(
    tmp_path: Path, source: Path, recipe: Path, whole: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Half of a line goes through: it is taken back."""
    out, write, lines = tmp_path / "o.tif", os.write, [0]

    def half(descriptor: int, data: bytes) -> int:
        lines[0] += data.startswith(b"{")
        if lines[0] == 4 and not data.startswith(b"{"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[: len(data) // 2] if lines[0] == 4 else data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        assert run(command(source, recipe, out, *ALL)) == 1
    assert "ledger.jsonl cannot be written (No space left on device)" in one_line(capsys)
    assert len(blocks_of(out)) == 1
    assert run(command(source, recipe, out, *ALL, "--resume")) == 0
    assert written(out) == whole["o.tif"]

