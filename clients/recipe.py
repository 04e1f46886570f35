"""Recipes: what fitting writes, and all that segmenting needs besides the bundle.

    RECIPE/
      recipe.json        classes, intensity window, features, bundle hash, versions
      classifier.*       XGBoost's UBJSON, or scikit-learn's through skops; never pickle
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from phaseline.clients.classify import Classifier, load_classifier
from phaseline.clients.features import FEATURES_VERSION, FeatureSettings
from phaseline.clients.labels import ClassTable
from phaseline.clients.window import IntensityWindow
from phaseline.runtime.bundle import describe_file
from phaseline.runtime.errors import MissingInputError, PhaselineError, RecipeError
from phaseline.runtime.output import new_folder

RECIPE_FORMAT = 1
MANIFEST = "recipe.json"
PACKAGES = ("phaseline", "numpy", "opencv-python-headless", "xgboost", "scikit-learn", "onnxruntime")


@dataclass(frozen=True)
class BundleReference:
    """The bundle that a recipe was fitted with.

    Attributes
    ----------
    hash
        Its name; a bundle of another hash is refused.
    path
        Where it was when fitting, or ``default``: looked for there first.
    trained
        False for random weights, of the backbone or of the upsampler.
    """

    hash: str
    path: str
    trained: bool


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which label a pixel gets, but the bundle's graphs.

    Attributes
    ----------
    classes
        The user's label values, names and colours.
    window
        Intensities that become 0 and 255.
    features
        Which features a pixel has.
    classifier_kind, classifier
        Name and fitted classifier.
    bundle
        None for classical features only.
    training
        What it was fitted on: ``images``, and ``pixels`` of each label value.
    versions
        Of the packages that wrote it.
    """

    classes: ClassTable
    window: IntensityWindow
    features: FeatureSettings
    classifier_kind: str
    classifier: Classifier
    bundle: BundleReference | None = None
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path | str, *, overwrite: bool = False) -> None:
        """Write the recipe's folder, whole or not at all.

        Raises
        ------
        OutputExistsError
            The folder exists, and overwriting was not asked for or it is no recipe.
        OutputError
            It cannot be written.
        """
        with new_folder(Path(path), overwrite, MANIFEST) as folder:
            self.classifier.save(folder)
            content = {
                "format": RECIPE_FORMAT,
                "features_version": FEATURES_VERSION,
                "classes": dataclasses.asdict(self.classes),
                "window": dataclasses.asdict(self.window),
                "features": dataclasses.asdict(self.features),
                "classifier": {"kind": self.classifier_kind, "n_features": self.classifier.n_features},
                "bundle": None if self.bundle is None else dataclasses.asdict(self.bundle),
                "training": self.training,
                "versions": self.versions,
                "files": {file.name: describe_file(file).sha256 for file in sorted(folder.iterdir())},
            }
            content["hash"] = _digest(content)
            (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class RecipeSettings:
    """A saved recipe without its classifier: what it takes and gives, read without running a library on its content.

    Attributes
    ----------
    hash
        The recipe's name, 64 hexadecimal digits: over its settings and its classifier.
    classes, window, features, bundle, training, versions
        As `Recipe`.
    classifier_kind, n_features
        Which classifier, and how many features it takes.
    files
        Names of the classifier's files, with their SHA-256.
    """

    hash: str
    classes: ClassTable
    window: IntensityWindow
    features: FeatureSettings
    bundle: BundleReference | None
    training: dict[str, Any]
    versions: dict[str, str]
    classifier_kind: str
    n_features: int
    files: dict[str, str]


def read_settings(path: Path | str) -> RecipeSettings:
    """Read `recipe.json`, and refuse one whose numbers this installation would not reproduce.

    Raises
    ------
    MissingInputError
        There is no such folder.
    RecipeError
        It is damaged, or was written by a version of phaseline or scikit-learn that gives other numbers.
    """
    folder = Path(path)
    content = _read_manifest(folder)
    if content["features_version"] != FEATURES_VERSION:
        raise RecipeError(f"{folder} was fitted on version {content['features_version']} of the features, but this phaseline "
                          f"computes version {FEATURES_VERSION}; fit again")
    try:
        _check_versions(folder, content)
        return RecipeSettings(
            hash=content["hash"],
            classes=ClassTable(**{name: tuple(values) for name, values in content["classes"].items()}),
            window=IntensityWindow(**content["window"]),
            features=FeatureSettings.from_dict(content["features"]),
            bundle=None if content["bundle"] is None else BundleReference(**content["bundle"]),
            training=content["training"],
            versions=content["versions"],
            classifier_kind=content["classifier"]["kind"],
            n_features=content["classifier"]["n_features"],
            files=dict(content["files"]),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, PhaselineError):
            raise
        raise RecipeError(f"{folder / MANIFEST} cannot be understood ({error!r}); fit again") from error


def load_recipe(path: Path | str, *, threads: int | None = None, device: str = "auto") -> Recipe:
    """Read a recipe's folder.

    Parameters
    ----------
    path
        Folder that `Recipe.save` wrote.
    threads
        For the classifier; None: one for each core.
    device
        For the classifier: ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    MissingInputError, RecipeError
        As `read_settings`; or a file is missing or damaged.
    """
    folder = Path(path)
    settings = read_settings(folder)
    for name, expected in settings.files.items():
        file = folder / name
        if not file.is_file():
            raise RecipeError(f"{file} is missing from the recipe; copy the recipe again, or fit again")
        if describe_file(file).sha256 != expected:
            raise RecipeError(f"{file} is damaged: its content does not match {MANIFEST}; copy the recipe again, or fit again")
    return Recipe(
        classes=settings.classes,
        window=settings.window,
        features=settings.features,
        classifier_kind=settings.classifier_kind,
        classifier=load_classifier(
            settings.classifier_kind, folder, n_features=settings.n_features, n_classes=len(settings.classes.values),
            threads=threads, device=device,
        ),
        bundle=settings.bundle,
        training=settings.training,
        versions=settings.versions,
    )


def recipe_files(folder: Path) -> dict[str, bytes]:
    """Content of a recipe's files, by name, as they travel to a server.

    Raises
    ------
    MissingInputError, RecipeError
        As `read_settings`; or a file cannot be read.
    """
    settings = read_settings(folder)
    try:
        return {name: (folder / name).read_bytes() for name in (MANIFEST, *settings.files)}
    except OSError as error:
        raise MissingInputError(f"{error.filename} cannot be read ({error.strerror}); copy the recipe again") from error


def recipe_hash(path: Path | str) -> str:
    """A saved recipe's name, 64 hexadecimal digits: over its settings and its classifier."""
    return str(_read_manifest(Path(path))["hash"])


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide numbers, where installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise MissingInputError(f"no recipe at {folder}: expected a folder written by `phaseline fit`")
    file = folder / MANIFEST
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        expected, written_format = content.pop("hash"), content["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, PhaselineError):
            raise
        raise RecipeError(f"{file} cannot be read ({error}); is this a recipe?") from error
    if written_format != RECIPE_FORMAT:
        raise RecipeError(f"{file} has format {written_format!r}, expected {RECIPE_FORMAT}; fit again with this phaseline")
    if _digest(content) != expected:
        raise RecipeError(f"{file} does not match its own hash: it was edited or damaged; fit again")
    return {**content, "hash": expected}


def _check_versions(folder: Path, content: dict[str, Any]) -> None:
    """Refuse a classifier that the installed library may not read as it was written.

    XGBoost reads models of older versions, scikit-learn only those of its own minor version.
    """
    package = "xgboost" if content["classifier"]["kind"] == "xgboost" else "scikit-learn"
    written, here = content["versions"].get(package), installed_versions().get(package)
    if written is None or here is None:
        return
    then, now = (tuple(int(part) for part in text.split(".")[:2]) for text in (written, here))
    if then > now or (package == "scikit-learn" and then != now):
        raise RecipeError(f"{folder} was fitted with {package} {written}, but {here} is installed; install {package}=={written}, "
                          "or fit again")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
