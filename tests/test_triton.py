"""A real Triton server: its answers, its refusals, publishing, restrictions, TLS, logs, and how it stops."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import psutil
import pytest
from tritonclient.grpc import service_pb2 as pb

from phaseline.clients.__main__ import run
from phaseline.clients.kserve import Tls, infer_request, open_channel, open_stub, output_arrays, server_error
from phaseline.clients.load import Load, run_load
from phaseline.clients.publish import list_recipes, publish, rollback, withdraw
from phaseline.clients.segmenter import Segmenter
from phaseline.runtime.bundle import Bundle
from phaseline.runtime.errors import (
    PhaselineError,
    RecipeError,
    ServerBusyError,
    ServerError,
    ServerFailedError,
    ServerRefusedError,
    ServerTimeoutError,
    ServerUnavailableError,
    UnknownModelError,
    UsageError,
)
from phaseline.runtime.source import LocalSource
from phaseline.triton_models.listening import Listening
from phaseline.triton_models.repository import Deployment
from phaseline.triton_models.server import TritonServer
from phaseline.triton_models.store import RecipeStore
from tests.serving import fit_recipe, frame

pytestmark = pytest.mark.triton
FREE = Listening(grpc_port=0, http_port=0, metrics_port=0)


class Client:
    """One channel, and errors as phaseline's."""

    def __init__(self, address: str, tls: Tls | None = None) -> None:
        self.address = address
        self.channel = open_channel(address, tls)
        self.stub = open_stub(self.channel)

    def infer(self, model: str, inputs: dict[str, Any], outputs: list[str], timeout_s: float = 30, **more: Any) -> Any:
        try:
            return self.stub.ModelInfer(infer_request(model, inputs, outputs, **more), timeout=timeout_s)
        except grpc.RpcError as error:
            raise server_error(error, self.address, model) from error

    def segment(self, name: str, image: npt.NDArray[Any], **more: Any) -> npt.NDArray[np.uint8]:
        inputs = {f"image_{image.dtype.name}": image if image.ndim > 2 else image[None]}
        return output_arrays(self.infer(f"segment_{name}", inputs, ["labels"], **more))["labels"]

    def call(self, procedure: str, request: Any) -> Any:
        try:
            return getattr(self.stub, procedure)(request, timeout=10)
        except grpc.RpcError as error:
            raise server_error(error, self.address, procedure) from error


@pytest.fixture
def client(server: TritonServer) -> Iterator[Client]:
    made = Client(server.address)
    with made.channel:
        yield made


def embedded(recipe: Path, bundle: Bundle, image: npt.NDArray[Any]) -> npt.NDArray[Any]:
    with Segmenter.open(recipe, bundle=None if "classical" in recipe.name else bundle.path, device="cpu") as segmenter:
        return segmenter.segment(image).labels


def http(server: TritonServer, path: str, port: str = "http") -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.ports[port]}/{path}", timeout=5) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def wait_for(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    """Wait until something is so; fails if it does not become so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["deep", "averaged", "classical"])
def test_labels_are_the_embedded_ones(client: Client, tiny_bundle: Bundle, recipes: dict[str, Path], name: str) -> None:
    images = np.stack([frame(1, 130, 75), frame(2, 130, 75)])
    answer = client.infer(f"segment_{name}", {"image_uint16": images}, ["labels", "confidence"], request_id="two planes")
    arrays = output_arrays(answer)
    assert (answer.id, answer.model_version) == ("two planes", "1")
    with Segmenter.open(recipes[name], bundle=None if name == "classical" else tiny_bundle.path, device="cpu") as segmenter:
        for image, labels, confidence in zip(images, arrays["labels"], arrays["confidence"], strict=True):
            expected = segmenter.segment(image)
            np.testing.assert_array_equal(labels, expected.labels)
            np.testing.assert_array_equal(confidence, expected.confidence)


def test_only_what_is_asked_for_is_sent(client: Client) -> None:
    image = frame(1)
    answer = client.infer("segment_classical", {"image_uint16": image[None]}, ["labels"])
    assert [output.name for output in answer.outputs] == ["labels"]
    assert image.size <= answer.ByteSize() < image.size + 300


