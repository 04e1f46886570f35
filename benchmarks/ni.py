"""The Ni benchmark of arXiv 2508.21529: mIoU on 23 SEM micrographs from brush strokes on four of them.

For each draw of scribbles: `phaseline fit` on that draw's images, `phaseline segment` on all 23, and the score script's
class-averaged mIoU, with the IoU of each class from the same labels. All features of one draw are measured in one run.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.evaluation import about, summary
from benchmarks.references.papers import CLASSICAL, CLASSICAL_AND_DEEP, SOURCE
from benchmarks.report import markdown, write
from benchmarks.scores import Scores, score
from phaseline.clients.__main__ import run
from phaseline.clients.images import list_images
from phaseline.clients.labels import pair_labels, read_labels
from phaseline.runtime.bundle import open_bundle

CLASSICAL_ONLY = "classical only"
VARIANTS: dict[str, list[str]] = {
    "paper's alignment": ["--interpolation", "bilinear", "--alignment", "paper"],
    "bilinear": ["--interpolation", "bilinear"],
    "nearest": ["--interpolation", "nearest"],
    "flips": ["--transforms", "flips"],
    "moore:2": ["--transforms", "moore:2"],
    "deep only": ["--no-classical"],
}
"""Options beside a bundle's own."""

UNTRAINED = "untrained"
UNTRAINED_BACKBONE = "vit-192-8-3-p14"


def measure(data: Path, script: Path, draw: str, options: list[str], scratch: Path) -> Scores:
    """Scores of one draw.

    Parameters
    ----------
    data
        Folder with ``images``, ``masks`` and ``scribbles/DRAW``.
    script
        The script that scores a folder of predictions against a folder of masks.
    draw
        Which scribbles.
    options
        Of `phaseline fit`.
    scratch
        Folder for the recipe and the labels.
    """
    recipe, labels = scratch / f"recipe-{draw}", scratch / f"labels-{draw}"
    words = ["fit", str(data / "images"), "--labels", str(data / "scribbles" / draw), "--out", str(recipe), "--quiet",
             "--overwrite", *options]
    if run(words) or run(["segment", str(data / "images"), "--recipe", str(recipe), "--out", str(labels), "--quiet",
                          "--overwrite"]):
        raise SystemExit(f"phaseline failed on {draw}")
    scores = score([(read_labels(predicted), read_labels(mask), None)
                    for mask, predicted in pair_labels(list_images(data / "masks"), labels)])
    printed = subprocess.run([sys.executable, str(script), str(labels), str(data / "masks")], check=True, capture_output=True,
                             text=True).stdout
    found = re.search(r"^mIoU ([\d.]+)", printed, re.MULTILINE)
    if found is None or abs(float(found[1]) - scores.miou) > 1e-4:
        raise SystemExit(f"{script} printed {printed.splitlines()[-1:]}, expected mIoU {scores.miou:.4f}; do both score alike?")
    return scores


def export_untrained(out: Path) -> Path:
    """The default bundle of the first issue: random weights, stride 7."""
    from phaseline.export.bundle_writer import ExportOptions, write_bundle

    return write_bundle(ExportOptions(backbone=UNTRAINED_BACKBONE, weights="random:0", stride_px=7, tile_px=294, channels=32,
                                      in_channels=1, precision="fp16"), out).path


def configurations(bundles: dict[str, str], variants: list[str]) -> dict[str, list[str]]:
    """Options of `phaseline fit` by name: classical only, each bundle beside the classical features, and the first's variants."""
    made = {CLASSICAL_ONLY: ["--bundle", "none"]}
    made |= {f"classical + {name}": ["--bundle", path] for name, path in bundles.items()}
    name, path = next(iter(bundles.items()))
    return made | {f"{name}, {variant}": ["--bundle", path, *VARIANTS[variant]] for variant in variants}


def named(text: str) -> tuple[str, str]:
    """NAME=PATH."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} came, expected NAME=PATH")
    return name, path


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with images, masks, scribbles")
    parser.add_argument("--score", type=Path, required=True, help="the score script")
    parser.add_argument("--draws", nargs="+", help="some of the folders in scribbles; by default all")
    parser.add_argument("--bundle", type=named, action="append", metavar="NAME=PATH",
                        help="bundles to measure, the first with --variants; by default default=default")
    parser.add_argument("--untrained", action="store_true",
                        help=f"also {UNTRAINED_BACKBONE} with random weights, stride 7: the first default bundle")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    draws = options.draws or sorted(path.name for path in (options.data / "scribbles").iterdir() if path.is_dir())
    bundles = dict(options.bundle or [("default", "default")])
    rows: list[dict[str, object]] = []
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.untrained:
            bundles[UNTRAINED] = str(export_untrained(scratch / "untrained"))
        for name, words in configurations(bundles, options.variants).items():
            started = time.perf_counter()
            scores = [measure(options.data, options.score, draw, words, scratch) for draw in draws]
            seconds = (time.perf_counter() - started) / len(scores)
            mean = statistics.fmean(s.miou for s in scores)
            print(f"{name}: {mean:.4f}, {seconds:.0f} s a draw", file=sys.stderr)
            rows.append({"features": name, **{draw: f"{s.miou:.3f}" for draw, s in zip(draws, scores, strict=True)},
                         **summary(scores)})
            text = page(rows, bundles)
            if options.out is not None:
                # A run that is stopped leaves what it has measured.
                write(text, options.out)
    print(text)


def page(rows: list[dict[str, object]], bundles: dict[str, str]) -> str:
    """The table as far as it is measured."""
    notes = []
    for name, path in bundles.items():
        if any(name in str(row["features"]) for row in rows):
            notes.append(f"{name}: {about(open_bundle(path))}")
    return markdown("Ni: mIoU by features", rows, ["phaseline", "xgboost", "onnxruntime", "opencv-python-headless"], [
        " ".join(notes), "All pixels of all images count; class 2 is the small phase.",
        f"The paper: {CLASSICAL:.3f} with classical features, {CLASSICAL_AND_DEEP:.3f} with upsampled DINOv2 too; {SOURCE}.",
    ])


if __name__ == "__main__":
    main()
