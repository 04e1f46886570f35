"""Volumes that are damaged, incomplete or not what was asked for: one error each, which names the file and a plane."""

from __future__ import annotations

import builtins
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from phaseline.clients.volumes.opening import open_volume
from phaseline.clients.volumes.raw import RawLayout
from phaseline.clients.volumes.volume import Box, Volume
from phaseline.runtime.errors import MissingExtraError, MissingInputError, UsageError, VolumeError

h5py = pytest.importorskip("h5py", reason="needs the extra `volumes`")
hdf5plugin = pytest.importorskip("hdf5plugin", reason="needs the extra `volumes`")
zarr = pytest.importorskip("zarr", reason="needs the extra `volumes`")
numcodecs = pytest.importorskip("numcodecs", reason="comes with zarr")

VOLUME = np.random.default_rng(0).integers(1, 65536, (11, 37, 50), np.uint16)
"""No voxel is 0: a part that is silently left out would show."""
ALL = Box((0, 0, 0), (11, 37, 50))
IMAGEJ: dict[str, Any] = {"imagej": True, "metadata": {"axes": "ZYX"}}
PLAIN: dict[str, Any] = {"photometric": "minisblack"}
TIFFS: dict[str, dict[str, Any]] = {
    "tifffile": PLAIN,
    "without metadata": {**PLAIN, "metadata": None},
    "imagej": IMAGEJ,
    "imagej zlib": {**IMAGEJ, "compression": "zlib"},
    "ome": {**PLAIN, "metadata": {"axes": "ZYX"}, "ome": True},
    "bigtiff": {**PLAIN, "bigtiff": True, "compression": "lzw"},
    "tiles": {**PLAIN, "tile": (16, 16), "compression": "zlib"},
    "strips": {**PLAIN, "rowsperstrip": 3, "metadata": None},
}


def read(volume: Volume, box: Box = ALL) -> npt.NDArray[Any]:
    with volume as opened:
        return opened.read(box)


def refused(volume: Volume, *words: str, box: Box = ALL) -> str:
    """That opening or reading ends in one clear line with these words in it."""
    with pytest.raises(VolumeError) as caught:
        read(volume, box)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


def cuts(size: int, count: int) -> list[int]:
    return sorted({0, 1, 7, *np.linspace(8, size - 1, count, dtype=int).tolist(), size - 2, size - 1})


def check_cuts(path: Path, reader: Callable[[], Volume], file: Path | None = None, count: int = 20) -> None:
    """Cut at many lengths: an error that names file and plane, or what was written — never other voxels."""
    file = file or path
    content = file.read_bytes()
    failed = 0
    lengths = cuts(len(content), count)
    for length in lengths:
        file.write_bytes(content[:length])
        try:
            np.testing.assert_array_equal(read(reader()), VOLUME)
        except VolumeError as error:
            failed += 1
            assert path.name in str(error) and "plane" in str(error), error
    assert failed > len(lengths) // 2
    file.write_bytes(content)
    np.testing.assert_array_equal(read(reader()), VOLUME)


@pytest.mark.parametrize("kind", TIFFS)
def test_cut_tiff_files(tmp_path: Path, kind: str) -> None:
    options = dict(TIFFS[kind])
    path = tmp_path / ("a.ome.tif" if options.pop("ome", False) else "a.tif")
    tifffile.imwrite(path, VOLUME, **options)
    check_cuts(path, lambda: open_volume(path))


