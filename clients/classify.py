"""Pixel classifiers: features in, class probabilities out. XGBoost is the default; scikit-learn's are an extra.

    fit ──▶ Classifier ──▶ save(folder):  classifier.ubj (XGBoost) or classifier.skops (scikit-learn), never pickle
    load_classifier(kind, folder) ──▶ Classifier

The recipe keeps the file's hash, and checks it before a file is loaded: XGBoost's reader crashes on some damaged models.
"""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any, Protocol, Self, get_args

import numpy as np
import xgboost

from phaseline.clients.classify_common import (
    F32,
    Ints,
    available_cores,
    check_features,
    check_training,
)
from phaseline.clients.classify_sklearn import SKLEARN_KINDS, SklearnKind, SklearnModel
from phaseline.runtime.errors import EngineUnavailableError, RecipeError, UsageError

CLASSIFIERS: tuple[str, ...] = ("xgboost", *SKLEARN_KINDS)
DEVICES = ("auto", "cpu", "cuda")

# Measured on the Ni micrographs' five scribble draws with classical features, mean IoU: 0.584 with 100 trees of XGBoost's
# own settings, 0.586 with 300 of learning rate 0.1, 0.596 with these slow, subsampled ones (better in each draw), and 0.590
# with these and balanced weights.
# A child may be nearly empty, else a dozen labelled pixels could not be split at all.
_XGBOOST_DEFAULTS: dict[str, Any] = {
    "trees": 300, "learning_rate": 0.05, "max_depth": 6, "subsample": 0.5, "colsample_bynode": 0.3, "min_child_weight": 0.1,
    "balanced": False}
# Feature values (pixels × channels) that make another thread worth its waiting.
_VALUES_PER_THREAD = 4_000_000


class Classifier(Protocol):
    """What every classifier does. Class numbers are 0 … n_classes - 1."""

    device: str
    n_features: int
    n_classes: int

    def fit(self, features: F32, classes: Ints, n_classes: int) -> None:
        """Learn from labelled pixels.

        Parameters
        ----------
        features
            float32 array of shape (n, channels), finite.
        classes
            Integer array of shape (n,), 0 … n_classes - 1.
        n_classes
            At least 2, each of which occurs.

        Raises
        ------
        LabelError
            A class without pixels, or shapes that do not agree.
        """
        ...

    def probabilities(self, features: F32) -> F32:
        """Class probabilities of pixels.

        Parameters
        ----------
        features
            float32 array of shape (n, channels).

        Returns
        -------
        float32 array of shape (n, n_classes); rows sum to 1.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the classifier's one file into an existing folder."""
        ...


