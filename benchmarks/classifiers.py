"""mIoU by classifier (arXiv 2508.21529 S4): every one that `phaseline fit` has."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from tqdm import tqdm

from benchmarks.evaluation import PACKAGES, Evaluation, deep_part, estimate_note, open_evaluation, parser, sets_of, summary
from benchmarks.pixel_table import Part
from benchmarks.plots import draw_bars, new_figure, save
from benchmarks.references.papers import BY_CLASSIFIER, SOURCE
from benchmarks.report import emit, markdown
from benchmarks.scores import Scores
from phaseline.clients.classify import CLASSIFIERS

SETS = ("classical", "classical + deep")


def run(evaluation: Evaluation, deep: Part, classifiers: Sequence[str] = CLASSIFIERS
        ) -> dict[tuple[str, str], tuple[list[Scores], float]]:
    """Fit every classifier.

    Returns
    -------
    (classifier, feature set) → scores of each draw, and seconds of fitting and scoring a draw.
    """
    found = {}
    for kind in tqdm(classifiers, "fits"):
        for name in SETS:
            scores, seconds = [], 0.0
            for draw in evaluation.draws:
                task = evaluation.task(draw)
                features = evaluation.features(sets_of(deep)[name], task)
                started = time.perf_counter()
                scores.append(evaluation.run(task, features, classifier=kind))
                seconds += time.perf_counter() - started
            found[kind, name] = scores, seconds / len(scores)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = parser(__doc__).parse_args(arguments)
    deep = deep_part(options.bundle)
    found = run(open_evaluation(options), deep)
    rows = [{"classifier": kind, "features": name, **summary(scores), "s a draw": f"{seconds:.1f}",
             "paper": f"{BY_CLASSIFIER[kind][SETS.index(name)]:.3f}"} for (kind, name), (scores, seconds) in found.items()]
    notes = [estimate_note(options),
             "s a draw: fitting, and classifying the sampled pixels of all images; features not counted.",
             f"Paper: {SOURCE}. Its `linear` is a linear regression, ours a linear discriminant."]
    if options.out is not None:
        figure, (axes,) = new_figure(width_in=7.5)
        bars = {kind.replace("_", "\n"): {name: statistics.fmean(s.miou for s in found[kind, name][0]) for name in SETS}
                for kind in CLASSIFIERS}
        draw_bars(bars, "mIoU", axes)
        notes.insert(0, save(figure, options.out))
    emit(markdown("Ni: mIoU by classifier", rows, PACKAGES, notes), options.out)


if __name__ == "__main__":
    main()
