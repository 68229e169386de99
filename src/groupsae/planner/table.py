"""A plan as lines and tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table
from rich.text import Text

from groupsae.planner.plan import Plan
from groupsae.training.memory import size


def lines(plan: Plan) -> Iterator[str]:
    """What is said above the tables."""
    setting, cost = plan.setting, plan.cost
    config, host, tokens = setting.config, setting.host, setting.config.training.tokens
    yield (
        f"{config.host.name}: {host.n_layers} layers, d_model = {host.d_model}, "
        f"d_sae = {cost.d_sae}, {tokens:,} tokens, {config.training.steps:,} steps of "
        f"{config.training.batch_tokens:,}; "
        f"host forward A = {cost.forward_flops * tokens / 1e15:,.2f} PFLOP, "
        f"one SAE T = {cost.sae_flops * tokens / 1e15:,.2f} PFLOP"
    )
    demand = plan.demands[setting.G]
    among = ""
    if setting.devices > 1:
        among = f" on the fullest of {setting.devices} devices"
        if demand.mesh.latents > 1:
            among += f", with 1/{demand.mesh.latents} of the latents of its SAEs"
    note = f"; {host.note}" if host.note else ""
    yield f"memory for G = {setting.G}{_baseline(plan)}{among}: {demand.account}{note}"
    if setting.devices > 1:
        mesh, without = demand.mesh, max(demand.mesh.groups - demand.n_saes, 0)
        shared = f", each shared by {mesh.data}" if mesh.data > 1 else ""
        shared += f", each divided over {mesh.latents}" if mesh.latents > 1 else ""
        saes = "one SAE" if demand.n_saes == 1 else f"{demand.n_saes} SAEs"
        idle = f"; {without * mesh.data * mesh.latents} only run the host model" if without else ""
        yield (
            f"{setting.devices} devices: {saes} dealt over {mesh.groups}{shared}; "
            f"every device holds the whole host model{idle}"
        )
    kept = config.training.checkpoints_kept + 1
    yield f"disk: {kept} checkpoints, one of them being written: {size(kept * demand.checkpoint)}"
    yield from _about_time(plan)
    fitting = plan.fitting()
    if setting.device is not None and 0 < len(fitting) < len(plan.demands):
        room = f"{setting.device.name} ({size(setting.device.usable)} of memory)"
        yield f"{room} has room for G = {_ranges(fitting)} only"


def _about_time(plan: Plan) -> Iterator[str]:
    if plan.speed is None:
        if plan.setting.device is not None:
            yield (
                f"time: nothing is stated of {plan.setting.device.name}; --measure times this "
                "machine"
            )
        return
    yield f"time: {plan.speed.source}"
    time = plan.times.get(plan.setting.G)
    if time is None:
        yield "time: not all parts of a step are known, so none is predicted"
        return
    yield (
        f"a step with G = {plan.setting.G}{_baseline(plan)}: host {_seconds(time.host)}, SAEs "
        f"{_seconds(time.saes)}, communication {_seconds(time.communication)}"
    )


def cost_table(
    plan: Plan, columns: Mapping[str, Mapping[int, str]], caption: Text | None = None
) -> Table:
    """FLOPs, memory and time by number of groups.

    Args:
        columns: Further ones: a cell by number of groups under each title.
    """
    cost, n_layers = plan.cost, len(plan.setting.layers)
    tokens, steps = plan.setting.config.training.tokens, plan.setting.config.training.steps
    table = Table(title="Predicted cost, C(G) = A + T G", caption=caption)
    saved = f"saved against one SAE for each of {n_layers} layers"
    titles = ["G", "PFLOP", saved, f"memory held{_baseline(plan)}"]
    timed = ["step", "training"] if plan.times else []
    sent = ["received and\nsent in a step"] if plan.setting.devices > 1 else []
    for title in (*titles, *sent, *timed, *columns):
        table.add_column(title, justify="right")
    for G, demand in plan.demands.items():
        time = plan.times.get(G)
        told = ["–", "–"] if time is None else [_seconds(time.total), _long(time.total * steps)]
        table.add_row(
            str(G),
            f"{cost.flops_per_token(G) * tokens / 1e15:,.2f}",
            f"{cost.savings(G, n_layers):.0%}",
            size(demand.account.total),
            *([size(demand.crossing)] if sent else ()),
            *(told if timed else ()),
            *(cells.get(G, "–") for cells in columns.values()),
        )
    return table


def memory_table(plan: Plan) -> Table:
    """What a device holds at its peak, part by part, by number of groups."""
    device, n_devices = plan.setting.device, plan.setting.devices
    where = "one device" if n_devices == 1 else f"the fullest of {n_devices} devices"
    table = Table(
        title=f"Memory of {where} at its peak{_baseline(plan)}",
        caption="batch: with pre-activations and counters. forward: activations of one forward. "
        "step: what a step of one SAE holds for a moment. all: at the fullest moment; forwards and "
        "steps overlap on one GPU alone. checkpoint: of all devices, on disk; its copy is in the "
        "machine's memory until it is written.",
    )
    parts = next(iter(plan.demands.values())).parts
    shown = [name for name in parts if name != "exchange" or n_devices > 1]
    fits = [] if device is None else [f"fits in\n{size(device.usable)}"]
    for title in ("G", "SAEs", *shown, "copy", "all", *fits, "checkpoint"):
        table.add_column(title, justify="right")
    fitting = set(plan.fitting())
    for G, demand in plan.demands.items():
        table.add_row(
            str(G),
            str(demand.own_saes),
            *(size(demand.parts[name]) for name in shown),
            size(demand.copy),
            size(demand.total),
            *(["yes" if G in fitting else "no"] if fits else ()),
            size(demand.checkpoint),
            style="bold" if not plan.is_open and G == plan.setting.G else "",
        )
    return table


def _baseline(plan: Plan) -> str:
    return " with a baseline, at most" if plan.setting.config.training.baseline else ""


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{seconds * 1000:,.1f} ms"


def _long(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.0f} s"


def _ranges(numbers: list[int]) -> str:
    """1-3, 7: ascending numbers as they are read."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in spans)
