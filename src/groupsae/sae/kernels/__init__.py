"""The training step's loss and gradients, and the choice among the ways to compute them.

| kernel | what it is |
| --- | --- |
| reference | dense autograd: the truth that the others are tested against |
| torch | works on active latents only, in plain PyTorch, on any device (`sparse`) |
| cpu | the same with its sparse parts and the update in C++, built at first use |
| triton | the same for CUDA |
| sharded | `torch` for one of the processes that an SAE's latents are divided over: no choice by name |

The compiled ones take what their column in this table has; everything else is `torch`'s, and what
is dense there is `reference`'s. "extras" are learned vectors of each member layer.

| architecture | torch | cpu | triton |
| --- | --- | --- | --- |
| topk | sparse | compiled, without extras | compiled, without extras |
| batchtopk | sparse | compiled, without extras | as torch |
| matryoshka | sparse | as torch | as torch |
| jumprelu, relu | sparse once at most d_sae / 8 latents are active on every token | compiled then, without extras | as torch |
| gated | dense | as torch | as torch |
"""  # noqa: E501

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from groupsae.errors import InputError
from groupsae.sae.autoencoder import SAE
from groupsae.sae.kernels import reference, sparse
from groupsae.sae.kernels.reference import StepResult
from groupsae.sae.kernels.update import update

if TYPE_CHECKING:
    from groupsae.sae.kernels.sharded import Shards

__all__ = ["Kernel", "Step", "StepResult", "Update", "check_takes_shards", "choose"]


@runtime_checkable
class Step(Protocol):
    """Loss and gradients of an SAE on one mixed batch: see :func:`reference.step`."""

    def __call__(
        self,
        sae: SAE,
        x: Float[Tensor, "token d_model"],
        *,
        members: Int[Tensor, " token"] | None = None,
        dead: Bool[Tensor, " d_sae"] | None = None,
        auxk_weight: float = 1 / 32,
        sparsity_weight: float = 0.0,
    ) -> StepResult:
        """Compute them."""
        ...


@runtime_checkable
class Update(Protocol):
    """Move an SAE's weights by their gradients: see :func:`groupsae.sae.kernels.update.update`."""

    def __call__(
        self,
        sae: SAE,
        gradients: dict[str, Tensor],
        adam: torch.optim.Adam,
        *,
        gradient_clip: float,
    ) -> Float[Tensor, ""]:
        """Move them; returns the gradients' norm."""
        ...


class Kernel(NamedTuple):
    """One way to train on a batch: its gradients, and what they do to the weights."""

    name: str
    step: Step
    update: Update


def choose(name: str, device: torch.device, shards: Shards | None = None) -> Kernel:
    """The kernel of that name for SAEs on `device`.

    Args:
        name: One of the kernels above, or "auto": the compiled one where it can run, else torch.
            Triton's has not been run on a GPU yet and is taken only by its name.
        shards: The processes that hold the shards of the SAE, where its latents are divided.

    Raises:
        InputError: A kernel was asked for by name that cannot run here.
    """
    if shards is not None:
        check_takes_shards(name)
        from groupsae.sae.kernels import sharded

        return _kernel("sharded", sharded.ShardedStep(shards), sharded.ShardedUpdate(shards))
    if name == "reference":
        return _kernel(name, reference.step, update)
    if name == "torch":
        return _kernel("torch", sparse.step, update)
    if name == "triton":
        from groupsae.sae.kernels import triton

        if device.type != "cuda" or not triton.available():
            raise InputError(
                f"training.kernel=triton needs an NVIDIA GPU and the package triton, and the SAEs "
                f"are on {device}; set training.kernel=torch"
            )
        return _kernel(name, triton.step, update)
    if device.type == "cpu":
        from groupsae.sae.kernels import cpu

        if cpu.available():
            return _kernel("cpu", cpu.step, cpu.update)
    if name == "cpu":
        raise InputError(
            f"training.kernel=cpu needs a C++ compiler with OpenMP and SAEs on the CPU (they are "
            f"on {device}); install one, name it in CXX, or set training.kernel=torch"
        )
    return _kernel("torch", sparse.step, update)


def check_takes_shards(name: str) -> None:
    """Refuse a kernel that cannot step an SAE whose latents are divided.

    Raises:
        InputError: It is such a one.
    """
    if name not in ("auto", "torch"):
        raise InputError(
            f"training.kernel={name} knows whole SAEs only; set training.kernel=torch, or "
            "training.latent_ranks=1"
        )


def _kernel(name: str, step: Step, update: Update) -> Kernel:
    """With a step that refuses what is no batch, and takes any floating dtype."""

    def checked(
        sae: SAE,
        x: Tensor,
        *,
        members: Int[Tensor, " token"] | None = None,
        dead: Bool[Tensor, " d_sae"] | None = None,
        auxk_weight: float = 1 / 32,
        sparsity_weight: float = 0.0,
    ) -> StepResult:
        d_model = sae.config.d_model
        if x.dim() != 2 or x.shape[1] != d_model or not len(x) or not x.is_floating_point():
            raise InputError(
                f"{x.dtype} {list(x.shape)} is no batch of activations: [token, {d_model}] is "
                "wanted, floating, with at least one token"
            )
        return step(
            sae,
            x.to(sae.W_enc.dtype),
            members=members,
            dead=dead,
            auxk_weight=auxk_weight,
            sparsity_weight=sparsity_weight,
        )

    return Kernel(name, checked, update)
