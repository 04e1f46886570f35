"""Shared memory between client and server: nothing is left, nothing is used twice too early, and why it is not used is said."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from phaseline.clients.remote import TritonSource
from phaseline.clients.remote_memory import Region, Regions, why_not_here
from phaseline.runtime.bundle import Bundle
from phaseline.runtime.errors import OutputError, ServerRefusedError, ServerTimeoutError
from phaseline.runtime.ownership import SHARED_MEMORY, owned_name
from phaseline.runtime.source import LocalSource
from tests.serving import shared_memory

if TYPE_CHECKING:
    from phaseline.triton_models.server import TritonServer

grpc = pytest.importorskip("grpc")
pb = pytest.importorskip("tritonclient.grpc.service_pb2")
service = pytest.importorskip("tritonclient.grpc.service_pb2_grpc")


class Registrations:
    """A server's side, made up: what is registered with it."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.refuses = False
        self.refused = 0

    def __call__(self, procedure: str, message: Any, timeout_s: float) -> Any:
        if procedure == "SystemSharedMemoryRegister":
            self.names.append(message.name)
        elif procedure == "SystemSharedMemoryUnregister":
            if self.refuses:
                self.refused += 1
                raise ServerRefusedError("it is in use")
            self.names.remove(message.name)
        elif procedure == "SystemSharedMemoryStatus":
            return pb.SystemSharedMemoryStatusResponse(
                regions={name: pb.SystemSharedMemoryStatusResponse.RegionStatus(name=name) for name in self.names})
        return pb.SystemSharedMemoryStatusResponse()


def registered(address: str) -> set[str]:
    with grpc.insecure_channel(address) as channel:
        stub = service.GRPCInferenceServiceStub(channel)
        return set(stub.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest()).regions)


def own_regions() -> set[str]:
    """This process's regions in /dev/shm."""
    return {name for name in shared_memory() if name.startswith("phaseline-client-") and f"-{os.getpid()}-" in name}


def test_what_is_written_can_be_read_and_nothing_is_left() -> None:
    region = Region(100, 48)
    assert (SHARED_MEMORY / region.name).stat().st_mode & 0o777 == 0o600
    tensor = region.write(np.arange(100, dtype=np.uint8).reshape(4, 25))
    assert (tensor.offset, tensor.size_bytes, tensor.dtype, tensor.shape) == (0, 100, "uint8", (4, 25))
    place = region.output()
    values = np.arange(24, dtype=np.float16)
    with (SHARED_MEMORY / region.name).open("r+b") as file:
        file.seek(place.offset)
        file.write(values.tobytes())
    assert np.array_equal(region.read(np.float16, (2, 12)), values.reshape(2, 12))
    region.close()
    assert not own_regions()


def test_a_region_is_used_again_only_after_an_answer() -> None:
    server = Registrations()
    regions = Regions(server, 64, 64)
    with regions.lend(64) as region:
        first = region.name
    with regions.lend(64) as region, regions.lend(64) as at_the_same_time:
        assert region.name == first != at_the_same_time.name
    with pytest.raises(ServerTimeoutError), regions.lend(64) as region:
        given_up = region.name
        raise ServerTimeoutError("no answer")
    used = set()
    for _ in range(3):
        with regions.lend(64) as region, regions.lend(64) as other:
            used |= {region.name, other.name}
    assert given_up not in used
    regions.close()
    assert server.names == []
    assert not own_regions()


def test_outputs_of_another_size_have_regions_of_their_own() -> None:
    server = Registrations()
    regions = Regions(server, 64, 64)
    with regions.lend(64) as small, regions.lend(4096) as large:
        assert (small.output().size_bytes, large.output().size_bytes) == (64, 4096)
        names = {small.name, large.name}
    with regions.lend(4096) as large, regions.lend(64) as small:
        assert {small.name, large.name} == names and large.output_bytes == 4096
    regions.close()
    assert server.names == [] and not own_regions()


def test_one_that_is_lent_at_closing_is_removed_when_it_comes_back() -> None:
    server = Registrations()
    regions = Regions(server, 64, 64)
    with regions.lend(64):
        regions.close()
        assert len(server.names) == 1
    assert server.names == []
    assert not own_regions()


