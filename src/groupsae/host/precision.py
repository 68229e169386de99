"""What a 16-bit host model changes in the residual streams: measured against float32."""

from __future__ import annotations

import gc
import logging
import re
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from groupsae.errors import InputError
from groupsae.host.model import HostModel
from groupsae.host.tokens import EndOfText, TokenStream, special_mask

_log = logging.getLogger(__name__)

_CONTEXTS = 4
_ROOM = 1.5  # what must be free, as a multiple of the second model's weights


@dataclass(frozen=True)
class Precision:
    """How far the residual streams of a host model are from those of the same model in float32.

    Attributes:
        dtype: Of the host model, "bfloat16" say.
        differences: By layer: the norm of the difference over all tokens together, divided by the
            norm of the streams in float32. Infinite where a stream is not finite.
        tokens: How many tokens were compared.
    """

    dtype: str
    differences: Mapping[int, float]
    tokens: int

    def __str__(self) -> str:
        """One line with the smallest, the median and the largest difference."""
        ascending = sorted(self.differences, key=self.differences.__getitem__)
        least, most = ascending[0], ascending[-1]
        median = statistics.median(self.differences.values())
        return (
            f"host in {self.dtype}: residual streams differ from float32's by "
            f"{_percent(self.differences[least])} (layer {least}) to "
            f"{_percent(self.differences[most])} (layer {most}), median {_percent(median)}: "
            f"relative norm over {self.tokens:,} tokens"
        )


def beside_float32(
    host: HostModel,
    load: Callable[[], HostModel],
    stream: TokenStream,
    layers: Sequence[int],
    special: Collection[int] = (),
) -> Precision | None:
    """Compare a host model with itself in float32, on the stream's first contexts.

    The second model is in memory for the time of the call only, random states stay as they are.

    Args:
        load: Loads the same model in float32.
        layers: Whose streams are compared.
        special: Token ids to leave out.

    Returns:
        None where there is no room for a second model, or it cannot be loaded: the log says why.
    """
    if (lack := _lack_of_room(host)) is not None:
        _log.info("what host.dtype changes is not measured: %s", lack)
        return None
    try:
        with torch.random.fork_rng(devices=[]):  # which loading may draw from
            return compare(host, load(), _contexts(stream), layers, special)
    except (InputError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        _log.info("what host.dtype changes is not measured: %s", error)
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return None


def compare(
    host: HostModel,
    reference: HostModel,
    input_ids: Int[Tensor, "batch context"],
    layers: Sequence[int],
    special: Collection[int] = (),
) -> Precision:
    """Compare the residual streams of two models, of which `reference` is the one in float32.

    Args:
        special: Token ids to leave out.
    """
    counted = ~special_mask(input_ids, special)
    norms = torch.zeros(2, len(layers), dtype=torch.float64)
    for context in range(len(input_ids)):  # one at a time: all layers' streams are held twice
        ids, kept = input_ids[context : context + 1], counted[context : context + 1].to(host.device)
        streams, exact = (model.residual_streams(ids, layers) for model in (host, reference))
        for row, layer in enumerate(layers):
            x = exact[layer][kept].float()
            pair = torch.stack([streams[layer][kept].float() - x, x])
            norms[:, row] += torch.linalg.vector_norm(pair, dim=(1, 2)).double().square().cpu()
    ratios = (norms[0] / norms[1]).sqrt().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return Precision(
        dtype=str(host.dtype).removeprefix("torch."),
        differences=dict(zip(layers, ratios.tolist(), strict=True)),
        tokens=int(counted.sum()),
    )


def _contexts(stream: TokenStream) -> Int[Tensor, "batch context"]:
    try:
        return stream.next_contexts(_CONTEXTS)
    except EndOfText as end:
        return stream.next_contexts(end.contexts_left)


def _lack_of_room(host: HostModel) -> str | None:
    """Why another copy of the model in float32 is not to be loaded; None if it may be tried.

    Too little memory of a GPU is an error that can be caught; a Linux system that runs short of its
    own ends the process.
    """
    needed = _ROOM * 4 * sum(weight.numel() for weight in host.model.parameters())
    free = _free_memory()
    if free is None or free > needed:
        return None
    return (
        f"a second copy of {host.name} in float32 wants {needed / 1e9:.1f} GB, and "
        f"{free / 1e9:.1f} GB are free"
    )


def _free_memory() -> int | None:
    """Bytes that the process can still have, by the system and its container; None if not told."""
    system = _figures(Path("/proc/meminfo"))
    free = [1024 * system["MemAvailable"]] if "MemAvailable" in system else []
    container = Path("/sys/fs/cgroup")
    used = _figures(container / "memory.stat").get("anon")
    limit = _figures(container / "memory.max").get("")
    if used is not None and limit is not None:
        free.append(limit - used)
    return min(free, default=None)


def _figures(path: Path) -> dict[str, int]:
    """The whole numbers of a file of the Linux kernel, by the name before each."""
    try:
        text = path.read_text()
    except OSError:
        return {}
    return {name: int(value) for name, value in re.findall(r"^([A-Za-z_]*)\W*(\d+)", text, re.M)}


def _percent(ratio: float) -> str:
    number = 100 * ratio
    return f"{number:.2g}%" if number < 99.5 else f"{number:,.0f}%"
