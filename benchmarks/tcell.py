"""T-cells (arXiv 2410.19836): trained on the scribbles of all cells but one, scored on that one's scribbled pixels."""

from __future__ import annotations

import statistics

from tqdm import tqdm

from benchmarks.evaluation import PACKAGES, Evaluation, about, deep_part, parser, scribbled_cases, sets_of
from benchmarks.pixel_table import Part
from benchmarks.plots import draw_bars, new_figure, save
from benchmarks.report import emit, markdown
from benchmarks.scores import Scores
from phaseline.runtime.bundle import open_bundle

DRAW = "scribbles"


def run(evaluation: Evaluation, deep: Part) -> dict[str, list[Scores]]:
    """Feature set → scores of each cell, left out."""
    found: dict[str, list[Scores]] = {}
    labelled = evaluation.labelled(DRAW)
    for left_out in tqdm(labelled, "fits"):
        task = evaluation.task(DRAW, images=[i for i in labelled if i != left_out], scored=[left_out])
        for name, parts in sets_of(deep).items():
            found.setdefault(name, []).append(evaluation.run(task, evaluation.features(parts, task)))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = parser(__doc__, "folder with images, scribbles").parse_args(arguments)
    deep = deep_part(options.bundle)
    evaluation = Evaluation(scribbled_cases(options.data, DRAW), options.cache, options.threads)
    found = run(evaluation, deep)
    names = [case.name for case in evaluation.cases]
    rows: list[dict[str, object]] = []
    for measure in ("mIoU", "accuracy"):
        for name, scores in found.items():
            values = [s.miou if measure == "mIoU" else s.accuracy for s in scores]
            rows.append({"measure": measure, "features": name,
                         **{cell: f"{value:.3f}" for cell, value in zip(names, values, strict=True)},
                         "mean": f"**{statistics.fmean(values):.3f}**"})
    notes = ["mIoU: mean over the classes that are scribbled on the cell. All scribbled pixels count, and no others. "
             f"{about(open_bundle(options.bundle))}",
             "The papers score T-cells on full masks, which are not at hand: no figure of theirs stands beside these."]
    if options.out is not None:
        figure, (axes,) = new_figure(width_in=9.0)
        bars = {cell: {name: scores[i].miou for name, scores in found.items()} for i, cell in enumerate(names)}
        draw_bars({**bars, "mean": {name: statistics.fmean(s.miou for s in scores) for name, scores in found.items()}},
                  "mIoU", axes)
        notes.insert(0, save(figure, options.out))
    emit(markdown("T-cells: leave one cell out", rows, PACKAGES, notes), options.out)


if __name__ == "__main__":
    main()
