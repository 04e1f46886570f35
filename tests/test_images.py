from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from phaseline.clients import image_formats
from phaseline.clients.images import (
    check_output,
    list_images,
    read_image,
    write_labels,
    write_rgb,
)
from phaseline.runtime.errors import (
    ImageError,
    MissingInputError,
    OutputError,
    OutputExistsError,
    UsageError,
)

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (40, 50), np.uint8)
RGB = RNG.integers(0, 256, (40, 50, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (40, 50), np.uint16)


def assert_same(read: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> None:
    assert read.dtype == expected.dtype
    assert read.dtype.isnative
    assert read.flags.c_contiguous
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_grey_and_rgb_by_pillow(tmp_path: Path, suffix: str) -> None:
    for name, array in (("grey", GREY), ("rgb", RGB)):
        path = tmp_path / f"{name}{suffix}"
        Image.fromarray(array).save(path)
        assert_same(read_image(path), array)


def test_jpeg_is_close(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(40), np.arange(50)).astype(np.uint8) * np.uint8(2)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    read = read_image(tmp_path / "a.jpg")
    assert read.dtype == np.uint8
    assert np.abs(read.astype(int) - smooth).max() <= 4


def test_sixteen_bit_png_grey_rgb_and_rgba(tmp_path: Path) -> None:
    import cv2

    Image.fromarray(DEEP).save(tmp_path / "grey.png")
    assert_same(read_image(tmp_path / "grey.png"), DEEP)
    deep_rgb = RNG.integers(0, 65536, (40, 50, 4), np.uint16)
    for channels in (3, 4):
        path = tmp_path / f"{channels}.png"
        cv2.imwrite(str(path), deep_rgb[..., [2, 1, 0, 3][:channels]])
        assert_same(read_image(path), deep_rgb[..., :3])


def test_alpha_is_dropped(tmp_path: Path) -> None:
    rgba = np.dstack([RGB, GREY])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert_same(read_image(tmp_path / "rgba.png"), RGB)
    Image.fromarray(np.dstack([GREY, 255 - GREY])).save(tmp_path / "la.png")
    assert_same(read_image(tmp_path / "la.png"), GREY)
    tifffile.imwrite(tmp_path / "rgba.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    assert_same(read_image(tmp_path / "rgba.tif"), RGB)


def test_palette_becomes_rgb_with_and_without_transparency(tmp_path: Path) -> None:
    indices = (GREY % 4).astype(np.uint8)
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 10], [9, 8, 7]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.ravel().tolist())
    for name, options in (("p.png", {}), ("t.png", {"transparency": b"\x00\xff\x80\xff"}), ("p.bmp", {}), ("p.tif", {})):
        image.save(tmp_path / name, **options)
        assert_same(read_image(tmp_path / name), colours[indices])


def test_one_and_four_bit_grey_is_spread(tmp_path: Path) -> None:
    mask = GREY > 127
    Image.fromarray(mask).save(tmp_path / "one.png")
    tifffile.imwrite(tmp_path / "one.tif", mask, photometric="minisblack")
    np.save(tmp_path / "one.npy", mask)
    for name in ("one.png", "one.tif", "one.npy"):
        assert_same(read_image(tmp_path / name), mask.astype(np.uint8) * np.uint8(255))


def test_rgb_of_equal_channels_is_grey(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([GREY] * 3)).save(tmp_path / "a.png")
    assert_same(read_image(tmp_path / "a.png"), GREY)
    almost = np.dstack([GREY] * 3)
    almost[3, 4, 2] ^= 1
    Image.fromarray(almost).save(tmp_path / "b.png")
    assert_same(read_image(tmp_path / "b.png"), almost)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i2", "i4", "f4", "f8"])
def test_tiff_types_and_byte_orders(tmp_path: Path, byteorder: str, dtype: str) -> None:
    array = (RNG.random((17, 23)) * 100 - (50 if dtype[0] in "if" else 0)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", array, byteorder=byteorder)
    assert_same(read_image(tmp_path / "a.tif"), array)


@pytest.mark.parametrize("options", [{"compression": "zlib"}, {"planarconfig": "separate"}, {"tile": (16, 16)},
                                     {"bigtiff": True}, {"rowsperstrip": 3}], ids=str)
def test_tiff_layouts(tmp_path: Path, options: dict[str, object]) -> None:
    array = np.moveaxis(RGB, -1, 0) if options.get("planarconfig") == "separate" else RGB
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", **options)
    assert_same(read_image(tmp_path / "a.tif"), RGB)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_compressed_tiff(tmp_path: Path, compression: str) -> None:
    for array in (GREY, RGB, DEEP):
        Image.fromarray(array).save(tmp_path / "a.tif", compression=compression)
        assert_same(read_image(tmp_path / "a.tif"), array)


def test_white_is_zero_tiff_is_inverted(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY, photometric="miniswhite")
    assert_same(read_image(tmp_path / "a.tif"), 255 - GREY)


def test_unusual_types_are_brought_into_the_contract(tmp_path: Path) -> None:
    for given, expected in ((np.float16, np.float32), (np.int8, np.int16), (np.int64, np.int32), (np.dtype(">f4"), np.float32)):
        array = (GREY // 3).astype(given)
        np.save(tmp_path / "a.npy", array)
        assert_same(read_image(tmp_path / "a.npy"), array.astype(expected))
    np.save(tmp_path / "a.npy", np.array([[0, 2**32 - 1]], np.int64))
    assert read_image(tmp_path / "a.npy").dtype == np.uint32


@pytest.mark.parametrize("array", [np.array([[0, 2**40]]), np.ones((3, 3), complex), np.array([["a", "b"]]), np.empty((0, 5)),
                                   np.ones(7), np.ones((5, 6, 7)), np.ones((4, 5, 2))], ids=lambda a: f"{a.dtype}{a.shape}")
def test_unusable_arrays(tmp_path: Path, array: npt.NDArray[np.generic]) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ImageError, match=r"a\.npy") as caught:
        read_image(tmp_path / "a.npy")
    assert "\n" not in str(caught.value)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(ImageError):
        read_image(tmp_path / "a.npy")


@pytest.mark.parametrize("shape", [(5, 20, 30), (2, 3, 20, 30)])
def test_volumes_are_refused_with_their_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tifffile.imwrite(tmp_path / "v.tif", np.zeros(shape, np.uint16), photometric="minisblack")
    with pytest.raises(ImageError, match="volume") as caught:
        read_image(tmp_path / "v.tif")
    assert str(shape) in str(caught.value)


def test_pages_of_different_sizes_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "v.tif") as writer:
        writer.write(GREY)
        writer.write(GREY[:10])
    with pytest.raises(ImageError, match="2 images"):
        read_image(tmp_path / "v.tif")


def test_nan_and_infinity_are_counted_and_located(tmp_path: Path) -> None:
    array = np.ones((6, 7), np.float32)
    array[2, 5], array[4, 1] = np.nan, np.inf
    tifffile.imwrite(tmp_path / "a.tif", array)
    with pytest.raises(ImageError, match=r"2 NaN or infinite.*\(2, 5\)"):
        read_image(tmp_path / "a.tif")


def test_missing_folder_empty_and_foreign(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="nothing"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match="folder"):
        read_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match="empty"):
        read_image(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ImageError, match="not a PNG"):
        read_image(tmp_path / "text.png")


