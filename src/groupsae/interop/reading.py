"""Configurations and weights of unknown origin: read without trust, checked, in float32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from groupsae.errors import InputError
from groupsae.files import load_tensors

T = TypeVar("T")

# Every way in which PyTorch says that a file is not what it should be.
_UNREADABLE = (UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError)


def read_config(path: Path) -> dict[str, Any]:
    """The content of a JSON file, an object.

    Raises:
        InputError: If it cannot be read or is not of that form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}); fetch or export it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def option(config: Mapping[str, Any], key: str, kind: type[T], *default: T) -> T:
    """A value of a configuration.

    Args:
        kind: Its type; a float may be written as an int.
        default: In its place where it is missing or null; none: it must be there.

    Raises:
        InputError: If it is missing or of another type.
    """
    value = config.get(key)
    if value is None and default:
        return default[0]
    if key not in config:
        raise InputError(f"its configuration has no {key!r}; fetch or export it again")
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{key!r} in its configuration is {value!r}, not of type {kind.__name__}")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        tensors: dict[str, Tensor] = load_tensors(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read as safetensors ({error}); fetch or export it again"
        ) from error
    return tensors


def read_pickle(path: Path) -> dict[str, Any]:
    """The content of a file of `torch.save`: a dict of tensors and numbers, nothing else.

    Nothing in the file is run: PyTorch reads it with `weights_only`.

    Raises:
        InputError: If it cannot be read or holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except _UNREADABLE as error:
        raise InputError(
            f"{path} is no plain state dict, and is not read: {str(error).splitlines()[0]}; save "
            "it again as torch.save(module.state_dict(), path)"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor | int | float)
        for name, value in content.items()
    ):
        raise InputError(
            f"{path} is no plain state dict: it must be a dict of tensors by name; save it again "
            "as torch.save(module.state_dict(), path)"
        )
    return content


def checked(
    tensors: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:
    """These tensors in float32, if they are all there, of these shapes, finite, and no others.

    Raises:
        InputError: Naming the tensor, and what is wrong with it.
    """
    optional = optional or {}
    missing = [name for name in shapes if name not in tensors]
    extra = [name for name in tensors if name not in shapes and name not in optional]
    if missing or extra:
        wrong = [
            f"{what} {', '.join(names)}"
            for what, names in (("lacks", missing), ("has besides", extra))
            if names
        ]
        raise InputError(
            f"its weights are not those of this architecture: the file {' and '.join(wrong)}; "
            f"expected are {', '.join(shapes)}"
        )
    found = {}
    for name, shape in {**shapes, **optional}.items():
        if name not in tensors:
            continue
        tensor = torch.as_tensor(tensors[name])
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"its tensor {name} has the shape {tuple(tensor.shape)}, not {shape} as its "
                "configuration says; the two files do not belong together"
            )
        found[name] = tensor.float()
        if not bool(found[name].isfinite().all()):
            raise InputError(f"its tensor {name} holds NaN or infinity; the SAE is damaged")
    return found
