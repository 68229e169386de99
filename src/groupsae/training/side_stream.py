"""Work of a CUDA device that runs beside the work of the current stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStream:
    """Puts work beside that of the current stream, if there is `overlap` and the device is CUDA.

    A block of `work` begins after all that the current stream was given before it; what the current
    stream is given later waits for the block only from `join` on. So a block is entered after the
    last write that it depends on, and `join` is called before its results are used. What a block
    allocates is for such blocks alone; what the current stream uses too is named to `share`.
    """

    def __init__(self, device: torch.device, *, overlap: bool) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if overlap and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def share(self, *tensors: Tensor) -> None:
        """Keep the memory of these tensors, once they are freed, until the work is done."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)

    @contextmanager
    def work(self) -> Iterator[None]:
        """What the block gives the device goes beside the current stream."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for the work."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
