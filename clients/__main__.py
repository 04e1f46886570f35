"""The `phaseline` command.

Exit codes: 0 done, 1 it failed, 2 it was asked for wrongly, 130 interrupted. A mistake gets one line.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.metadata import entry_points
from typing import Annotated

import typer
from typer.exceptions import TyperException

from phaseline.clients.commands.demo import demo_command
from phaseline.clients.commands.features import features_command
from phaseline.clients.commands.fit import fit_command
from phaseline.clients.commands.info import info_command
from phaseline.clients.commands.load import load_command
from phaseline.clients.commands.publish import publish_command
from phaseline.clients.commands.segment import segment_command
from phaseline.clients.commands.volume import planes_command, verify_command
from phaseline.clients.options import fail
from phaseline.runtime.errors import PhaselineError, StoppedError, UsageError

COMMAND_GROUP = "phaseline.commands"
INTERRUPTED = 130


def build_app() -> typer.Typer:
    """The command line: our commands, and those that other installed parts provide as entry points."""
    app = typer.Typer(
        name="phaseline",
        help="Brush strokes to segmentations of micrographs, with high-resolution ViT features.",
        add_completion=False,
        no_args_is_help=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @app.callback()
    def root(
        version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print it.")] = False,
    ) -> None:
        del version

    for name, command in (("demo", demo_command), ("fit", fit_command), ("segment", segment_command),
                          ("features", features_command), ("info", info_command), ("publish", publish_command),
                          ("load", load_command), ("verify", verify_command), ("planes", planes_command)):
        app.command(name)(command)
    for entry in sorted(entry_points(group=COMMAND_GROUP), key=lambda entry: entry.name):
        provided = entry.load()
        if isinstance(provided, typer.Typer):
            app.add_typer(provided, name=entry.name)
        else:
            app.command(entry.name)(provided)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        print(f"phaseline {metadata.version('phaseline')}")
        raise typer.Exit


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Parameters
    ----------
    arguments
        The words after ``phaseline``.

    Returns
    -------
    The exit code.
    """
    debug = "--debug" in arguments
    try:
        status = build_app()(args=list(arguments), standalone_mode=False)
        if status == INTERRUPTED:  # typer turns a KeyboardInterrupt into this code, without a word
            fail("interrupted")
        return status if isinstance(status, int) else 0
    except TyperException as error:
        if debug:
            raise
        fail(f"{error.format_message().rstrip('.')}; see phaseline --help")
        return 2
    except PhaselineError as error:
        if debug:
            raise
        fail(str(error))
        return INTERRUPTED if isinstance(error, StoppedError) else 2 if isinstance(error, UsageError) else 1
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted")
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        fail(f"unexpected {type(error).__name__}: {error}; run it again with --debug, and report the traceback")
        return 1


def main() -> None:
    """Entry point of the console script."""
    # A batch system's SIGTERM ends a run as Ctrl-C does: with a word, and with whole files.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
