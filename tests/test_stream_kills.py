"""What is killed with SIGKILL, at any moment, comes back by itself: a back-end process, Triton, the client, the keeper."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
import psutil
import pytest
import tifffile
from tritonclient.grpc import service_pb2 as pb

from phaseline.clients.images import read_image
from phaseline.clients.kserve import open_channel, open_stub
from phaseline.clients.recipe import recipe_hash
from phaseline.clients.segmenter import Segmenter
from phaseline.clients.stream import Counts, Frame, FrameStream
from phaseline.runtime.bundle import Bundle
from phaseline.runtime.errors import ServerError
from phaseline.runtime.ownership import SHARED_MEMORY
from phaseline.triton_models.listening import Listening
from phaseline.triton_models.repository import Deployment
from phaseline.triton_models.server import TritonServer
from tests.serving import frame as picture
from tests.serving import left_behind, shared_memory

pytestmark = [pytest.mark.triton, pytest.mark.slow]

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "beamline.py"
FRAMES = 200
PORTS = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}
# A keeper in a process of its own. It says where the server listens and Triton's process id, and serves until it is killed.
KEEPER = """
import sys
from pathlib import Path
from phaseline.runtime.bundle import open_bundle
from phaseline.runtime.ownership import SHARED_MEMORY
from phaseline.triton_models.repository import Deployment
from phaseline.triton_models.listening import Listening
from phaseline.triton_models.server import TritonServer
bundle, recipe, log = sys.argv[1:]
listening = Listening(grpc_port=0, http_port=0, metrics_port=0)
with TritonServer(Deployment(open_bundle(bundle)), listening, recipes={"deep": Path(recipe)}, log_file=Path(log)) as server:
    print(server.pid, flush=True)
    server.wait()
