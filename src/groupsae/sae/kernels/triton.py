"""The training step on a CUDA device, in Triton: no more than the active latents is ever moved.

Latents, loss and gradients are those of `reference` in float32. One step goes

1. product and choice: the encoder's product for as many tokens as the second-level cache holds,
   then one program a token finds the k largest pre-activations exactly, by a search on their
   bits; [token, d_sae] never reaches the device's memory whole. AuxK chooses among the dead
   latents from the same pre-activations;
2. reconstruction, residual and the activations' gradients, one program a token;
3. the pattern of active latents transposed by one stable sort, and the rows of the gradients of
   W_enc, b_enc and W_dec summed by latent. A latent's tokens are cut into pieces, one program
   each, so a latent that is active on every token keeps no one waiting.

Every sum has a fixed order and no float is added atomically: the same input gives the same bits.
Nothing is read back by the host, so a step can be captured in a CUDA graph.
"""

# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from groupsae.errors import InputError
from groupsae.sae.autoencoder import SAE
from groupsae.sae.kernels import sparse
from groupsae.sae.kernels.reference import StepResult

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

_CHUNK_BYTES = 32 * 2**20  # of pre-activations: what the second-level cache (50 MiB) still holds
_PIECE = 128  # tokens of one latent that one program sums, or more:
_EXTRA_PIECES = 2**13  # at most so many pieces beyond the first of each latent, for their memory


def available() -> bool:
    """Whether :func:`step` can run: Triton, and a CUDA device or Triton's interpreter.

    The interpreter (TRITON_INTERPRET=1 in the environment before Triton is imported) runs the
    kernels on the CPU, for tests.
    """
    return triton is not None and (_interpreted() or _has_cuda())


@torch.no_grad()
def step(
    sae: SAE,
    x: Float[Tensor, "token d_model"],
    *,
    members: Int[Tensor, " token"] | None = None,
    dead: Bool[Tensor, " d_sae"] | None = None,
    auxk_weight: float = 1 / 32,
    sparsity_weight: float = 0.0,
    product_dtype: torch.dtype = torch.float32,
) -> StepResult:
    """Loss and gradients of an SAE on a mixed batch: see :func:`reference.step`.

    Compiled for topk; other SAEs go to :func:`sparse.step`. A batch of half precision is read as
    float32.

    Args:
        dead: Costs a second choice and a second sort even where no latent is dead, since the host
            does not look: leave it out where none can be.
        product_dtype: In what the encoder's product takes its operands; sums are float32. float32
            is as exact as `torch.set_float32_matmul_precision` leaves it, fully by default.
            bfloat16 runs on the tensor cores and rounds: pre-activations are off by some 2^-8 of
            their size, so other latents may be chosen. All else stays float32.

    Raises:
        InputError: If Triton or a CUDA device is missing, the weights are not float32, the batch
            is empty or lies elsewhere, or `product_dtype` is none of the two.
    """
    x = _checked(sae, x, product_dtype)
    if sae.config.architecture != "topk" or sae.config.learned_affine != "none":
        return sparse.step(
            sae,
            x,
            members=members,
            dead=dead,
            auxk_weight=auxk_weight,
            sparsity_weight=sparsity_weight,
        )
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        return _step(sae, x, dead, auxk_weight, product_dtype)


