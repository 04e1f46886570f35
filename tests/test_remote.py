"""Servers and a client far from them: the same numbers, whoever computes them, and what happens when servers fail."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from phaseline.clients import load, remote_servers
from phaseline.clients.__main__ import run
from phaseline.clients.crf import CRFParameters
from phaseline.clients.recipe import load_recipe
from phaseline.clients.remote import TritonSource
from phaseline.clients.remote_segmenter import RemoteSegmenter
from phaseline.clients.segmenter import Segmenter
from phaseline.runtime.bundle import Bundle
from phaseline.runtime.contract import F16, U8, BundleSpec
from phaseline.runtime.errors import (
    BundleError,
    EngineError,
    ImageError,
    PhaselineError,
    RecipeError,
    ServerBusyError,
    ServerFailedError,
    ServerRefusedError,
    ServerTimeoutError,
    ServerUnavailableError,
    UnknownModelError,
    UsageError,
)
from phaseline.runtime.source import LocalSource
from tests.fakes import WITH_UPSAMPLER, FakeSource, make_spec
from tests.serving import frame, shared_memory, strokes

if TYPE_CHECKING:
    from phaseline.triton_models.server import TritonServer

grpc = pytest.importorskip("grpc")
pb = pytest.importorskip("tritonclient.grpc.service_pb2")
service = pytest.importorskip("tritonclient.grpc.service_pb2_grpc")
DEAD = "127.0.0.1:9"


class FakeServer(service.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """A server of `FakeSource`'s features. `before` is called with the number of each request, and may fail it."""

    def __init__(self, spec: BundleSpec, before: Callable[[int, Any], None] = lambda number, context: None) -> None:
        self.spec, self.before = spec, before
        self.requests = self.running = self.most = 0
        self.lock = threading.Lock()
        self.garble = False
        self.ids: list[str] = []
        self.peers: list[str] = []

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = pb.ModelConfigResponse()
        answer.config.parameters["bundle"].string_value = self.spec.to_json()
        return answer

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        with self.lock:
            self.requests += 1
            self.running += 1
            number, self.most = self.requests, max(self.most, self.running)
            self.ids.append(request.id)
            self.peers.append(context.peer())
        try:
            self.before(number, context)
        finally:
            with self.lock:
                self.running -= 1
        tiles = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(tuple(request.inputs[0].shape))
        source, pixels = FakeSource(), request.model_name == "features"
        features = source.pixel_features(tiles) if pixels else source.patch_features(tiles)
        answer = pb.ModelInferResponse(model_name=request.model_name)
        answer.outputs.add(name="pixel_features" if pixels else "patch_features", datatype="FP16", shape=features.shape)
        answer.raw_output_contents.append(features.tobytes()[: 10 if self.garble else None])
        return answer


@contextlib.contextmanager
def serving(fake: FakeServer, port: int = 0) -> Iterator[str]:
    """Run a fake server; yields its address."""
    workers = ThreadPoolExecutor(32)
    server = grpc.server(workers, options=[("grpc.so_reuseport", 0)])
    service.add_GRPCInferenceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
        workers.shutdown()


def fake_tiles(n: int) -> U8:
    return np.random.default_rng(n).integers(0, 256, (n, 1, 64, 64), dtype=np.uint8)


def tiles_of(spec: BundleSpec, n: int) -> U8:
    return np.random.default_rng(n).integers(0, 256, (n, spec.in_channels, spec.tile_px, spec.tile_px), dtype=np.uint8)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def batches(address: str) -> tuple[int, int]:
    """Inferences and executions of `backbone`."""
    with grpc.insecure_channel(address) as channel:
        answer = service.GRPCInferenceServiceStub(channel).ModelStatistics(pb.ModelStatisticsRequest(name="backbone"))
    return answer.model_stats[0].inference_count, answer.model_stats[0].execution_count


def own_regions() -> set[str]:
    """This process's regions in /dev/shm."""
    return {name for name in shared_memory() if name.startswith("phaseline-client-") and f"-{os.getpid()}-" in name}


# The real server.


