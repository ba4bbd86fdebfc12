"""Packing against loops over single bits, written from the formats' description and not from the
code under test."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.quant import packing
from quantflow.quant.packing import (
    AWQ_ORDER,
    pack_awq,
    pack_columns,
    pack_rows,
    pack_rows_transposed,
    unpack_awq,
    unpack_columns,
    unpack_rows,
    word_count,
)

BITS = (2, 3, 4, 5, 6, 7, 8)


def random_codes(n: int, k: int, bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 2**bits, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def stream_of_bits(codes: list[int], bits: int) -> list[int]:
    """The words of one row, as signed 32-bit integers, built as one large integer."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [w - 2**32 if w >= 2**31 else w for w in words]


@pytest.mark.parametrize(
    ("bits", "codes", "word"),
    [
        (4, [1, 2, 3, 4, 5, 6, 7, 8], 0x87654321 - 2**32),
        (2, [3, 0, 0, 0, 0, 0, 0, 0, 1], 0x00010003),
        (8, [0x11, 0x22, 0x33, 0xF4], 0xF4332211 - 2**32),
        (3, [7, 0, 1], 0b001_000_111),
    ],
)
def test_pack_rows_by_hand(bits: int, codes: list[int], word: int) -> None:
    assert pack_rows(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == [[word]]


def test_three_bit_codes_straddle_words() -> None:
    # Code 10 has its two low bits on top of word 0 and its high bit at the bottom of word 1; code
    # 21 the other way round.
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10] = 0b111
    codes[0, 21] = 0b111
    words = [w & 0xFFFFFFFF for w in pack_rows(codes, 3)[0].tolist()]
    assert words == [0b11 << 30, 1 | 1 << 31, 0b11]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "k", [1, 3, 4, 7, 8, 10, 11, 16, 21, 22, 31, 32, 33, 63, 64, 96, 100, 172, 352]
)
def test_pack_rows_is_one_stream_of_bits(bits: int, k: int) -> None:
    codes = random_codes(3, k, bits)
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (3, word_count(k, bits))
    assert words.tolist() == [stream_of_bits(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_rows(words, bits, k), codes)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 200), st.sampled_from(BITS), st.integers(0, 2**16))
def test_round_trip(n: int, k: int, bits: int, seed: int) -> None:
    codes = random_codes(n, k, bits, seed)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, k), codes)
    assert torch.equal(unpack_columns(pack_columns(codes, bits), bits, n), codes)


@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes(bits: int) -> None:
    for value in (0, 2**bits - 1):
        codes = torch.full((2, 96), value, dtype=torch.uint8)
        words = pack_rows(codes, bits)
        assert words.eq(0 if value == 0 else -1).all()  # every bit clear, or every bit set
        assert torch.equal(unpack_rows(words, bits, 96), codes)


@pytest.mark.parametrize("bits", BITS)
def test_strided_and_offset_inputs(bits: int) -> None:
    whole = random_codes(7, 65, bits)
    for codes in (
        whole[1:, 1:33],
        whole[1:],
        whole.t(),
        whole[:, ::2],
        whole.flatten()[1:65].view(2, 32),
    ):
        assert pack_rows(codes, bits).tolist() == [
            stream_of_bits(row, bits) for row in codes.tolist()
        ]
        words = pack_rows(codes, bits)
        wide = torch.cat((words, words), 1)
        assert torch.equal(unpack_rows(wide[:, words.shape[1] :], bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", BITS)
def test_single_words_whatever_their_strides(bits: int) -> None:
    codes = random_codes(32 // bits, 3, bits)
    words = pack_columns(codes, bits)
    column = words.clone().t()  # [3, 1], contiguous for torch although its last stride is not 1
    assert torch.equal(unpack_rows(column, bits, codes.shape[0]), codes.t())
    assert torch.equal(unpack_columns(words, bits, codes.shape[0]), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 8, 11, 32, 40])
def test_pack_columns(bits: int, n: int) -> None:
    codes = random_codes(n, 5, bits)
    words = pack_columns(codes, bits)
    assert words.shape == (word_count(n, bits), 5) and words.is_contiguous()
    for column in range(5):
        assert words[:, column].tolist() == stream_of_bits(codes[:, column].tolist(), bits)
    assert torch.equal(unpack_columns(words, bits, n), codes)


@pytest.mark.parametrize(("n", "k"), [(8, 1), (16, 3), (24, 5), (64, 32), (40, 172)])
def test_awq_order(n: int, k: int) -> None:
    codes = random_codes(n, k, 4)
    words = pack_awq(codes)
    assert words.dtype == torch.int32 and words.shape == (k, n // 8)
    for row in range(k):
        for word in range(n // 8):
            for nibble in range(8):
                expected = int(codes[8 * word + [0, 2, 4, 6, 1, 3, 5, 7][nibble], row])
                assert (int(words[row, word]) >> (4 * nibble)) & 15 == expected
    assert torch.equal(unpack_awq(words), codes)
    assert AWQ_ORDER == (0, 2, 4, 6, 1, 3, 5, 7)


def test_awq_by_hand() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None]
    assert pack_awq(codes).tolist() == [[0x75316420]]


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="9 bits"):
        pack_rows(random_codes(1, 8, 4), 9)
    with pytest.raises(ValueError, match="does not divide 12"):
        pack_awq(random_codes(12, 4, 4))
    with pytest.raises(ValueError, match="fill 12 words, not 13"):
        unpack_rows(torch.zeros(1, 13, dtype=torch.int32), 3, 128)
    with pytest.raises(ValueError, match="fill 12 words, not 13"):
        unpack_columns(torch.zeros(13, 1, dtype=torch.int32), 3, 128)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (31, 32), (32, 40), (65, 33), (128, 96), (97, 5)])
@pytest.mark.parametrize("chunk", [1, 1000, 2048])
def test_chunks(bits: int, n: int, k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(n, k, bits)
    whole = pack_rows(codes, bits), pack_columns(codes, bits)  # in one chunk
    monkeypatch.setattr(packing, "_CPU_CHUNK", chunk)
    assert torch.equal(pack_rows(codes, bits), whole[0])
    assert torch.equal(pack_rows_transposed(codes, bits), whole[0].t())
    assert torch.equal(pack_columns(codes, bits), whole[1])
    assert torch.equal(unpack_rows(whole[0], bits, k), codes)
    # as GPTQ's words come
    assert torch.equal(unpack_rows(whole[0].t().contiguous().t(), bits, k), codes)
    assert torch.equal(unpack_columns(whole[1], bits, n), codes)
    if bits == 4 and n % 8 == 0:
        assert torch.equal(unpack_awq(pack_awq(codes)), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), [(0, 32), (32, 0), (0, 0)])
def test_nothing_to_pack(bits: int, n: int, k: int) -> None:
    codes = random_codes(n, k, bits)
    assert pack_rows(codes, bits).shape == (n, word_count(k, bits))
    assert pack_rows_transposed(codes, bits).shape == (word_count(k, bits), n)
    assert pack_columns(codes, bits).shape == (word_count(n, bits), k)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, k), codes)
    assert torch.equal(unpack_columns(pack_columns(codes, bits), bits, n), codes)
    if bits == 4:
        assert torch.equal(unpack_awq(pack_awq(codes)), codes)