def truncatable(folder: Path) -> list[Path]:
    Image.fromarray(RGB).save(folder / "a.png")
    Image.fromarray(DEEP).save(folder / "deep.png")
    Image.fromarray(RGB).save(folder / "a.jpg")
    Image.fromarray(RGB).save(folder / "progressive.jpg", progressive=True)
    Image.fromarray(RGB).save(folder / "a.bmp")
    tifffile.imwrite(folder / "plain.tif", DEEP)
    tifffile.imwrite(folder / "zlib.tif", DEEP, compression="zlib", rowsperstrip=8)
    Image.fromarray(GREY).save(folder / "lzw.tif", compression="tiff_lzw")
    np.save(folder / "a.npy", DEEP)
    return sorted(folder.iterdir())


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_truncated_files_are_detected(tmp_path: Path, kept: float, capfd: pytest.CaptureFixture[str]) -> None:
    for path in truncatable(tmp_path):
        content = path.read_bytes()
        path.write_bytes(content[:int(len(content) * kept)])
        with pytest.raises(ImageError, match=path.name) as caught:
            read_image(path)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "rowsperstrip": 8}, {"tile": (16, 16)}], ids=str)
def test_truncated_tiff_says_how_much_is_missing(tmp_path: Path, options: dict[str, object]) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, DEEP, **options)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ImageError, match=f"has {size - 100} bytes, expected {size}"):
        read_image(path)


