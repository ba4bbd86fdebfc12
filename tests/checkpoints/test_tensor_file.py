"""Safetensors files read and written here, against the safetensors package and against files made
byte by byte."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.torch import load_file, save_file

from quantflow.checkpoints.tensor_file import (
    ITEM_BITS,
    ITEM_BYTES,
    TensorFile,
    TensorWriter,
    dtype_name,
    save_tensors,
    torch_dtype,
)
from quantflow.errors import ModelError

DTYPES = [torch_dtype(name) for name in ITEM_BYTES]


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    """Every dtype in several shapes, with values at the ends of its range."""
    found = {}
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for shape in ((), (1,), (3,), (2, 3), (2, 0, 3), (0,), (2, 1, 5)):
            if dtype.is_floating_point:
                value = torch.randn(shape, generator=generator).to(dtype)
            else:
                value = torch.randint(
                    0, 2 if dtype == torch.bool else 100, shape, generator=generator
                ).to(dtype)
            found[f"{name}.{'x'.join(map(str, shape)) or 'scalar'}"] = value
        if dtype.is_floating_point:
            found[f"{name}.ends"] = torch.tensor(
                [
                    torch.finfo(dtype).max,
                    torch.finfo(dtype).min,
                    torch.finfo(dtype).tiny,
                    float("inf"),
                    float("nan"),
                    -0.0,
                ],
                dtype=dtype,
            )
        elif dtype != torch.bool and not dtype.is_complex:
            found[f"{name}.ends"] = torch.tensor(
                [torch.iinfo(dtype).max, torch.iinfo(dtype).min], dtype=dtype
            )
    return found


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Bit by bit."""
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_reads_what_the_package_wrote(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "ß": "日本"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt", "ß": "日本"} and set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        info = file.tensors[name]
        assert (
            torch_dtype(info.dtype) == tensor.dtype
            and info.shape == tuple(tensor.shape)
            and info.nbytes == tensor.nbytes
        )
        assert dtype_name(tensor.dtype) == info.dtype
        assert_same(file.read(name), tensor)


def test_writes_what_the_package_reads(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    save_tensors(tmp_path / "a.safetensors", tensors, {"report": '{"ß": "日本"}'})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    found = load_file(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"report": '{"ß": "日本"}'}
    # Every tensor lies at a multiple of its own item, so that others may map the file.
    for info in TensorFile(tmp_path / "a.safetensors").tensors.values():
        assert info.start % ITEM_BYTES[info.dtype] == 0


def test_an_empty_file_of_tensors(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {})
    assert (
        load_file(tmp_path / "a.safetensors") == {}
        and TensorFile(tmp_path / "a.safetensors").tensors == {}
    )


@settings(deadline=None, max_examples=20)
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda s: s != "__metadata__" and s.isprintable()),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_any_names_and_shapes(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("t") / "a.safetensors"
    tensors = {
        n: torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
        for n, (dtype, shape) in specs.items()
    }
    save_tensors(path, tensors)
    found, ours = load_file(path), TensorFile(path)
    assert set(found) == set(tensors) == set(ours.tensors)
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
        assert_same(ours.read(name), tensor)


def test_one_slice(tmp_path: Path) -> None:
    experts = torch.arange(24, dtype=torch.bfloat16).view(3, 2, 4)
    save_file({"a": torch.ones(5), "experts": experts}, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    for i in range(3):
        assert_same(file.read("experts", i), experts[i])


def test_tensors_that_are_views(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    views = {
        "t": whole.t(),
        "column": whole[:, 1],
        "row": whole[1],
        "expanded": torch.tensor(7.0).expand(2, 2),
    }
    save_tensors(tmp_path / "a.safetensors", views)
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[n], v) for n, v in views.items())


def test_a_read_tensor_is_ones_own(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4)}, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    file.read("a").add_(1)
    assert file.read("a").eq(0).all()


def test_files_are_not_mapped(tmp_path: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps on this system")
    path = tmp_path / "never-mapped.safetensors"
    save_tensors(path, {"a": torch.ones(2**16)})
    file = TensorFile(path)
    held = file.read("a")
    assert path.name not in maps.read_text()
    assert held.eq(1).all()


def test_the_writer_takes_any_order_and_checks(tmp_path: Path) -> None:
    specs = {"a": ("F32", (2,)), "b": ("I64", ()), "c": ("U8", (3,))}
    path = tmp_path / "a.safetensors"
    with TensorWriter(path, specs) as writer:
        writer.write("c", torch.tensor([1, 2, 3], dtype=torch.uint8))
        writer.write("a", torch.tensor([1.0, 2.0]))
        for name, wrong in (
            ("b", torch.tensor(1.0)),
            ("b", torch.tensor([1])),
            ("a", torch.tensor([1.0, 2.0])),
        ):
            with pytest.raises(ValueError, match=name):
                writer.write(name, wrong)
        writer.write("b", torch.tensor(-7))
    found = load_file(path)
    assert (
        found["a"].tolist() == [1.0, 2.0]
        and found["b"].item() == -7
        and found["c"].tolist() == [1, 2, 3]
    )
    with pytest.raises(ValueError, match="never written: a"), TensorWriter(path, specs) as writer:
        writer.write("b", torch.tensor(1))


def test_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    tensors = tensors_of_all_kinds()
    save_tensors(tmp_path / "a", tensors, {"x": "1"})
    save_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises((StopIteration, ValueError)):
        save_tensors(path, {"a": torch.ones(2), "z": torch.ones(2, dtype=torch.complex128)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_every_dtype_of_the_package_is_known(tmp_path: Path) -> None:
    def file_with(dtype: str, nbytes: int) -> bytes:
        return file_of({"a": entry(dtype, (16,), (0, nbytes))}, bytes(nbytes))

    with pytest.raises(Exception, match="unknown variant") as refused:
        deserialize(file_with("F7", 14))
    assert set(re.findall("`([A-Z0-9_]+)`", str(refused.value))) == {"F7", *ITEM_BITS}
    for dtype, bits in ITEM_BITS.items():
        raw = file_with(dtype, 16 * bits // 8)
        assert deserialize(raw)[0][1]["dtype"] == dtype  # it is as long as the package says
        (tmp_path / "a").write_bytes(raw)
        file = TensorFile(tmp_path / "a")
        assert file.tensors["a"].nbytes == 16 * bits // 8
        if bits < 8:
            with pytest.raises(ModelError, match=f"tensor a: dtype {dtype}"):
                file.read("a")
        else:
            assert dtype_name(file.read("a").dtype) == dtype


# Damaged files.


def file_of(
    header: Any, data: bytes = b"\0" * 64, *, raw: bytes | None = None, length: int | None = None
) -> bytes:
    text = json.dumps(header).encode() if raw is None else raw
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED = {
    "empty": b"",
    "five bytes": b"\x01\0\0\0\0",
    "header longer than the file": file_of({"a": entry()}, length=10**6),
    "header of 2^63 bytes": file_of({"a": entry()}, length=2**63),
    "a zip, as torch.save writes": b"PK\x03\x04" + b"\0" * 60,
    "an HTML page": b"<!DOCTYPE html><html><body>404</body></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "no JSON": file_of(None, raw=b"{nonsense"),
    "no UTF-8": file_of(None, raw=b'{"\xff": 1}'),
    "an array": file_of([1, 2]),
    "a number": file_of(5),
    "no header": file_of(None, raw=b""),
    "deeply nested": file_of(None, raw=b"[" * 200_000),
    "a number of 5000 digits": file_of(None, raw=b'{"a": ' + b"1" * 5000 + b"}"),
    "metadata is a list": file_of({"__metadata__": ["x"], "a": entry()}),
    "metadata is a string": file_of({"__metadata__": "x", "a": entry()}),
    "entry is a number": file_of({"a": 5}),
    "entry is a list": file_of({"a": [1]}),
    "entry is null": file_of({"a": None}),
    "no dtype": file_of({"a": {"shape": [4], "data_offsets": [0, 16]}}),
    "no shape": file_of({"a": {"dtype": "F32", "data_offsets": [0, 16]}}),
    "no offsets": file_of({"a": {"dtype": "F32", "shape": [4]}}),
    "unknown dtype": file_of({"a": entry("F7")}),
    "items of half a byte": file_of({"a": entry("F4", [7], [0, 4])}),
    "dtype is a list": file_of({"a": entry(["F32"])}),
    "dtype is null": file_of({"a": entry(None)}),
    "shape is a number": file_of({"a": entry(shape=4)}),
    "shape is a string": file_of({"a": entry(shape="4")}),
    "shape has a fraction": file_of({"a": entry(shape=[4.5])}),
    "shape has infinity": file_of(
        None, raw=b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 16]}}'
    ),
    "shape has a string": file_of({"a": entry(shape=["x"])}),
    "shape is negative": file_of({"a": entry(shape=[-2, -2])}),
    "shape is too large": file_of({"a": entry(shape=[2**62, 4])}),
    "one offset": file_of({"a": entry(offsets=[0])}),
    "three offsets": file_of({"a": entry(offsets=[0, 16, 32])}),
    "offsets are strings": file_of({"a": entry(offsets=["a", "b"])}),
    "offset is null": file_of({"a": entry(offsets=[None, 16])}),
    "offset is negative": file_of({"a": entry(offsets=[-16, 0])}),
    "offsets are reversed": file_of({"a": entry(offsets=[16, 0])}),
    "too many bytes": file_of({"a": entry(offsets=[0, 20])}),
    "too few bytes": file_of({"a": entry(offsets=[0, 12])}),
    "ends after the file": file_of({"a": entry(offsets=[56, 72])}),
    "starts after the file": file_of({"a": entry(offsets=[640, 656])}),
    "overlapping": file_of({"a": entry(), "b": entry(offsets=[8, 24])}),
    "one inside another": file_of(
        {"a": entry(shape=[16], offsets=[0, 64]), "b": entry(shape=[1], offsets=[4, 8])}
    ),
    "the same bytes twice": file_of({"a": entry(), "b": entry()}),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused_with_their_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(ModelError) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.arange(3, dtype=torch.uint8)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError):
            TensorFile(path)


def test_a_file_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.arange(1000.0)}, path)
    file = TensorFile(path)
    with open(path, "r+b") as handle:
        handle.truncate(path.stat().st_size - 1)
    with pytest.raises(ModelError, match="tensor a"):
        file.read("a")


def test_what_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(ModelError, match=r"No such file|directory"):
            TensorFile(path)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 200), st.integers(0, 255))
def test_no_changed_byte_of_the_header_crashes(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "weights.safetensors"
    save_file(
        {"a": torch.arange(4.0), "b": torch.arange(3, dtype=torch.uint8)}, path, {"format": "pt"}
    )
    whole = bytearray(path.read_bytes())
    whole[at % (8 + int.from_bytes(whole[:8], "little"))] = value
    path.write_bytes(whole)
    try:
        file = TensorFile(path)
    except ModelError:
        return
    for name, info in file.tensors.items():  # what is accepted can be read
        assert tuple(file.read(name).shape) == info.shape
