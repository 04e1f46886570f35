"""Stores that blocks are written to, their pyramid, and the files that they become: read by zarr, ngff-zarr, h5py, tifffile."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from phaseline.clients.labels import ClassTable
from phaseline.clients.volumes import pyramid
from phaseline.clients.volumes.finished import check_out, finish, micrometres, output_files
from phaseline.clients.volumes.pyramid import build_pyramid, level_factors, most_frequent, remove_pyramid
from phaseline.clients.volumes.volume import AXES, Axis, Box, VoxelSize
from phaseline.clients.volumes.writing import ARRAYS, ArrayName, OutputLayout, part_path
from phaseline.clients.volumes.zarr_sink import ZarrSink, checksum, create_store
from phaseline.runtime.errors import (
    MissingInputError,
    OutputError,
    OutputExistsError,
    StoppedError,
    UsageError,
    VolumeError,
)

Arrays = dict[ArrayName, npt.NDArray[Any]]

CLASSES = ClassTable((1, 2, 5), ("pore", "grain", "Öl"), ("#e69f00", "#56b4e9", "#009e73"))
WIDE = ClassTable((7, 300), ("a", "b"), ("#e69f00", "#56b4e9"))
# The last block is ragged, whichever the axis; two levels of pyramid.
SHAPE = (21, 42, 601)
LAYOUT = OutputLayout(SHAPE, "plane", 8, CLASSES, ARRAYS, VoxelSize((2000.0, 500.0, 250.0), "nanometer"), (4000.0, 0.0, 500.0))


def made_up(layout: OutputLayout, seed: int = 0) -> Arrays:
    """Values for all arrays: noise, and a region of 0, as the labels of a plane that failed."""
    rng = np.random.default_rng(seed)
    values: Arrays = {}
    for name in layout.arrays:
        shape = (*layout.lead(name), *layout.shape)
        if name == "labels":
            values[name] = rng.choice(np.array(layout.classes.values, layout.dtype(name)), shape)
        else:
            values[name] = rng.integers(0, 256, shape, np.uint8)
        values[name][..., :9, :, :] = 0
    return values


def write_all(path: Path, layout: OutputLayout, values: Arrays, order: list[Box] | None = None) -> ZarrSink:
    create_store(path, layout)
    sink = ZarrSink(path)
    for box in order or layout.blocks:
        for name, voxels in values.items():
            sink.write(name, box, voxels[(..., *box.slices)])
    return sink


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def values() -> Arrays:
    return made_up(LAYOUT)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, values: Arrays) -> Path:
    """A finished store, with its pyramid: to be read only."""
    path = tmp_path_factory.mktemp("store") / "out.ome.zarr"
    write_all(path, LAYOUT, values)
    assert build_pyramid(path) == 3
    return path


@given(st.tuples(*[st.integers(1, 700)] * 3), st.sampled_from(AXES), st.integers(1, 300))
def test_blocks_and_chunks_of_any_layout(shape: tuple[int, int, int], axis: Axis, length: int) -> None:
    layout = OutputLayout(shape, axis, length, CLASSES)
    along = layout.along
    assert [box.start[along] for box in layout.blocks] == list(range(0, shape[along], layout.block_length))
    assert sum(box.size for box in layout.blocks) == np.prod(shape)
    for box in layout.blocks:
        layout.check("labels", box, np.zeros(box.shape, np.uint8))
    for i, (chunk, shard, n) in enumerate(zip(layout.chunk, layout.shard, shape, strict=True)):
        assert shard % chunk == 0 and chunk <= n
        assert shard == layout.block_length if i == along else n <= shard < n + chunk
    assert OutputLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize(("changes", "words"), [
    ({"shape": (0, 4, 4)}, "at least 1"),
    ({"axis": "depth"}, "one of plane, row, col"),
    ({"block_length": 0}, "at least 1"),
    ({"arrays": ()}, "some of"),
    ({"arrays": ("confidence", "labels")}, "in this order"),
])
def test_impossible_layouts(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(LAYOUT, **changes)


@pytest.mark.parametrize("axis", AXES)
def test_what_is_written_is_read_by_zarr(tmp_path: Path, axis: Axis) -> None:
    layout = dataclasses.replace(LAYOUT, axis=axis, block_length=16)
    values = made_up(layout)
    sink = write_all(tmp_path / "a.zarr", layout, values)
    for name, path in (("labels", "0"), ("confidence", "confidence/0"), ("probabilities", "probabilities/0")):
        foreign = zarr.open_array(tmp_path / "a.zarr", path=path, mode="r")
        assert foreign.dtype == np.uint8
        np.testing.assert_array_equal(np.asarray(foreign[:]), values[name])
        box = Box((3, 5, 250), (20, 6, 299))
        read = sink.read(name, box)
        assert read.flags.c_contiguous and read.flags.writeable
        np.testing.assert_array_equal(read, values[name][(..., *box.slices)])
    assert sink.layout == layout


def test_wide_label_values(tmp_path: Path) -> None:
    layout = OutputLayout((5, 260, 20), "row", 100, WIDE)
    values = made_up(layout)
    sink = write_all(tmp_path / "a.zarr", layout, values)
    assert build_pyramid(sink.path) == 2
    assert finish(sink.path, tmp_path / "a.h5") == [tmp_path / "a.h5"]
    finish(sink.path, tmp_path / "a.tif")
    with h5py.File(tmp_path / "a.h5") as file:
        for read in (sink.read("labels", Box((0, 0, 0), layout.shape)), file["labels"][:], tifffile.imread(tmp_path / "a.tif")):
            assert read.dtype == np.uint16
            np.testing.assert_array_equal(read, values["labels"])


def test_metadata_by_a_foreign_reader(store: Path, values: Arrays) -> None:
    import ngff_zarr

    for name in ("labels", "confidence"):
        found = ngff_zarr.from_ngff_zarr(str(store if name == "labels" else store / name))
        assert found.metadata.name == name
        assert [image.data.shape for image in found.images] == [SHAPE, (21, 42, 301), (21, 42, 151)]
        assert [image.scale for image in found.images] == [{"z": 2000.0, "y": 500.0, "x": 250.0 * 2**i} for i in range(3)]
        assert [image.translation["x"] for image in found.images] == [500.0, 625.0, 875.0]
        assert all(image.translation["z"] == 4000.0 for image in found.images)
        assert set(found.images[0].axes_units.values()) == {"nanometer"}
        np.testing.assert_array_equal(found.images[0].data.compute(), values[name])
    probabilities = ngff_zarr.from_ngff_zarr(str(store / "probabilities"))
    assert probabilities.images[0].dims == ("c", "z", "y", "x")
    np.testing.assert_array_equal(probabilities.images[0].data.compute(), values["probabilities"])
    ome: Any = zarr.open_group(store, mode="r").attrs["ome"]
    assert ome["version"] == "0.5"
    assert ome["image-label"]["colors"][0] == {"label-value": 1, "rgba": [0xe6, 0x9f, 0, 255]}
    assert ome["image-label"]["properties"] == [
        {"label-value": 1, "name": "pore"}, {"label-value": 2, "name": "grain"}, {"label-value": 5, "name": "Öl"}]
    assert ngff_zarr.from_ngff_zarr(str(store)).metadata.axes[0].name == "z"


def test_without_voxel_size(tmp_path: Path) -> None:
    layout = dataclasses.replace(LAYOUT, voxel=None, origin=(0.0, 0.0, 0.0), arrays=("labels",))
    write_all(tmp_path / "a.zarr", layout, made_up(layout))
    ome: Any = zarr.open_group(tmp_path / "a.zarr", mode="r").attrs["ome"]
    assert "unit" not in ome["multiscales"][0]["axes"][0]
    finish(tmp_path / "a.zarr", tmp_path / "a.h5")
    finish(tmp_path / "a.zarr", tmp_path / "a.tif")
    with h5py.File(tmp_path / "a.h5") as file, tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert set(file["labels"].attrs) == {"class_values", "class_names", "class_colours"}
        assert "voxel_size" not in tiff.shaped_metadata[0]


@pytest.mark.parametrize(("axis", "length"), [("plane", 8), ("row", 16), ("col", 250)])
def test_a_block_is_a_file(tmp_path: Path, axis: Axis, length: int) -> None:
    layout = dataclasses.replace(LAYOUT, axis=axis, block_length=length)
    create_store(tmp_path / "a.zarr", layout)
    sink = ZarrSink(tmp_path / "a.zarr")
    for box in layout.blocks:
        for name in layout.arrays:
            assert not sink.written(name, box)
            before = files(sink.path)
            # Also where all is 0: a missing file means that nobody has written it.
            sink.write(name, box, np.zeros((*layout.lead(name), *box.shape), np.uint8))
            after = files(sink.path)
            assert len(after.keys() - before.keys()) == 1
            assert before.items() <= after.items()
            assert sink.written(name, box)


@settings(deadline=None, max_examples=5)
@given(st.randoms(use_true_random=False))
def test_bytes_depend_on_values_only(
    tmp_path_factory: pytest.TempPathFactory, store: Path, values: Arrays, rng: random.Random
) -> None:
    order = [*LAYOUT.blocks, LAYOUT.blocks[1]]
    rng.shuffle(order)
    other = tmp_path_factory.mktemp("other") / "b.ome.zarr"
    create_store(other, LAYOUT)
    sink = ZarrSink(other)
    # Wrong at first: what is written again leaves no trace.
    sink.write("labels", order[0], np.ones(order[0].shape, np.uint8))
    for box, name in itertools.product(order, ARRAYS):
        sink.write(name, box, values[name][(..., *box.slices)])
    build_pyramid(other)
    assert files(other) == files(store)


def test_threads_share_a_sink(tmp_path: Path, store: Path, values: Arrays) -> None:
    create_store(tmp_path / "a.zarr", LAYOUT)
    sink = ZarrSink(tmp_path / "a.zarr")

    def write(job: tuple[Box, ArrayName]) -> str:
        box, name = job
        sink.write(name, box, values[name][(..., *box.slices)])
        return checksum(sink.read(name, box))

    jobs = list(itertools.product(LAYOUT.blocks, ARRAYS))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(write, jobs)) == [checksum(values[name][(..., *box.slices)]) for box, name in jobs]
    build_pyramid(tmp_path / "a.zarr")
    assert files(tmp_path / "a.zarr") == files(store)


def test_several_blocks_at_once(tmp_path: Path, store: Path, values: Arrays) -> None:
    whole = Box((0, 0, 0), SHAPE)
    write_all(tmp_path / "a.zarr", LAYOUT, values, [whole])
    build_pyramid(tmp_path / "a.zarr")
    assert files(tmp_path / "a.zarr") == files(store)


def test_what_is_not_exactly_blocks_is_refused(store: Path, values: Arrays) -> None:
    sink = ZarrSink(store)
    before = files(store)
    block = LAYOUT.blocks[1]
    for box in (Box((9, 0, 0), (16, 42, 601)), Box((8, 0, 0), (15, 42, 601)), Box((8, 1, 0), (16, 42, 601)),
                Box((8, 0, 0), (16, 42, 600))):
        with pytest.raises(UsageError, match=r"whole blocks of 8 slices along plane, such as \(8, 0, 0\) to \(16, 42, 601\)"):
            sink.write("labels", box, np.zeros(box.shape, np.uint8))
    with pytest.raises(UsageError, match="stay inside"):
        sink.write("labels", Box((16, 0, 0), (24, 42, 601)), np.zeros((8, 42, 601), np.uint8))
    with pytest.raises(UsageError, match=r"expected \(8, 42, 601\) and uint8"):
        sink.write("labels", block, np.zeros(block.shape, np.uint16))
    with pytest.raises(UsageError, match=r"expected \(3, 8, 42, 601\) and uint8"):
        sink.write("probabilities", block, np.zeros(block.shape, np.uint8))
    assert files(store) == before


def test_arrays_that_were_not_asked_for(tmp_path: Path) -> None:
    layout = dataclasses.replace(LAYOUT, arrays=("probabilities",))
    values = made_up(layout)
    sink = write_all(tmp_path / "scratch", layout, values)
    assert "ome" not in zarr.open_group(tmp_path / "scratch", mode="r").attrs
    np.testing.assert_array_equal(sink.read("probabilities", Box((0, 0, 0), SHAPE)), values["probabilities"])
    with pytest.raises(UsageError, match="only probabilities"):
        sink.read("labels", LAYOUT.blocks[0])


def test_a_store_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.ome.zarr"
    # What a killed run left.
    part_path(path).mkdir(parents=True)
    (part_path(path) / "zarr.json").write_text("{")
    create_store(path, LAYOUT)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(OutputExistsError, match="exists"):
        create_store(path, LAYOUT)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OutputError, match="No space left on device"):
        create_store(tmp_path / "b.zarr", LAYOUT)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


def test_foreign_and_newer_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        ZarrSink(tmp_path / "a.zarr")
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(VolumeError, match="not the output of a job"):
        ZarrSink(tmp_path / "a.zarr")
    zarr.create_group(tmp_path / "b.zarr")
    with pytest.raises(VolumeError, match="not the output of a job"):
        ZarrSink(tmp_path / "b.zarr")
    zarr.create_group(tmp_path / "c.zarr", attributes={"phaseline": {"format": 99}})
    with pytest.raises(VolumeError, match="has the format 99, expected 1"):
        ZarrSink(tmp_path / "c.zarr")


def test_missing_and_damaged_blocks_are_said(tmp_path: Path, values: Arrays) -> None:
    sink = write_all(tmp_path / "a.zarr", LAYOUT, values)
    block = LAYOUT.blocks[1]
    shard = tmp_path / "a.zarr" / "0" / "c" / "1" / "0" / "0"
    whole = shard.read_bytes()
    flipped = random.Random(0).sample(range(len(whole)), 30)
    for damaged in (whole[:-1], whole[:5], *(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1:] for i in flipped)):
        shard.write_bytes(damaged)
        with pytest.raises(VolumeError, match="is damaged"):
            sink.read("labels", block)
    shard.write_bytes(b"")
    with pytest.raises(VolumeError, match="c/1/0/0 is missing or empty"):
        sink.read("labels", block)
    shard.unlink()
    assert not sink.written("labels", Box((0, 0, 0), SHAPE))
    for use in (build_pyramid, lambda store: finish(store, tmp_path / "a.h5"), lambda store: finish(store, tmp_path / "a.tif")):
        with pytest.raises(VolumeError, match="c/1/0/0 is missing or empty"):
            use(tmp_path / "a.zarr")
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".zarr"] in ([], ["a_confidence.tif", "a_probabilities.tif"])
    # A damaged block can be written again.
    shard.write_bytes(whole[:-1])
    sink.write("labels", block, values["labels"][block.slices])
    assert shard.read_bytes() == whole


def test_what_killed_writers_left_is_removed(tmp_path: Path, values: Arrays) -> None:
    sink = write_all(tmp_path / "a.zarr", LAYOUT, values)
    before = files(tmp_path / "a.zarr")
    left = tmp_path / "a.zarr" / "confidence" / "0" / "c" / "1" / "0" / "0.0123456789abcdef.partial"
    left.write_bytes(b"half")
    sink.clean()
    assert files(tmp_path / "a.zarr") == before


WRITER = """
import sys
from pathlib import Path
import numpy as np
from phaseline.clients.volumes.zarr_sink import ZarrSink
sink = ZarrSink(Path(sys.argv[1]))
blocks = [np.random.default_rng(seed).integers(1, 3, sink.layout.block(0).shape, np.uint8) for seed in range(2)]
print(flush=True)
while True:
    for voxels in blocks:
        sink.write("labels", sink.layout.block(0), voxels)
