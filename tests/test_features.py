"""The one road from images to pixel features, with a source that needs no engine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phaseline.clients.classical import ClassicalFeatures
from phaseline.clients.features import BAND_PX, DeepFeatures, FeatureSettings, PixelFeatures, image_channels, is_trained
from phaseline.clients.options import untrained_note
from phaseline.runtime.average import PixelSampling
from phaseline.runtime.errors import ImageError, UsageError
from tests.fakes import WITH_UPSAMPLER, FakeSource, make_spec

DEEP = DeepFeatures("none", 16, PixelSampling())


def all_features(pixels: PixelFeatures, image: np.ndarray) -> np.ndarray:
    return np.concatenate([band for _, band in pixels.bands(image)], axis=1)


@given(shape=st.tuples(st.integers(1, 200), st.integers(1, 200)), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_bands_cover_every_row_once(shape: tuple[int, int], seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    pixels = PixelFeatures(FeatureSettings(1, ClassicalFeatures(sigmas=(0, 1)), DEEP), FakeSource())
    end = 0
    for rows, features in pixels.bands(image):
        assert rows.start == end
        assert features.shape == (len(pixels.names), rows.stop - rows.start, shape[1])
        assert features.dtype == np.float32
        assert np.isfinite(features).all()
        end = rows.stop
    assert end == shape[0]


def test_deep_features_follow_the_image_across_tiles() -> None:
    """A patch's mean at its centre pixel: what is blended from several tiles is what one patch there sees."""
    rng = np.random.default_rng(3)
    image = np.repeat(np.repeat(rng.integers(0, 256, (26, 30), dtype=np.uint8), 8, 0), 8, 1)
    source = FakeSource()
    features = all_features(PixelFeatures(FeatureSettings(1, None, DEEP), source), image)[0]
    means = np.lib.stride_tricks.sliding_window_view(image.astype(float), (8, 8)).mean(axis=(2, 3))
    # Pixel r lies between the patches whose centres are r and r + 1.
    smooth = (means[:-1, :-1] + means[1:, :-1] + means[:-1, 1:] + means[1:, 1:]) / 4
    inner = features[4 : 4 + smooth.shape[0], 4 : 4 + smooth.shape[1]]
    assert np.abs(inner - smooth)[8:-8, 8:-8].max() < 40
    assert np.corrcoef(inner.ravel(), smooth.ravel())[0, 1] > 0.98


def test_the_same_crop_inside_a_larger_image_away_from_its_borders() -> None:
    """Where a tile sits on the same pixels, only blending with neighbours differs: inside, features are equal."""
    image = np.random.default_rng(0).integers(0, 256, (160, 160), dtype=np.uint8)
    settings_ = FeatureSettings(1, None, DEEP)
    whole = all_features(PixelFeatures(settings_, FakeSource()), image)
    crop = all_features(PixelFeatures(settings_, FakeSource()), image[48:112, 48:112])
    assert np.array_equal(whole[:, 64:96, 64:96], crop[:, 16:48, 16:48])


def test_only_wanted_pixels_cost_and_they_are_the_same() -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 250), dtype=np.uint8)
    wanted = np.zeros(image.shape, bool)
    wanted[100:103, 20:60] = wanted[290, 240] = True
    everything, some = FakeSource(), FakeSource()
    settings_ = FeatureSettings(1, ClassicalFeatures(sigmas=(0, 2)), DEEP)
    full = all_features(PixelFeatures(settings_, everything), image)
    for rows, features in PixelFeatures(settings_, some).bands(image, wanted):
        where = wanted[rows]
        assert np.array_equal(features[:, where], full[:, rows][:, where])
    assert sum(some.calls) < sum(everything.calls) / 3


