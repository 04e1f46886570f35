"""Many fits on the same labelled micrographs, fast: features once, then classifiers on stored rows.

    FOLDER/images ─┬─▶ PixelTable: the features of all scribbled and of some thousand sampled pixels
    FOLDER/scribbles/DRAW ─▶ Task: what is trained on, its classes, its intensity window
    FOLDER/masks ──┴─▶ Scores: on the sampled pixels

Window, classes, order of the training pixels and classifier are the product's, so labels are those that `phaseline fit` and
`phaseline segment` give. mIoU is estimated from the sample; `benchmarks.ni` measures it on all pixels, through the command line.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.pixel_table import CLASSICAL, Part, PixelTable
from benchmarks.scores import F64, I64, Scores, sample_pixels, score
from phaseline.clients.classify import create_classifier
from phaseline.clients.features import DeepFeatures, image_channels
from phaseline.clients.images import list_images, read_image
from phaseline.clients.labels import U16, ClassTable, pair_labels, read_labels
from phaseline.clients.window import IntensityWindow
from phaseline.runtime.bundle import Bundle, open_bundle
from phaseline.runtime.contract import F32

SAMPLE = 20_000
PACKAGES = ("phaseline", "xgboost", "scikit-learn", "onnxruntime", "opencv-python-headless")


@dataclass(frozen=True)
class Case:
    """One micrograph.

    Attributes
    ----------
    name
        Stem of its file.
    image
        As `read_image` gives it.
    labels
        Draw → label values of shape (rows, cols), 0: unlabelled.
    truth
        Label values of shape (rows, cols).
    scored
        Ascending flat indices of the pixels that count.
    weights
        Number of pixels that each of them stands for.
    """

    name: str
    image: npt.NDArray[np.generic]
    labels: Mapping[str, U16]
    truth: U16
    scored: I64
    weights: F64


@dataclass(frozen=True)
class Task:
    """What a classifier is trained on and scored on.

    Attributes
    ----------
    draw
        Whose labels.
    trained, scored
        Numbers of cases.
    classes, window, channels
        As `phaseline fit` chooses them from the labelled images.
    """

    draw: str
    trained: tuple[int, ...]
    scored: tuple[int, ...]
    classes: ClassTable
    window: IntensityWindow
    channels: int


class Evaluation:
    """Cases, and the features of their scored and labelled pixels.

    Parameters
    ----------
    cases
        The micrographs.
    cache
        Folder for features.
    threads
        None: one for each core.
    """

    def __init__(self, cases: Sequence[Case], cache: Path, threads: int | None = None) -> None:
        self.cases, self._threads = cases, threads
        self.draws = tuple(sorted({draw for case in cases for draw in case.labels}))
        self._kept = [np.unique(np.concatenate([case.scored, *(np.flatnonzero(labels) for labels in case.labels.values())]))
                      for case in cases]
        self._table = PixelTable([case.name for case in cases], [case.image for case in cases], self._kept, cache, threads)

    def task(self, draw: str, *, images: Sequence[int] | None = None, scored: Sequence[int] | None = None) -> Task:
        """The task of a draw.

        Parameters
        ----------
        draw
            One of `draws`.
        images
            Labelled cases to train on; None: all that the draw labels.
        scored
            Cases to score; None: all, as in the papers, the trained ones too.
        """
        trained = tuple(self.labelled(draw) if images is None else images)
        pictures = [self.cases[i].image for i in trained]
        return Task(draw, trained, tuple(range(len(self.cases)) if scored is None else scored),
                    ClassTable.from_labels([self.cases[i].labels[draw] for i in trained]),
                    IntensityWindow.fit(pictures), image_channels(pictures))

    def labelled(self, draw: str) -> list[int]:
        """Cases that a draw labels."""
        return [i for i, case in enumerate(self.cases) if draw in case.labels]

    def columns(self, part: Part, task: Task) -> list[F32]:
        """Of each case, the float32 features (pixels, channels) of a part at all pixels that are kept."""
        return self._table.columns(part, task.window, task.channels)

    def features(self, parts: Sequence[Part], task: Task) -> list[F32]:
        """The same of several parts, side by side in the product's order: classical first."""
        return beside(*(self.columns(part, task) for part in parts))

    def run(self, task: Task, features: Sequence[F32], *, classifier: str = "xgboost", seed: int = 0) -> Scores:
        """Fit and score.

        Parameters
        ----------
        task
            On what.
        features
            Of each case, an array of shape (kept pixels, channels).
        classifier, seed
            See `create_classifier`.
        """
        model = create_classifier(classifier, seed=seed, threads=self._threads)
        rows, classes = [], []
        for i in task.trained:
            index = task.classes.to_index(self.cases[i].labels[task.draw]).reshape(-1)[self._kept[i]]
            rows.append(features[i][index >= 0])
            classes.append(index[index >= 0].astype(np.int64))
        model.fit(np.concatenate(rows), np.concatenate(classes), len(task.classes.values))
        results = []
        for i in task.scored:
            case = self.cases[i]
            found = model.probabilities(np.ascontiguousarray(features[i][np.isin(self._kept[i], case.scored)]))
            predicted = task.classes.to_values(found.argmax(axis=1))
            results.append((predicted, case.truth.reshape(-1)[case.scored], case.weights))
        return score(results)


