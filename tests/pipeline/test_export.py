"""A quantised checkpoint in another format: the same codes, scales and zero points, or none at all."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantflow.errors import FormatError, ModelError, OutputError
from quantflow.formats import FORMATS
from quantflow.formats.abilities import ABILITIES
from quantflow.formats.reader import Weights
from quantflow.pipeline.export import Options, export
from quantflow.quant.grid import Scheme
from quantflow.recipe import Pack
from tests.helpers.runs import Bench, contents, invoke, make_bench

EVERY = ("compressed-tensors", "awq", "gptq", "gptq_v2")


def made(root: Path, pack: str, stages: list[Any], **changes: Any) -> Bench:
    bench = make_bench(root, intermediate_size=128)
    result = invoke("run", bench.recipe(stages=[*stages, {"pack": {"format": pack}}, *changes.pop("after", [])], **changes))
    assert result.exit_code == 0, result.output
    return bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Four bits, symmetric, with KV parameters by head: what every format holds."""
    stages = ["calibrate", "gptq", {"kv_qparams": {"granularity": "head"}}]
    weights = {"bits": 4, "group_size": 32, "symmetric": True}
    return made(tmp_path_factory.mktemp("export"), "compressed-tensors", stages, weights=weights, after=[{"shard": {"tp": 2}}])


def tensors(folder: Path) -> dict[str, Any]:
    """Everything that a checkpoint says, by native names."""
    weights = Weights(folder)
    found: dict[str, Any] = {}
    for name in weights.checkpoint.expected:
        if weights.is_quantised(name):
            q = weights.quantized(name.removesuffix(".weight"))
            found[name] = (q.scheme, q.codes, q.scales.double(), q.zeros, q.group_index)
        else:
            found[name] = weights.tensor(name)
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert set(a) == set(b)
    different = [name for name in a if not same(a[name], b[name])]
    assert not different


@pytest.mark.parametrize(("first", "second"), [pair for pair in product(EVERY, EVERY) if pair[0] != pair[1]])
def test_there_and_back_is_the_same(bench: Bench, tmp_path: Path, first: str, second: str) -> None:
    one, two, back = (tmp_path / name for name in ("one", "two", "back"))
    export(bench.output, first, one)
    done = export(one, second, two)
    assert (done.source_format, done.format, done.modules) == (first, second, 14)
    assert_same(tensors(one), tensors(bench.output))
    assert_same(tensors(two), tensors(bench.output))
    export(two, first, back)
    assert contents(back) == contents(one)  # bit for bit, configuration and tokenizer too
    assert (two / "kv_qparams.safetensors").read_bytes() == (bench.output / "kv_qparams.safetensors").read_bytes()


def test_what_is_exported_is_what_a_run_packs(bench: Bench, tmp_path: Path) -> None:
    """Ranks and whole, byte for byte; and their KV parameters."""
    export(bench.output, "compressed-tensors", tmp_path / "out", Options(tp=2))
    ours, theirs = contents(tmp_path / "out"), contents(bench.output)
    shared = set(ours) & set(theirs)
    assert {"model.safetensors", "config.json", "tp2/rank-0/model.safetensors", "tp2/rank-1/kv_qparams.safetensors"} <= shared
    assert set(ours) == shared
    assert [name for name in shared if ours[name] != theirs[name]] == []


def test_the_engine_runs_it(bench: Bench, tmp_path: Path) -> None:
    from quantflow import LLM, SamplingParams

    params = SamplingParams(max_tokens=12, logprobs=0)
    expected = LLM(bench.output, device="cpu").generate("The cat", params)[0].completions
    export(bench.output, "awq", tmp_path / "out")
    llm = LLM(tmp_path / "out", device="cpu")
    assert llm.generate("The cat", params)[0].completions == expected and "int8" in llm.engine.describe()["KV cache"]


def test_an_act_order_index_goes_where_it_can(tmp_path: Path) -> None:
    stages = ["calibrate", {"gptq": {"act_order": "dynamic"}}]
    bench = made(tmp_path, "gptq_v2", stages, weights={"bits": 4, "group_size": 32, "symmetric": True})
    export(bench.output, "gptq", tmp_path / "v1")
    assert_same(tensors(tmp_path / "v1"), tensors(bench.output))
    assert any(value[4] is not None for value in tensors(tmp_path / "v1").values() if isinstance(value, tuple))
    for name in ("awq", "compressed-tensors"):
        with pytest.raises(FormatError, match="group index") as refused:
            export(bench.output, name, tmp_path / "no")
        assert "q_proj and 13 more" in str(refused.value)  # all at once
        assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".no*"))


def test_mixed_bits(tmp_path: Path) -> None:
    weights = {"bits": 4, "group_size": 32, "symmetric": True, "overrides": [{"match": "*.down_proj", "bits": 8}]}
    bench = made(tmp_path, "compressed-tensors", ["rtn"], weights=weights)
    export(bench.output, "gptq_v2", tmp_path / "v2")
    assert_same(tensors(tmp_path / "v2"), tensors(bench.output))
    with pytest.raises(FormatError) as refused:
        export(bench.output, "awq", tmp_path / "no")
    said = str(refused.value)
    assert "8 bits" in said and "as elsewhere, since AWQ has one width" in said