def inferences_and_executions(client: Client) -> tuple[int, int]:
    (found,) = client.call("ModelStatistics", pb.ModelStatisticsRequest(name="backbone")).model_stats
    return found.inference_count, found.execution_count


def test_backbone_batches_and_gives_the_embedded_features(client: Client, tiny_bundle: Bundle) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (17, 1, 56, 56), np.uint8)
    before = inferences_and_executions(client)
    calls = [client.stub.ModelInfer.future(infer_request("backbone", {"tiles": tile[None]}, ["patch_features", "attention"]),
                                           timeout=30) for tile in tiles]
    answers = [output_arrays(call.result()) for call in calls]
    # Triton counts a request after it has sent the answer.
    end = time.monotonic() + 20
    while (after := inferences_and_executions(client))[0] < before[0] + 17 and time.monotonic() < end:
        time.sleep(0.01)
    inferences, executions = np.subtract(after, before)
    assert inferences == 17 and inferences / executions >= 4
    with LocalSource(tiny_bundle, "cpu", 2) as source:
        features, attention = source.outputs(tiles, ["patch_features", "attention"])
    np.testing.assert_array_equal(np.concatenate([answer["patch_features"] for answer in answers]), features)
    np.testing.assert_array_equal(np.concatenate([answer["attention"] for answer in answers]), attention)


GOOD = frame(7)


@pytest.mark.parametrize(("model", "inputs", "error", "words"), [
    ("segment_deep", {"image_uint8": np.zeros((1, 9, 9), np.uint8)}, ServerRefusedError, "image is uint8, but the intensity"),
    ("segment_deep", {"image_uint16": np.zeros((1, 9, 9), np.uint8)}, ServerRefusedError, "data-type"),
    ("segment_deep", {"image_uint16": np.zeros((9, 9), np.uint16)}, ServerRefusedError, "shape"),
    ("segment_deep", {"image_uint16": np.zeros((1, 9, 9, 3), np.uint16)}, ServerRefusedError, "shape"),
    ("segment_deep", {"image_uint16": np.zeros((1, 0, 9), np.uint16)}, ServerRefusedError, "0 pixels"),
    ("segment_deep", {"image_uint16": np.zeros((0, 9, 9), np.uint16)}, ServerRefusedError, "byte size mismatch"),
    ("segment_deep", {"image_uint16": np.zeros((65, 9, 9), np.uint16)}, ServerRefusedError, "batch"),
    ("segment_deep", {"image_uint16": GOOD[None], "image_uint8": GOOD[None].astype("u1")}, ServerRefusedError, "2 images came"),
    ("segment_deep", {}, ServerRefusedError, "request has 0 inputs"),
    ("segment_deep", {"picture": GOOD[None]}, ServerRefusedError, "picture"),
    ("segment_deep", {"image_float32": np.full((1, 9, 9), np.nan, np.float32)}, ServerRefusedError, "NaN"),
    ("backbone", {"tiles": np.zeros((1, 1, 57, 56), np.uint8)}, ServerRefusedError, "shape"),
    ("backbone", {"tiles": np.zeros((9, 1, 56, 56), np.uint8)}, ServerRefusedError, "batch"),
    ("backbone", {"tiles": np.zeros((1, 1, 56, 56), np.float32)}, ServerRefusedError, "data-type"),
    ("nothing", {"tiles": np.zeros((1, 1, 56, 56), np.uint8)}, UnknownModelError, "unknown model"),
    ("segment_deep", {"image_uint16": np.zeros((1, 8000, 9000), np.uint16)}, ServerRefusedError, "72000000 pixels"),
])
def test_bad_requests_get_a_typed_error_and_disturb_nobody(
    client: Client, model: str, inputs: dict[str, Any], error: type[ServerError], words: str,
    tiny_bundle: Bundle, recipes: dict[str, Path],
) -> None:
    outputs = ["patch_features"] if model == "backbone" else ["labels"]
    with pytest.raises(error, match=words) as raised:
        client.infer(model, inputs, outputs)
    assert type(raised.value) is error
    np.testing.assert_array_equal(client.segment("deep", GOOD)[0], embedded(recipes["deep"], tiny_bundle, GOOD))


