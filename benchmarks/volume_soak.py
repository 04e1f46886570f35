"""Jobs killed at random moments, gone on with, killed again, until so many kills have landed: each output as if nothing had been.

    once             ──▶ an uninterrupted run: how long it takes, and all files of its output
    again and again  ──▶ SIGKILL after a random part of that time ──▶ --resume ──▶ SIGKILL … ──▶ it ends
                                                     the same files? the ledger clean, each block done once?

Runs are forked from a process that has imported everything: a kill costs no start of Python.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks.report import emit, markdown
from benchmarks.synthetic_volume import SyntheticVolume, parse_shape
from phaseline.clients.classical import ClassicalFeatures
from phaseline.clients.fit import fit
from phaseline.clients.jobs.ledger import LEDGER
from phaseline.clients.jobs.request import job_folder

KILLS = 200
_ROOT = Path(__file__).parents[1]
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# Nothing takes so long; a run that does hangs, and ends the benchmark.
_LIMIT_S = 300.0
_KEPT = {LEDGER, "report.html", "report.json"}


@dataclass(frozen=True)
class Variant:
    """A kind of job.

    Attributes
    ----------
    name
        For people.
    out
        Name of its output.
    options
        More words of `phaseline segment`.
    """

    name: str
    out: str
    options: tuple[str, ...] = ()


VARIANTS = (
    Variant("planes, OME-Zarr", "labels.ome.zarr", ("--confidence",)),
    Variant("rows, HDF5", "labels.h5", ("--axes", "row", "--confidence", "--probabilities")),
    Variant("three directions, TIFF", "labels.tif", ("--axes", "3", "--confidence")),
)


class Runs:
    """Runs commands of `phaseline` in processes of their own, which start at once and may be killed.

    Parameters
    ----------
    log
        File for what they print.
    pause_s
        How long each slice takes in addition, so that kills come between blocks too.
    """

    def __init__(self, log: Path, pause_s: float = 0.0) -> None:
        self.log, self._pause_s = log, pause_s

    def __enter__(self) -> Self:
        words = [sys.executable, "-c", "from benchmarks.volume_soak import serve; serve()", str(self.log), str(self._pause_s)]
        self._server = subprocess.Popen(words, cwd=_ROOT, env={**os.environ, **_ONE_THREAD}, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)
        self._answer()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(_LIMIT_S)
        self._server.stdout.close()

    def start(self, words: Sequence[str], die_at: int = 0) -> int:
        """Begin a command; gives its process id, valid until `end`.

        Parameters
        ----------
        words
            Behind ``phaseline``.
        die_at
            It kills itself before it changes files for this time; 0: never.
        """
        return int(self._ask({"words": list(words), "die_at": die_at}))

    def end(self) -> int:
        """Wait for the command; gives its exit code, or minus the signal that killed it."""
        return int(self._ask({}))

    def run(self, words: Sequence[str], die_at: int = 0) -> int:
        """Both."""
        self.start(words, die_at)
        return self.end()

    def changes(self) -> int:
        """How often the last command that ended by itself changed files."""
        return int(self.log.with_suffix(".changes").read_text(encoding="utf-8"))

    def _ask(self, request: dict[str, Any]) -> str:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that starts runs has ended; see {self.log}")
        return line


def serve() -> None:
    """What `Runs` talks to: forks a process for each command on standard input."""
    import h5py  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import zarr  # noqa: F401

    from phaseline.clients.__main__ import run  # noqa: F401

    log, pause_s = Path(sys.argv[1]), float(sys.argv[2])
    print("ready", flush=True)
    child = 0
    for line in sys.stdin:
        request = json.loads(line)
        if request:
            child = os.fork()
            if child == 0:
                _work(request["words"], request["die_at"], log, pause_s)
            print(child, flush=True)
        else:
            # Only now: until then its number is nobody else's.
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _work(words: list[str], die_at: int, log: Path, pause_s: float) -> None:
    """A command, in a process that was just forked; never returns."""
    from phaseline.clients.__main__ import run
    from phaseline.clients.jobs import certificate
    from phaseline.clients.segmenter import Segmenter

    status = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for stream in (0, 1, 2):
            os.dup2(os.open(os.devnull, os.O_RDONLY) if stream == 0 else descriptor, stream)
        segment = Segmenter.segment

        def slow(*given: Any, **options: Any) -> Any:
            time.sleep(pause_s)
            return segment(*given, **options)

        Segmenter.segment = slow  # type: ignore[method-assign]
        # Most of a small job's time goes into plots; nothing is written meanwhile.
        for name in ("plot_histogram", "plot_phases", "plot_series"):
            setattr(certificate, name, lambda *given, **options: "")
        count = _count_changes(die_at)
        status = run(words)
        log.with_suffix(".changes").write_text(str(count[0]), encoding="utf-8")
    finally:
        # Nobody above is to see an error: they are the process that starts runs.
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)


def _count_changes(die_at: int) -> list[int]:
    """Count what changes files for good from now on, and kill this process before one of these."""
    count = [0]

    def counted(change: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*given, **options)

        return call

    for name in ("fsync", "ftruncate", "mkdir", "rename", "replace", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    return count


def content(folder: Path) -> dict[str, bytes]:
    """All files of an output, those of its job left out: these hold times."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.relative_to(folder).parts[0].endswith(".job")}


