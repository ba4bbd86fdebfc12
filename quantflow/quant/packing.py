"""Codes packed into 32-bit words, and back. Each function makes a few passes over the data and no 64-bit temporaries.

Shapes: `N` output channels, `K` input channels. A word holds its first code in its lowest bits, and the words of a row are one
stream of bits, so that 3-bit codes straddle words. The views of bytes as words assume a little-endian machine, as safetensors does.
Codes are uint8 in `0..2^bits - 1`; a code out of range would spill into its neighbours, and is for the caller to refuse.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Codes after which the stream is at a word's edge again.
_PERIOD = {2: 16, 3: 32, 4: 8, 8: 4}

# Nibble i of an AWQ word holds output channel `8 * word + AWQ_ORDER[i]`.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def word_count(codes: int, bits: int) -> int:
    """The words that hold `codes` codes of `bits` bits, the last one padded with zero bits."""
    return -(-codes * bits // 32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """int32 `[N, ceil(K * bits / 32)]` from uint8 `[N, K]`: each row a dense stream of bits, low bits first.

    The result of 8 bits may share the memory of `codes`. Raises ValueError for bits other than 2, 3, 4 and 8.
    """
    period = _period(bits)
    k = codes.shape[1]
    codes = F.pad(codes, (0, -k % period)) if k % period else codes.contiguous()
    if bits == 8:
        words = _view(codes, torch.int32)
    elif bits == 4:
        pair = _view(codes, torch.int16)
        packed = pair >> 4
        packed |= pair  # low byte: both nibbles
        words = packed.to(torch.uint8).view(torch.int32)
    elif bits == 2:
        four = _view(codes, torch.int32)
        packed = four >> 6
        packed |= four  # codes 0 and 1 in bits 0..3, codes 2 and 3 in bits 16..19
        packed |= packed >> 12
        words = packed.to(torch.uint8).view(torch.int32)
    else:
        words = _pack_3(codes)
    return words[:, : word_count(k, bits)].contiguous()


def unpack_rows(words: Tensor, bits: int, k: int) -> Tensor:
    """uint8 `[N, k]`: the inverse of `pack_rows`. Raises ValueError if a row of `words` does not have the length for `k` codes."""
    period = _period(bits)
    if words.shape[1] != word_count(k, bits):
        raise ValueError(f"{k} codes of {bits} bits fill {word_count(k, bits)} words, not {words.shape[1]}")
    if bits == 8:
        codes = _view(words, torch.uint8)
    elif bits == 4:
        packed = _view(words, torch.uint8).to(torch.int16)
        pair = packed << 4
        pair |= packed
        pair &= 0x0F0F
        codes = pair.view(torch.uint8)
    elif bits == 2:
        packed = _view(words, torch.uint8).to(torch.int32)
        packed |= packed << 12  # codes 2 and 3 to bits 16..19
        packed |= packed << 6
        packed &= 0x03030303
        codes = packed.view(torch.uint8)
    else:
        codes = _unpack_3(F.pad(words, (0, word_count(k + -k % period, bits) - words.shape[1])))
    return codes[:, :k].contiguous()


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """int32 `[ceil(N * bits / 32), K]` from uint8 `[N, K]`: each column a dense stream of bits, low bits first."""
    return pack_rows(codes.t(), bits).t().contiguous()


def unpack_columns(words: Tensor, bits: int, n: int) -> Tensor:
    """uint8 `[n, K]`: the inverse of `pack_columns`."""
    return unpack_rows(words.t(), bits, n).t().contiguous()


def pack_awq(codes: Tensor) -> Tensor:
    """int32 `[K, N / 8]` from 4-bit codes uint8 `[N, K]` (or zero points `[N, G]`): transposed, eight output channels to a word,
    in `AWQ_ORDER`. Raises ValueError if 8 does not divide N."""
    if codes.shape[0] % 8:
        raise ValueError(f"AWQ packs output channels by eights, and 8 does not divide {codes.shape[0]}")
    four = _view(codes.t(), torch.int32)  # [K, N/4], channels 0 1 2 3 in its bytes
    half = (four | four >> 12).to(torch.int16)  # nibbles 0 2 1 3
    return _swap_middle_bytes(half.view(torch.int32))  # nibbles 0 2 1 3 4 6 5 7 become 0 2 4 6 1 3 5 7


def unpack_awq(words: Tensor) -> Tensor:
    """uint8 `[N, K]` from int32 `[K, N / 8]`: the inverse of `pack_awq`."""
    half = _view(_swap_middle_bytes(words), torch.int16).to(torch.int32)
    four = (half & 0xF0F0) << 12
    four |= half & 0x0F0F
    return four.view(torch.uint8).t().contiguous()


def _period(bits: int) -> int:
    if bits not in _PERIOD:
        raise ValueError(f"cannot pack {bits} bits; expected one of {', '.join(map(str, _PERIOD))}")
    return _PERIOD[bits]


def _view(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of two-dimensional `rows` as integers of another width, copied only where their memory does not allow a view."""
    # Through one dimension: torch refuses a view where a dimension of size 1, of which nothing reads the stride, has an odd one.
    flat = rows.contiguous().view(-1)
    if flat.storage_offset() % 4:
        flat = flat.clone()
    return flat.view(dtype).view(rows.shape[0], -1)


def _pack_3(codes: Tensor) -> Tensor:
    """int32 `[N, 3 * K / 32]` from uint8 `[N, K]`, K a multiple of 32: codes to 12 bits, to 24 bits, to three words of each 32."""
    four = _view(codes, torch.int32)
    packed = four >> 5
    packed |= four
    packed &= 0x003F003F  # codes 0 and 1 in bits 0..5, codes 2 and 3 in bits 16..21
    packed |= packed >> 10
    packed &= 0xFFF
    twelve = packed.view(codes.shape[0], -1, 4, 2)
    a, b, c, d = (twelve[..., 0] | twelve[..., 1] << 12).unbind(-1)
    return torch.stack((a | b << 24, b >> 8 | c << 16, c >> 16 | d << 8), -1).view(codes.shape[0], -1)


def _unpack_3(words: Tensor) -> Tensor:
    """uint8 `[N, 32 * W / 3]` from int32 `[N, W]`, W a multiple of 3."""
    n = words.shape[0]
    a, b, c = words.view(n, -1, 3).unbind(-1)
    # `>>` carries the sign down, hence the masks after it.
    eight = torch.stack((a, (a >> 24 & 0xFF) | b << 8, (b >> 16 & 0xFFFF) | c << 16, c >> 8), -1)
    packed = torch.stack((eight & 0xFFF, eight >> 12 & 0xFFF), -1)
    packed |= packed << 10  # codes 2 and 3 to bits 16..21
    packed &= 0x003F003F
    packed |= packed << 5
    packed &= 0x07070707
    return packed.view(n, -1).view(torch.uint8)


def _swap_middle_bytes(words: Tensor) -> Tensor:
    """int32 words with their second and third byte exchanged."""
    outer = 0xFF0000FF - (1 << 32)  # the mask as int32
    return (words & outer) | (words >> 8 & 0xFF00) | (words & 0xFF00) << 8
