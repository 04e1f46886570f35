"""A real Triton server of a bundle with an upsampler: pixel features and learned recipes, on every road the same bits."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from phaseline.clients.__main__ import run
from phaseline.clients.features import DeepFeatures, FeatureSettings, PixelFeatures
from phaseline.clients.load import Load, batch_counts, run_load
from phaseline.clients.remote import TritonSource
from phaseline.clients.remote_memory import Region
from phaseline.clients.remote_segmenter import RemoteSegmenter
from phaseline.clients.segmenter import Segmenter
from phaseline.runtime.bundle import Bundle
from phaseline.runtime.contract import U8
from phaseline.runtime.errors import OutputError
from phaseline.runtime.source import LocalSource
from phaseline.triton_models.listening import Listening
from phaseline.triton_models.processes import stub_models
from phaseline.triton_models.repository import Deployment
from phaseline.triton_models.server import TritonServer
from tests.serving import fit_recipe, frame

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def learned(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved recipes of learned pixel features, by name: of one view, and averaged over shifts and flips."""
    folder = tmp_path_factory.mktemp("learned")
    for name, transforms in (("pixels", "none"), ("averaged", "moore:1*flips")):
        fit_recipe(tiny_bundle, transforms, interpolation="learned").save(folder / name)
    return {name: folder / name for name in ("pixels", "averaged")}


@pytest.fixture(scope="module")
def server(
    needs_triton: None, tiny_bundle: Bundle, learned: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A running server of those recipes."""
    listening = Listening(grpc_port=0, http_port=0, metrics_port=0, shared_memory=True)
    log = tmp_path_factory.mktemp("server") / "triton.log"
    with TritonServer(Deployment(tiny_bundle, threads=2), listening, recipes=learned, log_file=log) as running:
        yield running


def tiles_of(bundle: Bundle, n: int) -> U8:
    spec = bundle.spec
    return np.random.default_rng(n).integers(0, 256, (n, spec.in_channels, spec.tile_px, spec.tile_px), dtype=np.uint8)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("transport", ["grpc", "shared-memory"])
def test_pixel_features_equal_the_local_ones(server: TritonServer, tiny_bundle: Bundle, transport: Any) -> None:
    tiles = tiles_of(tiny_bundle, 11)
    with LocalSource(tiny_bundle, "cpu") as local, TritonSource(server.address, transport=transport) as source:
        expected = local.pixel_features(tiles)
        assert np.array_equal(source.pixel_features(tiles), expected)
        assert np.array_equal(np.stack(list(source.iter_pixel_features(tiles))), expected)
        # Regions of both sizes live side by side.
        assert np.array_equal(source.patch_features(tiles), local.patch_features(tiles))
        assert np.array_equal(source.pixel_features(tiles[:2]), expected[:2])


@pytest.mark.parametrize("name", ["pixels", "averaged"])
def test_labels_are_the_same_on_every_road(server: TritonServer, learned: dict[str, Path], name: str) -> None:
    image = frame(5)
    with Segmenter.open(learned[name], device="cpu") as local:
        assert local.recipe.features.deep is not None
        assert local.recipe.features.deep.sampling.interpolation == "learned"
        expected = local.segment(image)
    assert set(np.unique(expected.labels)) == {1, 2}
    with RemoteSegmenter(server.address, name) as segmenter:
        results = [segmenter.segment(image)]
    for transport in ("grpc", "shared-memory"):
        source = TritonSource(server.address, transport=transport)  # type: ignore[arg-type]
        with Segmenter.open(learned[name], source=source) as mixed:
            results.append(mixed.segment(image))
    for result in results:
        assert np.array_equal(result.labels, expected.labels)
        assert np.array_equal(result.confidence, expected.confidence)


def test_a_learned_recipe_asks_features_alone_and_its_views_share_batches(server: TritonServer) -> None:
    before = {model: batch_counts(server.address, model) for model in ("backbone", "features")}
    with RemoteSegmenter(server.address, "averaged") as segmenter:
        segmenter.segment(frame(6))

    def since(model: str) -> Any:
        return batch_counts(server.address, model).since(before[model])

    # Triton counts a request after it has sent the answer; 36 views of each tile.
    wait_for(lambda: since("features").inferences >= 36 and since("features").inferences % 36 == 0)
    assert since("features").mean >= 4
    assert since("backbone").inferences == 0


@pytest.mark.parametrize("transport", ["auto", "shared-memory"])
def test_no_room_for_regions_of_pixel_features(
    server: TritonServer, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, transport: Any
) -> None:
    allocate = Region._allocate

    def small_only(region: Region) -> Any:
        if region.output_bytes > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return allocate(region)

    monkeypatch.setattr(Region, "_allocate", small_only)
    tiles = tiles_of(tiny_bundle, 9)
    with LocalSource(tiny_bundle, "cpu") as local, TritonSource(server.address, transport=transport) as source:
        assert np.array_equal(source.patch_features(tiles), local.patch_features(tiles))
        if transport == "shared-memory":
            with pytest.raises(OutputError, match="use --transport grpc"):
                source.pixel_features(tiles)
            return
        assert "(shared memory)" in source.engine_choice
        assert np.array_equal(source.pixel_features(tiles), local.pixel_features(tiles))
        assert "(gRPC: no shared memory of" in source.engine_choice


def test_load_and_info(server: TritonServer, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_load(Load(server.address, concurrency=2, seconds=2.0, warm_up_s=0.1, model="features"))
    assert report.model == "features" and len(report.latencies_s) > 0 and not report.errors
    assert report.batches.inferences >= len(report.latencies_s)
    common = ["load", "--server", server.address, "--seconds", "2", "--warm-up", "0"]
    assert run([*common, "--published", "pixels", "--rows", "60", "--cols", "60", "--concurrency", "2"]) == 0
    counted = [line for line in capsys.readouterr().out.splitlines() if line.startswith("batches of tiles")]
    assert counted and " 0, of" not in counted[0]
    assert run([*common, "--model", "segment_pixels"]) == 2
    assert run([*common, "--model", "features", "--published", "pixels"]) == 2
    capsys.readouterr()
    assert run(["info", "--server", server.address]) == 0
    assert "pixel channels" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_process_of_features_is_replaced(server: TritonServer, tiny_bundle: Bundle) -> None:
    """Last of all: what the tests above count begins anew with it."""
    tiles = tiles_of(tiny_bundle, 3)
    with LocalSource(tiny_bundle, "cpu") as local, TritonSource(server.address, timeout_s=90) as source:
        expected = local.pixel_features(tiles)
        assert np.array_equal(source.pixel_features(tiles), expected)
        (victim,) = (child for child in psutil.Process(server.pid).children() if "/features/" in " ".join(child.cmdline()))
        victim.kill()
        victim.wait()
        assert np.array_equal(source.pixel_features(tiles), expected)
        settings = FeatureSettings(1, None, DeepFeatures.for_bundle(tiny_bundle.spec))
        image = np.random.default_rng(0).integers(0, 256, (70, 60), dtype=np.uint8)
        here, there = (np.concatenate([band for _, band in PixelFeatures(settings, one).bands(image)], axis=1)
                       for one in (local, source))
        assert np.array_equal(here, there)
    assert "features" in stub_models(server.pid)
    assert server.restarts == []