def test_byte_order_does_not_matter(client: Client) -> None:
    np.testing.assert_array_equal(client.segment("deep", GOOD.astype(">u2")), client.segment("deep", GOOD))


def test_a_truncated_tensor_is_refused(client: Client) -> None:
    request = infer_request("segment_deep", {"image_uint16": GOOD[None]}, ["labels"])
    for content in (b"", request.raw_input_contents[0][:-1]):
        request.raw_input_contents[0] = content
        with pytest.raises(ServerRefusedError, match=r"byte|size"):
            client.call("ModelInfer", request)
    assert client.segment("deep", GOOD).shape == (1, *GOOD.shape)


def test_an_unknown_output_or_version_is_refused(client: Client) -> None:
    with pytest.raises(ServerRefusedError, match="unexpected inference output 'nothing'"):
        client.infer("segment_deep", {"image_uint16": GOOD[None]}, ["nothing"])
    with pytest.raises(ServerError, match="version"):
        client.infer("segment_deep", {"image_uint16": GOOD[None]}, ["labels"], version="7")


@pytest.mark.parametrize("port", ["grpc", "http", "metrics"])
def test_garbage_on_a_port_disturbs_nobody(server: TritonServer, client: Client, port: str) -> None:
    with socket.create_connection(("127.0.0.1", server.ports[port]), timeout=5) as line:
        line.sendall(bytes(np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)))
    assert client.segment("deep", GOOD).shape == (1, *GOOD.shape)


def test_a_deadline_is_kept(client: Client) -> None:
    with pytest.raises(ServerTimeoutError, match="no answer in the time allowed"):
        client.segment("averaged", frame(1, 8000, 300), timeout_s=0.2)
    # Nobody waits for a frame that nobody waits for: its work, minutes, is given up.
    assert client.segment("averaged", GOOD).shape == (1, *GOOD.shape)


def occupy(server: TritonServer, client: Client) -> list[Any]:
    """Give `segment_averaged` more than it works on at once; returns when some of it waits."""
    slow = infer_request("segment_averaged", {"image_uint16": frame(1, 300, 300)[None]}, ["labels"])
    calls = [client.stub.ModelInfer.future(slow, timeout=300) for _ in range(9)]
    pending = re.compile(rb'nv_inference_pending_request_count\{model="segment_averaged",version="1"\} [1-9]')
    wait_for(lambda: pending.search(http(server, "metrics", "metrics")[1]) is not None)
    return calls


def test_waiting_in_the_queue_ends(server: TritonServer, client: Client) -> None:
    calls = occupy(server, client)
    with pytest.raises(ServerTimeoutError, match="waited too long in the server's queue"):
        client.segment("averaged", GOOD, queue_timeout_s=0.001, priority="batch")
    for call in calls:
        call.result()


def test_interactive_goes_before_batch(server: TritonServer, client: Client) -> None:
    calls = occupy(server, client)
    ended: list[str] = []
    for priority, rows in (("batch", 97), ("batch", 98), ("interactive", 99)):
        request = infer_request("segment_averaged", {"image_uint16": frame(1, rows)[None]}, ["labels"], priority=priority)
        call = client.stub.ModelInfer.future(request, timeout=300)
        call.add_done_callback(lambda _, name=f"{priority} {rows}": ended.append(name))
        calls.append(call)
    for call in calls:
        call.result()
    wait_for(lambda: len(ended) == 3)
    # In which order two calls of one client arrive is not promised.
    assert ended[0] == "interactive 99" and sorted(ended[1:]) == ["batch 97", "batch 98"]


def test_a_full_queue_says_busy(server: TritonServer, client: Client) -> None:
    calls = occupy(server, client)
    small = infer_request("segment_averaged", {"image_uint16": GOOD[None, :9, :9]}, ["labels"])
    many = [client.stub.ModelInfer.future(small, timeout=300) for _ in range(400)]
    answers, problems = [], []
    for call in many:
        try:
            answers.append(output_arrays(call.result())["labels"])
        except grpc.RpcError as error:
            problems.append(server_error(error, client.address, "segment_averaged"))
    assert problems and {type(problem) for problem in problems} == {ServerBusyError}
    assert len(answers) >= 200 and all(np.array_equal(answer, answers[0]) for answer in answers)
    for call in calls:
        call.result()