@pytest.mark.triton
@pytest.mark.parametrize("transport", ["grpc", "shared-memory"])
def test_features_and_attention_equal_the_local_ones(server: TritonServer, tiny_bundle: Bundle, transport: Any) -> None:
    tiles = tiles_of(tiny_bundle.spec, 21)
    with LocalSource(tiny_bundle, "cpu") as local, TritonSource(server.address, transport=transport) as source:
        assert source.bundle_hash == tiny_bundle.hash
        assert source.engine_choice == f"Triton {server.address} ({transport.replace('-', ' ').replace('grpc', 'gRPC')})"
        expected = local.patch_features(tiles)
        assert np.array_equal(source.patch_features(tiles), expected)
        assert np.array_equal(source.attention(tiles), local.attention(tiles))
        assert np.array_equal(np.stack(list(source.iter_patch_features(tiles))), expected)
    assert not own_regions()


@pytest.mark.triton
@pytest.mark.parametrize("name", ["deep", "averaged", "classical"])
def test_labels_are_the_same_on_every_road(server: TritonServer, recipes: dict[str, Path], name: str) -> None:
    image = frame(5)
    with Segmenter.open(recipes[name], device="cpu") as local:
        expected = local.segment(image)
    with RemoteSegmenter(server.address, name) as segmenter:
        results = [segmenter.segment(image), segmenter.segment(np.repeat(image[..., None], 3, axis=2))]
        assert segmenter.recipe.classes == local.recipe.classes
    for transport in () if name == "classical" else ("grpc", "shared-memory"):
        source = TritonSource(server.address, transport=transport)  # type: ignore[arg-type]
        with Segmenter.open(recipes[name], source=source) as mixed:
            results.append(mixed.segment(image))
    for result in results:
        assert np.array_equal(result.labels, expected.labels)
        assert np.array_equal(result.confidence, expected.confidence)
        assert result.labels.dtype == expected.labels.dtype


@pytest.mark.triton
def test_the_views_of_an_image_share_batches(server: TritonServer, recipes: dict[str, Path]) -> None:
    """Bound: four tiles and more in an executed batch, of eight at most."""
    before = batches(server.address)
    with TritonSource(server.address, transport="grpc") as source:
        Segmenter(load_recipe(recipes["averaged"]), source).segment(frame(6))

    def since() -> tuple[int, int]:
        inferences, executions = np.subtract(batches(server.address), before)
        return int(inferences), int(executions)

    # Triton counts a request after it has sent the answer.
    until(lambda: since()[0] >= 17 and since()[0] % 17 == 0)
    inferences, executions = since()
    assert inferences / executions >= 4


@pytest.mark.triton
def test_a_dead_server_is_left_out(server: TritonServer, tiny_bundle: Bundle) -> None:
    tiles = tiles_of(tiny_bundle.spec, 9)
    with LocalSource(tiny_bundle, "cpu") as local, TritonSource([DEAD, server.address]) as source:
        assert f"{DEAD} (left out: " in source.engine_choice
        assert np.array_equal(source.patch_features(tiles), local.patch_features(tiles))


@pytest.mark.triton
def test_a_closed_remote_segmenter_says_so(server: TritonServer) -> None:
    with RemoteSegmenter(server.address, "deep") as segmenter:
        pass
    with pytest.raises(EngineError, match="is closed"):
        segmenter.segment(frame(7))


