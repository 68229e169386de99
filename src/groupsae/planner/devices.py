"""Devices by name, with what their makers state."""

from __future__ import annotations

import os
from dataclasses import dataclass

from groupsae.errors import InputError

_USABLE = 0.95  # the rest is for the device's context, the libraries and gaps between tensors
_OF_A_NODE = 8  # devices that reach one another by `link`; beyond, by `network`


@dataclass(frozen=True)
class Device:
    """One accelerator, or the memory of a machine.

    Peaks are dense (no structured sparsity), in operations and bytes per second; links are per
    device and direction. TF32 is not here: float32 products stay float32, as PyTorch has it.

    Attributes:
        memory: Bytes.
        float32, half: Peak of products in float32, and in bfloat16 or float16 with float32 sums.
        bandwidth: Of its memory.
        link: To the other devices of a node, of at most eight.
        network: To other nodes.
    """

    name: str
    memory: int
    float32: float | None = None
    half: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    network: float | None = None

    @property
    def usable(self) -> int:
        """Bytes that training may fill."""
        return int(_USABLE * self.memory)

    @property
    def is_cpu(self) -> bool:
        """Whether it shares its memory with checkpoints' copies."""
        return self.name == "cpu"

    def link_of(self, devices: int, neighbours: int | None = None) -> float | None:
        """Bytes per second and direction among so many devices; None where nothing states it.

        Args:
            neighbours: Among the first so many of them, the next so many, and so on.
        """
        within = neighbours is not None and _OF_A_NODE % neighbours == 0
        return self.link if devices <= _OF_A_NODE or within else self.network


_DEVICES = (
    # GeForce RTX 4090: Ada GPU architecture white paper, appendix A; PCIe 4 x16.
    Device("rtx4090", 24 * 10**9, 82.6e12, 165.2e12, 1.008e12, 32e9),
    # L40S data sheet; PCIe 4 x16.
    Device("l40s", 48 * 10**9, 91.6e12, 362.05e12, 0.864e12, 32e9),
    # A100 80GB SXM data sheet; NVLink 600 GB/s both ways. Network: DGX A100, 200 Gb/s a GPU.
    Device("a100", 80 * 10**9, 19.5e12, 312e12, 2.039e12, 300e9, 25e9),
    # H100 SXM data sheet and architecture white paper; NVLink 900 GB/s both ways. Network: DGX
    # H100, 400 Gb/s a GPU.
    Device("h100", 80 * 10**9, 66.9e12, 989.4e12, 3.35e12, 450e9, 50e9),
    # H200 SXM data sheet: the H100's arithmetic. Network: DGX H200, 400 Gb/s a GPU.
    Device("h200", 141 * 10**9, 66.9e12, 989.4e12, 4.8e12, 450e9, 50e9),
    # HGX B200 data sheet; NVLink 1.8 TB/s both ways. Network: DGX B200, 400 Gb/s a GPU.
    Device("b200", 180 * 10**9, 75e12, 2250e12, 7.7e12, 900e9, 50e9),
)
DEVICES = {device.name: device for device in _DEVICES}  # by ascending memory


def named(name: str) -> Device:
    """The device of that name; "cpu" is this machine's memory, without stated peaks.

    Raises:
        InputError: There is none.
    """
    if name == "cpu":
        return Device("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if name not in DEVICES:
        raise InputError(f"--device {name}: choose one of {', '.join(DEVICES)}, cpu")
    return DEVICES[name]
