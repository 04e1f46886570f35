"""What all benchmarks print: a Markdown table with the command and the machine that made it."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path


def machine_line(packages: Sequence[str]) -> str:
    """Processor, cores, Python and package versions in one line."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def markdown(title: str, rows: Sequence[Mapping[str, object]], packages: Sequence[str], notes: Sequence[str] = ()) -> str:
    """A page with one table.

    Parameters
    ----------
    title
        Heading.
    rows
        At least one; all with the first one's keys, which are the columns.
    packages
        Distributions whose versions matter.
    notes
        Paragraphs below the table.
    """
    command = shlex.join(["python", "-m", _module(), *sys.argv[1:]])
    lines = [f"# {title}", "", f"`{command}`, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}", "", machine_line(packages), "",
             *table(rows)]
    for note in notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Lines of a Markdown table; the first row's keys are the columns."""
    columns = list(rows[0])
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns),
            *("| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows)]


def emit(text: str, out: Path | None) -> None:
    """Print a page, and write it if a file is given."""
    print(text)
    if out is not None:
        write(text, out)


def write(text: str, out: Path) -> None:
    """Write a page."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else Path(sys.argv[0]).stem