@pytest.mark.triton
def test_a_remote_segmenter_refuses_what_the_wire_cannot_carry(server: TritonServer) -> None:
    image = frame(7)
    with RemoteSegmenter(server.address, "deep") as segmenter:
        for wrong in ({"probabilities": True}, {"crf": CRFParameters()}):
            with pytest.raises(UsageError, match="labels and confidence only"):
                segmenter.segment(image, **wrong)  # type: ignore[arg-type]
        with pytest.raises(ImageError, match="float32 does not hold exactly"):
            segmenter.segment(np.full((8, 8), 0.1))
        with pytest.raises(ImageError, match="int32"):
            segmenter.segment(image.astype(np.int32))
        with pytest.raises(ImageError, match="an image of list came"):
            segmenter.segment([[1, 2]])  # type: ignore[arg-type]
        with pytest.raises(ImageError, match="fitted on grey"):
            segmenter.segment(np.stack([image, image, image // 2], axis=2))
        assert np.array_equal(segmenter.segment(image.astype(">u2")).labels, segmenter.segment(image).labels)
    with pytest.raises(UnknownModelError), RemoteSegmenter(server.address, "nothing"):
        pass
    with pytest.raises(UnknownModelError), RemoteSegmenter(server.address, "deep", version="9"):
        pass


@pytest.mark.triton
def test_command_line_and_resuming_across_roads(server: TritonServer, recipes: dict[str, Path], tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        tifffile.imwrite(images / f"{i}.tif", frame(20 + i))
    common = ["segment", str(images), "--quiet", "--confidence"]
    by_recipe, by_name = ["--recipe", str(recipes["deep"])], ["--published", "deep", "--server", server.address]
    assert run([*common, "--out", str(tmp_path / "here"), *by_recipe]) == 0
    assert run([*common, "--out", str(tmp_path / "there"), *by_name]) == 0
    assert run([*common, "--out", str(tmp_path / "both"), *by_recipe, "--server", server.address]) == 0
    names = [f"{i}{part}.png" for i in range(3) for part in ("", "_confidence")]
    for road in ("there", "both"):
        for name in names:
            there, here = (np.asarray(Image.open(tmp_path / folder / name)) for folder in (road, "here"))
            assert np.array_equal(there, here)
    for begun, other in (("here", by_name), ("there", by_recipe)):
        (tmp_path / begun / "1.png").unlink()
        assert run([*common, "--out", str(tmp_path / begun), *other, "--resume"]) == 0
        lines = [json.loads(line) for line in (tmp_path / begun / "report.jsonl").read_text().splitlines()]
        assert [line["image"] for line in lines[1:]] == ["0.tif", "1.tif", "2.tif", "1.tif"]
    assert run(["features", str(images / "0.tif"), "--out", str(tmp_path / "f.npy"), "--quiet", "--server", server.address]) == 0
    Image.fromarray(strokes(frame(20)).astype(np.uint8)).save(tmp_path / "labels.png")
    assert run(["fit", str(images / "0.tif"), "--labels", str(tmp_path / "labels.png"), "--out", str(tmp_path / "fitted"),
                "--quiet", "--server", server.address]) == 0
    fitted = load_recipe(tmp_path / "fitted").bundle
    assert fitted is not None and fitted.hash == server.deployment.bundle.hash


@pytest.mark.triton
@pytest.mark.slow
def test_a_server_that_dies_on_the_way_is_replaced(needs_triton: None, tiny_bundle: Bundle, tmp_path: Path) -> None:
    from phaseline.triton_models.listening import Listening
    from phaseline.triton_models.repository import Deployment
    from phaseline.triton_models.server import TritonServer

    tiles = tiles_of(tiny_bundle.spec, 60)
    with LocalSource(tiny_bundle, "cpu") as local:
        expected = local.patch_features(tiles)
    listening = Listening(grpc_port=0, http_port=0, metrics_port=0, shared_memory=True)
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(TritonServer(Deployment(tiny_bundle), listening, log_file=tmp_path / f"{i}.log")) for i in (1, 2))
        source = stack.enter_context(TritonSource([first.address, second.address], timeout_s=60))
        features = source.iter_patch_features(tiles)
        found: list[F16] = [next(features)]
        subprocess.run(["kill", "-KILL", str(first.pid)], check=True)
        found += list(features)
        assert np.array_equal(np.stack(found), expected)
        # The only one left dies, and is started again by its keeper: nothing is lost either.
        subprocess.run(["kill", "-KILL", str(second.pid)], check=True)
        assert np.array_equal(source.patch_features(tiles), expected)


# Servers that are made up.


def test_in_flight_is_bounded_and_results_keep_their_order() -> None:
    fake, tiles = FakeServer(make_spec(), lambda number, context: time.sleep(0.03 if number % 3 else 0)), fake_tiles(30)
    taken = 0

    def count() -> Iterator[U8]:
        nonlocal taken
        for tile in tiles:
            taken += 1
            yield tile

    with serving(fake) as address, TritonSource(address, transport="grpc", in_flight=5) as source:
        features = source.iter_patch_features(count())
        found = [next(features)]
        assert taken == 6
        found += list(features)
    assert np.array_equal(np.stack(found), FakeSource().patch_features(tiles))
    assert 1 < fake.most <= 5


def test_pixel_features_come_from_another_model_fewer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phaseline.runtime.source.PIXEL_BYTES", 3 * 2 * 2 * 64 * 64)
    fake = FakeServer(make_spec(**WITH_UPSAMPLER), lambda number, context: time.sleep(0.03 if number % 3 else 0))
    tiles = fake_tiles(20)
    with serving(fake) as address, TritonSource(address, transport="grpc") as source:
        assert (source.in_flight(), source.in_flight("pixel_features")) == (8, 6)
        assert np.array_equal(np.stack(list(source.iter_pixel_features(tiles))), FakeSource().pixel_features(tiles))
        assert 1 < fake.most <= 6
        assert np.array_equal(source.pixel_features(tiles[:2]), FakeSource().pixel_features(tiles[:2]))
        fake.garble = True
        with pytest.raises(ServerFailedError, match="the answer of model features cannot be understood"):
            source.pixel_features(tiles[:1])


def test_pixel_features_of_several_servers() -> None:
    first, second = (FakeServer(make_spec(**WITH_UPSAMPLER), lambda number, context: time.sleep(0.01)) for _ in range(2))
    tiles = fake_tiles(24)
    with serving(first) as one, serving(second) as other, TritonSource([one, other], transport="grpc") as source:
        assert np.array_equal(source.pixel_features(tiles), FakeSource().pixel_features(tiles))
    assert first.requests + second.requests == 24
    assert min(first.requests, second.requests) >= 6


def test_answers_larger_than_grpcs_own_limit() -> None:
    """4 MiB, unless a client raises it."""
    spec = make_spec(**{**WITH_UPSAMPLER, "tile_px": 1088})
    tiles = np.random.default_rng(0).integers(0, 256, (1, 1, 1088, 1088), dtype=np.uint8)
    with serving(FakeServer(spec)) as address, TritonSource(address, transport="grpc") as source:
        assert source.pixel_features(tiles).nbytes > 1 << 22


def test_servers_without_upsampler_are_not_asked() -> None:
    fake = FakeServer(make_spec())
    with serving(fake) as address, TritonSource(address, transport="grpc") as source:
        for ask in (source.pixel_features, lambda tiles: list(source.iter_pixel_features(tiles))):
            with pytest.raises(UsageError, match=f"{address} serves has no upsampler"):
                ask(fake_tiles(1))
    assert fake.requests == 0


def test_closing_early_cancels_what_is_in_flight() -> None:
    stop, ended = threading.Event(), []

    def hang(number: int, context: Any) -> None:
        if number > 1:
            context.add_callback(lambda: ended.append(number))
            stop.wait(20)

    def tiles() -> Iterator[U8]:
        first, *others = fake_tiles(20)
        yield first
        # On a busy machine another tile's request may come first, and this one's would hang.
        until(lambda: fake.requests == 1)
        yield from others

    fake = FakeServer(make_spec(), hang)
    with serving(fake) as address, TritonSource(address, transport="grpc", in_flight=4) as source:
        features = source.iter_patch_features(tiles())
        next(features)
        until(lambda: fake.running == 4)
        features.close()  # type: ignore[attr-defined]
        until(lambda: len(ended) == 4)
        stop.set()
    assert fake.requests == 5


def test_a_full_queue_is_asked_again_until_the_time_is_over() -> None:
    def busy(number: int, context: Any) -> None:
        if number <= patience:
            context.abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")

    patience = 2
    with serving(FakeServer(make_spec(), busy)) as address:
        with TritonSource(address, transport="grpc") as source:
            assert np.array_equal(source.patch_features(fake_tiles(1)), FakeSource().patch_features(fake_tiles(1)))
        patience = 1_000_000
        with TritonSource(address, transport="grpc", timeout_s=0.7) as source, pytest.raises(ServerBusyError):
            source.patch_features(fake_tiles(1))


def test_a_server_that_hangs_is_a_timeout() -> None:
    stop = threading.Event()
    with serving(FakeServer(make_spec(), lambda number, context: stop.wait(20) and None)) as address:
        with TritonSource(address, transport="grpc", timeout_s=0.3) as source, pytest.raises(ServerTimeoutError):
            source.patch_features(fake_tiles(1))
        stop.set()


@pytest.mark.parametrize(("code", "error"), [("INVALID_ARGUMENT", ServerRefusedError), ("INTERNAL", ServerFailedError)])
def test_a_refusal_is_raised_at_once(code: str, error: type[PhaselineError]) -> None:
    fake = FakeServer(make_spec(), lambda number, context: context.abort(grpc.StatusCode[code], "no"))
    with serving(fake) as address, TritonSource(address, transport="grpc") as source, pytest.raises(error, match=address):
        source.patch_features(fake_tiles(1))
    assert fake.requests == 1


def test_garbage_is_not_taken_for_features() -> None:
    fake = FakeServer(make_spec())
    fake.garble = True
    with (serving(fake) as address, TritonSource(address, transport="grpc") as source,
          pytest.raises(ServerFailedError, match="cannot be understood")):
        source.patch_features(fake_tiles(1))


def test_two_bundles_are_refused_at_opening() -> None:
    one, other = make_spec(), make_spec(weights="random:1")
    with (serving(FakeServer(one)) as first, serving(FakeServer(other)) as second,
          pytest.raises(BundleError, match=f"{second} serves bundle {other.digest()[:12]}, but {first} serves"),
          TritonSource([first, second])):
        pass


def test_a_server_that_was_replaced_while_nobody_asked_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_servers, "FRESH_S", 0.1)
    fake = FakeServer(make_spec())
    with serving(fake) as address, TritonSource(address, transport="grpc") as source:
        assert source.patch_features(fake_tiles(3)).shape[0] == 3
        fake.spec = make_spec(weights="random:1")
        time.sleep(0.2)
        with pytest.raises(BundleError, match="serves bundle"):
            source.patch_features(fake_tiles(3))
    assert fake.requests == 3


def test_nobody_answers() -> None:
    with pytest.raises(ServerUnavailableError, match=f"no server answers: {DEAD}"), TritonSource(DEAD):
        pass


def test_a_server_that_comes_later_is_checked_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_servers, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(remote_servers, "LONGEST_PAUSE_S", 0.2)
    first, late, foreign = FakeServer(make_spec()), FakeServer(make_spec()), FakeServer(make_spec(weights="random:1"))
    with serving(FakeServer(make_spec())) as address:
        port = int(address.rpartition(":")[2])
    with serving(first) as other, TritonSource([other, address], transport="grpc", in_flight=1) as source:
        assert f"{address} (left out: " in source.engine_choice

        def ask() -> bool:
            source.patch_features(fake_tiles(2))
            return late.requests > 0

        with serving(foreign, port):
            until(lambda: ask() or "serves bundle" in source.engine_choice)
        with serving(late, port):
            until(ask)
        assert np.array_equal(source.patch_features(fake_tiles(4)), FakeSource().patch_features(fake_tiles(4)))
    assert foreign.requests == 0


def test_the_reason_of_each_server_is_said_when_none_is_left() -> None:
    away = FakeServer(make_spec(), lambda number, context: context.abort(grpc.StatusCode.UNAVAILABLE, "gone fishing"))
    with (serving(away) as first, serving(away) as second,
          TritonSource([first, second], transport="grpc", timeout_s=0.5) as source,
          pytest.raises(ServerUnavailableError, match=rf"{first}.*gone fishing; {second}.*gone fishing")):
        source.patch_features(fake_tiles(1))


def test_a_server_that_hangs_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_servers, "LEAST_ATTEMPT_S", 0.2)
    stop, tiles = threading.Event(), fake_tiles(12)
    hangs, works = FakeServer(make_spec(), lambda number, context: stop.wait(20) and None), FakeServer(make_spec())
    with (serving(hangs) as first, serving(works) as second,
          TritonSource([first, second], transport="grpc", timeout_s=4, in_flight=4) as source):
        assert np.array_equal(source.patch_features(tiles), FakeSource().patch_features(tiles))
        assert f"{first} (left out: {first}, backbone, request " in source.engine_choice
        stop.set()
    assert 0 < hangs.requests <= 8


def test_a_server_that_hangs_when_it_is_checked_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_servers, "LEAST_ATTEMPT_S", 0.2)
    monkeypatch.setattr(remote_servers, "FRESH_S", 0.1)
    flowing = threading.Event()
    flowing.set()

    class Stalling(FakeServer):
        def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
            flowing.wait(20)
            return super().ModelConfig(request, context)

    with (serving(Stalling(make_spec())) as first, serving(FakeServer(make_spec())) as second,
          TritonSource([first, second], transport="grpc", timeout_s=2) as source):
        flowing.clear()
        time.sleep(0.2)
        assert np.array_equal(source.patch_features(fake_tiles(1)), FakeSource().patch_features(fake_tiles(1)))
        flowing.set()