@pytest.mark.parametrize(("procedure", "request_"), [
    ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="backbone")),
    ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="backbone")),
    ("RepositoryIndex", pb.RepositoryIndexRequest()),
    ("TraceSetting", pb.TraceSettingRequest()),
    ("LogSettings", pb.LogSettingsRequest()),
])
def test_what_could_take_the_server_over_is_off(client: Client, procedure: str, request_: Any) -> None:
    with pytest.raises(ServerRefusedError, match="does not allow this call"):
        client.call(procedure, request_)


def test_http_tells_health_only(server: TritonServer) -> None:
    for path in ("v2/models/segment_deep", "v2/models/segment_deep/config", "v2/models/stats"):
        assert http(server, path)[0] == 403
    # What a page in a browser on this host could send without asking first.
    request = urllib.request.Request(f"http://127.0.0.1:{server.ports['http']}/v2/models/recipes/infer", data=b"{}",
                                     headers={"Origin": "http://elsewhere.example", "Content-Type": "text/plain"})
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=5)
    raised.value.close()
    assert raised.value.code == 403


def test_shared_memory_is_for_the_servers_user_alone(server: TritonServer) -> None:
    regions = list(Path("/dev/shm").glob(f"phaseline-serve-*-{os.getpid()}-*"))
    assert regions and all(region.stat().st_mode & 0o077 == 0 for region in regions)


def test_the_same_is_off_over_http(server: TritonServer) -> None:
    for path in ("v2/repository/index", "v2/repository/models/backbone/load", "v2/trace/setting", "v2/logging"):
        request = urllib.request.Request(f"http://127.0.0.1:{server.ports['http']}/{path}", data=b"{}")
        with pytest.raises(urllib.error.HTTPError) as raised, urllib.request.urlopen(request, timeout=5):
            pass
        raised.value.close()
        assert raised.value.code in (400, 403, 405)
    header = b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\noff:off: y\r\nContent-Length: 2\r\n\r\n{}"
    with socket.create_connection(("127.0.0.1", server.ports["http"]), timeout=5) as line:
        line.sendall(header)
        assert b" 403 " in line.recv(100)


def test_health_and_metrics(server: TritonServer, client: Client) -> None:
    client.segment("deep", GOOD)
    for path in ("v2/health/live", "v2/health/ready", "v2/models/segment_deep/ready", "v2/models/backbone/ready"):
        assert http(server, path)[0] == 200
    assert http(server, "v2/models/nothing/ready")[0] == 400
    status, text = http(server, "metrics", "metrics")
    assert status == 200
    match = re.search(rb'nv_inference_request_success\{model="segment_deep",version="1"\} (\d+)', text)
    assert match is not None and int(match[1]) >= 1