def test_cut_plane_of_a_folder_leaves_the_others(tmp_path: Path) -> None:
    for options in ({}, {"compression": "zlib"}):
        folder = tmp_path / f"planes{len(options)}"
        folder.mkdir()
        for i, plane in enumerate(VOLUME):
            tifffile.imwrite(folder / f"s{i}.tif", plane, **options)
        content = (folder / "s10.tif").read_bytes()
        for length in cuts(len(content), 12):
            (folder / "s10.tif").write_bytes(content[:length])
            message = refused(open_volume(folder, as_volume=True), str(folder), "s10.tif", "copy or export it again")
            assert "plane 10" in message
            others = read(open_volume(folder, as_volume=True), Box((0, 3, 4), (10, 37, 50)))
            np.testing.assert_array_equal(others, VOLUME[:10, 3:, 4:])
        with open_volume(folder, as_volume=True) as volume:
            (folder / "s3.tif").unlink()
            with pytest.raises(VolumeError, match=r"plane 3 cannot be read, s3\.tif is .*No such file"):
                volume.read(ALL)


def test_folders_that_are_not_one_volume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--as-volume"):
        open_volume(tmp_path)
    with pytest.raises(MissingInputError, match="holds no TIFF files"), open_volume(tmp_path, as_volume=True):
        pass
    for i in range(4):
        tifffile.imwrite(tmp_path / f"{i}.tif", VOLUME[0])
    tifffile.imwrite(tmp_path / "2.tif", VOLUME[0, 1:])
    refused(open_volume(tmp_path, as_volume=True), "2.tif", "(36, 50)", "(37, 50)")
    tifffile.imwrite(tmp_path / "2.tif", VOLUME[0].astype(np.float32))
    refused(open_volume(tmp_path, as_volume=True), "2.tif", "float32", "uint16")
    tifffile.imwrite(tmp_path / "2.tif", VOLUME[:2], **PLAIN)
    refused(open_volume(tmp_path, as_volume=True), "2.tif", "several pages")
    tifffile.imwrite(tmp_path / "2.tif", np.zeros((37, 50, 3), np.uint8), photometric="rgb")
    refused(open_volume(tmp_path, as_volume=True), "2.tif", "colour")
    for file in tmp_path.iterdir():
        file.write_bytes(b"II*\0")
    refused(open_volume(tmp_path, as_volume=True), "plane 0", "0.tif")


def test_tiff_pages_that_are_not_grey_planes(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((5, 20, 30, 3), np.uint8), photometric="rgb")
    refused(open_volume(tmp_path / "rgb.tif"), "rgb.tif", "colour")
    table = np.random.default_rng(0).integers(0, 65536, (3, 256), np.uint16)
    tifffile.imwrite(tmp_path / "palette.tif", np.zeros((5, 20, 30), np.uint8), photometric="palette", colormap=table)
    refused(open_volume(tmp_path / "palette.tif"), "palette.tif", "colour")
    tifffile.imwrite(tmp_path / "deep.tif", VOLUME, tile=(4, 16, 16), volumetric=True)
    refused(open_volume(tmp_path / "deep.tif"), "deep.tif", "pages of 11 planes")
    tifffile.imwrite(tmp_path / "complex.tif", VOLUME.astype(np.complex64), **PLAIN)
    refused(open_volume(tmp_path / "complex.tif"), "complex64")


def test_sparse_tiff_and_missing_files_of_an_ome_set(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "sparse.tif", VOLUME, tile=(16, 16), compression="zlib", **PLAIN)
    with tifffile.TiffFile(tmp_path / "sparse.tif", mode="r+") as tiff:
        counts = tiff.pages[6].tags["TileByteCounts"]
        counts.overwrite([0, *counts.value[1:]])
    refused(open_volume(tmp_path / "sparse.tif"), "sparse.tif", "plane 6", "--missing-chunks fill")
    filled = VOLUME.copy()
    filled[6, :16, :16] = 0
    np.testing.assert_array_equal(read(open_volume(tmp_path / "sparse.tif", missing="fill")), filled)
    np.testing.assert_array_equal(read(open_volume(tmp_path / "sparse.tif"), Box((6, 16, 0), (7, 37, 50))), VOLUME[6:7, 16:])

    tifffile.imwrite(tmp_path / "a.ome.tif", VOLUME, metadata={"axes": "ZYX"}, **PLAIN)
    with tifffile.TiffFile(tmp_path / "a.ome.tif", mode="r+") as tiff:
        text = tiff.pages[0].tags["ImageDescription"]
        text.overwrite(text.value.replace('SizeZ="11"', 'SizeZ="13"').replace('PlaneCount="11"', 'PlaneCount="13"'))
    refused(open_volume(tmp_path / "a.ome.tif"), "a.ome.tif", "plane 11", "missing", box=Box((0, 0, 0), (13, 1, 1)))