def test_a_connection_that_hung_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_servers, "FIRST_PAUSE_S", 0.05)
    stop = threading.Event()
    fake = FakeServer(make_spec(), lambda number, context: number == 1 and stop.wait(20) and None)
    with serving(fake) as address, TritonSource(address, transport="grpc", timeout_s=2) as source:
        with pytest.raises(ServerTimeoutError):
            source.patch_features(fake_tiles(1))
        assert np.array_equal(source.patch_features(fake_tiles(1)), FakeSource().patch_features(fake_tiles(1)))
        stop.set()
    assert len(set(fake.peers)) == 2


def test_each_request_has_an_id_that_errors_name() -> None:
    def fail(number: int, context: Any) -> None:
        if number == 4:
            context.abort(grpc.StatusCode.INTERNAL, "no")

    fake = FakeServer(make_spec(), fail)
    with serving(fake) as address, TritonSource(address, transport="grpc", in_flight=1) as source:
        source.patch_features(fake_tiles(3))
        with pytest.raises(ServerFailedError) as failure:
            source.patch_features(fake_tiles(1))
    prefixes, numbers = zip(*(request_id.split("-") for request_id in fake.ids), strict=True)
    assert len(set(prefixes)) == 1 and numbers == ("1", "2", "3", "4")
    assert f"request {fake.ids[-1]}: no" in str(failure.value)