@pytest.fixture(scope="module")
def own(
    needs_triton: None, tiny_bundle: Bundle, recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[TritonServer, Path, Path]]:
    """A server that may be published to, with its store and its log. Its key is ``secret``."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "key").write_text("secret\n")
    listening = Listening(grpc_port=0, http_port=0, metrics_port=0, publish_key=folder / "key")
    with TritonServer(Deployment(tiny_bundle, threads=2, max_pixels=100_000), listening, store=folder / "store",
                      recipes={"cells": recipes["classical"]}, log_file=folder / "log") as server:
        yield server, folder / "store", folder / "log"


def test_publishing_to_a_running_server(
    own: tuple[TritonServer, Path, Path], tiny_bundle: Bundle, recipes: dict[str, Path], tmp_path: Path
) -> None:
    server, store, _ = own
    address = server.address
    fit_recipe(None, values=(3, 4), seed=1).save(tmp_path / "classical")
    with open_channel(address):
        pass
    client = Client(address)
    with client.channel:
        assert set(np.unique(client.segment("cells", GOOD))) == {1, 2}
        with pytest.raises(ServerRefusedError, match="needs this server's key, and none came"):
            publish(address, tmp_path / "classical", "cells")
        new = publish(address, tmp_path / "classical", "cells", key="secret")
        assert (new["version"], new["versions"], new["changed"]) == (2, [1, 2], True)
        answer = client.infer("segment_cells", {"image_uint16": GOOD[None]}, ["labels"])
        assert answer.model_version == "2"
        np.testing.assert_array_equal(output_arrays(answer)["labels"][0], embedded(tmp_path / "classical", tiny_bundle, GOOD))
        assert publish(address, tmp_path / "classical", "cells", key="secret")["changed"] is False
        assert rollback(address, "cells", key="secret")["version"] == 1
        assert set(np.unique(client.segment("cells", GOOD))) == {1, 2}
        other = publish(address, recipes["deep"], "other", key="secret")
        np.testing.assert_array_equal(client.segment("other", GOOD)[0], embedded(recipes["deep"], tiny_bundle, GOOD))
        assert other["hash"] == list_recipes(address)[1]["hash"]
        assert withdraw(address, "other", key="secret")["version"] is None
        wait_for(lambda: _is_unknown(client, "other"))
        assert (store / "other" / "1" / "recipe.json").is_file()
        assert rollback(address, "other", 1, key="secret")["version"] == 1
        np.testing.assert_array_equal(client.segment("other", GOOD)[0], embedded(recipes["deep"], tiny_bundle, GOOD))
        withdraw(address, "other", key="secret")


def _is_unknown(client: Client, name: str) -> bool:
    try:
        client.segment(name, GOOD)
    except (UnknownModelError, ServerUnavailableError):
        return True
    return False


def damaged(recipe: Path, folder: Path) -> Path:
    """A copy whose manifest agrees with a classifier that XGBoost cannot read."""
    import hashlib

    folder.mkdir()
    content = json.loads((recipe / "recipe.json").read_text())
    broken = b"no trees in here"
    (folder / "classifier.ubj").write_bytes(broken)
    content["files"]["classifier.ubj"] = hashlib.sha256(broken).hexdigest()
    del content["hash"]
    content["hash"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "recipe.json").write_text(json.dumps(content))
    return folder


def test_a_broken_recipe_disturbs_nobody(
    own: tuple[TritonServer, Path, Path], recipes: dict[str, Path], tmp_path: Path
) -> None:
    server, store, _ = own
    before = {recipe["name"]: recipe for recipe in list_recipes(server.address)}
    broken = damaged(recipes["classical"], tmp_path / "broken")
    client = Client(server.address)
    with client.channel:
        for name, words in (("cells", "version 1 goes on serving"), ("new", "nothing is served under this name")):
            with pytest.raises(ServerRefusedError, match=words):
                publish(server.address, broken, name, key="secret")
            assert set(np.unique(client.segment("cells", GOOD))) == {1, 2}
        with pytest.raises((UnknownModelError, ServerUnavailableError)):
            client.segment("new", GOOD)
    assert {recipe["name"]: recipe for recipe in list_recipes(server.address)} == before
    assert not list(store.glob("*/.new*"))


def test_the_size_limit_is_stated_and_kept(own: tuple[TritonServer, Path, Path]) -> None:
    client = Client(own[0].address)
    with client.channel:
        answer = client.call("ModelConfig", pb.ModelConfigRequest(name="segment_cells"))
        assert answer.config.parameters["max_pixels"].string_value == "100000"
        with pytest.raises(ServerRefusedError, match="hold 100001 pixels, expected 1 to 100000"):
            client.segment("cells", np.zeros((1, 1, 100_001), np.uint16))


def test_the_log_names_model_version_and_request(own: tuple[TritonServer, Path, Path]) -> None:
    server, _, log = own
    client = Client(server.address)
    with client.channel:
        client.segment("cells", GOOD, request_id="scan-7")
        with pytest.raises(ServerRefusedError):
            client.segment("cells", GOOD.astype(np.uint8), request_id="scan-8")
    wait_for(lambda: "id scan-8: the image is uint8" in log.read_text())
    text = log.read_text()
    assert re.search(r"segment_cells version 1 id scan-7: uint16 1×96×120, \d", text)
    assert re.search(r" W .*segment_cells version 1 id scan-8: the image is uint8", text)


def test_shared_memory_is_off_unless_asked_for(own: tuple[TritonServer, Path, Path]) -> None:
    client = Client(own[0].address)
    with client.channel, pytest.raises(ServerRefusedError, match="does not allow this call"):
        client.call("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest())


def test_publish_and_info_commands(
    own: tuple[TritonServer, Path, Path], recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = own[0]
    key = tmp_path / "key"
    key.write_text("secret")
    common = ["--server", server.address, "--key", str(key)]
    assert run(["publish", str(recipes["averaged"]), "--name", "views", *common]) == 0
    assert "segment_views is version 1, recipe" in capsys.readouterr().err
    assert run(["info", "--server", server.address]) == 0
    assert re.search(r"recipe +segment_views is version 1", capsys.readouterr().out)
    assert run(["publish", "--withdraw", "views", *common]) == 0
    assert "views is not served; stored versions: 1" in capsys.readouterr().err
    assert run(["publish", "--rollback", "views", "--version", "9", *common]) == 1
    assert "has no version 9, only 1" in capsys.readouterr().err
    for arguments, words in (
        ([], "expected one of: a RECIPE folder"), (["x", "--withdraw", "y"], "expected one of"),
        (["--withdraw", "y", "--name", "z"], "--name came without"), (["x", "--version", "2"], "--version came without"),
        (["missing"], "no recipe at missing"),
    ):
        assert run(["publish", *arguments, *common]) == 2
        assert words in capsys.readouterr().err
    dead = f"127.0.0.1:{free_port()}"
    both = ["--server", f"{server.address},{dead}", "--key", str(key)]
    assert run(["publish", str(recipes["classical"]), "--name", "cells", *both]) == 1
    assert f"1 of 2 servers did not take it: {dead}" in capsys.readouterr().err


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_recipes_outlive_the_server_in_its_store(
    tiny_bundle: Bundle, recipes: dict[str, Path], tmp_path: Path, needs_triton: None
) -> None:
    deployment = Deployment(tiny_bundle, threads=2)
    with TritonServer(deployment, FREE, store=tmp_path / "store", log_file=tmp_path / "log") as server:
        assert server.served() == {}
        publish(server.address, recipes["deep"], "cells")
        publish(server.address, recipes["classical"], "cells")
        rollback(server.address, "cells")
        publish(server.address, recipes["averaged"], "later")
        publish(server.address, recipes["classical"], "later")
    # A version whose file is damaged on disk must not keep the server from coming up.
    (tmp_path / "store" / "bad" / "1").mkdir(parents=True)
    (tmp_path / "store" / "bad" / "current").write_text("1")
    (tmp_path / "store" / "lost+found").mkdir()
    with TritonServer(deployment, FREE, store=tmp_path / "store", log_file=tmp_path / "log",
                      recipes={"cells": recipes["deep"], "later": recipes["averaged"]}) as server:
        # What was published since is not undone by a restart with the same command line.
        assert server.served() == {"segment_cells": 1, "segment_later": 2} and list(server.failed_recipes) == ["bad"]
        client = Client(server.address)
        with client.channel:
            np.testing.assert_array_equal(client.segment("cells", GOOD)[0], embedded(recipes["deep"], tiny_bundle, GOOD))


def test_load(server: TritonServer, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_load(Load(server.address, concurrency=16, seconds=1.0, warm_up_s=0.2))
    assert report.model == "backbone" and len(report.latencies_s) > 0 and not report.errors
    assert report.batches.inferences >= len(report.latencies_s) and report.batches.mean > 1
    assert 0 < report.latency_s(50) <= report.latency_s(95) <= report.latency_s(99)
    arguments = ["load", "--server", server.address, "--published", "deep", "--rows", "60", "--cols", "70", "--seconds", "0.5",
                 "--warm-up", "0", "--concurrency", "2"]
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    for name in ("throughput", "p50", "p99", "errors: none", "0.008 MB in, 0.008 MB out"):
        assert name in printed
    assert run(["load", "--server", server.address, "--published", "nothing"]) == 1
    assert "unknown model" in capsys.readouterr().err
    assert run(["load", "--server", server.address, "--priority", "high"]) == 2
    assert run(["load", "--server", server.address, "--published", "deep", "--rows", "20000", "--cols", "20000"]) == 2
    assert "takes at most 67108864 pixels" in capsys.readouterr().err
    with pytest.raises(UsageError, match="expected one of uint8, uint16, float32"):
        Load(server.address, dtype="int8")
    with pytest.raises(ServerUnavailableError):
        run_load(Load(f"127.0.0.1:{free_port()}", timeout_s=2))


def openssl(*arguments: str, cwd: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=cwd, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates of a server and a client that it signed."""
    folder = tmp_path_factory.mktemp("tls")
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-days", "2",
            "-subj", "/CN=authority", cwd=folder)
    for name in ("server", "client"):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}",
                "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", cwd=folder)
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
                "-copy_extensions", "copy", "-out", f"{name}.pem", cwd=folder)
    return folder


