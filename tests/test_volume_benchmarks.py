"""The benchmark of volume jobs, run once, tiny: that it works and would notice wrong labels; its figures are not looked at."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[bench]'")
pytest.importorskip("tqdm", reason="needs tqdm: pip install '.[bench]'")
pytest.importorskip("zarr", reason="needs zarr: pip install '.[volumes]'")
pytest.importorskip("h5py", reason="needs h5py: pip install '.[volumes]'")

from benchmarks import synthetic_volume, volumes
from benchmarks.synthetic_volume import FORMATS, SyntheticVolume
from benchmarks.volume_jobs import Bench, strokes, watch
from phaseline.clients.__main__ import build_app
from phaseline.clients.jobs.blocks import runs
from phaseline.clients.jobs.cluster import parse_cluster
from phaseline.clients.volumes.opening import open_volume
from phaseline.clients.volumes.volume import VoxelSize
from phaseline.clients.volumes.zarr_sink import ZarrSink
from phaseline.runtime.bundle import Bundle

DOCS = Path(__file__).parents[1] / "docs"
SHAPE = (5, 40, 48)


# The tomogram.


@pytest.mark.parametrize("file_format", FORMATS)
def test_volume_is_written_as_it_is_made(file_format: str, tmp_path: Path) -> None:
    made = SyntheticVolume(SHAPE, seed=3, grain=8)
    name = {"folder": "planes", "hdf5": "volume.h5", "bigtiff": "volume.tif"}[file_format]
    out, truth = tmp_path / name, tmp_path / "truth.npy"
    made.write(out, file_format, truth)
    assert sorted(tmp_path.iterdir()) == sorted([out, truth])
    again = SyntheticVolume(SHAPE, seed=3, grain=8)
    with open_volume(out, as_volume=True) as grey, open_volume(truth) as labels:
        assert (grey.info.shape, grey.info.dtype, labels.info.dtype) == (SHAPE, np.uint16, np.uint8)
        assert grey.info.voxel == (VoxelSize((0.65, 0.65, 0.65), "micrometer") if file_format == "hdf5" else None)
        for plane, box in reversed([*enumerate(runs(SHAPE, "plane", 1))]):
            np.testing.assert_array_equal(grey.read(box)[0], again.plane(plane))
            np.testing.assert_array_equal(labels.read(box)[0], again.truth(plane))


def test_phases_can_be_told_apart_and_reach_over_planes() -> None:
    made = SyntheticVolume((24, 96, 96), seed=1, grain=12)
    truth = np.stack([made.truth(plane) for plane in range(24)])
    grey = np.stack([made.plane(plane) for plane in range(24)])
    shares = np.bincount(truth.reshape(-1), minlength=4) / truth.size
    assert shares[0] == 0
    assert (shares[1:] > 0.05).all()
    assert [*np.argsort([grey[truth == value].mean() for value in (1, 2, 3)])] == [0, 1, 2]
    assert (truth[1:] != truth[:-1]).mean() < 0.15
    assert not np.array_equal(truth[0], SyntheticVolume((24, 96, 96), seed=2, grain=12).truth(0))


def test_volume_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(tmp_path / "tomogram.tif"), "--shape", "3x32x40", "--grain", "8"]
    synthetic_volume.main(command)
    assert "3 × 32 × 40 uint16" in capsys.readouterr().out
    assert np.load(tmp_path / "tomogram_truth.npy").shape == (3, 32, 40)
    with pytest.raises(SystemExit, match="exists"):
        synthetic_volume.main(command)


def test_strokes_are_few_and_right() -> None:
    truth = SyntheticVolume((1, 96, 96), seed=1, grain=12).truth(0)
    painted = strokes(truth, 0)
    assert 0 < np.count_nonzero(painted) < truth.size / 2
    assert set(np.unique(painted)) == {0, 1, 2, 3}
    assert (painted == truth)[painted > 0].all()


# The watch.


def test_memory_of_children_is_seen() -> None:
    code = "import time; held = bytearray(b'x' * (300 << 20)); time.sleep(1)"
    _, peak, printed = watch([sys.executable, "-c", f"import subprocess, sys; print('begun'); "
                                                    f"subprocess.run([sys.executable, '-c', {code!r}], check=True)"])
    assert peak > 300 << 20
    assert printed == "begun\n"


def test_failed_command_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"ended with 3: no such thing"):
        watch([sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"])


# The tables.


@pytest.fixture(scope="module")
def page(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark's page; its volumes and outputs lie beside it in ``work``."""
    folder = tmp_path_factory.mktemp("volumes")
    volumes.main(["--quick", "--threads", "1", "--bundle", str(tiny_bundle.path), "--work", str(folder / "work"), "--out",
                  str(folder / "out.md")])
    return folder / "out.md"


