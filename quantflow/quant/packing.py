"""Codes packed into 32-bit words, and back. The work goes in chunks that stay in a processor's
cache, in whole-array operations.

Shapes: `N` output channels, `K` input channels. A word holds its first code in its lowest bits, and
the words of a row are one stream of bits, so that 3-bit codes straddle words. The views of bytes as
words assume a little-endian machine, as safetensors does. Codes are uint8 in `0..2^bits - 1`; a
code out of range would spill into its neighbours, and is for the caller to refuse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Codes after which the stream is at a word's edge again.
_PERIOD = {2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 7: 32, 8: 4}

# Nibble i of an AWQ word holds output channel `8 * word + AWQ_ORDER[i]`.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

# Codes handled at a time: few enough that they and what is made of them stay in the cache, enough
# to outweigh the calls. A GPU has no use for the former.
_CPU_CHUNK, _GPU_CHUNK = 1 << 21, 1 << 26


def word_count(codes: int, bits: int) -> int:
    """The words that hold `codes` codes of `bits` bits, the last one padded with zero bits."""
    return -(-codes * bits // 32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """int32 `[N, ceil(K * bits / 32)]` from uint8 `[N, K]`: each row a dense stream of bits, low
    bits first.

    The result of 8 bits may share the memory of `codes`. Raises ValueError for bits other than 2 to
    8.
    """
    n, k = codes.shape
    if bits == 8 and k % 4 == 0:
        return _view(codes, torch.int32)
    words = codes.new_empty(n, word_count(k, bits), dtype=torch.int32)
    _fill_words(codes, bits, words)
    return words


def unpack_rows(words: Tensor, bits: int, k: int) -> Tensor:
    """uint8 `[N, k]`: the inverse of `pack_rows`, which for 8 bits may share the memory of `words`.
    Raises ValueError if a row of `words` does not have the length for `k` codes."""
    period = _period(bits)
    if words.shape[1] != word_count(k, bits):
        raise ValueError(
            f"{k} codes of {bits} bits fill {word_count(k, bits)} words, not {words.shape[1]}"
        )
    words = words.contiguous()
    if bits == 8:
        return _view(words, torch.uint8)[:, :k].contiguous()
    codes = words.new_empty(words.shape[0], k, dtype=torch.uint8)
    missing = -k % period
    for rows in _chunks(codes, 1):
        if missing:
            whole = F.pad(words[rows], (0, word_count(k + missing, bits) - words.shape[1]))
            codes[rows] = _unpack_chunk(whole, bits, codes.new_empty(whole.shape[0], k + missing))[
                :, :k
            ]
        else:
            _unpack_chunk(words[rows], bits, codes[rows])
    return codes


def pack_rows_transposed(codes: Tensor, bits: int) -> Tensor:
    """int32 `[ceil(K * bits / 32), N]`: `pack_rows`, transposed."""
    if bits == 8:
        return pack_rows(codes, bits).t().contiguous()
    words = _odd_rows(codes.shape[0], word_count(codes.shape[1], bits), codes.device)
    _fill_words(codes, bits, words)
    return words.t().contiguous()


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """int32 `[ceil(N * bits / 32), K]` from uint8 `[N, K]`: each column a dense stream of bits, low
    bits first."""
    period, (n, k) = _period(bits), codes.shape
    words = codes.new_empty(word_count(n, bits), k, dtype=torch.int32)
    for rows in _chunks(codes, period):
        chunk, missing = codes[rows], (rows.start - rows.stop) % period
        packed = words[rows.start * bits // 32 : word_count(rows.stop, bits)]
        if missing:
            whole = F.pad(chunk, (0, 0, 0, missing)).view(-1, period, k)
            packed.copy_(_join_rows(whole, bits).flatten(0, 1)[: packed.shape[0]])
        else:
            _join_rows(
                chunk.reshape(-1, period, k), bits, out=packed.view(-1, period * bits // 32, k)
            )
    # A single row gets strides of 1, as some readers view its transpose as bytes, which torch
    # refuses with any other.
    return words.as_strided((1, k), (1, 1)) if words.shape[0] == 1 else words


def unpack_columns(words: Tensor, bits: int, n: int) -> Tensor:
    """uint8 `[n, K]`: the inverse of `pack_columns`."""
    period, k = _period(bits), words.shape[1]
    if words.shape[0] != word_count(n, bits):
        raise ValueError(
            f"{n} codes of {bits} bits fill {word_count(n, bits)} words, not {words.shape[0]}"
        )
    codes = words.new_empty(n, k, dtype=torch.uint8)
    step = period * bits // 32
    for rows in _chunks(codes, period):
        start, stop = rows.start * bits // 32, word_count(rows.stop, bits)
        if (rows.stop - rows.start) % period:
            whole = F.pad(words[start:stop], (0, 0, 0, (start - stop) % step)).view(-1, step, k)
            codes[rows] = _split_rows(whole, bits).flatten(0, 1)[: rows.stop - rows.start]
        else:
            _split_rows(
                words[start:stop].reshape(-1, step, k), bits, out=codes[rows].view(-1, period, k)
            )
    return codes


def pack_awq(codes: Tensor) -> Tensor:
    """int32 `[K, N / 8]` from 4-bit codes uint8 `[N, K]` (or zero points `[N, G]`): transposed,
    eight output channels to a word, in `AWQ_ORDER`. Raises ValueError if 8 does not divide N."""
    n, k = codes.shape
    if n % 8:
        raise ValueError(f"AWQ packs output channels by eights, and 8 does not divide {n}")
    words = _odd_rows(n // 8, k, codes.device)
    for rows in _chunks(codes, 8):
        pairs = codes[rows].reshape(-1, 4, 2, k)
        # bytes of channels 0 and 2, 1 and 3, 4 and 6, 5 and 7
        joined = _merged(pairs[:, 0::2], pairs[:, 1::2], 4, torch.uint8)
        half = _merged(joined[:, 0], joined[:, 1], 8, torch.int16)  # 0 2 4 6, and 1 3 5 7
        _merged(
            half[:, 0], half[:, 1], 16, torch.int32, out=words[rows.start // 8 : rows.stop // 8]
        )
    return words.t().contiguous()


def unpack_awq(words: Tensor) -> Tensor:
    """uint8 `[N, K]` from int32 `[K, N / 8]`: the inverse of `pack_awq`."""
    k, n = words.shape[0], words.shape[1] * 8
    columns = words.t().contiguous()
    codes = words.new_empty(n, k, dtype=torch.uint8)
    for rows in _chunks(codes, 8):
        chunk = columns[rows.start // 8 : rows.stop // 8]
        half = torch.stack((chunk.to(torch.int16), (chunk >> 16).to(torch.int16)), 1)
        joined = torch.stack((half.to(torch.uint8), (half >> 8).to(torch.uint8)), 1)
        pairs = codes[rows].view(-1, 4, 2, k)
        torch.bitwise_and(joined, 15, out=pairs[:, 0::2])
        torch.bitwise_right_shift(joined, 4, out=pairs[:, 1::2])
    return codes


def _period(bits: int) -> int:
    if bits not in _PERIOD:
        raise ValueError(f"cannot pack {bits} bits; expected one of {', '.join(map(str, _PERIOD))}")
    return _PERIOD[bits]


def _chunks(codes: Tensor, multiple: int) -> Iterator[slice]:
    """The rows of `codes` in slices of a multiple of `multiple`, the last one shorter where it must
    be."""
    size = _CPU_CHUNK if codes.device.type == "cpu" else _GPU_CHUNK
    n, k = codes.shape
    step = max(size // max(k, 1) // multiple, 1) * multiple
    for start in range(0, n if k else 0, step):
        yield slice(start, min(start + step, n))


def _odd_rows(rows: int, columns: int, device: torch.device) -> Tensor:
    """An int32 matrix, not filled, that will be transposed: its rows are an odd number of cache
    lines (64 bytes) apart, since rows whose distance is a power of two, as those of weights are,
    would share a few lines of the cache and drive each other out."""
    stride = (columns // 16 | 1) * 16
    stride += 32 if stride < columns else 0
    return torch.empty(rows, stride, dtype=torch.int32, device=device)[:, :columns]


def _view(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of two-dimensional `rows` as integers of another width, copied only where their
    memory does not allow a view."""
    # Through one dimension: torch refuses a view where a dimension of size 1, of which nothing
    # reads the stride, has an odd one.
    flat = rows.contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % 4:
        flat = flat.clone()
    width = rows.shape[1] * rows.element_size() // dtype.itemsize
    return flat.view(dtype).view(rows.shape[0], width)


