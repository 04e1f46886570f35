"""The model card next to weights: what they are, what they were trained on, how, and how the training went."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from phaseline.export.training.loop import LOG
from phaseline.export.training.micrographs import Micrograph
from phaseline.runtime.bundle import describe_file

CARD = "MODEL_CARD.md"


def write_card(folder: Path, title: str, weights: Path, settings: dict[str, Any], micrographs: Sequence[Micrograph],
               provenance: str) -> None:
    """Write ``MODEL_CARD.md``.

    Parameters
    ----------
    folder
        Of the training; its log is summarised.
    title
        Headline.
    weights
        The file that the card is about.
    settings
        All that decided the result.
    micrographs
        What it was trained on.
    provenance
        Markdown on where the images come from and under which licence; empty if nobody said.
    """
    counts: dict[str, int] = {}
    for micrograph in micrographs:
        group = str(PurePosixPath(micrograph.name).parent)
        counts[group] = counts.get(group, 0) + 1
    log = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    rows = [log[i] for i in sorted({0, len(log) // 4, len(log) // 2, 3 * len(log) // 4, len(log) - 1})]
    names = list(rows[0])
    text = [
        f"# {title}", "",
        f"`{weights.name}`, SHA-256 `{describe_file(weights).sha256}`, trained by phaseline from the settings below: the same "
        "settings, images, torch and number of threads give the same weights.", "",
        "Trained on generated materials, whose phases are known because they were drawn, and on unlabelled images. Nobody's "
        "labels were used.", "",
        "## Settings", "", "| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in settings.items()), "",
        "## Images", "", "| folder | images |", "|---|---|", *(f"| {name} | {count} |" for name, count in sorted(counts.items())),
        "", provenance.strip() or "Their provenance and licence were not stated when training (`--provenance`).", "",
        "## Training", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}",
        *(f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows), "",
        "Means over the steps since the line before.", "",
    ]
    (folder / CARD).write_text("\n".join(text), encoding="utf-8")
