"""The control of arXiv 2508.21529 S3: do deep channels help because of what they say, or would any channels do?

Beside the classical features stand as many columns as the bundle has channels: noise; classical ones again; the deep
features of other pixels of the same image (the right numbers in the wrong places); the deep features.
"""

from __future__ import annotations

import statistics
import zlib

import numpy as np
from tqdm import tqdm

from benchmarks.evaluation import PACKAGES, Evaluation, Task, beside, deep_part, estimate_note, open_evaluation, parser, summary
from benchmarks.pixel_table import CLASSICAL, Part
from benchmarks.plots import draw_bars, new_figure, save
from benchmarks.report import emit, markdown
from benchmarks.scores import Scores
from phaseline.runtime.contract import F32

NONE, NOISE, REPEATED, SHUFFLED, REAL = "none", "noise", "classical, repeated", "deep, shuffled", "deep"


def run(evaluation: Evaluation, deep: Part) -> dict[str, list[Scores]]:
    """Fit with each kind of added channels: kind → scores of each draw."""
    found: dict[str, list[Scores]] = {}
    for draw in tqdm(evaluation.draws, "fits"):
        task = evaluation.task(draw)
        classical = evaluation.columns(CLASSICAL, task)
        for name, added in additions(evaluation, deep, task).items():
            found.setdefault(name, []).append(evaluation.run(task, beside(classical, added)))
    return found


def additions(evaluation: Evaluation, deep: Part, task: Task) -> dict[str, list[F32]]:
    """What stands beside the classical features: kind → of each case a float32 array of shape (kept pixels, k)."""
    classical, features = evaluation.columns(CLASSICAL, task), evaluation.columns(deep, task)
    k = features[0].shape[1]
    draws = [np.random.default_rng(zlib.crc32(case.name.encode())) for case in evaluation.cases]
    repeated = np.arange(k) % classical[0].shape[1]
    return {
        NONE: [f[:, :0] for f in features],
        NOISE: [rng.standard_normal((len(f), k), np.float32) for rng, f in zip(draws, features, strict=True)],
        REPEATED: [f[:, repeated] for f in classical],
        SHUFFLED: [f[rng.permutation(len(f))] for rng, f in zip(draws, features, strict=True)],
        REAL: features,
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = parser(__doc__).parse_args(arguments)
    deep = deep_part(options.bundle)
    found = run(open_evaluation(options), deep)
    rows = [{"beside the classical features": name, **summary(scores)} for name, scores in found.items()]
    notes = [estimate_note(options),
             "Noise is Gaussian; the shuffled features are the image's own, given to its pixels in random order. The paper's own "
             "figures for S3 were not at hand."]
    if options.out is not None:
        figure, (axes,) = new_figure(width_in=7.5)
        draw_bars({name: {"mIoU": statistics.fmean(s.miou for s in scores)} for name, scores in found.items()}, "mIoU", axes)
        notes.insert(0, save(figure, options.out))
    emit(markdown("Ni: uninformative channels", rows, PACKAGES, notes), options.out)


if __name__ == "__main__":
    main()
