"""Opening a volume: which reader reads what.

    .tif .tiff .btf .tf8, folders of them   tiff.TiffVolume, tiff.TiffFolder
    .h5 .hdf5 .nxs .nx                      hdf5.Hdf5Volume
    folders with Zarr metadata              ome_zarr.ZarrVolume
    .npy                                    raw.NpyVolume
    .raw .bin .vol, or a layout given       raw.RawVolume
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, assert_never

from phaseline.clients.volumes.raw import NpyVolume, RawLayout, RawVolume, npy_header
from phaseline.clients.volumes.reader import DAMAGE, Missing
from phaseline.clients.volumes.tiff import SUFFIXES as TIFF
from phaseline.clients.volumes.tiff import TiffFolder, TiffVolume, is_tiff_stack
from phaseline.clients.volumes.volume import Volume
from phaseline.runtime.errors import MissingExtraError, MissingInputError, UsageError

HDF5 = (".h5", ".hdf5", ".nxs", ".nx")
RAW = (".raw", ".bin", ".vol")

_Kind = Literal["tiff folder", "tiff", "hdf5", "zarr", "npy", "raw"]
_KINDS = (f"a TIFF stack ({', '.join(TIFF)}), HDF5 or NeXus ({', '.join(HDF5)}), a Zarr folder, a 3-D .npy, or raw voxels "
          f"({', '.join(RAW)})")


def open_volume(
    path: Path,
    *,
    dataset: str | None = None,
    level: int | None = None,
    raw: RawLayout | None = None,
    missing: Missing = "refuse",
    as_volume: bool = False,
) -> Volume:
    """Choose the reader of a volume.

    Parameters
    ----------
    path
        A file, or a folder that is one volume.
    dataset
        HDF5 and Zarr: path of the dataset in it; None or ``auto`` to find it. Where there are more axes than planes, rows and
        columns, what to take along them, as in ``c=0,t=1`` or ``entry/data,c=0``; ``z=t`` takes times for planes.
    level
        OME-Zarr: resolution level, 0 the finest; None for 0.
    raw
        Shape, type and offset of raw voxels.
    missing
        What to do about chunks that were never written: refuse the planes that need them, or take the file's fill value.
    as_volume
        Take a folder of TIFF images for one volume.

    Returns
    -------
    The volume, not yet open: use it in ``with``.

    Raises
    ------
    MissingInputError
        There is no such path.
    UsageError
        It is not a kind of volume that is known, or an option does not go with it.
    MissingExtraError
        The packages that read it are not installed.
    """
    path = Path(path)
    if not path.exists():
        raise MissingInputError(f"{path} does not exist; give {_KINDS}")
    kind = _kind(path, raw, as_volume)
    for option, given, kinds in (("a level", level, ("zarr",)), ("a layout of raw voxels", raw, ("raw",)),
                                 ("a dataset", dataset, ("hdf5", "zarr", "tiff"))):
        if given is not None and kind not in kinds:
            raise UsageError(f"{path} is read as {kind}, which {option} ({given}) does not go with; leave it out")
    match kind:
        case "tiff folder":
            return TiffFolder(path, missing)
        case "tiff":
            return TiffVolume(path, None if dataset == "auto" else dataset, missing)
        case "hdf5":
            return _open_hdf5(path, dataset, missing)
        case "zarr":
            return _open_zarr(path, dataset, level, missing)
        case "npy":
            return NpyVolume(path)
        case "raw":
            if raw is None:
                raise UsageError(f"{path} holds raw voxels, whose shape and type the file does not say; give them, such as --raw "
                                 "2048x2048x2048:>u2:offset=0")
            return RawVolume(path, raw)
    assert_never(kind)


def is_volume(path: Path) -> bool:
    """Whether a path is a volume by itself: by its name and its header, without reading voxels.

    A folder of images is not, nor is a TIFF file with one page; nor is what cannot be read, which reading will say.
    """
    path = Path(path)
    if path.is_dir():
        return is_zarr(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        return False
    if suffix in TIFF:
        return is_tiff_stack(path)
    if suffix == ".npy":
        try:
            return len(npy_header(path)[0]) == 3 and npy_header(path)[0][-1] != 3
        except DAMAGE:
            return False
    return suffix in HDF5 or suffix in RAW


def is_zarr(path: Path) -> bool:
    """Whether a folder has the metadata of a Zarr array or group."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def _kind(path: Path, raw: RawLayout | None, as_volume: bool) -> _Kind:
    if path.is_dir():
        if is_zarr(path):
            return "zarr"
        if path.suffix.lower() == ".zarr":
            raise UsageError(f"{path} has neither zarr.json, .zarray nor .zgroup, expected one; copy the whole folder")
        if not as_volume:
            raise UsageError(f"{path} is a folder, expected {_KINDS}; take a folder of TIFF planes for one with --as-volume")
        return "tiff folder"
    suffix = path.suffix.lower()
    if suffix in TIFF:
        return "tiff"
    if suffix in HDF5:
        return "hdf5"
    if suffix == ".npy":
        return "npy"
    if suffix in RAW or raw is not None:
        return "raw"
    raise UsageError(f"{path} is not a volume by its name, expected {_KINDS}; rename it, or describe raw voxels with --raw")


def _open_hdf5(path: Path, dataset: str | None, missing: Missing) -> Volume:
    try:
        from phaseline.clients.volumes.hdf5 import Hdf5Volume
    except ModuleNotFoundError as error:
        if error.name not in ("h5py", "hdf5plugin"):
            raise
        raise MissingExtraError(error.name, "volumes", "reading HDF5 and NeXus") from error
    return Hdf5Volume(path, dataset, missing)


def _open_zarr(path: Path, dataset: str | None, level: int | None, missing: Missing) -> Volume:
    try:
        from phaseline.clients.volumes.ome_zarr import ZarrVolume
    except ModuleNotFoundError as error:
        if error.name != "zarr":
            raise
        raise MissingExtraError("zarr", "volumes", "reading Zarr") from error
    return ZarrVolume(path, dataset, level, missing)
