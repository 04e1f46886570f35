"""Which folder may import which; what a thin client must not load; what the code must not contain."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("export", "runtime", "triton_models", "clients")
MAY_IMPORT = {
    "runtime": {"runtime"},
    "clients": {"clients", "runtime"},
    "export": {"export", "runtime"},
    "triton_models": {"triton_models", "clients", "runtime"},
}
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_the_right_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] not in FOLDERS, f"{name}: import phaseline.{name}"
        # torch.load(weights_only=True) raises pickle's error, so its name may be imported, and nothing else.
        assert parts[0] not in {"pickle", "joblib"} or name == "pickle.UnpicklingError", f"{name} would load pickles"
        if parts[0] == "phaseline":
            assert parts[1] in MAY_IMPORT[folder], f"{folder} must not import {name}"
        if parts[0] in {"torch", "timm", "torchvision"}:
            assert folder == "export", f"{name} outside export/"


@pytest.mark.parametrize(("module", "forbidden"), [
    ("phaseline.clients.__main__", ["torch", "timm", "onnx", "onnxruntime", "phaseline.export"]),
    ("phaseline.runtime.source", ["torch", "onnxruntime", "xgboost", "skimage", "cv2", "scipy"]),
])
def test_importing_stays_light(module: str, forbidden: list[str]) -> None:
    code = f"import sys, {module}; print(*[name for name in {forbidden} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.split() == []
