"""The quantised product against a float64 oracle, and that a row's bits do not depend on what else
there is."""

from __future__ import annotations

import re

import pytest
import torch
from quantflow_kernels import configs, reference
from quantflow_kernels.configs import MatmulConfig as Config
from quantflow_kernels.layout import PER_CHANNEL, PackedWeight, pack
from quantflow_kernels.matmul import SPLIT_TOKENS, assembly, bytes_moved, matmul, operations

from tests.helpers.devices import DEVICE, DTYPES
from tests.kernels.test_layout import weight

# Of a float32 sum rounded to the dtype: its last bit, and for float32 the sum's own rounding.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def operands(
    n: int, k: int, m: int, bits: int, group: int, dtype: torch.dtype
) -> tuple[torch.Tensor, PackedWeight, torch.Tensor]:
    """x, the packed weight, and the product in float64."""
    codes, scales, zeros = (t.to(DEVICE) for t in weight(n, k, bits, group))
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(DEVICE, dtype)
    expected = reference.w4a16_matmul(x.double(), codes, scales.double(), zeros, group)
    return x, pack(codes, scales, zeros, group, bits), expected


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and bool(found.isfinite().all())
    # An element's error is that of the sum it stands at the end of, so relative to the typical
    # magnitude and to its own.
    bound = TOLERANCE[found.dtype] * (expected.abs() + expected.square().mean().sqrt())
    assert bool(((found.double() - expected).abs() <= bound).all()), float(
        ((found.double() - expected).abs() / bound).max()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, PER_CHANNEL])
def test_widths_and_groups(dtype: torch.dtype, bits: int, group: int) -> None:
    x, packed, expected = operands(40, 384, 3, bits, group, dtype)
    assert_close(matmul(x, packed, None, Config(16, 16)), expected)


@pytest.mark.parametrize("m", [1, 2, 7, 15, 16, 17, 33, 64, 65])
def test_numbers_of_tokens(m: int) -> None:
    x, packed, expected = operands(24, 128, m, 4, 64, torch.float16)
    assert_close(matmul(x, packed, None, Config(16, 16)), expected)


@pytest.mark.parametrize(
    ("n", "k", "group"),
    [
        (1, 32, 32),
        (17, 96, 32),
        (33, 100, PER_CHANNEL),
        (19, 320, 64),
        (16, 2304, 256),
        (5, 2048, 1024),
    ],
)
@pytest.mark.parametrize("split", [1, 3])
def test_awkward_shapes(n: int, k: int, group: int, split: int) -> None:
    """N and K that fill no tile, one group, groups longer than a block, more splits than blocks."""
    x, packed, expected = operands(n, k, 2, 4, group, torch.float16)
    assert_close(matmul(x, packed, None, Config(16, 16, split)), expected)


def test_bias_and_leading_dimensions() -> None:
    x, packed, expected = operands(24, 128, 6, 4, 64, torch.float16)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for split in (1, 2):
        found = matmul(x.view(2, 3, 128), packed, bias.half(), Config(16, 16, split))
        assert_close(found.view(6, 24), expected + bias.half().double())


