"""Jobs over volumes: the labels of single slices, and what is refused, retried, reported, verified, and gone on with."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from phaseline.clients.__main__ import run
from phaseline.clients.images import read_image
from phaseline.clients.jobs import job as job_module
from phaseline.clients.jobs import plan as plan_module
from phaseline.clients.jobs.blocks import JobAxes
from phaseline.clients.jobs.combine import combined
from phaseline.clients.jobs.ledger import LEDGER, Ledger
from phaseline.clients.jobs.plan import Measured, Plan, make_plan, measure
from phaseline.clients.jobs.request import job_folder
from phaseline.clients.jobs.worker import BlockWorker
from phaseline.clients.recipe import load_recipe, recipe_hash
from phaseline.clients.segmenter import Segmenter
from phaseline.clients.volumes.volume import AXES, VolumeInfo
from phaseline.clients.volumes.zarr_sink import ZarrSink
from phaseline.runtime.errors import EngineError, JobError, OutputError, ServerUnavailableError
from tests.volumes import (
    ALL,
    NAMES,
    SHAPE,
    U16,
    VALUES,
    Arrays,
    blocks_of,
    check_arrays,
    command,
    cut_file,
    files,
    ledger_lines,
    make_recipe,
    one_by_one,
    one_line,
    read_output,
    report_of,
    request,
    save,
    save_planes,
    stop_after,
    three_directions,
    tiff_file,
    tomogram,
)

OUTPUTS = ("o.ome.zarr", "o.h5", "o.tif")
MIDDLE = SHAPE[0] // 2
"""The plane that is measured before a job begins."""


@pytest.fixture(scope="module")
def volume() -> U16:
    return tomogram()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, volume: U16) -> Path:
    """The volume in a file that tests leave as it is."""
    return save(tmp_path_factory.mktemp("volume") / "v.npy", volume)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, volume: U16) -> Path:
    folder = tmp_path_factory.mktemp("recipes") / "recipe"
    make_recipe(volume).save(folder)
    return folder


@pytest.fixture(scope="module")
def expected(recipe: Path, volume: U16) -> dict[str, Arrays]:
    """By axes: what slices give that are segmented one by one."""
    return {**{axis: one_by_one(recipe, volume, axis) for axis in AXES}, "3": three_directions(recipe, volume)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, source: Path, recipe: Path) -> dict[str, Path]:
    """Finished jobs that nothing interrupted, by their output's name: to be read only."""
    folder = tmp_path_factory.mktemp("whole")
    for name in OUTPUTS:
        assert run(command(source, recipe, folder / name, *ALL)) == 0
    return {name: folder / name for name in OUTPUTS}


def tree(folder: Path) -> dict[str, bytes]:
    return files(folder) | {f"{path.relative_to(folder)}/": b"" for path in folder.rglob("*") if path.is_dir()}


def break_segmenter(
    monkeypatch: pytest.MonkeyPatch, slices: list[npt.NDArray[Any]], error: BaseException, times: int = 10**9
) -> list[int]:
    """Let segmenting one of these slices fail so often; gives a list of one number, which counts the failures."""
    original, failures = Segmenter.segment, [0]

    def segment(self: Segmenter, image: npt.NDArray[Any], **options: Any) -> Any:
        if failures[0] < times and any(np.array_equal(image, one) for one in slices):
            failures[0] += 1
            raise error
        return original(self, image, **options)

    monkeypatch.setattr(Segmenter, "segment", segment)
    return failures


