"""Weights of upsamplers: the authors' published checkpoints, phaseline's own files, or random ones.

    .pth, .pt        dict of ``weights`` and ``config``, as published; nothing in it is executed
    .safetensors     the same tensors, large ones in float16; the configuration as JSON under the metadata key ``config``
    random:SEED      a small untrained network, for trying things out
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from phaseline.export.upsampler import Upsampler, UpsamplerConfig
from phaseline.export.weights import halved
from phaseline.runtime.errors import MissingInputError, UsageError, WeightsError

# Counts training steps; no part of the network, and absent from some checkpoints.
_COUNTER = "num_batches_tracked"


def load_upsampler(path: Path | str) -> Upsampler:
    """Read an upsampler from a file.

    Parameters
    ----------
    path
        A published checkpoint, or a file of `save_upsampler`.

    Returns
    -------
    The network in float32 and in evaluation mode.

    Raises
    ------
    MissingInputError
        No such file.
    WeightsError
        It cannot be read, is no upsampler's, or a tensor is missing, left over, of a wrong shape, or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"no upsampler at {path}; expected a published checkpoint (.pth) or a .safetensors file")
    try:
        weights, entries = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, SafetensorError, UnpicklingError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise WeightsError(f"{path} cannot be read as an upsampler ({reason}); expected a published checkpoint, a dict of "
                           "'weights' and 'config', or a .safetensors file written by phaseline") from error
    upsampler = Upsampler(_config(entries, str(path)))
    _load(upsampler, weights, str(path))
    return upsampler.eval()


def save_upsampler(module: nn.Module, config: UpsamplerConfig, path: Path) -> None:
    """Write an upsampler's weights, tensors of 4096 values and more in float16.

    Parameters
    ----------
    module
        An `Upsampler`, or something that has its state dict.
    config
        Its sizes.
    path
        A ``.safetensors`` file; its folder exists.

    Raises
    ------
    WeightsError
        A value is not finite, or beyond float16: nothing is written.
    """
    state = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith(_COUNTER)}
    save_file(halved(state), path, metadata={"config": json.dumps(dataclasses.asdict(config), sort_keys=True)})


def random_upsampler(seed: int, *, channels: int, patch_px: int, hidden: int = 32) -> Upsampler:
    """An untrained upsampler in evaluation mode, reproducible; activations are of the size that batch norms would see to."""
    config = UpsamplerConfig(name=f"random-{hidden}", n_ch_in=channels, n_ch_hidden=hidden, n_ch_out=channels,
                             n_ch_downsampler=hidden, patch_size=patch_px)
    upsampler = Upsampler(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in upsampler.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=generator)
                if layer.bias is not None:
                    layer.bias.uniform_(-0.1, 0.1, generator=generator)
            elif isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None and layer.running_var is not None
                layer.running_mean.uniform_(-0.1, 0.1, generator=generator)
                layer.running_var.uniform_(0.5, 1.5, generator=generator)
        # Normalised pixels of 0-255 are in the hundreds, L1-normalised features about 1 / channels, going in and out.
        for name, parameter in upsampler.named_parameters():
            if name.endswith("inp_conv.double_conv.0.weight"):
                parameter.mul_(channels)
            elif name.endswith("double_conv.0.weight"):
                parameter[:, -3:].div_(500)
            elif "mlp" in name:
                parameter.div_(channels)
    return upsampler


def create_upsampler(weights: str, *, channels: int, patch_px: int) -> tuple[Upsampler, str, bool]:
    """An upsampler as `phaseline export` is asked for it.

    Parameters
    ----------
    weights
        ``random:SEED``, or the path of a file.
    channels, patch_px
        Patch features' channels and the pixels between them, for a random one.

    Returns
    -------
    The network, the weights' origin as a bundle records it, and whether they are trained.

    Raises
    ------
    UsageError, MissingInputError, WeightsError
        No such choice or file, or the file does not fit.
    """
    if not weights.startswith("random:"):
        return load_upsampler(weights), f"file:{Path(weights).name}", True
    seed = weights.removeprefix("random:")
    if not seed.isdecimal():
        raise UsageError(f"upsampler {weights!r}: expected a file, or random:SEED with a whole number, e.g. random:0")
    return random_upsampler(int(seed), channels=channels, patch_px=patch_px), f"random:{int(seed)}", False


def first_channels(upsampler: Upsampler, count: int) -> Upsampler:
    """The same upsampler with the first `count` pixel features only.

    Raises
    ------
    UsageError
        It has not that many.
    """
    config = upsampler.config
    if not 1 <= count <= config.n_ch_out:
        raise UsageError(f"pixel-channels is {count}, expected 1…{config.n_ch_out}, what the upsampler has")
    # Only the last layer, 1×1, is cut: the widths before it were chosen by the checkpoint's own n_ch_out.
    last = upsampler.upsampler.mlp
    cut = nn.Conv2d(last.in_channels, count, 1)
    assert cut.bias is not None and last.bias is not None
    with torch.no_grad():
        cut.weight.copy_(last.weight[:count])
        cut.bias.copy_(last.bias[:count])
    shortened = Upsampler(config)
    shortened.load_state_dict(upsampler.state_dict())
    shortened.upsampler.mlp = cut
    return shortened.train(upsampler.training)


def _read_safetensors(path: Path) -> tuple[dict[str, Any], Any]:
    with safe_open(path, framework="pt") as file:
        config = json.loads((file.metadata() or {})["config"])
        return {name: file.get_tensor(name) for name in file.keys()}, config  # noqa: SIM118


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], Any]:
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping) or not isinstance(content["weights"], Mapping):
        raise ValueError("no 'weights' by name")
    return dict(content["weights"]), content["config"]


def _config(entries: Any, origin: str) -> UpsamplerConfig:
    try:
        return UpsamplerConfig(**entries)
    except UsageError as error:
        raise WeightsError(f"{origin}: {error}") from error
    except TypeError as error:
        raise WeightsError(f"{origin}: its configuration is not an upsampler's ({error}); expected the keys "
                           f"{', '.join(f.name for f in dataclasses.fields(UpsamplerConfig))}") from error


def _load(upsampler: Upsampler, weights: Mapping[str, Any], origin: str) -> None:
    """Every tensor must be there, of its shape, finite, and none left over."""
    given = {name: tensor for name, tensor in weights.items() if not name.endswith(_COUNTER)}
    expected = {name: tensor for name, tensor in upsampler.state_dict().items() if not name.endswith(_COUNTER)}
    for name, tensor in expected.items():
        if name not in given:
            raise WeightsError(f"{origin} has no tensor {name} of shape {tuple(tensor.shape)}, which its configuration asks for")
        found = given[name]
        if not isinstance(found, torch.Tensor) or found.shape != tensor.shape:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise WeightsError(f"{origin}: tensor {name} has shape {shape}, but its configuration asks for "
                               f"{tuple(tensor.shape)}")
        if not torch.isfinite(found).all():
            raise WeightsError(f"{origin}: tensor {name} holds NaN or infinity")
    unexpected = sorted(given.keys() - expected.keys())
    if unexpected:
        shape = getattr(given[unexpected[0]], "shape", ())
        raise WeightsError(f"{origin} holds a tensor {unexpected[0]} of shape {tuple(shape)} (and {len(unexpected) - 1} more) "
                           "that no upsampler of its configuration has")
    upsampler.load_state_dict({name: tensor.float() for name, tensor in given.items()}, strict=False)
