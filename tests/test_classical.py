"""The classical features against plain scikit-image, and the promises that tiling and recipes rest on."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks import classical as benchmark
from benchmarks.references.classical import reference_classical
from phaseline.clients import classical, filters
from phaseline.clients.classical import ClassicalFeatures
from phaseline.runtime.errors import ImageError, UsageError

SWITCHES = ("gaussian", "sobel", "hessian", "difference_of_gaussians", "membrane")
SMALL = ClassicalFeatures(sigmas=(0, 1, 2))


def picture(rows: int, cols: int, dtype: Any = np.uint8, seed: int = 0) -> NDArray[Any]:
    values = np.random.default_rng(seed).uniform(0, 255, (rows, cols))
    return values.astype(dtype)


def only(*switches: str, **others: Any) -> ClassicalFeatures:
    return ClassicalFeatures(**{name: name in switches for name in SWITCHES}, **others)


def assert_close(ours: NDArray[Any], reference: NDArray[Any], names: tuple[str, ...], tolerance: float = 1e-4) -> None:
    assert ours.shape == reference.shape
    for name, plane, expected in zip(names, ours, reference, strict=True):
        # 1e-4 grey levels: what float32 leaves of channels that vanish on images far smaller than σ.
        allowed = tolerance * np.abs(expected).max() + 1e-4
        np.testing.assert_allclose(plane, expected, rtol=0, atol=allowed, err_msg=name)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 7), (13, 13), (64, 65), (211, 150), (40, 333), (701, 50)])
def test_equals_scikit_image_up_to_the_border(shape: tuple[int, int], dtype: Any) -> None:
    features = ClassicalFeatures()
    image = picture(*shape, dtype)
    ours = features.compute(image)
    assert ours.dtype == np.float32 and ours.flags.c_contiguous
    assert_close(ours, reference_classical(image, features), features.names)


def test_equals_scikit_image_on_low_contrast() -> None:
    # Differences of a float32 Gaussian would drown here: 200 grey levels of mean, one of contrast.
    image = (200 + picture(150, 160, np.float32) / 255).astype(np.float32)
    features = only("hessian", sigmas=(8, 16))
    ours, reference = features.compute(image), reference_classical(image, features)
    deviation = np.abs(ours - reference).max((1, 2)) / np.abs(reference).max((1, 2))
    assert deviation.max() < 1e-3


@pytest.mark.parametrize("factor", [0.4, 1.3])
def test_sigma_factor_is_a_real_number(factor: float) -> None:
    features = ClassicalFeatures(sigma_factor=factor)
    image = picture(90, 71)
    assert_close(features.compute(image), reference_classical(image, features), features.names)
    scaled = ClassicalFeatures(sigmas=tuple(sigma * factor for sigma in (0, 1, 2, 4, 8, 16)))
    assert scaled.names == features.names
    np.testing.assert_array_equal(features.compute(image), scaled.compute(image))
    truncated = ClassicalFeatures(sigmas=(0, 6))
    assert not np.array_equal(features.compute(image)[5], truncated.compute(image)[1])


def test_default_set_is_wekas() -> None:
    features = ClassicalFeatures()
    families = [name.split()[0] for name in features.names]
    assert {family: families.count(family) for family in families} == {
        "gaussian": 6, "sobel": 6, "hessian": 30, "difference": 10, "membrane": 6}
    assert features.channels == 58 == len(set(features.names))
    assert features.names[2] == "gaussian σ=2"
    assert "hessian σ=2 largest eigenvalue" in features.names
    assert features.halo_px == 66
    image = picture(20, 30)
    np.testing.assert_array_equal(features.compute(image)[0], image)


@pytest.mark.parametrize("on", [on for on in product([False, True], repeat=5) if any(on)])
def test_switches_select_channels(on: tuple[bool, ...]) -> None:
    everything = ClassicalFeatures(sigmas=(0, 1, 2))
    some = ClassicalFeatures((0, 1, 2), 1.0, *on)
    image = picture(31, 45)
    assert len(some.names) == some.channels
    chosen = [everything.names.index(name) for name in some.names]
    assert chosen == sorted(chosen)
    np.testing.assert_array_equal(some.compute(image), everything.compute(image)[chosen])


def test_a_constant_image_has_no_structure() -> None:
    features = ClassicalFeatures()
    result = features.compute(np.full((40, 50), 137, np.uint8))
    for name, plane in zip(features.names, result, strict=True):
        level = 137 if name.startswith("gaussian") else 0
        if not name.startswith("membrane"):
            np.testing.assert_allclose(plane, level, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (1, 300), (7000, 50)])
def test_any_size_works(shape: tuple[int, int]) -> None:
    features = ClassicalFeatures()
    image = picture(*shape)
    result = features.compute(image)
    assert result.shape == (58, *shape)
    assert np.isfinite(result).all()
    # One-pixel axes: the same as the middle of the image repeated along that axis.
    if 1 in shape:
        times = [161 if length == 1 else 1 for length in shape]
        middle = np.s_[:, times[0] // 2 : times[0] // 2 + shape[0], times[1] // 2 : times[1] // 2 + shape[1]]
        assert_close(result, features.compute(np.tile(image, times))[middle], features.names)


FEATURE_SETS = [ClassicalFeatures(), SMALL, ClassicalFeatures(sigma_factor=0.4), only("membrane"), only("sobel"),
                only("gaussian", sigmas=(0, 3)), only("hessian", sigmas=(0,)), only("difference_of_gaussians")]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FEATURE_SETS), st.integers(1, 300), st.integers(1, 300), st.data())
def test_a_crop_with_its_halo_equals_the_whole_bit_for_bit(
    features: ClassicalFeatures, rows: int, cols: int, data: st.DataObject
) -> None:
    image = picture(rows, cols, data.draw(st.sampled_from([np.uint8, np.float32])), seed=rows)
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    bottom, right = data.draw(st.integers(top + 1, rows)), data.draw(st.integers(left + 1, cols))
    halo = features.halo_px
    first_row, first_col = max(0, top - halo), max(0, left - halo)
    crop = image[first_row : bottom + halo, first_col : right + halo]
    part = features.compute(crop)[:, top - first_row : bottom - first_row, left - first_col : right - first_col]
    np.testing.assert_array_equal(part, features.compute(image)[:, top:bottom, left:right])


@pytest.mark.parametrize("features", FEATURE_SETS, ids=lambda features: f"{features.channels}-channels")
def test_halo_is_not_larger_than_needed(features: ClassicalFeatures) -> None:
    size, centre, halo = 181, 90, features.halo_px
    image = np.zeros((size, size), np.float32)
    for step, reaches in ((halo, True), (halo + 1, False)):
        moved = image.copy()
        moved[centre, centre + step] = 1e6
        moved[centre - step, centre] = 1e6
        changed = (features.compute(moved) != features.compute(image))[:, centre, centre].any()
        assert changed == reaches, step


def test_threads_and_repetition_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features = ClassicalFeatures()
    image = picture(400, 130)
    alone = features.compute(image, threads=1)
    for threads in (2, 3, 8, None):
        np.testing.assert_array_equal(features.compute(image, threads=threads), alone)
    monkeypatch.setattr(filters, "_STRIP_PX", 1000)
    monkeypatch.setattr(classical, "_BAND_ROWS", 70)
    np.testing.assert_array_equal(features.compute(image, threads=2), alone)


def test_image_is_left_alone_and_may_be_a_view() -> None:
    image = picture(60, 80, np.float32)
    before = image.copy()
    view = image[5:50:2, ::-1]
    np.testing.assert_array_equal(SMALL.compute(view), SMALL.compute(view.copy()))
    np.testing.assert_array_equal(image, before)
    image.flags.writeable = False
    SMALL.compute(image)


def test_out_is_filled_and_returned() -> None:
    image = picture(50, 33)
    buffer = np.full((2, SMALL.channels, 50, 33), np.nan, np.float32)
    result = SMALL.compute(image, out=buffer[1])
    assert result.base is buffer
    np.testing.assert_array_equal(buffer[1], SMALL.compute(image))
    assert np.isnan(buffer[0]).all()


@pytest.mark.parametrize("bad", [
    np.empty((SMALL.channels, 50, 34), np.float32),
    np.empty((SMALL.channels, 50, 33), np.float64),
    np.empty((50, 33, SMALL.channels), np.float32).transpose(2, 0, 1),
    [1.0],
], ids=["shape", "dtype", "order", "list"])
def test_unfit_out_is_refused(bad: Any) -> None:
    with pytest.raises(UsageError, match=r"out is .*expected"):
        SMALL.compute(picture(50, 33), out=bad)


def test_out_over_the_image_is_refused() -> None:
    buffer = np.zeros((SMALL.channels, 50, 33), np.float32)
    with pytest.raises(UsageError, match="shares memory"):
        SMALL.compute(buffer[3], out=buffer)


@pytest.mark.parametrize("image", [
    np.zeros((0, 5), np.uint8), np.zeros((5, 0), np.float32), np.zeros(5, np.uint8), np.zeros((5, 5, 3), np.uint8),
    np.zeros((5, 5), np.uint16), np.zeros((5, 5), np.float64), np.full((5, 5), np.nan, np.float32),
    np.array([[1, np.inf]], np.float32), np.array([[1, -np.inf]], np.float32), np.full((5, 5), 1e30, np.float32),
    [[1, 2]],
], ids=["no rows", "no columns", "1-D", "colour", "uint16", "float64", "nan", "inf", "-inf", "huge", "list"])
def test_unfit_images_are_refused(image: Any) -> None:
    with pytest.raises(ImageError, match=r"received .*expected"):
        SMALL.compute(image)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_unfit_threads_are_refused(threads: Any) -> None:
    with pytest.raises(UsageError, match="threads"):
        SMALL.compute(picture(5, 5), threads=threads)


@pytest.mark.parametrize("values", [
    {"sigmas": (1, 0)}, {"sigmas": (1, 1)}, {"sigmas": (-1, 1)}, {"sigmas": (float("nan"),)}, {"sigmas": (1, "2")},
    {"sigmas": (1, float("inf"))}, {"sigmas": 3}, {"sigmas": "12"}, {"sigmas": (True,)}, {"sigmas": (1e9,)},
    {"sigma_factor": 0}, {"sigma_factor": -1}, {"sigma_factor": float("nan")}, {"sigma_factor": "0.4"},
    {"gaussian": 1}, {"membrane": None}, dict.fromkeys(SWITCHES, False), {"sigmas": (), "membrane": False},
], ids=str)
def test_contradictory_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ClassicalFeatures(**values)


def test_settings_survive_json() -> None:
    for features in (ClassicalFeatures(), only("sobel", sigmas=(0.5, 3), sigma_factor=0.4)):
        again = ClassicalFeatures.from_dict(json.loads(json.dumps(asdict(features))))
        assert again == features
        assert hash(again) == hash(features)
        assert again.names == features.names


def test_stored_settings_must_be_complete_and_known() -> None:
    values = asdict(ClassicalFeatures())
    with pytest.raises(UsageError, match="fields"):
        ClassicalFeatures.from_dict(values | {"bilateral": True})
    del values["membrane"]
    with pytest.raises(UsageError, match="fields"):
        ClassicalFeatures.from_dict(values)


def test_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "classical.md"
    benchmark.main(["--size", "64", "--repeats", "1", "--out", str(page)])
    text = page.read_text(encoding="utf-8")
    assert text.strip() in capsys.readouterr().out
    for needed in ("cores", "| ratio |", "peak memory", "deviation, membrane"):
        assert needed in text
