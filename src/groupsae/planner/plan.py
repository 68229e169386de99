"""The plan of a config: every number of groups, with what it needs and how long it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from groupsae.config import Config
from groupsae.errors import InputError
from groupsae.grouping.cost import CostModel
from groupsae.planner.demand import Demand, Setting, at_groups
from groupsae.planner.devices import Device, named
from groupsae.planner.fitting import check_fit
from groupsae.planner.host import PlannedHost
from groupsae.planner.speed import Speed, StepTime
from groupsae.planning import chosen_beforehand, cost_model, covered_layers


@dataclass(frozen=True)
class Plan:
    """What training needs for every number of groups.

    Attributes:
        setting: With the number of groups that is planned: the config's own or the chosen one, or
            one for each layer where that is open.
        is_open: Whether the number of groups is open.
        cost: FLOPs by the paper's definition.
        demands: By number of groups.
        times: Of a step, by number of groups, where they can be told.
        speed: What they come from.
    """

    setting: Setting
    is_open: bool
    cost: CostModel
    demands: Mapping[int, Demand]
    times: Mapping[int, StepTime]
    speed: Speed | None

    @classmethod
    def of(
        cls,
        config: Config,
        *,
        chosen: int | None = None,
        devices: int = 1,
        device: str | None = None,
        measure: bool = False,
    ) -> Plan:
        """Plan a config; holds no weights but those that `measure` times.

        Args:
            chosen: The number of groups, where distances are known that choose it.
            devices: How many processes share the work, one a device.
            device: A name in :data:`groupsae.planner.devices.DEVICES`, or "cpu"; None: nothing is
                refused and no time predicted.
            measure: Take times from this machine instead of stated peaks.

        Raises:
            InputError: There is no such device, or another than this machine's is to be measured.
        """
        on = None if device is None else named(device)
        if measure:
            on = _measured_device(config, on)
        if on is not None and on.is_cpu:  # whose processes have one memory
            on = replace(on, memory=on.memory // devices)
        host = PlannedHost.of(config, on_cpu=None if on is None else on.is_cpu)
        layers = covered_layers(config, host.n_layers)
        fixed = chosen_beforehand(config, layers)
        G = chosen if fixed is None else fixed.chosen
        setting = Setting(
            config, host, layers, len(layers) if G is None else G, devices=devices, device=on
        )
        settings = {number: at_groups(setting, number) for number in range(1, len(layers) + 1)}
        demands = {number: Demand.of(own) for number, own in settings.items()}
        speed = None
        if measure:
            from groupsae.planner.probe import measured

            speed = measured(setting)
        elif on is not None:
            speed = Speed.of_peaks(setting, on)
        times = {}
        if speed is not None:
            for number, own in settings.items():
                time = StepTime.of(own, demands[number], speed)
                if time is not None:
                    times[number] = time
        cost = cost_model(config, host.n_layers, host.d_model)
        return cls(setting, G is None, cost, demands, times, speed)

    def fitting(self) -> list[int]:
        """The numbers of groups that the device has room for; all where none is named."""
        device = self.setting.device
        return [G for G, own in self.demands.items() if device is None or own.fits(device)]

    def check(self) -> None:
        """Refuse what cannot fit; with the number of groups open, only where none fits.

        Raises:
            InputError: See :func:`groupsae.planner.fitting.check_fit`.
        """
        if not self.is_open:
            check_fit(self.setting)
        elif not self.fitting():
            least = min(self.demands, key=lambda G: self.demands[G].total)
            check_fit(replace(self.setting, G=least))


def _measured_device(config: Config, asked: Device | None) -> Device:
    from groupsae.planner.probe import this_device

    here = this_device(config)
    if asked is not None and asked.name != here.name:
        raise InputError(
            f"--measure: it times this machine ({here.name}), not --device {asked.name}; leave one "
            "of them out"
        )
    return here
