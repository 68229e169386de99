"""How long a step takes, from what a device is stated to do or from what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from groupsae.planner.demand import Demand, Setting
from groupsae.planner.devices import Device

UTILISATION = 0.4  # of every peak: what training steps of this kind are commonly seen to reach
_UPDATE = 120  # bytes per weight of one matrix: clipping, projection, Adam and norms in PyTorch
_UNEVEN = 2  # times its share of k that a shard works on: as much as the token with most there
_GATHERED = 24  # bytes per active latent and dimension: rows read, and read and written as sums


@dataclass(frozen=True)
class Speed:
    """Seconds of the parts of a step; None where they are not known.

    Attributes:
        source: Where they come from, in words.
        forward_token: Of the host model, for each token of a forward.
        step: Of one SAE's step, or of its shard's, whatever the batch.
        step_row: Of that step, for each row of its batch.
        link: Bytes per second that a device sends or receives.
        shard_link: The same among those that hold the latents of the same SAEs.
    """

    source: str
    forward_token: float | None
    step: float | None
    step_row: float | None
    link: float | None
    shard_link: float | None = None

    @classmethod
    def of_peaks(cls, setting: Setting, device: Device) -> Speed | None:
        """From a device's stated peaks, of which it is taken to reach :data:`UTILISATION`.

        The host model's products are counted at its precision's peak, the SAEs' at float32's; an
        SAE's sparse parts and its update by the bytes that they move. AuxK is not counted.
        None for a device without stated peaks.
        """
        if device.float32 is None or device.half is None or device.bandwidth is None:
            return None
        host, ranks = setting.host, setting.config.training.latent_ranks
        d_model, d_sae = host.d_model, setting.shard
        if setting.active is None:
            flops, gathered = 10 * d_model * d_sae, 0.0
        else:
            own = setting.active * min(_UNEVEN / ranks, 1)
            flops, gathered = 2 * d_model * d_sae, _GATHERED * own * d_model
        scores = 2 * 4 * d_sae  # written and read
        peak = {8: None, 4: device.float32, 2: device.half}[host.number_bytes]
        forward = setting.cost.forward_flops
        return cls(
            source=f"{device.name}'s stated peaks at {UTILISATION:.0%}: "
            f"{device.float32 / 1e12:g} TFLOPS float32 (SAEs), {device.half / 1e12:g} 16-bit, "
            f"{device.bandwidth / 1e12:g} TB/s",
            forward_token=None if peak is None else forward / (UTILISATION * peak),
            step=_UPDATE * d_model * d_sae / (UTILISATION * device.bandwidth),
            step_row=flops / (UTILISATION * device.float32)
            + (gathered + scores) / (UTILISATION * device.bandwidth),
            link=_times(UTILISATION, device.link_of(setting.devices)),
            shard_link=_times(UTILISATION, device.link_of(setting.devices, ranks)),
        )


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the busiest device, one part after another."""

    host: float
    saes: float
    communication: float

    @classmethod
    def of(cls, setting: Setting, demand: Demand, speed: Speed) -> StepTime | None:
        """None where a part of it cannot be told."""
        training, mesh = setting.config.training, demand.mesh
        share = mesh.share(training.batch_tokens)
        sent, joined = demand.received + demand.reduced, demand.joined
        host = 0.0
        if training.activation_cache is None:
            if speed.forward_token is None:
                return None
            # A round is a forward of each device; what a step leaves of it serves the next ones.
            # There are no rounds where what a forward drops decides the next one's draws.
            drops = training.max_norm_multiple is not None
            at_once = 1 if drops and training.layer_sampling == "balanced" else mesh.devices
            host = training.batch_tokens / at_once * speed.forward_token
        if speed.step is None or speed.step_row is None:
            return None
        communication = 0.0
        for crossing, link in ((sent, speed.link), (joined, speed.shard_link)):
            if crossing and link is None:
                return None
            communication += crossing / link if link is not None else 0.0
        return cls(
            host=host,
            saes=demand.own_saes * speed.step + demand.own_rows * share * speed.step_row,
            communication=communication,
        )

    @property
    def total(self) -> float:
        """All of it."""
        return self.host + self.saes + self.communication


def _times(share: float, peak: float | None) -> float | None:
    return None if peak is None else share * peak
