"""A job over a volume: plan, blocks, certificate; stopped at any moment and gone on with, it gives the same bits.

    JobRequest ──▶ VolumeJob.open: input, recipe, one slice measured ──▶ Plan (refused if it cannot fit) ──▶ Ledger, working store
                       │
                      run: stage by stage, block by block ──▶ BlockWorker (threads here, or Dask) ──▶ a line in the ledger each
                       │
                     finish: pyramid ──▶ certificate ──▶ OUT
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from phaseline.clients.batch import SERVERS_LOST
from phaseline.clients.jobs.blocks import Stage
from phaseline.clients.jobs.certify import certify
from phaseline.clients.jobs.cluster import Workers, open_workers
from phaseline.clients.jobs.ledger import Ledger, Line, bad_planes, check_same, differing, failed_blocks, has_begun
from phaseline.clients.jobs.memory import MemoryWatch, available_bytes
from phaseline.clients.jobs.order import Order
from phaseline.clients.jobs.pictures import check_matplotlib
from phaseline.clients.jobs.plan import Plan, make_plan, measure
from phaseline.clients.jobs.remaining import Key, has_same_voxels, remaining
from phaseline.clients.jobs.request import JobRequest
from phaseline.clients.jobs.worker import BlockResult, BlockWorker, lent, perform
from phaseline.clients.recipe import recipe_hash
from phaseline.clients.volumes.finished import finish, output_files
from phaseline.clients.volumes.pyramid import build_pyramid, remove_pyramid
from phaseline.clients.volumes.region import Region
from phaseline.clients.volumes.writing import OutputLayout
from phaseline.clients.volumes.zarr_sink import ZarrSink, create_store
from phaseline.runtime.errors import JobError, OutputError, OutputExistsError, PhaselineError

Say = Callable[[str], None]
_PAUSE_S = 5.0


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes
    ----------
    outputs
        What was written.
    report
        The certificate's content.
    failed
        What could not be labelled, for people.
    blocks
        Done in this run.
    seconds
        Of this run.
    """

    outputs: tuple[Path, ...]
    report: dict[str, Any]
    failed: tuple[str, ...]
    blocks: int
    seconds: float


@dataclass(frozen=True)
class Step:
    """How far a job is.

    Attributes
    ----------
    stage
        Its name.
    done, total
        Voxels of all stages.
    fresh
        Voxels done in this run.
    """

    stage: str
    done: int
    total: int
    fresh: int


