"""Jobs whose blocks others do: Dask workers here, at a scheduler, of a batch system; Triton. Whoever dies, the same bytes."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from phaseline.clients.__main__ import run
from phaseline.clients.jobs import cluster, worker
from phaseline.clients.jobs import job as job_module
from phaseline.clients.jobs.cluster import ClusterSpec, open_workers, parse_cluster
from phaseline.clients.jobs.job import Step, VolumeJob
from phaseline.clients.jobs.order import EngineOrder, InputOrder
from phaseline.clients.jobs.request import JobRequest
from phaseline.runtime.bundle import Bundle
from phaseline.runtime.errors import JobError, MissingExtraError, UsageError
from phaseline.triton_models.listening import Listening
from phaseline.triton_models.repository import Deployment
from phaseline.triton_models.server import TritonServer
from tests.serving import frame
from tests.volumes import (
    ALL,
    blocks_of,
    command,
    cut_file,
    files,
    ledger_lines,
    make_recipe,
    one_by_one,
    one_line,
    read_output,
    request,
    save,
    save_planes,
    tomogram,
)

distributed = pytest.importorskip("distributed", reason="needs the extra `cluster`")

SHAPE = (24, 40, 52)
# A scheduler with a worker, in a process of its own that says where it listens.
SCHEDULER = """
import time
from distributed import LocalCluster
with LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
    print(cluster.scheduler_address, flush=True)
    time.sleep(600)
"""
HERE = f"{socket.gethostname()}:{os.getpid()}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("volume") / "v.npy", tomogram(SHAPE))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes") / "recipe"
    make_recipe(tomogram(SHAPE)).save(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, source: Path, recipe: Path) -> Callable[[str], dict[str, bytes]]:
    """What threads of this process write: all files, by axes."""
    folder, made = tmp_path_factory.mktemp("whole"), dict[str, dict[str, bytes]]()

    def files_of(axes: str) -> dict[str, bytes]:
        if axes not in made:
            assert run(command(source, recipe, folder / f"{axes}.ome.zarr", *ALL, "--axes", axes)) == 0
            made[axes] = files(folder / f"{axes}.ome.zarr")
        return made[axes]

    return files_of


def children() -> set[psutil.Process]:
    """Processes that this one started; Python's own helper of spawned ones left out, which ends with it."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "multiprocessing.resource_tracker" not in " ".join(child.cmdline()):
                found.add(child)
    return found


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = children()
    yield
    _, alive = psutil.wait_procs(children() - before, timeout=20)
    assert [child.cmdline() for child in alive] == []


def workers_of(out: Path) -> set[str]:
    """Who did the blocks."""
    return {line["worker"] for line in ledger_lines(out) if "worker" in line}


def pids_of(out: Path) -> set[int]:
    """Process ids of those who did blocks; all on this machine, and started by this process or what it started."""
    found = {name.rpartition(":") for name in workers_of(out)}
    assert {host for host, _, _ in found} <= {socket.gethostname()}
    return {int(pid) for _, _, pid in found}


