"""The training step on the CPU with its sparse parts compiled: `cpu.cpp`, built at first use.

What it does beyond `sparse`, with the same result:

- Top-k: a row's pre-activations are searched through the maxima of groups of latents.
- Screening: where the CPU multiplies 8-bit numbers in hardware, at four times the rate of float32,
  the encoder's product is made of rows rounded to 8 bits, and only the latents that can be among
  the k largest, by a bound on the rounding error of every single score, are scored again in
  float32. No latent that belongs to the top k is lost; tokens that the bound leaves with too many
  candidates get the float32 product.
- Decoder, residual and the activations' gradient in one pass over a token's k rows.
- Weight gradients latent by latent over the transposed pattern, a strip of columns at a time: the
  work is as even when few latents are active on most tokens.
- Clipping, projection, Adam and renormalisation in one pass over the rows (:func:`update`).

The source is C++ behind a C interface, called through ctypes: it needs a C++ compiler with OpenMP,
and neither Python's headers, nor ninja, nor a package, and builds in about a second. Measured
against it, a top-k in numba took 2.8 times as long a row and 13 s to compile, and numba adds 200 MB
and its own demands on the versions of Python and numpy.

The library lies in the user's cache folder under a hash of source, compiler and CPU. Where it
cannot be built the step is `sparse`'s, and one log line says why. Compiler: the environment's CXX,
else `c++`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Float32, Int, Int8, Int32
from torch import Tensor

from groupsae.cache import CacheError, cache_folder, cpu_flags
from groupsae.products import linear
from groupsae.sae.autoencoder import SAE
from groupsae.sae.kernels import sparse
from groupsae.sae.kernels.reference import StepResult, auxk_size
from groupsae.sae.kernels.selection import (
    Chosen,
    Found,
    above_thresholds,
    at_cuts,
    cut_to_batch,
    most_found,
)
from groupsae.sae.kernels.update import is_clipped
from groupsae.sae.kernels.update import update as plain_update
from groupsae.sae.sparsity import Latents

_log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
)
_BUILD_SECONDS = 300
_CHUNK_BYTES = 16 * 2**20  # of pre-activations, as in `sparse`
_LESS = 0.9  # than the last cut: the next is seldom lower
_COMPILED = ("topk", "batchtopk", "jumprelu", "relu")
_MOST_ENTRIES = 2**31 - 1  # of [token, k]: the kernels count them in 32 bits


def available() -> bool:
    """Whether the compiled step can run here: builds it if it has not been built before."""
    return _library() is not None


@torch.no_grad()
def step(
    sae: SAE,
    x: Float[Tensor, "token d_model"],
    *,
    members: Int[Tensor, " token"] | None = None,
    dead: Bool[Tensor, " d_sae"] | None = None,
    auxk_weight: float = 1 / 32,
    sparsity_weight: float = 0.0,
) -> StepResult:
    """Loss and gradients of an SAE on a mixed batch: see :func:`reference.step`.

    Compiled for topk, batchtopk, jumprelu and relu in float32 on the CPU. What else there is, and
    batches whose variance is no positive number, go to :func:`sparse.step`. Equal bits for equal
    input and number of threads.
    """
    plain = functools.partial(
        sparse.step,
        sae,
        x,
        members=members,
        dead=dead,
        auxk_weight=auxk_weight,
        sparsity_weight=sparsity_weight,
    )
    if not _fits(sae, x):
        return plain()
    variance = (x - x.mean(0)).square_().sum()
    if not 0 < float(variance) < float("inf"):
        return plain()
    x, d_sae = x.contiguous(), sae.config.d_sae
    inputs = x - sae.b_dec

    chosen = _choose_latents(sae, inputs, members)
    if chosen is None:
        return plain()
    latents = chosen.latents
    decoded = _decode(latents, sae.W_dec, sae.b_dec, x, chosen.counts)
    pattern = _transpose(latents, d_sae)
    scale = 2 / float(variance)
    gradients = {
        "W_enc": torch.empty_like(sae.W_enc),
        "b_enc": torch.empty_like(sae.b_enc),
        "W_dec": torch.empty_like(sae.W_dec),
        "b_dec": decoded.error.sum(0) * scale,
    }
    penalty = x.new_zeros(())
    if chosen.near is not None:
        at_values = decoded.products * scale
        penalty, gradients["log_threshold"] = sparse.at_thresholds(
            sae, chosen, at_values, members, sparsity_weight
        )
    if sae.config.architecture == "relu":
        penalty = latents.values.sum(1).mean()
        decoded.products.add_(sparsity_weight / (len(x) * scale))
    _weight_gradients(latents, pattern, decoded, inputs, scale, gradients)
    auxk = x.new_zeros(())
    if dead is not None and bool(dead.any()):
        loss = _add_auxk(sae, inputs, -decoded.error, dead, scale * auxk_weight, gradients)
        auxk = loss / variance
    gradients["b_dec"] -= gradients["b_enc"] @ sae.W_enc

    fvu = decoded.squares.sum() / variance
    return StepResult(
        gradients=gradients,
        loss=fvu + auxk_weight * auxk + sparsity_weight * penalty,
        fvu=fvu,
        auxk=auxk,
        penalty=penalty,
        l0=latents.l0().mean(),
        fired=pattern.offsets.diff() > 0,
        cuts=chosen.cuts,
    )


@torch.no_grad()
def update(
    sae: SAE, gradients: dict[str, Tensor], adam: torch.optim.Adam, *, gradient_clip: float
) -> Float[Tensor, ""]:
    """Move the weights: each row is read and written once, whatever is done to it.

    The same as clipping the gradients' common norm to `gradient_clip`, removing the components
    along the decoder's rows, `adam.step()`, and bringing these rows back to unit norm. `gradients`
    stay as they are; the state in `adam` is read and moved, so that it is saved as ever. Adam must
    be without weight decay and AMSGrad. An SAE that does not fit (:func:`fits`) is moved by
    :func:`groupsae.sae.kernels.update.update`.

    Returns:
        The gradients' norm before it was clipped. If that is not finite, nothing was moved.
    """
    if not fits(sae):
        return plain_update(sae, gradients, adam, gradient_clip=gradient_clip)
    settings = {weights: group for group in adam.param_groups for weights in group["params"]}
    norms = [
        torch.linalg.vector_norm(gradient)
        for name, gradient in gradients.items()
        if is_clipped(name)
    ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if not bool(norm.isfinite()):
        return norm
    factor = min(gradient_clip / (float(norm) + 1e-6), 1.0)  # as torch.nn.utils.clip_grad_norm_
    for name, weights in sae.named_parameters():
        state = adam.state[weights]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(weights)
            state["exp_avg_sq"] = torch.zeros_like(weights)
        state["step"] += 1
        step, group = float(state["step"]), settings[weights]
        beta1, beta2 = map(float, group["betas"])
        # fmt: off
        _call(
            "adam", gradients[name], weights.numel() // weights.shape[-1], weights.shape[-1],
            factor if is_clipped(name) else 1.0,
            beta1, 1 - beta1, beta2, 1 - beta2,  # the rest in double: 0.999f is not 0.999
            group["lr"] / (1 - beta1**step), (1 - beta2**step) ** -0.5, group["eps"],
            int(name == "W_dec"), weights, state["exp_avg"], state["exp_avg_sq"],
        )
        # fmt: on
    return norm


def fits(sae: SAE) -> bool:
    """Whether the compiled kernels can take this SAE: float32, on the CPU, and built."""
    return all(map(_is_plain, sae.parameters())) and available()


@torch.no_grad()
def encode(
    inputs: Float32[Tensor, "token d_model"],
    W_enc: Float32[Tensor, "latent d_model"],
    b_enc: Float32[Tensor, " latent"],
    k: int,
) -> Latents:
    """TopK(relu(W_enc inputs + b_enc)), a chunk of tokens at a time in one kept buffer."""
    inputs, W_enc, b_enc = inputs.contiguous(), W_enc.contiguous(), b_enc.contiguous()
    latents = Latents(
        inputs.new_empty(len(inputs), k),
        torch.empty(len(inputs), k, dtype=torch.int32),
    )
    if not _worth_screening(len(W_enc), k):
        _encode_exactly(inputs, W_enc, b_enc, latents)
        return latents
    left = _encode_screened(inputs, W_enc, b_enc, latents)
    if len(left):
        chosen = Latents(latents.values[left], latents.indices[left])
        _encode_exactly(inputs[left], W_enc, b_enc, chosen)
        latents.values[left], latents.indices[left] = chosen.values, chosen.indices
    return latents


def _encode_exactly(
    inputs: Float32[Tensor, "token d_model"],
    W_enc: Float32[Tensor, "latent d_model"],
    b_enc: Float32[Tensor, " latent"],
    latents: Latents,
) -> None:
    """Fill `latents` through the float32 product."""
    d_sae, k = len(W_enc), latents.values.shape[1]
    rows = _chunk_rows(len(inputs), 4 * d_sae)
    for start in range(0, len(inputs), rows):
        chunk = slice(start, start + rows)
        pre_activations = linear(inputs[chunk], W_enc, b_enc)
        # fmt: off
        _call(
            "select", pre_activations, len(pre_activations), d_sae, k,
            latents.values[chunk], latents.indices[chunk],
        )
        # fmt: on


def _encode_screened(
    inputs: Float32[Tensor, "token d_model"],
    W_enc: Float32[Tensor, "latent d_model"],
    b_enc: Float32[Tensor, " latent"],
    latents: Latents,
) -> Int[Tensor, " left"]:
    """Fill `latents` through the 8-bit product; returns the tokens that are left to do."""
    (d_sae, d_model), k = W_enc.shape, latents.values.shape[1]
    most = min(max(d_sae // 16, 8 * k), d_sae)  # candidates: more cost more than float32 does
    rows = _chunk_rows(len(inputs), 4 * d_sae)
    buffer = torch.empty(rows, d_sae, dtype=torch.int32)
    candidates = torch.empty(len(inputs), most, dtype=torch.int32)
    limits = torch.empty(len(inputs), most)
    counts = torch.full((len(inputs),), most + 1, dtype=torch.int32)
    weights, rounded = _Rounded.of(W_enc), _Rounded.of(inputs)
    room = b_enc.abs() * 2**-21 + 1e-30  # for rounding, and for numbers too small to be normal
    for start in range(0, len(inputs), rows):
        chunk = slice(start, start + rows)
        tokens = len(inputs[chunk])
        products = buffer[:tokens]
        torch._int_mm(rounded.rows[chunk], weights.rows.T, out=products)
        if start == 0 and not _is_exact(products[:8], rounded, weights):
            break
        # fmt: off
        _call(
            "screen", products, tokens, d_sae, d_model, k,
            rounded.scales[chunk], rounded.norms[chunk], rounded.errors[chunk],
            b_enc - room, b_enc + room, weights.scales, weights.norms, weights.errors,
            most, candidates[chunk], limits[chunk], counts[chunk],
        )
        # fmt: on
        if int((counts[chunk] > most).sum()) > tokens // 2:
            break
    # fmt: off
    _call(
        "rescore", candidates, limits, counts, len(inputs), most, d_sae, d_model, k,
        inputs, W_enc, b_enc, latents.values, latents.indices,
    )
    # fmt: on
    return (counts > most).nonzero().squeeze(1)


def _chunk_rows(tokens: int, row_bytes: int) -> int:
    """How many tokens to do at a time: chunks of equal size, none above _CHUNK_BYTES."""
    chunks = math.ceil(tokens / max(_CHUNK_BYTES // row_bytes, 1))
    return math.ceil(tokens / max(chunks, 1))


@dataclass(frozen=True)
class _Rounded:
    """Rows turned by an orthogonal matrix and rounded to 8 bits: `scales` times whole numbers.

    With the norms of the rows, and bounds on the norms of what the rounding changed.
    """

    rows: Int8[Tensor, "row d_model"]
    scales: Float32[Tensor, " row"]
    norms: Float32[Tensor, " row"]
    errors: Float32[Tensor, " row"]

    @classmethod
    def of(cls, rows: Float32[Tensor, "row d_model"]) -> _Rounded:
        """Round `rows`, which must be contiguous."""
        count, width = rows.shape
        scales, norms, errors = (rows.new_empty(count) for _ in range(3))
        rounded = torch.empty_like(rows, dtype=torch.int8)
        _call("round_rows", rows, count, width, rounded, scales, norms, errors)
        return cls(rounded, scales, norms, errors)


def _worth_screening(d_sae: int, k: int) -> bool:
    """By the CPU and the sizes alone, so that a run repeats itself bit by bit.

    With 8-bit dot products in hardware such a matrix product is four times as fast as float32's.
    """
    return 8 * k <= d_sae and hasattr(torch, "_int_mm") and _has_int8()


@functools.cache
def _has_int8() -> bool:
    return bool({"avx512_vnni", "avx_vnni", "amx_int8", "i8mm"} & set(cpu_flags().split()))


def _is_exact(
    products: Int32[Tensor, "token latent"], rounded: _Rounded, weights: _Rounded
) -> bool:
    """Whether these products are the sums that `screen` takes them for, on a sample of latents.

    PyTorch documents its 8-bit product for CUDA only, and on the CPU gets d_model = 1 wrong.
    """
    sample = slice(None, None, max(products.shape[1] // 64, 1))
    exact = rounded.rows[: len(products)].long() @ weights.rows[sample].long().T
    return torch.equal(products[:, sample].long(), exact)


def _choose_latents(
    sae: SAE, inputs: Float32[Tensor, "token d_model"], members: Int[Tensor, " token"] | None
) -> Chosen | None:
    """As :func:`groupsae.sae.kernels.selection.choose_latents`."""
    encoded = functools.partial(encode, inputs, sae.W_enc, sae.b_enc)
    if sae.config.architecture == "topk":
        assert sae.config.k is not None
        return Chosen(encoded(sae.config.k))
    if sae.config.architecture == "batchtopk":
        return _near_last_cut(sae, inputs, members) or cut_to_batch(sae, members, encoded)
    return above_thresholds(sae, members, functools.partial(_find_above, sae, inputs))


def _near_last_cut(
    sae: SAE, inputs: Float32[Tensor, "token d_model"], members: Int[Tensor, " token"] | None
) -> Chosen | None:
    """batchtopk: from all that is above somewhat less than the cuts of the batches before.

    None where this batch's cut lies lower, so that what is active was not all found.
    """
    floor = _LESS * sae.threshold.min()
    found = _find_above(sae, inputs, floor.expand(1, sae.config.d_sae).contiguous(), None)
    if found is None:
        return None
    chosen, cut = at_cuts(sae, members, Latents(found.values.relu_(), found.indices))
    return chosen if bool((cut > floor).all()) else None


def _find_above(
    sae: SAE,
    inputs: Float32[Tensor, "token d_model"],
    floors: Float32[Tensor, "row d_sae"],
    own: Int[Tensor, " token"] | None,
) -> Found | None:
    """Through the float32 product: how many latents are active is not known beforehand."""
    tokens, d_sae, most = len(inputs), sae.config.d_sae, most_found(sae)
    values = torch.full((tokens, most), -torch.inf)
    indices = torch.zeros(tokens, most, dtype=torch.int32)
    counts = torch.empty(tokens, dtype=torch.int32)
    rows = _chunk_rows(tokens, 4 * d_sae)
    for start in range(0, tokens, rows):
        chunk = slice(start, start + rows)
        pre_activations = linear(inputs[chunk], sae.W_enc, sae.b_enc)
        # fmt: off
        _call(
            "select_above", pre_activations, len(pre_activations), d_sae, floors,
            None if own is None else own[chunk], most, values[chunk], indices[chunk], counts[chunk],
        )
        # fmt: on
        if int(counts[chunk].max()) > most:
            return None
    width = max(int(counts.max()), 1)
    return Found(values[:, :width].contiguous(), indices[:, :width].contiguous(), counts)


@dataclass(frozen=True)
class _Decoded:
    error: Float32[Tensor, "token d_model"]  # reconstruction less target
    squares: Float32[Tensor, " token"]  # the error's sum of squares
    products: Float32[Tensor, "token k"]  # error . W_dec[latent]


def _decode(
    latents: Latents,
    W_dec: Float32[Tensor, "latent d_model"],
    bias: Float32[Tensor, " d_model"] | None,
    target: Float32[Tensor, "token d_model"],
    counts: Int32[Tensor, " token"] | None = None,
) -> _Decoded:
    """With products of the first `counts` entries of each token, or of the active ones."""
    (tokens, k), d_model = latents.values.shape, W_dec.shape[1]
    result = _Decoded(
        torch.empty_like(target), target.new_empty(tokens), torch.empty_like(latents.values)
    )
    # fmt: off
    _call(
        "decode", latents.values, latents.indices, W_dec.contiguous(), counts, bias, target,
        tokens, k, d_model, result.error, result.squares, result.products,
    )
    # fmt: on
    return result


@dataclass(frozen=True)
class _Pattern:
    """Which entries of [token, k] are active, latent by latent."""

    offsets: Int[Tensor, " boundary"]
    order: Int[Tensor, " entry"]


def _transpose(latents: Latents, d_sae: int) -> _Pattern:
    tokens, k = latents.values.shape
    pattern = _Pattern(
        torch.empty(d_sae + 1, dtype=torch.long), torch.empty(tokens * k, dtype=torch.int32)
    )
    # fmt: off
    _call(
        "transpose", latents.values, latents.indices, tokens, k, d_sae,
        pattern.offsets, pattern.order,
    )
    # fmt: on
    return pattern


def _weight_gradients(
    latents: Latents,
    pattern: _Pattern,
    decoded: _Decoded,
    inputs: Float32[Tensor, "token d_model"],
    scale: float,
    gradients: dict[str, Tensor],
    add_to: Int[Tensor, " latent"] | None = None,
) -> None:
    """Write the latents' gradients, or add them to the rows `add_to`."""
    (tokens, k), (d_sae, d_model) = (
        latents.values.shape,
        (len(pattern.offsets) - 1, inputs.shape[1]),
    )
    for rows, weights, sums, totals in (
        (inputs, decoded.products, gradients["W_enc"], gradients["b_enc"]),
        (decoded.error, latents.values, gradients["W_dec"], None),
    ):
        # fmt: off
        _call(
            "sum_rows", pattern.offsets, pattern.order, weights, rows, add_to, scale,
            int(add_to is not None), tokens, k, d_sae, d_model, sums, totals,
        )
        # fmt: on


