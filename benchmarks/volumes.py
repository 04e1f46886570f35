"""Jobs over volumes: memory within its budget, right labels, speed by recipe, growth with size, overlap of reading and writing.

    volume_jobs: synthetic volumes, recipes, jobs in fresh processes ──▶ acceptance, recipes, growth, overlap ──▶ tables, plot
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.evaluation import PACKAGES, about
from benchmarks.plots import Line, draw_bars, draw_lines, new_figure, save
from benchmarks.report import emit, markdown, table
from benchmarks.synthetic_volume import CLASSES, FORMATS, GRAIN, Shape, parse_shape
from benchmarks.volume_jobs import LABELLED_PLANES, STEPS, Bench, Made, Run, steps_alone
from phaseline.clients.images import read_image, write_labels
from phaseline.clients.jobs.blocks import runs
from phaseline.clients.jobs.memory import parse_bytes
from phaseline.clients.jobs.statistics import evenly_spaced
from phaseline.clients.segmenter import Segmenter
from phaseline.clients.volumes.opening import open_volume
from phaseline.runtime.bundle import open_bundle

PARTS = ("acceptance", "recipes", "growth", "overlap")
WAYS = {"classical": "classical only", "bilinear": "classical + deep, bilinear", "learned": "classical + deep, upsampler"}
GROWTH, OVERLAP = 1.10, 1.15
"""Asked at most: time per voxel of a volume over that of the smallest; a job's time over that of its longest step."""

FULL: dict[str, Any] = {
    "acceptance_shape": (256, 1024, 1024), "recipes_shape": (32, 1024, 1024), "growth_planes": [64, 128, 256, 512],
    "growth_side": 256, "overlap_shape": (64, 512, 512), "overlap_ways": ["classical", "bilinear"], "block": 8, "sample": 8,
    "repeats": 3, "grain": GRAIN}
QUICK: dict[str, Any] = {
    "acceptance_shape": (6, 64, 72), "recipes_shape": (4, 64, 64), "growth_planes": [4, 8], "growth_side": 64,
    "overlap_shape": (4, 64, 64), "overlap_ways": ["classical"], "block": 2, "sample": 3, "repeats": 1, "grain": 10.0}


def differing_planes(out: Path, recipe: Path, volume: Made, planes: Sequence[int], threads: int | None = None) -> list[int]:
    """Which planes of an output are not what the same plane gives as an image of its own, written and read as TIFF."""
    found = []
    with (tempfile.TemporaryDirectory() as folder, open_volume(out) as labels,
          Segmenter.open(recipe, device="cpu", threads=threads) as segmenter):
        for plane, box in ((plane, runs(volume.content.shape, "plane", 1)[plane]) for plane in planes):
            file = Path(folder) / f"{plane}.tif"
            write_labels(file, volume.content.plane(plane))
            if not np.array_equal(labels.read(box)[0], segmenter.segment(read_image(file)).labels):
                found.append(plane)
    return found


def volume_ious(out: Path, truth: Path) -> dict[str, float]:
    """IoU of each class over all voxels; read by block."""
    size = len(CLASSES) + 1
    pairs = np.zeros(size * size, np.int64)
    with open_volume(out) as labels, open_volume(truth) as true:
        for box in runs(true.info.shape, "plane", 16):
            pairs += np.bincount((true.read(box) * np.uint8(size) + labels.read(box)).reshape(-1), minlength=size * size)
    counts = pairs.reshape(size, size)
    either = counts.sum(axis=0) + counts.sum(axis=1) - np.diag(counts)
    return {name: float(counts[i, i] / either[i]) if either[i] else 1.0 for i, name in enumerate(CLASSES, 1)}


