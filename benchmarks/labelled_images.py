"""mIoU against the number of labelled images (arXiv 2508.21529 Fig. 6): classical, deep, both."""

from __future__ import annotations

import itertools
import random
import statistics

from tqdm import tqdm

from benchmarks.evaluation import PACKAGES, Evaluation, deep_part, estimate_note, open_evaluation, parser, sets_of
from benchmarks.pixel_table import Part
from benchmarks.plots import Line, draw_lines, new_figure, save
from benchmarks.references.papers import BY_LABELLED_IMAGES, SOURCE
from benchmarks.report import emit, markdown
from benchmarks.scores import Scores


def run(evaluation: Evaluation, deep: Part, subsets: int | None = None) -> dict[str, dict[int, list[list[Scores]]]]:
    """Fit on every subset of each draw's labelled images.

    Parameters
    ----------
    evaluation
        The labelled micrographs.
    deep
        Deep features.
    subsets
        The most subsets of one size and draw, a seeded choice; None: all.

    Returns
    -------
    Feature set → number of labelled images → for each draw the scores of its subsets.
    """
    found: dict[str, dict[int, list[list[Scores]]]] = {}
    jobs = [(name, parts, draw) for name, parts in sets_of(deep).items() for draw in evaluation.draws]
    for name, parts, draw in tqdm(jobs, "fits"):
        labelled = evaluation.labelled(draw)
        for n in range(1, len(labelled) + 1):
            chosen = list(itertools.combinations(labelled, n))
            if subsets is not None and len(chosen) > subsets:
                chosen = sorted(random.Random(f"{draw} {n}").sample(chosen, subsets))
            scores = []
            for images in chosen:
                task = evaluation.task(draw, images=images)
                scores.append(evaluation.run(task, evaluation.features(parts, task)))
            found.setdefault(name, {}).setdefault(n, []).append(scores)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    made = parser(__doc__)
    made.add_argument("--subsets", type=int, help="the most subsets of one size and draw; by default all")
    options = made.parse_args(arguments)
    deep = deep_part(options.bundle)
    found = run(open_evaluation(options), deep, options.subsets)

    def by_draw(name: str, n: int) -> list[float]:
        return [statistics.fmean(s.miou for s in scores) for scores in found[name][n]]

    numbers = sorted({n for by_number in found.values() for n in by_number})
    rows = []
    for n in numbers:
        published = BY_LABELLED_IMAGES.get(n)
        means = {name: statistics.fmean(by_draw(name, n)) for name in found}
        rows.append({"labelled images": n, **{name: f"{mean:.3f}" for name, mean in means.items()},
                     "gain by deep": f"{means['classical + deep'] - means['classical']:+.3f}",
                     "paper: classical": f"{published[0]:.3f}" if published else "",
                     "paper: classical + deep": f"{published[1]:.3f}" if published else ""})
    notes = [estimate_note(options),
             "Each draw labels four images; every subset of them is a fit" +
             (f", at most {options.subsets} of each size (a seeded choice)." if options.subsets else "."),
             f"Paper: {SOURCE}. Its figure begins at four images."]
    if options.out is not None:
        figure, (axes,) = new_figure()
        lines = {name: Line(numbers, [statistics.fmean(by_draw(name, n)) for n in numbers],
                            [statistics.pstdev(by_draw(name, n)) for n in numbers]) for name in found}
        draw_lines(lines, "labelled images", "mIoU", axes)
        notes.insert(0, save(figure, options.out))
    emit(markdown("Ni: mIoU by number of labelled images", rows, PACKAGES, notes), options.out)


if __name__ == "__main__":
    main()