def count_torn(folder: Path, expected: dict[str, bytes]) -> int:
    """Files of voxels that a kill left as they will not stay: whole or not there is what is right."""
    found = content(folder) if folder.exists() else {}
    return sum(found[name] != expected[name] for name in found.keys() & expected.keys() if not name.endswith("zarr.json"))


def check_ledger(out: Path) -> tuple[Counter[tuple[str, int]], bool]:
    """Lines of a ledger, each of which must be JSON: how often each block was done, and whether the last line ends the job."""
    lines = [json.loads(line) for line in (job_folder(out) / LEDGER).read_text(encoding="utf-8").splitlines()]
    done = Counter((line["stage"], line["block"]) for line in lines if line.get("state") == "done")
    return done, "finished" in lines[-1] and not any(line.get("state") == "failed" for line in lines)


def run(volume: Path, recipe: Path, folder: Path, *, kills: int = KILLS, seed: int = 0, pause_s: float = 0.02,
        variants: Sequence[Variant] = VARIANTS, slices: int = 3) -> list[dict[str, Any]]:
    """Kill jobs of each variant.

    Parameters
    ----------
    volume, recipe
        What is segmented, and with what.
    folder
        For outputs.
    kills
        That land, all variants together: later ones that find a job at its end don't count.
    seed
        Of the moments.
    pause_s
        See `Runs`.
    variants
        Kinds of jobs.
    slices
        In a block.

    Returns
    -------
    A row for each variant.

    Raises
    ------
    RuntimeError
        A run that was not killed failed; the message has what it said.
    """
    rows = []
    chance = random.Random(seed)
    for number, variant in enumerate(variants):
        share = kills * (number + 1) // len(variants) - kills * number // len(variants)
        with Runs(folder / f"log{number}.txt", pause_s) as runs:
            rows.append(_soak(runs, variant, share, chance, folder / str(number), _words(volume, recipe, slices)))
    return rows


def _words(volume: Path, recipe: Path, slices: int) -> list[str]:
    return ["segment", str(volume), "--recipe", str(recipe), "--block", str(slices), "--threads", "1", "--quiet"]


def _soak(runs: Runs, variant: Variant, kills: int, chance: random.Random, folder: Path, words: list[str]) -> dict[str, Any]:
    folder.mkdir(parents=True)
    words = [*words, *variant.options, "--out"]
    begun = time.perf_counter()
    _must(runs, runs.run([*words, str(folder / "whole" / variant.out)]))
    duration = time.perf_counter() - begun
    expected = content(folder / "whole")
    blocks = set(check_ledger(folder / "whole" / variant.out)[0])
    landed, jobs, amid, last, torn, differing, unclean, twice = 0, 0, 0, 0, 0, 0, 0, 0
    while landed < kills:
        out = folder / f"job{jobs}" / variant.out
        while True:
            process = runs.start([*words, str(out), "--resume"])
            if landed < kills:
                time.sleep(chance.uniform(0, duration))
                os.kill(process, signal.SIGKILL)
            status = runs.end()
            if status != -signal.SIGKILL:
                break
            landed += 1
            done = len(_done_until_now(out))
            amid += 0 < done < len(blocks)
            last += done == len(blocks)
            torn += count_torn(out.parent, expected)
        _must(runs, status, out)
        jobs += 1
        done_blocks, clean = check_ledger(out)
        differing += content(out.parent) != expected
        unclean += not clean or set(done_blocks) != blocks
        twice += sum(done_blocks.values()) - len(blocks)
    return {"job": variant.name, "kills": landed, "amid blocks": amid, "while it was completed": last, "jobs": jobs,
            "torn files": torn, "outputs that differ": differing, "ledgers not clean": unclean, "blocks done twice": twice,
            "uninterrupted": f"{duration:.1f} s"}