def acceptance(bench: Bench, shape: Shape, way: str, memory: str, sample: int) -> list[dict[str, object]]:
    """One large volume: its memory, and whether its labels are right."""
    volume = bench.volume(shape)
    recipe = bench.recipe(way, volume)
    out, run = bench.job(volume, recipe, memory)
    planes = evenly_spaced(range(shape[0]), sample)
    differing = differing_planes(out, recipe, volume, planes, bench.threads)
    ious = volume_ious(out, volume.truth)
    allowed = parse_bytes(memory)
    return [{
        "voxels": _times(shape), "recipe": WAYS[way], "blocks": f"{run.blocks} of {run.slices} planes",
        "peak memory, MiB": f"{run.peak_bytes / 2**20:.0f}", "allowed, MiB": f"{allowed / 2**20:.0f}",
        "within": "yes" if run.peak_bytes <= allowed else "**no**",
        "planes equal to one by one": f"{len(planes) - len(differing)} of {len(planes)}",
        "mIoU": f"**{statistics.fmean(ious.values()):.3f}**", **{f"IoU {name}": f"{iou:.3f}" for name, iou in ious.items()},
        "minutes": f"{run.seconds / 60:.1f}", "voxels/s": _speed(shape, run.blocks_s),
    }]


def recipes(bench: Bench, shape: Shape, ways: Sequence[str], memory: str, block: int) -> dict[str, Run]:
    """The same volume with each way's recipe."""
    volume = bench.volume(shape)
    return {way: bench.job(volume, bench.recipe(way, volume), memory, "--block", str(block))[1] for way in tqdm(ways, "recipes")}


def growth(bench: Bench, planes: Sequence[int], side: int, memory: str, block: int, repeats: int) -> dict[int, list[Run]]:
    """Volumes of more and more planes with one recipe; sizes take turns."""
    volumes = {count: bench.volume((count, side, side)) for count in planes}
    recipe = bench.recipe("classical", volumes[planes[0]])
    found: dict[int, list[Run]] = {count: [] for count in planes}
    for count in tqdm([count for _ in range(repeats) for count in planes], "growth"):
        found[count].append(bench.job(volumes[count], recipe, memory, "--block", str(block))[1])
    return found


def overlap(bench: Bench, shape: Shape, ways: Sequence[str], memory: str, block: int, repeats: int
            ) -> dict[str, list[tuple[dict[str, float], Run]]]:
    """Each step alone, then the job, in turns."""
    volume = bench.volume(shape)
    made = {way: bench.recipe(way, volume) for way in ways}
    found: dict[str, list[tuple[dict[str, float], Run]]] = {way: [] for way in ways}
    for way in tqdm([way for _ in range(repeats) for way in ways], "overlap"):
        steps = bench.alone(volume, made[way], block)
        found[way].append((steps, bench.job(volume, made[way], memory, "--block", str(block))[1]))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = _parser().parse_args(arguments)
    if options.alone:
        path, recipe, store, slices = options.alone
        print(json.dumps(steps_alone(Path(path), Path(recipe), Path(store), int(slices), options.threads)))
        return
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    # A relative path must mean the same in the processes that measure.
    bundle, learned = (one if one in (None, "default") else str(Path(one).resolve()) for one in (options.bundle, options.learned))
    if learned is None and open_bundle(bundle).spec.has_upsampler:
        learned = bundle
    bundles = {"bilinear": bundle, **({} if learned is None else {"learned": learned})}
    for way in (options.way, *options.overlap_ways):
        if way == "learned" and learned is None:
            raise SystemExit("no bundle with an upsampler, which learned features need; give one with --learned")
    with contextlib.ExitStack() as stack:
        folder = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(folder.resolve(), bundles, options.threads, options.format, options.grain, options.seed)
        emit(_page(bench, options), options.out)


