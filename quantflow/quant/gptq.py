"""GPTQ (Frantar et al. 2022, Algorithm 1): round column by column, and let the columns not yet
rounded make up for the error.

Shapes: weight `[N, K]`; Hessian `H = Xᵀ X` `[K, K]` over the tokens seen, not divided by their
number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from quantflow_kernels import cpu_solver
from torch import Tensor

from quantflow.quant.grid import Grid, GridRules, find_grid
from quantflow.quant.numbers.integer import IntegerTensor, assemble, quantize_rtn
from quantflow.quant.scheme import Scheme

DAMP_LADDER = (1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Factor:
    """The upper Cholesky factor `U` of the damped Hessian's inverse, in the order the columns are
    rounded, as the recursion needs it.

    ratios: `U[i, j] / U[i, i]`, `[K, K]`: what column j takes of column i's rounding error. order:
    `[K]`, the column rounded at each step. fallback: what had to be done, "" if nothing.
    """

    ratios: Tensor
    order: Tensor
    fallback: str = ""

    def of_scaled(self, scale: Tensor) -> Factor:
        """The factor where every input channel is divided by its `scale` `[K]`: of `D⁻¹ (H +
        damping) D⁻¹` in the same order, whose inverse's Cholesky factor is `U D`."""
        ordered = scale[self.order]
        return Factor(self.ratios / ordered[:, None] * ordered, self.order, self.fallback)


def factorize(hessian: Tensor, *, damp: float, act_order: bool) -> Factor | None:
    """The factor of `hessian` (float32), or None where even a floored diagonal does not help.

    damp: fraction of the mean diagonal that is added to it. Dead channels (zero diagonal) get the
    mean, so they neither give nor take corrections. Cholesky fails on real Hessians even with much
    damping: the ladder raises it, then floors the diagonal.
    """
    if not bool(hessian.isfinite().all()):
        return None
    diagonal = hessian.diagonal().clone()
    mean = float(diagonal.mean())
    if mean <= 0:
        return None
    diagonal[diagonal <= 0] = mean
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if act_order
        else torch.arange(len(diagonal), device=hessian.device)
    )
    attempts = [
        (damp * times, 0.0, f"damping {damp * times:g}" if times > 1 else "")
        for times in DAMP_LADDER
    ]
    attempts.append((damp * DAMP_LADDER[-1], 1.0, "diagonal floored at its mean"))
    backwards = order.flip(0)
    for amount, floor, note in attempts:
        # One K×K matrix after the other, each freed once the next is there: with the Hessian, at
        # most three.
        matrix = hessian[backwards][:, backwards] if act_order else hessian.flip(0, 1)
        matrix.diagonal().copy_(diagonal[backwards].clamp(min=mean * floor) + amount * mean)
        matrix, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            # H = V Vᵀ with V upper triangular, from the Cholesky factor of H backwards; then H⁻¹ =
            # Uᵀ U with U = V⁻¹. Against inverting H and factorising that, as the paper does, it
            # takes a third of the time and rounds less.
            matrix = matrix.flip(0, 1)
            _invert_upper(matrix)
            if bool(matrix.isfinite().all()):
                return Factor(matrix.div_(matrix.diagonal().clone()[:, None]), order, note)
    return None


def _invert_upper(matrix: Tensor) -> None:
    """Inverts an upper triangular matrix in place, by halves, so that nearly all of it is matrix
    products."""
    k = len(matrix)
    if k <= 256:
        matrix.copy_(
            torch.linalg.solve_triangular(
                matrix, torch.eye(k, dtype=matrix.dtype, device=matrix.device), upper=True
            )
        )
        return
    half = k // 2
    left, corner, right = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    _invert_upper(left)
    _invert_upper(right)
    corner.copy_(left @ corner @ right).neg_()


ELEMENTS_AT_ONCE = 2**22  # weights that are solved together
LEAF = 8  # columns between which corrections go one by one, by torch operations
COMPILED_LEAF = 32  # the same, by compiled code


