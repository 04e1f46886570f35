"""Readers of volumes: what the usual writers wrote comes back, in whole and in blocks, from several threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from phaseline.clients.images import read_image
from phaseline.clients.volumes.opening import is_volume, open_volume
from phaseline.clients.volumes.raw import RawLayout
from phaseline.clients.volumes.region import Region, RegionVolume, check_finite
from phaseline.clients.volumes.volume import Box, Volume, VolumeInfo, VoxelSize
from phaseline.runtime.errors import UsageError, VolumeError

h5py = pytest.importorskip("h5py", reason="needs the extra `volumes`")
hdf5plugin = pytest.importorskip("hdf5plugin", reason="needs the extra `volumes`")
zarr = pytest.importorskip("zarr", reason="needs the extra `volumes`")

Array = npt.NDArray[Any]
VOLUME = np.random.default_rng(0).integers(1, 65536, (11, 37, 50), np.uint16)
"""No voxel is 0: a part that is silently left out would show."""


def boxes(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Box]:
    """Blocks of any size and place, the whole and the last voxel among them."""
    rng = np.random.default_rng(seed)
    planes, rows, cols = shape
    found = [Box((0, 0, 0), (planes, rows, cols)), Box((planes - 1, rows - 1, cols - 1), (planes, rows, cols))]
    while len(found) < count:
        ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in shape]
        (z0, z1), (y0, y1), (x0, x1) = ((int(a), int(b)) for a, b in ends)
        found.append(Box((z0, y0, x0), (z1, y1, x1)))
    return found


def assert_reads(volume: Volume, expected: Array, count: int = 12) -> None:
    """Shape, dtype and the values of blocks, each in a new C-contiguous array of native byte order."""
    with volume as opened:
        info = opened.info
        assert info.shape == expected.shape
        assert info.dtype == expected.dtype.newbyteorder("=") and info.dtype.isnative
        assert all(chunk >= 1 for chunk in info.chunks) and str(info.name) and info.fingerprint
        for box in boxes(expected.shape, count):
            block = opened.read(box)
            assert block.dtype == info.dtype and block.dtype.isnative and block.flags.c_contiguous and block.flags.writeable
            np.testing.assert_array_equal(block, expected[box.slices])


def write_planes(folder: Path, volume: Array, name: Callable[[int], str] = "slice_{}.tif".format, **options: Any) -> Path:
    folder.mkdir()
    for i, plane in enumerate(volume):
        tifffile.imwrite(folder / name(i), plane, **options)
    return folder


@pytest.mark.parametrize("options", [
    {}, {"byteorder": ">"}, {"compression": "zlib", "predictor": True, "rowsperstrip": 5},
    {"compression": "lzw", "byteorder": ">"}, {"tile": (16, 32), "compression": "zlib"}, {"rowsperstrip": 4},
    {"bigtiff": True, "tile": (16, 16)}, {"metadata": None},
], ids=str)
def test_tiff_files(tmp_path: Path, options: dict[str, Any]) -> None:
    tifffile.imwrite(tmp_path / "stack.tif", VOLUME, photometric="minisblack", **options)
    assert is_volume(tmp_path / "stack.tif")
    assert_reads(open_volume(tmp_path / "stack.tif"), VOLUME)
    folder = write_planes(tmp_path / "planes", VOLUME, **options)
    assert not is_volume(folder)
    assert_reads(open_volume(folder, as_volume=True), VOLUME)


def test_tiff_folder_sorts_by_number_and_ignores_other_files(tmp_path: Path) -> None:
    folder = write_planes(tmp_path / "planes", VOLUME, "rec_{:d}.TIFF".format)
    (folder / "readme.txt").write_text("not a plane")
    (folder / ".rec_99.tif").write_text("hidden")
    with open_volume(folder, as_volume=True) as volume:
        assert volume.info.format == "tiff folder" and volume.info.voxel is None
    assert_reads(open_volume(folder, as_volume=True), VOLUME)


def test_pillow_stack_and_each_plane_as_read_image_reads_it(tmp_path: Path) -> None:
    images = [Image.fromarray(plane) for plane in VOLUME]
    images[0].save(tmp_path / "pillow.tif", save_all=True, append_images=images[1:], compression="tiff_adobe_deflate")
    assert_reads(open_volume(tmp_path / "pillow.tif"), VOLUME)
    grey = (VOLUME >> 8).astype(np.uint8)
    white = {"photometric": "miniswhite"}
    for name, planes, options in (("white", grey, white), ("white floats", grey.astype(np.float32), white),
                                  ("mask", grey > 99, {}), ("four bits", grey, {})):
        folder = write_planes(tmp_path / name, planes, **{"photometric": "minisblack", **options})
        if name == "four bits":
            for file in folder.iterdir():
                with tifffile.TiffFile(file, mode="r+") as tiff:
                    tiff.pages.first.tags["BitsPerSample"].overwrite(4)
                    tiff.pages.first.tags["ImageWidth"].overwrite(100)
        expected = np.array([read_image(folder / f"slice_{i}.tif") for i in range(len(planes))])
        assert_reads(open_volume(folder, as_volume=True), expected)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": "<"}], ids=str)
def test_imagej_voxel_size(tmp_path: Path, options: dict[str, Any]) -> None:
    metadata = {"axes": "ZYX", "spacing": 1.5, "unit": "um"}
    tifffile.imwrite(tmp_path / "a.tif", VOLUME, imagej=True, resolution=(2.0, 4.0), metadata=metadata, **options)
    with open_volume(tmp_path / "a.tif") as volume:
        assert volume.info.voxel == VoxelSize((1.5, 0.25, 0.5), "micrometer")
    assert_reads(open_volume(tmp_path / "a.tif"), VOLUME)
    tifffile.imwrite(tmp_path / "b.tif", VOLUME, imagej=True, metadata={"axes": "ZYX"})
    with open_volume(tmp_path / "b.tif") as volume:
        assert volume.info.voxel is None


def test_imagej_hyperstack_needs_a_choice(tmp_path: Path) -> None:
    stack = np.random.default_rng(1).integers(1, 255, (2, 5, 3, 20, 30), np.uint8)
    tifffile.imwrite(tmp_path / "tzc.tif", stack, imagej=True)
    with pytest.raises(UsageError, match=r"t \(2\), z \(5\), c \(3\).*--dataset t=0,c=0"), open_volume(tmp_path / "tzc.tif"):
        pass
    assert_reads(open_volume(tmp_path / "tzc.tif", dataset="c=2,t=1"), stack[1, :, 2])
    tifffile.imwrite(tmp_path / "t.tif", stack[:, 0, 0], imagej=True, metadata={"axes": "TYX"})
    with pytest.raises(UsageError, match="z=t to take t for planes"), open_volume(tmp_path / "t.tif"):
        pass
    assert_reads(open_volume(tmp_path / "t.tif", dataset="z=t"), stack[:, 0, 0])
    for wrong in ("c=3,t=0", "q=1,c=0,t=0", "c=-1,t=0"):
        with pytest.raises(UsageError, match="does not fit"), open_volume(tmp_path / "tzc.tif", dataset=wrong):
            pass


def test_ome_tiff(tmp_path: Path) -> None:
    metadata = {"axes": "CZYX", "PhysicalSizeX": 65.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 65.0,
                "PhysicalSizeYUnit": "nm", "PhysicalSizeZ": 0.2, "PhysicalSizeZUnit": "µm"}
    stack = np.stack([VOLUME, VOLUME[::-1]])
    tifffile.imwrite(tmp_path / "a.ome.tif", stack, metadata=metadata, compression="zlib", bigtiff=True)
    with open_volume(tmp_path / "a.ome.tif", dataset="c=1") as volume:
        voxel = volume.info.voxel
        assert voxel is not None and voxel.unit == "nanometer"
        np.testing.assert_allclose(voxel.size, (200, 65, 65))
        assert "c=1" in volume.info.name
    assert_reads(open_volume(tmp_path / "a.ome.tif", dataset="c=1"), VOLUME[::-1])


def test_several_series_need_a_choice(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "two.tif") as tiff:
        tiff.write(VOLUME, photometric="minisblack")
        tiff.write(VOLUME[:3, :9], photometric="minisblack")
    with pytest.raises(UsageError, match="2 series"), open_volume(tmp_path / "two.tif"):
        pass
    assert_reads(open_volume(tmp_path / "two.tif", dataset="series=1"), VOLUME[:3, :9])


FILTERS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "gzip": {"compression": "gzip", "shuffle": True, "chunks": (4, 16, 16)},
    "lzf": {"compression": "lzf"},
    "blosc": {**hdf5plugin.Blosc(), "chunks": (3, 20, 50)},
    "bitshuffle": {**hdf5plugin.Bitshuffle(cname="lz4"), "chunks": (1, 37, 50)},
    "lz4": dict(hdf5plugin.LZ4()),
    "zstd": dict(hdf5plugin.Zstd()),
    "checksum": {"fletcher32": True},
}


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
@pytest.mark.parametrize("filters", FILTERS)
def test_hdf5(tmp_path: Path, filters: str, dtype: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("entry/rec", data=VOLUME.astype(dtype), **FILTERS[filters])
        dataset.attrs["element_size_um"] = (2.0, 1.0, 1.0)
        file["entry/angles"] = np.arange(5.0)
        file["entry/title"] = "text"
    assert is_volume(tmp_path / "a.h5")
    for choice in (None, "auto", "/entry/rec", "entry/rec"):
        assert_reads(open_volume(tmp_path / "a.h5", dataset=choice), VOLUME, 4)
    with open_volume(tmp_path / "a.h5") as volume:
        assert volume.info.voxel == VoxelSize((2.0, 1.0, 1.0), "micrometer")
        assert volume.info.name.endswith("a.h5:/entry/rec")


def write_nexus(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file.attrs["default"] = "entry"
        entry = file.create_group("entry")
        entry.attrs.update(NX_class="NXentry", default="result")
        result = entry.create_group("result")
        result.attrs.update(NX_class="NXdata", signal="volume", axes=["z", "y", "x"])
        result["volume"] = VOLUME
        for name, n, step in (("z", 11, 4.0), ("y", 37, 3.25), ("x", 50, 3.25)):
            result[name] = np.arange(n) * step
            result[name].attrs["units"] = "um"
        entry["raw"] = VOLUME[::2]
        entry["also"] = h5py.SoftLink("/entry/result/volume")
    return path


def test_nexus_default_signal_and_axes(tmp_path: Path) -> None:
    path = write_nexus(tmp_path / "a.nxs")
    with open_volume(path) as volume:
        assert volume.info.voxel == VoxelSize((4.0, 3.25, 3.25), "micrometer")
        assert volume.info.name.endswith(":/entry/result/volume")
    assert_reads(open_volume(path), VOLUME)
    with h5py.File(path, "a") as file:
        del file.attrs["default"]
    # Of all NXdata groups one has a volume for its signal.
    assert_reads(open_volume(path), VOLUME, 3)
    with h5py.File(path, "a") as file:
        del file["entry/result"].attrs["signal"]
    with pytest.raises(UsageError, match=r"2 volumes.*\(11, 37, 50\) of uint16.*/entry/raw: \(6, 37, 50\)"), open_volume(path):
        pass
    assert_reads(open_volume(path, dataset="/entry/raw"), VOLUME[::2], 3)
    with h5py.File(path, "a") as file:
        file["entry/definition"] = "NXtomo"
        file["entry/instrument/detector/data"] = file["entry/raw"]
    assert_reads(open_volume(path, dataset="auto"), VOLUME[::2], 3)


def test_hdf5_axes_of_length_one_links_and_booleans(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["a/stack"] = np.stack([VOLUME, VOLUME[::-1]])
        file["b"] = VOLUME[None]
        file["mask"] = VOLUME > 9999
    with h5py.File(tmp_path / "master.h5", "w") as file:
        file["entry/data"] = h5py.ExternalLink("data.h5", "/b")
    assert_reads(open_volume(tmp_path / "master.h5"), VOLUME)
    assert_reads(open_volume(tmp_path / "data.h5", dataset="a/stack,d0=1"), VOLUME[::-1])
    assert_reads(open_volume(tmp_path / "data.h5", dataset="mask"), (VOLUME > 9999).astype(np.uint8) * np.uint8(255))
    with pytest.raises(UsageError, match="d0=0"), open_volume(tmp_path / "data.h5", dataset="a/stack"):
        pass


def write_virtual(folder: Path) -> Path:
    """Four files of three planes, the last of which only has two of them used, and a virtual dataset of all."""
    layout = h5py.VirtualLayout(VOLUME.shape, VOLUME.dtype)
    for i in range(4):
        planes = VOLUME[3 * i:3 * i + 3]
        with h5py.File(folder / f"part{i}.h5", "w") as file:
            file.create_dataset("data", data=planes, chunks=(1, 37, 50), **hdf5plugin.Blosc())
        layout[3 * i:3 * i + 3] = h5py.VirtualSource(f"part{i}.h5", "data", planes.shape)
    with h5py.File(folder / "virtual.h5", "w") as file:
        file.create_virtual_dataset("volume", layout, fillvalue=0)
    return folder / "virtual.h5"


def test_hdf5_virtual(tmp_path: Path) -> None:
    assert_reads(open_volume(write_virtual(tmp_path)), VOLUME)


@pytest.mark.parametrize("locking", ["TRUE", "FALSE", "BEST_EFFORT", None])
def test_hdf5_read_only_whatever_the_locking(tmp_path: Path, locking: str | None) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = VOLUME
    (tmp_path / "a.h5").chmod(0o444)
    tmp_path.chmod(0o555)
    code = ("from phaseline.clients.volumes.opening import open_volume\nimport sys\nfrom pathlib import Path\n"
            "with open_volume(Path(sys.argv[1])) as v: print(v.info.shape)")
    environment = {key: value for key, value in os.environ.items() if key != "HDF5_USE_FILE_LOCKING"}
    if locking is not None:
        environment["HDF5_USE_FILE_LOCKING"] = locking
    try:
        found = subprocess.run([sys.executable, "-c", code, tmp_path / "a.h5"], capture_output=True, text=True, env=environment,
                               check=True)
    finally:
        tmp_path.chmod(0o755)
    assert found.stdout.strip() == "(11, 37, 50)"


ZARRS: dict[str, dict[str, Any]] = {
    "v2": {"zarr_format": 2},
    "v2 nested": {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}, "order": "F"},
    "v3": {},
    "big-endian": {"dtype": ">u2"},
    "dots": {"chunk_key_encoding": {"name": "default", "separator": "."}},
    "sharded": {"shards": (8, 32, 32)},
    "plain": {"compressors": None},
    "blosc": {"compressors": [zarr.codecs.BloscCodec()]},
    "sharded blosc": {"shards": (8, 32, 32), "compressors": [zarr.codecs.BloscCodec()]},
}


def write_zarr(path: Path, data: Array = VOLUME, **options: Any) -> Path:
    options.setdefault("dtype", data.dtype)
    array = zarr.create_array(path, shape=data.shape, chunks=(4, 16, 16), **options)
    array[:] = data
    return path


@pytest.mark.parametrize("options", ZARRS)
def test_zarr_arrays(tmp_path: Path, options: str) -> None:
    path = write_zarr(tmp_path / "a.zarr", **ZARRS[options])
    assert is_volume(path)
    with open_volume(path) as volume:
        assert volume.info.format == "zarr" and volume.info.chunks == (4, 16, 16)
    assert_reads(open_volume(path), VOLUME)


def test_zarr_groups(tmp_path: Path) -> None:
    write_zarr(tmp_path / "g.zarr" / "x" / "volume")
    zarr.open_group(tmp_path / "g.zarr", mode="a").create_array("angles", shape=(4,), dtype="f4")
    zarr.open_group(tmp_path / "g.zarr" / "x", mode="a")
    assert_reads(open_volume(tmp_path / "g.zarr"), VOLUME)
    write_zarr(tmp_path / "g.zarr" / "x" / "other", VOLUME[::2])
    with pytest.raises(UsageError, match=r"2 volumes.*x/other: \(6, 37, 50\)"), open_volume(tmp_path / "g.zarr"):
        pass
    assert_reads(open_volume(tmp_path / "g.zarr", dataset="x/other"), VOLUME[::2], 3)
    with pytest.raises(UsageError, match="no dataset y; choose one of: x/other"), open_volume(tmp_path / "g.zarr", dataset="y"):
        pass


def test_zarr_dimension_names(tmp_path: Path) -> None:
    write_zarr(tmp_path / "a.zarr")
    stack = zarr.create_array(tmp_path / "t.zarr", shape=(2, 11, 37, 50), chunks=(1, 4, 16, 16), dtype="u2",
                              dimension_names=("t", "z", "y", "x"))
    stack[:] = np.stack([VOLUME, VOLUME[::-1]])
    assert_reads(open_volume(tmp_path / "t.zarr", dataset="t=1"), VOLUME[::-1], 3)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("sharded", [False, True])
def test_ome_zarr_by_ngff_zarr(tmp_path: Path, version: str, sharded: bool) -> None:
    ngff_zarr = pytest.importorskip("ngff_zarr", reason="needs ngff-zarr, which the extra `test` brings")
    if sharded and version == "0.4":
        pytest.skip("Zarr v2 has no shards")
    data = np.random.default_rng(2).integers(1, 65536, (16, 64, 64), np.uint16)
    image = ngff_zarr.to_ngff_image(data, dims=["z", "y", "x"], scale={"z": 3.0, "y": 1.5, "x": 1.5},
                                    axes_units=dict.fromkeys("zyx", "micrometer"))
    pyramid = ngff_zarr.to_multiscales(image, scale_factors=[2], chunks=16, method=ngff_zarr.Methods.DASK_BIN_SHRINK)
    path = tmp_path / "a.ome.zarr"
    # Its writer of voxels needs numpy 2; without it, zarr fills the arrays that it makes.
    numpy_1 = np.lib.NumpyVersion(np.__version__) < "2.0.0"
    options = {"chunks_per_shard": 2} if sharded else {}
    ngff_zarr.to_ngff_zarr(str(path), pyramid, version=version, metadata_only=numpy_1, **options)
    if numpy_1:
        for level, image in enumerate(pyramid.images):
            zarr.open_array(path / f"scale{level}" / "image", mode="r+")[:] = image.data.compute()
    assert is_volume(path)
    assert_reads(open_volume(path), data)
    with open_volume(path) as volume:
        assert volume.info.format == "ome-zarr" and "level 0" in volume.info.name
        assert volume.info.voxel == VoxelSize((3.0, 1.5, 1.5), "micrometer")
    with open_volume(path, level=1) as volume:
        assert volume.info.shape == (8, 32, 32) and "level 1" in volume.info.name
        assert volume.info.voxel == VoxelSize((6.0, 3.0, 3.0), "micrometer")
        assert volume.read(Box((0, 0, 0), (8, 32, 32))).shape == (8, 32, 32)
    expected = r"no level 2; choose one of 0: \(16, 64, 64\); 1: \(8, 32, 32\)"
    with pytest.raises(UsageError, match=expected), open_volume(path, level=2):
        pass


@pytest.mark.parametrize("nested", [False, True])
def test_ome_zarr_channels_and_the_whole_images_scale(tmp_path: Path, nested: bool) -> None:
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=3)
    if nested:
        # As bioformats2raw lays out several images.
        group = group.create_group("0")
    array = group.create_array("full", shape=(1, 2, 11, 37, 50), chunks=(1, 1, 4, 16, 16), dtype="u2")
    array[:] = np.stack([VOLUME, VOLUME[::-1]])[None]
    units = {"z": "micrometer", "y": "nanometer", "x": "nanometer"}
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"},
            *({"name": name, "type": "space", "unit": unit} for name, unit in units.items())]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{
        "axes": axes, "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 1, 2, 2]}],
        "datasets": [{"path": "full", "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 0.5, 100, 100]}]}]}]}
    with pytest.raises(UsageError, match="--dataset c=0"), open_volume(tmp_path / "a.zarr"):
        pass
    with open_volume(tmp_path / "a.zarr", dataset="c=1") as volume:
        voxel = volume.info.voxel
        assert voxel is not None and voxel.unit == "nanometer"
        np.testing.assert_allclose(voxel.size, (500, 200, 200))
    assert_reads(open_volume(tmp_path / "a.zarr", dataset="c=1"), VOLUME[::-1], 4)


@pytest.mark.parametrize("dtype", ["u1", "i1", ">i2", "<u4", ">i8", "f2", ">f4", "f8", "?"])
def test_npy_and_raw(tmp_path: Path, dtype: str) -> None:
    data = (VOLUME.astype(np.int64) % 100).astype(dtype)
    expected = data.astype(np.uint8) * np.uint8(255) if dtype == "?" else data.astype(data.dtype.newbyteorder("="))
    np.save(tmp_path / "c.npy", data)
    np.save(tmp_path / "f.npy", np.asfortranarray(data))
    assert is_volume(tmp_path / "c.npy")
    assert_reads(open_volume(tmp_path / "c.npy"), expected)
    assert_reads(open_volume(tmp_path / "f.npy"), expected)
    (tmp_path / "a.raw").write_bytes(b"header" + data.tobytes())
    layout = RawLayout.parse(f"11x37x50:{dtype if dtype != '?' else '|b1'}:offset=6")
    assert_reads(open_volume(tmp_path / "a.raw", raw=layout), expected)


def test_raw_layouts() -> None:
    assert RawLayout.parse("2x3x4:>u2") == RawLayout((2, 3, 4), np.dtype(">u2"))
    assert RawLayout.parse("2x3x4:float32:offset=8") == RawLayout((2, 3, 4), np.dtype("f4"), 8)
    for text in ("2x3:u1", "2x3x0:u1", "2x3x4", "2x3x4:c8", "2x3x4:O", "2x3x4:u3", "2x3x4:u1:offset=-1", "ax3x4:u1", ""):
        with pytest.raises(UsageError, match="layout of raw voxels"):
            RawLayout.parse(text)


def test_is_volume_is_honest(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "grey.tif", VOLUME[0])
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((20, 30, 3), np.uint8), photometric="rgb")
    tifffile.imwrite(tmp_path / "planar.tif", np.zeros((3, 20, 30), np.uint8), photometric="rgb", planarconfig="separate")
    with tifffile.TiffWriter(tmp_path / "thumb.tif") as tiff:
        tiff.write(VOLUME[0])
        tiff.write(VOLUME[0, ::4, ::4], subfiletype=1)
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    np.save(tmp_path / "plane.npy", VOLUME[0])
    np.save(tmp_path / "rgb.npy", np.zeros((20, 30, 3), np.uint8))
    (tmp_path / "broken.npy").write_bytes(b"no")
    (tmp_path / "a.png").write_bytes(b"")
    for path in (*tmp_path.iterdir(), tmp_path, tmp_path / "none.tif", tmp_path / "none.h5"):
        assert not is_volume(path), path
    tifffile.imwrite(tmp_path / "one.tif", VOLUME[:2], photometric="minisblack")
    tifffile.imwrite(tmp_path / "ij.tif", VOLUME, imagej=True)
    for name in ("a.bin", "a.vol", "a.raw", "a.nxs.h5", "a.nx"):
        (tmp_path / name).write_bytes(b"")
    for name in ("one.tif", "ij.tif", "a.bin", "a.vol", "a.raw", "a.nxs.h5", "a.nx"):
        assert is_volume(tmp_path / name), name


def volumes_of_all_kinds(folder: Path) -> list[Volume]:
    tifffile.imwrite(folder / "a.tif", VOLUME, photometric="minisblack", compression="zlib", rowsperstrip=8)
    tifffile.imwrite(folder / "ij.tif", VOLUME, imagej=True, metadata={"axes": "ZYX"})
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("a", data=VOLUME, chunks=(2, 16, 16), **hdf5plugin.Blosc())
    np.save(folder / "a.npy", VOLUME)
    return [*(open_volume(folder / name) for name in ("a.tif", "ij.tif", "a.h5", "a.npy")),
            open_volume(write_planes(folder / "planes", VOLUME), as_volume=True), open_volume(write_zarr(folder / "a.zarr")),
            open_volume(write_zarr(folder / "s.zarr", shards=(8, 32, 32)))]


def test_threads_read_at_once(tmp_path: Path) -> None:
    for volume in volumes_of_all_kinds(tmp_path):
        with volume as opened, ThreadPoolExecutor(8) as threads:
            asked = boxes(VOLUME.shape, 40, seed=3)
            for box, block in zip(asked, threads.map(opened.read, asked), strict=True):
                np.testing.assert_array_equal(block, VOLUME[box.slices])


def test_opens_on_with_and_again_and_knows_its_shape(tmp_path: Path) -> None:
    for volume in volumes_of_all_kinds(tmp_path):
        with pytest.raises(UsageError, match="inside `with`"):
            _ = volume.info
        for _ in range(2):
            with volume as opened:
                first = opened.info
                with pytest.raises(UsageError, match="stay inside"):
                    opened.read(Box((0, 0, 0), (12, 1, 1)))
        with pytest.raises(UsageError, match="inside `with`"):
            volume.read(Box((0, 0, 0), (1, 1, 1)))
        with volume as opened:
            assert opened.info == first


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    prints = {}
    for volume in volumes_of_all_kinds(tmp_path):
        with volume as opened:
            prints[opened.info.name] = opened.info.fingerprint
    assert len(set(prints.values())) == len(prints)
    for file in tmp_path.rglob("*"):
        os.utime(file, ns=(1, 1))
    for name, before in prints.items():
        with open_volume(Path(name.partition(":")[0]), as_volume=True) as opened:
            assert opened.info.name == name and opened.info.fingerprint != before


PART = st.tuples(st.integers(0, 9), st.integers(1, 12), st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(parts=st.tuples(PART, PART, PART), seed=st.integers(0, 99))
def test_regions(parts: tuple[tuple[int, int, int], ...], seed: int) -> None:
    taken = tuple(slice(a, min(a + n, length), step) for (a, n, step), length in zip(parts, VOLUME.shape, strict=True))
    region = Region.parse(",".join(f"{s.start}:{s.stop}:{s.step}" for s in taken))
    assert Region.parse(str(region)) == region
    expected = VOLUME[taken]
    with RegionVolume(Fake(), region) as volume:
        assert volume.info.shape == expected.shape
        assert volume.info.voxel == VoxelSize((2.0 * parts[0][2], 1.0 * parts[1][2], 1.0 * parts[2][2]), "micrometer")
        for box in boxes(expected.shape, 5, seed):
            block = volume.read(box)
            assert block.flags.c_contiguous and block.dtype == np.uint16
            np.testing.assert_array_equal(block, expected[box.slices])


class Fake:
    """A volume in memory."""

    def __init__(self) -> None:
        voxel = VoxelSize((2.0, 1.0, 1.0), "micrometer")
        self.info = VolumeInfo("fake", "raw", (11, 37, 50), VOLUME.dtype, (4, 16, 16), voxel, "f")

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def read(self, box: Box) -> Array:
        return VOLUME[box.slices].copy()


def test_regions_that_are_refused() -> None:
    assert Region.parse(":, :,::") == Region()
    for text in ("-1:2,:,:", "5:5,:,:", "6:5,:,:", "::0,:,:", "::-1,:,:", ":,:", "a:b,:,:", ":,:,:,:", "", "3,:,:"):
        with pytest.raises(UsageError, match="region"):
            Region.parse(text)
    for text in ("0:12,:,:", ":,37:,:", ":,:,50:60"):
        with pytest.raises(UsageError, match="stay inside"), RegionVolume(Fake(), Region.parse(text)):
            pass


def test_planes_with_nan_are_read_and_named_when_checked(tmp_path: Path) -> None:
    data = VOLUME.astype(np.float32)
    data[7, 3, 4] = np.nan
    data[9, 0, 0] = np.inf
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="minisblack")
    with open_volume(tmp_path / "a.tif") as volume:
        box = Box((5, 2, 2), (11, 9, 9))
        block = volume.read(box)
        np.testing.assert_array_equal(block, data[box.slices])
        expected = r"a\.tif: plane 7 has NaN or infinite voxels \(1 of 49, the first at row 3, column 4\)"
        with pytest.raises(VolumeError, match=expected):
            check_finite(block, box, volume.info.name)
        check_finite(block[3:], Box((8, 2, 2), (11, 9, 9)), volume.info.name)
        with pytest.raises(VolumeError, match="plane 9"):
            check_finite(data[8:], Box((8, 0, 0), (11, 37, 50)), volume.info.name)
    check_finite(VOLUME, Box((0, 0, 0), (11, 37, 50)), "integers")