def yaml_of(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


class TestWords:
    """`--cluster`."""

    @pytest.mark.parametrize(("text", "expected"), [
        (None, ClusterSpec("threads")),
        ("local:1", ClusterSpec("local", 1)),
        ("local:12", ClusterSpec("local", 12)),
        ("tcp://10.0.0.1:8786", ClusterSpec("scheduler", address="tcp://10.0.0.1:8786")),
        ("tls://node:1", ClusterSpec("scheduler", address="tls://node:1")),
    ])
    def test_understood(self, text: str | None, expected: ClusterSpec) -> None:
        assert parse_cluster(text) == expected

    @pytest.mark.parametrize("text", [
        "", "local", "local:", "local:0", "local:-1", "local:two", "local:1.5", "node:8786", "slurm"])
    def test_not_understood(self, text: str) -> None:
        with pytest.raises(UsageError, match="expected local:N") as caught:
            parse_cluster(text)
        assert "\n" not in str(caught.value)

    def test_a_file(self, tmp_path: Path) -> None:
        path = yaml_of(tmp_path / "a.yaml", "slurm:\n  queue: compute\n  cores: 8\n  walltime: '08:00:00'\nworkers: 20\n")
        expected = ClusterSpec("queue", 20, queue="slurm",
                               options=(("queue", "compute"), ("cores", 8), ("walltime", "08:00:00")))
        assert parse_cluster(str(path)) == expected
        assert not expected.shares_memory and expected.threads is None

    @pytest.mark.parametrize("text", [
        "", "3", "[slurm]", "slurm: {cores: 1}", "workers: 2", "slurm: {cores: 1}\nworkers: 0",
        "slurm: {cores: 1}\nworkers: many", "slurm: 8\nworkers: 2", "slurm: {cores: 1}\npbs: {cores: 1}\nworkers: 2",
        "slurm: {cores: 1\nworkers: 2", "slurm:\nworkers: 2", "workers: true\nslurm: {cores: 1}", "\x00",
    ])
    def test_a_file_that_is_not_understood(self, tmp_path: Path, text: str) -> None:
        path = yaml_of(tmp_path / "a.yml", text)
        with pytest.raises(UsageError, match=r"expected .*slurm") as caught:
            parse_cluster(str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"nowhere\.yaml cannot be read .*No such file"):
            parse_cluster(str(tmp_path / "nowhere.yaml"))

    @pytest.mark.parametrize(("package", "text"), [("distributed", "local:1"), ("dask_jobqueue", "a.yaml"), ("yaml", "a.yaml")])
    def test_what_is_not_installed(
        self, tmp_path: Path, source: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        package: str, text: str,
    ) -> None:
        yaml_of(tmp_path / "a.yaml", "slurm: {cores: 1, memory: 1GiB}\nworkers: 1\n")
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.chdir(tmp_path)
        assert run(command(source, recipe, tmp_path / "o.h5", "--cluster", text)) == 1
        line = one_line(capsys)
        assert "is not installed" in line and ".[cluster]" in line
        with pytest.raises(MissingExtraError):
            spec = parse_cluster(text)
            with open_workers(spec, at_once=1, memory_bytes=1 << 30):
                pass

    # dask-jobqueue leaves half of a cluster where it refuses its settings.
    @pytest.mark.filterwarnings("ignore:Exception ignored in. <function Cluster.__del__:pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.parametrize(("text", "words"), [
        ("lsff: {cores: 1}\nworkers: 1", "dask-jobqueue has "),
        ("slurm: {}\nworkers: 1", "see dask-jobqueue's SLURMCluster for what it takes"),
        ("slurm: {cores: 1, memory: 1GiB, colour: red}\nworkers: 1", "see dask-jobqueue's SLURMCluster"),
    ])
    def test_a_batch_system_that_is_not_known(
        self, tmp_path: Path, source: Path, recipe: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
    ) -> None:
        path = yaml_of(tmp_path / "a.yaml", text)
        assert run(command(source, recipe, tmp_path / "o.h5", "--cluster", str(path))) == 2
        assert words in one_line(capsys)

    def test_no_scheduler(
        self, tmp_path: Path, source: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(cluster, "_WAIT_S", 0.5)
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{bound.getsockname()[1]}"
        assert run(command(source, recipe, tmp_path / "o.ome.zarr", "--cluster", address)) == 1
        line = one_line(capsys)
        assert f"no Dask workers at {address}" in line and "are scheduler and workers running" in line


@pytest.mark.slow
class TestDask:
    """The same bytes as threads here give."""

    @pytest.mark.parametrize("axes", ["plane", "3"])
    def test_local_processes(
        self, tmp_path: Path, source: Path, recipe: Path, whole: Callable[[str], dict[str, bytes]], axes: str
    ) -> None:
        out = tmp_path / "o.ome.zarr"
        assert run(command(source, recipe, out, *ALL, "--axes", axes, "--cluster", "local:2")) == 0
        assert files(out) == whole(axes)
        assert len(pids_of(out)) == 2 and HERE not in workers_of(out)
        assert len(blocks_of(out)) == len(set(blocks_of(out)))

    def test_begun_here_and_ended_there(
        self, tmp_path: Path, source: Path, recipe: Path, whole: Callable[[str], dict[str, bytes]]
    ) -> None:
        out = tmp_path / "o.ome.zarr"
        stop_after_one(request(source, recipe, out, confidence=True, probabilities=True))
        assert workers_of(out) == {HERE}
        assert run(command(source, recipe, out, *ALL, "--cluster", "local:1", "--resume")) == 0
        assert files(out) == whole("plane")
        assert HERE in workers_of(out) and len(pids_of(out)) == 2

    def test_a_worker_is_killed(
        self, tmp_path: Path, source: Path, recipe: Path, whole: Callable[[str], dict[str, bytes]]
    ) -> None:
        out, killed = tmp_path / "o.ome.zarr", list[int]()
        asked = request(source, recipe, out, confidence=True, probabilities=True, slices=1, cluster=parse_cluster("local:2"))

        def kill(step: Step) -> None:
            if len(killed) < 2 and step.done > step.total * (len(killed) + 1) // 4:
                pid = int(next(line["worker"] for line in reversed(ledger_lines(out)) if "worker" in line).rpartition(":")[2])
                if pid not in killed:
                    (found,) = [child for child in children() if child.pid == pid]
                    found.kill()
                    killed.append(pid)

        with VolumeJob.open(asked) as job:
            outcome = job.run(progress=kill)
        assert len(killed) == 2 and outcome.failed == ()
        # Nobody asked for blocks of one plane but this test.
        found, expected = read_output(out), one_by_one(recipe, tomogram(SHAPE))
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert sorted(blocks_of(out)) == [("segment", i) for i in range(SHAPE[0])]

    def test_a_scheduler_that_runs_already(
        self, tmp_path: Path, source: Path, recipe: Path, whole: Callable[[str], dict[str, bytes]]
    ) -> None:
        with distributed.LocalCluster(n_workers=2, threads_per_worker=2, host="127.0.0.1", scheduler_port=0,
                                      dashboard_address="127.0.0.1:0", silence_logs=50) as there:
            address = there.scheduler_address
            for axes in ("plane", "row"):  # One job after another: workers change over.
                out = tmp_path / f"{axes}.ome.zarr"
                assert run(command(source, recipe, out, *ALL, "--axes", axes, "--cluster", address)) == 0
                assert files(out) == whole(axes)
                assert HERE not in workers_of(out)

    def test_a_scheduler_that_goes_away(
        self, tmp_path: Path, source: Path, recipe: Path, whole: Callable[[str], dict[str, bytes]]
    ) -> None:
        out = tmp_path / "o.ome.zarr"
        with subprocess.Popen([sys.executable, "-c", SCHEDULER], stdout=subprocess.PIPE, text=True) as scheduler:
            assert scheduler.stdout is not None
            spec = parse_cluster(scheduler.stdout.readline().strip())
            asked = request(source, recipe, out, confidence=True, probabilities=True, cluster=spec)
            with pytest.raises(JobError, match=r"went away .*go on with --resume"), VolumeJob.open(asked) as job:
                job.run(progress=lambda step: scheduler.kill())
        assert 0 < len(blocks_of(out)) < 8 and blocks_of(out, "failed") == []
        assert run(command(source, recipe, out, *ALL, "--resume")) == 0
        assert files(out) == whole("plane")

    def test_what_workers_cannot_do_is_said(
        self, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Errors come back as they are: of a plane, and of a worker's disk."""
        folder = save_planes(tmp_path / "in", tomogram(SHAPE))
        cut_file(folder / "s04.tif")
        assert run(command(folder, recipe, tmp_path / "o.ome.zarr", "--cluster", "local:1")) == 1
        first, last = capsys.readouterr().err.splitlines()
        assert "plane 4 " in first and "s04.tif" in first and "--allow-failed" in last
        assert len(blocks_of(tmp_path / "o.ome.zarr")) == 7

    @pytest.mark.parametrize("axes", ["plane"])
    def test_a_batch_system(
        self, tmp_path: Path, source: Path, recipe: Path, whole: Callable[[str], dict[str, bytes]], axes: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """SLURM's commands are stand-ins that start the job script here."""
        pytest.importorskip("dask_jobqueue", reason="needs the extra `cluster`")
        bin_, log = tmp_path / "bin", tmp_path / "jobs"
        bin_.mkdir()
        log.mkdir()
        script(bin_ / "sbatch", f'cp "$1" {log}/script; setsid sh {log}/script > {log}/out 2>&1 & echo "Submitted batch job $!"')
        script(bin_ / "scancel", f'echo "$@" >> {log}/cancelled; for job in "$@"; do kill -KILL -- "-$job"; done')
        monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
        monkeypatch.setattr(cluster, "_WAIT_S", 6.0)
        path = yaml_of(tmp_path / "slurm.yaml", f"""
slurm:
  queue: compute
  cores: 1
  memory: 1 GiB
  walltime: "00:10:00"
  log_directory: {log}
  local_directory: {tmp_path}
  python: {sys.executable}
  scheduler_options: {{host: "127.0.0.1", dashboard_address: "127.0.0.1:0"}}
workers: 1
""")
        out = tmp_path / "o.ome.zarr"
        assert run(command(source, recipe, out, *ALL, "--axes", axes, "--cluster", str(path))) == 0
        assert files(out) == whole(axes)
        assert HERE not in workers_of(out)
        asked = (log / "script").read_text(encoding="utf-8")
        assert "#SBATCH -p compute" in asked and "#SBATCH -t 00:10:00" in asked


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def stop_after_one(asked: JobRequest) -> None:
    """Begin a job, and leave it after its first block."""

    def leave(step: Step) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), VolumeJob.open(asked) as job:
        job.run(progress=leave)


class TestProcesses:
    """What `perform` keeps open."""

    def test_one_order_at_a_time(self, source: Path, recipe: Path, tmp_path: Path) -> None:
        first, second = (job_module._order(request(source, recipe, tmp_path / name), 3) for name in ("a.ome.zarr", "b.ome.zarr"))
        closed = []
        try:
            for order in (first, second, first):
                with pytest.raises(Exception, match="does not exist"):  # there is no store: it fails after opening
                    worker.perform(order, 0, 0)
                closed.append(set(worker._workers))
        finally:
            worker.close_workers()
        assert closed == [{first}, {second}, {first}] and worker._workers == {}


# --- Triton -----------------------------------------------------------------------------------------------------------

PLANES = 10


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume of the frames that the server's recipes are for."""
    return save(tmp_path_factory.mktemp("frames") / "v.npy", np.stack([frame(i, 60, 70) for i in range(PLANES)]))


def deep_request(source: Path, recipe: Path, out: Path, server: str | None, **changes: Any) -> JobRequest:
    engine = EngineOrder(recipe, servers=() if server is None else (server,), threads=1, timeout_s=changes.pop("timeout_s", 60.0))
    return JobRequest(InputOrder(source), engine, out, **{"slices": 1, "confidence": True, **changes})


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory, recipes: dict[str, Path], frames: Path) -> dict[str, bytes]:
    """What a local engine gives."""
    out = tmp_path_factory.mktemp("deep") / "o.ome.zarr"
    with VolumeJob.open(deep_request(frames, recipes["deep"], out, None)) as job:
        job.run()
    return files(out)


@pytest.mark.triton
@pytest.mark.slow
class TestTriton:
    """Deep features come from servers."""

    def test_the_same_bits(
        self, tmp_path: Path, server: TritonServer, recipes: dict[str, Path], frames: Path, deep: dict[str, bytes]
    ) -> None:
        out = tmp_path / "o.ome.zarr"
        words = ["segment", str(frames), "--recipe", str(recipes["deep"]), "--out", str(out), "--server", server.address,
                 "--block", "1", "--confidence", "--quiet"]
        assert run(words) == 0
        assert files(out) == deep

    def test_through_dask(
        self, tmp_path: Path, server: TritonServer, recipes: dict[str, Path], frames: Path, deep: dict[str, bytes]
    ) -> None:
        out = tmp_path / "o.ome.zarr"
        with VolumeJob.open(deep_request(frames, recipes["deep"], out, server.address, cluster=parse_cluster("local:2"))) as job:
            job.run()
        assert files(out) == deep

    def test_a_server_that_is_killed_and_comes_back(
        self, tmp_path: Path, needs_triton: None, tiny_bundle: Bundle, recipes: dict[str, Path], frames: Path,
        deep: dict[str, bytes],
    ) -> None:
        out, killed = tmp_path / "o.ome.zarr", list[int]()
        listening = Listening(grpc_port=0, http_port=0, metrics_port=0)
        with TritonServer(Deployment(tiny_bundle), listening, log_file=tmp_path / "triton.log") as mortal:

            def kill(step: Step) -> None:
                if step.done >= step.total * (3 * len(killed) + 2) // PLANES and len(killed) < 2:
                    killed.append(mortal.pid)
                    psutil.Process(mortal.pid).kill()

            with VolumeJob.open(deep_request(frames, recipes["deep"], out, mortal.address)) as job:
                resume_until_done(lambda: job.run(progress=kill),
                                  deep_request(frames, recipes["deep"], out, mortal.address))
            # After the second kill the job may end before the keeper has seen it.
            assert mortal.restarts and mortal.failure is None
        assert len(killed) == 2
        assert files(out) == deep
        assert sorted(blocks_of(out)) == [("segment", i) for i in range(PLANES)]
        assert blocks_of(out, "failed") == []

    def test_a_server_that_stays_away(
        self, tmp_path: Path, needs_triton: None, tiny_bundle: Bundle, recipes: dict[str, Path], frames: Path,
        deep: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(job_module, "_PAUSE_S", 0.0)
        out, gone = tmp_path / "o.ome.zarr", list[Step]()
        mortal = TritonServer(Deployment(tiny_bundle), Listening(grpc_port=0, http_port=0, metrics_port=0),
                              log_file=tmp_path / "triton.log")
        with mortal:

            def leave(step: Step) -> None:
                if not gone:
                    gone.append(step)
                    mortal.__exit__(None, None, None)

            asked = deep_request(frames, recipes["deep"], out, mortal.address, timeout_s=2.0)
            with pytest.raises(JobError, match="go on with --resume") as caught, VolumeJob.open(asked) as job:
                job.run(progress=leave)
        assert "\n" not in str(caught.value) and mortal.address in str(caught.value)
        assert 0 < len(blocks_of(out)) < PLANES and blocks_of(out, "failed") == []
        # Elsewhere, or here: it is the same job.
        with VolumeJob.open(deep_request(frames, recipes["deep"], out, None), resume=True) as job:
            job.run()
        assert files(out) == deep


def resume_until_done(first: Callable[[], Any], asked: JobRequest) -> None:
    """Run a job; where it stops with a clear word to go on, go on."""
    try:
        first()
    except JobError as error:
        assert "go on with --resume" in str(error)
        with VolumeJob.open(asked, resume=True) as job:
            job.run()
