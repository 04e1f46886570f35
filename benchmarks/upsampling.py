"""mIoU by the way from patch to pixel features (arXiv 2508.21529 Fig. S3), the small phase above all."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import cast

from tqdm import tqdm

from benchmarks.evaluation import PACKAGES, Evaluation, estimate_note, open_evaluation, parser, summary
from benchmarks.pixel_table import CLASSICAL, Part
from benchmarks.plots import draw_bars, new_figure, save
from benchmarks.report import emit, markdown
from benchmarks.scores import Scores
from phaseline.clients.features import DeepFeatures
from phaseline.runtime.average import PixelSampling
from phaseline.runtime.bundle import Bundle, open_bundle
from phaseline.runtime.geometry import Interpolation

SHIFTS = "moore:2"


def ways(bundle: Bundle, strided: Bundle | None = None) -> list[Part]:
    """The ways that a bundle, and another of finer stride, offer."""
    parts = [interpolated("nearest", bundle, "nearest"), interpolated("bilinear", bundle, "bilinear"),
             interpolated(f"shift-averaged ({SHIFTS})", bundle, "bilinear", SHIFTS)]
    if strided is not None:
        parts.append(interpolated(f"strided (stride {strided.spec.stride_px})", strided, "bilinear"))
    if bundle.spec.has_upsampler:
        parts.append(interpolated("learned", bundle, "learned"))
    return parts


def run(evaluation: Evaluation, parts: list[Part]) -> dict[tuple[str, str], list[Scores]]:
    """Fit with the classical features beside each way's, and with each way's alone.

    Returns
    -------
    (way, ``classical + deep`` or ``deep``) → scores of each draw; (``none``, ``classical``) comes first.
    """
    found: dict[tuple[str, str], list[Scores]] = {}
    sets = [("none", "classical", [CLASSICAL])]
    for part in parts:
        sets += [(part.name, "classical + deep", [CLASSICAL, part]), (part.name, "deep", [part])]
    for way, name, kept in tqdm(sets, "fits"):
        for draw in evaluation.draws:
            task = evaluation.task(draw)
            found.setdefault((way, name), []).append(evaluation.run(task, evaluation.features(kept, task)))
    return found


def interpolated(name: str, bundle: Bundle, interpolation: str, transforms: str = "none") -> Part:
    """A bundle's features by one way of coming to pixels, averaged over the views of a transform set."""
    sampling = dataclasses.replace(PixelSampling(), interpolation=cast(Interpolation, interpolation))
    return Part(name, bundle, DeepFeatures.for_bundle(bundle.spec, transforms, sampling))


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    made = parser(__doc__)
    made.add_argument("--bundle-strided", type=Path, help="a bundle of the same backbone with a finer stride")
    options = made.parse_args(arguments)
    bundle = open_bundle(options.bundle)
    found = run(open_evaluation(options), ways(bundle, options.bundle_strided and open_bundle(options.bundle_strided)))
    rows = [{"upsampling": way, "features": name, **summary(scores)} for (way, name), scores in found.items()]
    notes = [estimate_note(options),
             "On Ni, class 2 is the small phase.",
             "The paper's Fig. S3 compares upsamplers by their segmentations of one image: no figure to stand beside these."]
    if options.out is not None:
        figure, panels = new_figure(2, width_in=5.0)
        beside = {way.replace(" (", "\n("): scores for (way, name), scores in found.items() if name != "deep"}
        values = found["none", "classical"][0].classes
        draw_bars({way: {"classical + deep": statistics.fmean(s.miou for s in scores)} for way, scores in beside.items()},
                  "mIoU", panels[0])
        draw_bars({way: {f"class {v}": statistics.fmean(s.class_iou(v) for s in scores) for v in values}
                   for way, scores in beside.items()}, "IoU", panels[1])
        notes.insert(0, save(figure, options.out))
    emit(markdown("Ni: mIoU by upsampling", rows, PACKAGES, notes), options.out)


if __name__ == "__main__":
    main()
