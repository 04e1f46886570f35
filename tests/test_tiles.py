"""Tiles cover every pixel, and their weights add up to one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phaseline.runtime.errors import UsageError
from phaseline.runtime.tiles import TileAxis, cut_tile


@st.composite
def axes(draw: st.DrawFn) -> TileAxis:
    tile = draw(st.integers(1, 70))
    return TileAxis(draw(st.integers(1, 400)), tile, draw(st.integers(0, tile // 2)))


@given(axes())
def test_weights_are_a_partition_of_unity(axis: TileAxis) -> None:
    total = np.zeros(axis.length_px)
    for start, weight in zip(axis.starts, axis.weights(), strict=True):
        assert weight.shape == (axis.size_px,)
        assert (weight > 0).all()
        total[start : start + axis.size_px] += weight
    assert np.allclose(total, 1, atol=1e-6)


@given(axes())
def test_tiles_ascend_overlap_and_end_at_the_edge(axis: TileAxis) -> None:
    starts = np.array(axis.starts)
    assert starts[0] == 0
    assert starts[-1] + axis.size_px == axis.length_px
    assert (np.diff(starts) > 0).all()
    assert (np.diff(starts) <= axis.tile_px - axis.overlap_px).all()


@given(axes(), st.integers(0, 2**32 - 1))
def test_blending_tiles_of_an_image_gives_the_image(axis: TileAxis, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (1, axis.length_px, 3), dtype=np.uint8)
    total = np.zeros((axis.length_px, 3))
    for start, weight in zip(axis.starts, axis.weights(), strict=True):
        tile = cut_tile(image, start, 0, axis.tile_px)[0]
        total[start : start + axis.size_px] += weight[:, None] * tile[: axis.size_px, :1].repeat(3, axis=1)
    assert np.allclose(total[:, 0], image[0, :, 0], atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (13, 13), (5, 50), (64, 3), (100, 100)])
def test_small_images_are_mirrored(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    tile = cut_tile(image, 0, 0, 64)
    assert tile.shape == (3, 64, 64)
    assert tile.flags.c_contiguous
    rows, cols = min(shape[0], 64), min(shape[1], 64)
    assert np.array_equal(tile[:, :rows, :cols], image[:, :64, :64])
    if 1 < cols < 64:
        assert np.array_equal(tile[:, :, cols], tile[:, :, cols - 2])


@pytest.mark.parametrize("overlap", [-1, 33])
def test_impossible_overlap_is_refused(overlap: int) -> None:
    with pytest.raises(UsageError, match=r"overlap of -?\d+ px between tiles of 64 px was asked for; expected 0…32"):
        TileAxis(100, 64, overlap)