def _fill_words(codes: Tensor, bits: int, words: Tensor) -> None:
    """`pack_rows` into `words`, whose rows may lie apart."""
    period, (_, k) = _period(bits), codes.shape
    missing = -k % period
    for rows in _chunks(codes, 1):
        if missing:
            whole = F.pad(codes[rows], (0, missing))
            packed = words.new_empty(whole.shape[0], word_count(k + missing, bits))
            _pack_chunk(whole, bits, packed)
            words[rows] = packed[:, : words.shape[1]]
        else:
            _pack_chunk(codes[rows], bits, words[rows])


def _pack_chunk(codes: Tensor, bits: int, words: Tensor) -> None:
    """Rows of whole periods, joined two by two."""
    out = words.view(torch.uint8)
    if bits == 8:
        out.copy_(codes)
    elif bits == 4:
        out.copy_(_join(_view(codes, torch.int16), 4, 8))
    elif bits == 2:
        four = _join(_view(codes, torch.int16), 2, 8).to(torch.uint8)
        out.copy_(_join(four.view(torch.int16), 4, 8))
    elif bits > 4:
        fields = codes.reshape(codes.shape[0], -1, _PERIOD[bits])
        words.copy_(torch.stack(_words(fields.unbind(-1), bits), -1).view(words.shape))
    else:
        six = _join(_view(codes, torch.int16), 3, 8).to(torch.uint8)
        twelve = _join(six.view(torch.int16), 6, 8)
        eight = _join(twelve.view(torch.int32), 12, 16)
        # codes, in three of four parts
        sixteen = _join(eight.view(torch.int64), 24, 32).view(torch.int16)
        for part in range(3):
            words.view(torch.int16)[:, part::3] = sixteen[:, part::4]