class VolumeJob:
    """A job that was planned; made by `VolumeJob.open`.

    Attributes
    ----------
    request, plan
        What was asked for, and what it will take.
    worker
        Of this process: open input and segmenter.
    """

    def __init__(self, request: JobRequest, plan: Plan, worker: BlockWorker, header: Line, ledger: Ledger | None) -> None:
        self.request, self.plan, self.worker = request, plan, worker
        self._header, self._ledger = header, ledger

    @classmethod
    @contextlib.contextmanager
    def open(cls, request: JobRequest, *, resume: bool = False, overwrite: bool = False) -> Iterator[VolumeJob]:
        """Open input and recipe, and plan; writes nothing yet.

        Parameters
        ----------
        request
            The job.
        resume
            Go on with one that was begun; where none was, begin it.
        overwrite
            Replace what is there.

        Raises
        ------
        OutputExistsError
            The output exists, and neither was asked for.
        JobError
            It cannot fit; or there is one that would give something else now.
        PhaselineError
            Input or recipe cannot be used.
        """
        check_matplotlib()
        # A kill may come before anything is written.
        resume = resume and has_begun(request.folder)
        if not resume and not overwrite:
            request.check_new()
        ledger = Ledger.resume(request.folder) if resume else None
        slices = request.slices if ledger is None else int(ledger.header["slices"])
        with BlockWorker(_order(request, slices or 1)) as worker:
            plan = _plan(request, worker, slices)
            header = _header(request, worker, plan)
            # A plane that could not be used may have been put right: the file is another, its other planes are the same.
            if ledger is not None and not (differing(ledger.header, header) == ["input"] and has_same_voxels(worker, ledger)):
                check_same(ledger.path, ledger.header, header)
            plan.check()
            worker.order = _order(request, plan.slices)
            yield cls(request, plan, worker, header, ledger)

    def run(self, *, say: Say = lambda line: None, progress: Callable[[Step], None] = lambda step: None,
            overwrite: bool = False) -> Outcome:
        """Do all that is left, and complete the output.

        Parameters
        ----------
        say
            Called with a line for people now and then.
        progress
            Called after each block.
        overwrite
            Remove what is there before.

        Raises
        ------
        JobError
            Another process works on the job. Or servers were lost for good, or a direction of three could not be labelled: what
            is done stays, and the job can be gone on with.
        OutputError
            Something could not be written; likewise.
        OutputExistsError
            It is finished already.
        """
        request, begun = self.request, time.perf_counter()
        new = self._ledger is None
        if new and overwrite:
            request.remove()
        try:
            request.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{request.folder} cannot be made ({error.strerror}); choose another output") from error
        held = Ledger.create(request.folder, self._header) if self._ledger is None else self._ledger
        with held as ledger, MemoryWatch() as watch:
            if ledger.finished is not None and not (request.is_store and self._failed(ledger)):
                self._remove_working_files()
                raise OutputExistsError(f"{request.out} is finished already; check it with phaseline verify {request.out}, or "
                                        "begin anew with --overwrite")
            self._prepare_store(new=new)
            left = remaining(self.worker, ledger)
            ledger.append({"run": datetime.now(UTC).isoformat(timespec="seconds")})
            count = self._blocks(ledger, left, say, progress, begun)
            failed = self._failed(ledger)
            outputs = self._complete(ledger, say, failed, watch, begun)
        return Outcome(outputs[0], outputs[1], failed, count, time.perf_counter() - begun)

    def _prepare_store(self, *, new: bool) -> None:
        store = self.request.store
        with contextlib.suppress(OSError):
            store.rmdir()  # an empty folder holds nothing
        if not new and store.is_dir():
            ZarrSink(store).clean()
            return
        info, region = self.worker.volume.info, self.request.input.region or Region()
        size = (1.0, 1.0, 1.0) if info.voxel is None else tuple(s / n for s, n in zip(info.voxel.size, region.step, strict=True))
        z, y, x = (a * s for a, s in zip(region.start, size, strict=True))
        last = self.worker.stages[-1]
        create_store(store, OutputLayout(info.shape, last.axis, self.plan.slices, self.worker.segmenter.recipe.classes,
                                         self.request.arrays, info.voxel, (z, y, x)))

    def _blocks(self, ledger: Ledger, left: list[Key], say: Say, progress: Callable[[Step], None], begun: float) -> int:
        """Do all blocks that are left; returns how many that were."""
        sizes = [[box.size for box in stage.blocks] for stage in self.worker.stages]
        total, fresh, count = sum(map(sum, sizes)), 0, 0
        if not left:
            return 0
        remove_pyramid(self.request.store)
        done = total - sum(sizes[stage][block] for stage, block in left)
        cluster = self.request.cluster
        with contextlib.ExitStack() as stack:
            if cluster.kind == "threads":
                stack.enter_context(lent(self.worker))
            workers = stack.enter_context(open_workers(cluster, at_once=self.worker.order.at_once,
                                                       memory_bytes=self.plan.budget_bytes))
            say(f"engine: {self.worker.segmenter.engine_choice}; blocks are done by {workers.description}")
            for number, stage in enumerate(self.worker.stages):
                if stage.name == "combine":
                    _check_directions(ledger)
                blocks = [block for of, block in left if of == number]
                for block, line in self._stage(number, blocks, workers, say):
                    ledger.append({"stage": stage.name, "block": block, **line, "elapsed": round(time.perf_counter() - begun, 2)})
                    count += 1
                    done += sizes[number][block]
                    fresh += sizes[number][block]
                    progress(Step(stage.name, done, total, fresh))
        return count

    def _stage(self, number: int, blocks: list[int], workers: Workers, say: Say) -> Iterator[tuple[int, Line]]:
        """Do blocks of a stage, in any order; gives each one's line for the ledger."""
        stage, order, attempts = self.worker.stages[number], self.worker.order, self.request.attempts
        pending, tried = deque(blocks), Counter[int]()
        running: dict[Future[BlockResult], int] = {}
        try:
            while pending or running:
                while pending and len(running) < workers.in_flight():
                    block = pending.popleft()
                    tried[block] += 1
                    running[workers.executor.submit(perform, order, number, block)] = block
                for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                    block = running.pop(future)
                    try:
                        yield block, _line(future.result(), tried[block])
                    except OutputError:
                        raise
                    except Exception as error:
                        lost = isinstance(error, SERVERS_LOST)
                        words = str(error) if isinstance(error, PhaselineError) else f"{type(error).__name__}: {error}"
                        if tried[block] < attempts:
                            say(f"block {block} of stage {stage.name} failed ({words}); trying again")
                            if lost:
                                time.sleep(_PAUSE_S * tried[block])
                            pending.append(block)
                        elif lost:
                            raise JobError(f"{words}; what is done stays: go on with --resume when that is put right") from error
                        else:
                            self._leave_empty(stage, block)
                            yield block, {"state": "failed", "error": words, "attempt": tried[block]}
        finally:
            # Of a job that ends early, blocks in work end after the slice that they are at.
            if pending or running:
                self.worker.stopped.set()
            for future in running:
                future.cancel()
            wait(running)

    def _leave_empty(self, stage: Stage, block: int) -> None:
        """What failed altogether is unlabelled, not missing."""
        if stage.name in ("segment", "combine"):
            sink, box = ZarrSink(self.request.store), stage.blocks[block]
            for name in self.request.arrays:
                sink.write(name, box, np.zeros((*sink.layout.lead(name), *box.shape), sink.layout.dtype(name)))

    def _failed(self, ledger: Ledger) -> tuple[str, ...]:
        return (*bad_planes(ledger.lines).values(), *failed_blocks(ledger.lines))

    def _complete(self, ledger: Ledger, say: Say, failed: tuple[str, ...], watch: MemoryWatch, begun: float
                  ) -> tuple[tuple[Path, ...], dict[str, Any]]:
        request = self.request
        say("building the pyramid")
        build_pyramid(request.store)
        outputs = tuple(dict.fromkeys(output_files(request.out, request.arrays).values()))
        say("writing the report")
        report = certify(request, self.worker, ledger, self.plan, outputs, watch.peak, time.perf_counter() - begun)
        if failed and not request.allow_failed:
            return outputs if request.is_store else (), report
        if not request.is_store:
            say(f"writing {request.out}")
            finish(request.store, request.out)
        ledger.append({"finished": datetime.now(UTC).isoformat(timespec="seconds"), "failed": len(failed)})
        self._remove_working_files()
        return outputs, report

    def _remove_working_files(self) -> None:
        for folder in (self.request.scratch, *(() if self.request.is_store else (self.request.store,))):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(folder)


