"""Bundles: the contract, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from phaseline.runtime.bundle import DEFAULT_BUNDLE, MANIFEST, open_bundle
from phaseline.runtime.contract import BundleSpec
from phaseline.runtime.errors import BundleError, EngineError, EngineUnavailableError, MissingInputError, UsageError
from phaseline.runtime.ort import PROVIDER_NAMES, import_onnxruntime
from phaseline.runtime.source import LocalSource
from tests.fakes import make_spec


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
    ("format", 99, "format is 99, expected 1"),
])
def test_impossible_specification_is_refused(field: str, value: object, expected: str) -> None:
    with pytest.raises(BundleError, match=expected):
        make_spec(**{field: value})


def test_default_bundle_is_small_untrained_and_says_so() -> None:
    bundle = open_bundle("default")
    assert sum(file.stat().st_size for file in DEFAULT_BUNDLE.iterdir()) <= 12e6
    assert bundle.spec.weights == "random:0"
    assert not bundle.spec.trained
    assert bundle.spec.stride_px <= 7


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
    content["trained"] = True
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


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_missing_device_is_an_error_and_auto_says_what_it_took(device: str) -> None:
    if PROVIDER_NAMES[device] in import_onnxruntime().get_available_providers():  # type: ignore[index]
        pytest.skip(f"this ONNX Runtime has the {device} provider")
    bundle = open_bundle("default")
    with pytest.raises(EngineUnavailableError, match="was asked for"), LocalSource(bundle, device):  # type: ignore[arg-type]
        pass
    with LocalSource(bundle, "auto") as source:
        assert source.engine_choice.startswith("CPUExecutionProvider (auto; CUDAExecutionProvider: ")
