"""GPTQ against hand computations, a textbook implementation in float64, brute force, and
properties."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantflow_kernels import cpu_solver

from quantflow.quant import gptq
from quantflow.quant.gptq import GptqResult, factorize, output_error, quantize_gptq, refine_codes
from quantflow.quant.grid import GridRules
from quantflow.quant.numbers.integer import IntegerTensor, quantize_rtn
from quantflow.quant.scheme import PER_CHANNEL, Scheme

FLOAT32 = GridRules()
HALF = GridRules((torch.float16,))
ORDERS = ("none", "static", "dynamic")


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By compiled steps, and by torch operations, as it is done without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(cpu_solver, "available", lambda weight: False)
    elif cpu_solver.library()[0] is None:
        pytest.skip(f"no compiled steps: {cpu_solver.library()[1]}")
    return str(request.param)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(k: int, *, rows: int = 256, seed: int = 0) -> torch.Tensor:
    """The Hessian of activations that share a few directions and differ in size from channel to
    channel."""
    shared = random(rows, 6, seed=seed) @ random(6, k, seed=seed + 1)
    x = (shared + random(rows, k, seed=seed + 2)) * random(k, seed=seed + 3).exp()
    return x.T @ x


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    scheme: Scheme,
    rules: GridRules = FLOAT32,
    *,
    damp: float = 0.01,
    **more: object,
) -> GptqResult:
    factor = factorize(hessian, damp=damp, act_order=more.get("act_order", "static") != "none")
    return quantize_gptq(weight, hessian, factor, scheme, rules, **more)  # type: ignore[arg-type]


def trace(weight: torch.Tensor, tensor: IntegerTensor, hessian: torch.Tensor) -> float:
    """`tr(ΔW H ΔWᵀ)` in float64."""
    difference = weight.double() - tensor.dequantize(torch.float64)
    return float((difference @ hessian.double() * difference).sum())


def assert_valid(tensor: IntegerTensor, rules: GridRules) -> None:
    assert (
        tensor.codes.dtype == tensor.zeros.dtype == torch.uint8
        and int(tensor.codes.max()) <= tensor.scheme.levels
    )
    assert (
        int(tensor.zeros.min()) >= rules.min_zero
        and int(tensor.zeros.max()) <= tensor.scheme.levels
    )
    assert (
        tensor.scales.dtype == rules.scale_dtype
        and tensor.scales.isfinite().all()
        and (tensor.scales > 0).all()
    )
    assert tensor.dequantize().isfinite().all()


# By hand. The grid of [0.4, 15, 7.2] is scale 1, zero point 0.
WEIGHT = torch.tensor([[0.4, 15.0, 7.2]])
HESSIAN = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 2.0]])
PLAIN = {"search": False, "refine": 0}


def test_by_hand_in_order() -> None:
    # Channel 0: 0.4 becomes 0. The inverse of [[1, 1], [1, 2]] is [[2, -1], [-1, 1]]: channel 2
    # takes 0.4 / 2 and is 7.4.
    tensor = solve(WEIGHT, HESSIAN, Scheme(4, 3, False), damp=0, act_order="none", **PLAIN).tensor
    assert (tensor.codes.tolist(), tensor.scales.tolist(), tensor.zeros.tolist()) == (
        [[0, 15, 7]],
        [[1.0]],
        [[0]],
    )
    # With [[2, 1], [1, 1]] it takes all of 0.4, is 7.6, and goes up.
    steep = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    assert solve(
        WEIGHT, steep, Scheme(4, 3, False), damp=0, act_order="none", **PLAIN
    ).tensor.codes.tolist() == [[0, 15, 8]]


def test_by_hand_most_active_first() -> None:
    # Channel 2 first: 7.2 becomes 7. The inverse of [[2, 1], [1, 1]] is [[1, -1], [-1, 2]]: channel
    # 0 takes 0.2 and, at 0.6, goes up.
    result = solve(WEIGHT, HESSIAN, Scheme(4, 3, False), damp=0, act_order="static", **PLAIN)
    assert (
        result.tensor.codes.tolist() == [[1, 15, 7]]
        and result.tensor.group_index is None
        and result.fallback == ""
    )
    # ΔW = (-0.6, 0, 0.2): 0.36 - 2 * 0.12 + 2 * 0.04 = 0.2; rounding to nearest, (0.4, 0, 0.2):
    # 0.16 + 0.16 + 0.08 = 0.4.
    assert trace(WEIGHT, result.tensor, HESSIAN) == pytest.approx(0.2, rel=1e-5)
    assert trace(
        WEIGHT, quantize_rtn(WEIGHT, Scheme(4, 3, False), FLOAT32), HESSIAN
    ) == pytest.approx(0.4, rel=1e-5)


def test_the_factor_by_hand() -> None:
    # Mean diagonal 1.5: damping 0.5 adds 0.75. Sorted: [[2.75, 1], [1, 1.75]], determinant 3.8125.
    factor = factorize(torch.tensor([[1.0, 1.0], [1.0, 2.0]]), damp=0.5, act_order=True)
    assert factor is not None and factor.order.tolist() == [1, 0] and factor.fallback == ""
    inverse = torch.tensor([[1.75, -1.0], [-1.0, 2.75]]) / 3.8125
    upper = torch.linalg.cholesky(inverse.double(), upper=True)
    torch.testing.assert_close(factor.ratios.double(), upper / upper.diagonal()[:, None])


def textbook(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, act_order: str, damp: float
) -> tuple[torch.Tensor, ...]:
    """Codes `[N, K]`, scales and zeros `[N, G]` and each channel's group: OBQ in a fixed order, one
    channel at a time.

    After each, the inverse Hessian of the channels that remain is computed afresh (Frantar et al.
    2022, eq. 2 and 3).
    """
    w, h = weight.double().clone(), hessian.double().clone()
    k = w.shape[1]
    size = scheme.group_of(k)
    mean = h.diagonal().mean()
    h += torch.eye(k, dtype=torch.float64) * damp * mean
    order = list(range(k))
    if act_order != "none":
        order.sort(key=lambda i: -float(hessian[i, i]))
    group = [0] * k
    for position, channel in enumerate(order):
        group[channel] = (position if act_order == "dynamic" else channel) // size
    scales, zeros = torch.zeros(2, len(w), k // size, dtype=torch.float64)

    def set_grid(g: int) -> None:
        members = w[:, [i for i in range(k) if group[i] == g]]
        low, high = members.amin(1).clamp(max=0), members.amax(1).clamp(min=0)
        if scheme.symmetric:
            scales[:, g], zeros[:, g] = (
                2 * torch.maximum(-low, high) / (2**scheme.bits - 1),
                2 ** (scheme.bits - 1),
            )
        else:
            scales[:, g] = (high - low) / (2**scheme.bits - 1)
            zeros[:, g] = (-low / scales[:, g]).round()

    if act_order != "none":
        for g in range(k // size):
            set_grid(g)
    codes = torch.zeros(w.shape, dtype=torch.float64)
    for position, channel in enumerate(order):
        g = group[channel]
        if act_order == "none" and channel % size == 0:
            set_grid(g)
        left = order[position:]
        inverse = torch.linalg.inv(h[left][:, left])
        codes[:, channel] = (
            (w[:, channel] / scales[:, g] + zeros[:, g]).round().clamp(0, 2**scheme.bits - 1)
        )
        error = w[:, channel] - (codes[:, channel] - zeros[:, g]) * scales[:, g]
        w[:, left] -= torch.outer(error, inverse[0]) / inverse[0, 0]
    return codes, scales, zeros, torch.tensor(group)


@pytest.mark.parametrize("act_order", [False, True])
def test_factor_of_scaled_channels(act_order: bool) -> None:
    """Scaling a factor gives that of the Hessian of the scaled channels, damping scaled alike, in
    the order of the unscaled ones."""
    generator = torch.Generator().manual_seed(0)
    x, scale = (
        torch.randn(60, 12, generator=generator, dtype=torch.float64),
        torch.rand(12, generator=generator).double() * 4 + 0.1,
    )
    hessian = x.T @ x
    factor = factorize(hessian.float(), damp=0.1, act_order=act_order)
    assert factor is not None
    scaled = factor.of_scaled(scale.float())
    assert scaled.order.equal(factor.order)
    damped = (hessian + 0.1 * hessian.diagonal().mean() * torch.eye(12)) / scale[:, None] / scale
    upper = torch.linalg.cholesky(
        torch.linalg.inv(damped[scaled.order][:, scaled.order]), upper=True
    )
    torch.testing.assert_close(
        scaled.ratios.double().triu(), upper / upper.diagonal()[:, None], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "scheme",
    [Scheme(4, 8, False), Scheme(3, 4, True), Scheme(2, 8, False), Scheme(4, PER_CHANNEL, False)],
    ids=str,
)
@pytest.mark.parametrize("act_order", ORDERS)
def test_is_the_textbooks(act_order: str, scheme: Scheme) -> None:
    weight, hessian = random(6, 24), correlated(24)
    # A symmetric range's negative end lies on half a step: keep it away from the first channel of a
    # group, where it would be a tie.
    weight[:, ::4] *= 0.2
    codes, scales, zeros, group = textbook(weight, hessian, scheme, act_order, 0.05)
    tensor = solve(weight, hessian, scheme, damp=0.05, act_order=act_order, **PLAIN).tensor
    assert torch.equal(tensor.codes.double(), codes)
    assert torch.equal(tensor.zeros.double(), zeros)
    torch.testing.assert_close(tensor.scales.double(), scales, rtol=1e-4, atol=0)
    assert (tensor.group_index is not None) == (act_order == "dynamic")
    if tensor.group_index is not None:
        assert tensor.group_index.dtype == torch.int32 and torch.equal(
            tensor.group_index.long(), group
        )


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 8, False), Scheme(4, 16, True), Scheme(3, PER_CHANNEL, False)], ids=str
)
@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("refine", [0, 2])
def test_where_the_halves_end_does_not_matter(
    act_order: str, scheme: Scheme, refine: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = random(5, 48), correlated(48)
    name = "LEAF" if way == "torch" else "COMPILED_LEAF"
    monkeypatch.setattr(gptq, name, 48)  # column by column, as the paper's algorithm has it
    whole = solve(weight, hessian, scheme, act_order=act_order, refine=refine).tensor
    for leaf in (1, 5, 8, 20):
        monkeypatch.setattr(gptq, name, leaf)
        part = solve(weight, hessian, scheme, act_order=act_order, refine=refine).tensor
        assert torch.equal(part.codes, whole.codes) and torch.equal(part.zeros, whole.zeros)
        torch.testing.assert_close(part.scales, whole.scales, rtol=1e-4, atol=0)


def test_dynamic_groups_hold_channels_of_like_activity() -> None:
    weight = (
        random(4, 16)
        * torch.logspace(0, 4, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    )
    hessian = correlated(16)
    for search, refine in product((False, True), (0, 2)):
        tensor = solve(
            weight, hessian, Scheme(4, 4, False), act_order="dynamic", search=search, refine=refine
        ).tensor
        assert tensor.group_index is not None
        order = hessian.diagonal().argsort(descending=True)
        assert tensor.group_index[order].tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
        for g in range(4):
            members = tensor.group_index == g
            if not search and not refine:
                plain = quantize_rtn(weight[:, members], Scheme(4, PER_CHANNEL, False), FLOAT32)
                torch.testing.assert_close(tensor.scales[:, g], plain.scales[:, 0])
                assert torch.equal(tensor.zeros[:, g], plain.zeros[:, 0])
            # Magnitudes differ by 10^4: with another group's scale, values would be far off or all
            # zero.
            value, wanted = tensor.dequantize()[:, members], weight[:, members]
            assert (value - wanted).norm() < 0.35 * wanted.norm()


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize(
    "scheme",
    [Scheme(4, 8, False), Scheme(2, 8, True), Scheme(3, PER_CHANNEL, False), Scheme(8, 16, True)],
    ids=str,
)
def test_no_worse_than_rounding_to_nearest(act_order: str, scheme: Scheme) -> None:
    for seed in range(6):
        weight, hessian = random(16, 32, seed=seed), correlated(32, seed=10 * seed)
        rtn = [
            trace(weight, quantize_rtn(weight, scheme, HALF, search=s), hessian)
            for s in (False, True)
        ]
        bare = trace(
            weight,
            solve(weight, hessian, scheme, HALF, act_order=act_order, **PLAIN).tensor,
            hessian,
        )
        full = trace(
            weight, solve(weight, hessian, scheme, HALF, act_order=act_order).tensor, hessian
        )
        assert bare < rtn[0]
        assert full < min(rtn) and full < bare


# What real Hessians do.


def test_rank_deficient_hessian() -> None:
    x = random(5, 32)  # five tokens
    hessian = x.T @ x
    weight = random(8, 32)
    for act_order in ORDERS:
        result = solve(weight, hessian, Scheme(4, 8, False), act_order=act_order)
        assert result.fallback == ""  # damping is enough
        assert_valid(result.tensor, FLOAT32)
        assert trace(weight, result.tensor, hessian) < trace(
            weight, quantize_rtn(weight, Scheme(4, 8, False), FLOAT32, search=True), hessian
        )


@pytest.mark.parametrize(
    ("hessian", "note"),
    [
        ([[1.0, 1.05], [1.05, 1.0]], "damping 0.1"),  # least eigenvalue -0.05: needs more than 0.05
        ([[1.0, 1.5], [1.5, 1.0]], "damping 1"),
        ([[0.01, 2.0], [2.0, 1.99]], "diagonal floored at its mean"),  # 1.01 * 2.99 < 4 < 2 * 2.99
    ],
)
def test_the_ladder(hessian: list[list[float]], note: str) -> None:
    matrix = torch.tensor(hessian)
    for act_order in ORDERS:
        factor = factorize(matrix, damp=0.01, act_order=act_order != "none")
        assert factor is not None and factor.fallback == note
        result = quantize_gptq(
            random(3, 2), matrix, factor, Scheme(4, 2, False), FLOAT32, act_order=act_order
        )
        assert result.fallback == note
        assert_valid(result.tensor, FLOAT32)


@pytest.mark.parametrize(
    "hessian",
    [
        torch.tensor([[1.0, 3.0], [3.0, 1.0]]),  # no diagonal of ours makes that positive
        torch.zeros(2, 2),
        -torch.eye(2),
        torch.tensor([[1.0, 0.0], [0.0, float("nan")]]),
        torch.tensor([[1.0, float("inf")], [float("inf"), 1.0]]),
    ],
    ids=["indefinite", "zero", "negative", "nan", "inf"],
)
@pytest.mark.parametrize("search", [True, False])
def test_rounded_to_nearest_and_said_so_where_nothing_helps(
    hessian: torch.Tensor, search: bool
) -> None:
    weight = random(3, 2)
    factor = factorize(hessian, damp=0.01, act_order=True)
    assert factor is None
    for act_order in ORDERS:
        result = quantize_gptq(
            weight, hessian, factor, Scheme(4, 2, False), HALF, act_order=act_order, search=search
        )
        assert "rounded to nearest" in result.fallback
        assert_valid(result.tensor, HALF)
        assert (result.tensor.dequantize() - weight).abs().max() < 0.3
        if not search:
            assert torch.equal(
                result.tensor.codes, quantize_rtn(weight, Scheme(4, 2, False), HALF).codes
            )


def test_dead_channels_neither_give_nor_take() -> None:
    k, dead = 12, [0, 5, 6]
    alive = [i for i in range(k) if i not in dead]
    weight, hessian = random(4, k), correlated(k)
    weight[:, dead] = weight[:, dead].clamp(-0.5, 0.5)
    hessian[dead] = 0
    hessian[:, dead] = 0
    for act_order in ORDERS:
        scheme = Scheme(4, PER_CHANNEL, False)
        whole = solve(weight, hessian, scheme, damp=0, act_order=act_order, **PLAIN)
        assert whole.fallback == ""
        rest = solve(
            weight[:, alive], hessian[alive][:, alive], scheme, damp=0, act_order=act_order, **PLAIN
        ).tensor
        assert torch.equal(whole.tensor.codes[:, alive], rest.codes) and torch.equal(
            whole.tensor.scales, rest.scales
        )
        nearest = quantize_rtn(weight, scheme, FLOAT32)
        assert torch.equal(whole.tensor.codes[:, dead], nearest.codes[:, dead])
        assert_valid(solve(weight, hessian, scheme, act_order=act_order).tensor, FLOAT32)


@settings(deadline=None, max_examples=60)
@given(
    st.builds(
        Scheme, st.sampled_from((2, 3, 4, 8)), st.sampled_from((PER_CHANNEL, 4, 8)), st.booleans()
    ),
    st.sampled_from(
        (
            FLOAT32,
            HALF,
            GridRules((torch.bfloat16, torch.float16)),
            GridRules((torch.float16,), min_zero=1),
        )
    ),
    st.sampled_from(ORDERS),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 9999),
    st.sampled_from((1e-9, 1e-3, 1.0, 1e4)),
    st.sampled_from((1e-12, 1.0, 1e8)),
)
def test_always_valid(
    scheme: Scheme,
    rules: GridRules,
    act_order: str,
    search: bool,
    refine: int,
    seed: int,
    size: float,
    activity: float,
) -> None:
    weight = random(4, 16, seed=seed) * size
    weight[0] = 0  # an empty row
    weight[1, 4:8] = 0  # an empty group
    weight[2] = weight[2].abs()
    hessian = correlated(16, seed=seed) * activity
    hessian[3] = 0
    hessian[:, 3] = 0
    result = solve(
        weight, hessian, scheme, rules, act_order=act_order, search=search, refine=refine
    )
    assert_valid(result.tensor, rules)
    assert result.tensor.shape == (4, 16) and result.tensor.scales.shape == (4, scheme.groups(16))
    assert (result.tensor.scheme, result.fallback) == (scheme, "")
    if scheme.symmetric:
        assert result.tensor.zeros.eq(scheme.midpoint).all()


def test_linears_solved_together_are_solved_alone() -> None:
    hessian = correlated(16)
    a, b = random(3, 16, seed=1), random(5, 16, seed=2)
    together = solve(torch.cat((a, b)), hessian, Scheme(4, 8, False)).tensor
    for part, alone in (
        (slice(0, 3), solve(a, hessian, Scheme(4, 8, False)).tensor),
        (slice(3, 8), solve(b, hessian, Scheme(4, 8, False)).tensor),
    ):
        assert torch.equal(together.codes[part], alone.codes) and torch.equal(
            together.zeros[part], alone.zeros
        )
        torch.testing.assert_close(together.scales[part], alone.scales)


def test_arguments_are_left_alone() -> None:
    weight, hessian = random(4, 16), correlated(16)
    hessian[2] = 0
    hessian[:, 2] = 0
    before = weight.clone(), hessian.clone()
    for act_order in ORDERS:
        solve(weight, hessian, Scheme(4, 8, False), act_order=act_order)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


# Refinement.


def value_of(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Transposed weight `[K, N]` in float64."""
    group = len(codes) // len(scales)
    return (
        codes.double() - zeros.double().repeat_interleave(group, 0)
    ) * scales.double().repeat_interleave(group, 0)


