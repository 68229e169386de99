"""What fits in place of a setting that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Any, TypeAlias

from groupsae.errors import InputError
from groupsae.planner.demand import Demand, Setting, at_groups
from groupsae.planner.devices import DEVICES
from groupsae.training.memory import size

Change: TypeAlias = tuple[str, Callable[[Setting], Setting]]

_MOST_CHANGES = 3
_SHOWN = 4
_MOST_DEVICES = 1024


def check_fit(setting: Setting) -> None:
    """Refuse a setting that its device has no room for.

    Raises:
        InputError: The message names what is lacking, and the fewest and smallest changes with
            which it fits.
    """
    device = setting.device
    if device is None:
        return
    demand = Demand.of(setting)
    if demand.fits(device):
        return
    among = "" if setting.devices == 1 else f" of {setting.devices}"
    lack = (
        f"G = {setting.G} does not fit: {_holding(demand)}: {size(demand.total)} on the fullest "
        f"device{among}, and {device.name} has room for {size(device.usable)} "
        f"(95% of {size(device.memory)})"
    )
    if setting.host.weights > device.usable:
        lack += (
            ". The host model's weights alone do not fit: every device holds all of them, groupsae "
            "does not divide them"
        )
    mends = [" and ".join(changes) for changes in nearest(setting)]
    if not mends:
        raise InputError(
            f"{lack}. No {_MOST_CHANGES} changes of batch, buffer, contexts of a forward, "
            "expansion, groups, baseline, precision or devices make it fit; take a smaller model"
        )
    raise InputError(f"{lack}. It fits with {'; or with '.join(mends)}")


def nearest(setting: Setting) -> list[tuple[str, ...]]:
    """The changes, as they are written on the command line, with which a setting fits.

    As few together as possible; each as small as possible, in halves and doubles. The first few.
    """
    kinds = [kind for kind in _kinds(setting) if kind]
    for number in range(1, _MOST_CHANGES + 1):
        found: list[tuple[int, tuple[str, ...]]] = []
        for chosen in combinations(kinds, number):
            if not _fits(setting, [kind[-1] for kind in chosen]):
                continue  # all go as far as they can
            fitting = (
                (sum(step for step, _ in picked), tuple(change[0] for _, change in picked))
                for picked in product(*(enumerate(kind) for kind in chosen))
                if _fits(setting, [change for _, change in picked])
            )
            if (best := min(fitting, default=None)) is not None:
                found.append(best)
        if found:
            found.sort(key=lambda best: best[0])
            return [changes for _, changes in found[:_SHOWN]]
    return []


def _fits(setting: Setting, changes: list[Change]) -> bool:
    for _, change in changes:
        setting = change(setting)
    assert setting.device is not None
    return Demand.of(setting).fits(setting.device)


def _kinds(setting: Setting) -> Iterator[list[Change]]:
    """Kinds of change, each from the smallest to the largest."""
    training, sae, device = setting.config.training, setting.config.sae, setting.device
    assert device is not None
    if training.baseline:
        yield [_set("training", "baseline", False, "false")]
    if device.is_cpu and training.checkpoint_in_background:
        yield [_set("training", "checkpoint_in_background", False, "false")]
    for name, least in (("buffer_tokens", training.batch_tokens), ("host_batch_contexts", 1)):
        yield [_set("training", name, value) for value in _halves(getattr(training, name), least)]
    yield [_set("training", "batch_tokens", v) for v in _halves(training.batch_tokens, 1)]
    needed = max(sae.k or 0, sae.target_l0 or 0)
    if sae.d_sae is None:
        least = -(-int(needed) // setting.host.d_model)
        yield [_set("sae", "expansion", v) for v in _halves(sae.expansion, max(least, 1))]
    else:
        yield [_set("sae", "d_sae", v) for v in _halves(sae.d_sae, max(int(needed), 1))]
    if setting.config.grouping.partition is None:
        yield [_groups(G) for G in _halves(setting.G, 1)]
    if setting.host.number_bytes > 2:
        yield [("host.dtype=bfloat16", _in_bfloat16)]
    if not device.is_cpu:
        more = (2**i for i in range(1, _MOST_DEVICES.bit_length()))
        yield [_devices(n * setting.devices) for n in more if n * setting.devices <= _MOST_DEVICES]
        larger = (other for other in DEVICES.values() if other.memory > device.memory)
        yield [_device(other.name) for other in larger]


def _halves(value: int, least: int) -> list[int]:
    """Half the value, a quarter and so on, none below `least`."""
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def _set(section: str, name: str, value: Any, written: str | None = None) -> Change:
    def change(setting: Setting) -> Setting:
        changed = getattr(setting.config, section).model_copy(update={name: value})
        return replace(setting, config=setting.config.model_copy(update={section: changed}))

    return f"{section}.{name}={value if written is None else written}", change


def _groups(G: int) -> Change:
    return f"grouping.groups={G}", lambda setting: at_groups(setting, G)


def _in_bfloat16(setting: Setting) -> Setting:
    return replace(setting, host=setting.host.in_dtype("bfloat16"))


def _devices(number: int) -> Change:
    return f"--devices {number}", lambda setting: replace(setting, devices=number)


def _device(name: str) -> Change:
    return f"--device {name}", lambda setting: replace(setting, device=DEVICES[name])


def _holding(demand: Demand) -> str:
    """The largest parts, in words."""
    parts = {" ".join(name.split()): part for name, part in demand.parts.items()}
    if demand.copy_on_device:
        parts["checkpoint's copy"] = demand.copy
    largest = sorted(parts.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{name} {size(part)}" for name, part in largest)