def test_mutual_tls(
    tiny_bundle: Bundle, recipes: dict[str, Path], certificates: Path, tmp_path: Path, needs_triton: None
) -> None:
    listening = Listening(
        grpc_port=0, http_port=0, metrics_port=0, certificate=certificates / "server.pem", key=certificates / "server.key",
        client_ca=certificates / "ca.pem")
    with TritonServer(Deployment(tiny_bundle, threads=2), listening, recipes={"deep": recipes["deep"]},
                      log_file=tmp_path / "log") as server:
        own = Tls(certificates / "ca.pem", certificates / "client.pem", certificates / "client.key")
        client = Client(server.address, own)
        with client.channel:
            np.testing.assert_array_equal(client.segment("deep", GOOD)[0], embedded(recipes["deep"], tiny_bundle, GOOD))
        for tls in (None, Tls(certificates / "ca.pem"), Tls(certificates / "server.pem")):
            stranger = Client(server.address, tls)
            with stranger.channel, pytest.raises(ServerUnavailableError):
                stranger.segment("deep", GOOD, timeout_s=10)
        assert http(server, "v2/health/ready")[0] == http(server, "v2/models/segment_deep/ready")[0] == 200
        assert http(server, "v2/models/segment_deep/config")[0] == 403
        with pytest.raises(ServerRefusedError, match="publishing needs this server's key"):
            publish(server.address, recipes["deep"], "deep", tls=own)


