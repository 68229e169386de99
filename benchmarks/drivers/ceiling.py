"""Measures how fast this machine multiplies matrices, by data type and by way of calling."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.drivers.common import Result, Task, main

_SECONDS = 0.4  # for each product and shape
_ROWS = 1024  # of the encoder's product: their pre-activations stay near the cache
_CUBE = {"cpu": 2048, "cuda": 8192}


def drive(task: Task) -> Result:
    """GFLOP/s of each product: the faster of the encoder's shape and a cube's, median of repeats.

    An operation of an 8-bit product counts like one in floating point.
    """
    size = _CUBE[torch.device(task.device).type]
    shapes = [(_ROWS, task.d_model, task.d_sae), (size, size, size)]
    rates: dict[str, float] = {}
    for rows, inner, columns in shapes:
        for name, product in _products(rows, inner, columns, task.device):
            gflops = 2 * rows * inner * columns / _seconds(product, task.device) / 1e9
            rates[name] = max(gflops, rates.get(name, 0.0))
    return {"gflops": rates}


def _products(
    rows: int, inner: int, columns: int, device: str
) -> Iterator[tuple[str, Callable[[], object]]]:
    """The products at hand, [rows, inner] times the transpose of [columns, inner]."""
    x, weight = torch.randn(rows, inner, device=device), torch.randn(columns, inner, device=device)
    yield "float32 F.linear", lambda: F.linear(x, weight)
    if device == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        one_dnn = torch.ops.mkldnn._linear_pointwise
        yield "float32 oneDNN", lambda: one_dnn(x, weight, None, "none", [], "")
    x16, weight16 = x.bfloat16(), weight.bfloat16()
    yield "bfloat16 F.linear", lambda: F.linear(x16, weight16)
    if hasattr(torch, "_int_mm"):
        x8, weight8 = (torch.randint_like(m, -127, 128).to(torch.int8) for m in (x, weight))
        yield "int8 _int_mm", lambda: torch._int_mm(x8, weight8.T)


def _seconds(product: Callable[[], object], device: str) -> float:
    """The median time of one product."""
    product()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        _synchronize(device)
        start = time.perf_counter()
        product()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times)


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(drive)
