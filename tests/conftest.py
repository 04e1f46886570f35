"""What several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The real labelled micrographs that lie beside the repository on developers' machines."""
    if not DATA.is_dir():
        pytest.skip(f"needs the labelled micrographs in {DATA}, which are not part of the repository")
    return DATA
