"""Weights for a backbone: timm's download, a file, or random ones.

A file may have timm's own key names, or those of Meta's releases:

    DINO, DeiT   as timm's; heads, ``teacher``/``model`` wrappers and ``module.``/``backbone.`` prefixes are ignored
    DINOv2       blocks possibly chunked (``blocks.CHUNK.BLOCK.``); ``register_tokens``; with registers the position
                 embedding has an entry for [CLS] that timm adds to the token beforehand; SwiGLU's ``w12``/``w3``
    phaseline    `phaseline train backbone`: timm's names, and the projection that was trained along (`trained_projection`)
    DINOv3       ``storage_tokens``, ``ls1.gamma``, biases of fused query/key/value; stored rotation periods
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed

from phaseline.export.backbone import Backbone, create_backbone, randomise
from phaseline.runtime.errors import MissingInputError, UsageError, WeightsError

State = dict[str, torch.Tensor]

_WRAPPERS = ("model", "state_dict", "teacher", "model_ema")
PROJECTION = "projection.weight"
# Smaller tensors stay in float32: halving saves nothing, and biases and norms keep their precision.
_HALF_FROM_SIZE = 4096
_PREFIXES = ("module.", "backbone.", "_orig_mod.")
# Parts that only training needs, or that end in a classifier.
_IGNORED = re.compile(r"(mask_token|head|head_dist|heads|fc_norm|dino_head|ibot_head|local_cls_norm|projectors|projection)(\.|$)|"
                      r".*\.(bias_mask|periods)$|rope_embed\.|rope\.")


def halved(state: Mapping[str, torch.Tensor]) -> State:
    """Tensors as weights files hold them: of 4096 values and more in float16, the others in float32; contiguous, on the CPU.

    Raises
    ------
    WeightsError
        A value is not finite, or beyond float16.
    """
    stored = {name: (tensor.half() if tensor.numel() >= _HALF_FROM_SIZE else tensor.float()).detach().cpu().contiguous()
              for name, tensor in state.items()}
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"tensor {name} holds NaN, infinity, or values beyond float16's ±65504: nothing was written")
    return stored


def load_backbone(name: str, weights: str) -> tuple[Backbone, str, bool]:
    """Build a backbone and give it weights.

    Parameters
    ----------
    name
        See `create_backbone`.
    weights
        ``hub``, ``random:SEED``, or the path of a safetensors or .pth file.

    Returns
    -------
    The backbone, the weights' origin as a bundle records it, and whether they are trained.

    Raises
    ------
    UsageError, MissingInputError
        No such choice, or no such file.
    WeightsError
        The download failed, the file cannot be read, or a tensor is missing, unexpected or of a wrong shape.
    """
    if weights == "hub":
        return _from_hub(name), "hub", True
    if weights.startswith("random:"):
        seed = weights.removeprefix("random:")
        if not seed.isdecimal():
            raise UsageError(f"weights {weights!r}: expected random:SEED with a whole number, e.g. random:0")
        backbone = create_backbone(name)
        randomise(backbone, int(seed))
        return backbone, f"random:{int(seed)}", False
    path = Path(weights)
    if not path.is_file():
        raise MissingInputError(f"no weights at {weights}; expected hub, random:SEED, or a safetensors or .pth file")
    backbone = create_backbone(name)
    load_state(backbone, read_state(path), origin=str(path))
    return backbone, f"file:{path.name}", True


def read_state(path: Path) -> State:
    """Read tensors from a safetensors or torch file; nothing in it is executed.

    Raises
    ------
    WeightsError
        The file cannot be read, or does not hold tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with warnings.catch_warnings():
                # What matters is whether it can be read, not how it was pickled.
                warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, UnpicklingError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise WeightsError(f"{path} cannot be read as weights ({reason}); expected a safetensors file, or a .pth file "
                           "with nothing but tensors") from error
    while isinstance(content, Mapping) and (
            inner := next((content[w] for w in _WRAPPERS if isinstance(content.get(w), Mapping)), None)):
        content = inner
    state = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, Mapping) else {}
    if not state:
        raise WeightsError(f"{path} holds no tensors by name; expected a state dict")
    return state


def trained_projection(weights: str) -> torch.Tensor | None:
    """The projection in a file of `phaseline train backbone`: float tensor of shape (k, D); None if there is none.

    Parameters
    ----------
    weights
        As `load_backbone` takes it.

    Raises
    ------
    WeightsError
        The file cannot be read.
    """
    path = Path(weights)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    found = read_state(path).get(PROJECTION)
    return None if found is None else found.float()