@pytest.mark.parametrize("transforms", ["none", "flips", "moore:2*flips"])
@pytest.mark.parametrize("shape", [(40, 30), (150, 170)])
def test_learned_features_are_those_of_the_very_pixels(transforms: str, shape: tuple[int, int]) -> None:
    """The fake's first pixel feature is the pixel: whatever is tiled, shifted, flipped, averaged and blended, it comes back."""
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    source = FakeSource(**WITH_UPSAMPLER)
    deep = DeepFeatures.for_bundle(source.spec, transforms, overlap_px=16)
    assert deep.sampling.interpolation == "learned"
    pixels = PixelFeatures(FeatureSettings(1, None, deep), source)
    assert pixels.names == ("deep 0", "deep 1")
    features = all_features(pixels, image)
    assert np.allclose(features[0], image, atol=1e-3)
    bilinear = FeatureSettings(1, None, DeepFeatures.for_bundle(source.spec, transforms, PixelSampling()))
    assert len(PixelFeatures(bilinear, source).names) == 3


def test_trained_is_said_of_all_weights() -> None:
    facts = {"name": "fake", "weights": "random:0", "trained": False, "hidden": 4}
    assert is_trained(make_spec(trained=True))
    assert is_trained(make_spec(**{**WITH_UPSAMPLER, "trained": True}))
    assert not is_trained(make_spec(**WITH_UPSAMPLER))
    half = make_spec(**{**WITH_UPSAMPLER, "trained": True, "upsampler": facts})
    assert not is_trained(half)
    assert "upsampler is untrained (random:0)" in untrained_note(half)
    assert untrained_note(make_spec(trained=True)) == ""


@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_batches_decide_nothing(max_batch: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (150, 170), dtype=np.uint8)
    settings_ = FeatureSettings(1, None, DeepFeatures("moore:1*flips", 16))
    source = FakeSource(max_batch=max_batch)
    features = all_features(PixelFeatures(settings_, source), image)
    assert max(source.calls) == max_batch
    assert np.array_equal(features, all_features(PixelFeatures(settings_, FakeSource(max_batch=5)), image))


def test_colour_gives_classical_features_of_each_channel_and_luma_to_a_grey_bundle() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    bank = ClassicalFeatures(sigmas=(0, 1))
    pixels = PixelFeatures(FeatureSettings(3, bank, DEEP), FakeSource())
    features = all_features(pixels, image)
    assert len(pixels.names) == 3 * bank.channels + 3
    for i in range(3):
        assert np.array_equal(features[i * bank.channels], image[..., i])
    grey = np.repeat(image[..., :1], 3, axis=2)
    deep_grey = all_features(PixelFeatures(FeatureSettings(3, None, DEEP), FakeSource()), grey)
    deep_one = all_features(PixelFeatures(FeatureSettings(1, None, DEEP), FakeSource()), np.ascontiguousarray(grey[..., 0]))
    assert np.array_equal(deep_grey, deep_one)


def test_classical_bands_equal_the_whole_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (BAND_PX + 300, 40), dtype=np.uint8)
    bank = ClassicalFeatures()
    banded = all_features(PixelFeatures(FeatureSettings(1, bank), None), image)
    assert np.array_equal(banded, bank.compute(image))


def test_contradictions_are_refused() -> None:
    with pytest.raises(UsageError, match="neither classical nor deep"):
        FeatureSettings(1, None, None)
    with pytest.raises(UsageError, match="deep features need a bundle"):
        PixelFeatures(FeatureSettings(1), FakeSource())
    with pytest.raises(UsageError, match="deep features need a bundle"):
        PixelFeatures(FeatureSettings(1, None, DEEP), None)
    with pytest.raises(UsageError, match="the bundle has no upsampler"):
        PixelFeatures(FeatureSettings(1, None, DeepFeatures("none", 16, PixelSampling(interpolation="learned"))), FakeSource())
    with pytest.raises(UsageError, match="overlap of 60 px"):
        PixelFeatures(FeatureSettings(1, None, DeepFeatures("none", 60)), FakeSource())
    with pytest.raises(UsageError, match="the image has 3 channels, expected 1"):
        next(PixelFeatures(FeatureSettings(1), None).bands(np.zeros((4, 4, 3), np.uint8)))
    with pytest.raises(UsageError, match="images of 2 channels"):
        FeatureSettings(2)
    with pytest.raises(ImageError, match=r"shape \(4, 4, 4\), expected"):
        image_channels([np.zeros((4, 4, 4), np.uint8)])
