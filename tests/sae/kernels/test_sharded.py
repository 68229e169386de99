"""An SAE whose latents are divided over processes, which are threads here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from groupsae.errors import InputError
from groupsae.sae import SAE, SAEConfig
from groupsae.sae.kernels import choose, reference
from groupsae.sae.kernels.update import update
from groupsae.sae.sparsity import batch_cut

D_MODEL, TOKENS = 16, 61
OF_LATENTS = ("W_enc", "b_enc", "W_dec")


class Threads:
    """The shards of one SAE, each in a thread."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count, timeout=60)
        self._given: list[Tensor | None] = [None] * count

    def run(self, work: Callable[[Shards], object]) -> list:
        with ThreadPoolExecutor(self.count) as pool:
            futures = [pool.submit(self._one, work, index) for index in range(self.count)]
            return [future.result() for future in futures]

    def _one(self, work, index: int):
        try:
            return work(Shards(self, index))
        except BaseException:
            self._barrier.abort()
            raise

    def all_of(self, index: int, tensor: Tensor) -> Tensor:
        self._given[index] = tensor.clone()
        self._barrier.wait()
        found = torch.stack(self._given)
        self._barrier.wait()
        return found


class Shards:
    def __init__(self, threads: Threads, index: int) -> None:
        self.index, self.count, self._threads = index, threads.count, threads

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self._threads.all_of(self.index, tensor).sum(0))

    def gather(self, tensor: Tensor) -> Tensor:
        return self._threads.all_of(self.index, tensor)


def whole_sae(d_sae: int, seed: int = 0, **config: object) -> SAE:
    random = torch.Generator().manual_seed(seed)
    config = {"architecture": "topk", "k": 4, "layers": (0, 1)} | config
    sae = SAE(SAEConfig(d_model=D_MODEL, d_sae=d_sae, **config), generator=random).double()
    with torch.no_grad():
        sae.W_enc.add_(torch.randn(d_sae, D_MODEL, generator=random), alpha=0.1)
        sae.b_enc.copy_(torch.randn(d_sae, generator=random) / 10)
        sae.b_dec.copy_(torch.randn(D_MODEL, generator=random) / 10)
    return sae


def rows_of(d_sae: int, shards: Shards) -> slice:
    return slice(*(d_sae * i // shards.count for i in (shards.index, shards.index + 1)))


def part_of(sae: SAE, rows: slice) -> SAE:
    part = SAE(replace(sae.config, d_sae=rows.stop - rows.start)).double()
    weights = {n: w[rows] if n in OF_LATENTS else w for n, w in sae.state_dict().items()}
    part.load_state_dict(weights)
    return part


def batch(seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, D_MODEL, generator=random).double() + 0.5
    return x, torch.randint(2, (TOKENS,), generator=random)


@pytest.mark.parametrize("rule", ["topk", "batchtopk", "batchtopk of each layer"])
@given(
    count=st.integers(2, 4),
    d_sae=st.integers(24, 70),
    k=st.integers(1, 6),
    n_dead=st.none() | st.integers(0, 70),
    seed=st.integers(0, 1000),
)
@example(count=3, d_sae=64, k=4, n_dead=20, seed=0)  # AuxK by products over all dead latents
@example(count=3, d_sae=64, k=4, n_dead=60, seed=0)  # and on the active ones
@settings(max_examples=25, deadline=None)
def test_a_step_is_that_of_the_undivided_sae(rule, count, d_sae, k, n_dead, seed):
    architecture, _, of_each_layer = rule.partition(" ")
    sae = whole_sae(
        d_sae, seed, k=k, architecture=architecture, per_layer_threshold=bool(of_each_layer)
    )
    x, members = batch(seed)
    dead = None
    if n_dead is not None:
        dead = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed)) < n_dead
    expected = reference.step(sae, x, members=members, dead=dead)

    def step(shards: Shards):
        rows = rows_of(d_sae, shards)
        kernel = choose("auto", x.device, shards)
        own = None if dead is None else dead[rows]
        return kernel.step(part_of(sae, rows), x, members=members, dead=own)

    found = Threads(count).run(step)
    for name, gradient in expected.gradients.items():
        whole = torch.cat([one.gradients[name] for one in found])
        if name not in OF_LATENTS:
            gradient = gradient.repeat(count, *[1] * (gradient.dim() - 1))
        torch.testing.assert_close(whole, gradient, rtol=1e-10, atol=1e-12)
    assert torch.equal(torch.cat([one.fired for one in found]), expected.fired)
    for one in found:
        for name in ("loss", "fvu", "auxk", "l0"):
            torch.testing.assert_close(
                getattr(one, name), getattr(expected, name), rtol=1e-10, atol=0
            )
        if expected.cuts is None:
            assert one.cuts is None
        else:
            torch.testing.assert_close(one.cuts, expected.cuts, rtol=1e-12, atol=0)