def load_state(backbone: Backbone, state: Mapping[str, torch.Tensor], origin: str) -> None:
    """Give a backbone the weights of a state dict with timm's or Meta's key names.

    Parameters
    ----------
    backbone
        Changed in place.
    state
        Tensors by name; a position embedding of another square grid is interpolated.
    origin
        Where they come from, for messages.

    Raises
    ------
    WeightsError
        A tensor is missing, unexpected or of a wrong shape; its name and both shapes are named.
    """
    expected = backbone.vit.state_dict()
    given = to_timm_names(state, expected)
    if "pos_embed" in expected and "pos_embed" in given:
        given["pos_embed"] = _fit_positions(given["pos_embed"], expected["pos_embed"], backbone)
    for name, tensor in expected.items():
        if name not in given:
            raise WeightsError(f"{origin} has no tensor {name} of shape {tuple(tensor.shape)}, which {backbone.name} "
                               f"needs; is it another architecture?{_instead(given, expected)}")
        if given[name].shape != tensor.shape:
            raise WeightsError(f"{origin}: tensor {name} has shape {tuple(given[name].shape)}, but {backbone.name} "
                               f"needs {tuple(tensor.shape)}; choose the backbone that these weights were trained for")
    unexpected = sorted(given.keys() - expected.keys())
    if unexpected:
        name = unexpected[0]
        raise WeightsError(f"{origin} holds a tensor {name} of shape {tuple(given[name].shape)} (and "
                           f"{len(unexpected) - 1} more) that {backbone.name} does not have; choose the backbone that "
                           "these weights were trained for")
    for name, tensor in given.items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{origin}: tensor {name} holds NaN or infinity")
    backbone.vit.load_state_dict({name: tensor.to(expected[name].dtype) for name, tensor in given.items()})


def to_timm_names(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> State:
    """The same tensors under timm's names; those that a feature extractor has no use for are left out."""
    renamed: State = {}
    for original, tensor in state.items():
        name = original
        while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        if name not in expected and _IGNORED.match(name):
            continue
        name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
        name = name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        if name in ("register_tokens", "storage_tokens"):
            name = "reg_token"
        eva = re.fullmatch(r"(blocks\.\d+\.)ls([12])\.gamma", name)
        if eva and f"{eva[1]}gamma_{eva[2]}" in expected:
            name = f"{eva[1]}gamma_{eva[2]}"
        if name.endswith("attn.qkv.bias") and name not in expected:
            renamed.update(_separate_biases(name, tensor, expected))
            continue
        is_token = name in ("cls_token", "reg_token")
        renamed[name] = tensor.reshape(1, -1, tensor.shape[-1]) if is_token else tensor
    return _move_cls_position(renamed, expected)


def _separate_biases(name: str, tensor: torch.Tensor, expected: Mapping[str, torch.Tensor]) -> State:
    """DINOv3's fused bias as timm's `q_bias` and `v_bias`; the key's is masked to zero there and has none."""
    query, _, value = tensor.chunk(3)
    parts = {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
    if not parts.keys() <= expected.keys():
        # timm has variants without bias for the releases in which it is zero throughout.
        return {} if not tensor.any() else {name: tensor}
    return parts


def _move_cls_position(state: State, expected: Mapping[str, torch.Tensor]) -> State:
    """Meta's models with registers give [CLS], not the registers, a position; timm's add it to the token beforehand."""
    position, cls = state.get("pos_embed"), state.get("cls_token")
    if position is None or cls is None or "reg_token" not in expected or position.ndim != 3:
        return state
    if _is_square(position.shape[1] - 1) and not _is_square(position.shape[1]):
        return {**state, "cls_token": cls + position[:, :1], "pos_embed": position[:, 1:]}
    return state


def _fit_positions(position: torch.Tensor, wanted: torch.Tensor, backbone: Backbone) -> torch.Tensor:
    """Interpolate a position embedding of another square grid to the backbone's own."""
    if position.shape == wanted.shape or position.ndim != 3 or position.shape[2] != wanted.shape[2]:
        return position
    vit = backbone.vit
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    if not _is_square(position.shape[1] - prefix):
        return position
    fitted: torch.Tensor = resample_abs_pos_embed(position, new_size=list(vit.patch_embed.grid_size),
                                                  num_prefix_tokens=prefix)
    return fitted


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def _instead(given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    unexpected = sorted(given.keys() - expected.keys())
    return f" (it has {unexpected[0]} of shape {tuple(given[unexpected[0]].shape)} instead)" if unexpected else ""


def _from_hub(name: str) -> Backbone:
    try:
        return create_backbone(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise WeightsError(f"timm could not download the weights of {name} ({reason[:200]}); fetch them on a "
                           "connected machine and give --weights FILE, or --weights random:0 for an untrained backbone"
                           ) from error
