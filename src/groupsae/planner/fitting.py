"""What fits in place of a setting that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import Any, NamedTuple, TypeAlias

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
            "expansion, groups, baseline, latent_ranks, precision or devices make it fit; take a "
            "smaller model"
        )
    raise InputError(f"{lack}. It fits with {'; or with '.join(mends)}")


def nearest(setting: Setting) -> list[tuple[str, ...]]:
    """The changes, as they are written on the command line, with which a setting fits.

    As few together as possible; each as small as possible, in halves and doubles. The first few.
    """
    kinds = [kind for kind in _kinds(setting) if kind.changes]
    for number in range(1, _MOST_CHANGES + 1):
        found: list[tuple[int, tuple[str, ...]]] = []
        for chosen in combinations(kinds, number):
            if not any(_fits(setting, ends) for ends in product(*(kind.ends for kind in chosen))):
                continue
            fitting = (
                (sum(step for step, _ in picked), tuple(change[0] for _, change in picked))
                for picked in product(*(enumerate(kind.changes) for kind in chosen))
                if _fits(setting, [change for _, change in picked])
            )
            if (best := min(fitting, default=None)) is not None:
                found.append(best)
        if found:
            found.sort(key=lambda best: best[0])
            return [changes for _, changes in found[:_SHOWN]]
    return []


class _Kind(NamedTuple):
    """Changes of one kind, from the smallest to the largest.

    Attributes:
        steady: Whether a larger one never needs more memory, and is never refused.
    """

    changes: list[Change]
    steady: bool = True

    @property
    def ends(self) -> list[Change]:
        """Among which the one is that needs the least."""
        return self.changes[-1:] if self.steady else self.changes


def _fits(setting: Setting, changes: Sequence[Change]) -> bool:
    for _, change in changes:
        setting = change(setting)
    assert setting.device is not None
    try:
        return Demand.of(setting).fits(setting.device)
    except InputError:  # SAEs or devices that cannot be divided so
        return False


def _kinds(setting: Setting) -> Iterator[_Kind]:
    """Kinds of change."""
    training, sae, device = setting.config.training, setting.config.sae, setting.device
    assert device is not None
    if training.baseline:
        yield _Kind([_set("training", "baseline", False, "false")])
    if device.is_cpu and training.checkpoint_in_background:
        yield _Kind([_set("training", "checkpoint_in_background", False, "false")])
    doubled = [training.latent_ranks * 2**i for i in range(1, setting.devices.bit_length())]
    divided = [ranks for ranks in doubled if setting.devices % ranks == 0]
    # A device has less of each SAE, but has more of them, with a buffer for each.
    yield _Kind([_set("training", "latent_ranks", n) for n in divided], steady=False)
    for name, least in (("buffer_tokens", training.batch_tokens), ("host_batch_contexts", 1)):
        halves = _halves(getattr(training, name), least)
        yield _Kind([_set("training", name, value) for value in halves])
    yield _Kind([_set("training", "batch_tokens", v) for v in _halves(training.batch_tokens, 1)])
    needed = max(sae.k or 0, sae.target_l0 or 0)
    if sae.d_sae is None:
        least = -(-int(needed) // setting.host.d_model)
        smaller = [_set("sae", "expansion", v) for v in _halves(sae.expansion, max(least, 1))]
    else:
        smaller = [_set("sae", "d_sae", v) for v in _halves(sae.d_sae, max(int(needed), 1))]
    yield _Kind(smaller, steady=setting.devices == 1)  # else shards may become too small
    if setting.config.grouping.partition is None:
        fewer = [_groups(G) for G in _halves(setting.G, 1)]
        yield _Kind(fewer, steady=False)  # fewer SAEs may be shared, and their gradients summed
    if setting.host.number_bytes > 2:
        yield _Kind([("host.dtype=bfloat16", _in_bfloat16)])
    if not device.is_cpu:
        more = [setting.devices * 2**i for i in range(1, _MOST_DEVICES.bit_length())]
        several = [_devices(n) for n in more if n <= _MOST_DEVICES]
        yield _Kind(several, steady=False)  # each has fewer SAEs, but a round has more rows
        larger = (other for other in DEVICES.values() if other.memory > device.memory)
        yield _Kind([_device(other.name) for other in larger])


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
