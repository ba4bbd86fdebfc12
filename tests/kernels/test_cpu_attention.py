"""The CPU's paged attention against a float64 oracle, and its store against the GPU's."""

from __future__ import annotations

import pytest
import torch
from quantflow_kernels import kv_store
from quantflow_kernels.cpu_attention import kv_store as cpu_store
from quantflow_kernels.cpu_attention import paged_attention
from quantflow_kernels.paging import make_batch

from tests.helpers.devices import DEVICE
from tests.kernels.test_attention import CACHES, SMALL, Case, case
from tests.kernels.test_kv_store import caches, new

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's path")


def attend(some: Case, *, exact: bool, window: int = 0, cap: float = 0.0) -> torch.Tensor:
    batch = make_batch(
        some.lengths, some.contexts, some.table, some.q.shape[1], some.cache.k.shape[1], SMALL
    )
    return paged_attention(some.q, some.cache, batch, some.scale, window, cap, exact=exact)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(
    ("lengths", "contexts"), [([1, 1, 1], [1, 257, 600]), ([5, 1, 300, 16], [5, 40, 530, 16])]
)
@pytest.mark.parametrize("window", [0, 1, 100])
def test_against_the_oracle(
    exact: bool, kind: str, lengths: list[int], contexts: list[int], window: int
) -> None:
    some = case(lengths, contexts, kind=kind, dtype=torch.float32)
    torch.testing.assert_close(
        attend(some, exact=exact, window=window).double(),
        some.expected(window),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_capped_scores(exact: bool, kind: str, cap: float) -> None:
    some = case([5, 1, 300, 16], [5, 40, 530, 16], kind=kind, dtype=torch.float32)
    torch.testing.assert_close(
        attend(some, exact=exact, window=100, cap=cap).double(),
        some.expected(100, cap),
        rtol=1e-5,
        atol=2e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(71, 1, 32), (6, 2, 20), (4, 4, 80)])
def test_shapes_and_dtypes(dtype: torch.dtype, heads: int, kv_heads: int, d: int) -> None:
    some = case([3, 1], [30, 17], heads=heads, kv_heads=kv_heads, d=d, kind="channel", dtype=dtype)
    last_bit = 2**-10 if dtype == torch.float16 else 2**-7
    for exact in (True, False):
        torch.testing.assert_close(
            attend(some, exact=exact).double(), some.expected(), rtol=last_bit, atol=1e-4
        )


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("window", [0, 70])
def test_in_exact_mode_a_querys_bits_do_not_depend_on_the_batch(kind: str, window: int) -> None:
    whole = case([43, 1, 7], [590, 270, 7], kind=kind, dtype=torch.bfloat16)
    found = attend(whole, exact=True, window=window)
    at = 0
    for s, length in enumerate(whole.lengths):
        for first, count in (
            (0, length),
            (0, 1),
            (length - 1, 1),
            (length // 3, length - length // 3),
        ):
            alone = attend(whole.sequence(s, first, count), exact=True, window=window)
            assert alone.equal(found[at + first : at + first + count])
        at += length


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["plain", "token"])
def test_what_lies_before_the_window_is_not_read(exact: bool, kind: str) -> None:
    some = case([1, 3], [590, 300], kind=kind, dtype=torch.float32)
    expected = some.expected(20)
    some.free_before(20)
    torch.testing.assert_close(
        attend(some, exact=exact, window=20).double(), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("rotate", [True, False])
def test_the_store_is_the_gpus(kind: str, rotate: bool) -> None:
    """Bit for bit but for the last bit of a rotation, and the code next to it."""
    q, k, v, cos, sin, slots = new(16, torch.float16)
    slots[2] = -1
    found, expected = caches(kind, 16, torch.float16), caches(kind, 16, torch.float16)
    turned, other = q.clone(), q.clone()
    cpu_store(turned, k, v, cos if rotate else None, sin if rotate else None, slots, found)
    kv_store.kv_store(
        other, k, v, cos if rotate else None, sin if rotate else None, slots, expected
    )
    torch.testing.assert_close(turned, other, rtol=2**-10, atol=2**-12)
    assert found.v.equal(expected.v)
    step = 1 if kind != "plain" else 2**-9
    assert float((found.k.float() - expected.k.float()).abs().max()) <= step
    if kind == "token" and found.v_scale is not None and expected.v_scale is not None:
        torch.testing.assert_close(found.v_scale, expected.v_scale, rtol=1e-6, atol=0)
