"""mIoU against the number of deep channels beside the classical ones (arXiv 2508.21529 S2)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tqdm import tqdm

from benchmarks.evaluation import PACKAGES, Evaluation, beside, deep_part, estimate_note, open_evaluation, parser, summary
from benchmarks.pixel_table import CLASSICAL, Part
from benchmarks.plots import Line, draw_lines, new_figure, save
from benchmarks.references.papers import BY_CHANNELS, SOURCE
from benchmarks.report import emit, markdown
from benchmarks.scores import Scores

CHANNELS = (0, 1, 2, 4, 8, 16, 32)


def run(evaluation: Evaluation, deep: Part, channels: Sequence[int] = CHANNELS) -> dict[int, list[Scores]]:
    """Fit with the first channels of the deep features, those of most variance.

    Returns
    -------
    Number of channels → scores of each draw. Numbers that the bundle does not reach are left out.
    """
    found: dict[int, list[Scores]] = {}
    for draw in tqdm(evaluation.draws, "fits"):
        task = evaluation.task(draw)
        classical, features = evaluation.columns(CLASSICAL, task), evaluation.columns(deep, task)
        for n in channels:
            if n <= features[0].shape[1]:
                found.setdefault(n, []).append(evaluation.run(task, beside(classical, [f[:, :n] for f in features])))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = parser(__doc__).parse_args(arguments)
    deep = deep_part(options.bundle)
    found = run(open_evaluation(options), deep)
    rows = [{"deep channels": n, **summary(scores), "paper": f"{BY_CHANNELS[n]:.3f}" if n in BY_CHANNELS else ""}
            for n, scores in found.items()]
    notes = [estimate_note(options), f"Paper: {SOURCE}; its network has 128 channels."]
    if options.out is not None:
        figure, (axes,) = new_figure()
        known = {n: miou for n, miou in BY_CHANNELS.items() if n <= max(found)}
        lines = {"classical + deep": Line(list(found), [statistics.fmean(s.miou for s in scores) for scores in found.values()],
                                          [statistics.pstdev([s.miou for s in scores]) for scores in found.values()]),
                 "paper": Line(list(known), list(known.values()), published=True)}
        draw_lines(lines, "deep channels", "mIoU", axes)
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set_xticks(list(found), [str(n) for n in found])
        notes.insert(0, save(figure, options.out))
    emit(markdown("Ni: mIoU by number of deep channels", rows, PACKAGES, notes), options.out)


if __name__ == "__main__":
    main()