def test_what_the_server_did_not_let_go_of_is_tried_again() -> None:
    server = Registrations()
    regions = Regions(server, 64, 64)
    with pytest.raises(ServerTimeoutError), contextlib.ExitStack() as lent:
        for _ in range(5):
            lent.enter_context(regions.lend(64))
        raise ServerTimeoutError("no answer")
    server.refuses = True
    regions.close()
    left = set(server.names)
    # A server that does not answer must not hold up the closing once for each region.
    assert server.refused < len(left) == 5 and not own_regions()
    server.refuses = False
    with_others = Regions(server, 64, 64)
    assert len(server.names) == 1 and not left & set(server.names)
    with_others.close()
    assert server.names == [] and not own_regions()


def test_regions_of_others_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may be hidden from other users: that it is not seen does not say that it ended."""
    mine = owned_name("client")
    namespace = mine.split("-")[2]
    killed = f"phaseline-client-{namespace}-999999999-1-00c0ffee"
    path = SHARED_MEMORY / killed
    path.touch()
    try:
        server = Registrations()
        server.names += [killed, "something else"]
        with monkeypatch.context() as patched:
            patched.setattr(os, "getuid", lambda: 12345)
            Regions(server, 64, 64).close()
            assert server.names == [killed, "something else"] and path.exists()
        Regions(server, 64, 64).close()
        assert server.names == ["something else"] and not path.exists()
    finally:
        path.unlink(missing_ok=True)


def test_no_room() -> None:
    with pytest.raises(OutputError, match="no shared memory of"):
        Region(1 << 50, 0)
    assert not own_regions()


@pytest.mark.parametrize(("server", "reason"), [
    ("127.0.0.1:8001", None), ("127.0.0.2:8001", None), ("localhost:1", None), ("[::1]:8001", None),
    ("10.1.2.3:8001", "not on this host"), ("beamline.example:8001", "not on this host"),
])
def test_which_servers_are_here(server: str, reason: str | None) -> None:
    assert why_not_here(server) == reason


@pytest.mark.triton
def test_a_killed_clients_regions_are_swept(server: TritonServer) -> None:
    code = ("import sys, time\nfrom phaseline.clients.remote import TritonSource\n"
            f"with TritonSource({server.address!r}, transport='shared-memory') as source:\n"
            "    print('open', flush=True)\n    time.sleep(60)\n")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "open\n"
        client.send_signal(signal.SIGKILL)
        client.wait()
    name = f"-{client.pid}-"
    assert any(name in left for left in shared_memory())
    assert any(name in left for left in registered(server.address))
    with TritonSource(server.address, transport="shared-memory"):
        assert not any(name in left for left in shared_memory())
        assert not any(name in left for left in registered(server.address))
    assert not registered(server.address)


@pytest.mark.triton
def test_a_server_that_forgot_the_regions_is_given_them_again(server: TritonServer, tiny_bundle: Bundle) -> None:
    spec = tiny_bundle.spec
    tiles = np.random.default_rng(0).integers(0, 256, (12, spec.in_channels, spec.tile_px, spec.tile_px), dtype=np.uint8)
    with LocalSource(tiny_bundle, "cpu") as local, TritonSource(server.address, transport="shared-memory") as source:
        source.patch_features(tiles)
        with grpc.insecure_channel(server.address) as channel:
            service.GRPCInferenceServiceStub(channel).SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest())
        assert np.array_equal(source.patch_features(tiles), local.patch_features(tiles))
        assert registered(server.address)


@pytest.mark.triton
@pytest.mark.slow
def test_a_server_that_allows_none(needs_triton: None, tiny_bundle: Bundle, tmp_path: Path) -> None:
    from phaseline.triton_models.listening import Listening
    from phaseline.triton_models.repository import Deployment
    from phaseline.triton_models.server import TritonServer

    before = {thread.name for thread in threading.enumerate()}
    spec = tiny_bundle.spec
    listening = Listening(grpc_port=0, http_port=0, metrics_port=0)
    with TritonServer(Deployment(tiny_bundle), listening, log_file=tmp_path / "log") as closed:
        with (pytest.raises(ServerRefusedError, match="use --transport grpc"),
              TritonSource(closed.address, transport="shared-memory")):
            pass
        with TritonSource(closed.address) as source:
            assert "(gRPC: no shared memory, " in source.engine_choice
            assert source.patch_features(np.zeros((1, spec.in_channels, 56, 56), np.uint8)).shape[0] == 1
    assert not {thread.name for thread in threading.enumerate() if thread.name.startswith("phaseline")} - before
