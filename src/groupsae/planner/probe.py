"""What this machine does: a short measurement of the host model and of one SAE's step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from groupsae.config import Config, HostConfig
from groupsae.errors import InputError
from groupsae.host.loading import BUNDLED, resolve_device
from groupsae.host.model import HostModel
from groupsae.planner.demand import Setting
from groupsae.planner.devices import DEVICES, Device, named
from groupsae.planner.speed import Speed
from groupsae.sae import SAE
from groupsae.training.learner import Learner
from groupsae.training.session import sae_config

_SECONDS = 3.0  # for the repetitions of one thing
_ROUNDS = 5
_ROWS = 2048  # of the SAE's batch
_SAE_BYTES = 10**9  # of weights, gradients and Adam's moments; a larger SAE is scaled up to
_BYTES_PER_WEIGHT = 16


def this_device(config: Config) -> Device:
    """The device of this machine that `host.device` means, with its stated peaks if it is known."""
    device = resolve_device(config.host.device)
    if device.type == "cpu":
        return named("cpu")
    if device.type != "cuda":
        raise InputError(f"--measure: host.device={device} cannot be measured; use cpu or cuda")
    properties = torch.cuda.get_device_properties(device)
    title = properties.name.lower().replace(" ", "")
    known = next((own for name, own in DEVICES.items() if name in title), None)
    if known is not None:
        return known
    return Device(properties.name, properties.total_memory)


def measured(setting: Setting) -> Speed:
    """How long a forward and an SAE's step take here, by a few of each.

    The host model is timed where its weights are on this machine. An SAE that would take more than
    a gigabyte is timed with fewer latents, and its time taken as proportional to d_sae. Batches are
    random; AuxK is not timed.
    """
    began = time.monotonic()
    device = resolve_device(setting.config.host.device)
    forward_token, of_host = _forward(setting)
    step, step_row, of_sae = _sae_step(setting, device)
    known, ranks = setting.device, setting.config.training.latent_ranks
    return Speed(
        source=f"measured on this machine in {time.monotonic() - began:.1f} s: {of_host}; {of_sae}",
        forward_token=forward_token,
        step=step,
        step_row=step_row,
        link=None if known is None else known.link_of(setting.devices),
        shard_link=None if known is None else known.link_of(setting.devices, ranks),
    )


def _forward(setting: Setting) -> tuple[float | None, str]:
    """Seconds for each token of a forward, and what was done."""
    config, asked = setting.config, setting.config.host
    if config.training.activation_cache is not None:
        return None, "no forward, training reads a cache"
    if not _is_here(asked):
        return None, f"{asked.name} is not here and was not timed"
    host = HostModel.load(
        asked.name, revision=asked.revision, dtype=asked.dtype, device=asked.device
    )
    if (host.n_layers, host.d_model) != (setting.host.n_layers, setting.host.d_model):
        return None, f"{asked.name} has other sizes than the plan and was not timed"
    length, last = config.tokens.context_length, max(setting.layers)

    def seconds(contexts: int) -> float:
        ids = torch.randint(host.vocab_size, (contexts, length))
        return _median(lambda: host.visit(ids, {last: lambda _: None}), host.device)

    one = seconds(1)
    contexts = max(min(int(_SECONDS / one), config.training.host_batch_contexts), 1)
    spent = seconds(contexts)
    said = f"a forward of {contexts} contexts of {length} tokens {spent * 1000:,.1f} ms"
    return spent / (contexts * length), said


def _sae_step(setting: Setting, device: torch.device) -> tuple[float, float, str]:
    """Seconds of a step whatever its batch, and for each row; what was done."""
    d_model, d_sae = setting.host.d_model, setting.shard
    least = max(setting.config.sae.k or 1, int(setting.config.sae.target_l0 or 1))
    width = max(min(d_sae, _SAE_BYTES // (2 * d_model * _BYTES_PER_WEIGHT)), least)
    sae_section = setting.config.sae.model_copy(update={"d_sae": width})
    config = setting.config.model_copy(update={"sae": sae_section})
    sae = SAE(sae_config(config, [0], d_model)).to(device)
    training = config.training
    if training.latent_ranks > 1:  # compiled kernels know whole SAEs only
        training = training.model_copy(update={"kernel": "torch"})
    learner = Learner(sae, training)
    many = min(_ROWS, config.training.batch_tokens)
    few = -(-many // 4)

    def seconds(rows: int) -> float:
        x = torch.randn(rows, d_model, device=device) / d_model**0.5
        members = torch.zeros(rows, dtype=torch.long, device=device)
        return _median(lambda: learner.step(x, members), device)

    at_few, at_many = seconds(few), seconds(many)
    row = max(at_many - at_few, 0.0) / max(many - few, 1)
    scaled = d_sae / width
    said = f"an SAE's step on {many:,} rows at d_sae = {width:,} {at_many * 1000:,.1f} ms"
    if width < d_sae:
        said += f", scaled to {d_sae:,}"
    return max(at_many - many * row, 0.0) * scaled, row * scaled, said


def _is_here(asked: HostConfig) -> bool:
    """Whether the weights are on this machine, so that nothing is downloaded to be timed."""
    if asked.name == BUNDLED:
        return True
    folder = Path(asked.name).expanduser()
    if folder.is_dir():
        return any(folder.glob("*.safetensors"))
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "model.safetensors.index.json")
    found = (try_to_load_from_cache(asked.name, f, revision=asked.revision) for f in files)
    return any(isinstance(path, str) for path in found)


def _median(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that the work takes, after one time that is not counted."""

    def seconds() -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    seconds()
    spent = [seconds()]
    while len(spent) < _ROUNDS and sum(spent) < _SECONDS:
        spent.append(seconds())
    return statistics.median(spent)
