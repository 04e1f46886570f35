from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from phaseline.clients.window import IntensityWindow, to_channels, to_grey
from phaseline.runtime.errors import ImageError, UsageError

DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"]
SHAPES = hnp.array_shapes(min_dims=2, max_dims=3, max_side=6)


def images() -> st.SearchStrategy[npt.NDArray[np.generic]]:
    def of(dtype: str) -> st.SearchStrategy[npt.NDArray[np.generic]]:
        finite = {"allow_nan": False, "allow_infinity": False} if dtype.startswith("float") else {}
        return hnp.arrays(dtype, SHAPES, elements=hnp.from_dtype(np.dtype(dtype), **finite))
    return st.sampled_from(DTYPES).flatmap(of)


@st.composite
def windows(draw: st.DrawFn) -> IntensityWindow:
    low = draw(st.floats(-1e9, 1e9))
    return IntensityWindow(low, low + draw(st.floats(1e-3, 1e9)))


def plainly(image: npt.NDArray[np.generic], low: float, high: float) -> npt.NDArray[np.uint8]:
    x = np.clip(image.astype(np.float64), low, high)
    return np.rint((x - low) * 255 / (high - low)).astype(np.uint8)


@given(images(), windows())
def test_apply_is_the_formula_and_keeps_order(image: npt.NDArray[np.generic], window: IntensityWindow) -> None:
    seen = window.apply(image)
    assert seen.dtype == np.uint8
    np.testing.assert_array_equal(seen, plainly(image, window.low, window.high))
    order = np.argsort(image, axis=None, kind="stable")
    assert (np.diff(seen.ravel()[order].astype(int)) >= 0).all()
    assert (seen[image <= window.low] == 0).all()
    assert (seen[image >= window.high] == 255).all()


@given(hnp.arrays(np.uint8, SHAPES))
def test_identity(image: npt.NDArray[np.uint8]) -> None:
    np.testing.assert_array_equal(IntensityWindow(0, 255).apply(image), image)
    np.testing.assert_array_equal(IntensityWindow(0, 255).apply(image.astype(np.float32)), image)
    np.testing.assert_array_equal(IntensityWindow(0, 255 * 257).apply(image.astype(np.uint16) * np.uint16(257)), image)


def test_halves_go_to_even_in_every_type() -> None:
    for dtype in DTYPES[2:]:
        seen = IntensityWindow(0, 510).apply(np.array([[1, 3, 5, 7]], dtype))
        assert seen.tolist() == [[0, 2, 2, 4]]


def test_blocks_do_not_show_in_large_and_strided_images() -> None:
    image = np.random.default_rng(0).integers(0, 65536, (700, 901), np.uint16)
    for view in (image, image[::2, ::3], image.T, image.astype(np.float32)[:, ::-1]):
        np.testing.assert_array_equal(IntensityWindow(1000, 50001).apply(view), plainly(view, 1000, 50001))


def test_apply_does_not_copy_wide_types_whole() -> None:
    import tracemalloc

    image = np.zeros((2000, 2000), np.uint16)
    tracemalloc.start()
    IntensityWindow(0, 9).apply(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * image.size


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 1), (np.nan, 1), (0, np.inf), (-1.7e308, 1.7e308)])
def test_impossible_windows(low: float, high: float) -> None:
    with pytest.raises(UsageError, match="LOW < HIGH"):
        IntensityWindow(low, high)


def test_nan_is_refused() -> None:
    with pytest.raises(ImageError, match="NaN"):
        IntensityWindow(0, 1).apply(np.array([[0.5, np.nan]]))
    with pytest.raises(ImageError, match="infinite"):
        IntensityWindow(0, 1).apply(np.array([[0.5, np.inf]]))
    with pytest.raises(ImageError, match="NaN"):
        IntensityWindow.fit([np.array([[0.5, np.nan]])], "full")