def test_a_broken_recipe_on_the_command_line_changes_nothing(
    tiny_bundle: Bundle, recipes: dict[str, Path], tmp_path: Path, needs_triton: None
) -> None:
    deployment = Deployment(tiny_bundle, threads=2)
    with TritonServer(deployment, FREE, store=tmp_path / "store", recipes={"a": recipes["classical"]}, log_file=tmp_path / "log"):
        pass
    broken = damaged(recipes["classical"], tmp_path / "broken")
    with (
        pytest.raises(RecipeError, match=r"cannot be served as 'a': .*is no XGBoost model"),
        TritonServer(deployment, FREE, store=tmp_path / "store", recipes={"a": broken}, log_file=tmp_path / "log"),
    ):
        pass
    store = RecipeStore(tmp_path / "store")
    assert store.versions("a") == [1] and store.current("a") == 1


def test_a_process_that_cannot_be_reloaded_takes_nobody_down(
    tiny_bundle: Bundle, recipes: dict[str, Path], tmp_path: Path, needs_triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phaseline.triton_models.server.FIRST_PAUSE_S", 1.0)
    with TritonServer(Deployment(tiny_bundle, threads=2), FREE, store=tmp_path / "store", log_file=tmp_path / "log",
                      recipes={"a": recipes["classical"], "b": recipes["deep"]}) as server:
        client = Client(server.address)
        classifier = tmp_path / "store" / "a" / "1" / "classifier.ubj"
        content = classifier.read_bytes()
        classifier.unlink()
        (victim,) = (child for child in psutil.Process(server.pid).children() if "segment_a" in " ".join(child.cmdline()))
        victim.kill()
        with client.channel:
            wait_for(lambda: "classifier.ubj is missing" in (tmp_path / "log").read_text(), 60)
            np.testing.assert_array_equal(client.segment("b", GOOD)[0], embedded(recipes["deep"], tiny_bundle, GOOD))
            with pytest.raises(ServerUnavailableError):
                client.segment("a", GOOD)
            classifier.write_bytes(content)
            wait_for(lambda: not _is_unknown(client, "a"), 60)
        assert server.restarts == []


def test_a_server_that_dies_while_it_is_started_again_is_started_once_more(
    tiny_bundle: Bundle, recipes: dict[str, Path], tmp_path: Path, needs_triton: None
) -> None:
    # A process whose command is no UTF-8 must not disturb the keeper either.
    stranger = subprocess.Popen([b"caf\xe9", b"60"], executable=shutil.which("sleep"))
    try:
        with TritonServer(Deployment(tiny_bundle, threads=2), FREE, recipes={"a": recipes["classical"]},
                          log_file=tmp_path / "log") as server:
            first = server.pid
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: server._process is not None and server._process.pid != first)
            os.kill(server.pid, signal.SIGKILL)
            client = Client(server.address)
            with client.channel:
                wait_for(lambda: not _is_unknown(client, "a"), 60)
            assert len(server.restarts) == 2
    finally:
        stranger.kill()
        stranger.wait()