class TestLabels:
    """The same as from single images."""

    @pytest.mark.parametrize(("axes", "name"), [
        ("plane", "o.ome.zarr"), ("plane", "o.h5"), ("plane", "o.tif"), ("row", "o.ome.zarr"), ("row", "o.tif"), ("col", "o.h5"),
    ])
    def test_of_slices_along_an_axis(
        self, tmp_path: Path, source: Path, recipe: Path, expected: dict[str, Arrays], axes: str, name: str
    ) -> None:
        out = tmp_path / name
        assert run(command(source, recipe, out, *ALL, "--axes", axes)) == 0
        check_arrays(out, expected[axes])
        assert len(blocks_of(out)) == -(-SHAPE[AXES.index(axes)] // 3)  # type: ignore[arg-type]
        kept = [out.name, f"{out.name}.job"] + ["o_confidence.tif", "o_probabilities.tif"] * (name == "o.tif")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
        assert sorted(path.name for path in job_folder(out).iterdir()) == ["ledger.jsonl", "report.html", "report.json"]
        # Directions are told apart: their labels are not the same.
        assert not np.array_equal(expected["plane"]["labels"], expected["row"]["labels"])

    @pytest.mark.parametrize("name", OUTPUTS)
    def test_of_three_directions(
        self, tmp_path: Path, source: Path, recipe: Path, expected: dict[str, Arrays], name: str
    ) -> None:
        out = tmp_path / name
        assert run(command(source, recipe, out, *ALL, "--axes", "3", "--block", "4")) == 0
        check_arrays(out, expected["3"])
        index, confidence, probabilities = combined([expected[axis]["probabilities"] for axis in AXES])
        assert np.array_equal(np.array(VALUES, np.uint8)[index], expected["3"]["labels"])
        assert np.array_equal(confidence, expected["3"]["confidence"])
        assert np.array_equal(probabilities, expected["3"]["probabilities"])
        assert {stage for stage, _ in blocks_of(out)} == {"plane", "row", "col", "combine"}
        assert sorted(path.name for path in job_folder(out).iterdir()) == ["ledger.jsonl", "report.html", "report.json"]

    @pytest.mark.parametrize("axes", ["plane", "col", "3"])
    def test_of_a_region(self, tmp_path: Path, source: Path, recipe: Path, volume: U16, axes: str) -> None:
        part = np.ascontiguousarray(volume[1:10:2, 4:36, 3:50:3])
        found = three_directions(recipe, part) if axes == "3" else one_by_one(recipe, part, axes)  # type: ignore[arg-type]
        assert run(command(source, recipe, tmp_path / "o.h5", *ALL, "--axes", axes, "--region", "1:10:2,4:36,3:50:3")) == 0
        check_arrays(tmp_path / "o.h5", found)
        region = report_of(tmp_path / "o.h5")["region"]
        assert region == {"start": [1, 4, 3], "stop": [10, 36, 49], "step": [2, 1, 3]}

    @pytest.mark.parametrize("axes", ["row", "3"])
    def test_with_values_above_255(self, tmp_path: Path, source: Path, volume: U16, axes: str) -> None:
        make_recipe(volume, (3, 300, 4000)).save(tmp_path / "r")
        assert run(command(source, tmp_path / "r", tmp_path / "o.ome.zarr", "--axes", axes)) == 0
        labels = read_output(tmp_path / "o.ome.zarr", ("labels",))["labels"]
        assert labels.dtype == np.uint16 and set(np.unique(labels)) == {3, 300, 4000}
        if axes == "row":
            assert np.array_equal(labels, one_by_one(tmp_path / "r", volume, "row")["labels"])

    def test_of_a_single_voxel_in_some_direction(self, tmp_path: Path, recipe: Path) -> None:
        for shape in ((1, 9, 12), (9, 1, 12), (1, 1, 1)):
            volume = tomogram(shape)
            source = save(tmp_path / f"{shape}.npy", volume)
            for axes in ("row", "3"):
                for suffix in ("h5", "tif") if shape != (1, 1, 1) else ("h5", "ome.zarr"):
                    out = tmp_path / f"{shape}{axes}.{suffix}"
                    assert run(command(source, recipe, out, *ALL, "--axes", axes)) == 0
                    check_arrays(out, three_directions(recipe, volume) if axes == "3" else one_by_one(recipe, volume, "row"))
                    assert run(["verify", str(out), "--quiet"]) == 0

    @pytest.mark.parametrize("block", ["1", "2", "11", "64"])
    def test_whatever_the_blocks(
        self, tmp_path: Path, source: Path, recipe: Path, expected: dict[str, Arrays], block: str
    ) -> None:
        assert run(command(source, recipe, tmp_path / "o.tif", *ALL, "--axes", "3", "--block", block)) == 0
        check_arrays(tmp_path / "o.tif", expected["3"])


class TestReport:
    """What report.json says, against the output."""

    @pytest.mark.parametrize(("axes", "name"), [("plane", "o.ome.zarr"), ("row", "o.h5"), ("3", "o.tif")])
    def test_numbers_are_the_outputs(self, tmp_path: Path, source: Path, recipe: Path, axes: str, name: str) -> None:
        out = tmp_path / name
        assert run(command(source, recipe, out, *ALL, "--axes", axes)) == 0
        found, said = read_output(out), report_of(out)
        labels, confidence = found["labels"], found["confidence"]
        along = 1 if axes == "row" else 0
        others = tuple(i for i in range(3) if i != along)
        assert said["complete"] and said["failed"] == [] and said["axes"] == axes
        assert said["recipe"]["hash"] == recipe_hash(recipe) and said["output"]["shape"] == list(SHAPE)
        assert said["output"]["files"] == [str(out)] if name != "o.tif" else len(said["output"]["files"]) == 3
        assert [phase["value"] for phase in said["phases"]] == list(VALUES)
        for phase in said["phases"]:
            there = labels == phase["value"]
            assert phase["voxels"] == np.count_nonzero(there)
            assert phase["fraction"] == pytest.approx(there.mean(), rel=1e-5)
            by_slice = said["slices"]["fractions"][str(phase["value"])]
            np.testing.assert_allclose(by_slice, there.mean(axis=others), rtol=1e-5)
        np.testing.assert_allclose(said["slices"]["mean_confidence"], confidence.mean(axis=others) / 255, rtol=1e-5)
        flicker = (np.diff(labels.astype(np.int64), axis=along) != 0).mean(axis=others)
        assert said["slices"]["flicker"][0] is None
        np.testing.assert_allclose(said["slices"]["flicker"][1:], flicker, rtol=1e-5)
        assert said["performance"]["resumed"] == 0 and said["performance"]["peak_memory_bytes"] > 10**7
        page = (job_folder(out) / "report.html").read_text(encoding="utf-8")
        assert page.lower().startswith("<!doctype html>") and page.rstrip().endswith("</html>") and "data:image/" in page

    def test_without_confidence(self, tmp_path: Path, source: Path, recipe: Path) -> None:
        assert run(command(source, recipe, tmp_path / "o.ome.zarr")) == 0
        assert not (tmp_path / "o.ome.zarr" / "confidence").exists()
        assert report_of(tmp_path / "o.ome.zarr")["complete"]


class TestPlan:
    """Before anything runs."""

    @pytest.mark.parametrize("name", OUTPUTS)
    def test_dry_run_writes_nothing(
        self, tmp_path: Path, source: Path, recipe: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = [word for word in command(source, recipe, tmp_path / name, "--axes", "3", "--dry-run") if word != "--quiet"]
        assert run(words) == 0
        said = capsys.readouterr().err
        # Four of 11 planes, 14 of 40 rows, 18 of 52 columns; the planes again for their mean.
        assert "40 of 3 slices" in said and "of scratch meanwhile" in said
        assert f"{SHAPE[0]} × {SHAPE[1]} × {SHAPE[2]} uint16" in said
        assert list(tmp_path.iterdir()) == []

    def test_too_little_memory(
        self, tmp_path: Path, source: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for words in ([], ["--dry-run"], ["--cluster", "local:2"]):
            assert run(command(source, recipe, tmp_path / "o.h5", "--memory", "20MiB", *words)) == 1
            line = one_line(capsys)
            assert "of memory" in line and "may take 20.0 MiB" in line and "--memory" in line
        assert list(tmp_path.iterdir()) == []

    def test_too_little_disk(
        self, tmp_path: Path, source: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(plan_module, "free_bytes", lambda folder: 1000)
            assert run(command(source, recipe, tmp_path / "o.h5")) == 1
        assert "of disk, but 1000 B are free" in one_line(capsys)
        assert list(tmp_path.iterdir()) == []
        # Three directions need room for probabilities that is given back: 9 bytes a voxel.
        with monkeypatch.context() as patch:
            patch.setattr(plan_module, "free_bytes", lambda folder: 150_000)
            assert run(command(source, recipe, tmp_path / "o.h5", "--axes", "3")) == 1
            one_line(capsys)
            assert list(tmp_path.iterdir()) == []
            assert run(command(source, recipe, tmp_path / "o.h5")) == 0

    @pytest.mark.parametrize("axes", ["plane", "col", "3"])
    @pytest.mark.parametrize("processes", [0, 4])
    def test_blocks_are_chosen_by_memory(self, tmp_path: Path, axes: JobAxes, processes: int) -> None:
        info = VolumeInfo("v", "raw", (1024, 1024, 2048), np.dtype(np.uint16), (1, 1, 2048), None, "")

        def plan(budget: int, at_once: int = 1) -> Plan:
            return make_plan(info, axes, Measured(1.0, 1 << 28, 1 << 27, 0.1), budget=budget, classes=3, label_bytes=1,
                             confidence=True, probabilities=False, processes=processes, shared=True, finished_copy=True,
                             where=tmp_path, slices=None if at_once == 1 else 4, at_once=at_once)

        # Five processes alone take 1.8 GiB: in 2 GiB not every direction has a block.
        chosen = [plan(budget << 30) for budget in (1, 2, 4, 8, 16, 32, 64) if budget >= (4 if processes else 1)]
        assert all(one.memory_bytes <= one.budget_bytes for one in chosen)
        slices = [one.slices for one in chosen]
        assert slices == sorted(slices) and slices[0] < slices[-1]
        assert all(one.blocks * one.slices >= 1024 for one in chosen)
        with pytest.raises(JobError, match="with blocks of one slice"):
            plan(1 << 28).check()
        two, three = (plan(64 << 30, at_once).memory_bytes for at_once in (2, 3))
        assert three - two > (processes + 1) * (1 << 27), "another slice that is labelled, and its block"

    def test_a_damaged_plane_in_the_middle_is_not_measured(self, tmp_path: Path, recipe: Path, volume: U16) -> None:
        folder = save_planes(tmp_path / "in", volume)
        cut_file(folder / f"s{MIDDLE:02d}.tif")
        with BlockWorker(job_module._order(request(folder, recipe, tmp_path / "o.h5"), 3)) as worker:
            assert measure(worker).seconds > 0


class TestGoingOn:
    """--resume: what it finishes, and what it refuses."""

    @pytest.mark.parametrize("name", OUTPUTS)
    @pytest.mark.parametrize("blocks", [1, 3])
    def test_gives_the_same_bytes(
        self, tmp_path: Path, source: Path, recipe: Path, whole: dict[str, Path], name: str, blocks: int
    ) -> None:
        out = tmp_path / name
        stop_after(request(source, recipe, out, confidence=True, probabilities=True), blocks)
        assert out.exists() == (name == "o.ome.zarr")
        assert run(command(source, recipe, out, *ALL, "--resume")) == 0
        assert files(out) == files(whole[name])
        assert sorted(blocks_of(out)) == [("segment", i) for i in range(4)]
        assert report_of(out)["performance"]["resumed"] == 1
        assert "finished" in ledger_lines(out)[-1]

    @pytest.mark.parametrize("blocks", [2, 7, 30, 38])
    def test_over_three_directions(
        self, tmp_path: Path, source: Path, recipe: Path, expected: dict[str, Arrays], blocks: int
    ) -> None:
        """Four blocks of planes, 14 of rows, 18 of columns, four of their mean."""
        out = tmp_path / "o.ome.zarr"
        stop_after(request(source, recipe, out, axes="3", confidence=True, probabilities=True), blocks)
        assert ("combine" in {stage for stage, _ in blocks_of(out)}) == (blocks > 36)
        assert run(command(source, recipe, out, *ALL, "--axes", "3", "--resume")) == 0
        check_arrays(out, expected["3"])
        assert len(blocks_of(out)) == len(set(blocks_of(out))) == 40

    @pytest.mark.parametrize("what", ["recipe", "input", "region", "axes", "confidence", "probabilities"])
    def test_is_refused_with_another(
        self, tmp_path: Path, source: Path, recipe: Path, volume: U16, what: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        own, out = Path(shutil.copy2(source, tmp_path / "own.npy")), tmp_path / "o.ome.zarr"
        stop_after(request(own, recipe, out), 1)
        before, options = tree(tmp_path), list[str]()
        match what:
            case "recipe":
                recipe = tmp_path / "another"
                make_recipe(volume, seed=1).save(recipe)
            case "input":
                os.utime(own, ns=(1, 1))
            case "region":
                options = ["--region", "0:11,0:40,0:51"]
            case "axes":
                options = ["--axes", "row"]
            case _:
                options = [f"--{what}"]
        assert run(command(own, recipe, out, *options, "--resume")) == 1
        line = one_line(capsys)
        assert f"with another {what}" in line or f", {what}" in line, line
        assert "put it back, or begin anew with --overwrite" in line
        if what == "recipe":
            shutil.rmtree(recipe)
        assert tree(tmp_path) == before

    def test_is_refused_with_a_recipe_of_another_window(
        self, tmp_path: Path, source: Path, recipe: Path, volume: U16, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stop_after(request(source, recipe, tmp_path / "o.h5"), 1)
        wider = volume.copy()
        wider[3, :4] = 65_535
        make_recipe(wider).save(tmp_path / "r")
        assert load_recipe(tmp_path / "r").window != load_recipe(recipe).window
        assert run(command(source, tmp_path / "r", tmp_path / "o.h5", "--resume")) == 1
        assert "with another recipe" in one_line(capsys)

    @pytest.mark.parametrize("name", OUTPUTS)
    def test_a_finished_job_is_refused(
        self, tmp_path: Path, source: Path, recipe: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / name
        assert run(command(source, recipe, out)) == 0
        before = tree(tmp_path)
        assert run(command(source, recipe, out, "--resume")) == 2
        assert "is finished already" in one_line(capsys)
        assert tree(tmp_path) == before

    def test_what_was_stopped_at_once_is_begun(
        self, tmp_path: Path, source: Path, recipe: Path, whole: dict[str, Path]
    ) -> None:
        """A kill may come before the ledger's first line is written, or amid it: the same command goes on all the same."""
        for name, left in (("nothing", None), ("folder", None), ("empty", b""), ("half", b'{"axes": "pla')):
            (tmp_path / name).mkdir()
            out = tmp_path / name / "o.h5"
            if name != "nothing":
                job_folder(out).mkdir()
            if left is not None:
                (job_folder(out) / LEDGER).write_bytes(left)
            assert run(command(source, recipe, out, *ALL, "--resume")) == 0
            assert files(out) == files(whole["o.h5"])
            assert len(blocks_of(out)) == 4

    def test_a_line_cut_short_is_ignored(
        self, tmp_path: Path, source: Path, recipe: Path, whole: dict[str, Path]
    ) -> None:
        out = tmp_path / "o.ome.zarr"
        stop_after(request(source, recipe, out, confidence=True, probabilities=True), 2)
        ledger = job_folder(out) / LEDGER
        content = ledger.read_bytes()
        assert content.count(b"\n") >= 4
        ledger.write_bytes(content[:-20])  # of the last line of a block
        assert run(command(source, recipe, out, *ALL, "--resume")) == 0
        assert files(out) == files(whole["o.ome.zarr"])
        lines = ledger.read_bytes().splitlines()
        broken = [line for line in lines if not line.endswith(b"}")]
        assert broken == [content.splitlines()[-1][:-19]]
        done = [json.loads(line)["block"] for line in lines if b'"state": "done"' in line and line not in broken]
        assert sorted(done) == [0, 1, 2, 3]

    @pytest.mark.parametrize("loss", ["shard", "store"])
    def test_what_is_gone_is_not_taken_for_done(
        self, tmp_path: Path, source: Path, recipe: Path, whole: dict[str, Path], loss: str
    ) -> None:
        out = tmp_path / "o.ome.zarr"
        stop_after(request(source, recipe, out, confidence=True, probabilities=True), 3)
        if loss == "shard":
            (number,) = {line["block"] for line in ledger_lines(out) if line.get("state") == "done"} & {1}
            (out / "confidence" / "0" / "c" / str(number) / "0" / "0").unlink()
        else:
            shutil.rmtree(out)
        assert run(command(source, recipe, out, *ALL, "--resume")) == 0
        assert files(out) == files(whole["o.ome.zarr"])

    def test_scratch_that_is_gone_is_made_again(
        self, tmp_path: Path, source: Path, recipe: Path, expected: dict[str, Arrays]
    ) -> None:
        out = tmp_path / "o.h5"
        stop_after(request(source, recipe, out, axes="3", confidence=True, probabilities=True), 30)
        (job_folder(out) / "scratch" / "row" / "000001.npy").unlink()
        assert run(command(source, recipe, out, *ALL, "--axes", "3", "--resume")) == 0
        check_arrays(out, expected["3"])

    def test_an_interrupted_job_says_how_to_go_on(
        self, tmp_path: Path, source: Path, recipe: Path, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out, original = tmp_path / "o.tif", Ledger.append

        def append(self: Ledger, line: dict[str, Any]) -> None:
            original(self, line)
            if "stage" in line:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "append", append)
            assert run(command(source, recipe, out, *ALL)) == 130
        assert "go on with --resume" in one_line(capsys)
        assert not out.exists() and len(blocks_of(out)) == 1
        assert run(command(source, recipe, out, *ALL, "--resume")) == 0
        assert {name: tiff_file(out, name).read_bytes() for name in NAMES} == {
            name: tiff_file(whole["o.tif"], name).read_bytes() for name in NAMES}


class TestWhatIsThere:
    """Outputs that exist, and jobs that others work on."""

    @pytest.mark.parametrize("name", OUTPUTS)
    def test_an_output_is_refused(
        self, tmp_path: Path, source: Path, recipe: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / name
        if name == "o.ome.zarr":
            out.mkdir()
            (out / "precious").write_text("mine")
        else:
            out.write_text("mine")
        before = tree(tmp_path)
        for words, code in (([], 2), (["--resume"], 2)):
            assert run(command(source, recipe, out, *words)) == code
            assert str(out) in one_line(capsys)
            assert tree(tmp_path) == before

    def test_a_jobs_other_files_are_refused_too(
        self, tmp_path: Path, source: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "o_confidence.tif").write_text("mine")
        assert run(command(source, recipe, tmp_path / "o.tif", "--confidence")) == 2
        assert "o_confidence.tif exists" in one_line(capsys)
        assert [path.name for path in tmp_path.iterdir()] == ["o_confidence.tif"]

    def test_a_job_that_was_begun_is_refused(
        self, tmp_path: Path, source: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stop_after(request(source, recipe, tmp_path / "o.h5"), 1)
        before = tree(tmp_path)
        assert run(command(source, recipe, tmp_path / "o.h5")) == 2
        line = one_line(capsys)
        assert "--resume" in line and "--overwrite" in line
        assert tree(tmp_path) == before

    def test_an_empty_folder_is_no_output(
        self, tmp_path: Path, source: Path, recipe: Path, whole: dict[str, Path]
    ) -> None:
        (tmp_path / "o.ome.zarr").mkdir()
        assert run(command(source, recipe, tmp_path / "o.ome.zarr", *ALL)) == 0
        assert files(tmp_path / "o.ome.zarr") == files(whole["o.ome.zarr"])

    @pytest.mark.parametrize("name", OUTPUTS)
    @pytest.mark.parametrize("finished", [True, False])
    def test_overwriting_leaves_nothing_of_the_earlier_job(
        self, tmp_path: Path, source: Path, recipe: Path, expected: dict[str, Arrays], name: str, finished: bool
    ) -> None:
        out = tmp_path / name
        if finished:
            assert run(command(source, recipe, out, *ALL)) == 0
        else:
            stop_after(request(source, recipe, out, confidence=True, probabilities=True), 2)
        assert run(command(source, recipe, out, "--axes", "row", "--overwrite")) == 0
        check_arrays(out, expected["row"], ("labels",))
        assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.job"]
        assert set(blocks_of(out)) == {("segment", i) for i in range(14)}
        if name == "o.ome.zarr":
            assert not (out / "confidence").exists()

    def test_overwriting_leaves_what_no_job_made(
        self, tmp_path: Path, source: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name, there in (("folder", "o.ome.zarr"), ("jobfolder", "o.h5.job")):
            (tmp_path / name / there).mkdir(parents=True)
            (tmp_path / name / there / "precious").write_text("mine")
            out = tmp_path / name / there.removesuffix(".job")
            assert run(command(source, recipe, out, "--overwrite")) == 2
            assert there in one_line(capsys)
            assert files(tmp_path / name) == {f"{there}/precious": b"mine"}
        # An earlier job of labels only has made no confidence.
        out, other = tmp_path / "o.tif", tmp_path / "o_confidence.tif"
        assert run(command(source, recipe, out)) == 0
        other.write_text("mine")
        assert run(command(source, recipe, out, "--overwrite")) == 0
        assert other.read_text() == "mine"

    def test_the_input_is_never_replaced(
        self, tmp_path: Path, recipe: Path, volume: U16, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = tmp_path / "a_confidence.tif"
        tifffile.imwrite(source, volume, photometric="minisblack")
        content = source.read_bytes()
        for out, options in ((source, []), (tmp_path / "a.tif", ["--confidence"])):
            assert run(command(source, recipe, out, *options, "--overwrite")) == 2
            assert "over the input" in one_line(capsys)
            assert source.read_bytes() == content
        folder = save_planes(tmp_path / "planes", volume)
        assert run(command(folder, recipe, folder / "o.h5", "--overwrite")) == 2
        assert "in or over the input" in one_line(capsys)

    def test_a_job_that_another_process_works_on(
        self, tmp_path: Path, source: Path, recipe: Path, whole: dict[str, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "o.ome.zarr"
        stop_after(request(source, recipe, out, confidence=True, probabilities=True), 1)
        with Ledger.resume(job_folder(out)):
            before = tree(tmp_path)
            for words in (["--resume"], ["--overwrite"]):
                assert run(command(source, recipe, out, *ALL, *words)) == 1
                assert "held by another process" in one_line(capsys)
                assert tree(tmp_path) == before
        assert run(command(source, recipe, out, *ALL, "--resume")) == 0
        assert files(out) == files(whole["o.ome.zarr"])

    def test_what_another_process_did_meanwhile_counts(self, tmp_path: Path, source: Path, recipe: Path) -> None:
        """Between reading a ledger and holding it, another process may go on with the job."""
        out = tmp_path / "o.ome.zarr"
        stop_after(request(source, recipe, out), 1)
        early = Ledger.resume(job_folder(out))
        stop_after(request(source, recipe, out), 1, resume=True)
        with early:
            assert sorted(early.lines) == sorted(set(blocks_of(out)))


def bad_volume(folder: Path, volume: U16, kind: str, plane: int) -> tuple[Path, npt.NDArray[Any]]:
    """A volume of which one plane cannot be used, and its voxels, 0 there."""
    if kind == "truncated":
        source, voxels = save_planes(folder / "in", volume), volume.copy()
        cut_file(source / f"s{plane:02d}.tif")
    else:
        voxels = volume.astype(np.float32)
        voxels[plane] = np.nan
        source = save(folder / "in.npy", voxels)
    voxels[plane] = 0
    return source, voxels


def without(arrays: Arrays, plane: int) -> Arrays:
    """The same arrays with 0 in a plane."""
    empty = {name: array.copy() for name, array in arrays.items()}
    for array in empty.values():
        array[..., plane, :, :] = 0
    return empty


class TestFailures:
    """Planes that cannot be used, blocks that fail, disks and servers that are lost."""

    @pytest.mark.parametrize("kind", ["truncated", "nan"])
    @pytest.mark.parametrize(("axes", "plane"), [("plane", 4), ("plane", MIDDLE), ("col", MIDDLE), ("3", 0)])
    def test_a_bad_plane_takes_no_other_with_it(
        self, tmp_path: Path, volume: U16, kind: str, axes: str, plane: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source, voxels = bad_volume(tmp_path, volume, kind, plane)
        recipe, out = tmp_path / "r", tmp_path / "o.h5"
        make_recipe(volume.astype(voxels.dtype)).save(recipe)
        # Slices that cross the plane see it as the window's lower end.
        voxels[plane] = load_recipe(recipe).window.low
        found = three_directions(recipe, voxels) if axes == "3" else one_by_one(recipe, voxels, axes)  # type: ignore[arg-type]
        found = without(found, plane)
        options = [*ALL, "--axes", axes]
        assert run(command(source, recipe, out, *options)) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and all(line.startswith("phaseline: ") for line in lines), lines
        assert f"plane {plane} " in lines[0] and str(source) in lines[0]
        assert "--allow-failed" in lines[1] and "report.html" in lines[1]
        assert not out.exists()
        said = report_of(out)
        assert not said["complete"] and [one["first"] for one in said["failed"]] == [plane]
        assert said["slices"]["labelled"].count(0) == (0 if axes == "col" else 1)
        check_arrays(job_folder(out) / "work.ome.zarr", found)
        # It is tried again, and completed when that is allowed.
        assert run(command(source, recipe, out, *options, "--resume")) == 1
        assert len(capsys.readouterr().err.splitlines()) == 2
        assert run(command(source, recipe, out, *options, "--resume", "--allow-failed")) == 0
        check_arrays(out, found)
        assert f"plane {plane} " in one_line(capsys)
        assert run(["verify", str(out)]) == 0
        assert f"unlabelled: {source}" in capsys.readouterr().err.replace("\n", "")
        # Its working store is gone: there is nothing to go on with.
        assert run(command(source, recipe, out, *options, "--resume")) == 2
        assert "is finished already" in one_line(capsys)
        check_arrays(out, found)

    @pytest.mark.parametrize("axes", ["plane", "3"])
    def test_a_plane_that_was_put_right(
        self, tmp_path: Path, recipe: Path, volume: U16, expected: dict[str, Arrays], axes: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder, out = save_planes(tmp_path / "in", volume), tmp_path / "o.ome.zarr"
        cut_file(folder / "s04.tif")
        words = command(folder, recipe, out, *ALL, "--axes", axes)
        assert run(words) == 1
        capsys.readouterr()
        tifffile.imwrite(folder / "s04.tif", volume[4], compression="zlib")
        assert run([*words, "--resume"]) == 0
        check_arrays(out, expected[axes])
        assert report_of(out)["complete"]
        assert run(["verify", str(out), "--quiet"]) == 0

    def test_other_planes_must_be_the_same_when_one_is_put_right(
        self, tmp_path: Path, recipe: Path, volume: U16, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder, out = save_planes(tmp_path / "in", volume), tmp_path / "o.ome.zarr"
        cut_file(folder / "s04.tif")
        assert run(command(folder, recipe, out)) == 1
        capsys.readouterr()
        for number in (4, 9):
            tifffile.imwrite(folder / f"s{number:02d}.tif", volume[0], compression="zlib")
        before = tree(tmp_path)
        assert run(command(folder, recipe, out, "--resume")) == 1
        assert "with another input" in one_line(capsys)
        assert tree(tmp_path) == before

    def test_a_block_that_fails_twice(
        self, tmp_path: Path, source: Path, recipe: Path, volume: U16, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failures = break_segmenter(monkeypatch, [volume[4]], EngineError("made up"), times=2)
        assert run(command(source, recipe, tmp_path / "o.ome.zarr", *ALL)) == 0
        assert failures == [2]
        assert files(tmp_path / "o.ome.zarr") == files(whole["o.ome.zarr"])
        attempts = {line["block"]: line["attempt"] for line in ledger_lines(tmp_path / "o.ome.zarr") if "block" in line}
        assert attempts == {0: 1, 1: 3, 2: 1, 3: 1}

    @pytest.mark.parametrize("error", [EngineError("made up"), ZeroDivisionError("made up"), MemoryError("made up")])
    def test_a_block_that_always_fails(
        self, tmp_path: Path, source: Path, recipe: Path, volume: U16, expected: dict[str, Arrays], whole: dict[str, Path],
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception,
    ) -> None:
        out = tmp_path / "o.ome.zarr"
        with monkeypatch.context() as patch:
            failures = break_segmenter(patch, [volume[4]], error)
            assert run(command(source, recipe, out, *ALL)) == 1
        assert failures == [3]
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and "block 1 of stage segment: " in lines[0] and "made up" in lines[0]
        lost = {name: array.copy() for name, array in expected["plane"].items()}
        for array in lost.values():
            array[..., 3:6, :, :] = 0
        check_arrays(out, lost)
        (failed,) = [line for line in ledger_lines(out) if line.get("state") == "failed"]
        assert failed["block"] == 1 and failed["attempt"] == 3 and "made up" in failed["error"]
        said = report_of(out)
        assert not said["complete"] and said["slices"]["labelled"][3:6] in ([None] * 3, [0] * 3)
        assert run(["verify", str(out)]) == 1
        assert "not finished" in one_line(capsys)
        assert run(command(source, recipe, out, *ALL, "--resume")) == 0
        assert files(out) == files(whole["o.ome.zarr"])

    def test_a_failed_block_that_is_allowed(
        self, tmp_path: Path, source: Path, recipe: Path, volume: U16, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        for name in OUTPUTS:
            with monkeypatch.context() as patch:
                break_segmenter(patch, [volume[4]], EngineError("made up"))
                assert run(command(source, recipe, tmp_path / name, "--allow-failed")) == 0
            capsys.readouterr()
            assert (read_output(tmp_path / name, ("labels",))["labels"] == 0).sum() == 3 * SHAPE[1] * SHAPE[2]
            assert run(["verify", str(tmp_path / name), "--quiet"]) == 0

    def test_a_failed_direction_stops_before_the_mean(
        self, tmp_path: Path, source: Path, recipe: Path, volume: U16, expected: dict[str, Arrays],
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / "o.h5"
        words = command(source, recipe, out, *ALL, "--axes", "3")
        for options in ([], ["--resume", "--allow-failed"]):
            with monkeypatch.context() as patch:
                break_segmenter(patch, [np.ascontiguousarray(volume[:, 7])], EngineError("made up"))
                assert run([*words, *options]) == 1
            said = capsys.readouterr().err
            assert "block 2 of stage row: made up" in said and "--resume" in said.splitlines()[-1]
            assert "begin anew" not in said
            assert {stage for stage, _ in blocks_of(out)} == {"plane", "row", "col"}
        assert run([*words, "--resume"]) == 0
        check_arrays(out, expected["3"])
        assert len(blocks_of(out)) == len(set(blocks_of(out))) == 40

    @pytest.mark.parametrize("name", OUTPUTS)
    @pytest.mark.parametrize("array", NAMES)
    def test_a_full_disk_stops_at_once(
        self, tmp_path: Path, source: Path, recipe: Path, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str], name: str, array: str,
    ) -> None:
        out, original, written = tmp_path / name, ZarrSink.write, list[Any]()

        def write(self: ZarrSink, what: Any, box: Any, voxels: Any) -> None:
            if what == array:
                written.append(box.start)
                if len(written) > 1:
                    raise OutputError("no space; go on with --resume")
            original(self, what, box, voxels)

        with monkeypatch.context() as patch:
            patch.setattr(ZarrSink, "write", write)
            assert run(command(source, recipe, out, *ALL)) == 1
        assert "no space; go on with --resume" in one_line(capsys)
        assert blocks_of(out, "failed") == [] and len(blocks_of(out)) <= 1
        assert len(written) == len(set(written)) < 4 + 1
        assert run(command(source, recipe, out, *ALL, "--resume")) == 0
        assert files(out) == files(whole[name])
        assert sorted(blocks_of(out)) == [("segment", i) for i in range(4)]

    def test_lost_servers_stop_it(
        self, tmp_path: Path, source: Path, recipe: Path, volume: U16, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / "o.ome.zarr"
        with monkeypatch.context() as patch:
            patch.setattr(job_module, "_PAUSE_S", 0.0)
            failures = break_segmenter(patch, [volume[4]], ServerUnavailableError("nobody answers"))
            assert run(command(source, recipe, out, *ALL)) == 1
        assert failures == [3]
        line = one_line(capsys)
        assert "nobody answers" in line and "--resume" in line
        assert blocks_of(out, "failed") == []
        assert run(command(source, recipe, out, *ALL, "--resume")) == 0
        assert files(out) == files(whole["o.ome.zarr"])


class TestVerify:
    """`phaseline verify`."""

    def test_what_is_whole(self, whole: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
        for out in whole.values():
            before = files(out)
            assert run(["verify", str(out)]) == 0
            assert "all of 4 blocks are as the job wrote them" in capsys.readouterr().err
            assert files(out) == before

    @pytest.mark.parametrize("axes", ["row", "col", "3"])
    def test_of_other_axes(self, tmp_path: Path, source: Path, recipe: Path, axes: str) -> None:
        for name in OUTPUTS:
            assert run(command(source, recipe, tmp_path / name, *ALL, "--axes", axes, "--block", "5")) == 0
            assert run(["verify", str(tmp_path / name), "--quiet"]) == 0

    @pytest.mark.parametrize("array", NAMES)
    def test_any_flipped_byte_of_a_shard_is_found(self, tmp_path: Path, whole: dict[str, Path], array: str) -> None:
        out = copy_output(whole["o.ome.zarr"], tmp_path)
        folder = out / ("" if array == "labels" else array) / "0" / "c"
        shard = sorted(path for path in folder.rglob("*") if path.is_file())[1]
        size = shard.stat().st_size
        for at in sorted({0, size - 1, *np.random.default_rng(0).integers(0, size, 6).tolist()}):
            assert_found(out, shard, at)
        shard.unlink()
        assert run(["verify", str(out), "--quiet"]) == 1

    @pytest.mark.parametrize("array", NAMES)
    def test_a_flipped_byte_in_hdf5_is_found(self, tmp_path: Path, whole: dict[str, Path], array: str) -> None:
        out = copy_output(whole["o.h5"], tmp_path)
        with h5py.File(out) as file:
            chunks = [file[array].id.get_chunk_info(i) for i in range(file[array].id.get_num_chunks())]
        for chunk in chunks[:2]:
            assert_found(out, out, chunk.byte_offset + chunk.size // 2)

    @pytest.mark.parametrize("array", NAMES)
    def test_a_flipped_byte_in_tiff_is_found(self, tmp_path: Path, whole: dict[str, Path], array: str) -> None:
        out = copy_output(whole["o.tif"], tmp_path)
        with tifffile.TiffFile(tiff_file(out, array)) as tiff:
            pages = [(page.dataoffsets[0], page.databytecounts[0]) for page in tiff.pages]
        for offset, size in (pages[0], pages[-1]):
            assert_found(out, tiff_file(out, array), offset + size // 2)

    def test_a_voxel_that_was_changed_properly_is_found(
        self, tmp_path: Path, whole: dict[str, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = copy_output(whole["o.h5"], tmp_path)
        with h5py.File(out, "r+") as file:
            file["labels"][7, 8, 9] = 2 if file["labels"][7, 8, 9] != 2 else 5
        assert run(["verify", str(out), "--quiet"]) == 1
        first, last = capsys.readouterr().err.splitlines()
        assert first.startswith("phaseline: block 2, labels from (6, 0, 0) to (9, 40, 52): it holds ")
        assert "1 faults in 4 blocks" in last

    def test_another_volumes_output_is_found(self, tmp_path: Path, whole: dict[str, Path], source: Path, recipe: Path) -> None:
        out = copy_output(whole["o.tif"], tmp_path)
        assert run(command(source, recipe, tmp_path / "other.tif", "--region", ":10,:,:")) == 0
        shutil.copy(tmp_path / "other.tif", out)
        assert run(["verify", str(out), "--quiet"]) == 1

    def test_a_missing_array_is_found(self, tmp_path: Path, whole: dict[str, Path]) -> None:
        out = copy_output(whole["o.tif"], tmp_path)
        tiff_file(out, "confidence").unlink()
        assert run(["verify", str(out), "--quiet"]) == 1

    def test_what_cannot_be_verified(
        self, tmp_path: Path, source: Path, recipe: Path, whole: dict[str, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        stop_after(request(source, recipe, tmp_path / "begun.ome.zarr"), 1)
        shutil.copy(whole["o.h5"], tmp_path / "alone.h5")
        for name, code, words in (("begun.ome.zarr", 1, "not finished"), ("alone.h5", 1, "no job at"),
                                  ("nothing.h5", 2, "does not exist")):
            assert run(["verify", str(tmp_path / name)]) == code
            assert words in one_line(capsys)


def copy_output(out: Path, folder: Path) -> Path:
    """A copy of an output, with its job's folder, and of TIFF all files."""
    for path in out.parent.iterdir():
        if path.name.startswith(out.stem + "_") or path in (out, job_folder(out)):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copy(path, folder / path.name)
    return folder / out.name


def assert_found(out: Path, file: Path, at: int) -> None:
    """That verifying fails while this byte of a file is another, and only then."""
    content = file.read_bytes()
    file.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1:])
    assert run(["verify", str(out), "--quiet"]) == 1, at
    file.write_bytes(content)
    assert run(["verify", str(out), "--quiet"]) == 0


class TestPlanes:
    """`phaseline planes`."""

    def test_some_by_default(self, tmp_path: Path, source: Path, volume: U16) -> None:
        assert run(["planes", str(source), "--out", str(tmp_path / "p"), "--quiet"]) == 0
        assert [path.name for path in sorted((tmp_path / "p").iterdir())] == [f"v_plane{i:05d}.tif" for i in (1, 4, 6, 9)]
        for i in (1, 4, 6, 9):
            assert np.array_equal(read_image(tmp_path / "p" / f"v_plane{i:05d}.tif"), volume[i])

    def test_those_asked_for(self, tmp_path: Path, source: Path, volume: U16, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["planes", str(source), "--out", str(tmp_path / "p"), "--quiet", "--planes"]
        assert run([*words, "10, 0,10"]) == 0
        assert np.array_equal(read_image(tmp_path / "p" / "v_plane00010.tif"), volume[10])
        assert len(list((tmp_path / "p").iterdir())) == 2
        assert run([*words, "0"]) == 2
        assert "--overwrite" in one_line(capsys)
        for wrong in ("11", "-1", "1-3", "", "a", "1,,2"):
            assert run([*words, wrong]) == 2
            assert "expected numbers from 0 to 10" in one_line(capsys)

    def test_of_real_numbers_and_of_one_plane(self, tmp_path: Path) -> None:
        volume = np.linspace(-1, 1, 3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)
        for number, part in enumerate((volume, volume[:1])):
            source = save(tmp_path / f"{number}.npy", part)
            assert run(["planes", str(source), "--out", str(tmp_path / f"p{number}"), "--quiet"]) == 0
            found = sorted((tmp_path / f"p{number}").iterdir())
            assert [path.name for path in found] == [f"{number}_plane{i:05d}.npy" for i in range(len(part))]
            assert all(np.array_equal(np.load(path), plane) for path, plane in zip(found, part, strict=True))

    def test_a_plane_that_cannot_be_used(
        self, tmp_path: Path, volume: U16, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for kind in ("truncated", "nan"):
            (tmp_path / kind).mkdir()
            source, _ = bad_volume(tmp_path / kind, volume, kind, 4)
            assert run(["planes", str(source), "--out", str(tmp_path / kind / "p"), "--planes", "4", "--quiet"]) == 1
            assert "plane 4 " in one_line(capsys)
            assert not list((tmp_path / kind / "p").rglob("*"))

    def test_from_planes_and_strokes_to_labels(self, tmp_path: Path, source: Path, volume: U16) -> None:
        """What a user does: take planes, paint, fit, and segment the volume."""
        assert run(["planes", str(source), "--out", str(tmp_path / "p"), "--planes", "3", "--quiet"]) == 0
        (plane,) = (tmp_path / "p").iterdir()
        strokes = np.zeros(SHAPE[1:], np.uint8)
        strokes[volume[3] < 15_000], strokes[volume[3] > 38_000] = 1, 2
        tifffile.imwrite(tmp_path / "l.tif", strokes)
        assert run(["fit", str(plane), "--labels", str(tmp_path / "l.tif"), "--out", str(tmp_path / "r"), "--bundle", "none",
                    "--quiet", "--threads", "1"]) == 0
        assert run(command(source, tmp_path / "r", tmp_path / "o.ome.zarr")) == 0
        labels = read_output(tmp_path / "o.ome.zarr", ("labels",))["labels"]
        assert np.array_equal(labels, one_by_one(tmp_path / "r", volume)["labels"])
        assert np.corrcoef(labels.ravel(), volume.ravel())[0, 1] > 0.5


@pytest.mark.parametrize(("words", "expected"), [
    (["--axes", "4"], "axes is '4', expected plane, row or col"),
    (["--region", "0:3"], "the region '0:3' has 1 parts"),
    (["--region", "0:99,:,:"], "does not hold the region"),
    (["--region", "3:3,:,:"], "negative or empty"),
    (["--cluster", "local:0"], "expected local:N"),
    (["--cluster", "slurm"], "cluster is 'slurm'"),
    (["--cluster", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    (["--memory", "lots"], "the size is 'lots'"),
    (["--memory", "1e999"], "the size is '1e999'"),
    (["--block", "0"], "--block"),
    (["--missing-chunks", "maybe"], "missing-chunks is 'maybe'"),
    (["--dataset", "entry/data"], "a dataset (entry/data)"),
    (["--level", "1"], "a level (1)"),
    (["--raw", "3x4"], "the layout of raw voxels is '3x4'"),
    (["--published", "x"], "leave out --published and --crf"),
    (["--crf"], "leave out --published and --crf"),
    (["--resume", "--overwrite"], "--resume and --overwrite came together"),
    (["--out", "o.png"], "expected one of .ome.zarr"),
    (["--out", ".h5"], "expected one of .ome.zarr"),
    (["--recipe", "nowhere"], "nowhere"),
    (["--device", "tpu"], "device is 'tpu'"),
    (["--transport", "grpc"], "--server did not come"),
])
def test_asked_for_wrongly(
    tmp_path: Path, source: Path, recipe: Path, words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([*command(source, recipe, Path("o.h5")), *words]) == 2
    assert expected in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "value"), [
    ("--axes", "3"), ("--region", ":,:,:"), ("--memory", "1GiB"), ("--cluster", "local:2"), ("--block", "3"), ("--dataset", "a"),
    ("--level", "0"), ("--allow-failed", ""), ("--dry-run", ""),
])
def test_options_of_volumes_are_refused_for_images(
    tmp_path: Path, recipe: Path, volume: U16, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", volume[0])
    words = ["segment", str(tmp_path / "a.tif"), "--recipe", str(recipe), "--out", str(tmp_path / "o.png"), option]
    assert run([*words, value] if value else words) == 2
    line = one_line(capsys)
    assert option in line and "for volumes only" in line
    assert not (tmp_path / "o.png").exists()
