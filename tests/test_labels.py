from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from phaseline.clients.labels import (
    ClassTable,
    default_colours,
    pair_labels,
    read_labels,
)
from phaseline.runtime.errors import (
    ImageError,
    LabelError,
    MissingInputError,
    UsageError,
)

LABELS = np.zeros((12, 15), np.uint8)
LABELS[2:4, 1:9], LABELS[7, 3:], LABELS[9:, :2] = 3, 1, 7


def palette_image(indices: npt.NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(indices)
    # Two entries of one colour: only the indices tell them apart.
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 255, 0, 0] + [9] * 12)
    return image


def test_labels_of_every_tool(tmp_path: Path) -> None:
    Image.fromarray(LABELS).save(tmp_path / "grey.png")
    palette_image(LABELS).save(tmp_path / "palette.png")
    palette_image(LABELS).save(tmp_path / "palette4.png", bits=4)
    palette_image(LABELS).save(tmp_path / "palette.tif")
    palette_image(LABELS).save(tmp_path / "palette.bmp")
    Image.fromarray(np.dstack([LABELS] * 3)).save(tmp_path / "rgb.png")
    tifffile.imwrite(tmp_path / "deep.tif", LABELS.astype(np.uint16), byteorder=">")
    tifffile.imwrite(tmp_path / "float.tif", LABELS.astype(np.float32))
    tifffile.imwrite(tmp_path / "white.tif", LABELS, photometric="miniswhite")
    np.save(tmp_path / "int64.npy", LABELS.astype(np.int64))
    transparent = np.dstack([LABELS, np.where(LABELS, 255, 0).astype(np.uint8)])
    transparent[..., 0][LABELS == 0] = 200
    Image.fromarray(transparent).save(tmp_path / "alpha.png")
    for path in tmp_path.iterdir():
        read = read_labels(path, (12, 15))
        assert read.dtype == np.uint16, path
        np.testing.assert_array_equal(read, LABELS, err_msg=path.name)


def test_masks_of_one_bit_are_one_and_zero(tmp_path: Path) -> None:
    mask = LABELS > 0
    Image.fromarray(mask).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", mask)
    np.save(tmp_path / "a.npy", mask)
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_labels(path), mask)


def test_large_values(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", LABELS.astype(np.int32) * 9000)
    assert read_labels(tmp_path / "a.npy").max() == 63000
    np.save(tmp_path / "b.npy", LABELS.astype(np.int32) * 10000)
    with pytest.raises(LabelError, match="70000"):
        read_labels(tmp_path / "b.npy")


def test_refused_labels(tmp_path: Path) -> None:
    def refuse(name: str, array: npt.NDArray[np.generic], message: str) -> None:
        np.save(tmp_path / name, array)
        with pytest.raises(LabelError, match=message) as caught:
            read_labels(tmp_path / name)
        assert name in str(caught.value)

    refuse("half.npy", LABELS + 0.5, "fractional")
    refuse("nan.npy", np.where(LABELS, np.nan, 0), "NaN")
    refuse("negative.npy", LABELS.astype(int) - 1, "-1")
    refuse("colour.npy", np.dstack([LABELS, LABELS, LABELS * 2]), "coloured")
    Image.fromarray(LABELS).save(tmp_path / "a.jpg")
    with pytest.raises(LabelError, match="JPEG"):
        read_labels(tmp_path / "a.jpg")
    Image.fromarray(LABELS).save(tmp_path / "a.png")
    with pytest.raises(LabelError, match=r"a\.png.*\(12, 15\).*\(15, 12\)"):
        read_labels(tmp_path / "a.png", (15, 12))
    with pytest.raises(MissingInputError):
        read_labels(tmp_path / "absent.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match="empty"):
        read_labels(tmp_path / "empty.png")


def test_table_from_labels() -> None:
    table = ClassTable.from_labels([LABELS, np.array([[300, 0]], np.uint16)])
    assert table.values == (1, 3, 7, 300)
    assert table.names == ("class 1", "class 3", "class 7", "class 300")
    assert table.to_values(np.array([[-1, 0, 3]])).tolist() == [[0, 1, 300]]
    assert table.to_values(np.array([0])).dtype == np.uint16
    assert ClassTable.from_labels([LABELS], ["a", "b", "c"]).names == ("a", "b", "c")


def test_table_refuses() -> None:
    with pytest.raises(LabelError, match="no pixel is labelled"):
        ClassTable.from_labels([LABELS * 0, LABELS * 0])
    with pytest.raises(LabelError, match="only one class is labelled, value 4"):
        ClassTable.from_labels([np.array([[0, 4]])])
    with pytest.raises(LabelError, match="256 label values"):
        ClassTable.from_labels([np.arange(257)])
    for names in (["a", "b"], ["a", "b", "a"], ["a", "", "c"]):
        with pytest.raises(UsageError, match="expected 3 different"):
            ClassTable.from_labels([LABELS], names)
    good = ClassTable.from_labels([LABELS])
    for change in ({"values": (3, 1, 7)}, {"values": (0, 1, 7)}, {"values": (1, 1, 7)}, {"values": (1.5, 2, 3)},
                   {"colours": ("red", "#000000", "#ffffff")}, {"names": ("a", "a", "b")}, {"names": ("a",)}):
        with pytest.raises(LabelError):
            dataclasses.replace(good, **change)


def test_unknown_values_and_classes() -> None:
    table = ClassTable.from_labels([LABELS])
    for strange in (np.array([[2]], np.uint8), np.array([[-5]]), np.array([[70000]])):
        with pytest.raises(LabelError, match=str(int(strange[0, 0]))):
            table.to_index(strange)
    for strange in (np.array([3]), np.array([-2])):
        with pytest.raises(LabelError, match="expected -1 to 2"):
            table.to_values(strange)


@given(st.sets(st.integers(1, 65535), min_size=2, max_size=255), st.data())
def test_table_round_trips(values: set[int], data: st.DataObject) -> None:
    table = ClassTable.from_labels([np.array(sorted(values))])
    assert ClassTable(**json.loads(json.dumps(dataclasses.asdict(table)))) == table
    picked = data.draw(st.lists(st.sampled_from([0, *sorted(values)]), min_size=1))
    labels = np.array(picked, np.uint16)
    index = table.to_index(labels)
    np.testing.assert_array_equal(index == -1, labels == 0)
    np.testing.assert_array_equal(table.to_values(index), labels)
    assert table.to_values(index).dtype == (np.uint8 if max(values) <= 255 else np.uint16)


def test_default_colours_are_distinct() -> None:
    colours = default_colours(255)
    assert len(set(colours)) == 255
    assert default_colours(3) == colours[:3]


def test_pairs(tmp_path: Path) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    paths = [images / f"s{i}.tif" for i in (1, 2, 10)]
    with pytest.raises(MissingInputError):
        pair_labels(paths, labels)
    (labels / "s10.png").touch()
    (labels / "s1.npy").touch()
    assert pair_labels(paths, labels) == [(paths[0], labels / "s1.npy"), (paths[2], labels / "s10.png")]
    assert pair_labels(paths[:1], labels / "s10.png") == [(paths[0], labels / "s10.png")]
    with pytest.raises(LabelError, match="3 images"):
        pair_labels(paths, labels / "s10.png")
    (labels / "other.png").touch()
    with pytest.raises(LabelError, match=r"other\.png"):
        pair_labels(paths, labels)
    with pytest.raises(MissingInputError):
        pair_labels(paths, tmp_path / "absent")