class XGBoostClassifier:
    """Gradient-boosted trees (XGBoost's `hist` method with a softmax over the classes, for two of them too).

    Predictions do not depend on how pixels are grouped into calls. The same seed gives the same model, whatever the
    number of threads.

    Parameters
    ----------
    seed
        Of XGBoost's random choices of pixels and features.
    threads
        On the CPU; None: one for each core that this process may use.
    device
        ``cpu``, ``cuda``, or ``auto``: CUDA where it works. The choice made is the attribute `device`.
    trees, learning_rate, max_depth
        The number of boosting rounds (one tree a class each), their step, and their depth.
    balanced
        Weigh classes equally, whatever the number of their labelled pixels.
    **booster
        Any other parameter of XGBoost.

    Raises
    ------
    EngineUnavailableError
        ``cuda`` was asked for, and XGBoost finds none.
    """

    FILE = "classifier.ubj"

    def __init__(self, *, seed: int = 0, threads: int | None = None, device: str = "auto", **params: Any) -> None:
        self.device = choose_device(device)
        self.n_features = self.n_classes = 0
        settings = _XGBOOST_DEFAULTS | params
        if settings.get("booster", "gbtree") != "gbtree":
            raise UsageError(f"XGBoost's booster {settings['booster']!r} was asked for, expected gbtree: others are no trees, or "
                             "must not predict side by side")
        self._rounds, self._balanced = int(settings.pop("trees")), bool(settings.pop("balanced"))
        self._params = {"tree_method": "hist", "objective": "multi:softprob", "seed": seed, "device": self.device,
                        "nthread": threads or available_cores(), **settings}
        self._booster: xgboost.Booster | None = None

    def fit(self, features: F32, classes: Ints, n_classes: int) -> None:
        """See `Classifier.fit`."""
        counts = check_training(features, classes, n_classes)
        weights = (len(classes) / (n_classes * counts))[classes] if self._balanced else None
        # XGBoost's threads spin at a barrier at every tree level. On small data they gain little, and on a busy machine lose
        # much (2 threads on 2 busy cores: 14 times slower than one; on idle ones 1.8 times faster).
        threads = min(self._params["nthread"], 1 + features.size // _VALUES_PER_THREAD)
        data = xgboost.QuantileDMatrix(features, label=classes, weight=weights, nthread=threads)
        settings = {**self._params, "num_class": n_classes, "nthread": threads}
        self._booster = xgboost.train(settings, data, num_boost_round=self._rounds)
        self._booster.set_param({"nthread": self._params["nthread"]})
        self.n_features, self.n_classes = features.shape[1], n_classes

    def probabilities(self, features: F32) -> F32:
        """See `Classifier.probabilities`."""
        booster = self._fitted()
        check_features(features, self.n_features)
        if len(features) == 0:
            return np.empty((0, self.n_classes), np.float32)
        if self.device == "cuda":
            # In-place prediction wants the features on the GPU already, and warns otherwise.
            return np.asarray(booster.predict(xgboost.DMatrix(features)), np.float32)
        return np.asarray(booster.inplace_predict(features), np.float32)

    def save(self, folder: Path) -> None:
        """See `Classifier.save`."""
        (folder / self.FILE).write_bytes(self._fitted().save_raw("ubj"))

    @classmethod
    def load(
        cls, folder: Path, n_features: int, n_classes: int, *, threads: int | None = None, device: str = "auto"
    ) -> Self:
        """Read what `save` wrote; see `load_classifier`."""
        content = _read(folder / cls.FILE)
        classifier = cls(threads=threads, device=device)
        booster = xgboost.Booster({"nthread": classifier._params["nthread"]})
        try:
            booster.load_model(bytearray(content))
            booster.set_param({"device": classifier.device})
            found = booster.num_features()
        except (xgboost.core.XGBoostError, ValueError) as error:
            raise RecipeError(f"{folder / cls.FILE} is no XGBoost model ({' '.join(str(error).split())[:120]}); fit "
                              "again") from error
        if found != n_features:
            raise RecipeError(f"{folder / cls.FILE} takes {found} features, expected {n_features}; fit again")
        classifier._booster, classifier.n_features, classifier.n_classes = booster, n_features, n_classes
        return classifier

    def _fitted(self) -> xgboost.Booster:
        if self._booster is None:
            raise UsageError("the classifier was used before it was fitted; call fit first, or load one")
        return self._booster


class SklearnClassifier:
    """One of scikit-learn's classifiers, behind the same protocol; see `phaseline.clients.classify_sklearn`.

    They run on the CPU. `threads` matters to the random forest; linear algebra uses as many as its library is set to.
    """

    FILE = "classifier.skops"

    def __init__(self, kind: SklearnKind, *, seed: int = 0, threads: int | None = None, device: str = "auto",
                 **params: Any) -> None:
        if device == "cuda":
            raise EngineUnavailableError(f"the classifier {kind} runs on the CPU only, but device 'cuda' was asked "
                                         "for; choose 'cpu' or 'auto', or the classifier xgboost")
        choose_device("cpu" if device == "auto" else device)
        self.device = "cpu"
        self.n_features = self.n_classes = 0
        self._model = SklearnModel(kind, seed, threads or available_cores(), params)

    def fit(self, features: F32, classes: Ints, n_classes: int) -> None:
        """See `Classifier.fit`."""
        check_training(features, classes, n_classes)
        self._model.fit(features, classes)
        self.n_features, self.n_classes = features.shape[1], n_classes

    def probabilities(self, features: F32) -> F32:
        """See `Classifier.probabilities`."""
        if not self.n_features:
            raise UsageError("the classifier was used before it was fitted; call fit first, or load one")
        check_features(features, self.n_features)
        return self._model.probabilities(features, self.n_classes)

    def save(self, folder: Path) -> None:
        """See `Classifier.save`."""
        (folder / self.FILE).write_bytes(self._model.to_bytes())

    @classmethod
    def load(cls, kind: SklearnKind, folder: Path, n_features: int, n_classes: int, *, threads: int | None = None) -> Self:
        """Read what `save` wrote; see `load_classifier`."""
        content = _read(folder / cls.FILE)
        classifier = cls(kind, threads=threads)
        classifier._model.load_bytes(content, folder / cls.FILE, n_features, n_classes)
        classifier.n_features, classifier.n_classes = n_features, n_classes
        return classifier


def create_classifier(kind: str, *, seed: int = 0, threads: int | None = None, device: str = "auto",
                      **params: Any) -> Classifier:
    """An unfitted classifier.

    Parameters
    ----------
    kind
        One of `CLASSIFIERS`.
    seed, threads, device
        See `XGBoostClassifier`.
    **params
        The chosen library's own parameters.

    Raises
    ------
    UsageError
        An unknown kind or device.
    MissingExtraError
        The extra ``sklearn`` is needed and not installed.
    EngineUnavailableError
        The device is not there.
    """
    _check_kind(kind)
    if kind == "xgboost":
        return XGBoostClassifier(seed=seed, threads=threads, device=device, **params)
    return SklearnClassifier(_sklearn_kind(kind), seed=seed, threads=threads, device=device, **params)


def load_classifier(
    kind: str,
    folder: Path,
    *,
    n_features: int,
    n_classes: int,
    threads: int | None = None,
    device: str = "auto",
) -> Classifier:
    """Read a classifier that `Classifier.save` wrote.

    Parameters
    ----------
    kind
        One of `CLASSIFIERS`.
    folder
        Where its file lies, known to be undamaged.
    n_features, n_classes
        What it must have been fitted on.
    threads, device
        See `XGBoostClassifier`; scikit-learn's run on the CPU whatever the device.

    Raises
    ------
    UsageError, MissingExtraError, EngineUnavailableError
        As `create_classifier`.
    RecipeError
        The file is missing, is no such classifier, or holds a type that these classifiers have no need of.
    """
    _check_kind(kind)
    if kind == "xgboost":
        return XGBoostClassifier.load(folder, n_features, n_classes, threads=threads, device=device)
    return SklearnClassifier.load(_sklearn_kind(kind), folder, n_features, n_classes, threads=threads)


def choose_device(device: str) -> str:
    """``cpu`` or ``cuda`` for what was asked; ``auto`` is CUDA where XGBoost can train on it.

    Raises
    ------
    UsageError
        Another name.
    EngineUnavailableError
        ``cuda`` was asked for, and does not work.
    """
    if device not in DEVICES:
        raise UsageError(f"the device is {device!r}, expected one of {', '.join(DEVICES)}; choose one of these")
    if device == "cpu":
        return "cpu"
    problem = _cuda_problem()
    if problem and device == "cuda":
        raise EngineUnavailableError(f"XGBoost cannot use CUDA, which device 'cuda' asks for: {problem}; choose 'cpu' "
                                     "or 'auto'")
    return "cpu" if problem else "cuda"


@functools.cache
def _cuda_problem() -> str:
    if not xgboost.build_info()["USE_CUDA"]:
        return "this build of XGBoost has no CUDA"
    data = xgboost.DMatrix(np.zeros((2, 1), np.float32), label=np.array([0, 1]))
    with warnings.catch_warnings():
        # Without a GPU, XGBoost warns and goes on with the CPU; what it settled on stands in its configuration.
        warnings.simplefilter("ignore")
        try:
            booster = xgboost.train({"device": "cuda", "tree_method": "hist", "max_depth": 1}, data, num_boost_round=1)
        except xgboost.core.XGBoostError as error:
            return " ".join(str(error).split())[:200]
        settled = json.loads(booster.save_config())["learner"]["generic_param"]["device"]
    return "" if str(settled).startswith("cuda") else "it finds no GPU"


def _read(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RecipeError(f"{file} cannot be read ({error.strerror}); fit again") from error
    if not content:
        raise RecipeError(f"{file} is empty; fit again")
    return content


def _check_kind(kind: str) -> None:
    if kind not in CLASSIFIERS:
        raise UsageError(f"the classifier is {kind!r}, expected one of {', '.join(CLASSIFIERS)}; choose one of these")


def _sklearn_kind(kind: str) -> SklearnKind:
    return next(known for known in get_args(SklearnKind) if known == kind)