def beside(*columns: Sequence[F32]) -> list[F32]:
    """Feature columns side by side, case by case."""
    return [np.hstack(parts) for parts in zip(*columns, strict=True)]


def masked_cases(folder: Path, sample: int = SAMPLE, seed: int = 0) -> list[Case]:
    """Micrographs with a mask each and scribbles on some.

    Parameters
    ----------
    folder
        With ``images``, ``masks`` and ``scribbles/DRAW``; files belong together by stem.
    sample, seed
        About how many pixels of each image are scored, and which.
    """
    images = list_images(folder / "images")
    labels: dict[str, dict[str, Path]] = {image.stem: {} for image in images}
    for draw in sorted(path for path in (folder / "scribbles").iterdir() if path.is_dir()):
        for path, file in pair_labels(images, draw):
            labels[path.stem][draw.name] = file
    cases = []
    for path, mask in pair_labels(images, folder / "masks"):
        image = read_image(path)
        shape = (image.shape[0], image.shape[1])
        truth = read_labels(mask, shape)
        scored, weights = sample_pixels(truth, sample, [seed, zlib.crc32(path.stem.encode())])
        cases.append(Case(path.stem, image, {draw: read_labels(file, shape) for draw, file in labels[path.stem].items()},
                          truth, scored, weights))
    return cases


def scribbled_cases(folder: Path, draw: str) -> list[Case]:
    """Micrographs with nothing but scribbles, which are trained on and scored on.

    Parameters
    ----------
    folder
        With ``images`` and ``scribbles``.
    draw
        Name for the scribbles.
    """
    cases = []
    for path, file in pair_labels(list_images(folder / "images"), folder / "scribbles"):
        image = read_image(path)
        labels = read_labels(file, (image.shape[0], image.shape[1]))
        scored = np.flatnonzero(labels)
        cases.append(Case(path.stem, image, {draw: labels}, labels, scored, np.ones(len(scored))))
    return cases


def summary(scores: Sequence[Scores]) -> dict[str, object]:
    """Columns of a table: mean mIoU over draws, its standard deviation over them, and the mean IoU of each class."""
    spread = statistics.stdev([s.miou for s in scores]) if len(scores) > 1 else 0.0
    classes = sorted({value for s in scores for value in s.classes})
    return {"mIoU": f"**{statistics.fmean(s.miou for s in scores):.3f}**", "± over draws": f"{spread:.3f}",
            **{f"IoU class {value}": f"{statistics.fmean(s.class_iou(value) for s in scores):.3f}" for value in classes}}


def parser(description: str | None, data: str = "folder with images, masks, scribbles/DRAW") -> argparse.ArgumentParser:
    """The options that all these tables have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--data", type=Path, required=True, help=data)
    made.add_argument("--bundle", default="default", help="'default' or a bundle's folder")
    made.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "phaseline-benchmarks",
                      help="folder that keeps features, shared by all tables")
    made.add_argument("--sample", type=int, default=SAMPLE, help="pixels of each image that are scored")
    made.add_argument("--draws", nargs="+", help="some of the draws of scribbles; by default all")
    made.add_argument("--threads", type=int)
    made.add_argument("--out", type=Path, help="Markdown file; the picture lies beside it")
    return made


def deep_part(bundle: str, name: str = "deep") -> Part:
    """A bundle as `phaseline fit` uses it unless told otherwise."""
    opened = open_bundle(bundle)
    return Part(name, opened, DeepFeatures.for_bundle(opened.spec))


def open_evaluation(options: argparse.Namespace) -> Evaluation:
    """Of the options of `parser`; keeps the chosen draws."""
    evaluation = Evaluation(masked_cases(options.data, options.sample), options.cache, options.threads)
    if options.draws:
        unknown = set(options.draws) - set(evaluation.draws)
        if unknown:
            raise SystemExit(f"no draw {', '.join(sorted(unknown))} in {options.data}, only {', '.join(evaluation.draws)}")
        evaluation.draws = tuple(options.draws)
    return evaluation


def sets_of(deep: Part) -> dict[str, list[Part]]:
    """The feature sets that the papers compare."""
    return {"classical": [CLASSICAL], "deep": [deep], "classical + deep": [CLASSICAL, deep]}


def about(bundle: Bundle) -> str:
    """A bundle in a sentence."""
    spec = bundle.spec
    return (f"Deep: {spec.backbone}, {'trained' if spec.trained else 'untrained (random weights)'}, stride {spec.stride_px}, "
            f"{'with' if spec.has_upsampler else 'without'} upsampler, bundle {bundle.hash[:12]}.")


def estimate_note(options: argparse.Namespace) -> str:
    """What a reader must know of all the tables on masks."""
    return (f"Means over draws. mIoU is estimated from about {options.sample} sampled pixels of each image, drawn class by class "
            f"and weighted; `benchmarks.ni` measures on all pixels. {about(open_bundle(options.bundle))}")