def in_halves(
    start: int,
    stop: int,
    unit: int,
    leaf: int,
    columns: Callable[[int, int], None],
    carry: Callable[[int, int, int], None],
) -> None:
    """Visits `[start, stop)` in order, `leaf` columns at most at a time by `columns(start, stop)`;
    after each left half, `carry(start, middle, stop)` takes what it changed to the right half in
    one matrix product.

    This is GPTQ's lazy batching at every scale: columns near each other are corrected at once,
    distant ones in large products.
    unit: halves longer than it are cut at its multiples.
    """
    size = stop - start
    if size <= leaf:
        columns(start, stop)
        return
    step = unit if size > unit else 1
    middle = start + max(step, size // 2 // step * step)
    in_halves(start, middle, unit, leaf, columns, carry)
    carry(start, middle, stop)
    in_halves(middle, stop, unit, leaf, columns, carry)


@dataclass(frozen=True)
class GptqResult:
    tensor: IntegerTensor
    fallback: str = ""


def quantize_gptq(
    weight: Tensor,
    hessian: Tensor,
    factor: Factor | None,
    scheme: Scheme,
    rules: GridRules,
    *,
    act_order: str = "static",
    search: bool = True,
    refine: int = 4,
) -> GptqResult:
    """`weight` (float32) quantised by GPTQ.

    act_order: `none` rounds channels as they come and makes each group's grid when it is reached;
    `static` rounds the most active first on grids made beforehand, so that nothing has to be
    permuted at run time; `dynamic` makes groups of channels of like activity, which needs
    `group_index`. search: each grid minimises the output error its group causes.
    refine: passes of coordinate descent afterwards (see `refine_codes`).
    """
    if factor is None:
        plain = quantize_rtn(
            weight,
            scheme,
            rules,
            search=search,
            importance=_blocks(hessian, scheme) if search else None,
        )
        return GptqResult(plain, "Hessian not invertible: rounded to nearest")
    # Rows are independent given the factor: some at a time, so that the dozen float32 copies below
    # stay small.
    rows = max(1, ELEMENTS_AT_ONCE // weight.shape[1])
    parts = [
        _solve(part, hessian, factor, scheme, rules, act_order, search, refine)
        for part in weight.split(rows)
    ]
    if len(parts) == 1:
        return GptqResult(parts[0], factor.fallback)
    codes, scales, zeros = (
        torch.cat([getattr(p, field) for p in parts]) for field in ("codes", "scales", "zeros")
    )
    return GptqResult(
        IntegerTensor(scheme, codes, scales, zeros, parts[0].group_index), factor.fallback
    )


def _solve(
    weight: Tensor,
    hessian: Tensor,
    factor: Factor,
    scheme: Scheme,
    rules: GridRules,
    act_order: str,
    search: bool,
    refine: int,
) -> IntegerTensor:
    # The order of the columns, and the grids that are known beforehand.
    n, k = weight.shape
    order = factor.order
    group = scheme.group_of(k)
    permuted = act_order == "dynamic"
    base = weight[:, order] if permuted else weight
    sorted_hessian = hessian[order][:, order] if permuted else hessian
    blocks = _blocks(sorted_hessian, scheme) if search else None
    if act_order == "none":
        scales, zeros = (torch.empty(n, k // group, device=weight.device) for _ in range(2))
    else:
        grid = find_grid(base.contiguous(), scheme, rules, search=search, importance=blocks)
        scales, zeros = grid.scales, grid.zeros
    # Work on the transpose: a channel is then a contiguous row.
    w = weight[:, order].T.contiguous()
    # codes are kept less their zero points here
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    # The group of the channel rounded at each step.
    group_at = (torch.arange(k, device=w.device) if permuted else order).div(
        group, rounding_mode="floor"
    )
    scales_t, zeros_t = scales.T.contiguous(), zeros.T.contiguous()
    lowest, highest = -zeros_t, scheme.levels - zeros_t
    one_group = Scheme(scheme.bits, group, scheme.symmetric)
    round_columns, _, leaf = _steps(w)

    def columns(start: int, stop: int) -> None:
        if act_order == "none" and start % group == 0:
            # Halves end where groups do, so the whole group has taken all corrections from the
            # left.
            g = start // group
            grid = find_grid(
                w[start : start + group].T.contiguous(),
                one_group,
                rules,
                search=search,
                importance=_pick(blocks, g),
            )
            scales_t[g], zeros_t[g] = grid.scales[:, 0], grid.zeros[:, 0]
            lowest[g], highest[g] = -zeros_t[g], scheme.levels - zeros_t[g]
        round_columns(
            w, codes, errors, factor.ratios, scales_t, lowest, highest, group_at, start, stop
        )

    def correct(start: int, middle: int, stop: int) -> None:
        w[middle:stop].addmm_(factor.ratios[start:middle, middle:stop].T, errors[start:middle])

    # The recursion.
    if act_order == "none":
        in_halves(0, k, group, min(leaf, group), columns, correct)
    else:
        in_halves(0, k, 1, leaf, columns, correct)
    # Back to the order in which groups are runs of `group` channels: the weight's own, or the
    # permuted one.
    if not permuted:
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
    codes += zeros_t.repeat_interleave(group, 0)
    # A second look at every code.
    if refine:
        codes, scales_t = refine_codes(
            base.T, codes, scales_t, zeros_t, sorted_hessian, scheme, rules, refine
        )
    # Codes and grids as a tensor, its columns where they were.
    grid = Grid(scales_t.T.contiguous(), zeros_t.T.contiguous())
    if not permuted:
        return assemble(codes.T.contiguous(), grid, scheme, rules)
    flat, index = torch.empty_like(codes), torch.empty(k, dtype=torch.int32, device=weight.device)
    flat[order] = codes
    index[order] = (
        torch.arange(k, device=weight.device).div(group, rounding_mode="floor").to(torch.int32)
    )
    return assemble(flat.T.contiguous(), grid, scheme, rules, index)


def refine_codes(
    weight: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    rules: GridRules,
    passes: int,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of no larger output error `tr((W - Ŵ) H (W - Ŵ)ᵀ)`, by cyclic coordinate
    descent.

    weight, codes: transposed, `[K, N]`; scales, zeros: `[G, N]`. Each pass goes through the groups:
    it sets the scale to its least-squares optimum (kept where, rounded to its stored dtype, it
    still helps), then every code to the best one while the others stand (QuantEase, Behdin et al.
    2023, eq. 9). GPTQ decides each code once, before later ones are known; this lets it think
    again.
    """
    # Codes less zero points, values, and the slope of the error in each.
    k = weight.shape[0]
    group = k // scales.shape[0]
    curvature = hessian.diagonal().clamp(min=1e-12 * max(float(hessian.diagonal().max()), 1e-30))
    hessian = hessian.contiguous()
    zeros = zeros.contiguous()
    centred = codes.contiguous() - zeros.repeat_interleave(group, 0)
    scales, lowest, highest = scales.contiguous().clone(), -zeros, scheme.levels - zeros
    value = centred * scales.repeat_interleave(group, 0)
    slope = hessian @ (weight - value)  # minus half the gradient, [K, N]
    # What a column's scale and its code changed in its value.
    by_scale, by_code = torch.empty_like(value), torch.empty_like(value)
    _, best_codes, leaf = _steps(value)
    leaf = min(leaf, group)  # a leaf lies within a group

    def rescale(g: int) -> None:
        part = slice(g * group, (g + 1) * group)
        c, block = centred[part], hessian[part, part]
        curved = ((block @ c) * c).sum(0)
        downhill = (c * slope[part]).sum(0)
        wanted = scales[g] + torch.where(curved > 0, downhill / curved.clamp(min=1e-30), 0)
        step = (
            torch.where(wanted > 0, rules.round_scale(wanted.clamp(min=0)), scales[g]) - scales[g]
        )
        step = torch.where(step * (2 * downhill - step * curved) > 0, step, 0)
        scales[g] += step
        value[part] += torch.mul(c, step, out=by_scale[part])
        slope[part].addmm_(block, by_scale[part], alpha=-1)

    def columns(start: int, stop: int) -> None:
        g = start // group
        if start % group == 0:
            rescale(g)
        best_codes(
            value,
            slope,
            centred,
            by_code,
            hessian,
            scales[g],
            lowest[g],
            highest[g],
            curvature,
            start,
            stop,
        )

    def carry(start: int, middle: int, stop: int) -> None:
        # A group's own columns have seen the change of its scale already.
        across = stop - start > group
        change = by_scale[start:middle] + by_code[start:middle] if across else by_code[start:middle]
        slope[middle:stop].addmm_(hessian[middle:stop, start:middle], change, alpha=-1)

    # Pass by pass.
    for left in reversed(range(passes)):
        in_halves(0, k, group, leaf, columns, carry)
        value += by_code
        # `carry` looks ahead only: what later columns changed for earlier ones comes in one product
        if left:
            torch.matmul(hessian, weight - value, out=slope)
    return centred + zeros.repeat_interleave(group, 0), scales


def _steps(weight: Tensor) -> tuple[Callable[..., None], Callable[..., None], int]:
    """What goes through a leaf's columns in the recursion and in the refinement, and how many those
    are."""
    if cpu_solver.available(weight):
        return cpu_solver.gptq_columns, cpu_solver.refine_columns, COMPILED_LEAF
    if weight.device.type == "cuda":
        from quantflow_kernels import solver  # here, so that a CPU needs no Triton

        return solver.gptq_columns, solver.refine_columns, COMPILED_LEAF
    return _gptq_columns, _refine_columns, LEAF


def _gptq_columns(
    w: Tensor,
    codes: Tensor,
    errors: Tensor,
    ratios: Tensor,
    scales: Tensor,
    lowest: Tensor,
    highest: Tensor,
    group_at: Tensor,
    start: int,
    stop: int,
) -> None:
    """`cpu_solver.gptq_columns` by torch operations; it changes `w`."""
    for i, g in zip(range(start, stop), group_at[start:stop].tolist(), strict=True):
        code = torch.div(w[i], scales[g], out=codes[i]).round_().clamp_(lowest[g], highest[g])
        error = torch.mul(code, scales[g], out=errors[i]).sub_(w[i])
        if i + 1 < stop:
            w[i + 1 : stop].addr_(ratios[i, i + 1 : stop], error)


def _refine_columns(
    values: Tensor,
    slope: Tensor,
    codes: Tensor,
    changes: Tensor,
    hessian: Tensor,
    scale: Tensor,
    lowest: Tensor,
    highest: Tensor,
    curvature: Tensor,
    start: int,
    stop: int,
) -> None:
    """`cpu_solver.refine_columns` by torch operations; it changes `slope`."""
    for i in range(start, stop):
        best = (
            torch.addcdiv(values[i], slope[i], curvature[i], out=codes[i])
            .div_(scale)
            .round_()
            .clamp_(lowest, highest)
        )
        change = torch.mul(best, scale, out=changes[i]).sub_(values[i])
        if i + 1 < stop:
            slope[i + 1 : stop].addr_(hessian[i, i + 1 : stop], change, alpha=-1)


def _blocks(hessian: Tensor, scheme: Scheme) -> Tensor | None:
    """The diagonal blocks `[G, g, g]` of the Hessian; its diagonal `[1, K]` where one group spans
    the row."""
    k = hessian.shape[0]
    group = scheme.group_of(k)
    if group == k:
        return hessian.diagonal().clamp(min=0)[None, :].clone()
    parts = hessian.view(k // group, group, k // group, group)
    return torch.stack([parts[i, :, i] for i in range(k // group)])


def _pick(blocks: Tensor | None, group: int) -> Tensor | None:
    return None if blocks is None else blocks[group : group + 1]


def output_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """`||(W - Ŵ) X||² / ||W X||²`, from the Hessian; 0 where the output is zero, NaN where the
    Hessian is not finite."""
    difference = weight - approximation
    error, power = (
        float(((difference @ hessian) * difference).sum()),
        float(((weight @ hessian) * weight).sum()),
    )
    if not math.isfinite(error + power):
        return math.nan
    return max(error, 0.0) / power if power > 0 else 0.0