def test_no_error_is_kept_or_raised_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error's traceback holds the request, and with it the pixels."""
    monkeypatch.setattr(remote_servers, "FRESH_S", 0.0)
    fake = FakeServer(make_spec())
    with serving(fake) as address, TritonSource(address, transport="grpc") as source:
        fake.spec = make_spec(weights="random:1")
        errors = []
        for _ in range(2):
            with pytest.raises(BundleError, match="serves bundle") as failure:
                source.patch_features(fake_tiles(1))
            errors.append(failure.value)
        assert errors[0] is not errors[1]
        assert not any(isinstance(value, BaseException) for server in source._servers.all for value in vars(server).values())


class Published(FakeServer):
    """A server of one recipe, `described`, under any name; it labels all pixels 1."""

    def __init__(self, before: Callable[[int, Any], None] = lambda number, context: None) -> None:
        super().__init__(make_spec(), before)
        self.described = {"hash": "a" * 64, "version": 1, "image_channels": 1, "window_kind": None,
                          "classes": {"values": [1, 2], "names": ["a", "b"], "colours": ["#000000", "#ffffff"]}}

    def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = pb.ModelConfigResponse()
        answer.config.parameters["recipe"].string_value = json.dumps(self.described)
        answer.config.parameters["max_pixels"].string_value = "1000000"
        return answer

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests += 1
        self.before(self.requests, context)
        shape = request.inputs[0].shape
        answer = pb.ModelInferResponse(model_name=request.model_name, model_version=str(self.described["version"]))
        for name in ("labels", "confidence"):
            answer.outputs.add(name=name, datatype="UINT8", shape=shape)
            answer.raw_output_contents.append(b"\1" * int(np.prod(shape)))
        return answer