def _order(request: JobRequest, slices: int) -> Order:
    threads = request.engine.threads or request.cluster.threads
    return Order(
        input=dataclasses.replace(request.input, path=request.input.path.resolve()),
        engine=dataclasses.replace(request.engine, recipe=request.engine.recipe.resolve(), threads=threads),
        store=request.store.resolve(), scratch=request.scratch.resolve(), axes=request.axes, slices=slices,
        confidence=request.confidence, probabilities=request.probabilities, at_once=2 if request.engine.servers else 1,
    )


def _plan(request: JobRequest, worker: BlockWorker, slices: int | None) -> Plan:
    classes = worker.segmenter.recipe.classes
    return make_plan(
        worker.volume.info, request.axes, measure(worker), budget=request.memory_bytes or available_bytes() // 2,
        classes=len(classes.values), label_bytes=2 if classes.values[-1] > 255 else 1, confidence=request.confidence,
        probabilities=request.probabilities, processes=request.cluster.workers, shared=request.cluster.shares_memory,
        finished_copy=not request.is_store, where=request.folder, slices=slices, at_once=worker.order.at_once,
    )


def _header(request: JobRequest, worker: BlockWorker, plan: Plan) -> Line:
    """What decides the output."""
    info, bundle = worker.volume.info, worker.segmenter.recipe.bundle
    return {
        "recipe": recipe_hash(request.engine.recipe), "bundle": None if bundle is None else bundle.hash,
        "input": info.fingerprint, "shape": list(info.shape), "dtype": info.dtype.name,
        "region": str(request.input.region or Region()), "axes": request.axes, "slices": plan.slices,
        "classes": len(worker.segmenter.recipe.classes.values),
        "confidence": request.confidence, "probabilities": request.probabilities,
    }


def _line(result: BlockResult, attempt: int) -> Line:
    return {"state": "failed" if result.errors else "done", "attempt": attempt, **dataclasses.asdict(result)}


def _check_directions(ledger: Ledger) -> None:
    """Refuse to take a mean of which a part is missing: all labels across it would be lost."""
    if failed := failed_blocks({key: line for key, line in ledger.lines.items() if key[0] != "combine"}):
        more = f" (and {len(failed) - 1} more)" if failed[1:] else ""
        raise JobError(f"{failed[0]}{more}; the mean needs all blocks of all three directions: put it right, and go on with "
                       "--resume")
