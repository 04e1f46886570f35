from __future__ import annotations

import builtins
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phaseline.clients import classify, classify_sklearn
from phaseline.clients.classify import (
    CLASSIFIERS,
    Classifier,
    create_classifier,
    load_classifier,
)
from phaseline.runtime.errors import (
    EngineUnavailableError,
    LabelError,
    MissingExtraError,
    RecipeError,
    UsageError,
)

FEATURES = 5
SMALL: dict[str, dict[str, Any]] = {"xgboost": {"trees": 15}, "random_forest": {"n_estimators": 12}, "mlp": {"max_iter": 30}}


def blobs(n: int, classes: int, seed: int = 0) -> tuple[classify.F32, classify.Ints]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, FEATURES)) * 4
    target = np.arange(n) % classes
    return (centres[target] + rng.normal(size=(n, FEATURES))).astype(np.float32), target


def small(kind: str, **options: Any) -> Classifier:
    return create_classifier(kind, device="cpu", **SMALL.get(kind, {}), **options)


@pytest.fixture(params=CLASSIFIERS)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param != "xgboost":
        pytest.importorskip("skops", reason="needs the extra 'sklearn'")
    return str(request.param)


@pytest.mark.parametrize("classes", [2, 4])
def test_learns_and_round_trips(kind: str, classes: int, tmp_path: Path) -> None:
    x, y = blobs(400, classes)
    classifier = small(kind)
    classifier.fit(x, y, classes)
    assert (classifier.n_features, classifier.n_classes, classifier.device) == (FEATURES, classes, "cpu")
    seen, truth = blobs(40_000, classes, seed=1)
    p = classifier.probabilities(seen)
    assert p.dtype == np.float32
    assert p.shape == (len(seen), classes)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert (p.argmax(1) == truth).mean() > 0.9

    classifier.save(tmp_path)
    loaded = load_classifier(kind, tmp_path, n_features=FEATURES, n_classes=classes, threads=1, device="cpu")
    np.testing.assert_array_equal(loaded.probabilities(seen), p)
    assert (loaded.n_features, loaded.n_classes) == (FEATURES, classes)


def test_blocks_threads_and_repetition_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(300, 3)
    seen, _ = blobs(70_001, 3, seed=2)
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(classify, "_VALUES_PER_THREAD", 1000)
        classifier = small(kind, seed=5, threads=threads)
        classifier.fit(x, y, 3)
        whole = classifier.probabilities(seen)
        parts = np.concatenate([classifier.probabilities(part) for part in np.array_split(seen, 7)])
        np.testing.assert_array_equal(parts, whole)
        results.append(whole)
    np.testing.assert_array_equal(*results)


def test_few_labelled_pixels_are_enough(kind: str) -> None:
    x, y = blobs(12, 2)
    classifier = create_classifier(kind, device="cpu")
    classifier.fit(x, y, 2)
    seen, truth = blobs(500, 2, seed=3)
    assert (classifier.probabilities(seen).argmax(1) == truth).mean() > 0.8


def test_no_pixels_give_no_probabilities(kind: str) -> None:
    classifier = small(kind)
    with pytest.raises(UsageError, match="before it was fitted"):
        classifier.probabilities(np.zeros((1, FEATURES), np.float32))
    classifier.fit(*blobs(60, 3), 3)
    assert classifier.probabilities(np.zeros((0, FEATURES), np.float32)).shape == (0, 3)


def test_training_data_that_do_not_fit(kind: str) -> None:
    x, y = blobs(60, 2)
    for features, classes, n, message in (
            (x, y, 3, "class number 2"), (x, y[:-1], 2, "expected"), (x[:0], y[:0], 2, "expected"), (x, y + 1, 2, "1 to 2"),
            (x, y - 1, 2, "-1 to 0"), (x[:, 0], y, 2, "expected")):
        with pytest.raises(LabelError, match=message):
            small(kind).fit(features, classes, n)
    classifier = small(kind)
    classifier.fit(x, y, 2)
    with pytest.raises(UsageError, match=r"\(n, 5\)"):
        classifier.probabilities(x[:, :4])


