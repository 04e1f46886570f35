"""scikit-learn's classifiers (extra ``sklearn``), imported when one is made; stored with skops, never pickle.

`random_forest`         200 trees; the classifier of Weka's and ilastik's pixel classification
`logistic_regression`   multinomial, on standardised features
`linear`                linear discriminant analysis with Ledoit and Wolf's shrinkage: the closed-form linear classifier
                        that has probabilities (with two classes its direction is that of ridge regression)
`mlp`                   two hidden layers, 64 and 32 units, on standardised features; weight decay and length of training follow
                        the number of labelled pixels, see `_mlp_settings`
"""

from __future__ import annotations

import io
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, assert_never, get_args

import numpy as np
import numpy.typing as npt

from phaseline.runtime.errors import LabelError, MissingExtraError, RecipeError, UsageError

F32 = npt.NDArray[np.float32]

SklearnKind = Literal["random_forest", "logistic_regression", "linear", "mlp"]
SKLEARN_KINDS: tuple[SklearnKind, ...] = get_args(SklearnKind)

# What these estimators hold beyond the types that skops trusts by itself: looked up with skops' own list.
TRUSTED = ("sklearn.tree._tree.Tree", "sklearn.neural_network._stochastic_optimizers.AdamOptimizer")
# Pixels a step: bounds the float64 copies, and is the unit of work for threads.
_BLOCK_PX = 1 << 15


class SklearnModel:
    """An estimator of one kind: made, fitted, evaluated in blocks, stored.

    Raises
    ------
    MissingExtraError
        scikit-learn or skops is not installed.
    UsageError
        A parameter that the estimator does not have.
    """

    def __init__(self, kind: SklearnKind, seed: int, threads: int, params: dict[str, Any]) -> None:
        try:
            import skops.io  # noqa: F401
            self._estimator: Any = _create(kind, seed, params)
        except ImportError as error:
            raise MissingExtraError("scikit-learn with skops", "sklearn", f"the classifier {kind}") from error
        except TypeError as error:
            raise UsageError(f"the classifier {kind} cannot be made ({error}); give parameters that it has") from error
        self.kind = kind
        self._threads, self._params = threads, params

    def fit(self, features: F32, classes: npt.NDArray[np.integer[Any]]) -> None:
        """Fit on float32 features (n, channels) and classes (n,); LabelError if the method cannot."""
        from sklearn.exceptions import ConvergenceWarning

        if self.kind == "random_forest":
            self._estimator.n_jobs = self._threads
        elif self.kind == "mlp":
            self._estimator[-1].set_params(**_mlp_settings(len(classes)) | self._params)
        with warnings.catch_warnings():
            # A bounded number of iterations is wanted here, not an oversight.
            warnings.simplefilter("ignore", ConvergenceWarning)
            try:
                self._estimator.fit(self._prepared(features), classes)
            except ValueError as error:
                raise LabelError(f"a {self.kind} classifier cannot be fitted on these {len(classes)} labelled pixels "
                                 f"({' '.join(str(error).split())[:120]}); label more, or choose xgboost") from error
        self._evaluate_alone()

    def probabilities(self, features: F32, n_classes: int) -> F32:
        """float32 array of shape (n, n_classes)."""
        out = np.empty((len(features), n_classes), np.float32)

        def evaluate(start: int) -> None:
            block = self._prepared(features[start:start + _BLOCK_PX])
            out[start:start + _BLOCK_PX] = self._estimator.predict_proba(block)

        starts = range(0, len(features), _BLOCK_PX)
        if self.kind == "random_forest" and len(starts) > 1:
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(evaluate, starts))
        else:
            for start in starts:
                evaluate(start)
        return out

    def to_bytes(self) -> bytes:
        """The estimator as a skops file."""
        import skops.io

        buffer = io.BytesIO()
        skops.io.dump(self._estimator, buffer, compression=zipfile.ZIP_DEFLATED)
        return buffer.getvalue()

    def load_bytes(self, content: bytes, path: Path, n_features: int, n_classes: int) -> None:
        """Take over a stored estimator of the same kind.

        Raises
        ------
        RecipeError
            Damaged, of another kind, or holding types that are not in `TRUSTED`.
        """
        import skops.io
        from skops.io.exceptions import UnsupportedTypeException, UntrustedTypesFoundException

        try:
            strangers = sorted(set(skops.io.get_untrusted_types(data=content)) - set(TRUSTED))
            if strangers:
                raise RecipeError(f"{path} holds {', '.join(strangers)}, expected only what a {self.kind} needs; do "
                                  "not use it: fit again")
            estimator = skops.io.loads(content, trusted=list(TRUSTED))
            fits = (type(estimator) is type(self._estimator) and estimator.n_features_in_ == n_features
                    and list(estimator.classes_) == list(range(n_classes)))
        except (zipfile.BadZipFile, UntrustedTypesFoundException, UnsupportedTypeException, ValueError, LookupError,
                TypeError, AttributeError, ImportError, OSError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(f"{path} is no {self.kind} of this scikit-learn ({type(error).__name__}: "
                              f"{' '.join(str(error).split())[:120]}); fit again") from error
        if not fits:
            raise RecipeError(f"{path} holds another classifier than a {self.kind} of {n_features} features and "
                              f"{n_classes} classes; fit again")
        self._estimator = estimator
        self._evaluate_alone()

    def _prepared(self, features: F32) -> npt.NDArray[np.floating[Any]]:
        # In double precision, what a matrix product's grouping of rows does to the last bits disappears on rounding to
        # float32.
        return features if self.kind == "random_forest" else features.astype(np.float64)

    def _evaluate_alone(self) -> None:
        # A forest that evaluates trees in threads adds them up in the order in which they finish: threads share blocks
        # instead.
        if self.kind == "random_forest":
            self._estimator.n_jobs = 1


def _create(kind: SklearnKind, seed: int, params: dict[str, Any]) -> Any:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    settings: dict[str, Any]
    match kind:
        case "random_forest":
            return RandomForestClassifier(**{"n_estimators": 200, "random_state": seed} | params)
        case "logistic_regression":
            settings = {"max_iter": 200, "random_state": seed} | params
            return make_pipeline(StandardScaler(), LogisticRegression(**settings))
        case "linear":
            settings = {"solver": "lsqr", "shrinkage": "auto"} | params
            return make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(**settings))
        case "mlp":
            settings = {"hidden_layer_sizes": (64, 32), "random_state": seed} | params
            return make_pipeline(StandardScaler(), MLPClassifier(**settings))
    assert_never(kind)


def _mlp_settings(n: int) -> dict[str, Any]:
    """Weight decay and passes for n labelled pixels.

    scikit-learn divides `alpha` by n and counts passes, so that its defaults mean something else for every n. On the Ni
    micrographs (39,000 pixels) they failed on images unlike the labelled ones: mean IoU 0.32 on scribble draw 0, 0.56 on
    draw 1; with these, 0.50 and 0.61.
    """
    batches = -(-n // 200)
    return {"alpha": 2.5e-4 * n, "max_iter": min(-(-3000 // batches), 500)}