"""


def test_a_killed_writer_leaves_blocks_whole(tmp_path: Path) -> None:
    layout = OutputLayout((16, 256, 512), "plane", 16, CLASSES)
    create_store(tmp_path / "a.zarr", layout)
    sink = ZarrSink(tmp_path / "a.zarr")
    block = layout.block(0)
    known = {checksum(np.random.default_rng(seed).integers(1, 3, block.shape, np.uint8)) for seed in range(2)}
    rng = random.Random(0)
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "a.zarr")], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(rng.uniform(0.1, 0.2))
            finally:
                process.kill()
        sink.clean()
        assert [p.name for p in (tmp_path / "a.zarr" / "0" / "c" / "0" / "0").iterdir()] == ["0"]
        assert checksum(sink.read("labels", block)) in known


def test_checksum_tells_values_shapes_and_dtypes() -> None:
    voxels = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    assert checksum(voxels) == checksum(np.asfortranarray(voxels)) == checksum(voxels.astype(">u2")) == "925d3517"
    others = [voxels.reshape(2, 4, 3), voxels.astype(np.int16), voxels.astype(np.uint8), voxels[:1], voxels + np.uint16(1)]
    assert len({checksum(voxels), *map(checksum, others)}) == 6


@given(arrays(np.uint8, (4, 2, 6), elements=st.integers(0, 3)), st.sampled_from([(2, 2, 2), (1, 2, 2), (2, 1, 1)]),
       st.sampled_from([(np.uint8, 0), (np.uint8, 252), (np.uint16, 0), (np.uint16, 65532)]))
def test_most_frequent(labels: npt.NDArray[Any], factor: tuple[int, int, int], kind: tuple[Any, int]) -> None:
    dtype, offset = kind
    labels = np.where(labels, labels.astype(dtype) + dtype(offset), dtype(0))
    result = most_frequent(labels, factor)
    assert result.dtype == dtype and result.shape == tuple(n // f for n, f in zip(labels.shape, factor, strict=True))
    for at in np.ndindex(result.shape):
        group = labels[tuple(slice(i * f, (i + 1) * f) for i, f in zip(at, factor, strict=True))].ravel().tolist()
        assert result[at] == min(set(group), key=lambda value: (-group.count(value), value == 0, value))


@given(arrays(np.uint8, (2, 4, 6)), st.sampled_from([(2, 2, 2), (1, 2, 2), (2, 1, 1)]))
def test_mean(confidence: npt.NDArray[Any], factor: tuple[int, int, int]) -> None:
    blocks = confidence.reshape([n for length, f in zip(confidence.shape, factor, strict=True) for n in (length // f, f)])
    np.testing.assert_array_equal(pyramid.mean(confidence, factor), np.floor(blocks.mean((1, 3, 5)) + 0.5))


def test_levels_keep_volumes_about_as_long_as_wide() -> None:
    assert level_factors((256, 256, 256)) == [(1, 1, 1)]
    assert level_factors((512, 2048, 2048)) == [(1, 1, 1), (1, 2, 2), (2, 4, 4), (4, 8, 8)]
    assert level_factors((1, 257, 129)) == [(1, 1, 1), (1, 2, 2)]


@pytest.mark.parametrize("shape", [(270, 151, 270), (3, 301, 999)])
def test_pyramid(tmp_path: Path, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # Many small parts, whose borders must not show.
    monkeypatch.setattr(pyramid, "_CHUNK", (32, 64, 64))
    monkeypatch.setattr(pyramid, "_SHARD", (64, 64, 128))
    layout = OutputLayout(shape, "plane", 64, CLASSES, ("labels", "confidence"))
    values = made_up(layout)
    store = write_all(tmp_path / "a.zarr", layout, values).path
    seen: list[float] = []
    levels = build_pyramid(store, seen.append)
    assert levels == len(level_factors(shape)) > 1
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0) and seen[0] > 0
    for name, smaller in (("labels", most_frequent), ("confidence", pyramid.mean)):
        below = values[name]
        for level in range(1, levels):
            found = zarr.open_array(store, path=f"{'' if name == 'labels' else name + '/'}{level}", mode="r")
            step = tuple(2 if n < m else 1 for n, m in zip(found.shape, below.shape, strict=True))
            even = np.pad(below, [(0, n * f - m) for n, f, m in zip(found.shape, step, below.shape, strict=True)], "edge")
            below = np.asarray(found[:])
            np.testing.assert_array_equal(below, smaller(even, step))


def test_a_stopped_pyramid_goes_on(tmp_path: Path, store: Path, values: Arrays) -> None:
    mine = write_all(tmp_path / "a.zarr", LAYOUT, values).path
    bare = files(mine)
    calls: list[float] = []

    def stop(fraction: float) -> None:
        calls.append(fraction)
        if len(calls) in (2, 5):
            raise StoppedError("stopped")

    for levels in (1, 2):
        with pytest.raises(StoppedError):
            build_pyramid(mine, stop)
        ome: Any = zarr.open_group(mine, mode="r").attrs["ome"]
        assert len(ome["multiscales"][0]["datasets"]) == levels
    assert build_pyramid(mine, stop) == 3
    assert files(mine) == files(store)
    assert build_pyramid(mine, stop) == 3
    remove_pyramid(mine)
    assert files(mine) == bare


def test_hdf5(store: Path, values: Arrays, tmp_path: Path) -> None:
    seen: list[float] = []
    assert finish(store, tmp_path / "out.h5", seen.append) == [tmp_path / "out.h5"]
    assert seen == sorted(seen) and seen[-1] == 1.0
    with h5py.File(tmp_path / "out.h5") as file:
        for name in ARRAYS:
            np.testing.assert_array_equal(file[name][:], values[name])
            assert file[name].compression == "gzip"
            assert file[name].attrs["element_size_um"].tolist() == [2.0, 0.5, 0.25]
            assert file[name].attrs["voxel_size"].tolist() == [2000.0, 500.0, 250.0]
            assert file[name].attrs["voxel_unit"] == b"nanometer"
        assert file["labels"].attrs["class_values"].tolist() == [1, 2, 5]
        assert [name.decode() for name in file["labels"].attrs["class_names"]] == ["pore", "grain", "Öl"]
        # As a viewer of NeXus files finds the way.
        assert file.attrs["NX_class"] == b"NXroot"
        data = file[file.attrs["default"]]
        data = data[data.attrs["default"]]
        assert data.attrs["NX_class"] == b"NXdata"
        assert data[data.attrs["signal"]] == file["labels"]
        assert data.attrs["axes"].tolist() == [b"z", b"y", b"x"]
        assert data["z"][:3].tolist() == [4000.0, 6000.0, 8000.0] and data["z"].attrs["units"] == b"nanometer"


@pytest.mark.parametrize("suffix", [".tif", ".tiff"])
def test_bigtiff(store: Path, values: Arrays, tmp_path: Path, suffix: str) -> None:
    seen: list[float] = []
    finish(store, tmp_path / f"out{suffix}", seen.append)
    assert seen == sorted(seen) and seen[-1] == 1.0
    for name, path in output_files(tmp_path / f"out{suffix}", ARRAYS).items():
        with tifffile.TiffFile(path) as tiff:
            assert tiff.is_bigtiff and not tiff.is_imagej
            assert len(tiff.pages) == 21 * (3 if name == "probabilities" else 1)
            (series,) = tiff.series
            np.testing.assert_array_equal(series.asarray(), values[name])
            tags = tiff.pages.first.tags
            # 500 nm a row, 250 nm a column: pixels per centimetre.
            assert (tags["XResolution"].value, tags["YResolution"].value) == ((40000, 1), (20000, 1))
            assert tags["ResolutionUnit"].value == 3
            description = tiff.shaped_metadata[0]
            assert description["voxel_size"] == [2000.0, 500.0, 250.0] and description["unit"] == "nanometer"
            if name == "labels":
                assert description["class_names"] == ["pore", "grain", "Öl"]
    assert len(list(tmp_path.iterdir())) == 3


def test_large_planes_are_read_one_by_one(store: Path, values: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phaseline.clients.volumes import finished

    finish(store, tmp_path / "a.tif")
    finish(store, tmp_path / "a.h5")
    monkeypatch.setattr(finished, "_PART_BYTES", 3 * 42 * 601)
    finish(store, tmp_path / "b.tif")
    finish(store, tmp_path / "b.h5")
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
    with h5py.File(tmp_path / "b.h5") as file:
        for name in ARRAYS:
            np.testing.assert_array_equal(file[name][:], values[name])


@pytest.mark.parametrize("name", ["out.nxs", "out.tif"])
def test_finished_bytes_hold_no_time(store: Path, tmp_path: Path, name: str) -> None:
    begun = int(time.time())
    finish(store, tmp_path / name)
    once = files(tmp_path)
    # Over what is there.
    finish(store, tmp_path / name)
    assert files(tmp_path) == once
    times = [struct.pack(order + "I", t) for t in range(begun, int(time.time()) + 1) for order in "<>"]
    assert not [file for file, content in once.items() for t in times if t in content]


@pytest.mark.parametrize("name", ["out.h5", "out.tif"])
def test_a_stopped_finish_leaves_nothing(store: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"earlier")
    # What a killed run left.
    part_path(tmp_path / name).write_bytes(b"half")

    def stop(fraction: float) -> None:
        # The labels come first in HDF5, last in TIFF.
        if fraction > (0.1 if name == "out.h5" else 0.9):
            raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        finish(store, tmp_path / name, stop)
    assert (tmp_path / name).read_bytes() == b"earlier"
    assert {p.name for p in tmp_path.iterdir()} <= {name, "out_confidence.tif", "out_probabilities.tif"}


def test_names_of_outputs(store: Path, tmp_path: Path) -> None:
    for name, kind in (("a.ome.zarr", "ome-zarr"), ("a.ZARR", "ome-zarr"), ("a.b.h5", "hdf5"), ("a.hdf5", "hdf5"),
                       ("a.nxs", "hdf5"), ("a.tif", "tiff"), ("a.TIFF", "tiff")):
        assert check_out(Path(name)) == kind
    for name in ("a", "a.png", "a.npy", ".zarr", ".ome.zarr", "a.zarr.zip"):
        with pytest.raises(UsageError, match=r"expected one of \.ome\.zarr, \.zarr, \.h5, \.hdf5, \.nxs, \.tif, \.tiff"):
            check_out(Path(name))
    assert output_files(Path("d/a.h5"), ("labels", "confidence")) == dict.fromkeys(("labels", "confidence"), Path("d/a.h5"))
    assert output_files(Path("d/a.tiff"), ("labels", "confidence")) == {
        "labels": Path("d/a.tiff"), "confidence": Path("d/a_confidence.tiff")}
    assert finish(store, store) == [store]
    with pytest.raises(UsageError, match="finished where it is"):
        finish(store, tmp_path / "b.zarr")


def test_units() -> None:
    assert micrometres(VoxelSize((1.0, 2.0, 3.0), "millimeter")) == (1000.0, 2000.0, 3000.0)
    assert micrometres(VoxelSize((1.0, 2.0, 3.0), "second")) is None
    assert micrometres(None) is None


DISK_FULL = """
import json, resource, sys
from pathlib import Path
import numpy as np
from phaseline.clients.volumes.finished import finish
from phaseline.clients.volumes.pyramid import build_pyramid
from phaseline.clients.volumes.volume import Box
from phaseline.clients.volumes.zarr_sink import ZarrSink
from phaseline.runtime.errors import OutputError
store, folder = Path(sys.argv[1]), Path(sys.argv[2])
sink = ZarrSink(store)
block = sink.layout.block(0)
voxels = np.random.default_rng(1).integers(1, 3, block.shape, np.uint8)
finish(store, folder / "out.h5")
size = (folder / "out.h5").stat().st_size
(folder / "out.h5").unlink()
said = {}
for name, limit, use in (
    ("block", 8000, lambda: sink.write("labels", block, voxels)),
    ("pyramid", 8000, lambda: build_pyramid(store)),
    ("tif", 8000, lambda: finish(store, folder / "out.tif")),
    *((f"h5 at {n}", n, lambda: finish(store, folder / "out.h5")) for n in (0, 8000, size // 2, size - 5000, size - 1)),
):
    # The largest file allowed: what comes of one larger is what comes of a full disk, but for the error's text.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        use()
        said[name] = "nothing"
    except OutputError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def test_a_full_disk(tmp_path: Path, values: Arrays) -> None:
    sink = write_all(tmp_path / "a.zarr", LAYOUT, values)
    before = files(tmp_path / "a.zarr")
    (tmp_path / "out").mkdir()
    found = subprocess.run([sys.executable, "-W", "error", "-c", DISK_FULL, str(tmp_path / "a.zarr"), str(tmp_path / "out")],
                           capture_output=True, text=True, check=True)
    assert found.stderr == ""
    said = json.loads(found.stdout)
    assert len(said) == 8
    for message in said.values():
        assert "File too large" in message and "--resume" in message
    assert "a.zarr/0 cannot be written" in said["block"] and "its block from (0, 0, 0) to (8, 42, 601)" in said["block"]
    assert list((tmp_path / "out").iterdir()) == []
    remove_pyramid(sink.path)
    assert files(sink.path) == before
