"""Bundles: the contract, and what is refused."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phaseline.runtime.bundle import DEFAULT_BUNDLE, MANIFEST, Bundle, open_bundle
from phaseline.runtime.contract import U8, BundleSpec
from phaseline.runtime.engine import graph_engine
from phaseline.runtime.errors import BundleError, EngineError, EngineUnavailableError, MissingInputError, UsageError
from phaseline.runtime.ort import PROVIDER_NAMES, OrtEngine, check_provider, import_onnxruntime
from phaseline.runtime.source import LocalSource, pixel_batch
from tests.fakes import WITH_UPSAMPLER, make_spec
from tests.serving import without_upsampler


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the default bundle that a test may spoil."""
    return Path(shutil.copytree(DEFAULT_BUNDLE, tmp_path / "bundle"))


def test_specification_survives_json() -> None:
    spec = make_spec(facets=("key",), projection={"views": 4, "explained_variance": 0.5}, parity={"cosine": 1.0})
    assert BundleSpec.from_json(spec.to_json()) == spec
    assert BundleSpec.from_json(spec.to_json()).digest() == spec.digest()


@pytest.mark.parametrize(("field", "value", "expected"), [
    ("in_channels", 2, "in_channels is 2, expected 1 or 3"),
    ("stride_px", 9, "stride_px is 9, expected at most the patch size, 8"),
    ("tile_px", 65, r"tile_px is 65, expected patch size plus a multiple of the stride \(8 \+ n × 4\)"),
    ("channels", 17, "channels is 17, expected at most embed_dim, 16"),
    ("precision", "fp8", "precision is 'fp8', expected one of fp32, fp16, int8"),
    ("heads", 0, "heads is 0, expected a positive integer"),
    ("graphs", {"portable": "x"}, "graphs is .* expected a 'cpu' graph"),
    ("format", 1, "format is 1, expected 2"),
    ("pixel_graphs", {"cpu": "cpu_pixels.onnx"}, "pixel_graphs is .* listed in files"),
    ("pixel_graphs", {"portable": "cpu.onnx"}, "pixel_graphs is .* the same forms as graphs"),
    ("pixel_channels", 3, "pixel_channels is 3, expected a positive integer, or 0 without upsampler"),
    ("card", "card.md", "card is 'card.md', expected a file that is listed"),
])
def test_impossible_specification_is_refused(field: str, value: object, expected: str) -> None:
    with pytest.raises(BundleError, match=expected):
        make_spec(**{field: value})


def test_default_bundle_is_small_and_trained_with_a_card() -> None:
    bundle = open_bundle("default")
    assert sum(file.stat().st_size for file in DEFAULT_BUNDLE.iterdir()) <= 12e6
    assert bundle.spec.trained and bundle.spec.projection["source"] == "trained with the backbone"
    assert bundle.spec.card
    assert (bundle.path / bundle.spec.card).read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", sorted(file.name for file in DEFAULT_BUNDLE.iterdir() if file.suffix != ".md"))
def test_a_flipped_byte_anywhere_is_found(copied: Path, name: str) -> None:
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 0x04
    (copied / name).write_bytes(content)
    with pytest.raises(BundleError, match=r"damaged|understood|read|expected") as caught:
        open_bundle(copied)
    assert "\n" not in str(caught.value)


def test_an_edited_manifest_is_found(copied: Path) -> None:
    content = json.loads((copied / MANIFEST).read_text())
    content["trained"] = not content["trained"]
    (copied / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match="does not match its own hash"):
        open_bundle(copied)


def test_a_missing_file_is_found(copied: Path) -> None:
    name = next(iter(open_bundle(copied).spec.files))
    (copied / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        open_bundle(copied)


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no bundle at"):
        open_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match="is this a bundle"):
        open_bundle(tmp_path)


def test_source_refuses_wrong_tiles_and_names() -> None:
    bundle = open_bundle("default")
    size, channels = bundle.spec.tile_px, bundle.spec.in_channels
    good = np.zeros((1, channels, size, size), np.uint8)
    with LocalSource(bundle, "cpu") as source:
        for bad in (good[:, :, :-1], good[0], good[:0], good.astype(np.float32), np.concatenate([good] * 2, axis=1)):
            with pytest.raises(UsageError, match=r"tiles are \w+ of shape .*, expected uint8 of shape"):
                source.patch_features(bad)
        with pytest.raises(UsageError, match="output 'key' is not in this bundle"):
            source.outputs(good, ["key"])
    with pytest.raises(EngineError, match="not open"):
        source.patch_features(good)
    with pytest.raises(UsageError, match="a batch of 0 tiles"):
        LocalSource(bundle, "cpu", batch=0)