def loss_of(weight: torch.Tensor, value: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The loss of each output channel, `[N]`, in float64."""
    difference = weight.double() - value
    return (difference * (hessian.double() @ difference)).sum(0)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from((2, 3, 4, 8)),
    st.sampled_from((4, 12)),
    st.sampled_from((FLOAT32, HALF)),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 9999),
)
def test_refinement_never_hurts_any_output(
    bits: int, group: int, rules: GridRules, passes: int, far: bool, seed: int
) -> None:
    weight, hessian = random(12, 5, seed=seed), correlated(12, seed=seed)
    scheme = Scheme(bits, group, False)
    start = quantize_rtn(weight.T.contiguous(), scheme, rules)
    codes, scales, zeros = (
        start.codes.T.float(),
        start.scales.T.float().contiguous(),
        start.zeros.T.float(),
    )
    if far:  # from codes that have nothing to do with the weight
        codes = torch.randint(
            0, scheme.levels + 1, codes.shape, generator=torch.Generator().manual_seed(seed)
        ).float()
    new_codes, new_scales = refine_codes(
        weight, codes, scales, zeros, hessian, scheme, rules, passes
    )
    assert (
        torch.equal(new_codes, new_codes.round())
        and new_codes.min() >= 0
        and new_codes.max() <= scheme.levels
    )
    assert torch.equal(rules.round_scale(new_scales), new_scales) and (new_scales > 0).all()
    before, after = (
        loss_of(weight, value_of(c, s, zeros), hessian)
        for c, s in ((codes, scales), (new_codes, new_scales))
    )
    power = loss_of(weight, torch.zeros_like(weight).double(), hessian)
    assert (after <= before * (1 + 1e-4) + 1e-6 * power).all()


def test_refinement_ends_where_no_code_and_no_scale_can_be_bettered() -> None:
    weight, hessian = random(12, 4), correlated(12)
    scheme = Scheme(3, 4, False)
    start = quantize_rtn(weight.T.contiguous(), scheme, FLOAT32)
    zeros = start.zeros.T.float()
    codes, scales = refine_codes(
        weight,
        start.codes.T.float(),
        start.scales.T.contiguous(),
        zeros,
        hessian,
        scheme,
        FLOAT32,
        40,
    )
    best = loss_of(weight, value_of(codes, scales, zeros), hessian)
    for channel, code in product(range(12), range(8)):
        other = codes.clone()
        other[channel] = code
        assert (loss_of(weight, value_of(other, scales, zeros), hessian) >= best * (1 - 1e-4)).all()
    for g, factor in product(range(3), (0.99, 0.999, 1.001, 1.01)):
        changed = scales.clone()
        changed[g] *= factor
        assert (
            loss_of(weight, value_of(codes, changed, zeros), hessian) >= best * (1 - 1e-4)
        ).all()


def test_refinement_finds_a_scale() -> None:
    codes = torch.tensor([[0.0], [3.0], [9.0], [15.0]])
    zeros = torch.full((1, 1), 8.0)
    weight = (codes - 8) * 0.7
    found, scales = refine_codes(
        weight, codes, torch.ones(1, 1), zeros, torch.eye(4), Scheme(4, 4, False), FLOAT32, 1
    )
    assert torch.equal(found, codes)
    torch.testing.assert_close(scales, torch.full((1, 1), 0.7))


def test_refinement_against_brute_force() -> None:
    """Four channels of two bits: all 256 sets of codes, each with its best scale."""
    zeros = torch.full((1, 1), 2.0)
    sets = torch.tensor(list(product(range(4), repeat=4))).double() - 2  # centred, [256, 4]
    gptq_total = refined_total = least_total = 0.0
    optimal = 0
    for seed in range(30):
        weight, hessian = random(1, 4, seed=seed), correlated(4, seed=seed)
        h, w = hessian.double(), weight.double()
        curvature = (sets @ h * sets).sum(1)
        along = (sets @ h @ w.T)[:, 0].clamp(min=0)  # a scale is positive
        power = float(w @ h @ w.T)
        least = power - float(
            torch.where(curvature > 0, along**2 / curvature.clamp(min=1e-30), 0.0).max()
        )
        plain = solve(
            weight, hessian, Scheme(2, 4, True), act_order="static", refine=0, search=True
        ).tensor
        refined = solve(
            weight, hessian, Scheme(2, 4, True), act_order="static", refine=4, search=True
        ).tensor
        assert plain.zeros.tolist() == zeros.tolist()
        before, after = trace(weight, plain, hessian), trace(weight, refined, hessian)
        assert least * (1 - 1e-6) - 1e-6 * power <= after <= before * (1 + 1e-4) + 1e-6 * power
        optimal += after <= least * 1.001 + 1e-6 * power
        gptq_total, refined_total, least_total = (
            gptq_total + before / power,
            refined_total + after / power,
            least_total + least / power,
        )
    assert optimal >= 15
    assert refined_total - least_total < 0.5 * (gptq_total - least_total)


def test_output_error_by_hand() -> None:
    weight, approximation = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]])
    hessian = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert output_error(weight, approximation, hessian) == pytest.approx(3 / (2 + 4 + 12))
    assert output_error(weight, weight, hessian) == 0.0
    assert output_error(weight, approximation, torch.zeros(2, 2)) == 0.0
    # Independent of the number of tokens, and that of X itself.
    x = random(7, 2)
    expected = float(
        ((weight - approximation) @ x.T).square().sum() / (weight @ x.T).square().sum()
    )
    assert output_error(weight, approximation, x.T @ x) == pytest.approx(expected, rel=1e-5)
    assert output_error(weight, approximation, 100 * x.T @ x) == pytest.approx(expected, rel=1e-5)


def test_an_unknown_error_is_not_called_zero() -> None:
    weight = torch.tensor([[1.0, 2.0]])
    error = output_error(weight, torch.tensor([[1.0, 1.0]]), torch.full((2, 2), float("nan")))
    assert error != 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("act_order", ORDERS)
def test_on_a_gpu(act_order: str) -> None:
    """The same up to rounding: most codes are equal, and the error of all is."""
    weight, hessian, scheme = random(300, 256), correlated(256, rows=1024), Scheme(4, 64, False)
    here = solve(weight, hessian, scheme, act_order=act_order).tensor
    there = solve(weight.cuda(), hessian.cuda(), scheme, act_order=act_order).tensor
    codes = there.codes.cpu()
    assert float((codes == here.codes).float().mean()) > 0.9
    moved = IntegerTensor(
        there.scheme,
        codes,
        there.scales.cpu(),
        there.zeros.cpu(),
        None if there.group_index is None else there.group_index.cpu(),
    )
    assert trace(weight, moved, hessian) == pytest.approx(trace(weight, here, hessian), rel=0.02)