def test_fit_modes() -> None:
    rng = np.random.default_rng(0)
    eight, sixteen = rng.integers(0, 200, (30, 30), np.uint8), rng.integers(0, 5000, (30, 30), np.uint16)
    real = rng.normal(size=(30, 30)).astype(np.float32)
    assert IntensityWindow.fit([eight]) == IntensityWindow(0, 255, "uint8")
    assert IntensityWindow.fit([sixteen], "full") == IntensityWindow(0, 65535, "uint16")
    assert IntensityWindow.fit([real], "full") == IntensityWindow(float(real.min()), float(real.max()), "float")
    low, high = np.percentile(sixteen, (0.5, 99.5))
    assert IntensityWindow.fit([sixteen]) == IntensityWindow(low, high, "uint16")
    low, high = np.percentile(eight, (2, 90))
    assert IntensityWindow.fit([eight], "percentile:2,90") == IntensityWindow(low, high, "uint8")
    for mode, window in (("0:1000", (0, 1000)), ("-5.5:1e3", (-5.5, 1000)), (" 3 : 4 ", (3, 4))):
        assert IntensityWindow.fit([sixteen], mode) == IntensityWindow(*window)
    assert IntensityWindow.fit([np.full((3, 3), 7, np.uint8)]) == IntensityWindow(0, 255, "uint8")


def test_one_window_for_all_images() -> None:
    dark, bright = np.zeros((10, 10), np.uint16), np.full((10, 10), 1000, np.uint16)
    assert IntensityWindow.fit([dark, bright], "percentile:0,100") == IntensityWindow(0, 1000, "uint16")
    assert IntensityWindow.fit([dark + 0.5, bright + 0.25], "full") == IntensityWindow(0.5, 1000.25, "float")


def test_another_type_than_the_windows_is_refused() -> None:
    sixteen = np.arange(100, dtype=np.uint16).reshape(10, 10) * 300
    window = IntensityWindow.fit([sixteen])
    assert window.apply(sixteen).max() == 255
    for other in (sixteen.astype(np.uint8), sixteen.astype(np.float32), sixteen.astype(np.int16)):
        with pytest.raises(ImageError, match="was chosen on uint16 images"):
            window.apply(other)
    assert IntensityWindow.fit([sixteen], "0:255").apply(sixteen.astype(np.uint8)).dtype == np.uint8


@pytest.mark.parametrize("mode", ["", "brightest", "1", "a:b", "percentile:5", "percentile:90,10", "percentile:0,101", "9:1",
                                  "nan:1", "1:2:3", "percentile:a,b"])
def test_wrong_modes(mode: str) -> None:
    with pytest.raises(UsageError):
        IntensityWindow.fit([np.zeros((3, 3), np.uint16)], mode)


def test_no_window_exists() -> None:
    constant = np.full((5, 5), 7, np.uint16)
    for mode, image in (("auto", constant), ("percentile:1,99", constant), ("full", constant.astype(float))):
        with pytest.raises(ImageError, match="constant"):
            IntensityWindow.fit([image], mode)
    with pytest.raises(ImageError, match="uint16, uint8"):
        IntensityWindow.fit([constant, constant.astype(np.uint8)])
    with pytest.raises(UsageError, match="no image"):
        IntensityWindow.fit([])


def test_channels() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    grey = to_grey(rgb)
    assert grey.dtype == np.uint8
    assert np.abs(grey - luma).max() <= 0.51
    np.testing.assert_array_equal(to_channels(rgb, 1), grey)
    np.testing.assert_array_equal(to_channels(rgb, 3), rgb)
    np.testing.assert_array_equal(to_channels(grey, 1), grey)
    three = to_channels(grey, 3)
    assert three.flags.c_contiguous
    np.testing.assert_array_equal(three, np.dstack([grey] * 3))
    np.testing.assert_array_equal(to_grey(three), grey)
    with pytest.raises(UsageError, match="2 channels"):
        to_channels(grey, 2)
    for wrong in (grey.astype(float), grey[0], np.zeros((3, 3, 4), np.uint8)):
        with pytest.raises(ImageError, match="expected uint8"):
            to_channels(wrong, 1)