def test_source_keeps_its_contract_whatever_the_batch() -> None:
    bundle = open_bundle("default")
    spec = bundle.spec
    tiles = np.random.default_rng(0).integers(0, 256, (9, spec.in_channels, spec.tile_px, spec.tile_px), dtype=np.uint8)
    with LocalSource(bundle, "cpu", batch=1) as one, LocalSource(bundle, "cpu", batch=8) as eight:
        features, together = one.patch_features(tiles), eight.patch_features(tiles)
        attention = one.attention(tiles[:1])
    assert features.dtype == np.float16
    assert features.shape == (9, spec.channels, spec.grid, spec.grid)
    assert np.array_equal(features, together)
    assert attention.shape == (1, spec.heads, spec.grid, spec.grid)
    assert (attention.astype(np.float32).sum(axis=(2, 3)) <= 1.001).all()


def tiles_of(spec: BundleSpec, n: int) -> U8:
    return np.random.default_rng(0).integers(0, 256, (n, spec.in_channels, spec.tile_px, spec.tile_px), dtype=np.uint8)


def test_pixel_features_keep_their_contract_whatever_the_batch(tiny_bundle: Bundle) -> None:
    spec, tiles = tiny_bundle.spec, tiles_of(tiny_bundle.spec, 5)
    with LocalSource(tiny_bundle, "cpu", batch=1) as one, LocalSource(tiny_bundle, "cpu", batch=3) as three:
        pixels = one.pixel_features(tiles)
        assert pixels.dtype == np.float16
        assert pixels.shape == (5, spec.pixel_channels, spec.tile_px, spec.tile_px)
        kept = pixels.copy()
        assert np.array_equal(three.pixel_features(tiles), pixels)
        assert np.array_equal(np.stack(list(one.iter_pixel_features(tiles))), pixels)
        together = one.outputs(tiles, ["attention", "pixel_features", "patch_features"])
        for found, expected in zip(together, (one.attention(tiles), pixels, one.patch_features(tiles)), strict=True):
            assert np.array_equal(found, expected)
        assert np.array_equal(pixels, kept)


@pytest.mark.parametrize(("first", "opened"), [("pixel_features", "pixels"), ("attention", "backbone")])
def test_a_graph_is_read_when_it_is_first_asked_for(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, first: str, opened: str
) -> None:
    read: list[str] = []

    def watched(*arguments: Any, pixels: bool) -> OrtEngine:
        read.append("pixels" if pixels else "backbone")
        return graph_engine(*arguments, pixels=pixels)

    monkeypatch.setattr("phaseline.runtime.source.graph_engine", watched)
    tiles = tiles_of(tiny_bundle.spec, 2)
    with LocalSource(tiny_bundle, "cpu", 1) as source:
        assert source.engine_choice and not read
        with ThreadPoolExecutor(4) as workers:
            results = list(workers.map(lambda _: source.outputs(tiles, [first])[0], range(4)))
        assert read == [opened]
        assert all(np.array_equal(result, results[0]) for result in results)
        source.prepare(["pixel_features", "patch_features"])
        assert sorted(read) == ["backbone", "pixels"]
    with pytest.raises(EngineError, match="not open"):
        source.pixel_features(tiles)


def test_a_bundle_without_upsampler_gives_no_pixel_features(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = without_upsampler(tiny_bundle, tmp_path / "bare")
    tiles = tiles_of(bundle.spec, 1)
    with LocalSource(bundle, "cpu") as source, LocalSource(tiny_bundle, "cpu") as whole:
        assert np.array_equal(source.patch_features(tiles), whole.patch_features(tiles))
        for ask in (source.pixel_features, lambda tiles: list(source.iter_pixel_features(tiles))):
            with pytest.raises(UsageError, match="has no upsampler, so it gives no pixel features"):
                ask(tiles)


@pytest.mark.parametrize(("tile_px", "channels", "n"), [(294, 32, 8), (518, 32, 3), (518, 128, 1), (1022, 384, 1)])
def test_how_many_pixel_features_are_worked_on_together(tile_px: int, channels: int, n: int) -> None:
    spec = make_spec(**{**WITH_UPSAMPLER, "pixel_channels": channels, "patch_px": 14, "stride_px": 7, "tile_px": tile_px,
                        "max_batch": 8})
    assert pixel_batch(spec) == n


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_missing_device_is_an_error_and_auto_says_what_it_took(device: str) -> None:
    if PROVIDER_NAMES[device] in import_onnxruntime().get_available_providers():  # type: ignore[index]
        pytest.skip(f"this ONNX Runtime has the {device} provider")
    bundle = open_bundle("default")
    with pytest.raises(EngineUnavailableError, match="was asked for"), LocalSource(bundle, device):  # type: ignore[arg-type]
        pass
    check_provider("cpu")
    with LocalSource(bundle, "auto") as source:
        assert source.engine_choice.startswith("CPUExecutionProvider (auto; CUDAExecutionProvider: ")
