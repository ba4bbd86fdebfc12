"""The kernels' oracles against hand computations, loops over single elements, and QuantFlow's own
mathematics."""

from __future__ import annotations

import math

import pytest
import torch
from quantflow_kernels import reference

from quantflow.decoder.native import activate, normalize
from quantflow.decoder.rope import rotary_table, rotate
from quantflow.models.config import DecoderConfig
from quantflow.quant.grid import GridRules
from quantflow.quant.kv import kv_parameters, round_kv
from quantflow.quant.numbers.integer import quantize_rtn
from quantflow.quant.scheme import Scheme


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def test_dequantize_by_hand() -> None:
    codes = torch.tensor([[0, 15, 7, 8], [3, 3, 4, 5]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    zeros = torch.tensor([[8, 7], [3, 0]], dtype=torch.uint8)
    weight = reference.dequantize(codes, scales, zeros, 2)
    assert weight.dtype == torch.float32
    # codes below the zero point do not wrap
    assert weight.tolist() == [[-4.0, 3.5, 0.0, 2.0], [0.0, 0.0, 1.0, 1.25]]


@pytest.mark.parametrize(
    "scheme",
    [Scheme(4, 8, False), Scheme(2, 16, True), Scheme(8, -1, False), Scheme(3, 4, False)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantize_is_quantflows(scheme: Scheme, dtype: torch.dtype) -> None:
    tensor = quantize_rtn(random(5, 48), scheme, GridRules((dtype,)))
    assert torch.equal(
        reference.dequantize(tensor.codes, tensor.scales, tensor.zeros, scheme.group_size),
        tensor.dequantize(),
    )


def test_dequantize_refuses_groups_that_do_not_fill_the_row() -> None:
    codes, grid = torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 2)
    for group in (8, 3, -1):
        with pytest.raises(ValueError, match="do not go with"):
            reference.dequantize(codes, grid, grid, group)


def test_matmul_by_hand() -> None:
    codes = torch.tensor([[9, 8, 8, 10], [8, 8, 8, 8], [0, 15, 8, 8]], dtype=torch.uint8)
    scales, zeros = (
        torch.tensor([[0.5, 1.0], [1.0, 1.0], [1.0, 4.0]]),
        torch.full((3, 2), 8, dtype=torch.uint8),
    )
    x = torch.tensor([[[2.0, 3.0, 5.0, 7.0]]])
    # rows of W: [0.5, 0, 0, 2], [0, 0, 0, 0], [-8, 7, 0, 0]
    assert reference.w4a16_matmul(x, codes, scales, zeros, 2).tolist() == [[[15.0, 0.0, 5.0]]]
    assert reference.w4a16_matmul(
        x, codes, scales, zeros, 2, torch.tensor([1.0, -1.0, 0.5])
    ).tolist() == [[[16.0, -1.0, 5.5]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "n", "k", "group"), [(1, 1, 32, 32), (3, 17, 96, 32), (5, 8, 128, -1)]
)
def test_matmul_rounds_once(dtype: torch.dtype, tokens: int, n: int, k: int, group: int) -> None:
    tensor = quantize_rtn(random(n, k), Scheme(4, group, False), GridRules((torch.float16,)))
    x, bias = random(tokens, k, seed=1, dtype=dtype), random(n, seed=2, dtype=dtype)
    y = reference.w4a16_matmul(x, tensor.codes, tensor.scales, tensor.zeros, group, bias)
    weight = tensor.dequantize(torch.float64)
    exact = x.double() @ weight.T + bias.double()
    assert y.dtype == dtype and y.shape == (tokens, n)
    ulp = torch.finfo(dtype).eps / 2
    # One rounding of the result, and float32 sums (for float64, its own).
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    slack = k * unit * (x.double().abs() @ weight.abs().T + 1)
    assert ((y.double() - exact).abs() <= ulp * exact.abs() + slack).all()


def test_quantize_kv_by_hand() -> None:
    scale, zero = torch.tensor(0.5), torch.tensor(1.75)  # the range -62 .. 65.5
    x = torch.tensor([-62.0, 65.5, 1.75, 1000.0, -1000.0, 2.25]).view(1, 1, 6)
    codes = reference.quantize_kv(x, scale, zero)
    assert codes.dtype == torch.int8
    # 127.5 rounds to 128, which int8 would wrap to -128
    assert codes.flatten().tolist() == [-128, 127, 0, 127, -128, 1]
    assert reference.dequantize_kv(codes, scale, zero).flatten().tolist() == [
        -62.25,
        65.25,
        1.75,
        65.25,
        -62.25,
        2.25,
    ]


def test_halves_round_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127.5]).view(1, 1, 8)
    assert reference.quantize_kv(x, torch.tensor(1.0)).flatten().tolist() == [
        0,
        2,
        2,
        0,
        -2,
        -2,
        126,
        -128,
    ]


def test_kv_parameters_of_each_shape_reach_their_heads() -> None:
    x = torch.ones(2, 3, 2)  # [T, H, D]
    per_head = torch.tensor([1.0, 0.5, 0.25])
    assert reference.quantize_kv(x, per_head)[0].tolist() == [[1, 1], [2, 2], [4, 4]]
    per_channel = torch.tensor([[1.0, 0.5], [0.25, 0.125], [1.0, 1.0]])
    assert reference.quantize_kv(x, per_channel)[1].tolist() == [[1, 2], [4, 8], [1, 1]]
    assert reference.dequantize_kv(reference.quantize_kv(x, per_channel), per_channel).eq(1).all()


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_static_kv_is_quantflows(
    granularity: str, symmetric: bool, dtype: torch.dtype, bits: int
) -> None:
    x = (random(2, 3, 7, 4) * 3 + 1).to(dtype)  # [B, H, L, D]
    parameters = kv_parameters(
        x.amin((0, 2)), x.amax((0, 2)), bits=bits, symmetric=symmetric, granularity=granularity
    )
    tokens = x.transpose(1, 2).reshape(14, 3, 4)
    codes = reference.quantize_kv(tokens, parameters.scale, parameters.zero_point, bits)
    back = (
        reference.dequantize_kv(codes, parameters.scale, parameters.zero_point, dtype)
        .view(2, 7, 3, 4)
        .transpose(1, 2)
    )
    assert torch.equal(back, round_kv(x, parameters))


def test_dynamic_kv() -> None:
    # [T, H, D]
    x = torch.tensor(
        [
            [[1.27, -0.635, 0.01, 0.0], [0.0, 0.0, 0.0, 0.0]],
            [[-254.0, 2.0, 1.0, 3.0], [5e-7, 0.0, 0.0, -5e-7]],
        ]
    )
    codes, scale = reference.quantize_kv_dynamic(x)
    assert scale.shape == (2, 2, 1) and codes.dtype == torch.int8
    torch.testing.assert_close(scale[:, :, 0], torch.tensor([[0.01, 1.0], [2.0, 5e-7 / 127]]))
    # 63.5 and the halves 0.5 and 1.5 go to even; the empty head keeps code 0.
    assert codes[0].tolist() == [[127, -64, 1, 0], [0, 0, 0, 0]]
    assert codes[1].tolist() == [[-127, 1, 0, 2], [127, 0, 0, -127]]
    back = reference.dequantize_kv(codes, scale)
    assert ((back - x).abs() <= scale * (0.5 + 1e-5)).all()


def test_rms_norm() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    # mean of squares 12.5, plus 12.5, is 25
    y = reference.rms_norm(x, torch.tensor([2.0, 1.0], dtype=torch.float64), 0.0 + 12.5)
    torch.testing.assert_close(
        y, torch.tensor([[1.2, 0.8], [0.0, 0.0]], dtype=torch.float64), rtol=1e-15, atol=0
    )


CONFIG = DecoderConfig("llama", 64, 96, 1, 4, 2, 16, 10, 128, 1e-5, "silu", "float32")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_norm_activation_and_rotation_are_the_decoders(dtype: torch.dtype) -> None:
    # Both sides round a float32 result once (the decoder's activation in 16 bits, and its rotation
    # without compiled kernels, more often).
    eps = torch.finfo(dtype).eps
    x, weight = random(3, 64, dtype=dtype), random(64, seed=1, dtype=dtype)
    torch.testing.assert_close(
        reference.rms_norm(x, weight, 1e-5), normalize(CONFIG, x, weight), rtol=2 * eps, atol=eps
    )
    gate, up = random(3, 96, seed=2, dtype=dtype), random(3, 96, seed=3, dtype=dtype)
    torch.testing.assert_close(
        reference.silu_mul(gate, up), activate("silu", gate) * up, rtol=3 * eps, atol=eps
    )
    cos, sin = rotary_table(CONFIG, 5)
    q = random(1, 4, 5, 16, seed=4, dtype=dtype)
    turned = reference.rotary(q[0].transpose(0, 1), cos[:, :8], sin[:, :8]).transpose(0, 1)[None]
    torch.testing.assert_close(turned, rotate(q, cos, sin), rtol=3 * eps, atol=4 * eps)


def test_silu_mul_by_hand() -> None:
    gate, up, expected = torch.tensor(
        [
            [0.0, 1.0, -1.0, 100.0, -1000.0],
            [5.0, 2.0, 2.0, 0.5, 1.0],
            [0.0, 2 / (1 + math.exp(-1)), -2 / (1 + math.exp(1)), 50.0, 0.0],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(reference.silu_mul(gate, up), expected, rtol=1e-14, atol=0)


def test_rotary_by_hand() -> None:
    # [T, 1, 4]
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)
    angles = torch.tensor([[0.0, 0.0], [math.pi / 2, math.pi]], dtype=torch.float64)
    y = reference.rotary(x, angles.cos(), angles.sin())
    # (1, 3) turned by 90° is (-3, 1); (2, 4) turned by 180° is (-2, -4).
    torch.testing.assert_close(
        y[:, 0], torch.tensor([[1.0, 2.0, 3.0, 4.0], [-3.0, -2.0, 1.0, -4.0]], dtype=torch.float64)
    )


def test_rotary_keeps_lengths_and_relative_angles() -> None:
    cos, sin = (t[:, :8].double() for t in rotary_table(CONFIG, 12))
    q, k = (
        random(1, 1, 16, seed=5, dtype=torch.float64),
        random(1, 1, 16, seed=6, dtype=torch.float64),
    )

    def dot(i: int, j: int) -> float:
        return float(
            (
                reference.rotary(q, cos[i : i + 1], sin[i : i + 1])
                * reference.rotary(k, cos[j : j + 1], sin[j : j + 1])
            ).sum()
        )

    assert math.isclose(dot(3, 1), dot(10, 8), rel_tol=1e-5) and not math.isclose(
        dot(3, 1), dot(3, 2), rel_tol=1e-3
    )
