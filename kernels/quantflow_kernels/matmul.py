"""`y = x dequant(W)ᵀ + bias` for a weight of 2, 3, 4 or 8 bits and 16-bit activations.

The weight is the left operand of the product, so that its rows fill the tensor cores however few
tokens there are. What is multiplied are codes less their zero points, integers that the dtype of
`x` holds exactly; the sum over a group is scaled once: `y = Σ_g scale_g Σ_k (code_k - zero_g) x_k`.
Nothing is scaled, or rounded, per weight.

Batch invariance: a row's bits depend on the tiles alone, never on M or on other rows. K is split at
multiples of `blocks_per_split`, a number of the weight's, and the parts are summed in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantflow_kernels.configs import MatmulConfig
from quantflow_kernels.layout import WORD, PackedWeight, lane_bits

# that go together where K is split: partial sums of more would be hundreds of megabytes, and leave
# the L2 cache
SPLIT_TOKENS = 256
INTERPRETED = bool(triton.knobs.runtime.interpret)  # on the CPU, without inline assembly


@triton.constexpr_function
def assembly(shift, mask, magic):
    """Two words, and two negated zero points, in a register each -> two floats `code - zero`.

    The code at bit `shift` becomes the last bits of a float of the value `magic`, whose mantissa's
    last bit is worth 1; `zero` is larger by `magic`, so that the difference is exact. 0xEA is the
    truth table of `(a & b) | c`.
    """
    both = 0x00010001
    base = 0x4300 if magic == 128 else 0x6400  # the bits of `magic`, in bfloat16 and in float16
    one = 0x3F80 if magic == 128 else 0x3C00
    kind = "bf16x2" if magic == 128 else "f16x2"
    return (
        f"{{ .reg .b32 t, one; shr.b32 t, $1, {shift}; lop3.b32 t, t, {mask * both}, {base * both},"
        f" 0xEA; mov.b32 one, {one * both}; fma.rn.{kind} $0, t, one, $2; }}"
    )


@triton.jit
def _centred(
    words, zero, SHIFT: tl.constexpr, LANE: tl.constexpr, MAGIC: tl.constexpr, dtype: tl.constexpr
):
    """`code - zero` `[BLOCK_N, SLICE]` in `dtype`, from the codes at bit `SHIFT` of the words.

    MAGIC: the power of two in whose mantissa a code fits (128 in bfloat16, 1024 in float16): a
    shift, a logical operation and an addition make two floats, where converting integers one by one
    takes longer than reading them from memory. 0 does just that.
    """
    if MAGIC:
        offset = (-MAGIC - zero).to(dtype).to(tl.int16, bitcast=True)
        return tl.inline_asm_elementwise(
            assembly(SHIFT, 2**LANE - 1, MAGIC),
            "=r,r,r",
            [words, tl.broadcast_to(offset[:, None], words.shape)],
            dtype=tl.bfloat16 if MAGIC == 128 else tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        codes = (words.to(tl.uint16, bitcast=True) >> SHIFT) & (2**LANE - 1)
        return codes.to(dtype) - zero.to(dtype)[:, None]


@triton.jit
def _grid(scales, zeros, k, rows, inside, N, K, GROUP: tl.constexpr, WHOLE_BLOCKS: tl.constexpr):
    """zero and scale `[BLOCK_N]` of the group that begins at input channel `k`, as they are
    stored."""
    # Groups that pad the last block meet activations of zero, but are not there.
    known = inside if WHOLE_BLOCKS or GROUP == 0 else inside & (k + tl.zeros_like(rows) < K)
    group = rows if GROUP == 0 else (k // GROUP) * N + rows
    return tl.load(zeros + group, mask=known, other=0), tl.load(
        scales + group, mask=known, other=0.0
    )


@triton.jit
def _grids(
    scales,
    zeros,
    block,
    rows,
    inside,
    N,
    K,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    """zero and scale of each of a block's groups, in one tuple."""
    grids = ()
    for start in tl.static_range(0, BLOCK_K, STEP):
        zero, scale = _grid(
            scales, zeros, block * BLOCK_K + start, rows, inside, N, K, GROUP, WHOLE_BLOCKS
        )
        grids = grids + (zero, scale)  # noqa: RUF005 - Triton's language unpacks nothing
    return grids


