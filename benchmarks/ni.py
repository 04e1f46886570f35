"""The Ni benchmark of arXiv 2508.21529: mIoU on 23 SEM micrographs from brush strokes on four of them.

For each draw of scribbles: `phaseline fit` on that draw's images, `phaseline segment` on all 23, and the score script's
class-averaged mIoU. All features of one draw are measured in one run.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.report import emit, markdown
from phaseline.clients.__main__ import run

CONFIGURATIONS: dict[str, list[str]] = {
    "classical only": ["--bundle", "none"],
    "classical + default bundle": [],
    "classical + default bundle, paper's alignment": ["--alignment", "paper"],
    "classical + default bundle, nearest": ["--interpolation", "nearest"],
    "classical + default bundle, flips": ["--transforms", "flips"],
    "classical + default bundle, moore:2": ["--transforms", "moore:2"],
    "default bundle only": ["--no-classical"],
}


def mean_iou(data: Path, score: Path, draw: int, options: list[str], scratch: Path) -> float:
    """mIoU of one draw.

    Parameters
    ----------
    data
        Folder with ``images``, ``masks`` and ``scribbles/drawN``.
    score
        The script that scores a folder of predictions against a folder of masks.
    draw
        Which scribbles.
    options
        Of `phaseline fit`.
    scratch
        Folder for the recipe and the labels.
    """
    scribbles = data / "scribbles" / f"draw{draw}"
    recipe, labels = scratch / f"recipe{draw}", scratch / f"labels{draw}"
    words = ["fit", str(data / "images"), "--labels", str(scribbles), "--out", str(recipe), "--quiet", "--overwrite", *options]
    if run(words) or run(["segment", str(data / "images"), "--recipe", str(recipe), "--out", str(labels), "--quiet",
                          "--overwrite"]):
        raise SystemExit(f"phaseline failed on draw {draw}")
    printed = subprocess.run([sys.executable, str(score), str(labels), str(data / "masks")], check=True, capture_output=True,
                             text=True).stdout
    found = re.search(r"^mIoU ([\d.]+)", printed, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{score} printed no mIoU: {printed!r}")
    return float(found[1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with images, masks, scribbles")
    parser.add_argument("--score", type=Path, required=True, help="the score script")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for name in arguments.only:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            scores = [mean_iou(arguments.data, arguments.score, draw, CONFIGURATIONS[name], Path(scratch))
                      for draw in arguments.draws]
        seconds = (time.perf_counter() - started) / len(scores)
        print(f"{name}: {np.mean(scores):.4f}, {seconds:.0f} s a draw", file=sys.stderr)
        rows.append({"features": name, **{f"draw {d}": f"{s:.3f}" for d, s in zip(arguments.draws, scores, strict=True)},
                     "mean mIoU": f"**{np.mean(scores):.3f}**"})
    emit(markdown("Ni: mIoU by features", rows, ["phaseline", "xgboost", "onnxruntime", "opencv-python-headless"], [
        "The default bundle is untrained (random weights): what it adds is local texture, relative to the tile it is in.",
    ]), arguments.out)


if __name__ == "__main__":
    main()
