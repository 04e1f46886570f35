"""Who does the blocks: threads of this process, or Dask workers here or elsewhere. All take the same calls.

    None                        threads here
    local:N                     N Dask workers on this machine
    tcp://HOST:PORT             the workers of a scheduler that runs already (tls:// likewise)
    FILE.yaml                   workers that a batch system starts (dask-jobqueue: SLURM, PBS, LSF, SGE, …):

        slurm:                      its name, and what its cluster class takes
          queue: compute
          cores: 8
          memory: 16 GiB
          walltime: "08:00:00"
        workers: 20
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phaseline.clients.classify_common import available_cores
from phaseline.clients.jobs.order import BESIDES
from phaseline.runtime.errors import JobError, MissingExtraError, UsageError

_WAIT_S = 60.0
_TIMES_A_WORKER_MAY_DIE = 10


@dataclass(frozen=True)
class ClusterSpec:
    """What was asked for with ``--cluster``.

    Attributes
    ----------
    kind
        ``threads``, ``local``, ``scheduler`` or ``queue``.
    workers
        Processes that label at the same time; 0 for threads here, and where a scheduler knows.
    address
        Of the scheduler.
    queue, options
        Name of the batch system, and what its cluster class takes.
    """

    kind: str
    workers: int = 0
    address: str = ""
    queue: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def shares_memory(self) -> bool:
        """Whether all processes are on this machine, and share one budget."""
        return self.kind in ("threads", "local")

    @property
    def threads(self) -> int | None:
        """CPU threads for each process, where they share this machine."""
        return max(1, available_cores() // self.workers) if self.kind == "local" else None


def parse_cluster(text: str | None) -> ClusterSpec:
    """Understand ``--cluster``.

    Raises
    ------
    UsageError
        None of the forms above, or a file that is not understood.
    """
    if text is None:
        return ClusterSpec("threads")
    if text.startswith("local:"):
        count = text.removeprefix("local:")
        if not count.isdecimal() or int(count) < 1:
            raise UsageError(f"cluster is {text!r}, expected local:N with a number of processes, e.g. local:4")
        return ClusterSpec("local", int(count))
    if text.startswith(("tcp://", "tls://")):
        return ClusterSpec("scheduler", address=text)
    if text.endswith((".yaml", ".yml")):
        return _read_queue(Path(text))
    raise UsageError(f"cluster is {text!r}, expected local:N, tcp://HOST:PORT of a Dask scheduler, or a dask-jobqueue FILE.yaml")


def _read_queue(path: Path) -> ClusterSpec:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyyaml", "cluster", "--cluster") from error
    example = "'slurm: {cores: 8, memory: 16 GiB, …}' and 'workers: 20'"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read ({str(error).splitlines()[0]}); expected YAML with {example}") from error
    if not isinstance(content, dict) or len(content) != 2 or "workers" not in content:
        raise UsageError(f"{path} holds {list(content) if isinstance(content, dict) else content!r}; expected {example}")
    (queue, options), = ((name, value) for name, value in content.items() if name != "workers")
    workers = content["workers"]
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1 or not isinstance(options, dict):
        raise UsageError(f"{path}: workers is {workers!r} and {queue} is {options!r}; expected {example}")
    return ClusterSpec("queue", workers, queue=str(queue), options=tuple(options.items()))


@dataclass(frozen=True)
class Workers:
    """Whom blocks are given to.

    Attributes
    ----------
    executor
        Takes calls.
    in_flight
        Calls that may be out at the same time; raises JobError when whoever does them is lost.
    description
        For people and reports.
    """

    executor: Executor
    in_flight: Callable[[], int]
    description: str


@contextlib.contextmanager
def open_workers(spec: ClusterSpec, *, at_once: int, memory_bytes: int) -> Iterator[Workers]:
    """Start them, or connect to them.

    Parameters
    ----------
    spec
        From `parse_cluster`.
    at_once
        Blocks of one process that are labelled at the same time; one more is read, one more written.
    memory_bytes
        For all processes on this machine together; Dask restarts one of ``local:N`` that takes far more than its share.

    Raises
    ------
    JobError
        No scheduler answers, or no worker comes.
    UsageError
        A batch system that dask-jobqueue does not know, or settings that it does not take.
    """
    threads = at_once + BESIDES
    if spec.kind == "threads":
        executor = ThreadPoolExecutor(threads, thread_name_prefix="block")
        try:
            yield Workers(executor, lambda: threads, "this process")
        finally:
            executor.shutdown(cancel_futures=True)
        return
    distributed = _distributed()
    with contextlib.ExitStack() as stack:
        address = spec.address
        stack.enter_context(_settings())
        if spec.kind == "local":
            # All on loopback: nothing that others could reach. Left to itself, Dask takes port 8787 of all addresses.
            address = stack.enter_context(distributed.LocalCluster(
                n_workers=spec.workers, threads_per_worker=threads, processes=True, host="127.0.0.1",
                dashboard_address="127.0.0.1:0", memory_limit=memory_bytes // spec.workers, silence_logs=50))
        elif spec.kind == "queue":
            address = stack.enter_context(_queue_cluster(spec))
            address.scale(jobs=spec.workers)
        where = spec.address or spec.queue or "this machine"
        try:
            client = stack.enter_context(distributed.Client(address, timeout=_WAIT_S, set_as_default=False))
            client.wait_for_workers(1, timeout=_WAIT_S * (10 if spec.kind == "queue" else 1))
        except (OSError, TimeoutError) as error:
            raise JobError(f"no Dask workers at {where} ({error}); are scheduler and workers running, with the same phaseline?"
                           ) from error

        def in_flight() -> int:
            try:
                return int(max(1, 2 * sum(client.nthreads().values())))
            except OSError as error:
                raise JobError(f"the Dask scheduler at {where} went away ({error}); what is done stays: go on with --resume when "
                               "it runs again, or without it") from error

        yield Workers(client.get_executor(pure=False), in_flight, f"Dask, {where}")


def _settings() -> Any:
    import dask

    # A worker that dies takes its blocks along; they are done elsewhere, and only a block that kills many is given up.
    return dask.config.set({"distributed.scheduler.allowed-failures": _TIMES_A_WORKER_MAY_DIE,
                            "distributed.comm.retry.count": 3})


def _queue_cluster(spec: ClusterSpec) -> Any:
    try:
        import dask_jobqueue
    except ModuleNotFoundError as error:
        raise MissingExtraError("dask-jobqueue", "cluster", "--cluster with a batch system") from error
    known = {name.removesuffix("Cluster").lower(): name for name in dir(dask_jobqueue) if name.endswith("Cluster")}
    if spec.queue.lower() not in known:
        raise UsageError(f"the batch system is {spec.queue!r}, but dask-jobqueue has {', '.join(sorted(known))}; choose one")
    options = dict(spec.options)
    # Unless told otherwise, no pages about itself for others, nor a port that somebody else's job may have.
    options["scheduler_options"] = {"dashboard_address": "127.0.0.1:0", **(options.get("scheduler_options") or {})}
    try:
        return getattr(dask_jobqueue, known[spec.queue.lower()])(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{spec.queue}: {error}; see dask-jobqueue's {known[spec.queue.lower()]} for what it takes") from error


def _distributed() -> Any:
    try:
        import distributed
    except ModuleNotFoundError as error:
        raise MissingExtraError("distributed", "cluster", "--cluster") from error
    return distributed
