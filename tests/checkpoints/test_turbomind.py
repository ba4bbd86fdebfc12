"""TurboMind workspaces, against their description read one nibble and one element at a time."""

from __future__ import annotations

import array
import configparser
import dataclasses
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.checkpoints.tensor_file import dtype_name
from quantflow.checkpoints.turbomind import permutations
from quantflow.checkpoints.turbomind.files import is_workspace
from quantflow.checkpoints.turbomind.permutations import (
    cut_tiles,
    from_interleaved,
    from_interleaved_words,
    from_tiles,
    fuse_gate_up_words,
    join_tiles,
    split_gate_up_words,
    to_interleaved,
    to_interleaved_words,
    to_tiles,
)
from quantflow.checkpoints.turbomind.workspace import Workspace
from quantflow.checkpoints.turbomind.writer import WorkspaceWriter, workspace_problems
from quantflow.errors import FormatError, ModelError
from quantflow.models.config import DecoderConfig, Rope
from quantflow.models.registry import ARCHITECTURES
from quantflow.quant.packing import pack_awq, unpack_awq

Tensors = dict[str, torch.Tensor]
AWQ_NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def make_config(**changes: Any) -> DecoderConfig:
    """Grouped-query attention, and a vocabulary that no rank count divides. hidden is heads *
    head_dim."""
    fields: dict[str, Any] = {
        "family": "llama", "intermediate": 12, "layers": 2, "heads": 4, "kv_heads": 2,
        "head_dim": 4, "vocabulary": 7, "max_positions": 64, "norm_eps": 1e-5,
        "activation": "silu", "dtype": "float16",
    }  # fmt: skip
    fields.update(changes)
    return DecoderConfig(**{"hidden": fields["heads"] * fields["head_dim"], **fields})


def linear_shapes(c: DecoderConfig) -> dict[str, tuple[int, int]]:
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    sizes = [
        (q, c.hidden),
        (kv, c.hidden),
        (kv, c.hidden),
        (c.hidden, q),
        (c.intermediate, c.hidden),
        (c.intermediate, c.hidden),
    ]
    return dict(zip(LINEARS, [*sizes, (c.hidden, c.intermediate)], strict=True))


def make_tensors(c: DecoderConfig, group: int = 0, seed: int = 0) -> Tensors:
    """Random native tensors; with `group`, the linears as AWQ words."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float16 if group else getattr(torch, c.dtype)

    def plain(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    found = {
        "model.embed_tokens.weight": plain(c.vocabulary, c.hidden),
        "model.norm.weight": plain(c.hidden),
    }
    if not c.tied:
        found["lm_head.weight"] = plain(c.vocabulary, c.hidden)
    for i in range(c.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{norm}.weight"] = plain(c.hidden)
        for name, (n, k) in linear_shapes(c).items():
            module = f"model.layers.{i}.{name}"
            if group:
                found[f"{module}.qweight"] = words(k, n // 8)
                found[f"{module}.qzeros"] = words(k // group, n // 8)
                found[f"{module}.scales"] = plain(k // group, n)
            else:
                found[f"{module}.weight"] = plain(n, k)
            if (c.attention_bias and name in LINEARS[:3]) or (c.output_bias and name == LINEARS[3]):
                found[f"{module}.bias"] = plain(n)
    return found


def specs_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()
    }


def write(
    path: Path,
    c: DecoderConfig,
    tensors: Tensors,
    raw: Mapping[str, Any] | None = None,
    **options: Any,
) -> WorkspaceWriter:
    options.setdefault("model_name", "internlm-chat-7b")
    with WorkspaceWriter(path, c, raw or {}, specs_of(tensors), **options) as writer:
        for name in sorted(tensors, key=lambda name: name[::-1]):  # all layers at once
            writer.write(name, tensors[name])
    return writer


def bits(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.int16).to(torch.int32).bitwise_and(0xFFFF).tolist()


def halves(path: Path, name: str) -> list[int]:
    return list(array.array("H", (path / "triton_models" / "weights" / name).read_bytes()))


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        other = found[name]
        assert other.dtype == tensor.dtype and other.shape == tensor.shape, name
        assert torch.equal(
            other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), name


# Plain weights.


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_plain_files_element_by_element(tp: int, dtype: str, tmp_path: Path) -> None:
    c = make_config(dtype=dtype, attention_bias=True, output_bias=True)
    tensors = make_tensors(c)
    write(tmp_path, c, tensors, tp=tp)
    source = {name: bits(tensor) for name, tensor in tensors.items()}
    q, kv, width = c.heads * c.head_dim // tp, c.kv_heads * c.head_dim // tp, c.intermediate // tp
    for i in range(c.layers):
        layer = f"model.layers.{i}"

        def origin(rank: int, column: int, layer: str = layer) -> tuple[str, int]:
            """The module and the output channel behind a column of a rank's w_qkv."""
            for name, size in (("q", q), ("k", kv), ("v", kv)):
                if column < size:
                    head, place = divmod(rank * size + column, c.head_dim)
                    pair, half = divmod(place, 2)
                    inside = place if name == "v" else half * c.head_dim // 2 + pair
                    return f"{layer}.self_attn.{name}_proj", head * c.head_dim + inside
                column -= size
            raise AssertionError(column)

        for rank in range(tp):
            total = q + 2 * kv
            weight, bias = (
                halves(tmp_path, f"layers.{i}.attention.w_qkv.{rank}.{part}")
                for part in ("weight", "bias")
            )
            assert len(weight) == c.hidden * total and len(bias) == total
            for column in range(total):
                module, channel = origin(rank, column)
                assert bias[column] == source[f"{module}.bias"][channel]
                for row in range(c.hidden):
                    assert weight[row * total + column] == source[f"{module}.weight"][channel][row]
            output = halves(tmp_path, f"layers.{i}.attention.wo.{rank}.weight")
            assert output == [
                source[f"{layer}.self_attn.o_proj.weight"][n][rank * q + k]
                for k in range(q)
                for n in range(c.hidden)
            ]
            assert (
                halves(tmp_path, f"layers.{i}.attention.wo.{rank}.bias")
                == source[f"{layer}.self_attn.o_proj.bias"]
            )
            for file, module in (("w1", "gate"), ("w3", "up")):
                columns = [
                    source[f"{layer}.mlp.{module}_proj.weight"][rank * width + n]
                    for n in range(width)
                ]
                expected = [column[k] for k in range(c.hidden) for column in columns]
                assert halves(tmp_path, f"layers.{i}.feed_forward.{file}.{rank}.weight") == expected
            down = halves(tmp_path, f"layers.{i}.feed_forward.w2.{rank}.weight")
            assert down == [
                source[f"{layer}.mlp.down_proj.weight"][n][rank * width + k]
                for k in range(width)
                for n in range(c.hidden)
            ]
        assert (
            halves(tmp_path, f"layers.{i}.attention_norm.weight")
            == source[f"{layer}.input_layernorm.weight"]
        )
        assert (
            halves(tmp_path, f"layers.{i}.ffn_norm.weight")
            == source[f"{layer}.post_attention_layernorm.weight"]
        )
    assert halves(tmp_path, "norm.weight") == source["model.norm.weight"]
    for file, name in (
        ("tok_embeddings", "model.embed_tokens.weight"),
        ("output", "lm_head.weight"),
    ):
        rows = [value for row in source[name] for value in row]
        assert halves(tmp_path, f"{file}.weight") == rows + [0] * (c.vocabulary % tp * c.hidden)
    files = 3 + c.layers * (2 + 7 * tp) + 1
    assert len(os.listdir(tmp_path / "triton_models" / "weights")) == files