def test_png_without_its_end_and_with_a_flipped_byte(tmp_path: Path) -> None:
    Image.fromarray(DEEP).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "end.png").write_bytes(content[:-12])
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    (tmp_path / "flip.png").write_bytes(flipped)
    for name in ("end.png", "flip.png"):
        with pytest.raises(ImageError):
            read_image(tmp_path / name)


def test_large_images_neither_warn_nor_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.fromarray(RGB).save(tmp_path / "a.png")
    assert_same(read_image(tmp_path / "a.png"), RGB)
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr(image_formats, "MAX_PIXELS", 1999)
    with pytest.raises(ImageError, match="at most 1999"):
        read_image(tmp_path / "a.png")


def test_a_header_that_promises_too_much(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.bmp")
    content = bytearray((tmp_path / "a.bmp").read_bytes())
    content[18:26] = struct.pack("<ii", 60000, 60000)
    (tmp_path / "a.bmp").write_bytes(content)
    with pytest.raises(ImageError, match="60000"):
        read_image(tmp_path / "a.bmp")


def test_list_images(tmp_path: Path) -> None:
    names = ["slice10.PNG", "slice2.png", ".hidden.png", "notes.txt", "a1b10.tif", "a1b9.npy"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in list_images(tmp_path)] == ["a1b9.npy", "a1b10.tif", "slice2.png", "slice10.PNG"]
    assert list_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    (tmp_path / "slice2.tif").touch()
    with pytest.raises(UsageError, match=r"slice2\.png and slice2\.tif"):
        list_images(tmp_path)
    with pytest.raises(MissingInputError, match="no images"):
        list_images(tmp_path / "folder.png")
    with pytest.raises(MissingInputError, match="does not exist"):
        list_images(tmp_path / "absent")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".npy", ".PNG"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    for array in (GREY, DEEP):
        write_labels(tmp_path / f"a{suffix}", array)
        assert_same(read_image(tmp_path / f"a{suffix}"), array)
    for array in (RGB, np.dstack([DEEP, DEEP // 2, DEEP // 3])):
        write_rgb(tmp_path / f"a{suffix}", array)
        assert_same(read_image(tmp_path / f"a{suffix}"), array)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    write_labels(path, GREY)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tifffile, "imwrite", fail)
    with pytest.raises(OutputError, match="No space"):
        write_labels(path, DEEP)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]
    assert_same(read_image(path), GREY)


def test_refused_outputs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.jpg"):
        write_labels(tmp_path / "a.jpg", GREY)
    for array in (GREY.astype(np.int32), RGB, GREY[0]):
        with pytest.raises(UsageError, match="expected uint8 or uint16"):
            write_labels(tmp_path / "a.png", array)
    with pytest.raises(UsageError, match="rows, cols, 3"):
        write_rgb(tmp_path / "a.png", GREY)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        write_labels(tmp_path / "file" / "a.png", GREY)
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(tmp_path / "file" / "deeper" / "a.png", overwrite=False)


def test_check_output(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.png"
    check_output(path, overwrite=False)
    assert list(path.parent.iterdir()) == []
    write_labels(path, GREY)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        check_output(path, overwrite=False)
    check_output(path, overwrite=True)
    assert_same(read_image(path), GREY)
    with pytest.raises(UsageError, match=r"\.txt"):
        check_output(tmp_path / "a.txt", overwrite=False)
    (tmp_path / "b.png").mkdir()
    with pytest.raises(OutputError, match="folder"):
        check_output(tmp_path / "b.png", overwrite=True)
