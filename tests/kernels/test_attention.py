"""Paged attention against a float64 oracle, and that a query's bits do not depend on how it is
computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from quantflow_kernels import configs, reference
from quantflow_kernels.attention import bytes_moved, paged_attention
from quantflow_kernels.configs import AttentionConfig as Config
from quantflow_kernels.paging import KVCache, decode_batch, make_batch, splits_of

from tests.helpers.devices import DEVICE, DTYPES

SMALL = Config(tile=16, split=32)
CACHES = ["plain", "head", "channel", "token"]
# Probabilities are rounded to the queries' dtype, and so are queries that a scale a channel is
# folded into.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@dataclass(frozen=True)
class Case:
    """q `[T, H, D]`, the cache, what it stands for in float64 `[blocks, G, B, D]`, and the
    sequences."""

    q: torch.Tensor
    cache: KVCache
    table: torch.Tensor
    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    k: torch.Tensor
    v: torch.Tensor

    def expected(self, window: int = 0, cap: float = 0.0) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        for s, (length, context) in enumerate(zip(self.lengths, self.contexts, strict=True)):
            start = sum(self.lengths[:s])
            k, v = (reference.pages(t, self.table[s], context) for t in (self.k, self.v))
            at = torch.arange(context - length, context, device=DEVICE)
            parts.append(
                reference.attention(
                    self.q[start : start + length].double(), k, v, at, self.scale, window, cap
                )
            )
        return torch.cat(parts)

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)

    def run(
        self,
        config: Config = SMALL,
        *,
        window: int = 0,
        cap: float = 0.0,
        parts: bool | None = None,
    ) -> torch.Tensor:
        batch = make_batch(
            self.lengths, self.contexts, self.table, self.q.shape[1], self.cache.k.shape[1], config
        )
        return paged_attention(
            self.q, self.cache, batch, self.scale, config, window, cap, parts=parts
        )

    def free_before(self, window: int) -> None:
        """Puts NaN into the blocks that lie wholly before the windows of their sequence's
        queries."""
        held = (
            (self.cache.k, self.cache.v)
            if self.cache.k.is_floating_point()
            else (self.cache.k_scale, self.cache.v_scale)
        )
        page = self.cache.k.shape[2]
        for s, (length, context) in enumerate(zip(self.lengths, self.contexts, strict=True)):
            blocks = self.table[s, : max(0, context - length - window + 1) // page].long()
            for tensor in held:
                assert tensor is not None
                tensor[blocks] = torch.nan

    def sequence(self, s: int, first: int, count: int) -> Case:
        """Queries `[first, first + count)` of sequence `s` alone, later keys out of sight."""
        start, context = (
            sum(self.lengths[:s]) + first,
            self.contexts[s] - self.lengths[s] + first + count,
        )
        return Case(
            self.q[start : start + count],
            self.cache,
            self.table[s : s + 1],
            (count,),
            (context,),
            self.k,
            self.v,
        )


def case(
    lengths: Sequence[int],
    contexts: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 16,
    page: int = 16,
    kind: str = "plain",
    dtype: torch.dtype = torch.float16,
) -> Case:
    generator = torch.Generator().manual_seed(sum(contexts) + heads)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator).to(DEVICE) * 0.02 + 1e-3

    needed = [-(-c // page) for c in contexts]
    blocks = sum(needed) + 3
    order = torch.randperm(blocks, generator=generator).to(DEVICE, torch.int32)
    # past its end: not to be read
    table = torch.full((len(contexts), max(needed)), -(10**6), dtype=torch.int32, device=DEVICE)
    for s, n in enumerate(needed):
        table[s, :n] = order[sum(needed[:s]) : sum(needed[:s]) + n]
    shape = (blocks, kv_heads, page, d)
    if kind == "plain":
        k, v = normal(*shape).to(dtype), normal(*shape).to(dtype)
        cache, wide = KVCache(k, v), (k.double(), v.double())
    else:
        k, v = (
            torch.randint(-128, 128, shape, generator=generator).to(DEVICE, torch.int8)
            for _ in range(2)
        )
        if kind == "token":
            ks, vs = uniform(*shape[:3]), uniform(*shape[:3])
            cache, wide = (
                KVCache(k, v, ks, vs),
                (k.double() * ks[..., None], v.double() * vs[..., None]),
            )
        else:
            ks = uniform(kv_heads) if kind == "head" else uniform(kv_heads, d)
            kz, vs, vz = normal(*ks.shape), uniform(kv_heads, d), normal(kv_heads, d)
            cache = KVCache(k, v, ks, vs, kz, vz)
            folded, shift = (t[:, None, None] if kind == "head" else t[:, None] for t in (ks, kz))
            wide = (k.double() * folded + shift, v.double() * vs[:, None] + vz[:, None])
    # Blocks that no sequence has, and the slots after a sequence's last token, hold what is not to
    # be used.
    unused = [(slice(None), order[sum(needed) :].long(), slice(None))]
    unused += [
        (slice(None), table[s, n - 1].long(), slice((c - 1) % page + 1, None))
        for s, (n, c) in enumerate(zip(needed, contexts, strict=True))
    ]
    for tensor in (
        (cache.k, cache.v)
        if kind == "plain"
        else (cache.k_scale, cache.v_scale)
        if kind == "token"
        else ()
    ):
        assert tensor is not None
        for heads_, blocks_, slots in unused:
            tensor.transpose(0, 1)[heads_, blocks_, slots] = torch.nan
    q = normal(sum(lengths), heads, d).to(dtype)
    return Case(q, cache, table, tuple(lengths), tuple(contexts), *wide)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    bound = TOLERANCE[found.dtype] * max(1.0, float(expected.abs().max()))
    assert float((found.double() - expected).abs().max()) <= bound  # NaN fails too


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CACHES)
def test_prefill_and_decode(dtype: torch.dtype, kind: str) -> None:
    mixed = case([5, 1, 20, 16], [5, 40, 70, 16], kind=kind, dtype=dtype)
    assert_close(mixed.run(), mixed.expected())
    decode = case([1, 1, 1], [1, 33, 100], kind=kind, dtype=dtype)
    assert_close(decode.run(), decode.expected())


@pytest.mark.parametrize("context", [1, 15, 16, 17, 31, 32, 33, 64])
@pytest.mark.parametrize("kind", ["plain", "token"])
def test_contexts_around_block_and_split_edges(context: int, kind: str) -> None:
    one = case([1], [context], kind=kind)
    assert_close(one.run(), one.expected())


@pytest.mark.parametrize("kind", ["plain", "channel"])
@pytest.mark.parametrize("contexts", [[1], [33, 1, 100], [64, 65]])
def test_a_decode_with_room_to_spare_has_the_same_bits(contexts: list[int], kind: str) -> None:
    """As a CUDA graph runs it: rows too many, of one key each, a wider table, and more splits than
    the longest context has."""
    some = case([1] * len(contexts), contexts, kind=kind)
    rows, spare = len(contexts), 2
    table = torch.full(
        (rows + spare, some.table.shape[1] + 3), -(10**6), dtype=torch.int32, device=DEVICE
    )
    table[:rows, : some.table.shape[1]], table[rows:, 0] = some.table, some.table[0, 0]
    batch = decode_batch(
        table,
        torch.tensor([*contexts, *[1] * spare], dtype=torch.int32, device=DEVICE),
        splits_of(max(contexts), SMALL) + 3,
    )
    q = torch.cat((some.q, some.q[:1].expand(spare, -1, -1)))
    found = paged_attention(q, some.cache, batch, some.scale, SMALL)
    assert found[:rows].equal(some.run())
    assert found[rows:].isfinite().all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d"),
    [(1, 1, 16), (71, 1, 32), (6, 2, 64), (4, 4, 20), (8, 1, 80), (2, 1, 8)],
)
@pytest.mark.parametrize("lengths", [[1, 1], [3, 9]])
def test_shapes_of_heads(heads: int, kv_heads: int, d: int, lengths: list[int]) -> None:
    some = case(lengths, [20, 37], heads=heads, kv_heads=kv_heads, d=d, kind="channel")
    assert_close(some.run(), some.expected())


@pytest.mark.parametrize("page", [16, 32, 128])
def test_block_sizes(page: int) -> None:
    some = case([1, 4], [50, 140], page=page, kind="head")
    assert_close(some.run(), some.expected())


@pytest.mark.parametrize("window", [1, 7, 16, 40, 1000])
@pytest.mark.parametrize("lengths", [[1, 1], [9, 30]])
def test_sliding_window(window: int, lengths: list[int]) -> None:
    some = case(lengths, [90, 33], kind="token")
    assert_close(some.run(window=window), some.expected(window))


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("window", [0, 25])
def test_a_querys_bits_do_not_depend_on_the_batch(kind: str, window: int) -> None:
    """Together or alone, in one chunk or token by token, split over programs or not."""
    whole = case([23, 1, 7], [90, 70, 7], kind=kind)
    found = whole.run(window=window)
    assert whole.run(window=window, parts=True).equal(found)
    at = 0
    for s, length in enumerate(whole.lengths):
        alone = whole.sequence(s, 0, length)
        assert alone.run(window=window).equal(found[at : at + length])
        for first, count in ((0, 1), (length - 1, 1), (length // 3, length - length // 3)):
            expected = found[at + first : at + first + count]
            for parts in (False, True):
                assert (
                    whole.sequence(s, first, count).run(window=window, parts=parts).equal(expected)
                )
        at += length


@pytest.mark.parametrize("kind", ["plain", "token"])
@pytest.mark.parametrize("parts", [True, False])
def test_what_lies_before_the_window_is_not_read(kind: str, parts: bool) -> None:
    """Its blocks may have been freed, and hold another sequence's, or nothing that is a number."""
    some = case([1, 3], [200, 100], kind=kind)
    expected = some.expected(20)
    some.free_before(20)
    # a tile spans several freed blocks
    assert_close(some.run(Config(tile=64, split=128), window=20, parts=parts), expected)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_capped_scores(kind: str, window: int, cap: float) -> None:
    """A cap that most scores pass, and one that few do; a zero point of K counts before it."""
    some = case([5, 1, 20], [5, 40, 70], kind=kind)
    assert_close(some.run(window=window, cap=cap), some.expected(window, cap))
    assert some.run(window=window, cap=cap, parts=True).equal(
        some.run(window=window, cap=cap, parts=False)
    )


