"""The compiled kernels of the CPU against the oracles, bit for bit the same whatever the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantflow_kernels import cpu_attention, cpu_kernels, reference
from quantflow_kernels.paging import KVCache, make_batch

from tests.helpers.devices import DEVICE
from tests.kernels.test_attention import CACHES, SMALL, Case, case
from tests.kernels.test_kv_store import caches, new

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's path"),
    pytest.mark.skipif(
        cpu_kernels.library()[0] is None, reason=f"no compiled kernels: {cpu_kernels.library()[1]}"
    ),
]


def attend(some: Case, *, window: int = 0, cap: float = 0.0) -> torch.Tensor:
    batch = make_batch(
        some.lengths, some.contexts, some.table, some.q.shape[1], some.cache.k.shape[1], SMALL
    )
    return cpu_kernels.paged_attention(some.q, some.cache, batch, some.scale, window, cap)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(
    ("lengths", "contexts"), [([1, 1, 1], [1, 257, 600]), ([5, 1, 300, 16], [5, 40, 530, 16])]
)
@pytest.mark.parametrize("window", [0, 1, 100])
def test_attention_against_the_oracle(
    kind: str, lengths: list[int], contexts: list[int], window: int
) -> None:
    some = case(lengths, contexts, kind=kind, dtype=torch.float32)
    torch.testing.assert_close(
        attend(some, window=window).double(), some.expected(window), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d"), [(71, 1, 32), (6, 2, 20), (4, 4, 80), (8, 2, 256), (3, 3, 2)]
)
def test_shapes_and_dtypes(dtype: torch.dtype, heads: int, kv_heads: int, d: int) -> None:
    some = case([3, 1], [30, 17], heads=heads, kv_heads=kv_heads, d=d, kind="channel", dtype=dtype)
    last_bit = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(attend(some).double(), some.expected(), rtol=last_bit, atol=1e-4)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("window", [0, 70])
def test_a_querys_bits_do_not_depend_on_the_batch(kind: str, window: int) -> None:
    whole = case([43, 1, 7], [590, 270, 7], kind=kind, dtype=torch.float32)
    found = attend(whole, window=window)
    at = 0
    for s, length in enumerate(whole.lengths):
        for first, count in (
            (0, length),
            (0, 1),
            (length - 1, 1),
            (length // 3, length - length // 3),
        ):
            alone = attend(whole.sequence(s, first, count), window=window)
            assert alone.equal(found[at + first : at + first + count])
        at += length


@pytest.mark.parametrize("kind", ["plain", "token"])
def test_what_no_query_sees_is_not_read(kind: str) -> None:
    some = case([1, 3], [590, 300], kind=kind, dtype=torch.float32)
    expected = some.expected(20)
    some.free_before(20)
    torch.testing.assert_close(attend(some, window=20).double(), expected, rtol=1e-5, atol=1e-5)
    if kind == "plain":  # what lies behind the context, in its last block
        page = some.cache.k.shape[2]
        for s, context in enumerate(some.contexts):
            for part in (some.cache.k, some.cache.v):
                part[some.table[s, (context - 1) // page], :, (context - 1) % page + 1 :] = (
                    torch.nan
                )
        torch.testing.assert_close(attend(some, window=20).double(), expected, rtol=1e-5, atol=1e-5)


def test_large_and_equal_scores() -> None:
    """Scores of hundreds, all alike or far apart: the softmax neither overflows nor loses its
    sum."""
    some = case([1], [130], kind="plain", dtype=torch.float32)
    some.q.mul_(100)
    torch.testing.assert_close(attend(some).double(), some.expected(), rtol=1e-4, atol=1e-4)
    some.q.zero_()
    torch.testing.assert_close(attend(some).double(), some.expected(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("rotate", [True, False])
def test_the_store_is_the_plain_one(dtype: torch.dtype, kind: str, rotate: bool) -> None:
    """Bit for bit but for the last bit of a rotation, and the code next to it."""
    q, k, v, cos, sin, slots = new(16, dtype)
    slots = slots.long()
    slots[2] = -1
    found, expected = caches(kind, 16, dtype), caches(kind, 16, dtype)
    turned, other = q.clone(), q.clone()
    angles = (cos, sin) if rotate else (None, None)
    cpu_kernels.kv_store(turned, k, v, *angles, slots, found)
    cpu_attention.kv_store(other, k, v, *angles, slots, expected)
    last = 2**-7 if dtype == torch.bfloat16 else 2**-20
    torch.testing.assert_close(turned, other, rtol=last, atol=last / 16)
    assert found.v.equal(expected.v)
    assert float((found.k.float() - expected.k.float()).abs().max()) <= (
        1 if kind != "plain" else 4 * last
    )
    if kind == "token" and found.v_scale is not None and expected.v_scale is not None:
        assert found.v_scale.equal(expected.v_scale)


def test_the_store_takes_views_into_one_product_and_rounds_halves_to_even() -> None:
    qkv = torch.zeros(2, 4 * 8)
    qkv[0, 24:32] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 127.5, -128.5, 300.0])
    q, k, v = (t.unflatten(1, (-1, 8)) for t in qkv.split([16, 8, 8], dim=1))
    one, none, codes = (
        torch.ones(1, 8),
        torch.zeros(1, 8),
        torch.zeros(2, 1, 1, 16, 8, dtype=torch.int8),
    )
    cache = KVCache(codes[0], codes[1], one[:, 0], one, none[:, 0], none)
    cpu_kernels.kv_store(q, k, v, None, None, torch.tensor([3, -1]), cache)
    assert cache.v[0, 0, 3].tolist() == [0, 2, 2, 0, -2, 127, -128, 127]
    assert int(cache.v.int().abs().sum()) == 388  # nothing else was written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [16, 172, 2048])
@pytest.mark.parametrize("added", [False, True])
def test_the_norm(dtype: torch.dtype, k: int, added: bool) -> None:
    generator = torch.Generator().manual_seed(k)
    x, residual = (torch.randn(5, k, generator=generator).mul(3).to(dtype) for _ in range(2))
    weight = torch.randn(k, generator=generator)
    summed = (x + residual) if added else x
    rest = residual.clone() if added else None
    found = cpu_kernels.rms_norm(x, weight, 1e-5, rest)
    expected = reference.rms_norm(summed.double(), weight, 1e-5)
    torch.testing.assert_close(
        found.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )
    if rest is not None:
        assert rest.equal(summed)
    for row in range(5):
        alone = cpu_kernels.rms_norm(
            x[row : row + 1], weight, 1e-5, residual[row : row + 1].clone() if added else None
        )
        assert alone.equal(found[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [16, 172, 5632])
def test_silu(dtype: torch.dtype, k: int) -> None:
    both = torch.randn(7, 2 * k, generator=torch.Generator().manual_seed(k)).mul(20).to(dtype)
    both[0, :4] = torch.tensor([-1e4, 1e4, -88.5, 0.0])
    found = cpu_kernels.silu_mul(*both.chunk(2, dim=-1))
    expected = reference.silu_mul(both[:, :k].double(), both[:, k:].double())
    torch.testing.assert_close(
        found.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-30
    )
    assert all(
        cpu_kernels.silu_mul(*both[row : row + 1].chunk(2, dim=-1)).equal(found[row : row + 1])
        for row in range(7)
    )


def test_without_a_compiler_the_reason_is_said(tmp_path: Path) -> None:
    code = (
        "from quantflow_kernels import cpu_kernels; import torch; print(cpu_kernels.library()[1],"
        " cpu_kernels.supports(torch.float32))"
    )
    environment = {**os.environ, "CC": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "no C compiler (no-such-compiler)" in done.stdout and done.stdout.strip().endswith(
        "False"
    )
    assert "plain torch operations are used" in done.stderr


def test_a_norm_of_other_shapes_is_refused() -> None:
    x, weight = torch.zeros(2, 32), torch.ones(32)
    for wrong in (weight[:8], torch.ones(64)[::2], weight.double()):
        with pytest.raises(ValueError, match=r"expected contiguous rows, float32 \[32\]"):
            cpu_kernels.rms_norm(x, wrong, 1e-5)
    for rest in (torch.zeros(1, 32), torch.zeros(2, 32).bfloat16(), torch.zeros(32, 2).T):
        with pytest.raises(ValueError, match="residual"):
            cpu_kernels.rms_norm(x, weight, 1e-5, rest)


def test_a_broken_library_is_compiled_anew(tmp_path: Path) -> None:
    code = (
        "from quantflow_kernels import cpu_library, cpu_solver as c; p ="
        " cpu_library.built(c.SOURCE); {}; print(c.library()[1])"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    for what in ("p.write_bytes(b'')", "p.write_bytes(p.read_bytes()[:100])"):
        command = [sys.executable, "-c", code.format(what)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=True
        )
        assert done.stdout == "\n" and not done.stderr


def test_options_of_the_compiler_are_part_of_the_name(tmp_path: Path) -> None:
    code = (
        "from quantflow_kernels import cpu_library, cpu_solver;"
        " print(cpu_library.built(cpu_solver.SOURCE).name)"
    )
    names = set()
    for options in ("", " -mno-avx512f", " -O1"):
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CC": f"gcc{options}"}
        names.add(
            subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
                check=True,
            ).stdout
        )
    assert len(names) == 3


def test_the_library_is_compiled_once_and_kept(tmp_path: Path) -> None:
    code = (
        "from quantflow_kernels import cpu_kernels, cpu_library;"
        " print(cpu_library.built(cpu_kernels.SOURCE))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    places = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert places[0] == places[1]
    assert [p.name for p in (tmp_path / "quantflow").iterdir()] == [Path(places[0].strip()).name]


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_capped_scores(kind: str, cap: float) -> None:
    """A zero point of K counts before the cap."""
    some = case([5, 1, 90, 16], [5, 40, 230, 16], kind=kind, dtype=torch.float32)
    torch.testing.assert_close(
        attend(some, window=100, cap=cap).double(), some.expected(100, cap), rtol=1e-5, atol=2e-5
    )
