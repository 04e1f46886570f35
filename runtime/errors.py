"""Every error that phaseline raises on purpose.

    PhaselineError
    ├── UsageError (ValueError)              asked for wrongly; the command line exits with 2
    │   ├── MissingInputError (FileNotFoundError)
    │   └── OutputExistsError (FileExistsError)
    ├── ImageError (ValueError)              an image that cannot be read or used
    │   └── VolumeError                      a volume, or a part of one, that cannot be read or used
    ├── LabelError (ValueError)              labels that cannot be trained on
    ├── ArtefactError (ValueError)
    │   ├── BundleError                      a bundle that is damaged, foreign or unfit
    │   └── RecipeError                      likewise a recipe
    ├── EngineError (RuntimeError)           a graph that failed to run
    │   └── EngineUnavailableError           the engine asked for is not installed or finds no device
    ├── ExportError (RuntimeError)           a backbone that cannot be exported
    │   ├── WeightsError                     weights that do not fit the backbone
    │   └── ParityError                      the written graph deviates from torch
    ├── TrainingError (RuntimeError)         a training that cannot begin, go on, or be resumed
    ├── ServerError (ConnectionError)        a server that could not do what was asked
    │   ├── ServerUnavailableError           none can be reached, it went away, or a model is not ready
    │   ├── ServerBusyError                  its queue is full; `retry_after_s` says when to ask again
    │   ├── ServerTimeoutError (TimeoutError)  no answer within the time allowed
    │   ├── ServerRefusedError (ValueError)  it refused the request itself: wrong dtype, shape, content, no right
    │   │   └── UnknownModelError (LookupError)  it has no such model
    │   └── ServerFailedError                it failed while working on it
    ├── OutputError (OSError)                an output that cannot be written
    ├── JobError (RuntimeError)              a job over a volume that cannot be begun, gone on with, or completed
    ├── StoppedError                         the user stopped a run that can go on; the command line exits with 130
    └── MissingExtraError (ImportError)      an optional dependency that is not installed

A message says what was received, what was expected and what to do, in one line.
"""

from __future__ import annotations


class PhaselineError(Exception):
    """Base of all errors that phaseline raises on purpose."""


class UsageError(PhaselineError, ValueError):
    """The call itself is wrong: an unknown choice, contradictory options."""


class MissingInputError(UsageError, FileNotFoundError):
    """A path that should be read does not exist, or holds nothing to read."""


class OutputExistsError(UsageError, FileExistsError):
    """The output exists and overwriting was not asked for."""


class ImageError(PhaselineError, ValueError):
    """An image that cannot be read, or whose pixels cannot be used."""


class VolumeError(ImageError):
    """A volume, or a part of one, that cannot be read, or whose voxels cannot be used."""


class LabelError(PhaselineError, ValueError):
    """Labels that cannot be trained on."""


class ArtefactError(PhaselineError, ValueError):
    """A bundle or recipe that cannot be used."""


class BundleError(ArtefactError):
    """A bundle that is damaged, foreign, or unfit for what was asked."""


class RecipeError(ArtefactError):
    """A recipe that is damaged, foreign, or unfit for what was asked."""


class EngineError(PhaselineError, RuntimeError):
    """An engine that failed to open or to run a graph."""


class EngineUnavailableError(EngineError):
    """The engine asked for is not installed, or finds no device."""


class ExportError(PhaselineError, RuntimeError):
    """A backbone that cannot be exported as asked."""


class WeightsError(ExportError, ValueError):
    """Weights that do not fit the backbone."""


class ParityError(ExportError):
    """The written graph deviates from torch by more than the tolerance."""


class TrainingError(PhaselineError, RuntimeError):
    """A training that cannot begin, go on, or be resumed."""


class ServerError(PhaselineError, ConnectionError):
    """A server that could not do what was asked."""


class ServerUnavailableError(ServerError):
    """No server can be reached, it went away during the request, or the model is not ready: worth another try."""


class ServerBusyError(ServerError):
    """The server's queue is full.

    Attributes
    ----------
    retry_after_s
        Seconds after which to ask again.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServerTimeoutError(ServerError, TimeoutError):
    """No answer came within the time allowed."""


class ServerRefusedError(ServerError, ValueError):
    """The server refused the request itself; asking again will not help."""


class UnknownModelError(ServerRefusedError, LookupError):
    """The server has no model of that name, or not (yet) after a restart."""


class ServerFailedError(ServerError):
    """The server failed while working on the request."""


class OutputError(PhaselineError, OSError):
    """An output that cannot be written."""


class JobError(PhaselineError, RuntimeError):
    """A job over a volume that cannot be begun, gone on with, or completed as asked."""


class StoppedError(PhaselineError):
    """The user stopped a run; what is finished is whole, and the message says how to go on."""


class MissingExtraError(PhaselineError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{package} is not installed, which {purpose} needs; install it with: "
                         f"pip install '.[{extra}]' (in phaseline's checkout)")
