"""Made-up measurements."""

from __future__ import annotations

from typing import Any

from benchmarks.results import Participant, Setting
from benchmarks.rounds import Turn

VERSIONS = {"torch": "2.13.0"}


def participant(label: str, **changes: Any) -> Participant:
    values = {
        "label": label,
        "variant": label.partition(",")[0],
        "ours": label.startswith("groupsae"),
        "host_dtype": "float32",
        "back_end": "torch",
        "saes": 5,
        "dead": 0.0,
        "products": ["float32"],
        "versions": VERSIONS,
    }
    return Participant(**(values | changes))


def setting(participants: list[Participant], **changes: Any) -> Setting:
    values = {
        "shape": "pythia-70m",
        "device": "cpu",
        "k": 32,
        "context_length": 256,
        "batch_tokens": 4096,
        "buffer_batches": 4,
        "steps": 8,
        "warm": 2,
        "rounds": 2,
        "busy_limit": 0.08,
        "repeats": 3,
        "machine": {"date": "2026-11-20", "CPU": "made up"},
        "participants": participants,
        "left_out": [],
    }
    return Setting(**(values | changes))


def turn(label: str, number: int, ms: float, *, noisy: bool = False, **more: Any) -> Turn:
    result = {
        "steps": 8,
        "ms_per_step": ms,
        "step_ms": [ms] * 8,
        "parts_ms": {"host forward": 0.3 * ms, "encode": 0.6 * ms, "rest": 0.1 * ms},
        "forwards_per_step": 1.0,
        "peak_bytes": 2_000_000_000,
        "baseline_bytes": 400_000_000,
        "fvu": 0.5,
    }
    return Turn(label, number, 0.01, noisy, result | more)


def ceiling(number: int, float32: float, bfloat16: float) -> Turn:
    rates = {"float32 F.linear": 0.5 * float32, "float32 oneDNN": float32, "bfloat16 F": bfloat16}
    return Turn("ceiling", number, 0.0, False, {"gflops": rates})