def _page(bench: Bench, options: argparse.Namespace) -> str:
    sections: list[tuple[str, list[dict[str, object]], list[str]]] = []
    by_recipe: dict[str, Run] = {}
    by_size: dict[int, list[Run]] = {}
    alone: dict[str, list[tuple[dict[str, float], Run]]] = {}
    if "acceptance" in options.parts:
        sections.append(("Memory and labels", acceptance(bench, options.acceptance_shape, options.way, options.memory,
                                                         options.sample), [
            "Memory: most resident memory of the process and all that it started, looked at from outside every 0.1 s. Planes one "
            "by one: evenly spaced ones, each written as a TIFF image and segmented as such, compared pixel by pixel. IoU over "
            f"all voxels; the recipe was fitted on strokes on {LABELLED_PLANES} planes of the same volume."]))
    if "recipes" in options.parts:
        by_recipe = recipes(bench, options.recipes_shape, ["classical", *bench.bundles], options.memory, options.block)
        voxels = int(np.prod(options.recipes_shape))
        notes = [f"{_times(options.recipes_shape)} voxels. Read, compute and write are summed over blocks, and overlap; the "
                 "command also plans, builds the pyramid, and writes the report. "
                 + " ".join(about(open_bundle(path)) for path in dict.fromkeys(bench.bundles.values()))]
        if "learned" not in bench.bundles:
            notes.append("No row with an upsampler: the bundle has none (--learned takes another).")
        sections.append(("Speed by recipe", [_recipe_row(way, run, voxels) for way, run in by_recipe.items()], notes))
    if "growth" in options.parts:
        by_size = growth(bench, options.growth_planes, options.growth_side, options.memory, options.block, options.repeats)
        sections.append(("Growth with size", *_growth_table(by_size, options.growth_side)))
    if "overlap" in options.parts:
        alone = overlap(bench, options.overlap_shape, options.overlap_ways, options.memory, options.block, options.repeats)
        sections.append(("Overlap", [_overlap_row(way, found) for way, found in alone.items()], [
            f"{_times(options.overlap_shape)} voxels, blocks of {options.block} planes. Read, compute, write: seconds over all "
            "blocks, one after the other in a process of their own. The job: until its last block is in the ledger. Medians of "
            f"{options.repeats} turns."]))
    title = f"Jobs over volumes: {options.format}, --memory {options.memory}"
    (first, rows, notes), *others = sections
    page = markdown(title, rows, [*PACKAGES, "zarr"], [f"**{first}.** {notes[0]}", *notes[1:]])
    for heading, rows, notes in others:
        page += "\n".join(["", f"## {heading}", "", *table(rows), *(f"\n{note}" for note in notes)]) + "\n"
    if options.out is not None and (by_recipe or by_size or alone):
        page += f"\n{_draw(by_recipe, by_size, alone, options)}\n"
    return page


def _recipe_row(way: str, run: Run, voxels: int) -> dict[str, object]:
    total = sum(run.steps.values())
    return {"recipe": WAYS[way], "voxels/s": f"{voxels / run.blocks_s:,.0f}",
            "voxels/s, whole command": f"{voxels / run.seconds:,.0f}",
            **{f"{step}, µs/voxel": f"{1e6 * run.steps[step] / voxels:.3f}" for step in STEPS},
            "shares, %": " / ".join(f"{100 * run.steps[step] / total:.1f}" for step in STEPS),
            "peak memory, MiB": f"{run.peak_bytes / 2**20:.0f}"}


def _growth_table(found: dict[int, list[Run]], side: int) -> tuple[list[dict[str, object]], list[str]]:
    smallest = next(iter(found))
    rows: list[dict[str, object]] = []
    for planes, turns in found.items():
        voxels = planes * side * side
        # Each turn's sizes with one another: a machine that gets slower is no size's fault.
        ratios = [run.blocks_s / voxels / (first.blocks_s / (smallest * side * side))
                  for run, first in zip(turns, found[smallest], strict=True)]
        rows.append({
            "planes": planes, "µs/voxel": f"{_microseconds(turns, voxels):.3f}",
            "× the first": f"{statistics.median(ratios):.3f}",
            "asked": "" if planes == smallest else f"{2 - GROWTH:.2f}–{GROWTH:.2f}",
            "whole command, µs/voxel": f"{1e6 * statistics.median(run.seconds for run in turns) / voxels:.3f}",
            "peak memory, MiB": f"{_peak(turns):.0f}", "× the first's": f"{_peak(turns) / _peak(found[smallest]):.3f}"})
    first = found[smallest][0]
    return rows, [f"Planes of {side} × {side}, blocks of {first.slices}, one recipe of classical features; medians of "
                  f"{len(found[smallest])} turns. The whole command has a part that does not grow: imports, plan, and report."]


