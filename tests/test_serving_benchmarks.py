"""The benchmarks of serving, run once, tiny: that they work and check what they claim; their figures are not looked at."""

from __future__ import annotations

import pytest

from benchmarks import serving, soak
from phaseline.export.bundle_writer import ExportOptions
from phaseline.runtime.bundle import Bundle

pytestmark = [pytest.mark.triton, pytest.mark.slow]


def test_serving(needs_triton: None) -> None:
    options = ExportOptions("vit-32-2-2-p14", weights="random:0", stride_px=14, tile_px=56, channels=8)
    tables = serving.run(options, tiles=8, repeats=3, frame_px=128)
    assert [row["road"] for row in tables["throughput"]] == [
        serving.EMBEDDED, serving.BY_TILE, "gRPC", "shared memory"]
    assert all(row["same bits"] == "yes" for row in tables["throughput"])
    labels, both = tables["bytes"]
    assert float(labels["request, MB"]) == pytest.approx(2 * 128 * 128 / 1e6, abs=1e-3)
    assert float(labels["answer, MB"]) == pytest.approx(128 * 128 / 1e6, abs=1e-3)
    assert float(both["answer, MB"]) == pytest.approx(2 * 128 * 128 / 1e6, abs=1e-3)


def test_soak(needs_triton: None, tiny_bundle: Bundle) -> None:
    rows = {row["what"]: row["value"] for row in soak.run(tiny_bundle, clients=64, seconds=6.0, warm_up_s=2.0, frame_px=64)}
    assert rows["wrong answers"] == rows["errors, time-outs"] == rows["restarts of the server"] == 0
    assert int(str(rows["answers"]).split()[0]) >= 64