def test_rows_that_are_not_contiguous() -> None:
    x, packed, expected = operands(24, 128, 6, 4, 64, torch.float16)
    wide = torch.full((6, 200), torch.nan, dtype=x.dtype, device=DEVICE)
    wide[:, 8:136] = x
    assert_close(matmul(wide[:, 8:136], packed, None, Config(16, 16)), expected)
    assert_close(matmul(x.T.contiguous().T, packed, None, Config(16, 16)), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_extreme_codes(bits: int) -> None:
    """All codes and zero points at their ends: the products are exact integers."""
    for code, zero in ((0, 2**bits - 1), (2**bits - 1, 0)):
        codes = torch.full((16, 64), code, dtype=torch.uint8, device=DEVICE)
        packed = pack(
            codes,
            torch.ones(16, 1, device=DEVICE),
            torch.full((16, 1), zero, dtype=torch.uint8, device=DEVICE),
            64,
            bits,
        )
        found = matmul(
            torch.ones(1, 64, device=DEVICE, dtype=torch.float16), packed, None, Config(16, 16)
        )
        assert found.equal(torch.full_like(found, float(torch.tensor(64.0 * (code - zero)).half())))


def test_a_sum_larger_than_float16_is_infinite_and_its_neighbours_are_not() -> None:
    codes = torch.zeros(2, 64, dtype=torch.uint8, device=DEVICE)
    scales = torch.tensor([[3e4], [1.0]], device=DEVICE)
    # every weight is minus its scale
    packed = pack(codes, scales, torch.ones(2, 1, dtype=torch.uint8, device=DEVICE), 64, 4)
    found = matmul(
        torch.ones(1, 64, device=DEVICE, dtype=torch.float16), packed, None, Config(16, 16)
    )
    assert found.tolist() == [[-torch.inf, -64.0]]


@pytest.mark.parametrize("split", [1, 4])
def test_a_rows_bits_depend_on_that_row_alone(split: int) -> None:
    """Over enough blocks that another order of summing would show, in an output that shows it."""
    dtype = torch.float32 if DEVICE == "cpu" else torch.float16
    x, packed, _ = operands(40, 2304, 37, 4, 64, dtype)
    config = Config(16, 16, split)
    whole = matmul(x, packed, None, config)
    if DEVICE == "cpu":
        assert not whole.equal(matmul(x, packed, None, Config(16, 16, 5 - split))), (
            "the order does not show"
        )
    for m in (1, 2, 16, 17):
        assert matmul(x[:m], packed, None, config).equal(whole[:m])
    mixed = x.clone()
    mixed[::2] = torch.inf
    assert matmul(mixed, packed, None, config)[1::2].equal(whole[1::2])


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter would take minutes")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, PER_CHANNEL])
def test_the_shipped_regimes(dtype: torch.dtype, bits: int, group: int) -> None:
    """Every regime, over many blocks and a tail, with rows and tokens that fill no tile."""
    found = configs.tuned(torch.cuda.get_device_name())
    k = 2000 if group == PER_CHANNEL else 1536 + max(group, 32)
    for config in dict.fromkeys([found.exact, *(config for _, config in found.fast)]):
        for m in (1, 17, 100):
            x, packed, expected = operands(200, k, m, bits, group, dtype)
            assert_close(matmul(x, packed, None, config), expected)


def test_no_tokens() -> None:
    x, packed, _ = operands(24, 128, 1, 4, 64, torch.float16)
    assert matmul(x[:0], packed, None, Config(16, 16)).shape == (0, 24)


def test_a_wrong_number_of_channels_is_refused() -> None:
    x, packed, _ = operands(24, 128, 1, 4, 64, torch.float16)
    with pytest.raises(ValueError, match="64 input channels, the weight 128"):
        matmul(x[:, :64], packed, None, Config(16, 16))


@pytest.mark.parametrize(
    ("magic", "dtype", "bits"),
    [(128, torch.bfloat16, 4), (1024, torch.float16, 4), (1024, torch.float16, 8)],
)
def test_the_assembly(magic: int, dtype: torch.dtype, bits: int) -> None:
    """Its steps, carried out by torch for all codes and zero points at every place in a word, give
    `code - zero` exactly."""
    for shift in range(0, 16, bits):
        text = assembly(shift, 2**bits - 1, magic)
        found = re.search(
            r"shr.b32 t, \$1, (\d+); lop3.b32 t, t, (\d+), (\d+), 0xEA; mov.b32 one, (\d+);"
            r" fma.rn.(b?f16)x2 \$0, t, one, \$2;",
            text,
        )
        assert found and found[5] == {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
        by, mask, base, one = (int(v) for v in found.groups()[:4])
        generator = torch.Generator().manual_seed(shift)
        # two words each, as a register holds them
        words = torch.randint(0, 2**32, (500,), generator=generator)
        result = (words >> by) & mask | base
        assert (
            one & 0xFFFF == one >> 16
            and float(torch.tensor([one & 0xFFFF], dtype=torch.int16).view(dtype)) == 1.0
        )
        for half in (0, 16):
            codes = (words >> (half + shift)) & (2**bits - 1)
            for zero in (0, 1, 2 ** (bits - 1), 2**bits - 1):
                pattern = ((result >> half) & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype)
                offset = torch.tensor(-magic - zero, dtype=torch.float32).to(dtype)
                assert (pattern + offset).double().equal((codes - zero).double())


def test_roofline() -> None:
    _, packed, _ = operands(256, 512, 1, 4, 128, torch.float16)
    assert bytes_moved(packed, 3) == 256 * 512 // 2 + 256 * 4 * (4 + 1) + 3 * (512 + 256) * 2
    assert operations(packed, 3) == 2 * 3 * 256 * 512


def test_splits_are_the_weights_own() -> None:
    """As many programs as are wanted for one tile of tokens, never more splits than blocks, and
    never less than one block a split."""
    wanted = Config(64, 16, programs=256)
    assert wanted.blocks_a_split(4096, 16) == 4  # 64 tiles of rows, 4 splits
    assert wanted.blocks_a_split(6144, 16) == 6  # 96 tiles, 3 splits of at most 6 blocks
    assert wanted.blocks_a_split(28672, 16) == 16  # 448 tiles are enough
    assert wanted.blocks_a_split(16, 3) == 1  # one tile, three blocks
    assert Config(64, 16, split=3).blocks_a_split(28672, 16) == 6


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("k", "group"), [(2304, 64), (160, 32), (100, PER_CHANNEL), (512, 128)])
def test_scales_that_are_loaded_ahead(k: int, group: int, ahead: bool) -> None:
    """In blocks that K does not fill too, and over a split."""
    x, packed, expected = operands(40, k, 3, 4, group, torch.float16)
    for split in (1, 3):
        found = matmul(x, packed, None, Config(16, 16, split, ahead=ahead))
        assert_close(found, expected)
        assert found.equal(matmul(x, packed, None, Config(16, 16, split)))


def test_many_tokens_over_a_split_go_some_at_a_time() -> None:
    x, packed, expected = operands(8, 512, SPLIT_TOKENS + 3, 4, 128, torch.float16)
    bias = torch.arange(8, device=DEVICE).half()
    config = Config(16, 64, split=2)
    found = matmul(x, packed, bias, config)
    assert_close(found, expected + bias.double())
    assert matmul(x[-5:], packed, bias, config).equal(found[-5:])
