"""KV parameters and their rounding, against literals and loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.quant.kv import KVParameters, kv_parameters, round_kv


def test_asymmetric_by_hand() -> None:
    low, high = torch.tensor([[-62.0, -1.0]]), torch.tensor([[3.0, 65.5]])
    parameters = kv_parameters(low, high)
    assert (float(parameters.scale), float(parameters.zero_point), parameters.bounds) == (
        0.5,
        1.75,
        (-128, 127),
    )
    x = torch.tensor([-62.0, 65.5, 1.75, 2.0, 2.5, 2.25, 1e6, -1e6]).view(1, 1, 8, 1)
    # -127.5 goes to -128. 127.5 would go to 128, which is 127 at most. Halves go to even: 0.5 to 0,
    # 1.5 to 2.
    assert round_kv(x, parameters).flatten().tolist() == [
        -62.25,
        65.25,
        1.75,
        1.75,
        2.75,
        2.25,
        65.25,
        -62.25,
    ]


def test_symmetric_by_hand() -> None:
    parameters = kv_parameters(
        torch.tensor([[-254.0, 1.0]]), torch.tensor([[3.0, 7.0]]), symmetric=True
    )
    assert (float(parameters.scale), float(parameters.zero_point)) == (2.0, 0.0)
    x = torch.tensor([-254.0, 254.0, 0.0, 1.0, 3.0, 300.0, -300.0]).view(1, 1, 7, 1)
    assert round_kv(x, parameters).flatten().tolist() == [
        -254.0,
        254.0,
        0.0,
        0.0,
        4.0,
        254.0,
        -256.0,
    ]


def test_narrower_codes() -> None:
    parameters = kv_parameters(torch.tensor([[-7.5]]), torch.tensor([[7.5]]), bits=4)
    assert (float(parameters.scale), float(parameters.zero_point), parameters.bounds) == (
        1.0,
        0.0,
        (-8, 7),
    )
    assert round_kv(
        torch.tensor([-7.5, 7.5, 6.4]).view(1, 1, 3, 1), parameters
    ).flatten().tolist() == [-8.0, 7.0, 6.0]
    assert (
        float(
            kv_parameters(
                torch.tensor([[-14.0]]), torch.tensor([[7.0]]), bits=4, symmetric=True
            ).scale
        )
        == 2.0
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-20, 1e30])
def test_constant_channels(value: float, granularity: str, symmetric: bool) -> None:
    low = high = torch.full((2, 3), value)
    parameters = kv_parameters(low, high, symmetric=symmetric, granularity=granularity)
    assert (parameters.scale > 0).all() and parameters.scale.isfinite().all()
    x = torch.full((1, 2, 4, 3), value)
    torch.testing.assert_close(round_kv(x, parameters), x, rtol=1e-6, atol=1e-6 if symmetric else 0)


def test_granularities() -> None:
    low = torch.tensor([[-1.0, -2.0], [0.0, -8.0]])
    high = torch.tensor([[1.0, 6.0], [4.0, 0.0]])
    tensor, head, channel = (
        kv_parameters(low, high, granularity=g) for g in ("tensor", "head", "channel")
    )
    assert [p.scale.shape for p in (tensor, head, channel)] == [(), (2,), (2, 2)]
    assert all(
        p.scale.shape == p.zero_point.shape and p.scale.dtype == p.zero_point.dtype == torch.float32
        for p in (tensor, head, channel)
    )
    assert float(tensor.zero_point) == -1.0 and head.zero_point.tolist() == [2.0, -2.0]
    assert channel.zero_point.tolist() == [[0.0, 2.0], [2.0, -4.0]]
    torch.testing.assert_close(tensor.scale * 255, torch.tensor(14.0))
    torch.testing.assert_close(head.scale * 255, torch.tensor([8.0, 12.0]))
    torch.testing.assert_close(channel.scale * 255, torch.tensor([[2.0, 8.0], [4.0, 8.0]]))
    by_head = kv_parameters(low, high, granularity="head", symmetric=True)
    torch.testing.assert_close(by_head.scale * 127, torch.tensor([6.0, 8.0]))


def test_each_head_and_channel_gets_its_own_parameters() -> None:
    scale = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    zero = torch.arange(6.0).view(2, 3) / 8
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 5, 3, generator=generator) * 100
    for name, s, z in (
        ("channel", scale, zero),
        ("head", scale[:, 0], zero[:, 0]),
        ("tensor", scale[0, 0], zero[0, 0]),
    ):
        rounded = round_kv(x, KVParameters(8, s, z))
        for b in range(2):
            for h in range(2):
                for t in range(5):
                    for d in range(3):
                        at = {"channel": (h, d), "head": (h,), "tensor": ()}[name]
                        code = min(
                            max(round((float(x[b, h, t, d]) - float(z[at])) / float(s[at])), -128),
                            127,
                        )
                        assert math.isclose(
                            float(rounded[b, h, t, d]),
                            code * float(s[at]) + float(z[at]),
                            rel_tol=1e-6,
                            abs_tol=1e-6,
                        )


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(("tensor", "head", "channel")),
    st.booleans(),
    st.sampled_from((4, 8)),
    st.integers(0, 9999),
    st.floats(-3, 3),
    st.floats(-5, 5),
)
def test_the_round_trip_is_within_half_a_step(
    granularity: str, symmetric: bool, bits: int, seed: int, magnitude: float, shift: float
) -> None:
    x = (
        torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(seed)) + shift
    ) * 10**magnitude
    parameters = kv_parameters(
        x.amin((0, 2)), x.amax((0, 2)), bits=bits, symmetric=symmetric, granularity=granularity
    )
    step = (
        parameters.scale.view(
            1, *parameters.scale.shape[:1], 1, *(parameters.scale.shape[1:] or (1,))
        )
        if parameters.scale.ndim
        else parameters.scale
    )
    rounded = round_kv(x, parameters)
    assert ((rounded - x).abs() <= step * (0.5 + 1e-3)).all()
    # And 2^bits codes at most.
    assert len(torch.unique(rounded[:, 0, :, 0])) <= 2**bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_caches_are_rounded_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(0)) + 3).to(dtype)
    parameters = kv_parameters(x.amin((0, 2)), x.amax((0, 2)))
    rounded = round_kv(x, parameters)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, round_kv(x.float(), parameters).to(dtype))