def _add_auxk(
    sae: SAE,
    inputs: Float32[Tensor, "token d_model"],
    residual: Float32[Tensor, "token d_model"],
    dead: Bool[Tensor, " d_sae"],
    scale: float,
    gradients: dict[str, Tensor],
) -> Float32[Tensor, ""]:
    """Add the auxiliary loss's gradients, times `scale` / 2; returns the loss before the variance.

    Touches dead latents only.
    """
    which = dead.nonzero().squeeze(1)
    k, share = auxk_size(sae.config.d_model, len(which))
    latents = encode(inputs, sae.W_enc[which], sae.b_enc[which], k)
    decoded = _decode(latents, sae.W_dec[which], None, residual)
    pattern = _transpose(latents, len(which))
    _weight_gradients(latents, pattern, decoded, inputs, share * scale, gradients, which)
    return share * decoded.squares.sum()


def _fits(sae: SAE, x: Tensor) -> bool:
    config = sae.config
    if config.architecture not in _COMPILED or config.learned_affine != "none":
        return False
    most = config.k if config.architecture == "topk" else config.d_sae
    entries = len(x) * max(most or 0, config.d_model)
    return _is_plain(x) and 0 < entries <= _MOST_ENTRIES and fits(sae)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a function of `cpu.cpp`, whose first argument is the number of threads."""
    library = _library()
    assert library is not None
    function = getattr(library, f"groupsae_{name}")
    function(*map(_as_c, (torch.get_num_threads(), *arguments)))


def _as_c(
    argument: Tensor | int | float | None,
) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if argument is None:
        return ctypes.c_void_p()
    assert argument.is_contiguous()
    return ctypes.c_void_p(argument.data_ptr())


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, built where they are not in the cache; None where they cannot be."""
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, CacheError, _CannotBuildError) as error:
        _log.info("compiled CPU kernels are not used, plain PyTorch is: %s", error)
        return None


class _CannotBuildError(Exception):
    pass


def _built() -> Path:
    """The library for this source, compiler and CPU, in the cache; built if it is not there."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    described = (_SOURCE.read_text(), *_FLAGS, *compiler, platform.machine(), cpu_flags())
    name = hashlib.sha256("\0".join(described).encode()).hexdigest()[:32]
    library = cache_folder() / f"kernels-{name}.so"
    if not library.exists():
        _build(compiler, library)
    return library


def _build(compiler: list[str], library: Path) -> None:
    """Compile aside and rename, so that of two processes building at once none sees a half."""
    if shutil.which(compiler[0]) is None:
        raise _CannotBuildError(f"no C++ compiler {compiler[0]!r} on the PATH (or set CXX)")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        draft = Path(folder) / library.name
        command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(draft)]
        try:
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS
            )
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
            raise _CannotBuildError(f"{shlex.join(command)} failed: {reason}") from error
        except subprocess.TimeoutExpired as error:
            raise _CannotBuildError(f"{compiler[0]} took longer than {_BUILD_SECONDS} s") from error
        draft.replace(library)