def serve(tiny_bundle: Bundle, *arguments: str) -> subprocess.Popen[str]:
    """`phaseline serve` as a user starts it."""
    command = [sys.executable, "-m", "phaseline.clients", "serve", str(tiny_bundle.path), "--grpc-port", "0", "--http-port", "0",
               "--metrics-port", "0", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_stop(
    tiny_bundle: Bundle, recipes: dict[str, Path], tmp_path: Path, needs_triton: None, stop: signal.Signals
) -> None:
    process = serve(tiny_bundle, "--recipe", f"cells={recipes['deep']}", "--log", str(tmp_path / "log"))
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if "lasts" in line or "last as long" in line:
                break
        address = re.search(r"ready: gRPC (\S+),", "".join(lines))
        assert address is not None and "segment_cells version 1" in "".join(lines)
        client = Client(address[1])
        with client.channel:
            np.testing.assert_array_equal(client.segment("cells", GOOD)[0], embedded(recipes["deep"], tiny_bundle, GOOD))
    finally:
        process.send_signal(stop)
        rest = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and rest.strip().endswith("stopped")
    names = {path.name for folder in (Path("/dev/shm"), Path(os.environ.get("TMPDIR", "/tmp"))) for path in folder.iterdir()}
    assert not any(f"-{process.pid}-" in name for name in names)


def test_a_server_that_cannot_start_says_why(tiny_bundle: Bundle, tmp_path: Path, needs_triton: None) -> None:
    certificate = tmp_path / "no.pem"
    certificate.write_text("not a certificate")
    listening = Listening(grpc_port=0, http_port=0, metrics_port=0, certificate=certificate, key=certificate)
    with pytest.raises(PhaselineError) as raised, TritonServer(Deployment(tiny_bundle), listening, log_file=tmp_path / "log"):
        pass
    assert isinstance(raised.value, ServerFailedError) and str(tmp_path / "log") in str(raised.value)


def test_one_server_a_store(
    own: tuple[TritonServer, Path, Path], tiny_bundle: Bundle, recipes: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("phaseline.triton_models.store.LOCK_TIMEOUT_S", 0.3)
    with (
        pytest.raises(UsageError, match="belongs to another running server"),
        TritonServer(Deployment(tiny_bundle), FREE, store=own[1], recipes={"cells": recipes["deep"]}, log_file=tmp_path / "log"),
    ):
        pass
    assert {recipe["name"]: recipe["versions"] for recipe in list_recipes(own[0].address)}["cells"][0] == 1


def test_a_taken_port_is_one_line(server: TritonServer, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    port = server.ports["grpc"]
    assert run(["serve", str(tiny_bundle.path), "--grpc-port", str(port), "--http-port", "0", "--metrics-port", "0"]) == 2
    assert f"grpc cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
