"""Views, their inverses and their average, against the published averages and against a plain reference."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaseline.runtime.average import PixelSampling, ViewAverage
from phaseline.runtime.compare import deviation
from phaseline.runtime.errors import UsageError
from phaseline.runtime.geometry import ALIGNMENTS, INTERPOLATIONS, sampling_matrix, token_positions
from phaseline.runtime.transforms import BOUNDARIES, Transform, TransformSet
from tests.fakes import WITH_UPSAMPLER, FakeSource, make_spec

F32 = npt.NDArray[np.float32]


def average(source: FakeSource, tile: npt.NDArray[np.uint8], views: TransformSet, sampling: PixelSampling) -> F32:
    """The mean pixel features of a (channels, rows, cols) tile."""
    spec = source.spec
    running = ViewAverage(tile.shape[1:], sampling.channels(spec), spec.patch_px, spec.stride_px, sampling)
    compute = source.pixel_features if sampling.is_learned else source.patch_features
    for view in views.transforms:
        running.add(view, compute(view.apply(tile, sampling.boundary)[None])[0])
    return running.mean()


def plain_resize(features: F32, rows: int, cols: int, patch: int, stride: int, sampling: PixelSampling) -> F32:
    """Token features to pixels, one pixel at a time."""
    k, h, w = features.shape
    result = np.zeros((k, rows, cols), np.float32)
    for r, c in itertools.product(range(rows), range(cols)):
        if sampling.alignment == "paper":
            y, x = (r + 0.5) * h / rows - 0.5, (c + 0.5) * w / cols - 0.5
        else:
            y, x = (r + 0.5 - patch / 2) / stride, (c + 0.5 - patch / 2) / stride
        y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
        if sampling.interpolation == "nearest":
            result[:, r, c] = features[:, min(int(y + 0.5), h - 1), min(int(x + 0.5), w - 1)]
        else:
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            a, b = y - y0, x - x0
            result[:, r, c] = ((1 - a) * ((1 - b) * features[:, y0, x0] + b * features[:, y0, x1])
                               + a * ((1 - b) * features[:, y1, x0] + b * features[:, y1, x1]))
    return result


def plain_average(source: FakeSource, tile: npt.NDArray[np.uint8], views: TransformSet, sampling: PixelSampling) -> F32:
    """Make each view with np.roll / np.pad and np.flip, resize, undo in reverse order, average what was seen."""
    rows, cols = tile.shape[1:]
    total = np.zeros((sampling.channels(source.spec), rows, cols))
    seen = np.zeros((rows, cols))
    for view in views.transforms:
        dr, dc = view.shift_rows, view.shift_cols
        if sampling.boundary == "wrap":
            moved = np.roll(tile, (dr, dc), axis=(1, 2))
        else:
            pad = max(abs(dr), abs(dc), 1)
            padded = np.pad(tile, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
            moved = padded[:, pad - dr : pad - dr + rows, pad - dc : pad - dc + cols]
        flips = tuple(axis for axis, flip in ((1, view.flip_rows), (2, view.flip_cols)) if flip)
        made = np.ascontiguousarray(np.flip(moved, flips))[None]
        if sampling.is_learned:
            pixels = source.pixel_features(made)[0].astype(np.float32)
        else:
            features = source.patch_features(made)[0].astype(np.float32)
            pixels = plain_resize(features, rows, cols, source.spec.patch_px, source.spec.stride_px, sampling)
        pixels = np.roll(np.flip(pixels, flips), (-dr, -dc), axis=(1, 2))
        valid = np.ones((rows, cols), bool)
        if sampling.boundary == "reflect":
            r, c = np.arange(rows) + dr, np.arange(cols) + dc
            valid = ((r >= 0) & (r < rows))[:, None] & ((c >= 0) & (c < cols))
        total += pixels * valid
        seen += valid
    return (total / seen).astype(np.float32)


@pytest.mark.data
@pytest.mark.parametrize(("golden", "name"), [("shifts12_moore", "moore:2"), ("flips", "flips")])
def test_published_averages(data: Path, golden: str, name: str) -> None:
    with np.load(data / "golden" / "transforms.npz") as archive:
        image, views = archive["image"], archive[f"{golden}/inputs"]
        features = archive[f"{golden}/patch_features"].transpose(0, 3, 1, 2)
        expected = archive[f"{golden}/average"]
        patch, stride = int(archive["patch_size"]), int(archive["stride"])
    ours = TransformSet.parse(name, stride)
    assert len(ours) == len(views)
    running = ViewAverage(image.shape[1:], features.shape[1], patch, stride, PixelSampling("paper", "nearest", "wrap"))
    for view, patch_features in zip(views, features, strict=True):
        same = [t for t in ours.transforms if np.array_equal(t.apply(image, "wrap"), view)]
        assert len(same) == 1
        running.add(same[0], patch_features)
    assert deviation(running.mean(), expected).max_abs < 1e-5


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("name", ["none", "flips", "moore", "von-neumann:3", "moore:1*flips"])
def test_average_equals_plain_reference(name: str, alignment: str, interpolation: str, boundary: str) -> None:
    source = FakeSource()
    tile = np.random.default_rng(1).integers(0, 256, (1, 28, 36), dtype=np.uint8)
    views = TransformSet.parse(name, source.spec.stride_px)
    sampling = PixelSampling(alignment, interpolation, boundary)  # type: ignore[arg-type]
    ours, plain = average(source, tile, views, sampling), plain_average(source, tile, views, sampling)
    assert deviation(ours, plain).max_rel < 1e-6


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", ["none", "flips", "moore", "von-neumann:3", "moore:3*flips"])
@pytest.mark.parametrize("shape", [(28, 36), (5, 4), (4, 5)])
def test_learned_average_equals_plain_reference(name: str, boundary: str, shape: tuple[int, int]) -> None:
    source = FakeSource(**WITH_UPSAMPLER)
    tile = np.random.default_rng(1).integers(0, 256, (1, *shape), dtype=np.uint8)
    views = TransformSet.parse(name, source.spec.stride_px)
    sampling = PixelSampling("centred", "learned", boundary)  # type: ignore[arg-type]
    ours, plain = average(source, tile, views, sampling), plain_average(source, tile, views, sampling)
    assert deviation(ours, plain).max_rel < 1e-6
    # Undone rightly, each view shows each pixel's own value where the pixel is.
    assert np.array_equal(ours[0], tile[0])


def test_one_learned_view_is_passed_on_as_it_is() -> None:
    features = np.random.default_rng(0).normal(size=(3, 16, 20)).astype(np.float16)
    running = ViewAverage((16, 20), 3, 8, 4, PixelSampling("centred", "learned", "reflect"))
    running.add(Transform(), features)
    found = running.mean()
    assert found.dtype == np.float32
    assert np.array_equal(found, features.astype(np.float32))


def test_settings_that_do_not_go_together() -> None:
    spec, bare = make_spec(**WITH_UPSAMPLER), make_spec()
    assert PixelSampling.for_bundle(spec).interpolation == "learned"
    assert PixelSampling.for_bundle(bare).interpolation == "bilinear"
    assert PixelSampling.for_bundle(spec, "paper", "nearest", "wrap") == PixelSampling("paper", "nearest", "wrap")
    with pytest.raises(UsageError, match="alignment is 'paper', but learned pixel features have no tokens"):
        PixelSampling.for_bundle(spec, "paper")
    with pytest.raises(UsageError, match="the bundle has no upsampler; export one with phaseline export --upsampler"):
        PixelSampling.for_bundle(bare, interpolation="learned")
    with pytest.raises(UsageError, match="interpolation is 'cubic', expected one of learned, nearest, bilinear"):
        PixelSampling.for_bundle(spec, interpolation="cubic")


@pytest.mark.parametrize(("name", "n"), [("none", 1), ("flips", 4), ("moore", 1 + 8 * 7), ("moore:2", 17), ("von-neumann:2", 9),
                                         ("moore:2*flips", 68), ("von-neumann*flips", 4 * (1 + 4 * 7))])
def test_sets_hold_each_view_once(name: str, n: int) -> None:
    views = TransformSet.parse(name, stride_px=14)
    assert len(views) == len(set(views.transforms)) == n
    assert views.transforms[0] == Transform()


@pytest.mark.parametrize("name", ["", "flip", "moore:0", "moore:-1", "moore:1.5", "flips*moore", "moore*moore", "none*flips"])
def test_unknown_set_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"is unknown; expected none, flips"):
        TransformSet.parse(name, 4)


def test_shift_beyond_the_tile_is_refused() -> None:
    with pytest.raises(UsageError, match="shifts by up to 64 px, expected less than the tile's 64 px"):
        TransformSet.parse("moore:64", 4).check_fits(64)
    TransformSet.parse("moore:63", 4).check_fits(64)


@given(
    shift=st.tuples(st.integers(-9, 9), st.integers(-9, 9)),
    flips=st.tuples(st.booleans(), st.booleans()),
    shape=st.tuples(st.integers(10, 20), st.integers(10, 20)),
    boundary=st.sampled_from(BOUNDARIES),
)
def test_undoing_a_view_brings_every_seen_pixel_back(
    shift: tuple[int, int], flips: tuple[bool, bool], shape: tuple[int, int], boundary: str
) -> None:
    tile = np.arange(np.prod(shape), dtype=np.uint16).reshape(1, *shape)
    view = Transform(*shift, *flips)
    moved = view.apply(tile, boundary)  # type: ignore[arg-type]
    rows = view.pixel_index(shape[0], "rows", boundary)  # type: ignore[arg-type]
    cols = view.pixel_index(shape[1], "cols", boundary)  # type: ignore[arg-type]
    back = moved[0][np.ix_(rows, cols)]
    seen = (rows >= 0)[:, None] & (cols >= 0)
    assert np.array_equal(back[seen], tile[0][seen])
    expected_seen = shape[0] * shape[1] if boundary == "wrap" else (shape[0] - abs(shift[0])) * (shape[1] - abs(shift[1]))
    assert seen.sum() == expected_seen


@given(seed=st.integers(0, 2**32 - 1), alignment=st.sampled_from(ALIGNMENTS))
@settings(max_examples=20, deadline=None)
def test_flips_of_a_flipped_tile_are_the_flips_of_the_result(seed: int, alignment: str) -> None:
    source, views = FakeSource(), TransformSet.parse("flips", 4)
    sampling = PixelSampling(alignment, "bilinear", "reflect")  # type: ignore[arg-type]
    tile = np.random.default_rng(seed).integers(0, 256, (1, 32, 32), dtype=np.uint8)
    # Slopes change sign under a flip, so only the mean (channel 0) is equivariant.
    plain = average(source, tile, views, sampling)[0]
    flipped = average(source, np.ascontiguousarray(tile[:, ::-1]), views, sampling)[0]
    assert np.allclose(flipped[::-1], plain, atol=2e-2)


@given(seed=st.integers(0, 2**32 - 1), sampling=st.builds(
    PixelSampling, st.sampled_from(ALIGNMENTS), st.sampled_from(INTERPOLATIONS), st.sampled_from(BOUNDARIES)))
@settings(max_examples=30, deadline=None)
def test_the_identity_set_is_the_identity(seed: int, sampling: PixelSampling) -> None:
    features = np.random.default_rng(seed).normal(size=(2, 7, 7)).astype(np.float32)
    running = ViewAverage((32, 32), 2, 8, 4, sampling)
    running.add(Transform(), features)
    assert np.allclose(running.mean(), plain_resize(features, 32, 32, 8, 4, sampling), atol=1e-6)


@given(tokens=st.integers(1, 40), stride=st.integers(1, 14), extra=st.integers(0, 13),
       alignment=st.sampled_from(ALIGNMENTS), interpolation=st.sampled_from(INTERPOLATIONS))
def test_sampling_keeps_constants_and_order(
    tokens: int, stride: int, extra: int, alignment: str, interpolation: str
) -> None:
    patch = stride + extra
    length = patch + (tokens - 1) * stride
    positions = token_positions(length, tokens, patch, stride, alignment)  # type: ignore[arg-type]
    matrix = sampling_matrix(positions, tokens, interpolation)  # type: ignore[arg-type]
    assert np.allclose(matrix.sum(axis=1), 1)
    assert (np.diff(matrix @ np.arange(tokens)) >= -1e-5).all()
    assert np.allclose(matrix, matrix[::-1, ::-1], atol=1e-5) or interpolation == "nearest"


def test_centred_tokens_lie_on_their_patches() -> None:
    """A token's own centre pixel(s) get exactly that token, at every token."""
    positions = token_positions(8 + 4 * 5, 6, 8, 4, "centred")
    for token in range(6):
        centre = token * 4 + 4
        assert positions[centre - 1] < token < positions[centre]


def test_memory_of_learned_views_is_the_sum_alone() -> None:
    running = ViewAverage((266, 266), 32, 14, 7, PixelSampling("centred", "learned", "reflect"))
    features = np.zeros((32, 266, 266), np.float16)
    tracemalloc.start()
    for view in TransformSet.parse("moore:2*flips", 14).transforms:
        running.add(view, features)
    running.mean()
    top = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert top < features.nbytes / 10


def test_memory_does_not_grow_with_the_number_of_views() -> None:
    def peak(name: str) -> int:
        views = TransformSet.parse(name, 14)
        running = ViewAverage((266, 266), 32, 14, 7, PixelSampling())
        features = np.zeros((32, 37, 37), np.float16)
        running.add(Transform(), features)
        tracemalloc.start()
        for view in views.transforms:
            running.add(view, features)
        running.mean()
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    few, many = peak("moore:1"), peak("moore:6*flips")
    assert many < 1.02 * few