@triton.jit(do_not_specialize=["M", "blocks", "blocks_per_split"])
def matmul_kernel(
    x,
    words,
    high,
    scales,
    zeros,
    bias,
    out,
    M,
    N,
    K,
    x_stride,
    blocks,
    blocks_per_split,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SLICE: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    MAGIC: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    """GROUP: input channels a group; 0 where one group spans the row. WHOLE_BLOCKS: K fills its
    blocks. SPLIT: `out` is `[splits, M, N]` float32, not y. MAGIC: see `_centred`. AHEAD: see
    `MatmulConfig`."""
    LANE: tl.constexpr = 2 if BITS == 3 else BITS
    SLICES: tl.constexpr = 16 // LANE
    BLOCK_K: tl.constexpr = SLICE * SLICES
    # Slices after which a group ends; where groups are longer than a block, its last.
    PER_GROUP: tl.constexpr = GROUP // SLICE if GROUP > 0 and GROUP < BLOCK_K else SLICES
    # What this program computes: BLOCK_N output channels of BLOCK_M tokens, some blocks of K.
    pid_split = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, SLICE)
    inside, present = rows < N, tokens < M
    block_words = tl.cast(N, tl.int64) * SLICE
    row_words = words + rows[:, None] * SLICE + lane[None, :]
    row_high = high + rows[:, None] * (SLICE // 2) + (lane % (SLICE // 2))[None, :]
    token_x = x + tokens[None, :].to(tl.int64) * x_stride + lane[:, None]
    # The first block's grids are loaded ahead of its words.
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = pid_split * blocks_per_split
    if AHEAD:
        ahead = _grids(
            scales,
            zeros,
            first,
            rows,
            inside,
            N,
            K,
            BLOCK_K,
            GROUP,
            SLICE * PER_GROUP,
            WHOLE_BLOCKS,
        )
    # Block by block: words, grids, then slice by slice a product of codes and activations.
    for block in tl.range(first, tl.minimum(first + blocks_per_split, blocks), num_stages=STAGES):
        packed = tl.load(
            row_words + block * block_words,
            mask=inside[:, None],
            other=0,
            eviction_policy="evict_first",
        )
        if BITS == 3:
            third = tl.load(
                row_high + block * (block_words // 2), mask=inside[:, None], other=0
            ).to(tl.uint16, bitcast=True)
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if AHEAD:
            # A row's numbers are too small for the asynchronous copies that bring the words: they
            # are loaded a block ahead by hand, or every block would wait for memory.
            grids = ahead
            following = tl.minimum(block + 1, blocks - 1)
            ahead = _grids(
                scales,
                zeros,
                following,
                rows,
                inside,
                N,
                K,
                BLOCK_K,
                GROUP,
                SLICE * PER_GROUP,
                WHOLE_BLOCKS,
            )
        for j in tl.static_range(SLICES):
            k = block * BLOCK_K + j * SLICE
            if j % PER_GROUP == 0:
                if AHEAD:
                    zero, scale = grids[2 * (j // PER_GROUP)], grids[2 * (j // PER_GROUP) + 1]
                else:
                    zero, scale = _grid(scales, zeros, k, rows, inside, N, K, GROUP, WHOLE_BLOCKS)
                zero, scale = zero.to(tl.float32), scale.to(tl.float32)
            mask = present[None, :] if WHOLE_BLOCKS else present[None, :] & (k + lane < K)[:, None]
            activations = tl.load(token_x + k, mask=mask, other=0.0, eviction_policy="evict_last")
            codes = _centred(packed, zero, LANE * j, LANE, MAGIC, activations.dtype)
            if BITS == 3:
                upper = (third >> (2 * j + lane // (SLICE // 2))[None, :].to(tl.uint16)) & 1
                codes += (upper * 4).to(activations.dtype)
            part = tl.dot(codes, activations, part, input_precision="ieee")
            if (j + 1) % PER_GROUP == 0:
                acc += part * scale[:, None]
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # The result, or this split's part of it.
    place = tokens[None, :].to(tl.int64) * N + rows[:, None]
    whole = inside[:, None] & present[None, :]
    if SPLIT:
        tl.store(out + pid_split.to(tl.int64) * M * N + place, acc, mask=whole)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=whole)


@triton.jit(do_not_specialize=["M"])
def sum_splits_kernel(
    parts, bias, out, M, N, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """`out[m, n] = Σ parts[s, m, n] + bias[n]`, summed in the order of `s`."""
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    total = tl.load(parts + token * N + rows, mask=inside, other=0.0)
    for s in tl.static_range(1, SPLITS):
        total += tl.load(parts + (s * M + token) * N + rows, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * N + rows, total.to(out.dtype.element_ty), mask=inside)


def magic(bits: int, dtype: torch.dtype) -> int:
    """The power of two in whose mantissa codes of `bits` bits fit as they are; 0 where they are
    converted one by one."""
    if INTERPRETED or (dtype == torch.bfloat16 and bits == 8):
        return 0
    return {torch.bfloat16: 128, torch.float16: 1024}.get(dtype, 0)


def matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None, config: MatmulConfig) -> Tensor:
    """`x Wᵀ + bias` `[..., N]` in the dtype of `x` (float16 or bfloat16; float32 in the
    interpreter) `[..., K]`, summed in float32."""
    # Shapes, and how K is split between programs.
    config = config.for_bits(weight.bits)
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    m, n, k = len(flat), weight.out_features, weight.in_features
    if flat.shape[1] != k:
        raise ValueError(f"x has {flat.shape[1]} input channels, the weight {k}")
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    blocks = weight.words.shape[0]
    per_split = config.blocks_a_split(n, blocks)
    splits = triton.cdiv(blocks, per_split)
    # All tokens at once; with splits some at a time, since each split's sums are kept.
    for start in range(0, m, SPLIT_TOKENS if splits > 1 else max(1, m)):
        part = flat[start : start + SPLIT_TOKENS] if splits > 1 else flat
        tokens, own = len(part), out[start : start + len(part)]
        target = (
            torch.empty(splits, tokens, n, dtype=torch.float32, device=x.device)
            if splits > 1
            else own
        )
        grid = (triton.cdiv(n, config.block_n), triton.cdiv(tokens, config.block_m), splits)
        matmul_kernel[grid](
            part,
            weight.words,
            weight.words if weight.high is None else weight.high,
            weight.scales,
            weight.zeros,
            weight.scales if bias is None else bias,
            target,
            tokens,
            n,
            k,
            flat.stride(0),
            blocks,
            per_split,
            BITS=weight.bits,
            GROUP=0 if weight.group_size == k else weight.group_size,
            SLICE=weight.slice,
            WHOLE_BLOCKS=k % (weight.slice * WORD // lane_bits(weight.bits)) == 0,
            HAS_BIAS=bias is not None,
            SPLIT=splits > 1,
            MAGIC=magic(weight.bits, x.dtype),
            AHEAD=config.ahead,
            BLOCK_N=config.block_n,
            BLOCK_M=config.block_m,
            STAGES=config.stages,
            num_warps=config.warps,
        )
        # The splits are added up in order, so that the sum is the same every time.
        if splits > 1:
            sum_splits_kernel[(triton.cdiv(n, 256), tokens)](
                target,
                weight.scales if bias is None else bias,
                own,
                tokens,
                n,
                SPLITS=splits,
                HAS_BIAS=bias is not None,
                BLOCK=256,
            )
    return out.view(*x.shape[:-1], n)


def bytes_moved(weight: PackedWeight, tokens: int, item: int = 2) -> int:
    """What one product has to move at least: the weight, x and y once each. item: bytes of an
    activation."""
    return weight.nbytes + tokens * (weight.in_features + weight.out_features) * item


def operations(weight: PackedWeight, tokens: int) -> int:
    """Multiplications and additions of one product."""
    return 2 * tokens * weight.in_features * weight.out_features