@pytest.mark.parametrize("damage", ["nonsense", "empty", "remove", "features", "folder"])
def test_files_that_are_no_such_classifier(kind: str, damage: str, tmp_path: Path) -> None:
    classifier = small(kind)
    classifier.fit(*blobs(60, 2), 2)
    classifier.save(tmp_path)
    (path,) = tmp_path.iterdir()
    match damage:
        case "nonsense":
            path.write_bytes(b"{nonsense}" * 20)
        case "empty":
            path.write_bytes(b"")
        case "remove":
            path.unlink()
        case "folder":
            path.unlink()
            path.mkdir()
    n_features = FEATURES + (damage == "features")
    with pytest.raises(RecipeError, match="fit again") as caught:
        load_classifier(kind, tmp_path, n_features=n_features, n_classes=2, device="cpu")
    assert "\n" not in str(caught.value)


def test_foreign_types_are_not_loaded(tmp_path: Path) -> None:
    skops_io = pytest.importorskip("skops.io", reason="needs the extra 'sklearn'")
    from sklearn.feature_selection import SelectKBest
    from sklearn.preprocessing import FunctionTransformer

    classifier = small("linear")
    classifier.fit(*blobs(60, 2), 2)
    classifier.save(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(skops_io.dumps(FunctionTransformer(func=warnings.warn)))
    with pytest.raises(RecipeError, match="expected only what a linear needs"):
        load_classifier("linear", tmp_path, n_features=FEATURES, n_classes=2)
    path.write_bytes(skops_io.dumps(SelectKBest(k=3)))
    with pytest.raises(RecipeError):
        load_classifier("linear", tmp_path, n_features=FEATURES, n_classes=2)


def test_unknown_choices() -> None:
    for make in (lambda: create_classifier("forest"), lambda: load_classifier("forest", Path(), n_features=1, n_classes=2)):
        with pytest.raises(UsageError, match="random_forest"):
            make()
    with pytest.raises(UsageError, match="auto, cpu, cuda"):
        create_classifier("xgboost", device="gpu")
    with pytest.raises(UsageError, match="n_trees"):
        create_classifier("random_forest", n_trees=3)


def test_cuda_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "_cuda_problem", lambda: "it finds no GPU")
    with pytest.raises(EngineUnavailableError, match="it finds no GPU"):
        create_classifier("xgboost", device="cuda")
    assert create_classifier("xgboost", device="auto").device == "cpu"
    with pytest.raises(EngineUnavailableError, match="CPU only"):
        create_classifier("linear", device="cuda")
    monkeypatch.setattr(classify, "_cuda_problem", lambda: "")
    assert create_classifier("xgboost", device="auto").device == "cuda"


def test_the_cuda_probe_agrees_with_the_machine() -> None:
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert classify._cuda_problem() != ""
        assert create_classifier("xgboost", device="auto").device == "cpu"
    else:
        pytest.skip("this machine has a CUDA driver")


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    actual = builtins.__import__

    def without_sklearn(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith(("skops", "sklearn")):
            raise ImportError(name)
        return actual(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(MissingExtraError, match=r"\.\[sklearn\]"):
        create_classifier("mlp")
    assert create_classifier("xgboost", device="cpu").device == "cpu"


def test_the_trusted_types_are_needed() -> None:
    skops_io = pytest.importorskip("skops.io", reason="needs the extra 'sklearn'")
    found: set[str] = set()
    for kind in classify_sklearn.SKLEARN_KINDS:
        classifier = small(kind)
        classifier.fit(*blobs(60, 2), 2)
        assert isinstance(classifier, classify.SklearnClassifier)
        found |= set(skops_io.get_untrusted_types(data=classifier._model.to_bytes()))
    assert found <= set(classify_sklearn.TRUSTED)


def test_too_few_pixels_for_the_method_are_an_error() -> None:
    pytest.importorskip("skops", reason="needs the extra 'sklearn'")
    with pytest.raises(LabelError, match="linear"):
        small("linear").fit(*blobs(2, 2), 2)