"""


@pytest.fixture(scope="module")
def pictures() -> list[npt.NDArray[np.uint16]]:
    """Small frames, each another."""
    return [picture(seed, 60, 64) for seed in range(FRAMES)]


@pytest.fixture(scope="module")
def expected(recipes: dict[str, Path], pictures: list[npt.NDArray[np.uint16]]) -> list[npt.NDArray[np.generic]]:
    """Their labels, made without a server."""
    with Segmenter.open(recipes["deep"], threads=2) as segmenter:
        return [segmenter.segment(image).labels for image in pictures]


def regions_of(pid: int) -> set[str]:
    """Shared memory that a process made, or others for it; other test runs on this machine have theirs."""
    return {name for name in shared_memory() if f"-{pid}-" in name}


@pytest.fixture(scope="module")
def mortal(
    needs_triton: None, tiny_bundle: Bundle, recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """A server that may be killed."""
    log = tmp_path_factory.mktemp("mortal") / "triton.log"
    before = regions_of(os.getpid())
    with TritonServer(Deployment(tiny_bundle), Listening(**PORTS), recipes={"deep": recipes["deep"]}, log_file=log) as server:
        yield server
    assert regions_of(os.getpid()) <= before


def kill_back_end(server: TritonServer, model: str) -> None:
    """SIGKILL the process of a model, if it has one at this moment."""
    for child in psutil.Process(server.pid).children():
        if any(f"/{model}/" in part for part in child.cmdline()):
            child.kill()


def is_served(server: TritonServer) -> bool:
    with open_channel(server.address) as channel:
        try:
            return bool(open_stub(channel).ModelReady(pb.ModelReadyRequest(name="segment_deep"), timeout=5).ready)
        except grpc.RpcError:
            return False


def kill_triton(server: TritonServer) -> None:
    psutil.Process(server.pid).kill()


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


async def stream_and_kill(
    server: TritonServer, pictures: list[npt.NDArray[np.uint16]], expected: list[npt.NDArray[np.generic]],
    kills: dict[int, Callable[[], None]], deadline_s: float,
) -> Counts:
    """Stream all frames; after the results with these numbers, kill. Each frame is done and right, or has a typed error."""
    async with FrameStream(server.address, "deep", deadline_s=deadline_s) as stream, asyncio.TaskGroup() as group:

        async def feed() -> None:
            for i, image in enumerate(pictures):
                await stream.send(Frame(str(i), image))
            stream.end_input()

        group.create_task(feed())
        number = 0
        async for result in stream.results():
            assert result.id == str(number)
            if result.status == "done":
                assert np.array_equal(result.labels, expected[number])
            else:
                assert isinstance(result.error, ServerError), result
            if number in kills:
                await asyncio.to_thread(kills[number])
            number += 1
        assert number == len(pictures)
    return stream.counts


def test_a_stream_survives_killed_servers(
    mortal: TritonServer, pictures: list[npt.NDArray[np.uint16]], expected: list[npt.NDArray[np.generic]]
) -> None:
    moments = sorted(random.Random(1).sample(range(5, FRAMES - 20), 4))
    acts: list[Callable[[], None]] = [
        lambda: kill_back_end(mortal, "backbone"),
        lambda: kill_triton(mortal),
        lambda: kill_back_end(mortal, "segment_deep"),
        lambda: kill_triton(mortal),
    ]
    counts = asyncio.run(stream_and_kill(mortal, pictures, expected, dict(zip(moments, acts, strict=True)), 60.0))
    assert counts == Counts(sent=FRAMES, done=FRAMES)
    assert len(mortal.restarts) == 2 and mortal.failure is None


def test_with_a_short_deadline_every_frame_is_accounted_for(
    mortal: TritonServer, pictures: list[npt.NDArray[np.uint16]], expected: list[npt.NDArray[np.generic]]
) -> None:
    some = slice(0, 40)
    counts = asyncio.run(stream_and_kill(mortal, pictures[some], expected[some], {10: lambda: kill_triton(mortal)}, 1.0))
    assert counts.sent == 40 == counts.done + counts.late + counts.failed
    assert counts.late > 0


def test_the_example_goes_on_after_kills(
    mortal: TritonServer, recipes: dict[str, Path], pictures: list[npt.NDArray[np.uint16]],
    expected: list[npt.NDArray[np.generic]], tmp_path: Path,
) -> None:
    scan, out = tmp_path / "scan.tif", tmp_path / "labels"
    with tifffile.TiffWriter(scan) as tiff:
        for image in pictures:
            tiff.write(image, contiguous=False)
    ledger = out / "ledger.jsonl"
    command = [sys.executable, str(EXAMPLE), mortal.address, "deep", str(scan), str(out)]
    chance, clients = random.Random(2), []

    def lines() -> int:
        return ledger.read_bytes().count(b"\n") if ledger.exists() else 0

    wait_until(lambda: is_served(mortal), "the server does not come back")
    for _ in range(3):
        enough = lines() + chance.randint(5, 50)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as client:
            while lines() < enough:
                assert client.poll() is None, "the example ended before it was killed"
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.05))
            client.kill()
            clients.append(client.pid)
    with ledger.open("a", encoding="utf-8") as stream:
        stream.write('{"id": "scan-00199", "sta')  # As a kill in the midst of writing leaves it.
    end = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert end.returncode == 0, end.stderr
    assert "late 0, failed 0, unusable 0" in end.stdout

    header, *added = ledger.read_text(encoding="utf-8").splitlines()
    assert json.loads(header) == {"recipe": recipe_hash(recipes["deep"])}
    entries: dict[str, list[str]] = defaultdict(list)
    for line in added:
        if line != '{"id": "scan-00199", "sta':
            entry = json.loads(line)
            entries[entry["id"]].append(entry["status"])
    assert entries == {f"scan-{i:05d}": ["done"] for i in range(FRAMES)}
    for i, labels in enumerate(expected):
        assert np.array_equal(read_image(out / f"scan-{i:05d}.tif"), labels)
    assert {path.name for path in out.glob("*.tif")} == {f"scan-{i:05d}.tif" for i in range(FRAMES)}
    assert [regions_of(pid) for pid in clients] == [set()] * 3


def test_the_example_says_what_failed(mortal: TritonServer, tmp_path: Path) -> None:
    scan, out = tmp_path / "scan", tmp_path / "labels"
    scan.mkdir()
    np.save(scan / "good.npy", picture(1, 60, 64))
    np.save(scan / "wrong.npy", np.zeros((4, 4), np.uint8))
    (scan / "broken.png").write_bytes(b"no picture")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(EXAMPLE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    end = run(mortal.address, "deep", str(scan), str(out))
    assert end.returncode == 1 and "done 1, done before 0, late 0, failed 0, unusable 2" in end.stdout
    end = run(mortal.address, "deep", str(scan), str(out))
    assert end.returncode == 1 and "done 0, done before 1, late 0, failed 0, unusable 2" in end.stdout
    end = run(mortal.address, "deep", str(tmp_path / "nothing"), str(out))
    assert end.returncode == 2 and "nothing does not exist" in end.stderr and "Traceback" not in end.stderr
    end = run(mortal.address, "nothing", str(scan), str(out), "--deadline", "0.5")
    assert end.returncode == 1 and "segment_nothing" in end.stderr and "Traceback" not in end.stderr


def test_a_killed_keeper_takes_the_server_with_it(
    needs_triton: None, tiny_bundle: Bundle, recipes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A temporary folder of this test's own: other servers that start on this machine would sweep the usual one.
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    command = [sys.executable, "-c", KEEPER, str(tiny_bundle.path), str(recipes["deep"]), str(tmp_path / "triton.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(temporary)}) as keeper:
        assert keeper.stdout is not None
        server = psutil.Process(int(keeper.stdout.readline()))
        processes = [server, *server.children(recursive=True)]
        assert len(processes) >= 4  # backbone, recipes and segment_deep have one each.
        keeper.kill()
    wait_until(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes),
               "processes outlive their keeper")
    (abandoned,) = temporary.glob(f"phaseline-serve-*-{keeper.pid}-*")
    assert abandoned.name in left_behind()
    region = SHARED_MEMORY / f"{abandoned.name}-region"
    region.touch()
    with TritonServer(Deployment(tiny_bundle), Listening(**PORTS), log_file=tmp_path / "next.log"):
        assert not abandoned.exists() and regions_of(keeper.pid) == set()