def _done_until_now(out: Path) -> set[tuple[str, int]]:
    ledger = job_folder(out) / LEDGER
    lines = [json.loads(line) for line in ledger.read_bytes().split(b"\n")[:-1]] if ledger.exists() else []
    return {(line["stage"], line["block"]) for line in lines if line.get("state") == "done"}


def _must(runs: Runs, status: int, out: Path | None = None) -> None:
    """Refuse a run that failed; where one was killed in the end, the next may say that there is nothing left to do."""
    last = out and (job_folder(out) / LEDGER).read_text(encoding="utf-8").splitlines()[-1]
    if status != 0 and not (status == 2 and last and "finished" in json.loads(last)):
        raise RuntimeError(f"a run ended with {status}: {runs.log.read_text(encoding='utf-8')[-2000:]}")


def at_changes(volume: Path, recipe: Path, folder: Path, variant: Variant, *, slices: int = 6,
               moments: Callable[[int], Iterable[int]] = lambda changes: range(1, changes + 1)) -> dict[str, Any]:
    """Kill jobs once each, before a change of files: making, renaming or removing one, or waiting until it is on the disk.

    Parameters
    ----------
    volume, recipe, folder, variant, slices
        As `run` takes them.
    moments
        From the number of changes of an uninterrupted run to those before which to kill, 1 for the first; by default all.

    Returns
    -------
    A row like those of `run`.
    """
    folder.mkdir(parents=True)
    words = [*_words(volume, recipe, slices), *variant.options, "--out"]
    with Runs(folder / "log.txt") as runs:
        whole = folder / "whole" / variant.out
        _must(runs, runs.run([*words, str(whole)]))
        expected, changes, blocks = content(whole.parent), runs.changes(), check_ledger(whole)[0]
        counts = Counter[str]()
        for number in moments(changes):
            out = folder / f"at{number}" / variant.out
            status = runs.run([*words, str(out)], die_at=number)
            # Threads make a folder at the same time, or one after the other: a run may have fewer changes than another.
            counts["kills"] += status == -signal.SIGKILL
            counts["completed"] += out.is_file()
            counts["torn"] += count_torn(out.parent, expected)
            _must(runs, status if status != -signal.SIGKILL else runs.run([*words, str(out), "--resume"]), out)
            done, clean = check_ledger(out)
            counts["differing"] += content(out.parent) != expected
            counts["unclean"] += not clean or done != blocks
            counts["left over"] += {path.name for path in job_folder(out).iterdir()} != _KEPT
    return {"job": variant.name, "changes": changes, "kills": counts["kills"], "output was there": counts["completed"],
            "torn files": counts["torn"], "outputs that differ": counts["differing"], "ledgers not clean": counts["unclean"],
            "files left over": counts["left over"]}


def make_inputs(folder: Path, shape: tuple[int, int, int], seed: int = 0) -> tuple[Path, Path]:
    """A synthetic volume as NPY, and a recipe of few classical features for it."""
    made = SyntheticVolume(shape, seed, grain=12)
    volume = np.stack([made.plane(plane) for plane in range(shape[0])])
    np.save(folder / "volume.npy", volume)
    strokes = np.where(np.random.default_rng(seed).random(shape[1:]) < 0.1, made.truth(0), 0)
    recipe = fit([volume[0]], [strokes], classical=ClassicalFeatures(sigmas=(0, 1, 2), membrane=False), threads=1)
    recipe.save(folder / "recipe")
    return folder / "volume.npy", folder / "recipe"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", type=parse_shape, default=(20, 48, 300), help="PLANESxROWSxCOLS")
    parser.add_argument("--pause", type=float, default=0.02, help="seconds that each slice takes in addition")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--changes", action="store_true", help="instead, once before each change of files")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        volume, recipe = make_inputs(folder, asked.shape, asked.seed)
        if asked.changes:
            rows = [at_changes(volume, recipe, folder / str(i), variant) for i, variant in enumerate(VARIANTS)]
        else:
            rows = run(volume, recipe, folder, kills=asked.kills, seed=asked.seed, pause_s=asked.pause)
    kills = sum(row["kills"] for row in rows)
    title = f"{kills} kills of jobs over a volume of {' × '.join(map(str, asked.shape))}"
    emit(markdown(title, rows, ["zarr", "h5py", "tifffile", "xgboost", "numpy"]), asked.out)


if __name__ == "__main__":
    main()