# int4.


def moved(position: int, shape: tuple[int, ...], order: tuple[int, ...]) -> int:
    """Where element number `position` of an array of `shape` is once its axes are transposed to
    `order`."""
    at = []
    for size in reversed(shape):
        position, inside = divmod(position, size)
        at.insert(0, inside)
    assert position == 0
    for axis in order:
        position = position * shape[axis] + at[axis]
    return position


def nibble(words: list[list[int]], row: int, column: int) -> int:
    """The code of one output channel in AWQ words."""
    return (words[row][column // 8] >> (4 * AWQ_NIBBLES.index(column % 8))) & 15


@dataclasses.dataclass(frozen=True)
class Part:
    """A native linear inside the fused one: how wide it and all are, and what its nibbles go
    through."""

    module: str
    width: int
    start: int
    total: int

    def place(self, k_size: int, row: int, column: int, c: DecoderConfig, tp: int) -> int:
        """The position of a code in the fused `[K, M]` nibbles, before tiles are made."""
        nibble_number = row * self.width + column // 8 * 8 + AWQ_NIBBLES.index(column % 8)
        role = self.module.partition(".")[2][:1]
        if role in "gu":
            shape = (2, k_size, self.width // 8, 2, 2, 2)
            return moved(
                (role == "u") * k_size * self.width + nibble_number, shape, (1, 2, 4, 0, 5, 3)
            )
        if role in "qk":
            shape7 = (k_size, self.width // c.head_dim, 2, c.head_dim // 16, 2, 2, 2)
            nibble_number = moved(nibble_number, shape7, (0, 1, 3, 5, 2, 6, 4))
        row, inside = divmod(nibble_number, self.width)
        if role in "qkv":
            rank, inside = divmod(inside, self.width // tp)
            inside += (rank * self.total + self.start) // tp
        return row * self.total + inside


def fused_parts(c: DecoderConfig) -> dict[str, list[Part]]:
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    total = q + 2 * kv
    return {
        "attention.w_qkv": [
            Part(LINEARS[0], q, 0, total),
            Part(LINEARS[1], kv, q, total),
            Part(LINEARS[2], kv, q + kv, total),
        ],
        "attention.wo": [Part(LINEARS[3], c.hidden, 0, c.hidden)],
        "feed_forward.w13": [
            Part(name, c.intermediate, 0, 2 * c.intermediate) for name in LINEARS[4:6]
        ],
        "feed_forward.w2": [Part(LINEARS[6], c.hidden, 0, c.hidden)],
    }


@pytest.mark.parametrize(
    ("c", "tp", "group", "step"),
    [
        (make_config(layers=1, heads=4, kv_heads=2, head_dim=16, intermediate=64), 1, 16, 1),
        (make_config(layers=1, heads=2, kv_heads=1, head_dim=32, intermediate=32), 1, 32, 1),
        # a sample: the files are large
        (make_config(layers=1, heads=8, kv_heads=4, head_dim=32, intermediate=256), 2, 64, 7),
    ],
)
def test_int4_files_nibble_by_nibble(
    c: DecoderConfig, tp: int, group: int, step: int, tmp_path: Path
) -> None:
    """Every code lies where the description says, and what TurboMind's kernel makes of it, `((64 +
    q) - zero) * scale` with the two halves of the word that it finds for it, is the weight."""
    tensors = make_tensors(c, group)
    write(tmp_path, c, tensors, tp=tp, group_size=group)
    shapes, weights = linear_shapes(c), tmp_path / "triton_models" / "weights"
    for name, parts in fused_parts(c).items():
        by_columns = name in ("attention.w_qkv", "feed_forward.w13")
        k_size, total = shapes[parts[0].module][1], parts[0].total
        files = [(weights / f"layers.0.{name}.{rank}.qweight").read_bytes() for rank in range(tp)]
        grids = [
            (weights / f"layers.0.{name}.{rank}.scales_zeros").read_bytes() for rank in range(tp)
        ]
        assert {len(file) for file in files} == {k_size * total // 2 // tp}
        assert {len(grid) for grid in grids} == {k_size // group * total * 4 // tp}
        seen, words_seen = set(), set()
        for part in parts:
            base = f"model.layers.0.{part.module}"
            codes, zeros, scales = (
                tensors[f"{base}.{part}"].tolist() for part in ("qweight", "qzeros", "scales")
            )
            for number in range(0, k_size * part.width, step):
                row, column = divmod(number, part.width)
                place = part.place(k_size, row, column, c, tp)
                tile_shape = (k_size // 32, 2, 2, 4, 2, total // 32, 2, 2, 2, 4)
                place = moved(place, tile_shape, (0, 5, 9, 8, 3, 1, 6, 4, 2, 7))
                if by_columns:
                    word, inside = divmod(place, 8)
                    # The last axis is the rank's after the transposition, and each rank's words
                    # follow in the order of the others.
                    word, rank = divmod(
                        moved(word, (k_size // 32, tp, total // (32 * tp), 128), (0, 2, 3, 1)), tp
                    )
                    place = word * 8 + inside
                else:
                    rank, place = divmod(place, k_size * total // tp)
                seen.add((rank, place))
                stored = (files[rank][place // 2] >> (place % 2 * 4)) & 15
                code, zero_point, scale = (
                    nibble(codes, row, column),
                    nibble(zeros, row // group, column),
                    scales[row // group][column],
                )
                assert stored == code
                target = grid_column(part, column, c, tp)
                if by_columns:
                    grid_rank, target = divmod(target, total // tp)
                    at = row // group * (total // tp) + target
                else:
                    grid_rank, at = divmod(
                        row // group * total + target, k_size // group * total // tp
                    )
                assert grid_rank == rank
                low_half, high_half = struct.unpack_from("<ee", grids[rank], 4 * at)  # zero, scale
                assert high_half == scale and 64 <= low_half <= 79
                assert ((64 + stored) - low_half) * high_half == (code - zero_point) * scale
                words_seen.add((rank, at))
        assert len(seen) == sum(len(range(0, k_size * part.width, step)) for part in parts)
        assert len(words_seen) == k_size // group * total  # no word of the grid is nobody's


def grid_column(part: Part, column: int, c: DecoderConfig, tp: int) -> int:
    """Where the scale of an output channel is among those of the fused linear, from the rules for
    fp16 scales."""
    role = part.module.partition(".")[2][:1]
    if role in "gu":
        return 2 * column + (role == "u")
    if role in "qk":
        head, inside = divmod(column, c.head_dim)
        half, pair = divmod(inside, c.head_dim // 2)
        column = head * c.head_dim + 2 * pair + half
    if role in "qkv":
        rank, column = divmod(column, part.width // tp)
        column += (rank * part.total + part.start) // tp
    return column


@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_words_and_scales_take_the_same_order(head_dim: int) -> None:
    codes = torch.randint(0, 16, (2 * head_dim, 3), dtype=torch.uint8)  # [N, K]
    words = to_interleaved_words(pack_awq(codes), head_dim)
    assert torch.equal(unpack_awq(words), to_interleaved(codes.t(), head_dim).t())
    gate, up = codes, codes.flip(0)
    assert torch.equal(
        unpack_awq(fuse_gate_up_words(pack_awq(gate), pack_awq(up))),
        torch.stack((gate, up), 1).view(-1, 3),
    )


def test_rotary_order_of_one_head() -> None:
    assert to_interleaved(torch.arange(8), 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert to_interleaved(torch.arange(8), 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_every_permutation_has_its_inverse() -> None:
    words = torch.randint(-(2**31), 2**31, (64, 24)).to(torch.int32)
    for head_dim in (16, 48, 64, 96):
        assert torch.equal(
            from_interleaved_words(to_interleaved_words(words, head_dim), head_dim), words
        )
        assert torch.equal(
            from_interleaved(to_interleaved(words.repeat(1, 8), head_dim), head_dim),
            words.repeat(1, 8),
        )
    assert torch.equal(from_tiles(to_tiles(words)), words)
    for tp in (1, 2, 3):
        assert torch.equal(join_tiles(cut_tiles(words, tp)), words)
    gate, up = split_gate_up_words(fuse_gate_up_words(words, words.flip(0)))
    assert torch.equal(gate, words) and torch.equal(up, words.flip(0))


def test_large_words_are_permuted_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.randint(-(2**31), 2**31, (96, 8)).to(torch.int32)
    functions = (
        to_tiles,
        lambda w: to_interleaved_words(w, 32),
        lambda w: fuse_gate_up_words(w, w.flip(0)),
    )
    whole = [function(words) for function in functions]
    monkeypatch.setattr(permutations, "_BLOCK_WORDS", 1)
    for function, expected in zip(functions, whole, strict=True):
        assert torch.equal(function(words), expected)


def test_files_that_config_ini_does_not_ask_for_are_named(tmp_path: Path) -> None:
    """Of a layer beyond num_layer, say: nothing is left out in silence."""
    c = make_config(layers=2)
    tensors = make_tensors(c)
    write(tmp_path, c, tensors)
    weights = tmp_path / "triton_models" / "weights"
    ini = weights / "config.ini"
    ini.write_text(ini.read_text().replace("num_layer = 2", "num_layer = 1"))
    (note,) = Workspace(tmp_path).notes
    beyond = sorted(path.name for path in weights.glob("layers.1.*"))
    assert (
        note == f"left out, since config.ini does not ask for them: {', '.join(beyond[:3])} and"
        f" {len(beyond) - 3} more"
    )
    assert any("left out" in note for note in Checkpoint(tmp_path).remarks)


def test_a_workspace_whose_head_differs_though_it_is_said_to_be_tied(tmp_path: Path) -> None:
    """The head is stored in any case: a copy is one with the embedding, another one is kept."""
    c = make_config(tied=True)
    tensors = make_tensors(c)
    write(tmp_path, c, tensors)
    found = Checkpoint(tmp_path)
    assert found.config.tied and list(found.left_out) == ["lm_head.weight"]
    output = tmp_path / "triton_models" / "weights" / "output.weight"
    raw = bytearray(output.read_bytes())
    raw[2 * c.hidden * (c.vocabulary - 1)] ^= 1  # in the last row
    output.write_bytes(raw)
    again = Checkpoint(tmp_path)
    assert not again.config.tied and again.left_out == {} and "lm_head.weight" in again.expected
    rows = again.container.read("lm_head.weight", slice(1, 3))
    assert torch.equal(rows, tensors["model.embed_tokens.weight"][1:3])


def shift_zeros(path: Path, by: float, first: int = 0) -> None:
    """Adds to the zero points of a scales_zeros file, from the word `first` on."""
    pairs = list(struct.iter_unpack("<eH", path.read_bytes()))
    path.write_bytes(
        b"".join(
            struct.pack("<eH", zero + by * (i >= first), scale)
            for i, (zero, scale) in enumerate(pairs)
        )
    )


def test_plain_zero_points_of_older_workspaces_are_read_and_said(tmp_path: Path) -> None:
    c = make_config(layers=1, head_dim=16, intermediate=32)
    tensors = make_tensors(c, 16)
    write(tmp_path, c, tensors, group_size=16)
    assert Workspace(tmp_path).notes == ()
    grids = sorted((tmp_path / "triton_models" / "weights").glob("*.scales_zeros"))
    assert len(grids) == 4
    shift_zeros(grids[0], -64)
    (note,) = Workspace(tmp_path).notes
    assert note.startswith("1 of 4 scales_zeros files")
    for path in grids[1:]:
        shift_zeros(path, -64)
    workspace = Workspace(tmp_path)
    assert workspace.notes[0].startswith("all scales_zeros files hold zero points as z")
    assert_same({name: workspace.read(name) for name in tensors}, tensors)


@pytest.mark.parametrize("plain", [False, True])
def test_zero_points_that_are_none_are_refused(plain: bool, tmp_path: Path) -> None:
    c = make_config(layers=1, head_dim=16, intermediate=32)
    write(tmp_path, c, make_tensors(c, 16), group_size=16)
    path = tmp_path / "triton_models" / "weights" / "layers.0.attention.wo.0.scales_zeros"
    if plain:
        shift_zeros(path, -64)
    whole = path.read_bytes()
    # the last: a mixture
    for wrong in (
        0.5,
        -1.0,
        16.0,
        63.0,
        64.5,
        80.0,
        128.0,
        float("nan"),
        float("inf"),
        70.0 if plain else 3.0,
    ):
        for at in (0, len(whole) - 4):
            path.write_bytes(whole[:at] + struct.pack("<eH", wrong, 0) + whole[at + 4 :])
            with pytest.raises(ModelError, match=r"wo\.0\.scales_zeros.*zero points"):
                Workspace(tmp_path).read("model.layers.0.self_attn.o_proj.qzeros")


def test_ranks_that_differ_in_their_form_of_zero_points_are_refused(tmp_path: Path) -> None:
    c = make_config(layers=1, heads=8, kv_heads=4, head_dim=32, intermediate=256)
    write(tmp_path, c, make_tensors(c, 64), tp=2, group_size=64)
    shift_zeros(
        tmp_path / "triton_models" / "weights" / "layers.0.feed_forward.w13.1.scales_zeros", -64
    )
    with pytest.raises(ModelError, match=r"w13\.0\.scales_zeros.*zero points"):
        Workspace(tmp_path).read("model.layers.0.mlp.up_proj.qzeros")


# Round trips.


@st.composite
def models(draw: st.DrawFn) -> tuple[DecoderConfig, int, int]:
    """A config, tp and group size (0: not int4)."""
    int4, tp = draw(st.booleans()), draw(st.sampled_from([1, 2, 3]))
    bias = draw(st.booleans())
    fields: dict[str, Any] = {
        "layers": draw(st.integers(1, 2)),
        "vocabulary": draw(st.integers(1, 9)),
    }
    if int4:
        tp = min(tp, 2)
        heads, head_dim = draw(
            st.sampled_from(
                [(2, 16), (4, 16), (2, 32), (2, 48)] if tp == 1 else [(8, 32), (2, 128)]
            )
        )
        kv_heads = draw(
            st.sampled_from([n for n in range(tp, heads + 1) if heads % n == 0 and n % tp == 0])
        )
        if tp == 2 and (heads + 2 * kv_heads) * head_dim % 256:
            kv_heads = heads
        fields["intermediate"] = 32 * draw(st.integers(1, 3)) if tp == 1 else 256
        group = draw(st.sampled_from([8, 16, 32]))
    else:
        kv_heads = tp * draw(st.integers(1, 2))
        heads, head_dim, group = (
            kv_heads * draw(st.integers(1, 3)),
            draw(st.sampled_from([2, 4, 6, 16])),
            0,
        )
        fields["intermediate"] = tp * draw(st.integers(1, 5))
        fields["dtype"] = draw(st.sampled_from(["float16", "bfloat16"]))
    return (
        make_config(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            attention_bias=bias,
            output_bias=bias,
            **fields,
        ),
        tp,
        group,
    )


@settings(deadline=None, max_examples=20)
@given(models(), st.integers(0, 9))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, model: tuple[DecoderConfig, int, int], seed: int
) -> None:
    c, tp, group = model
    path = tmp_path_factory.mktemp("w")
    tensors = make_tensors(c, group, seed)
    write(path, c, tensors, tp=tp, group_size=group)
    workspace = Workspace(path)
    assert {n: (info.dtype, info.shape) for n, info in workspace.tensors.items()} == specs_of(
        tensors
    )
    assert all(workspace.tensors[name].nbytes == tensor.nbytes for name, tensor in tensors.items())
    assert_same({name: workspace.read(name) for name in reversed(tensors)}, tensors)
    found = ARCHITECTURES["llama"].read_config(workspace.config)
    assert found == dataclasses.replace(c, dtype="float16" if group else c.dtype)
    assert (
        len(workspace.files)
        == len(set(workspace.files))
        == len(os.listdir(path / "triton_models" / "weights")) - 1
    )


def test_what_is_read_is_ones_own(tmp_path: Path) -> None:
    c = make_config(layers=1, head_dim=16, intermediate=32)
    tensors = make_tensors(c, 16)
    write(tmp_path, c, tensors, group_size=16)
    workspace = Workspace(tmp_path)
    for _ in range(2):
        for name, tensor in tensors.items():
            found = workspace.read(name)
            assert torch.equal(found, tensor), name
            found.zero_()
    name = "model.layers.0.mlp.up_proj.scales"
    assert torch.equal(workspace.read(name, 1), tensors[name][1])


def test_a_fused_file_is_written_when_its_parts_are_there(tmp_path: Path) -> None:
    c = make_config(layers=1)
    tensors = make_tensors(c)
    weights = tmp_path / "triton_models" / "weights"
    writer = WorkspaceWriter(tmp_path, c, {}, specs_of(tensors), model_name="m")
    for name in ("v", "q", "k"):
        assert not (weights / "layers.0.attention.w_qkv.0.weight").exists()
        writer.write(
            f"model.layers.0.self_attn.{name}_proj.weight",
            tensors[f"model.layers.0.self_attn.{name}_proj.weight"],
        )
    assert (weights / "layers.0.attention.w_qkv.0.weight").exists()
    with pytest.raises(ValueError, match="written twice"):
        writer.write(
            "model.layers.0.self_attn.q_proj.weight",
            tensors["model.layers.0.self_attn.q_proj.weight"],
        )
    with pytest.raises(ValueError, match=r"norm\.weight: F16 \(2,\)"):
        writer.write("model.norm.weight", torch.zeros(2, dtype=torch.float16))
    with pytest.raises(ValueError, match="never written"):
        writer.close()
    assert not is_workspace(tmp_path)


def test_a_tied_head_is_stored_all_the_same(tmp_path: Path) -> None:
    c = make_config(tied=True)
    tensors = make_tensors(c)
    assert "lm_head.weight" not in tensors
    write(tmp_path, c, tensors, tp=2)
    assert_same(
        {"lm_head.weight": Workspace(tmp_path).read("lm_head.weight")},
        {"lm_head.weight": tensors["model.embed_tokens.weight"]},
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_biases_on_q_k_and_v_alone(tp: int, tmp_path: Path) -> None:
    c = make_config(attention_bias=True)
    tensors = make_tensors(c)
    write(tmp_path, c, tensors, tp=tp)
    zeros = {
        f"model.layers.{i}.self_attn.o_proj.bias": torch.zeros(c.hidden, dtype=torch.float16)
        for i in range(c.layers)
    }
    workspace = Workspace(tmp_path)
    assert workspace.config["model_type"] == "llama" and workspace.config["attention_bias"] is True
    assert_same({name: workspace.read(name) for name in workspace.tensors}, tensors | zeros)
    for path in (tmp_path / "triton_models" / "weights").glob("*.wo.*.bias"):
        path.unlink()
    workspace = Workspace(tmp_path)
    assert_same({name: workspace.read(name) for name in workspace.tensors}, tensors)
    assert ARCHITECTURES[workspace.config["model_type"]].read_config(workspace.config) == c


# dtypes.


def test_conversions_that_lose_nothing(tmp_path: Path) -> None:
    c = make_config(layers=1, head_dim=16, intermediate=32, dtype="bfloat16")
    tensors = make_tensors(c, 16)
    given = dict(tensors)
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        given[name] = tensors[name].bfloat16()
        tensors[name] = given[name].half()
    given["lm_head.weight"] = tensors["lm_head.weight"].float()
    assert write(tmp_path, c, given, group_size=16).rounding == {}
    workspace = Workspace(tmp_path)
    assert_same({name: workspace.read(name) for name in tensors}, tensors)
    assert workspace.config["torch_dtype"] == "float16"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_not_exact_is_refused_or_rounded(dtype: str, tmp_path: Path) -> None:
    c = make_config(dtype=dtype)
    tensors = make_tensors(c)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].float()
    tensors[name][0, :2] = torch.tensor([1 + 2.0**-20, 3.0])
    with pytest.raises(FormatError, match=rf"{name}: 1 of 192 values are not exact"):
        write(tmp_path / "a", c, tensors)
    assert not is_workspace(tmp_path / "a")
    writer = write(tmp_path / "b", c, tensors, rounded=True)
    assert writer.rounding == {
        name: pytest.approx(2.0**-20 / tensors[name].double().norm().item(), rel=1e-6)
    }
    assert torch.equal(
        Workspace(tmp_path / "b").read(name), tensors[name].to(getattr(torch, dtype))
    )


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_values_that_no_rounding_saves(value: float, tmp_path: Path) -> None:
    tensors = make_tensors(make_config())
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["model.norm.weight"][3] = value
    with pytest.raises(FormatError, match=r"model\.norm\.weight"):
        write(tmp_path, make_config(), tensors, rounded=True)


# config.ini and KV scales.


def ini(path: Path) -> dict[str, str]:
    parser = configparser.ConfigParser()  # as LMDeploy reads it
    parser.read(path / "triton_models" / "weights" / "config.ini")
    assert parser.sections() == ["llama"]
    return dict(parser["llama"])


def test_config_ini(tmp_path: Path) -> None:
    c = make_config(
        layers=1,
        head_dim=16,
        intermediate=32,
        rope=Rope(5e5, "dynamic", {"factor": 2.5}),
        logn_length=64,
    )
    raw = {"bos_token_id": 5, "eos_token_id": [6, 7]}
    write(tmp_path, c, make_tensors(c, 16), raw, group_size=16)
    assert ini(tmp_path) == {
        "model_name": "internlm-chat-7b",
        "tensor_para_size": "1",
        "head_num": "4",
        "kv_head_num": "2",
        "vocab_size": "7",
        "num_layer": "1",
        "inter_size": "32",
        "norm_eps": "1e-05",
        "attn_bias": "0",
        "start_id": "5",
        "end_id": "6",
        "session_len": "72",
        "weight_type": "int4",
        "rotary_embedding": "16",
        "rope_theta": "500000.0",
        "size_per_head": "16",
        "group_size": "16",
        "max_batch_size": "64",
        "max_context_token_num": "1",
        "step_length": "1",
        "cache_max_entry_count": "0.5",
        "cache_block_seq_len": "128",
        "cache_chunk_size": "1",
        "use_context_fmha": "1",
        "quant_policy": "0",
        "max_position_embeddings": "64",
        "rope_scaling_factor": "2.5",
        "use_logn_attn": "1",
    }
    config = Workspace(tmp_path).config
    assert (
        config["rope_scaling"] == {"rope_type": "dynamic", "factor": 2.5}
        and config["rope_theta"] == 5e5
    )
    assert (config["bos_token_id"], config["eos_token_id"], config["use_logn_attn"]) == (5, 6, True)
    assert config["quantization_config"] == {
        "quant_method": "turbomind",
        "bits": 4,
        "group_size": 16,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_config_ini_of_a_plain_model(dtype: str, tmp_path: Path) -> None:
    c = make_config(dtype=dtype, attention_bias=True, output_bias=True)
    write(tmp_path, c, make_tensors(c), tp=2)
    found = ini(tmp_path)
    assert found["weight_type"] == {"float16": "fp16", "bfloat16": "bf16"}[dtype]
    assert [
        found[key] for key in ("tensor_para_size", "group_size", "attn_bias", "vocab_size")
    ] == ["2", "0", "1", "7"]
    assert (found["rope_scaling_factor"], found["start_id"], found["end_id"]) == ("0.0", "1", "2")
    assert "quantization_config" not in Workspace(tmp_path).config


def kv_of(**values: Any) -> Tensors:
    names = {"k_scale": 0.5, "k_zero_point": 0.0, "v_scale": 0.25, "v_zero_point": 0.0, **values}
    return {
        f"model.layers.{i}.self_attn.{name}": torch.tensor(value)
        for i in range(2)
        for name, value in names.items()
    }


@pytest.mark.parametrize(
    ("tp", "values", "files"),
    [
        (1, {}, [[0.5, 0.25]]),
        (2, {}, [[0.5, 0.25]] * 2),
        (1, {"k_zero_point": -1.5}, [[0.5, -1.5, 0.25, 0.0]]),
        (2, {"v_zero_point": [1.5, 2.5]}, [[0.5, 0.0, 0.25, 1.5], [0.5, 0.0, 0.25, 2.5]]),
        (2, {"k_scale": [1.0, 2.0]}, [[1.0, 0.25], [2.0, 0.25]]),
    ],
)
def test_kv_scales(
    tp: int, values: dict[str, Any], files: list[list[float]], tmp_path: Path
) -> None:
    c = make_config()
    write(tmp_path, c, make_tensors(c), tp=tp, kv=kv_of(**values))
    for rank, expected in enumerate(files):
        for i in range(c.layers):
            raw = (
                tmp_path / "triton_models" / "weights" / f"layers.{i}.past_kv_scale.{rank}.weight"
            ).read_bytes()
            assert list(struct.unpack(f"<{len(expected)}f", raw)) == expected
    assert ini(tmp_path)["quant_policy"] == "4"
    assert_same(Workspace(tmp_path).kv_parameters(), kv_of(**values))


def test_without_kv_scales(tmp_path: Path) -> None:
    write(tmp_path, make_config(), make_tensors(make_config()))
    assert Workspace(tmp_path).kv_parameters() == {} and ini(tmp_path)["quant_policy"] == "0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.layers.0.self_attn.k_scale": torch.tensor([1.0, 2.0, 3.0])},
            r"k_scale: torch.float32 \[3\]; expected .* \[2\]",
        ),
        (
            {"model.layers.1.self_attn.v_scale": torch.tensor(0.0)},
            "v_scale: 0.0; expected finite numbers, scales above 0",
        ),
        (
            {"model.layers.1.self_attn.v_zero_point": torch.tensor(float("nan"))},
            "v_zero_point: nan",
        ),
        ({"model.layers.1.self_attn.v_scale": torch.tensor(1.0).half()}, "torch.float16"),
        ({"model.layers.2.self_attn.v_scale": torch.tensor(1.0)}, "no such KV parameter"),
    ],
)
def test_kv_scales_that_do_not_fit(change: Tensors, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        write(tmp_path, make_config(), make_tensors(make_config()), tp=2, kv=kv_of() | change)


# What is refused.


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"family": "opt"}, {}, "opt"),
        ({"experts": 4}, {}, "mixture of experts"),
        ({"qk_norm": True}, {}, "norms on q and k"),
        ({"mlp_bias": True}, {}, "biases in the MLP"),
        ({"output_bias": True}, {}, "a bias on o alone"),
        ({"sliding_windows": (None, 8)}, {}, "sliding windows"),
        ({"activation": "gelu"}, {}, "gelu"),
        ({"dtype": "float32"}, {}, "float32"),
        ({"rope": Rope(1e4, "yarn", {"factor": 2.0})}, {}, "yarn"),
        ({"rope": Rope(1e4, "llama3", {})}, {}, "llama3"),
        ({"rope": Rope(1e4, "linear", {"factor": 2.0})}, {}, "linear"),
        ({"logn_length": 32}, {}, "from 32 on"),
        ({"hidden": 20}, {}, "4 heads of 4; expected hidden_size = 20"),
        ({}, {"tp": 0}, "tp: 0"),
        ({}, {"tp": 3}, "attention heads: 4; expected a multiple of 3"),
        ({"kv_heads": 1}, {"tp": 2}, "key and value heads: 1"),
        ({"intermediate": 13}, {"tp": 2}, "intermediate_size: 13"),
        (
            {"head_dim": 8},
            {"int4": True, "group_size": 8},
            "head_dim: 8; expected a multiple of 16",
        ),
        ({"head_dim": 16, "intermediate": 32}, {"int4": True, "group_size": -1}, "group_size: -1"),
        (
            {"head_dim": 16, "intermediate": 40},
            {"int4": True, "group_size": 8},
            "w2 inputs: 40; expected a multiple of 32",
        ),
        (
            {"head_dim": 16, "intermediate": 96},
            {"int4": True, "group_size": 64},
            r"w2 inputs: 96; expected .* 64 \(whole groups",
        ),
        (
            {"heads": 8, "head_dim": 32, "intermediate": 384},
            {"int4": True, "group_size": 64, "tp": 2},
            "w2 inputs: 384; .* 256",
        ),
        (
            {"heads": 8, "head_dim": 32, "intermediate": 256},
            {"int4": True, "group_size": 256, "tp": 2},
            r"wo inputs: 256; .* 512 \(whole",
        ),
    ],
)
def test_what_prevents_a_workspace(
    change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    problems = workspace_problems(
        make_config(**change), **{"tp": 1, "int4": False, "group_size": 0, **options}
    )
    assert any(re.search(message, str(problem)) for problem in problems), problems


def test_all_that_prevents_it_is_said_at_once(tmp_path: Path) -> None:
    c = make_config(qk_norm=True, mlp_bias=True, dtype="float32")
    with pytest.raises(FormatError) as caught:
        WorkspaceWriter(tmp_path / "w", c, {}, {}, model_name="a\nquant_policy = 4")
    assert len(caught.value.problems) == 4 and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "c",
    [
        make_config(hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008),
        make_config(
            hidden=8192,
            heads=64,
            kv_heads=8,
            head_dim=128,
            intermediate=28672,
            rope=Rope(1e4, "dynamic", {"factor": 2.0}),
        ),
        make_config(
            hidden=4096,
            heads=32,
            kv_heads=32,
            head_dim=128,
            intermediate=11008,
            rope=Rope(1e4, "qwen"),
            attention_bias=True,
        ),
    ],
)
def test_real_models_fit(c: DecoderConfig) -> None:
    for tp in (1, 2):
        for int4 in (False, True):
            assert workspace_problems(c, tp=tp, int4=int4, group_size=128) == []


def test_tensors_that_are_not_the_configs(tmp_path: Path) -> None:
    c = make_config()
    specs = specs_of(make_tensors(c))
    del specs["lm_head.weight"]
    specs["model.layers.0.mlp.gate_proj.bias"] = ("F16", (12,))
    specs["model.norm.weight"] = ("F16", (15,))
    specs["model.layers.0.mlp.up_proj.weight"] = ("I8", (12, 16))
    with pytest.raises(FormatError) as caught:
        WorkspaceWriter(tmp_path, c, {}, specs, model_name="m")
    text = str(caught.value)
    for part in (
        "missing tensors: lm_head.weight",
        "unknown tensors: model.layers.0.mlp.gate_proj.bias",
        "F16 [15]",
        "I8 [12, 16]",
    ):
        assert part in text
    assert len(caught.value.problems) == 4


def test_linears_of_two_kinds(tmp_path: Path) -> None:
    c = make_config(layers=1, head_dim=16, intermediate=32)
    specs = specs_of(make_tensors(c, 16))
    specs["model.layers.0.mlp.up_proj.weight"] = ("F16", (32, 64))
    with pytest.raises(FormatError, match=r"up_proj\.weight is plain, others are int4"):
        WorkspaceWriter(tmp_path, c, {}, specs, model_name="m", group_size=16)


# Damage.


def edit(old: str, new: str) -> Callable[[Path], None]:
    def change(weights: Path) -> None:
        text = (weights / "config.ini").read_text()
        assert old in text
        (weights / "config.ini").write_text(text.replace(old, new))

    return change


def replace(name: str, raw: bytes) -> Callable[[Path], None]:
    return lambda weights: (weights / name).write_bytes(raw) and None


def link(name: str, target: str) -> Callable[[Path], None]:
    def change(weights: Path) -> None:
        (weights / name).unlink()
        (weights / name).symlink_to(target)

    return change


BIG = str(10**12)
DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config.ini": (lambda w: (w / "config.ini").unlink(), "config.ini: No such file"),
    "config.ini is a folder": (
        lambda w: ((w / "config.ini").unlink(), (w / "config.ini").mkdir(), None)[2],
        "no regular file",
    ),
    "no INI": (replace("config.ini", b"{}"), "not an INI file"),
    "no UTF-8": (replace("config.ini", b"[llama]\nx = \xff"), "not an INI file"),
    "no section": (replace("config.ini", b"[lama]\n"), r"no section \[llama\]"),
    "a section twice": (replace("config.ini", b"[llama]\n[llama]\n"), "not an INI file"),
    "a huge config.ini": (replace("config.ini", b"#" * (2 << 20)), "more than"),
    "interpolation": (
        edit("norm_eps = 1e-05", "norm_eps = %(head_num)s"),
        r"norm_eps: '%\(head_num\)s'",
    ),
    "layers": (
        edit("num_layer = 2", f"num_layer = {BIG}"),
        f"num_layer: '{BIG}'; expected an integer from 1 to 10000",
    ),
    "many layers": (edit("num_layer = 2", "num_layer = 10000"), r"missing files: layers\.2\."),
    "no layers": (edit("num_layer = 2", "num_layer = -2"), "num_layer: '-2'"),
    "a number of 5000 digits": (edit("num_layer = 2", "num_layer = " + "9" * 5000), "num_layer"),
    "not a number": (edit("vocab_size = 7", "vocab_size = seven"), "vocab_size: 'seven'"),
    "a huge vocabulary": (
        edit("vocab_size = 7", "vocab_size = 2147483647"),
        r"tok_embeddings\.weight: \d+ bytes; expected \d+ by",
    ),
    "a huge MLP": (edit("inter_size = 12", "inter_size = 2000000000"), r"w2\.0\.weight: \d+ bytes"),
    "a larger head": (
        edit("size_per_head = 4", "size_per_head = 8"),
        "rotary_embedding: 4; expected size_per_head = 8",
    ),
    "heads": (
        edit("kv_head_num = 2", "kv_head_num = 3"),
        "kv_head_num: 3; expected a divisor of head_num = 4",
    ),
    "tp": (
        edit("tensor_para_size = 2", "tensor_para_size = 4"),
        "key and value heads: 2; expected a multiple of 4",
    ),
    "one rank": (
        edit("tensor_para_size = 2", "tensor_para_size = 1"),
        r"w_qkv\.0\.weight: \d+ bytes",
    ),
    "no norm_eps": (edit("norm_eps = 1e-05", ""), "norm_eps: missing"),
    "an endless norm_eps": (edit("norm_eps = 1e-05", "norm_eps = 1e999"), "norm_eps: '1e999'"),
    "a weight type": (
        edit("weight_type = fp16", "weight_type = int8"),
        "weight_type: 'int8'; expected fp16, bf16 or int4",
    ),
    "int4 that is not": (edit("weight_type = fp16", "weight_type = int4"), "group_size: '0'"),
    "a quantisation policy": (edit("quant_policy = 4", "quant_policy = 2"), "quant_policy: 2"),
    "dynamic scaling without a factor": (
        edit("quant_policy = 4", "use_dynamic_ntk = 1"),
        "use_dynamic_ntk",
    ),
    "a missing file": (lambda w: (w / "norm.weight").unlink(), r"missing files: norm\.weight"),
    "a missing rank": (
        lambda w: (w / "layers.1.feed_forward.w2.1.weight").unlink(),
        r"missing files: layers\.1\.feed_forward\.w2\.1",
    ),
    "a missing bias": (
        lambda w: (w / "layers.0.attention.wo.1.bias").unlink(),
        r"missing files: layers\.0\.attention\.wo\.1\.bias",
    ),
    "a missing KV file": (
        lambda w: (w / "layers.1.past_kv_scale.0.weight").unlink(),
        "missing files: layers.1.past_kv_scale.0",
    ),
    "a KV file of another kind": (
        replace("layers.1.past_kv_scale.0.weight", b"0" * 16),
        "past_kv_scale.0.weight: 16 bytes; expected 8",
    ),
    "truncated": (
        lambda w: os.truncate(w / "output.weight", 100),
        r"output\.weight: 100 bytes; expected 256 by config\.ini",
    ),
    "oversized": (
        lambda w: os.truncate(w / "output.weight", 10**6),
        r"output\.weight: 1000000 bytes",
    ),
    "a folder for a file": (
        lambda w: ((w / "norm.weight").unlink(), (w / "norm.weight").mkdir(), None)[2],
        r"missing files: norm\.weight",
    ),
    "a link out": (link("norm.weight", "/etc/passwd"), r"norm\.weight: a link to /etc/passwd"),
    "a link up": (link("norm.weight", "../../../outside"), r"norm\.weight: a link to"),
    "a dead link": (link("norm.weight", "nothing"), r"norm\.weight: No such file"),
    "a link to itself": (link("norm.weight", "norm.weight"), r"norm\.weight"),
    "a linked config.ini": (
        link("config.ini", "/etc/passwd"),
        r"config\.ini: a link to /etc/passwd",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    c = make_config(attention_bias=True, output_bias=True)
    path = tmp_path_factory.mktemp("sound")
    write(path, c, make_tensors(c), tp=2, kv=kv_of())
    return path


def copy(sound: Path, path: Path) -> Path:
    shutil.copytree(sound, path)
    return path / "triton_models" / "weights"


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_told(kind: str, sound: Path, tmp_path: Path) -> None:
    weights = copy(sound, tmp_path / "w")
    (tmp_path / "outside").write_bytes(b"0" * 32)
    assert Workspace(tmp_path / "w").tensors
    change, message = DAMAGED[kind]
    change(weights)
    with pytest.raises(ModelError, match=message) as caught:
        Workspace(tmp_path / "w")
    assert str(tmp_path / "w") in str(caught.value)


def test_all_damage_is_told_at_once(sound: Path, tmp_path: Path) -> None:
    weights = copy(sound, tmp_path / "w")
    os.truncate(weights / "output.weight", 1)
    os.truncate(weights / "layers.1.attention.wo.1.weight", 1)
    (weights / "norm.weight").unlink()
    link("layers.0.ffn_norm.weight", "/etc/passwd")(weights)
    with pytest.raises(ModelError) as caught:
        Workspace(tmp_path / "w")
    text = str(caught.value)
    assert all(
        part in text
        for part in ("output.weight: 1 bytes", "wo.1.weight: 1 bytes", "norm.weight", "/etc/passwd")
    )
    edit("vocab_size = 7", "vocab_size = 0")(weights)
    edit("norm_eps = 1e-05", "norm_eps = 0")(weights)
    with pytest.raises(ModelError) as caught:
        Workspace(tmp_path / "w")
    assert len(caught.value.problems) == 2


def test_links_inside_a_workspace_are_followed(sound: Path, tmp_path: Path) -> None:
    weights = copy(sound, tmp_path / "w")
    (weights / "norm.weight").rename(weights / "stored")
    (weights / "norm.weight").symlink_to("stored")
    assert torch.equal(
        Workspace(tmp_path / "w").read("model.norm.weight"),
        Workspace(sound).read("model.norm.weight"),
    )


def test_damage_that_shows_when_it_is_read(sound: Path, tmp_path: Path) -> None:
    weights = copy(sound, tmp_path / "w")
    (weights / "layers.0.attention.wo.1.bias").write_bytes(b"1" * 32)
    (weights / "layers.1.past_kv_scale.1.weight").write_bytes(struct.pack("<2f", 0.5, -1.0))
    workspace = Workspace(tmp_path / "w")
    with pytest.raises(ModelError, match=r"attention\.wo\.0\.bias: its ranks differ"):
        workspace.read("model.layers.0.self_attn.o_proj.bias")
    with pytest.raises(ModelError, match=r"layers\.1\.past_kv_scale.*scales above 0"):
        workspace.kv_parameters()
    os.truncate(weights / "norm.weight", 3)
    with pytest.raises(ModelError, match="ends inside the tensor"):
        workspace.read("model.norm.weight")
    (weights / "norm.weight").unlink()
    with pytest.raises(ModelError, match="No such file"):
        workspace.read("model.norm.weight")


def test_what_a_workspace_is(sound: Path, tmp_path: Path) -> None:
    assert (
        is_workspace(sound) and not is_workspace(tmp_path) and not is_workspace(tmp_path / "none")
    )
    assert not is_workspace(sound / "triton_models" / "weights")
    assert Workspace(sound).model_name == "internlm-chat-7b"
    with pytest.raises(ModelError, match="No such file"):
        Workspace(tmp_path)
