"""What is stored, and how q is rotated, against the oracles: codes are the same, but where the last
bit of a rotation makes it the next one."""

from __future__ import annotations

import pytest
import torch
from quantflow_kernels import reference
from quantflow_kernels.kv_store import bytes_moved, kv_store
from quantflow_kernels.paging import KVCache

from tests.helpers.devices import DEVICE, DTYPES

T, H, G, PAGE, BLOCKS = 7, 6, 2, 16, 5


def new(d: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v, cos, sin, slots."""
    generator = torch.Generator().manual_seed(d)
    q, k, v = (torch.randn(T, n, d, generator=generator).to(DEVICE, dtype) for n in (H, G, G))
    angle = torch.rand(T, d // 2, generator=generator).to(DEVICE) * 6
    slots = torch.randperm(BLOCKS * PAGE, generator=generator)[:T].to(DEVICE)
    return q, k, v, angle.cos(), angle.sin(), slots


def caches(kind: str, d: int, dtype: torch.dtype) -> KVCache:
    shape = (BLOCKS, G, PAGE, d)
    if kind == "plain":
        return KVCache(*(torch.full(shape, 99.0, dtype=dtype, device=DEVICE) for _ in range(2)))
    codes = [torch.full(shape, 99, dtype=torch.int8, device=DEVICE) for _ in range(2)]
    if kind == "token":
        return KVCache(*codes, *(torch.full(shape[:3], 99.0, device=DEVICE) for _ in range(2)))
    generator = torch.Generator().manual_seed(d + 1)
    per_key = (G,) if kind == "head" else (G, d)
    # Small enough that some values saturate.
    scales = [
        (torch.rand(s, generator=generator) * 0.01 + 0.005).to(DEVICE) for s in (per_key, (G, d))
    ]
    zeros = [torch.randn(s, generator=generator).to(DEVICE) * 0.3 for s in (per_key, (G, d))]
    return KVCache(*codes, *scales, *zeros)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [16, 20, 128])
@pytest.mark.parametrize("kind", ["plain", "head", "channel", "token"])
@pytest.mark.parametrize("rotate", [True, False])
def test_against_the_oracles(dtype: torch.dtype, d: int, kind: str, rotate: bool) -> None:
    q, k, v, cos, sin, slots = new(d, dtype)
    slots[3] = -1  # padding: nowhere
    cache, turned = caches(kind, d, dtype), q.clone()
    kv_store(turned, k, v, cos if rotate else None, sin if rotate else None, slots, cache)
    expected_q, expected_k = (reference.rotary(t, cos, sin) for t in (q, k)) if rotate else (q, k)
    last_bit = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(turned, expected_q, rtol=last_bit, atol=last_bit / 4)
    stored = slots >= 0
    assert int(stored.sum()) == T - 1
    if kind == "plain":
        for found, expected in ((cache.k, expected_k), (cache.v, v)):
            torch.testing.assert_close(
                reference_at(found, slots[stored]),
                expected[stored],
                rtol=last_bit,
                atol=last_bit / 4,
            )
        assert int((cache.k != 99).any(-1).sum()) == (T - 1) * G  # nothing else was touched
        return
    for name, codes, value, scale, zero in (
        ("k", cache.k, expected_k, cache.k_scale, cache.k_zero),
        ("v", cache.v, v, cache.v_scale, cache.v_zero),
    ):
        assert scale is not None
        if kind == "token":
            expected, scales = reference.quantize_kv_dynamic(value)
            torch.testing.assert_close(
                reference_at(scale[..., None], slots[stored]), scales[stored], rtol=1e-3, atol=0
            )
        else:
            expected = reference.quantize_kv(value, scale, zero)
            assert bool((expected.abs() >= 127).any()), (
                "no value saturates: the test tests less than it says"
            )
        difference = (reference_at(codes, slots[stored]).int() - expected[stored].int()).abs()
        # Rotation may end in the other neighbour of the dtype, and then in the next code; values
        # are not rotated.
        assert int(difference.max()) <= (1 if rotate and name == "k" else 0)
        assert float((difference > 0).float().mean()) < 0.02
        assert int((codes != 99).any(-1).sum()) == (T - 1) * G


def reference_at(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The entries `[T, G, …]` at `slots`."""
    return cache[slots // PAGE, :, slots % PAGE]


def test_halves_are_rounded_to_even() -> None:
    values = torch.tensor(
        [
            0.5,
            1.5,
            2.5,
            -0.5,
            -1.5,
            -2.5,
            127.5,
            126.5,
            -128.5,
            1000.0,
            -1000.0,
            0.0,
            3.49,
            3.51,
            -3.5,
            4.5,
        ]
    )
    k = values.to(DEVICE).half().view(1, 1, 16)
    one = KVCache(
        *(torch.zeros(1, 1, 16, 16, dtype=torch.int8, device=DEVICE) for _ in range(2)),
        torch.ones(1, device=DEVICE),
        torch.ones(1, 16, device=DEVICE),
    )
    kv_store(k.clone(), k, k, None, None, torch.zeros(1, dtype=torch.int64, device=DEVICE), one)
    expected = [0, 2, 2, 0, -2, -2, 127, 126, -128, 127, -128, 0, 3, 4, -4, 4]
    assert one.k[0, 0, 0].tolist() == expected and one.v[0, 0, 0].tolist() == expected


def test_a_head_of_zeros_gets_scale_one() -> None:
    zero = torch.zeros(1, 1, 16, device=DEVICE, dtype=torch.float16)
    cache = KVCache(
        *(torch.ones(1, 1, 16, 16, dtype=torch.int8, device=DEVICE) for _ in range(2)),
        *(torch.zeros(1, 1, 16, device=DEVICE) for _ in range(2)),
    )
    kv_store(
        zero.clone(),
        zero,
        zero,
        None,
        None,
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        cache,
    )
    assert (
        cache.k_scale is not None
        and float(cache.k_scale[0, 0, 0]) == 1.0
        and not bool(cache.k[0, 0, 0].any())
    )


def test_views_into_one_product() -> None:
    """q, k and v are slices of one tensor, as a fused projection gives them."""
    q, k, v, cos, sin, slots = new(16, torch.float16)
    fused = torch.cat([t.flatten(1) for t in (q, k, v)], dim=1)
    parts = [t.view(T, -1, 16) for t in fused.split([H * 16, G * 16, G * 16], dim=1)]
    a, b = caches("token", 16, torch.float16), caches("token", 16, torch.float16)
    kv_store(q, k, v, cos, sin, slots, a)
    kv_store(parts[0], parts[1], parts[2], cos, sin, slots, b)
    assert a.k.equal(b.k) and a.v.equal(b.v) and parts[0].equal(q)


def test_an_odd_head_dim_is_refused() -> None:
    k = torch.zeros(1, 1, 15, device=DEVICE, dtype=torch.float16)
    with pytest.raises(ValueError, match="head_dim 15 is odd"):
        kv_store(
            k,
            k,
            k,
            None,
            None,
            torch.zeros(1, dtype=torch.int64, device=DEVICE),
            caches("plain", 15, torch.float16),
        )


def test_roofline() -> None:
    assert bytes_moved(caches("token", 16, torch.float16), 3, H) == 3 * (
        2 * H * 16 * 2 + G * (2 * 16 * 3 + 8)
    )