def test_a_shard_without_dead_latents_helps_the_others():
    sae = whole_sae(32).float()
    x, members = batch(0)
    x, dead = x.float(), torch.arange(32) < 12  # of the first of three shards, and of the second
    expected = reference.step(sae, x, members=members, dead=dead)

    def step(shards: Shards):
        rows = rows_of(32, shards)
        kernel = choose("auto", x.device, shards)
        return kernel.step(part_of(sae, rows).float(), x, members=members, dead=dead[rows])

    for found in Threads(3).run(step):
        torch.testing.assert_close(found.auxk, expected.auxk)


@given(seed=st.integers(0, 1000), levels=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_of_equal_activations_a_token_keeps_k(seed, levels):
    """Rounded weights and tokens make ties everywhere: every shard must break them alike."""
    sae = whole_sae(32, seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_((parameter * levels).round() / levels)
    x, members = batch(seed)
    x = x.round()

    def l0(shards: Shards):
        part = part_of(sae, rows_of(32, shards))
        return choose("auto", x.device, shards).step(part, x, members=members).l0

    expected = reference.step(sae, x, members=members).l0
    for found in Threads(3).run(l0):
        torch.testing.assert_close(found, expected)


@given(
    seed=st.integers(0, 1000),
    k=st.integers(1, 8),
    zeros=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    of_each=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_the_cut_of_a_batch_is_found_by_counting(seed, k, zeros, dtype, of_each):
    from groupsae.sae.kernels.sharded import _cuts

    random = torch.Generator().manual_seed(seed)
    values = torch.rand(30, 24, generator=random, dtype=dtype).mul_(3)
    values *= torch.rand(30, 24, generator=random) >= zeros
    own = torch.randint(3, (30,), generator=random) if of_each else None  # a third may have none
    expected = batch_cut(values, k, own, 3)
    found = Threads(3).run(
        lambda shards: _cuts(
            values[:, 8 * shards.index : 8 * (shards.index + 1)].contiguous(),
            k,
            own,
            3 if of_each else 1,
            shards,
        )
    )
    for cuts in found:
        assert torch.equal(cuts, expected)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_an_update_is_that_of_the_undivided_sae(clip):
    sae = whole_sae(32)
    x, members = batch(0)
    gradients = reference.step(sae, x, members=members).gradients

    def moved(part: SAE, own: dict[str, Tensor], move) -> tuple[SAE, Tensor]:
        adam = torch.optim.Adam(part.parameters(), lr=0.01, fused=True)
        norms = [move(part, dict(own), adam, gradient_clip=clip) for _ in range(3)]
        return part, norms[-1]

    def shard(shards: Shards):
        rows = rows_of(32, shards)
        own = {n: (g[rows] if n in OF_LATENTS else g).clone() for n, g in gradients.items()}
        return moved(part_of(sae, rows), own, choose("auto", x.device, shards).update)

    found = Threads(3).run(shard)
    expected, norm = moved(part_of(sae, slice(0, 32)), gradients, update)
    for name, weight in expected.state_dict().items():
        if name in OF_LATENTS:
            whole = torch.cat([part.state_dict()[name] for part, _ in found])
            torch.testing.assert_close(whole, weight, rtol=1e-10, atol=1e-12)
        else:
            for part, _ in found:
                torch.testing.assert_close(part.state_dict()[name], weight, rtol=1e-10, atol=1e-12)
    for _, own_norm in found:
        torch.testing.assert_close(own_norm, norm, rtol=1e-12, atol=0)


def test_a_gradient_that_is_not_finite_in_one_shard_stops_all():
    sae = whole_sae(32)
    x, members = batch(0)

    def shard(shards: Shards):
        part = part_of(sae, rows_of(32, shards))
        before = {name: weight.clone() for name, weight in part.state_dict().items()}
        kernel = choose("auto", x.device, shards)
        gradients = kernel.step(part, x, members=members).gradients
        if shards.index == 1:
            gradients["W_enc"][0, 0] = torch.nan
        adam = torch.optim.Adam(part.parameters(), lr=0.01, fused=True)
        norm = kernel.update(part, gradients, adam, gradient_clip=1.0)
        same = all(torch.equal(weight, before[n]) for n, weight in part.state_dict().items())
        return bool(norm.isfinite()), same

    assert Threads(3).run(shard) == [(False, True)] * 3


def test_a_kernel_of_whole_saes_is_refused():
    with pytest.raises(InputError, match=r"training\.kernel=reference knows whole SAEs only"):
        choose("reference", torch.device("cpu"), Shards(Threads(2), 0))