def test_queries_that_are_a_view_of_a_fused_product() -> None:
    some = case([5, 1], [40, 33], kind="head")
    t, heads, d = some.q.shape
    fused = torch.full((t, (heads + 4) * d), torch.nan, dtype=some.q.dtype, device=DEVICE)
    view = fused[:, : heads * d].view(t, heads, d)
    view.copy_(some.q)
    assert replace(some, q=view).run().equal(some.run())
    with pytest.raises(ValueError, match="not contiguous"):
        replace(some, q=some.q.transpose(0, 1).contiguous().transpose(0, 1)).run()


def test_small_scales_of_single_tokens_are_not_lost() -> None:
    """One key takes most of the attention and has no value; the others' probabilities, e^-8, times
    a scale of 1e-5 are smaller than float16 holds, and their sum is the whole output."""
    context, d, page = 900, 16, 16
    blocks = -(-context // page)
    k = torch.zeros(blocks, 1, page, d, dtype=torch.int8, device=DEVICE)
    v = torch.full_like(k, 100)
    k[0, 0, 0], v[0, 0, 0] = 100, 0
    # a score of 8 for q of ones
    k_scale = torch.full((blocks, 1, page), 8 / (100 * d**0.5), device=DEVICE)
    cache = KVCache(k, v, k_scale, torch.full_like(k_scale, 1e-5))
    table = torch.arange(blocks, dtype=torch.int32, device=DEVICE)[None]
    q = torch.ones(1, 1, d, dtype=torch.float16, device=DEVICE)
    found = paged_attention(
        q, cache, make_batch([1], [context], table, 1, 1, SMALL), d**-0.5, SMALL
    )
    expected = 100 * 1e-5 * (context - 1) / (math.exp(8) + context - 1)
    assert found.flatten().tolist() == pytest.approx([expected] * d, rel=0.01)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter would take minutes")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("window", [0, 700])
def test_the_shipped_tiles(dtype: torch.dtype, kind: str, window: int) -> None:
    config = configs.tuned(torch.cuda.get_device_name()).attention
    for lengths, contexts in (
        ([1] * 6, [511, 512, 513, 1025, 1100, 64]),
        ([300, 1, 77], [1100, 513, 77]),
    ):
        some = case(lengths, contexts, heads=32, kv_heads=8, d=128, kind=kind, dtype=dtype)
        found = some.run(config, window=window)
        assert_close(found, some.expected(window))
        assert some.run(config, window=window, parts=True).equal(
            some.run(config, window=window, parts=False)
        )


def test_scores_far_apart_do_not_overflow() -> None:
    some = case([1, 5], [40, 40], dtype=torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    loud = replace(some, q=some.q * 1000)
    assert_close(loud.run(), loud.expected())


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    some = case([5, 1], [40, 40], heads=3, kv_heads=1, d=20)
    empty = torch.empty

    def poisoned(*shape: int, **options: object) -> torch.Tensor:
        found = empty(*shape, **options)  # type: ignore[call-overload]
        return found.fill_(torch.nan) if found.is_floating_point() else found

    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, torch.nan))
    monkeypatch.setattr(torch, "empty", poisoned)
    for parts in (False, True):
        assert_close(some.run(parts=parts), some.expected())


def test_no_queries() -> None:
    some = case([1], [20])
    assert replace(some, q=some.q[:0], lengths=(), contexts=()).run().shape == (0, 4, 16)


def test_an_int8_cache_needs_scales() -> None:
    some = case([1], [20], kind="head")
    with pytest.raises(ValueError, match="needs k_scale"):
        replace(some, cache=KVCache(some.cache.k, some.cache.v)).run()


def test_roofline() -> None:
    some = case([1], [20], heads=4, kv_heads=2, d=16, kind="token")
    assert bytes_moved(some.cache, [20, 30], 4, 2) == 50 * 2 * (2 * 16 + 8) + 2 * 2 * 4 * 16 * 2