def tables(text: str) -> list[list[dict[str, str]]]:
    """Rows of each Markdown table, by column."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


@pytest.mark.slow
def test_tables(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    acceptance, recipes, growth, overlap = tables(text)
    assert acceptance[0] | {"voxels": "6 × 64 × 72", "allowed, MiB": "2048", "within": "yes",
                            "planes equal to one by one": "3 of 3"} == acceptance[0]
    assert 0 < float(acceptance[0]["peak memory, MiB"]) < 2048
    assert 0.3 < float(acceptance[0]["mIoU"].strip("*")) <= 1
    assert [row["recipe"] for row in recipes] == [volumes.WAYS[way] for way in ("classical", "bilinear", "learned")]
    for row in recipes:
        assert {"voxels/s", "read, µs/voxel", "compute, µs/voxel", "write, µs/voxel", "shares, %", "peak memory, MiB"} <= set(row)
        assert sum(float(share) for share in row["shares, %"].split("/")) == pytest.approx(100, abs=0.2)
    assert [row["planes"] for row in growth] == ["4", "8"]
    assert growth[0]["× the first"] == growth[0]["× the first's"] == "1.000"
    assert {"µs/voxel", "peak memory, MiB"} <= set(growth[1])
    assert list(overlap[0]) == ["recipe", "read alone, s", "compute alone, s", "write alone, s", "sum, s", "job, s",
                                "job / longest step", "range", "asked"]
    assert "![out](out.png)" in text
    assert page.with_suffix(".png").stat().st_size > 5000


@pytest.mark.slow
def test_wrong_labels_are_noticed(page: Path, tiny_bundle: Bundle) -> None:
    bench = Bench(page.parent / "work", {"bilinear": str(tiny_bundle.path)}, 1, "hdf5", 10.0, 0)
    volume = bench.volume(volumes.QUICK["acceptance_shape"])
    recipe, out = bench.recipe("bilinear", volume), page.parent / "work" / f"{volume.path.stem}_labels.ome.zarr"
    planes = list(range(volume.content.shape[0]))
    assert volumes.differing_planes(out, recipe, volume, planes, 1) == []
    ious = volumes.volume_ious(out, volume.truth)
    sink = ZarrSink(out)
    box = next(box for box in sink.layout.blocks if box.start[0] <= 2 < box.stop[0])
    labels = sink.read("labels", box)
    changed = (2 - box.start[0], 7, 9)
    labels[changed] = labels[changed] % 3 + 1
    sink.write("labels", box, labels)
    assert volumes.differing_planes(out, recipe, volume, planes, 1) == [2]
    assert volumes.volume_ious(out, volume.truth) != ious


def test_ious_of_known_labels(tmp_path: Path) -> None:
    truth, labels = np.ones((2, 4, 4), np.uint8), np.ones((2, 4, 4), np.uint8)
    truth[1], labels[1, :2] = 3, 3
    np.save(tmp_path / "truth.npy", truth)
    np.save(tmp_path / "labels.npy", labels)
    assert volumes.volume_ious(tmp_path / "labels.npy", tmp_path / "truth.npy") == {
        "pore": 16 / 24, "matrix": 1.0, "inclusion": 8 / 16}


def test_learned_features_need_an_upsampler(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tiny_bundle.spec), "has_upsampler", False)
    with pytest.raises(SystemExit, match="give one with --learned"):
        volumes.main(["--quick", "--bundle", str(tiny_bundle.path), "--way", "learned"])


# The page's example.


def test_slurm_example_makes_a_script() -> None:
    pytest.importorskip("dask_jobqueue", reason="needs dask-jobqueue: pip install '.[cluster]'")
    from dask_jobqueue.slurm import SLURMJob

    spec = parse_cluster(str(DOCS / "examples" / "slurm.yaml"))
    assert (spec.kind, spec.queue) == ("queue", "slurm")
    options = dict(spec.options)
    # Of the cluster, not of its jobs.
    assert options.pop("scheduler_options")["dashboard_address"].startswith("127.0.0.1:")
    script = SLURMJob(scheduler="tcp://127.0.0.1:1", name="worker", **options).job_script()
    # A block is read, another labelled and another written: more threads would only hold more blocks in memory.
    assert "--nthreads 3 " in script
    assert f"--cpus-per-task={options['job_cpu']}" in script
    assert "--nworkers" not in script
    (line,) = re.findall(r"^sbatch .*$", (DOCS / "volumes.md").read_text(encoding="utf-8"), re.MULTILINE)
    group: Any = typer.main.get_command(build_app())
    given = group.commands["segment"].make_context("segment", shlex.split(shlex.split(line)[-1])[2:]).params
    assert (given["cluster"], given["threads"], given["resume"]) == ("slurm.yaml", options["job_cpu"], True)
