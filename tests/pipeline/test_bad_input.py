"""Every wrong input ends with exit code 2 and one clear message, and leaves nothing half-written
behind."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.runs import STAGES, Bench, invoke, make_bench
from tests.helpers.tiny import write_text

# harms the bench; returns changes of the recipe
Change = Callable[[Bench], "dict[str, Any] | None"]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("intact"))


@pytest.fixture
def bench(intact: Bench, tmp_path: Path) -> Bench:
    root = tmp_path / "bench"
    shutil.copytree(intact.root, root)
    return Bench(root)


def refused(
    bench: Bench,
    fragments: tuple[str, ...],
    *arguments: object,
    command: str = "run",
    **changes: Any,
) -> str:
    """The message of a command that must be refused."""
    result = invoke(command, bench.recipe(**changes), *arguments)
    message = " ".join(result.stderr.split())  # the console may wrap
    assert result.exit_code == 2, result.output
    for fragment in fragments:
        assert fragment in message, result.stderr
    assert "Traceback" not in result.output
    assert "problem" in result.stderr
    assert (
        not bench.output.exists()
        and [name for name in bench.leavings() if not name.startswith("stream-")] == []
    )
    return message


# The model directory


def weights_file(bench: Bench) -> Path:
    return bench.model / "model.safetensors"


def header(bench: Bench) -> tuple[dict[str, Any], bytes]:
    raw = weights_file(bench).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(bench: Bench, content: object, data: bytes) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    weights_file(bench).write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def edit_header(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(bench: Bench) -> None:
        content, data = header(bench)
        change(content)
        write_header(bench, content, data)

    return apply


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(bench: Bench) -> None:
        tensors = load_file(weights_file(bench))
        change(tensors)
        save_file(tensors, weights_file(bench), {"format": "pt"})

    return apply


def poison(name: str, value: float) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] = value

    return edit_tensors(change)


def edit_config(**values: Any) -> Change:
    """Sets keys of config.json; None removes one."""

    def apply(bench: Bench) -> None:
        path = bench.model / "config.json"
        config = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return apply


def write(name: str, data: bytes | str) -> Change:
    def apply(bench: Bench) -> None:
        (bench.root / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return apply


def remove(*names: str) -> Change:
    def apply(bench: Bench) -> None:
        for name in names:
            os.remove(bench.root / name)

    return apply


def in_two_files(
    *, index: Callable[[dict[str, str]], object] | None = None, both: bool = False, lose: str = ""
) -> Change:
    """The weights in two files; `index` changes the map that says what lies where (no index where
    it is None)."""

    def apply(bench: Bench) -> None:
        tensors = load_file(weights_file(bench))
        weights_file(bench).unlink()
        names = sorted(tensors)
        parts = {
            "model-00001-of-00002.safetensors": names[:10],
            "model-00002-of-00002.safetensors": names[9 if both else 10 :],
        }
        for file, own in parts.items():
            save_file({n: tensors[n] for n in own}, bench.model / file, {"format": "pt"})
        if index is not None:
            found = {n: file for file, own in parts.items() for n in own}
            index(found)
            (bench.model / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": found})
            )
        if lose:
            (bench.model / lose).unlink()

    return apply


def cut(bench: Bench) -> None:
    path = weights_file(bench)
    path.write_bytes(path.read_bytes()[:-5000])


def pickled(bench: Bench) -> None:
    torch.save(load_file(weights_file(bench)), bench.model / "pytorch_model.bin")
    weights_file(bench).unlink()


def overlapping(content: dict[str, Any]) -> None:
    first, second = (
        content["model.layers.0.mlp.up_proj.weight"],
        content["model.layers.0.mlp.gate_proj.weight"],
    )
    first["data_offsets"] = [second["data_offsets"][0] + 2, second["data_offsets"][1] + 2]


Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"

MODELS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a truncated weight file": (
        cut,
        ("model.safetensors", "truncated", "copy or download it again"),
    ),
    "an empty weight file": (
        write("model/model.safetensors", b""),
        ("model.safetensors: an empty file (0 bytes)",),
    ),
    "a header longer than the file": (
        write("model/model.safetensors", struct.pack("<Q", 10**6) + b"{}"),
        ("a header of 1000000 bytes in a file of 10",),
    ),
    "a header of impossible length": (
        write("model/model.safetensors", b"\xff" * 64),
        ("a header of 18446744073709551615 bytes",),
    ),
    "a header that is not JSON": (
        lambda b: write_header(b, b"{not json", b""),
        ("a header that is not JSON",),
    ),
    "a header that is a list": (
        lambda b: write_header(b, [1], b""),
        ("a header that is no JSON object",),
    ),
    "a header nested too deeply": (
        lambda b: write_header(b, b"[" * 200_000, b""),
        ("a header that is not JSON",),
    ),
    "metadata that is a list": (
        edit_header(lambda h: h.update(__metadata__=["pt"])),
        ("model.safetensors", "metadata"),
    ),
    "a tensor without offsets": (
        edit_header(lambda h: h[Q].pop("data_offsets")),
        (Q, "no valid dtype, shape and data_offsets"),
    ),
    "infinite offsets": (
        edit_header(lambda h: h[Q].update(data_offsets=[0, float("inf")])),
        (Q, "no valid dtype, shape and data_offsets"),
    ),
    "a dtype that is a list": (
        edit_header(lambda h: h[Q].update(dtype=["F32"])),
        (Q, "dtype ['F32']"),
    ),
    "negative offsets": (edit_header(lambda h: h[Q].update(data_offsets=[-8192, 0])), (Q,)),
    "overlapping tensors": (edit_header(overlapping), ("overlap", "mlp.gate_proj")),
    "a dtype of another size": (
        edit_header(lambda h: h[Q].update(dtype="F32")),
        (Q, "of shape [64, 64] and dtype F32 has 8192 bytes"),
    ),
    "a dtype that is unknown": (
        edit_header(lambda h: h[Q].update(dtype="F7")),
        (Q, "dtype F7", "one of C64, F64, F32"),
    ),
    "a missing shard": (
        in_two_files(index=lambda m: None, lose="model-00002-of-00002.safetensors"),
        ("model-00002-of-00002.safetensors: missing shard",),
    ),
    "an index that names a file elsewhere": (
        in_two_files(index=lambda m: m.update({Q: "../../secret.safetensors"})),
        ("weight file '../../secret.safetensors'", "a .safetensors file in the same directory"),
    ),
    "an index that names a pickle": (
        in_two_files(index=lambda m: m.update({Q: "pytorch_model.bin"})),
        ("weight file 'pytorch_model.bin'",),
    ),
    "an index of a tensor that is not there": (
        in_two_files(index=lambda m: m.update({"model.extra": "model-00001-of-00002.safetensors"})),
        ("tensor model.extra is missing",),
    ),
    "an index without a map": (
        write("model/model.safetensors.index.json", '{"weight_map": ["a"]}'),
        ("no weight_map",),
    ),
    "an index that is not JSON": (
        write("model/model.safetensors.index.json", "{"),
        ("model.safetensors.index.json: not JSON",),
    ),
    "a tensor in two files": (
        in_two_files(both=True),
        ("stands in two files", "Remove one, or add model.safetensors.index.json"),
    ),
    "pickled weights": (
        pickled,
        ("no .safetensors file but pytorch_model.bin", "convert them to safetensors first"),
    ),
    "a tokenizer that is a Git LFS pointer": (
        write(
            "model/tokenizer.json",
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
        ),
        ("tokenizer.json: a Git LFS pointer", "(of 12345 bytes)", "git lfs pull"),
    ),
    "no weights at all": (
        remove("model/model.safetensors"),
        ("no .safetensors file", "Is the download complete?"),
    ),
    "no config": (remove("model/config.json"), ("config.json: No such file",)),
    "a config that is not JSON": (
        write("model/config.json", "{'model_type': 'llama'}"),
        ("config.json: not JSON",),
    ),
    "a config that is a list": (
        write("model/config.json", "[]"),
        ("config.json: JSON of type list",),
    ),
    "a config that is no text": (
        write("model/config.json", b"\xff\xfe{}"),
        ("config.json: not JSON",),
    ),
    "a config without model_type": (
        edit_config(model_type=None),
        ("config.json model_type: None", "expected one of"),
    ),
    "an unknown model_type": (
        edit_config(model_type="mamba9"),
        (
            "'mamba9'",
            "llama",
            "Did you mean 'mamba'? What is missing for another family is a table",
        ),
    ),
    "a model_type that is a list": (
        edit_config(model_type=["llama"]),
        ("config.json model_type: ['llama']",),
    ),
    "no heads": (
        edit_config(num_attention_heads=0),
        ("num_attention_heads is 0", "expected a positive integer"),
    ),
    "KV heads that do not divide the heads": (
        edit_config(num_key_value_heads=3),
        ("num_attention_heads 4 is no multiple of num_key_value_heads 3",),
    ),
    "a hidden size of text": (edit_config(hidden_size="64"), ("hidden_size is '64'",)),
    "an infinite hidden size": (edit_config(hidden_size=float("inf")), ("hidden_size is inf",)),
    "an intermediate size that is no number": (
        edit_config(intermediate_size=float("nan")),
        ("intermediate_size is nan",),
    ),
    "an unknown activation": (edit_config(hidden_act="mish"), ("hidden_act is 'mish'", "silu")),
    "an unknown rope type": (
        edit_config(rope_scaling={"rope_type": "longrope", "factor": 2.0}),
        ("rope scaling of type 'longrope'", "yarn"),
    ),
    "rope scaling without a factor": (
        edit_config(rope_scaling={"rope_type": "linear"}),
        ("rope scaling of type linear has no positive factor",),
    ),
    "rope scaling that is a text": (edit_config(rope_scaling="linear"), ("rope_scaling",)),
    "a rope theta that is a text": (edit_config(rope_theta="many"), ("rope_theta",)),
    "a rope parameter of zero": (
        edit_config(rope_scaling={"rope_type": "yarn", "factor": 2.0, "beta_fast": 0}),
        ("rope scaling of type yarn has no positive beta_fast",),
    ),
    "a rope parameter that is no number": (
        edit_config(rope_scaling={"rope_type": "yarn", "factor": 2.0, "mscale": float("nan")}),
        ("rope scaling has mscale nan",),
    ),
    "partial rotation by a text": (
        edit_config(partial_rotary_factor="half"),
        ("partial_rotary_factor is 'half'",),
    ),
    "kinds of layers that are no list": (
        edit_config(model_type="mistral", sliding_window=8, layer_types=3),
        ("layer_types is 3, expected a list",),
    ),
    "a first window layer that is a text": (
        edit_config(
            model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers="x"
        ),
        ("max_window_layers is 'x'",),
    ),
    "partial rotation": (edit_config(partial_rotary_factor=0.5), ("partial_rotary_factor",)),
    "an unknown dtype": (edit_config(dtype="float8_e4m3fn"), ("dtype", "float8_e4m3fn")),
    "missing tensors": (
        edit_tensors(lambda t: [t.pop(Q), t.pop(DOWN)]),
        (f"missing tensors: {Q}, {DOWN}", "Is a shard missing"),
    ),
    "a config of more layers": (
        edit_config(num_hidden_layers=3),
        ("missing tensors: model.layers.2.", "model.layers.2.mlp.down_proj.weight"),
    ),
    "an unknown tensor": (
        edit_tensors(lambda t: t.update({"model.layers.0.self_attn.sinks": torch.zeros(4)})),
        ("tensors that Llama does not have: model.layers.0.self_attn.sinks",),
    ),
    "a tensor of another shape": (
        edit_tensors(lambda t: t.update({Q: torch.zeros(64, 32)})),
        (f"{Q}: shape [64, 32]", "[64, 64] by config.json", "config.json and weights disagree"),
    ),
    "integer weights": (
        edit_tensors(lambda t: t.update({Q: torch.zeros(64, 64, dtype=torch.int8)})),
        (f"{Q}: dtype I8", "F32, F16, BF16"),
    ),
    "no tokenizer": (
        remove("model/tokenizer.json"),
        ("no tokenizer", "tokenizer.json, tokenizer.model"),
    ),
    "a damaged tokenizer": (
        write("model/tokenizer.json", '{"version": "1.0", "model"'),
        ("tokenizer.json", "a tokenizer that the tokenizers library can read"),
    ),
    "an empty tokenizer": (write("model/tokenizer.json", ""), ("tokenizer.json: an empty file",)),
    "a damaged tokenizer_config": (
        write("model/tokenizer_config.json", "{"),
        ("tokenizer_config.json: not JSON",),
    ),
    "a tokenizer of another vocabulary": (
        lambda b: (
            edit_config(vocab_size=200)(b),
            edit_tensors(
                lambda t: t.update(
                    {n: t[n][:200].clone() for n in ("model.embed_tokens.weight", "lm_head.weight")}
                )
            )(b),
        )[0],
        ("token ids up to", "less than vocab_size 200 of config.json"),
    ),
    "a model that is quantised already": (
        edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ("already quantised (gptq)", "a full-precision checkpoint"),
    ),
    "a quantization_config that is a text": (
        edit_config(quantization_config="awq"),
        ("quantiz", "awq"),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_broken_models(bench: Bench, name: str) -> None:
    change, fragments = MODELS[name]
    change(bench)
    refused(bench, fragments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_keep_the_finished_layers(bench: Bench, value: float) -> None:
    good = weights_file(bench).read_bytes()
    poison(DOWN, value)(bench)
    stages = ["gptq", {"pack": {"format": "awq"}}]
    refused(
        bench,
        (DOWN, "1 of 6144 values are NaN or infinite", "The checkpoint is damaged"),
        stages=stages,
    )
    layers = bench.layers()
    assert [Path(name).name for name in layers] == ["layer-00000.safetensors"]
    refused(bench, (DOWN,), stages=stages)
    assert bench.layers() == layers
    weights_file(bench).write_bytes(good)
    assert invoke("run", bench.recipe(stages=stages)).exit_code == 0


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
)
def test_nan_outside_the_layers(bench: Bench, name: str) -> None:
    poison(name, float("nan"))(bench)
    refused(bench, (name, "NaN or infinite"), stages=["rtn", {"pack": {"format": "awq"}}])


def test_models_that_are_not_there(bench: Bench) -> None:
    refused(
        bench,
        ("no such directory", "a model directory or a hub id"),
        model=str(bench.root / "nowhere"),
    )
    refused(bench, ("calib.txt: a file", "a model directory"), "--model", bench.root / "calib.txt")
    refused(
        bench,
        (
            "someone/some-model: no such directory, and the hub could not give it",
            "Download it and pass --model DIR",
        ),
        "--model",
        "someone/some-model",
    )
    refused(bench, ("the recipe names none", "Pass --model DIR"), model=None)


# Texts


def calibration(bench: Bench, name: str = "calib.txt", **changes: Any) -> dict[str, Any]:
    return {"calibration": {"data": str(bench.root / name), "samples": 6, "seqlen": 32, **changes}}


def compressed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


TEXTS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "an empty text": ("a.txt", b"", ("a.txt: an empty file",)),
    "blank documents": ("a.txt", b" \n<|endoftext|>\n \n", ("a.txt: no text in it",)),
    "a short text": (
        "a.txt",
        b"The small fox.",
        ("1 documents with", "0 windows", "expected 6 windows of 32 tokens", "Give more text"),
    ),
    "a text in Latin-1": (
        "a.txt",
        "Der kleine Fuchs läuft.".encode("latin-1"),
        ("a.txt: not UTF-8 text",),
    ),
    "a text in UTF-16": (
        "a.txt",
        "The small fox.".encode("utf-16"),
        ("a.txt: UTF-16, by its byte order mark",),
    ),
    "a broken line": (
        "a.jsonl",
        b'{"text": "The fox."}\n{"text": "The cat\n',
        ("a.jsonl:2: not JSON",),
    ),
    "a line without text": (
        "a.jsonl",
        b'{"id": 1}\n',
        ("a.jsonl:1: an object with the fields id (number)", "text or content"),
    ),
    "a line with a number of thousands of digits": (
        "a.jsonl",
        b'{"id": ' + b"1" * 5000 + b"}\n",
        ("a.jsonl:1: not JSON",),
    ),
    "a line nested too deeply": ("a.jsonl", b"[" * 100_000 + b"\n", ("a.jsonl:1: not JSON",)),
    "half a surrogate pair": (
        "a.jsonl",
        b'{"text": "The \\ud800 fox."}\n',
        ("a.jsonl", "no valid Unicode text"),
    ),
    "a list with a number": (
        "a.json",
        b'["The fox.", 3]',
        ("a.json item 2: number", "a string, or text"),
    ),
    "a list that does not end": ("a.json", b'["The fox.", ', ("a.json: not JSON",)),
    "a cut archive": (
        "a.jsonl.gz",
        compressed(b'{"text": "The fox."}\n' * 1000)[:40],
        ("a.jsonl.gz",),
    ),
    "a damaged archive": (
        "a.jsonl.gz",
        compressed(b"x" * 3000)[:12] + b"\xff" * 30,
        ("a.jsonl.gz",),
    ),
    "an id and no text": (
        "a.jsonl",
        b'{"id": "row-1", "text": null}\n',
        ("a.jsonl:1: an object with the fields id (text), text (null)",),
    ),
    "a speaker that nobody knows": (
        "a.json",
        b'[{"conversations": [{"from": "x", "value": "y"}]}]',
        ("conversations[0] from: 'x'",),
    ),
    "a kind of file that is not read": (
        "a.docx",
        b"PK",
        ("a.docx: a name that ends with .docx; expected .txt",),
    ),
    "an archive that is none": (
        "a.jsonl.gz",
        b'{"text": "The fox."}\n',
        ("a.jsonl.gz", "ot a gzipped file"),
    ),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("use", ["calibration", "evaluate"])
def test_broken_texts(bench: Bench, name: str, use: str) -> None:
    file, data, fragments = TEXTS[name]
    (bench.root / file).write_bytes(data)
    if use == "calibration":
        refused(bench, fragments, **calibration(bench, file))
    else:
        evaluate = {"evaluate": {"data": str(bench.root / file), "windows": 6, "length": 32}}
        refused(bench, fragments, stages=[*STAGES, evaluate])
    assert not (bench.root / "out").exists(), (
        "nothing is written before the texts are known to be good"
    )


@pytest.mark.parametrize("mark", ["\ufeff", ""])
def test_a_byte_order_mark_is_no_harm(bench: Bench, mark: str) -> None:
    text = json.dumps({"text": "The small fox jumps over the hill. " * 100}) + "\n"
    (bench.root / "a.jsonl").write_text(mark + text, encoding="utf-8")
    assert invoke("run", bench.recipe(**calibration(bench, "a.jsonl"))).exit_code == 0


def test_texts_that_are_not_there(bench: Bench) -> None:
    refused(
        bench,
        ("nowhere", "neither a known data set nor a file that exists"),
        **calibration(bench, "nowhere.txt"),
    )
    refused(
        bench,
        ("calibration.data", "c44"),
        **calibration(bench) | {"calibration": {"data": "c44", "samples": 2, "seqlen": 16}},
    )
    write_text(bench.root / "few.txt", 0, 12)
    refused(bench, ("after skipping 5", "windows"), **calibration(bench, "few.txt", skip=5))


def test_a_data_set_out_of_reach_says_how_to_use_a_local_file(bench: Bench) -> None:
    message = (
        "data set wikitext2: the hub could not give Salesforce/wikitext",
        "Use a local copy: --set calibration.file=./wikitext2.jsonl",
    )
    refused(bench, message, calibration={"data": "wikitext2", "samples": 2, "seqlen": 16})
    evaluate = {"evaluate": {"data": "c4", "windows": 2, "length": 16}}
    refused(
        bench, ("data set c4", "--set stages.evaluate.file=./c4.jsonl"), stages=[*STAGES, evaluate]
    )
    # And the way it names is one that works.
    shutil.copy(bench.root / "calib.txt", bench.root / "wikitext2.txt")
    arguments = ("--set", f"calibration.file={bench.root / 'wikitext2.txt'}")
    assert (
        invoke(
            "run",
            bench.recipe(calibration={"data": "wikitext2", "samples": 2, "seqlen": 16}),
            *arguments,
        ).exit_code
        == 0
    )


# Where the output goes


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


OUTPUTS: dict[str, tuple[Callable[[Bench], Path], tuple[str, ...]]] = {
    "in the model directory": (
        lambda b: b.model / "quantised",
        ("lies in the model directory", "Pass --output DIR"),
    ),
    "the model directory": (lambda b: b.model, ("lies in the model directory",)),
    "the model directory by another name": (
        lambda b: b.model / ".." / "model",
        ("lies in the model directory",),
    ),
    "around the model directory": (lambda b: b.root, ("contains the model directory",)),
    "a file": (
        lambda b: b.root / "calib.txt",
        ("calib.txt: a file", "a directory that QuantFlow may create"),
    ),
    "under a file": (
        lambda b: b.root / "calib.txt" / "deep" / "artifact",
        ("calib.txt is not writable",),
    ),
    "a directory with other content": (
        lambda b: b.root / "mine",
        ("a directory with other content", "an artifact of QuantFlow's"),
    ),
    "in a system folder that takes no files": (
        lambda b: Path("/proc/quantflow/artifact"),
        ("/proc", "writable"),
    ),
    "a name that is too long": (lambda b: b.root / ("x" * 300), ("xxx", "name too long")),
    "a place that is a loop": (lambda b: b.root / "loop" / "artifact", ("loop",)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_cannot_be(bench: Bench, name: str) -> None:
    (bench.root / "mine").mkdir()
    (bench.root / "mine" / "thesis.txt").write_text("years of work")
    (bench.root / "loop").symlink_to(bench.root / "loop")
    place, fragments = OUTPUTS[name]
    bench.recipe()
    before = {n: data for n, data in snapshot(bench.root).items() if n != "recipe.yaml"}
    refused(bench, fragments, "--output", place(bench))
    assert {n: data for n, data in snapshot(bench.root).items() if n != "recipe.yaml"} == before


def test_a_read_only_place(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen by a user without the right to write (tests may run as root, who has it
    everywhere)."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not mode & os.W_OK)
    refused(bench, ("is not writable", "a writable place", "Pass --output DIR"))
    assert not (bench.root / "out").exists()


def test_other_files_in_an_artifact_are_not_lost(bench: Bench) -> None:
    stages = ["rtn", {"pack": {"format": "awq"}}]
    assert invoke("run", bench.recipe(stages=stages)).exit_code == 0
    (bench.output / "notes.txt").write_text("what I found out")
    result = invoke("run", bench.recipe(stages=stages), "--set", "seed=1")
    assert (
        result.exit_code == 2
        and "other files in it (notes.txt), which would be lost" in result.stderr
    )
    assert (bench.output / "notes.txt").read_text() == "what I found out"


def test_a_read_only_file_system(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "touch", touch)
    refused(bench, ("Read-only file system", "a writable directory"))


# Combinations that only the model shows to be impossible

GRIDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a group that does not divide": (
        {
            "weights": {"group_size": 64},
            "stages": ["rtn", {"pack": {"format": "compressed-tensors"}}],
        },
        (
            "down_proj",
            "96 input channels",
            "a multiple of group_size 64",
            "Use group_size 48, 32, 16 or -1",
        ),
    ),
    "a group larger than the row": (
        {"weights": {"group_size": 128}},
        ("q_proj", "64 input channels", "a multiple of group_size 128", "group_size 64"),
    ),
    "more ranks than heads": (
        {"stages": ["rtn", {"pack": {"format": "compressed-tensors"}}, {"shard": {"tp": 8}}]},
        ("tp 8", "4 attention heads", "a multiple of 8"),
    ),
    "more ranks than KV heads": (
        {"stages": ["rtn", {"pack": {"format": "compressed-tensors"}}, {"shard": {"tp": 4}}]},
        ("tp 4", "2 KV heads", "a multiple of 4"),
    ),
    "ranks that cut a group": (
        {
            "weights": {"group_size": 32},
            "stages": ["rtn", {"pack": {"format": "compressed-tensors"}}, {"shard": {"tp": 2}}],
        },
        (
            "down_proj",
            "48 input channels on each of 2 ranks",
            "a multiple of group_size 32",
            "group_size 24",
        ),
    ),
    "windows beyond the model's positions": (
        {"calibration": {"data": "CALIB", "samples": 2, "seqlen": 256}},
        ("calibration: windows of 256 tokens", "at most the model's 128 positions"),
    ),
    "an override that matches nothing": (
        {"weights": {"group_size": 16, "overrides": [{"match": "*.w1", "group_size": 8}]}},
        ("weights.overrides match '*.w1'", "matches no linear", "*.q_proj"),
    ),
    "everything ignored": (
        {"weights": {"group_size": 16, "ignore": ["lm_head", "*_proj"]}},
        ("every linear is ignored", "something to quantise"),
    ),
    "a head that is to be quantised": (
        {"weights": {"group_size": 16, "ignore": []}},
        ("lm_head is not in it",),
    ),
    "several widths in AWQ": (
        {
            "weights": {
                "group_size": 16,
                "overrides": [{"match": "*.down_proj", "group_size": 32}],
            },
            "stages": ["rtn", {"pack": {"format": "awq"}}],
        },
        ("awq: several schemes", "or compressed-tensors"),
    ),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_grids_that_the_model_does_not_take(bench: Bench, name: str, command: str) -> None:
    changes, fragments = GRIDS[name]
    if "calibration" in changes:
        changes = {
            **changes,
            "calibration": {**changes["calibration"], "data": str(bench.root / "calib.txt")},
        }
    refused(bench, fragments, command=command, **changes)
    assert not (bench.root / "out").exists()


def test_what_the_message_offers_works(bench: Bench) -> None:
    message = refused(
        bench,
        ("96 input channels",),
        weights={"group_size": 64},
        stages=["rtn", {"pack": {"format": "awq"}}],
    )
    assert "group_size 48" in message
    weights = {"group_size": 64, "overrides": [{"match": "*.down_proj", "group_size": 48}]}
    assert (
        invoke(
            "run",
            bench.recipe(
                weights=weights, stages=["rtn", {"pack": {"format": "compressed-tensors"}}]
            ),
        ).exit_code
        == 0
    )


def test_outputs_of_awq_that_fill_no_word(tmp_path: Path) -> None:
    """AWQ packs eight output channels into a word: 172 is no multiple of 8."""
    bench = make_bench(tmp_path, intermediate_size=172)
    weights = {"group_size": 4}
    refused(
        bench,
        ("172 output channels", "a multiple of 8", "Use compressed-tensors"),
        weights=weights,
        stages=["rtn", {"pack": {"format": "awq"}}],
    )
    assert (
        invoke(
            "run",
            bench.recipe(
                weights=weights, stages=["rtn", {"pack": {"format": "compressed-tensors"}}]
            ),
        ).exit_code
        == 0
    )


def test_all_problems_at_once(bench: Bench) -> None:
    edit_tensors(lambda t: [t.pop(Q), t.update({DOWN: torch.zeros(3, 3)})])(bench)
    (bench.root / "mine").mkdir()
    (bench.root / "mine" / "thesis.txt").write_text("years of work")
    stages = ["rtn", {"pack": {"format": "compressed-tensors"}}]
    message = refused(
        bench,
        ("4 problems", Q, DOWN, "48", "other content"),
        "--output",
        bench.root / "mine",
        weights={"group_size": 64},
        stages=stages,
    )
    assert message.count("expected") == 3


# The command line


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("--set", "weights.bits"), ("is not an assignment", "dotted.path=value")),
        (("--set", "weights.bites=4"), ("weights", "bites", "did you mean")),
        (("--set", "weights.bits=5"), ("bits",)),
        (("--set", "stages.rtn.range_search=true"), ("rtn",)),
        (("--set", "calibration.samples=-3"), ("samples",)),
        (("--set", "weights.group_size=[16"), ("weights.group_size=[16",)),
    ],
)
def test_broken_settings(
    bench: Bench, arguments: tuple[str, str], fragments: tuple[str, ...]
) -> None:
    message = refused(bench, (), *arguments).lower()
    assert all(fragment.lower() in message for fragment in fragments), message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(bench: Bench) -> None:
    refused(bench, ("--device cuda: torch sees no GPU", "Use --device cpu"), "--device", "cuda")


def test_options_that_do_not_exist(bench: Bench) -> None:
    for arguments in (("--device", "tpu"), ("--no-such-option",), ("--set",)):
        result = invoke("run", bench.recipe(), *arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output
    result = invoke("run", bench.root / "nowhere.yaml")
    assert result.exit_code == 2 and "there is no such file" in result.stderr


def test_debug_shows_the_traceback(bench: Bench) -> None:
    result = invoke("run", bench.recipe(model=str(bench.root / "nowhere")), "--debug")
    assert (
        result.exit_code == 2
        and "Traceback" in result.stderr
        and "no such directory" in result.stderr
    )


# `quantflow eval`


@pytest.mark.parametrize(
    ("change", "arguments", "fragments"),
    [
        (None, ("--data", "nowhere.txt"), ("nowhere.txt: no such file", "Known names: c4")),
        (None, ("--length", "1000"), ("--length: 1000", "at most the model's 128 positions")),
        (None, ("--windows", "100000"), ("100000 windows of 32 tokens",)),
        (None, ("--reference", "nowhere"), ("nowhere: no such directory",)),
        (edit_config(vocab_size=300), (), ("config.json and weights disagree",)),
        (cut, (), ("truncated",)),
        (edit_config(quantization_config={"quant_method": "fp8"}), (), ("fp8",)),
    ],
)
def test_eval_refuses_too(
    intact: Bench,
    bench: Bench,
    change: Change | None,
    arguments: tuple[str, ...],
    fragments: tuple[str, ...],
) -> None:
    if change:
        change(bench)
    given = {
        "--reference": str(intact.model),
        "--data": str(intact.root / "eval.txt"),
        "--length": "512",
        **dict(zip(arguments[::2], arguments[1::2], strict=True)),
    }
    if "--length" not in arguments:
        given["--length"] = "32"
    result = invoke("eval", bench.model, *(part for pair in given.items() for part in pair))
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output
    assert all(fragment in message for fragment in fragments) and "Traceback" not in message, (
        message
    )