def _overlap_row(way: str, found: list[tuple[dict[str, float], Run]]) -> dict[str, object]:
    ratios = [run.blocks_s / max(steps.values()) for steps, run in found]
    return {"recipe": WAYS[way],
            **{f"{step} alone, s": f"{statistics.median(steps[step] for steps, _ in found):.2f}" for step in STEPS},
            "sum, s": f"{statistics.median(sum(steps.values()) for steps, _ in found):.2f}",
            "job, s": f"{statistics.median(run.blocks_s for _, run in found):.2f}",
            "job / longest step": f"**{statistics.median(ratios):.3f}**", "range": f"{min(ratios):.3f}–{max(ratios):.3f}",
            "asked": f"≤ {OVERLAP}"}


def _draw(by_recipe: dict[str, Run], by_size: dict[int, list[Run]], alone: dict[str, list[tuple[dict[str, float], Run]]],
          options: argparse.Namespace) -> str:
    figure, panels = new_figure(bool(by_recipe) + 2 * bool(by_size) + bool(alone), width_in=4.2)
    left = iter(panels)
    if by_recipe:
        voxels = int(np.prod(options.recipes_shape))
        draw_bars({WAYS[way].replace(", ", ",\n"): {step: 1e6 * run.steps[step] / voxels for step in STEPS}
                   for way, run in by_recipe.items()}, "µs/voxel, summed over blocks", next(left))
    if by_size:
        sizes, side = list(by_size), options.growth_side
        times = [_microseconds(turns, planes * side * side) for planes, turns in by_size.items()]
        for name, values, label in (("blocks", times, "µs/voxel"),
                                    ("process tree", [_peak(turns) for turns in by_size.values()], "peak memory, MiB")):
            panel = next(left)
            draw_lines({name: Line(sizes, values)}, f"planes of {side} × {side}", label, panel)
            panel.set_ylim(0, 1.3 * max(values))
    if alone:
        draw_bars({WAYS[way].replace(", ", ",\n"): {
            **{step: statistics.median(steps[step] for steps, _ in found) for step in STEPS},
            "job": statistics.median(run.blocks_s for _, run in found)} for way, found in alone.items()},
            "s; each step alone, and the job", next(left))
    return save(figure, options.out)


def _microseconds(turns: Sequence[Run], voxels: int) -> float:
    return 1e6 * statistics.median(run.blocks_s for run in turns) / voxels


def _peak(turns: Sequence[Run]) -> float:
    return statistics.median(run.peak_bytes for run in turns) / 2**20


def _times(shape: Shape) -> str:
    return " × ".join(map(str, shape))


def _speed(shape: Shape, seconds: float) -> str:
    return f"{int(np.prod(shape)) / seconds:,.0f}"


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; others can still be given")
    made.add_argument("--memory", default="2GiB", help="budget of the jobs")
    made.add_argument("--format", choices=FORMATS, default="hdf5", help="of the volumes")
    made.add_argument("--bundle", default="default", help="'default' or a bundle's folder")
    made.add_argument("--learned", help="a bundle with an upsampler; by default --bundle, if it has one")
    made.add_argument("--acceptance-shape", type=parse_shape, help="PLANESxROWSxCOLS")
    made.add_argument("--way", choices=WAYS, default="bilinear", help="recipe of the acceptance run")
    made.add_argument("--sample", type=int, help="planes that are compared with those segmented one by one")
    made.add_argument("--recipes-shape", type=parse_shape)
    made.add_argument("--growth-planes", type=int, nargs="+")
    made.add_argument("--growth-side", type=int, help="rows and columns")
    made.add_argument("--overlap-shape", type=parse_shape)
    made.add_argument("--overlap-ways", nargs="+", choices=WAYS)
    made.add_argument("--block", type=int, help="planes in a block; the acceptance run's job chooses itself")
    made.add_argument("--repeats", type=int, help="turns of growth and overlap")
    made.add_argument("--grain", type=float, help="size of the blobs, voxels")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int)
    made.add_argument("--work", type=Path, help="folder that keeps volumes and recipes; by default a temporary one")
    made.add_argument("--out", type=Path, help="Markdown file; the picture lies beside it")
    made.add_argument("--alone", nargs=4, metavar=("VOLUME", "RECIPE", "STORE", "BLOCK"),
                      help="time each step of this job in this process, and print JSON")
    return made


if __name__ == "__main__":
    main()