def write_hdf5(path: Path, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("entry/rec", data=VOLUME, **options)
    return path


@pytest.mark.parametrize("options", [{}, {"chunks": (2, 37, 50), **hdf5plugin.Blosc()}], ids=["contiguous", "blosc"])
def test_cut_hdf5(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write_hdf5(tmp_path / "a.h5", **options)
    check_cuts(path, lambda: open_volume(path))


def test_damaged_hdf5_chunk_is_named_by_its_plane(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "a.h5", chunks=(2, 37, 50), compression="gzip")
    with h5py.File(path) as file:
        chunk = file["entry/rec"].id.get_chunk_info_by_coord((6, 0, 0))
    with path.open("r+b") as stream:
        stream.seek(chunk.byte_offset)
        stream.write(b"\xff" * 64)
    refused(open_volume(path), "a.h5:/entry/rec", "plane 6")
    np.testing.assert_array_equal(read(open_volume(path), Box((8, 0, 0), (11, 37, 50))), VOLUME[8:])


def test_hdf5_chunks_that_were_never_written(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("a", VOLUME.shape, "u2", chunks=(4, 20, 20), compression="gzip", fillvalue=9)
        dataset[:8] = VOLUME[:8]
        dataset[8:, :20] = VOLUME[8:, :20]
        file.create_dataset("b", VOLUME.shape, "u2")
    refused(open_volume(tmp_path / "a.h5", dataset="a"), "a.h5:/a", "plane 8", "(2, 1, 0)", "--missing-chunks fill")
    refused(open_volume(tmp_path / "a.h5", dataset="a"), "plane 9", box=Box((9, 0, 0), (11, 37, 50)))
    np.testing.assert_array_equal(read(open_volume(tmp_path / "a.h5", dataset="a"), Box((0, 0, 0), (11, 20, 50))), VOLUME[:, :20])
    filled = VOLUME.copy()
    filled[8:, 20:] = 9
    np.testing.assert_array_equal(read(open_volume(tmp_path / "a.h5", dataset="a", missing="fill")), filled)
    refused(open_volume(tmp_path / "a.h5", dataset="b"), "a.h5:/b", "plane 0")


def write_virtual(folder: Path) -> Path:
    """Planes of four files, and of the last of the four only its upper rows."""
    layout = h5py.VirtualLayout(VOLUME.shape, VOLUME.dtype)
    for i in range(4):
        planes = VOLUME[3 * i:3 * i + 3]
        with h5py.File(folder / f"part{i}.h5", "w") as file:
            file.create_dataset("data", data=planes, chunks=(1, 37, 50))
        source = h5py.VirtualSource(f"part{i}.h5", "data", planes.shape)
        rows = 37 if i < 3 else 20
        layout[3 * i:3 * i + 3, :rows] = source[:, :rows]
    with h5py.File(folder / "virtual.h5", "w") as file:
        file.create_virtual_dataset("volume", layout, fillvalue=0)
    return folder / "virtual.h5"


def test_virtual_datasets_with_gaps(tmp_path: Path) -> None:
    path = write_virtual(tmp_path)
    refused(open_volume(path), "virtual.h5:/volume", "plane 9", "no source")
    whole = Box((0, 0, 0), (9, 37, 50))
    np.testing.assert_array_equal(read(open_volume(path), whole), VOLUME[:9])
    np.testing.assert_array_equal(read(open_volume(path), Box((0, 0, 0), (11, 20, 50))), VOLUME[:, :20])
    (tmp_path / "part1.h5").rename(tmp_path / "elsewhere.h5")
    refused(open_volume(path), "virtual.h5", "plane 3", "part1.h5", "no such file", box=whole)
    np.testing.assert_array_equal(read(open_volume(path), Box((6, 0, 0), (9, 37, 50))), VOLUME[6:9])
    assert not read(open_volume(path, missing="fill"), whole)[3:6].any()
    with h5py.File(tmp_path / "part1.h5", "w") as file:
        file.create_dataset("data", (3, 37, 50), "u2", chunks=(1, 37, 50))[:2] = VOLUME[3:5]
    refused(open_volume(path), "plane 3", "lacks 1 of its 3 chunks", box=whole)
    with h5py.File(tmp_path / "part1.h5", "w") as file:
        file["data"] = VOLUME[3:5]
    refused(open_volume(path), "plane 3", "(2, 37, 50)", box=whole)
    (tmp_path / "part1.h5").write_bytes(b"\x89HDF")
    refused(open_volume(path), "plane 3", "part1.h5", "cannot be opened", box=whole)


def test_hdf5_links_and_raw_files_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(tmp_path / "master.h5", "w") as file:
        file["entry/data"] = h5py.ExternalLink("data.h5", "/rec")
        file["entry/soft"] = h5py.SoftLink("/nowhere")
    for dataset, word in (("entry/data", "data.h5"), ("entry/soft", "/nowhere"), (None, "/entry/soft")):
        refused(open_volume(tmp_path / "master.h5", dataset=dataset), "master.h5", word)
    with h5py.File(tmp_path / "nexus.h5", "w") as file:
        file.attrs["default"] = "data"
        group = file.create_group("data")
        group.attrs.update(NX_class="NXdata", signal="volume")
        group["volume"] = h5py.ExternalLink("data.h5", "/rec")
        file["other"] = VOLUME
    refused(open_volume(tmp_path / "nexus.h5"), "nexus.h5", "signal", "copy the files it links to")
    raw = tmp_path / "raw.bin"
    raw.write_bytes(VOLUME.tobytes())
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("rec", VOLUME.shape, "u2", external=[("raw.bin", 0, VOLUME.nbytes)])
    # HDF5 looks for it in the folder in which the process runs, or where its own variable said when it was imported.
    refused(open_volume(tmp_path / "external.h5"), "external.h5", "raw.bin", "HDF5_EXTFILE_PREFIX")
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(read(open_volume(tmp_path / "external.h5")), VOLUME)
    raw.write_bytes(VOLUME.tobytes()[:-2])
    refused(open_volume(tmp_path / "external.h5"), "external.h5", "raw.bin", str(VOLUME.nbytes - 2))


def test_hdf5_datasets_that_cannot_be_volumes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["plane"] = VOLUME[0]
        file["complex"] = VOLUME.astype(np.complex64)
        file["text"] = np.full((2, 2, 2), b"x")
        file["group/empty"] = np.zeros((0, 3, 3))
    refused(open_volume(tmp_path / "a.h5"), "a.h5", "no 3-D dataset")
    refused(open_volume(tmp_path / "a.h5", dataset="plane"), "(37, 50)")
    refused(open_volume(tmp_path / "a.h5", dataset="complex"), "complex64")
    refused(open_volume(tmp_path / "a.h5", dataset="text"), "integers or real numbers")
    refused(open_volume(tmp_path / "a.h5", dataset="group/empty"), "(0, 3, 3)")
    for name, words in (("group", "a group"), ("nothing", "no dataset nothing"), ("plane,group", "2 paths")):
        with pytest.raises(UsageError, match=words), open_volume(tmp_path / "a.h5", dataset=name):
            pass
    (tmp_path / "not.h5").write_bytes(b"text")
    refused(open_volume(tmp_path / "not.h5"), "not.h5", "none of its planes")


def write_zarr(path: Path, **options: Any) -> Path:
    zarr.create_array(path, shape=VOLUME.shape, chunks=(4, 16, 16), dtype="u2", **options)[:] = VOLUME
    return path


@pytest.mark.parametrize(("options", "key", "plane"), [
    ({"zarr_format": 2}, "1.2.3", 4), ({}, "c/1/2/3", 4), ({"shards": (8, 32, 32)}, "c/1/1/1", 8),
    ({"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}}, "2/0/1", 8),
], ids=["v2", "v3", "sharded", "v2 nested"])
def test_missing_zarr_chunks(tmp_path: Path, options: dict[str, Any], key: str, plane: int) -> None:
    path = write_zarr(tmp_path / "a.zarr", **options, fill_value=5)
    (path / key).unlink()
    refused(open_volume(path), "a.zarr", f"plane {plane}", key, "--missing-chunks fill")
    refused(open_volume(path), f"plane {plane + 1}", box=Box((plane + 1, 0, 0), (11, 37, 50)))
    np.testing.assert_array_equal(read(open_volume(path), Box((0, 0, 0), (plane, 37, 50))), VOLUME[:plane])
    block = read(open_volume(path, missing="fill"))
    assert ((block == VOLUME) | (block == 5)).all() and (block == 5).sum() >= 40


@pytest.mark.parametrize("options", [
    {"zarr_format": 2}, {"zarr_format": 2, "compressors": numcodecs.Blosc()}, {"compressors": None},
    {"compressors": [zarr.codecs.BloscCodec()]}, {"compressors": [zarr.codecs.GzipCodec()]}, {"shards": (8, 32, 32)},
    {"shards": (8, 32, 32), "compressors": [zarr.codecs.BloscCodec()]},
    {"shards": {"shape": (8, 32, 32), "index_location": "start"}, "compressors": [zarr.codecs.BloscCodec()]},
], ids=["v2", "v2 blosc", "plain", "blosc", "gzip", "sharded", "sharded blosc", "index first"])
def test_cut_zarr_chunks(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write_zarr(tmp_path / "a.zarr", **options)
    array = zarr.open_array(path, mode="r")
    check_cuts(path, lambda: open_volume(path), file=path / array.metadata.encode_chunk_key((1, 1, 1)), count=8)


def test_a_damaged_zarr_chunk_is_all_that_is_said(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", shards=None)
    (path / "c" / "1" / "0" / "0").write_bytes(b"no")
    code = ("from phaseline.clients.volumes.opening import open_volume\nfrom phaseline.clients.volumes.volume import Box\n"
            "import sys\nfrom pathlib import Path\n"
            "with open_volume(Path(sys.argv[1])) as v:\n"
            "    try: v.read(Box((0, 0, 0), v.info.shape))\n"
            "    except ValueError as error: print(error)")
    found = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert "a.zarr: plane 4 cannot be read" in found.stdout and found.stderr == ""


def test_damaged_zarr_metadata(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr")
    content = (path / "zarr.json").read_bytes()
    for length in (0, 10, len(content) // 2):
        (path / "zarr.json").write_bytes(content[:length])
        refused(open_volume(path), "a.zarr", "plane")
    (path / "zarr.json").unlink()
    with pytest.raises(UsageError, match=r"a\.zarr has neither zarr\.json"):
        open_volume(path)


def test_zarr_that_is_no_volume(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "g.zarr", mode="w")
    refused(open_volume(tmp_path / "g.zarr"), "g.zarr", "no array")
    group.create_array("plane", shape=(5, 5), dtype="u1")
    group.create_array("complex", shape=(5, 5, 5), dtype="c8")
    refused(open_volume(tmp_path / "g.zarr"), "g.zarr", "no array")
    refused(open_volume(tmp_path / "g.zarr", dataset="plane"), "(5, 5)")
    refused(open_volume(tmp_path / "g.zarr", dataset="complex"), "complex64")
    scale = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 1]}]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": [{"name": n} for n in "zyx"], "datasets": [scale]}]}
    refused(open_volume(tmp_path / "g.zarr"), "g.zarr", "level 0", "plane")
    group.create_array("0", shape=VOLUME.shape, dtype="u2")
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": [{"name": n} for n in "xyz"], "datasets": [scale]}]}
    refused(open_volume(tmp_path / "g.zarr"), "x, y, z")
    path = write_zarr(tmp_path / "a.zarr")
    for options, words in (({"level": 0}, "without levels"), ({"dataset": "x"}, "is one array")):
        with pytest.raises(UsageError, match=words), open_volume(path, **options):
            pass


def test_npy_and_raw_of_the_wrong_length(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VOLUME)
    check_cuts(tmp_path / "a.npy", lambda: open_volume(tmp_path / "a.npy"))
    content = VOLUME.tobytes()
    raw = tmp_path / "a.raw"
    layout = RawLayout(VOLUME.shape, VOLUME.dtype)
    raw.write_bytes(content[:-1])
    counts = f"{len(content) - 1} bytes, expected {len(content)}"
    refused(open_volume(raw, raw=layout), "a.raw", counts, "plane 10 is the first")
    raw.write_bytes(content + b"x")
    refused(open_volume(raw, raw=layout), "a.raw", f"{len(content) + 1} bytes", f"expected {len(content)}")
    raw.write_bytes(content)
    with open_volume(raw, raw=layout) as volume:
        raw.write_bytes(content[:5 * 37 * 50 * 2 + 9])
        with pytest.raises(VolumeError, match=r"a\.raw: plane 5 cannot be read.*bytes too early"):
            volume.read(ALL)


def test_npy_that_is_no_volume(tmp_path: Path) -> None:
    for data, words in ((VOLUME[0], "(37, 50)"), (VOLUME.astype(np.complex64), "complex64"), (np.full((2, 2, 2), "a"), "<U1"),
                        (np.zeros((0, 2, 2)), "(0, 2, 2)"), (np.zeros((2, 2, 2), np.longdouble), "float128")):
        np.save(tmp_path / "a.npy", data)
        refused(open_volume(tmp_path / "a.npy"), "a.npy", words)
    np.save(tmp_path / "o.npy", np.full((2, 2, 2), None), allow_pickle=True)
    refused(open_volume(tmp_path / "o.npy"), "o.npy", "object")


def test_what_is_not_a_volume_and_options_that_do_not_go_with_it(tmp_path: Path) -> None:
    layout = RawLayout((1, 1, 1), np.dtype("u1"))
    for name in ("a.h5", "a.npy", "a.raw", "a.tif", "a.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(MissingInputError, match=r"none\.h5 does not exist"):
        open_volume(tmp_path / "none.h5")
    with pytest.raises(UsageError, match=r"a\.png is not a volume by its name"):
        open_volume(tmp_path / "a.png")
    with pytest.raises(UsageError, match="give them, such as --raw"):
        open_volume(tmp_path / "a.raw")
    wrong: list[tuple[str, dict[str, Any]]] = [("a.h5", {"level": 1}), ("a.npy", {"dataset": "x"}), ("a.tif", {"raw": layout}),
                                               ("a.raw", {"dataset": "x"})]
    for name, options in wrong:
        with pytest.raises(UsageError, match="does not go with"):
            open_volume(tmp_path / name, **options)
    with pytest.raises(UsageError, match="TIFF has none"):
        open_volume(tmp_path / "a.tif", dataset="entry/data")
    for name in ("a.h5", "a.npy", "a.tif"):
        refused(open_volume(tmp_path / name), name, "plane")
    shutil.rmtree(tmp_path)


def test_extras_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.h5").write_bytes(b"")
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "zarr.json").write_text("{}")
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.endswith(("volumes.hdf5", "volumes.ome_zarr")):
            package = "h5py" if name.endswith("hdf5") else "zarr"
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for name, package in (("a.h5", "h5py"), ("a.zarr", "zarr")):
        with pytest.raises(MissingExtraError, match=rf"{package} is not installed.*\[volumes\]"):
            open_volume(tmp_path / name)