def test_a_zero_point_that_the_first_gptq_cannot_say(tmp_path: Path) -> None:
    """It is known when the tensor is read: nothing of the checkpoint stays then."""
    bench = made(tmp_path, "gptq_v2", ["rtn"], weights={"bits": 2, "group_size": 16, "symmetric": False})
    zeros = [value[3] for value in tensors(bench.output).values() if isinstance(value, tuple)]
    assert any(bool((z == 0).any()) for z in zeros)
    result = invoke("export", bench.output, "--format", "gptq", "--output", tmp_path / "no")
    assert result.exit_code == 2 and "zero point" in result.output
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".no*"))


def test_what_is_wrong_is_said(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="one of compressed-tensors"):
        export(bench.output, "gguf2", tmp_path / "no")
    with pytest.raises(FormatError, match="quantflow run quantises"):
        export(bench.model, "awq", tmp_path / "no")
    with pytest.raises(OutputError, match="the source itself"):
        export(bench.output, "awq", bench.output)
    with pytest.raises(ModelError):
        export(tmp_path / "nothing", "awq", tmp_path / "no")
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(OutputError, match="other content"):
        export(bench.output, "awq", other)
    assert [p.name for p in other.iterdir()] == ["letter.txt"] and not (tmp_path / "no").exists()
    with pytest.raises(FormatError, match="tp = 3"):
        export(bench.output, "awq", tmp_path / "no", Options(tp=3))


def test_files_of_a_size(bench: Bench, tmp_path: Path) -> None:
    done = invoke("export", bench.output, "--format", "awq", "--output", tmp_path / "parts", "--max-shard-size", "40000")
    assert done.exit_code == 0, done.output
    files = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == dict(sorted(held.items()))
    assert_same(tensors(tmp_path / "parts"), tensors(bench.output))
    for wrong in ("5", "5XB", "-1"):
        result = invoke("export", bench.output, "--format", "awq", "--output", tmp_path / "no", "--max-shard-size", wrong)
        assert result.exit_code == 2 and "--max-shard-size" in result.output


def test_the_commands(bench: Bench, tmp_path: Path) -> None:
    result = invoke("export", bench.output, "--format", "awq", "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["to"] == "awq"
    assert json.loads(invoke("formats", "--json").stdout)["awq"]["bits"] == [4]
    assert "compressed-tensors" in invoke("formats").stdout


def test_the_table_says_what_the_formats_do() -> None:
    assert set(ABILITIES) == set(FORMATS) == set(get_args(Pack.model_fields["format"].annotation))
    for name, ability in ABILITIES.items():
        form = FORMATS[name]

        def holds(scheme: Scheme, index: bool = False, form: Any = form, **ranks: int) -> bool:
            return not form.check("m", (256, 256), scheme, act_order_index=index, **ranks)

        assert tuple(bits for bits in (2, 3, 4, 8) if holds(Scheme(bits, 32, True))) == ability.bits, name
        assert holds(Scheme(4, 64, True, "nf4")) == ("NF4" in ability.grid or "any" in ability.grid)
        assert holds(Scheme(4, 32, False, "minimum")) == ("minimums" in ability.grid or "any" in ability.grid)
        main = Scheme(4, 64, True, "integer" if ability.bits else "nf4")
        if main.kind == "integer":
            assert holds(main, index=True) == (ability.act_order_index == "yes") == form.holds_index
        assert holds(main, tp=2, tp_dim=0) == ability.tensor_parallel.startswith("yes")
        assert holds(Scheme(4, 64, False)) == (ability.asymmetric != "no")
        assert form.mixed_bits == (ability.mixed_bits == "yes")


def rewritten(folder: Path, change: Any) -> None:
    """The checkpoint's tensors, changed, in one file."""
    file = folder / "model.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file, {"format": "pt"})


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith(".qzeros"))
    tensors[name] = tensors[name][:, :-1].contiguous()


def floating(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith(".qweight"))
    tensors[name] = tensors[name].float()


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if n.endswith(".scales"))
    tensors[name][0, 0] = torch.inf


def absurd_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:])


def outside(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../../model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "damage",
    [cut, absurd_header, outside, lambda f: rewritten(f, narrow), lambda f: rewritten(f, floating), lambda f: rewritten(f, infinite)],
    ids=["cut", "absurd_header", "outside", "narrow_zeros", "floating_codes", "infinite_scale"],
)
def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(bench: Bench, tmp_path: Path, damage: Any) -> None:
    export(bench.output, "gptq_v2", tmp_path / "source")
    damage(tmp_path / "source")
    result = invoke("export", tmp_path / "source", "--format", "awq", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "internal error" not in result.output, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
