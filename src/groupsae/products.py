"""Matrix products on the CPU, by the faster of the two libraries that PyTorch brings.

`F.linear` goes to MKL, which on some CPUs makes less than half of what oneDNN makes of float32 (on
others both make the same). Which is faster here is measured once per machine and kept in the cache
folder, so that a run that is continued computes with the same bits as before. Where that cannot be
kept, or where oneDNN is less exact, it is `F.linear`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor
from torch.overrides import TorchFunctionMode

from groupsae.cache import CacheError, cache_folder, cpu_flags
from groupsae.errors import InputError
from groupsae.files import write_text

_log = logging.getLogger(__name__)

_MARGIN = 1.03  # by which oneDNN must be faster
_ROUNDS = 5


def linear(
    x: Float[Tensor, "*row input"],
    weight: Float[Tensor, "output input"],
    bias: Float[Tensor, " output"] | None = None,
) -> Float[Tensor, "*row output"]:
    """x weight^T + bias, as `F.linear` gives it, by the faster library."""
    plain = (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.numel() > 0
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )
    if plain and onednn_is_faster(torch.get_num_threads()):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def fast_linears(device: torch.device) -> AbstractContextManager[Any]:
    """While this is open, modules' own calls of `F.linear` and `torch.addmm` go to :func:`linear`.

    On other devices than the CPU it does nothing.
    """
    if device.type == "cpu" and onednn_is_faster(torch.get_num_threads()):
        return _FastLinears()
    return nullcontext()


@functools.cache
def onednn_is_faster(threads: int) -> bool:
    """Whether oneDNN's float32 product is the faster one here: measured at the first call ever."""
    if not _has_onednn():
        return False
    try:
        file = cache_folder() / f"products-{_machine(threads)}.json"
        if not file.exists():
            write_text(file, json.dumps(_measure()) + "\n")
        measured = json.loads(file.read_text())
        faster = measured["onednn"] > _MARGIN * measured["torch"] and measured["agree"]
    except (CacheError, InputError, OSError, ValueError, LookupError, TypeError) as error:
        _log.info("F.linear makes the CPU's products; the faster one cannot be noted: %s", error)
        return False
    return bool(faster)


class _FastLinears(TorchFunctionMode):  # type: ignore[misc,no-any-unimported,unused-ignore]
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs:
            return linear(*args)
        if func is torch.addmm and not kwargs and args[0].dim() == 1:  # transformers' Conv1D
            return linear(args[1], args[2].T, args[0])
        return func(*args, **(kwargs or {}))


def _has_onednn() -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product that torch.compile puts for `F.linear` on the CPU; PyTorch has no public name."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _machine(threads: int) -> str:
    described = (cpu_flags(), torch.__version__, torch.__config__.show(), str(threads))
    return hashlib.sha256("\0".join(described).encode()).hexdigest()[:32]


def _measure() -> dict[str, float | bool]:
    """GFLOP/s of both, the best of a few turns, and whether oneDNN is as exact as `F.linear`."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 512, generator=generator) for rows in (1024, 2048))
    bias = torch.randn(2048, generator=generator)
    products: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
        "torch": F.linear,
        "onednn": _onednn,
    }
    seconds = dict.fromkeys(products, float("inf"))
    for _ in range(_ROUNDS):
        for name, product in products.items():
            began = time.perf_counter()
            product(x, weight, bias)
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    flops = 2 * x.numel() * len(weight)
    return {
        **{name: round(flops / best / 1e9, 1) for name, best in seconds.items()},
        "agree": _as_exact(x, weight, bias),
    }


def _as_exact(x: Float32[Tensor, "row d"], weight: Tensor, bias: Tensor) -> bool:
    exact = F.linear(x.double(), weight.double(), bias.double())
    errors = [(product(x, weight, bias) - exact).norm() for product in (F.linear, _onednn)]
    return bool(errors[1] <= 2 * errors[0])