def _unpack_chunk(words: Tensor, bits: int, codes: Tensor) -> Tensor:
    """`codes`, filled from rows of whole periods: `_pack_chunk` backwards."""
    stream, pairs = _view(words, torch.uint8), codes.view(torch.int16)
    if bits == 4:
        _split(stream.to(torch.int16), 4, 8, out=pairs)
    elif bits == 2:
        four = _split(stream.to(torch.int16), 4, 8).view(torch.uint8)
        _split(four.to(torch.int16), 2, 8, out=pairs)
    elif bits > 4:
        parts = words.reshape(words.shape[0], -1, _PERIOD[bits] * bits // 32)
        codes.copy_(torch.stack(_fields(parts.unbind(-1), bits), -1).view(codes.shape))
    else:
        parts = _view(words, torch.int16)
        sixteen = parts.new_zeros(parts.shape[0], parts.shape[1] // 3 * 4)
        for part in range(3):
            sixteen[:, part::4] = parts[:, part::3]
        eight = _split(sixteen.view(torch.int64), 24, 32)
        twelve = _split(eight.view(torch.int32), 12, 16).view(torch.int16)
        six = _split(twelve, 6, 8).view(torch.uint8)
        _split(six.to(torch.int16), 3, 8, out=pairs)
    return codes


def _words(fields: Sequence[Tensor], bits: int) -> list[Tensor]:
    """The int32 words of a period of codes, each a tensor, for the widths that no halving reaches
    (5, 6, 7)."""
    words = [
        torch.zeros_like(fields[0], dtype=torch.int64) for _ in range(len(fields) * bits // 32)
    ]
    for i, field in enumerate(fields):
        word, shift = divmod(i * bits, 32)
        words[word] |= field.long() << shift
        if shift + bits > 32:
            words[word + 1] |= field.long() >> 32 - shift
    return [word.to(torch.int32) for word in words]  # which keeps the low 32 bits


def _fields(words: Sequence[Tensor], bits: int) -> list[Tensor]:
    """`_words` backwards: the uint8 codes of a period."""
    wide = [word.long() & 0xFFFFFFFF for word in words]
    fields = []
    for i in range(len(words) * 32 // bits):
        word, shift = divmod(i * bits, 32)
        field = wide[word] >> shift
        if shift + bits > 32:
            field = field | wide[word + 1] << 32 - shift
        fields.append((field & 2**bits - 1).to(torch.uint8))
    return fields


def _join(pairs: Tensor, bits: int, apart: int) -> Tensor:
    """`low + high * 2^apart` to `low + high * 2^bits`: two fields brought together, without
    masks."""
    high = pairs >> apart
    return torch.sub(pairs, high, alpha=2**apart - 2**bits, out=high)


def _split(joined: Tensor, bits: int, apart: int, out: Tensor | None = None) -> Tensor:
    """`low + high * 2^bits` to `low + high * 2^apart`."""
    high = joined >> bits
    return torch.add(joined, high, alpha=2**apart - 2**bits, out=high if out is None else out)


def _join_rows(codes: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """int32 `[P, period * bits / 32, K]` from uint8 `[P, period, K]`."""
    if 4 < bits < 8:
        return torch.stack(_words(codes.unbind(1), bits), 1, out=out)
    if bits == 3:
        six = _merged(codes[:, 0::2], codes[:, 1::2], 3, torch.uint8)
        twelve = _merged(six[:, 0::2], six[:, 1::2], 6, torch.int16)
        a, b, c, d = _merged(twelve[:, 0::2], twelve[:, 1::2], 12, torch.int32).unbind(1)
        return torch.stack((a | b << 24, b >> 8 | c << 16, c >> 16 | d << 8), 1, out=out)
    while bits < 32:
        dtype = torch.uint8 if bits < 8 else torch.int16 if bits < 16 else torch.int32
        codes = _merged(
            codes[:, 0::2], codes[:, 1::2], bits, dtype, out=out if bits == 16 else None
        )
        bits *= 2
    return codes


def _merged(
    low: Tensor, high: Tensor, bits: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """`low + high * 2^bits` in `dtype`, wrapping at its top."""
    low = low.to(dtype)
    if bits == 16:
        low &= 0xFFFF  # an int16 may have brought its sign along
    return torch.add(low, high.to(dtype), alpha=2**bits, out=out)


def _split_rows(words: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """uint8 `[P, period, K]` from int32 `[P, period * bits / 32, K]`: `_join_rows` backwards."""
    if 4 < bits < 8:
        return torch.stack(_fields(words.unbind(1), bits), 1, out=out)
    if bits == 3:
        a, b, c = words.unbind(1)
        # `>>` carries the sign down, hence the masks after it.
        eight = torch.stack((a, (a >> 24 & 0xFF) | b << 8, (b >> 16 & 0xFFFF) | c << 16, c >> 8), 1)
        twelve = _interleaved(eight & 0xFFF, eight >> 12 & 0xFFF, torch.int16)
        six = _interleaved(twelve & 0x3F, twelve >> 6, torch.uint8)
        return _interleaved(six & 7, six >> 3, torch.uint8, out)
    half = _interleaved(words, words >> 16, torch.int16)
    codes, width = _interleaved(half, half >> 8, torch.uint8, out if bits == 8 else None), 8
    while width > bits:
        width //= 2
        codes = _interleaved(
            codes & (1 << width) - 1, codes >> width, torch.uint8, out if width == bits else None
        )
    return codes


def _interleaved(
    even: Tensor, odd: Tensor, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """`[P, 2 * M, K]` of `dtype`, which takes the low bits, from two `[P, M, K]`."""
    p, m, k = even.shape
    both = even.new_empty(p, m, 2, k, dtype=dtype) if out is None else out.view(p, m, 2, k)
    both[:, :, 0] = even
    both[:, :, 1] = odd
    return both.view(p, 2 * m, k)