def _step(
    sae: SAE,
    x: Float[Tensor, "token d_model"],
    dead: Bool[Tensor, " d_sae"] | None,
    auxk_weight: float,
    product_dtype: torch.dtype,
) -> StepResult:
    inputs = x - sae.b_dec
    variance = (x - x.mean(0)).square().sum()
    wanted = max(sae.config.d_model // 2, 1)
    active, active_dead = _encode(sae, inputs, dead, wanted, product_dtype)

    scale = -2 / variance
    main = _reconstruct(sae, inputs, active, scale)
    by_latent = _ByLatent.of(active, sae.config.d_sae)
    gradients = {name: torch.empty_like(p) for name, p in sae.named_parameters() if name != "b_dec"}
    _sum_rows(gradients, inputs, main, by_latent, add=False)

    fvu = main.squares.sum() / variance
    auxk = x.new_zeros(())
    if dead is not None and active_dead is not None:
        share = (dead.sum() / wanted).clamp(max=1)
        auxiliary = _reconstruct(sae, main.residual, active_dead, scale * (share * auxk_weight))
        _sum_rows(
            gradients, inputs, auxiliary, _ByLatent.of(active_dead, sae.config.d_sae), add=True
        )
        auxk = share * auxiliary.squares.sum() / variance

    gradients["b_dec"] = main.residual.sum(0) * scale - gradients["b_enc"] @ sae.W_enc
    return StepResult(
        gradients=gradients,
        loss=fvu + auxk_weight * auxk,
        fvu=fvu,
        auxk=auxk,
        penalty=x.new_zeros(()),
        l0=active.counts.sum() / len(x),
        fired=by_latent.offsets.diff() > 0,
    )


@dataclass(frozen=True)
class _Active:
    """The active latents of each token, at the front of its k slots.

    A slot that is not filled (fewer than k pre-activations were positive) holds 0 and index d_sae.
    """

    values: Float[Tensor, "token k"]
    indices: Int[Tensor, "token k"]
    counts: Int[Tensor, " token"]


@dataclass(frozen=True)
class _Reconstruction:
    """What a reconstruction leaves of its target, and the gradient of the squared error.

    The error's gradient at the decoder's output is scale * residual.
    """

    active: _Active
    scale: Float[Tensor, ""]
    residual: Float[Tensor, "token d_model"]
    squares: Float[Tensor, " token"]  # sums of the residual's squares
    activation_gradient: Float[Tensor, "token k"]  # filled where a slot is


@dataclass(frozen=True)
class _ByLatent:
    """The pattern of active latents transposed: which slots hold a latent, cut into pieces.

    Each latent has at least one piece, empty where it is never active; how many pieces there are
    is known to the device alone, so their table has the length that they cannot exceed.
    """

    order: Int[Tensor, " entry"]  # sorts the slots of [token, k] by latent
    offsets: Int[Tensor, " boundary"]  # where each latent's slots begin in that order
    first_piece: Int[Tensor, " boundary"]  # each latent's first, then their number
    owner: Int[Tensor, " piece"]  # each piece's latent; d_sae beyond the last piece
    piece_length: int  # in slots

    @classmethod
    def of(cls, active: _Active, d_sae: int) -> _ByLatent:
        flat = active.indices.flatten()
        length = max(_PIECE, triton.next_power_of_2(len(flat) // _EXTRA_PIECES))
        latents, order = flat.sort(stable=True)
        offsets = torch.searchsorted(
            latents, torch.arange(d_sae + 1, dtype=flat.dtype, device=flat.device)
        )
        pieces = ((offsets.diff() + (length - 1)) // length).clamp(min=1)
        first_piece = torch.nn.functional.pad(pieces.cumsum(0), (1, 0))
        table = torch.arange(d_sae + len(flat) // length, device=flat.device)
        owner = torch.searchsorted(first_piece[1:], table, right=True)
        return cls(order, offsets, first_piece, owner, length)


def _encode(
    sae: SAE,
    inputs: Float[Tensor, "token d_model"],
    dead: Bool[Tensor, " d_sae"] | None,
    wanted: int,
    dtype: torch.dtype,
) -> tuple[_Active, _Active | None]:
    """The active latents, and the at most `wanted` most active of the dead."""
    tokens, d_sae = len(inputs), sae.config.d_sae
    operands, weights = inputs.to(dtype), sae.W_enc.to(dtype).contiguous()
    rows = min(max(_CHUNK_BYTES // (4 * d_sae), 1), tokens)
    rows -= rows % 128 if rows > 128 else 0  # whole tiles of the product
    buffer = inputs.new_empty(rows, d_sae)
    assert sae.config.k is not None
    active = _empty_slots(inputs, d_sae, sae.config.k)
    active_dead = None if dead is None else _empty_slots(inputs, d_sae, min(wanted, d_sae))
    for start in range(0, tokens, rows):
        chunk = slice(start, start + rows)
        pre_activations = buffer[: len(inputs[chunk])]
        _multiply(operands[chunk], weights, sae.b_enc, pre_activations)
        _select(pre_activations, None, active, start)
        if dead is not None and active_dead is not None:
            _select(pre_activations, dead.contiguous().view(torch.uint8), active_dead, start)
    return active, active_dead


def _empty_slots(inputs: Float[Tensor, "token d_model"], d_sae: int, k: int) -> _Active:
    tokens, device = len(inputs), inputs.device
    narrow = torch.int16 if d_sae < 2**15 else torch.int32  # half the passes of a radix sort
    return _Active(
        inputs.new_empty(tokens, k),
        torch.empty(tokens, k, dtype=narrow, device=device),
        torch.empty(tokens, dtype=torch.int32, device=device),
    )


def _multiply(
    inputs: Float[Tensor, "token d_model"],
    W_enc: Float[Tensor, "d_sae d_model"],
    b_enc: Float[Tensor, " d_sae"],
    out: Float[Tensor, "token d_sae"],
) -> None:
    """out = inputs W_enc^T + b_enc. Of half precision torch would give rounded sums."""
    if inputs.dtype == torch.float32:
        torch.addmm(b_enc, inputs, W_enc.T, out=out)
        return
    if _interpreted():  # which cannot multiply bfloat16; the same numbers
        inputs, W_enc = inputs.float(), W_enc.float()
    tokens, d_model = inputs.shape
    grid = (triton.cdiv(tokens, 128), triton.cdiv(len(W_enc), 128))
    _product_kernel[grid](
        inputs, W_enc, b_enc, out, tokens, len(W_enc), d_model,
        TOKENS=128, LATENTS=128, INNER=64, num_warps=8, num_stages=3,
    )  # fmt: skip


def _select(
    pre_activations: Float[Tensor, "row d_sae"],
    allowed: UInt8[Tensor, " d_sae"] | None,
    into: _Active,
    start: int,
) -> None:
    """TopK(relu(pre_activations)) of the tokens from `start`, among all or the allowed latents."""
    rows, d_sae = pre_activations.shape
    k = into.values.shape[1]
    tokens = slice(start, start + rows)
    block = min(triton.next_power_of_2(d_sae), max(1024, triton.next_power_of_2(8 * k)), 4096)
    _select_kernel[(rows,)](
        pre_activations, pre_activations if allowed is None else allowed,
        into.values[tokens], into.indices[tokens], into.counts[tokens], d_sae, k,
        MASKED=allowed is not None, BLOCK=block, num_warps=max(block // 256, 1),
    )  # fmt: skip


def _reconstruct(
    sae: SAE, target: Float[Tensor, "token d_model"], active: _Active, scale: Float[Tensor, ""]
) -> _Reconstruction:
    """Decode without the bias, and compare with `target`."""
    tokens, d_model = target.shape
    result = _Reconstruction(
        active,
        scale,
        torch.empty_like(target),
        target.new_empty(tokens),
        torch.empty_like(active.values),
    )
    block = triton.next_power_of_2(d_model)
    _reconstruct_kernel[(tokens,)](
        target, sae.W_dec.contiguous(), active.values, active.indices, active.counts, scale,
        result.residual, result.squares, result.activation_gradient,
        d_model, active.values.shape[1],
        BLOCK=block, ROWS=min(max(4096 // block, 2), 16), num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return result


def _sum_rows(
    gradients: dict[str, Tensor],
    inputs: Float[Tensor, "token d_model"],
    reconstruction: _Reconstruction,
    by_latent: _ByLatent,
    *,
    add: bool,
) -> None:
    """Write, or add, the gradients of W_enc, b_enc and W_dec.

    With v_tj the activation of latent j on token t, a_tj its gradient and g_t the gradient at the
    decoder's output: sum_t a_tj inputs_t, sum_t a_tj and sum_t v_tj g_t.
    """
    d_sae, d_model = gradients["W_enc"].shape
    # the pieces after each latent's first go here and are added by the second kernel
    extra = max(len(by_latent.owner) - d_sae, 1)
    W_enc, W_dec = inputs.new_empty(2, extra, d_model)
    b_enc = inputs.new_empty(extra)
    block = min(triton.next_power_of_2(d_model), 256)
    blocks = triton.cdiv(d_model, block)
    _sum_pieces_kernel[(len(by_latent.owner), blocks)](
        inputs, reconstruction.residual, reconstruction.scale,
        reconstruction.active.values, reconstruction.activation_gradient,
        by_latent.order, by_latent.offsets, by_latent.first_piece, by_latent.owner,
        gradients["W_enc"], gradients["b_enc"], gradients["W_dec"], W_enc, b_enc, W_dec,
        d_model, d_sae, reconstruction.active.values.shape[1], by_latent.piece_length,
        BLOCK=block, ROWS=8, ADD=add, num_warps=4,
    )  # fmt: skip
    _add_extra_kernel[(d_sae, blocks)](
        by_latent.first_piece,
        gradients["W_enc"], gradients["b_enc"], gradients["W_dec"], W_enc, b_enc, W_dec,
        d_model, BLOCK=block, ROWS=8, num_warps=4,
    )  # fmt: skip


def _checked(
    sae: SAE, x: Float[Tensor, "token d_model"], product_dtype: torch.dtype
) -> Float[Tensor, "token d_model"]:
    if not available():
        missing = "the package triton" if triton is None else "a CUDA device of capability 8.0"
        raise InputError(f"the triton back end needs {missing}; use the torch back end")
    if sae.W_enc.dtype != torch.float32:
        raise InputError(
            f"the triton back end trains weights of float32, not {sae.W_enc.dtype}; "
            "use the torch back end or sae.float()"
        )
    if product_dtype not in (torch.float32, torch.bfloat16):
        raise InputError(
            f"product_dtype: {product_dtype} is not known; use torch.float32 or torch.bfloat16"
        )
    if not len(x):
        raise InputError("the batch is empty; a step needs at least one token")
    if x.device != sae.W_enc.device or (x.device.type == "cpu" and not _interpreted()):
        raise InputError(
            f"the batch is on {x.device} and the SAE on {sae.W_enc.device}; "
            "the triton back end needs both on one CUDA device"
        )
    return x.to(torch.float32).contiguous()


def _interpreted() -> bool:
    return not isinstance(_select_kernel, triton.JITFunction)


def _has_cuda() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _kernel(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_kernel
@no_type_check
def _product_kernel(
    inputs, W_enc, b_enc, out, tokens, d_sae, d_model,
    TOKENS: tl.constexpr, LATENTS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A tile of inputs W_enc^T + b_enc, summed in float32."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    latent = tl.program_id(1) * LATENTS + tl.arange(0, LATENTS)
    left = inputs + token[:, None].to(tl.int64) * d_model
    right = W_enc + latent[None, :].to(tl.int64) * d_model
    total = tl.zeros([TOKENS, LATENTS], tl.float32)
    for start in range(0, d_model, INNER):
        inner = start + tl.arange(0, INNER)
        a_mask = (token < tokens)[:, None] & (inner < d_model)[None, :]
        b_mask = (inner < d_model)[:, None] & (latent < d_sae)[None, :]
        a = tl.load(left + inner[None, :], mask=a_mask, other=0.0)
        b = tl.load(right + inner[:, None], mask=b_mask, other=0.0)
        total = tl.dot(a, b, total)
    total += tl.load(b_enc + latent, mask=latent < d_sae, other=0.0)[None, :]
    where = out + token[:, None].to(tl.int64) * d_sae + latent[None, :]
    tl.store(where, total, mask=(token < tokens)[:, None] & (latent < d_sae)[None, :])


@_kernel
@no_type_check
def _load_keys(row, allowed, column, d_sae, MASKED: tl.constexpr):
    """Pre-activations, and whole numbers in the order of their ReLU: a positive float's bits.

    0 for what is not positive or not allowed, -1 beyond the row's end. NaN counts as largest, as in
    torch.topk.
    """
    inside = column < d_sae
    x = tl.load(row + column, mask=inside, other=0.0)
    if MASKED:
        x = tl.where(tl.load(allowed + column, mask=inside, other=0) != 0, x, 0.0)
    x = tl.where(x <= 0, 0.0, x)
    keys = tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)
    return x, tl.where(inside, keys, -1)


@_kernel
@no_type_check
def _cut(low, high):
    """Three keys, in order, that cut [low, high) in about four; high - low is at least 2."""
    quarter = tl.maximum((high - low) // 4, 1)
    return low + quarter, low + (high - low) // 2, high - quarter


@_kernel
@no_type_check
def _reach(keys, first, second, third):
    """Whether a key reaches each of three, as counts of 21 bits packed in one number."""
    reached = (keys >= first).to(tl.int64)
    reached += (keys >= second).to(tl.int64) << 21
    return reached + ((keys >= third).to(tl.int64) << 42)


@_kernel
@no_type_check
def _narrow(low, high, count_low, count_high, first, second, third, reached, k):
    """The part of [low, high) that holds the k-th largest key, and how many reach its ends."""
    n_first = (reached & 0x1FFFFF).to(tl.int32)
    n_second = ((reached >> 21) & 0x1FFFFF).to(tl.int32)
    n_third = (reached >> 42).to(tl.int32)
    count_low = tl.where(n_first >= k, n_first, count_low)
    count_low = tl.where(n_second >= k, n_second, count_low)
    count_low = tl.where(n_third >= k, n_third, count_low)
    low = tl.where(n_first >= k, first, low)
    low = tl.where(n_second >= k, second, low)
    low = tl.where(n_third >= k, third, low)
    count_high = tl.where(n_third < k, n_third, count_high)
    count_high = tl.where(n_second < k, n_second, count_high)
    count_high = tl.where(n_first < k, n_first, count_high)
    high = tl.where(n_third < k, third, high)
    high = tl.where(n_second < k, second, high)
    high = tl.where(n_first < k, first, high)
    return low, high, count_low, count_high


@_kernel
@no_type_check
def _select_kernel(
    pre_activations, allowed, values, indices, counts, d_sae, k,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The k largest of one token's row; of equal ones the first.

    The search holds `low` and `high` with count(keys >= low) >= k, and count(keys >= high), which
    is `count_high`, at most k. It ends where exactly k keys are at least `low`, or where `low` is
    the k-th largest key and some of its equals are left out.
    """
    token = tl.program_id(0).to(tl.int64)
    row = pre_activations + token * d_sae
    column = tl.arange(0, BLOCK)

    highest = tl.full([BLOCK], -1, tl.int32)
    positive = tl.zeros([BLOCK], tl.int32)
    for start in range(0, d_sae, BLOCK):
        x, keys = _load_keys(row, allowed, start + column, d_sae, MASKED)
        highest = tl.maximum(highest, keys)
        positive += (keys > 0).to(tl.int32)
    n_positive = tl.sum(positive, 0)
    crowded = n_positive > k
    low = tl.where(crowded, 1, 0)
    high = tl.where(crowded, tl.max(highest, 0) + 1, 1)
    count_low = tl.where(crowded, d_sae, k)  # not yet known, or settled
    count_high = tl.where(crowded, 0, n_positive)

    # At least k keys reach what k of the column maxima reach: a bound that is found in registers
    # and leaves few passes over the row.
    bound = low
    above = high
    while above - bound > 1:
        first, second, third = _cut(bound, above)
        reached = tl.sum(_reach(highest, first, second, third), 0)
        bound, above, _, _ = _narrow(bound, above, 0, 0, first, second, third, reached, k)
    low = bound

    while (high - low > 1) & (count_low != k):
        first, second, third = _cut(low, high)
        by_column = tl.zeros([BLOCK], tl.int64)
        for start in range(0, d_sae, BLOCK):
            x, keys = _load_keys(row, allowed, start + column, d_sae, MASKED)
            by_column += _reach(keys, first, second, third)
        reached = tl.sum(by_column, 0)
        low, high, count_low, count_high = _narrow(
            low, high, count_low, count_high, first, second, third, reached, k
        )

    # Keys above `low` fill the slots from the front, its equals from the back.
    front = tl.zeros([], tl.int32)
    back = tl.zeros([], tl.int32) + k
    for start in range(0, d_sae, BLOCK):
        x, keys = _load_keys(row, allowed, start + column, d_sae, MASKED)
        kind = tl.where(keys > low, 1, tl.where(keys == low, 1 << 16, 0))  # two counts in one sum
        rank = tl.cumsum(kind, 0)
        from_front = front + (rank & 0xFFFF) - 1
        from_back = back - (rank >> 16)
        slot = token * k + tl.where(keys > low, from_front, from_back)
        chosen = (keys > low) | ((keys == low) & (from_back >= count_high))
        index = tl.where(keys > 0, start + column, d_sae)
        tl.store(values + slot, x, mask=chosen)
        tl.store(indices + slot, index.to(indices.dtype.element_ty), mask=chosen)
        both = tl.sum(kind, 0)
        front += both & 0xFFFF
        back -= both >> 16
    tl.store(counts + token, tl.minimum(n_positive, k))


@_kernel
@no_type_check
def _reconstruct_kernel(
    target, W_dec, values, indices, counts, scale, residual, squares, activation_gradient,
    d_model, k, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One token's residual, its square, and the gradients of its activations."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d_model
    count = tl.load(counts + token)

    left = tl.load(target + token * d_model + column, mask=inside, other=0.0)
    for start in range(0, count, ROWS):
        slot = start + tl.arange(0, ROWS)
        used = slot < count
        value = tl.load(values + token * k + slot, mask=used, other=0.0)
        latent = tl.load(indices + token * k + slot, mask=used, other=0).to(tl.int64)
        where = W_dec + latent[:, None] * d_model + column[None, :]
        rows = tl.load(where, mask=used[:, None] & inside[None, :], other=0.0)
        left -= tl.sum(value[:, None] * rows, 0)
    tl.store(residual + token * d_model + column, left, mask=inside)
    tl.store(squares + token, tl.sum(left * left, 0))

    gradient = left * tl.load(scale)
    for start in range(0, count, ROWS):
        slot = start + tl.arange(0, ROWS)
        used = slot < count
        latent = tl.load(indices + token * k + slot, mask=used, other=0).to(tl.int64)
        where = W_dec + latent[:, None] * d_model + column[None, :]
        rows = tl.load(where, mask=used[:, None] & inside[None, :], other=0.0)
        dot = tl.sum(gradient[None, :] * rows, 1)
        tl.store(activation_gradient + token * k + slot, dot, mask=used)


@_kernel
@no_type_check
def _sum_pieces_kernel(
    inputs, residual, scale, values, activation_gradient, order, offsets, first_piece, owner,
    W_enc, b_enc, W_dec, W_enc_extra, b_enc_extra, W_dec_extra, d_model, d_sae, k,
    piece_length, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """The sums of one piece of one latent, for BLOCK columns."""
    piece = tl.program_id(0)
    latent = tl.load(owner + piece)
    if latent >= d_sae:
        return
    nth = piece - tl.load(first_piece + latent)
    begin = tl.load(offsets + latent) + nth * piece_length
    end = tl.minimum(begin + piece_length, tl.load(offsets + latent + 1))
    if ADD:  # noqa: SIM102 - settled when compiling, unlike the condition within
        if begin >= end:
            return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d_model

    encoder = tl.zeros([BLOCK], tl.float32)
    decoder = tl.zeros([BLOCK], tl.float32)
    bias = tl.zeros([ROWS], tl.float32)
    for start in range(begin, end, ROWS):
        place = start + tl.arange(0, ROWS)
        used = place < end
        slot = tl.load(order + place, mask=used, other=0).to(tl.int32)
        value = tl.load(values + slot, mask=used, other=0.0)
        gradient = tl.load(activation_gradient + slot, mask=used, other=0.0)
        where = (slot // k).to(tl.int64)[:, None] * d_model + column[None, :]
        mask = used[:, None] & inside[None, :]
        encoder += tl.sum(gradient[:, None] * tl.load(inputs + where, mask=mask, other=0.0), 0)
        decoder += tl.sum(value[:, None] * tl.load(residual + where, mask=mask, other=0.0), 0)
        bias += gradient
    decoder *= tl.load(scale)
    bias_sum = tl.sum(bias, 0)

    first_block = tl.program_id(1) == 0
    if nth == 0:
        where = latent * d_model + column
        if ADD:
            encoder += tl.load(W_enc + where, mask=inside, other=0.0)
            decoder += tl.load(W_dec + where, mask=inside, other=0.0)
            bias_sum += tl.load(b_enc + latent, mask=first_block, other=0.0)
        tl.store(W_enc + where, encoder, mask=inside)
        tl.store(W_dec + where, decoder, mask=inside)
        tl.store(b_enc + latent, bias_sum, mask=first_block)
    else:
        extra = piece - latent - 1  # each latent up to this one has one first piece
        where = extra * d_model + column
        tl.store(W_enc_extra + where, encoder, mask=inside)
        tl.store(W_dec_extra + where, decoder, mask=inside)
        tl.store(b_enc_extra + extra, bias_sum, mask=first_block)


@_kernel
@no_type_check
def _add_extra_kernel(
    first_piece, W_enc, b_enc, W_dec, W_enc_extra, b_enc_extra, W_dec_extra, d_model,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add what the pieces after a latent's first have summed."""
    latent = tl.program_id(0).to(tl.int64)
    begin = tl.load(first_piece + latent) - latent
    end = tl.load(first_piece + latent + 1) - latent - 1
    if begin >= end:
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d_model
    first_block = tl.program_id(1) == 0

    where = latent * d_model + column
    encoder = tl.load(W_enc + where, mask=inside, other=0.0)
    decoder = tl.load(W_dec + where, mask=inside, other=0.0)
    bias = tl.zeros([ROWS], tl.float32)
    for start in range(begin, end, ROWS):
        extra = start + tl.arange(0, ROWS)
        mask = (extra < end)[:, None] & inside[None, :]
        rows = extra[:, None] * d_model + column[None, :]
        encoder += tl.sum(tl.load(W_enc_extra + rows, mask=mask, other=0.0), 0)
        decoder += tl.sum(tl.load(W_dec_extra + rows, mask=mask, other=0.0), 0)
        bias += tl.load(b_enc_extra + extra, mask=extra < end, other=0.0)
    tl.store(W_enc + where, encoder, mask=inside)
    tl.store(W_dec + where, decoder, mask=inside)
    before = tl.load(b_enc + latent, mask=first_block, other=0.0)
    tl.store(b_enc + latent, before + tl.sum(bias, 0), mask=first_block)
