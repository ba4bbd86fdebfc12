"""The CPU's 4-bit product against a float64 oracle, by both ways."""

from __future__ import annotations

import pytest
import torch
from quantflow_kernels import cpu, reference
from quantflow_kernels.cpu import CpuWeight, linear, pack, unsupported
from quantflow_kernels.layout import PER_CHANNEL

pytestmark = pytest.mark.skipif(
    not cpu.block_rows(), reason="this machine packs 4-bit weights in an order that is not known"
)


def operands(
    n: int, k: int, m: int, group: int, *, symmetric: bool = False
) -> tuple[torch.Tensor, CpuWeight, torch.Tensor]:
    """x with a mean that is not zero, as activations have it; the packed weight; the product in
    float64."""
    generator = torch.Generator().manual_seed(n + k + m)
    groups = 1 if group == PER_CHANNEL else k // group
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(n, groups, generator=generator) * 0.01 + 0.001).bfloat16()
    zeros = (
        torch.full((n, groups), 8, dtype=torch.uint8)
        if symmetric
        else torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=generator)
    )
    x = (torch.randn(m, k, generator=generator) + 3).bfloat16()
    return (
        x,
        pack(codes, scales, zeros, group),
        reference.w4a16_matmul(x.double(), codes, scales.double(), zeros, group),
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float(
        (
            (found.double() - expected).abs() / (expected.abs() + expected.square().mean().sqrt())
        ).max()
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "group"),
    [(64, 32, 32), (128, 256, 64), (192, 384, 128), (64, 512, 256), (64, 128, PER_CHANNEL)],
)
@pytest.mark.parametrize("m", [1, 3, 8])
def test_few_tokens(symmetric: bool, n: int, k: int, group: int, m: int) -> None:
    x, weight, expected = operands(n, k, m, group, symmetric=symmetric)
    found = linear(x, weight, exact=False)
    # The output's rounding, and that of each group's zero point times the sum of its activations;
    # the sum itself is in float32.
    sums = x.double().view(m, -1, weight.group_size).sum(-1).abs()
    shifts = ((8 - weight.zeros.double()) * weight.scales.double()).abs()
    bound = 2**-8 * (expected.abs() + sums @ shifts) + 1e-4 * expected.square().mean().sqrt()
    assert found.shape == expected.shape and bool(
        ((found.double() - expected).abs() <= bound).all()
    )
    if symmetric:
        assert bool(
            (
                (found.double() - expected).abs()
                <= 2**-8 * expected.abs() + 1e-4 * expected.square().mean().sqrt()
            ).all()
        )


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(64, 64, 32), (1088, 256, 128), (2112, 128, PER_CHANNEL)]
)
def test_many_tokens(
    monkeypatch: pytest.MonkeyPatch, compiled: bool, n: int, k: int, group: int
) -> None:
    """Also where the last strip is shorter, or the only one. Weights are rounded to bfloat16 here,
    which averages out."""
    if compiled and cpu.unpacker()[1] != "compiled":
        pytest.skip(cpu.unpacker()[1])
    used = []

    def unpack(*args: torch.Tensor) -> torch.Tensor:
        used.append(len(args[0]))
        return real(*args)

    real = cpu.unpacker()[0] if compiled else cpu._strip
    monkeypatch.setattr(cpu, "unpacker", lambda: (unpack, ""))
    x, weight, expected = operands(n, k, cpu.FEW_TOKENS + 1, group)
    assert relative(linear(x, weight, exact=False), expected) < 2**-7
    assert sum(used) == n // cpu.block_rows()
    used.clear()
    linear(x, weight, exact=True)
    linear(x[: cpu.FEW_TOKENS], weight, exact=False)
    assert used == []


def test_compiled_for_one_shape_after_another() -> None:
    """More shapes than torch compiles a function for by default: none is left uncompiled, all are
    right."""
    unpack, name = cpu.unpacker()
    if name != "compiled":
        pytest.skip(name)
    half = cpu.block_rows() // 2
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for blocks, k, groups in [
            (1, 32, 1),
            (1, 64, 2),
            (2, 64, 1),
            (2, 64, 2),
            (16, 64, 2),
            (2, 128, 128 // 32),
            (7, 96, 3),
            (64, 64, 2),
            (2, 32, 1),
        ]:
            packed = torch.randint(
                0,
                256,
                (blocks, k, half),
                dtype=torch.uint8,
                generator=torch.Generator().manual_seed(k),
            )
            scales, zeros = (
                torch.rand(groups, blocks * 2 * half).bfloat16(),
                torch.zeros(groups, blocks * 2 * half, dtype=torch.uint8),
            )
            assert unpack(packed, scales, zeros).equal(cpu._strip(packed, scales, zeros))


def test_without_a_compiler_it_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object, **options: object) -> object:
        def call(*tensors: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler found\nand much more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    unpack, name = cpu.unpacker.__wrapped__()
    assert unpack is cpu._strip and name == "plain (RuntimeError: no compiler found)"
    assert "without a compiler (RuntimeError: no compiler found)" in caplog.text


def test_in_exact_mode_a_rows_bits_depend_on_that_row_alone() -> None:
    x, weight, _ = operands(128, 256, 70, 128)
    whole = linear(x, weight, exact=True)
    for m in (1, 2, 5, 8, 9, 33):
        assert linear(x[:m], weight, exact=True).equal(whole[:m])
        assert linear(x[m:], weight, exact=True).equal(whole[m:])


def test_bias_and_leading_dimensions() -> None:
    x, weight, expected = operands(64, 128, 6, 64)
    bias = torch.randn(64, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = linear(x.view(2, 3, 128), weight, bias, exact=False)
    assert relative(found.view(6, 64), expected + bias.double()) < 2**-7 and found.shape == (
        2,
        3,
        64,
    )


@pytest.mark.parametrize(
    ("bits", "group", "n", "k", "dtype", "said"),
    [
        (3, 32, 64, 64, torch.bfloat16, "3 bits"),
        (4, 32, 64, 64, torch.float16, "float16"),
        (4, 16, 64, 64, torch.bfloat16, "groups of 16"),
        (4, 512, 64, 512, torch.bfloat16, "groups of 512"),
        (4, 64, 64, 96, torch.bfloat16, "96 input channels"),
        (4, 32, 80, 64, torch.bfloat16, "80 output channels"),
        (4, 64, 128, 128, torch.bfloat16, ""),
    ],
)
def test_unsupported(bits: int, group: int, n: int, k: int, dtype: torch.dtype, said: str) -> None:
    found = unsupported(bits, group, n, k, dtype)
    assert said in found and bool(found) == bool(said)


def test_a_scale_that_bfloat16_cannot_hold_is_refused() -> None:
    codes, zeros = torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(64, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bfloat16"):
        pack(codes, torch.full((64, 1), 0.1), zeros, 32)