def test_a_recipe_published_meanwhile_is_refused() -> None:
    fake = Published()
    with serving(fake) as address, RemoteSegmenter(address, "x") as segmenter:
        fake.described |= {"hash": "b" * 64, "version": 2}
        with pytest.raises(RecipeError, match=r"serves recipe bbbbbbbbbbbb as segment_x, but .* served aaaaaaaaaaaa"):
            segmenter.segment(frame(1))


@pytest.mark.parametrize("what", ["hangs", "is busy", "has another recipe"])
def test_a_folder_stops_where_the_server_does(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop = threading.Event()

    def before(number: int, context: Any) -> None:
        if number == 1:
            return
        match what:
            case "hangs":
                stop.wait(20)
            case "is busy":
                context.abort(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
            case _:
                fake.described |= {"hash": "b" * 64, "version": 2}

    fake, images, out = Published(before), tmp_path / "images", tmp_path / "out"
    images.mkdir()
    out.mkdir()
    for i in range(3):
        tifffile.imwrite(images / f"{i}.tif", frame(i))
        (out / f"{i}.png").write_bytes(b"of an earlier run")
    with serving(fake) as address:
        assert run(["segment", str(images), "--out", str(out), "--quiet", "--overwrite", "--published", "x", "--server", address,
                    "--timeout", "1"]) == 1
        stop.set()
    (error,) = capsys.readouterr().err.splitlines()
    assert "1 of 3 images are done, each whole; go on with --resume" in error
    assert np.all(np.asarray(Image.open(out / "0.png")) == 1)
    assert all((out / f"{i}.png").read_bytes() == b"of an earlier run" for i in (1, 2))
    assert len((out / "report.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(("hangs", "error"), [(False, ServerRefusedError), (True, ServerTimeoutError)])
def test_load_of_a_server_that_tells_no_statistics(
    monkeypatch: pytest.MonkeyPatch, hangs: bool, error: type[PhaselineError]
) -> None:
    stop = threading.Event()

    class Silent(FakeServer):
        def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
            if hangs:
                stop.wait(20)
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "no statistics")

    monkeypatch.setattr(load, "STATISTICS_TIMEOUT_S", 0.2)
    with serving(Silent(make_spec())) as address:
        with pytest.raises(error, match=address):
            load.run_load(load.Load(address, concurrency=2, seconds=0.2, warm_up_s=0.05))
        with pytest.raises(error, match=address):
            load.batch_counts(address)
        stop.set()


@pytest.mark.parametrize("wrong", [
    {"transport": "pigeon"}, {"in_flight": 0}, {"timeout_s": 0}, {"priority": "urgent"}, {"servers": "nowhere"},
])
def test_wrong_parameters(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TritonSource(**{"servers": DEAD, **wrong})


@pytest.mark.parametrize(("extra", "code"), [
    (["--recipe", "RECIPE", "--server", DEAD], 1),
    (["--published", "deep", "--server", DEAD], 1),
    (["--published", "deep"], 2),
    (["--published", "deep", "--recipe", "RECIPE", "--server", DEAD], 2),
    (["--published", "deep", "--server", DEAD, "--crf"], 2),
    (["--recipe", "RECIPE", "--server", DEAD, "--bundle", "default"], 2),
    (["--recipe", "RECIPE", "--server", DEAD, "--device", "cpu"], 2),
    (["--recipe", "RECIPE", "--transport", "grpc"], 2),
    ([], 2),
])
def test_command_line_mistakes_take_one_line(
    recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], code: int
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", frame(1))
    words = [str(recipes["deep"]) if word == "RECIPE" else word for word in extra]
    assert run(["segment", str(tmp_path / "a.tif"), "--out", str(tmp_path / "a.png"), "--quiet", *words]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "a.png").exists()


def test_the_command_line_starts_without_grpc() -> None:
    code = "import sys, phaseline.clients.__main__; print([name for name in ('grpc', 'tritonclient') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
