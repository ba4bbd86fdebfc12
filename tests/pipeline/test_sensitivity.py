"""`quantflow sensitivity`: what it measures and chooses, what its recipe does, and how it goes
on."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantflow.calibration.data import Windows, documents
from quantflow.checkpoints.tensor_file import TensorFile, save_tensors
from quantflow.errors import UserError
from quantflow.evaluate.sensitivity import Measure
from quantflow.formats.reader import Weights
from quantflow.pipeline import sensitivity_job
from quantflow.pipeline.plan import make_plan
from quantflow.pipeline.sensitivity_job import Settings, prepare
from quantflow.pipeline.texts import model_documents
from quantflow.stages.registry import load_recipe
from quantflow.tokenizers.load import load_tokenizer
from tests.helpers import zoo
from tests.helpers.runs import Bench, Strike, invoke, make_bench, start
from tests.helpers.tiny import write_text

SMALL = ("--samples", 3, "--length", 32, "--group-size", 16)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("sensitivity"))


def command(bench: Bench, name: str, *arguments: object) -> tuple[object, ...]:
    return (
        "sensitivity",
        bench.model,
        "--data",
        bench.root / "calib.txt",
        "--output",
        bench.root / "out" / name,
        *SMALL,
        *arguments,
    )


def measure(bench: Bench, name: str, *arguments: object) -> dict[str, Any]:
    result = invoke(*command(bench, name, "--json", *arguments))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((bench.root / "out" / name).read_text())
    return found


def test_the_choice_is_the_best_there_is_and_its_recipe_says_just_that(bench: Bench) -> None:
    found = measure(bench, "a.json", "--bits", "3,4,8", "--average-bits", 3.5)
    parts, mixed = found["parts"], found["mixed"]
    assert [p["name"].rpartition(".")[2] for p in parts] == [
        "qkv",
        "o_proj",
        "gate_up",
        "down_proj",
    ] * 2
    assert mixed["stored_bytes"] <= mixed["budget"]
    assert (
        mixed["budget"]
        == (found["uniform"]["3"]["stored_bytes"] + found["uniform"]["4"]["stored_bytes"]) // 2
    )
    room = mixed["budget"] - found["kept_bytes"]
    choices = itertools.product("348", repeat=len(parts))
    best = min(
        sum(p["kl_mean"][b] for p, b in zip(parts, c, strict=True))
        for c in choices
        if sum(p["bytes"][b] for p, b in zip(parts, c, strict=True)) <= room
    )
    assert mixed["predicted"] == pytest.approx(best) and mixed["gap"] == 0
    recipe = load_recipe(bench.root / "out" / "a.yaml")
    assert mixed["measured_on"] in (bench.root / "out" / "a.yaml").read_text()
    plan = make_plan(recipe)
    widths = {module: mixed["widths"][p["name"]] for p in parts for module in p["modules"]}
    assert {
        p.module: (p.scheme.bits, p.scheme.group_size, p.scheme.symmetric)
        for p in plan.linears
        if p.scheme
    } == {module: (bits, 16, False) for module, bits in widths.items()}
    assert len(set(widths.values())) > 1, "or the overrides are not tested"
    # Uniform bytes from the checkpoint's own shapes: codes, 16-bit scales, zeros of as many bits as
    # a code.
    checkpoint = Weights(bench.model).checkpoint
    linears = {n: s for n, s in checkpoint.expected.items() if "proj" in n}
    others = checkpoint.weight_bytes - sum(n * k * 2 for n, k in linears.values())
    assert found["kept_bytes"] == others
    assert found["uniform"]["8"]["stored_bytes"] == others + sum(
        n * k + n * (k // 16) * 3 for n, k in linears.values()
    )


def test_what_is_measured_is_what_rounding_by_the_recipe_gives(bench: Bench) -> None:
    """The whole way: the recipe with rtn in place of gptq, packed, read back, evaluated on the same
    windows."""
    found = measure(bench, "b.json", "--bits", "2,4", "--average-bits", 3)
    content = yaml.safe_load((bench.root / "out" / "b.yaml").read_text())
    content["stages"] = ["rtn", {"pack": {"format": "compressed-tensors"}}]
    path = bench.root / "rtn.yaml"
    path.write_text(yaml.safe_dump(content))
    output = bench.root / "out" / "rtn"
    assert invoke("run", path, "--output", output).exit_code == 0
    result = invoke(
        "eval",
        output,
        "--reference",
        bench.model,
        "--data",
        bench.root / "calib.txt",
        "--windows",
        3,
        "--length",
        32,
        "--json",
    )
    assert json.loads(result.stdout)["kl_mean"] == pytest.approx(
        found["mixed"]["measured"], rel=1e-3
    )


def test_nothing_is_measured_twice(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure(bench, "c.json", "--bits", "4,8")
    wanted: list[int] = []
    original = Measure._divergences

    def counted(self: Measure, target: Any, x: Any, roundings: Any, at: int) -> list[float]:
        wanted.append(len(roundings))
        return original(self, target, x, roundings, at)

    monkeypatch.setattr(Measure, "_divergences", counted)
    again = measure(bench, "d.json", "--bits", "4,8")
    assert wanted == [] and again == first
    more = measure(bench, "d.json", "--bits", "4,6,8", "--budget", "150kB")
    assert wanted[:2] == [4, 4] and wanted[2:] in ([1], [2]), (
        "one width for four parts of two layers; then whole models that are new"
    )
    assert [p["kl_mean"]["4"] for p in more["parts"]] == [p["kl_mean"]["4"] for p in first["parts"]]
    measure(bench, "d.json", "--bits", "4,8", "--fresh")
    assert wanted[-3:] == [8, 8, 2]


def test_every_input_changes_the_key(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepare(
        Settings(
            str(bench.model),
            str(bench.root / "calib.txt"),
            samples=2,
            length=32,
            group_size=16,
            device="cpu",
        )
    )
    settings, windows = job.settings, job.windows
    cut = Weights(bench.model)
    cut.checkpoint.raw_config = {**cut.checkpoint.raw_config, "rms_norm_eps": 1e-5}
    jobs = [
        job,
        replace(job, settings=replace(settings, group_size=32)),
        replace(job, settings=replace(settings, symmetric=True)),
        replace(job, windows=Windows(windows.tokens[::-1], windows.documents, windows.source)),
        replace(job, device="cuda"),
        replace(job, weights=cut),
    ]
    keys = [j.key("w") for j in jobs] + [job.key("other weights")]
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity_job, "scale_dtypes", lambda dtype: ("float16",))
        keys.append(job.key("w"))
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity_job, "computing_code", lambda *modules: "other code")
        keys.append(job.key("w"))
    assert len(set(keys)) == len(keys) == 9 and job.key("w") == keys[0]


def test_a_divergence_that_is_no_number_is_named_and_not_kept(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    stored = TensorFile(bench.model / "model.safetensors")
    tensors = {name: stored.read(name) for name in stored.tensors}
    tensors["model.layers.1.mlp.down_proj.weight"][:] = 3e38  # finite, but not what comes of it
    save_tensors(bench.model / "model.safetensors", tensors, {"format": "pt"})
    result = invoke(*command(bench, "n.json", "--bits", "4"))
    said = " ".join(result.stderr.split())
    assert (
        result.exit_code == 2
        and "model.layers.0.self_attn.qkv in 4 bits: a KL divergence of nan" in said
    )
    assert (
        not list(bench.store.glob("*/layer-*.json"))
        and not (bench.root / "out" / "n.json").exists()
    )


def test_the_text_is_read_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reading(folder: Path, data: str, **options: Any) -> Iterator[str]:
        read.append(data)
        return model_documents(folder, data, **options)

    monkeypatch.setattr(sensitivity_job, "model_documents", reading)
    job = prepare(
        Settings(
            str(bench.model),
            str(bench.root / "calib.txt"),
            samples=2,
            length=32,
            group_size=16,
            device="cpu",
        )
    )
    tokens = sum(
        len(e.ids)
        for e in load_tokenizer(bench.model).encode_batch(
            list(documents(str(bench.root / "calib.txt")))
        )
    )
    assert (
        len(read) == 1
        and len(job.windows.tokens) == 2
        and job.calibration == min(128, tokens // 32)
    )
    (bench.root / "bad.jsonl").write_text('{"text": "a"}\n' * 3 + "{\n")
    with pytest.raises(UserError, match=r"bad.jsonl:4: not JSON"):
        prepare(
            Settings(
                str(bench.model),
                str(bench.root / "bad.jsonl"),
                samples=1,
                length=2,
                group_size=16,
                device="cpu",
            )
        )


def test_a_killed_run_goes_on(bench: Bench, tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    arguments = command(bench, "e.json", "--bits", "3,4", "--average-bits", "3.5")
    environment = {"QUANTFLOW_ACTIVATION_BYTES": "0"}
    # Renames: the hashes of the weights, the first layer, the second.
    process = start(
        list(arguments),
        tmp_path,
        environment=environment,
        strike=Strike(signal.SIGKILL, 3, "os.rename"),
    )
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    layers = sorted(bench.store.glob("*/layer-*.json"))
    assert [path.name for path in layers] == ["layer-00000.json"] and not (
        bench.root / "out" / "e.json"
    ).exists()
    before = layers[0].stat().st_mtime_ns
    assert invoke(*arguments).exit_code == 0
    assert layers[0].stat().st_mtime_ns == before and bench.leavings() == ["e.json", "e.yaml"]
    whole = (bench.root / "out" / "e.json").read_bytes()
    assert invoke(*arguments, "--fresh").exit_code == 0
    assert (bench.root / "out" / "e.json").read_bytes() == whole


def test_everything_that_is_wrong_is_said_at_once(bench: Bench, tmp_path: Path) -> None:
    result = invoke(
        "sensitivity",
        bench.model,
        "--data",
        tmp_path / "none.txt",
        "--bits",
        "1,4",
        "--group-size",
        48,
        "--length",
        4096,
        "--budget",
        "1GB",
        "--average-bits",
        9,
        "--output",
        tmp_path,
    )
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2 and "Traceback" not in said
    for fragment in (
        "--bits: 1,4",
        "--length: 4096",
        "--budget, --average-bits: both",
        "--average-bits: 9",
        "group_size 48",
        "none.txt",
        f"--output: {tmp_path} is a directory",
    ):
        assert fragment in said, (fragment, said)
    result = invoke(
        "sensitivity",
        bench.model,
        "--data",
        bench.root / "calib.txt",
        "--bits",
        "four",
        "--budget",
        "5",
    )
    assert (
        result.exit_code == 2
        and "--bits: 'four'" in result.stderr
        and "--budget: '5'" in result.stderr
    )
    result = invoke(*command(bench, "f.json", "--budget", "50kB"))
    assert (
        result.exit_code == 2
        and "at least" in result.stderr
        and not (bench.root / "out" / "f.json").exists()
    )


def test_a_quantised_model_is_refused(artifact: Path, bench: Bench) -> None:
    result = invoke("sensitivity", artifact, "--data", bench.root / "calib.txt")
    assert result.exit_code == 2 and "already quantised (" in result.stderr


def test_a_mixture_with_tied_embeddings(tmp_path: Path) -> None:
    """Experts get one width; compressed-tensors holds them symmetric alone, which the recipe takes
    account of."""
    model = zoo.write(tmp_path / "model", zoo.specimen("mixtral"))
    text = write_text(tmp_path / "calib.txt", 0, 64)
    base = (
        "sensitivity", model, "--data", text, "--output", tmp_path / "s.json", "--samples", 2,
        "--length", 16, "--group-size", 32, "--bits", "4,8", "--average-bits", 5,
    )  # fmt: skip
    assert invoke(*base, "--symmetric").exit_code == 0
    plan = make_plan(load_recipe(tmp_path / "s.yaml"))
    widths = {p.module: p.scheme.bits for p in plan.linears if p.scheme}
    for layer in range(2):
        assert (
            len(
                {
                    bits
                    for module, bits in widths.items()
                    if f"layers.{layer}." in module and "experts" in module
                }
            )
            == 1
        )
    assert invoke(*base).exit_code == 0
    make_plan(load_recipe(tmp_path / "s.yaml"))


def test_what_a_user_sees(bench: Bench) -> None:
    result = invoke(*command(bench, "g.json", "--bits", "3,4", "--average-bits", "3.5"))
    assert (
        "8 parts at 2 widths on 3 windows of 32 tokens" in result.stderr
        and "whole: 4 of 4 steps" in result.stderr
    )
    for fragment in (
        "all in 3 bits",
        "mixed, 3.",
        "errors add up",
        "compressed-tensors, gptq, gptq_v2",
        "quantflow run",
    ):
        assert fragment in " ".join(result.stdout.split()), fragment
    assert "--budget SIZE" in invoke(*command(bench, "h.json", "--bits", "3,4")).stdout


def test_no_file_of_the_users_is_written_over(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that is said before anything is measured."""
    monkeypatch.setattr(
        "quantflow.pipeline.sensitivity.run", lambda *a, **k: pytest.fail("it was measured")
    )
    folder = bench.root / "out"
    folder.mkdir(exist_ok=True)
    (folder / "mine.yaml").write_text("# my own\nname: mine\n")
    result = invoke(*command(bench, "mine.json", "--bits", "4", "--average-bits", 4))
    assert (
        result.exit_code == 2
        and "mine.yaml exists, and `quantflow sensitivity` did not write it"
        in " ".join(result.stderr.split())
    )
    assert (folder / "mine.yaml").read_text() == "# my own\nname: mine\n"
    for name in ("new.yaml", "new.YML"):
        result = invoke(*command(bench, name, "--bits", "4"))
        assert result.exit_code == 2 and "is named as a recipe; expected a .json file" in " ".join(
            result.stderr.split()
        )
    monkeypatch.undo()
    assert invoke(*command(bench, "mine.json", "--bits", "4")).exit_code == 0, (
        "without a budget no recipe is written"
    )
    for _ in range(2):  # its own recipe is written anew
        assert (
            invoke(*command(bench, "own.json", "--bits", "4", "--average-bits", 4)).exit_code == 0
        )


def test_groups_that_do_not_fit_are_named_once_with_what_fits(bench: Bench) -> None:
    result = invoke(*command(bench, "g.json", "--bits", "4", "--group-size", 40))
    said = " ".join(result.stderr.split())
    assert (
        result.exit_code == 2 and "model.layers.0.mlp.down_proj: " in said and "ignore" not in said
    )
    assert "down_proj mlp.down_proj" not in said
    sizes = [
        int(size)
        for size in said.partition("--group-size ")[2].partition(" or -1")[0].split(" or ")
    ]
    inputs = {
        shape[1]
        for name, shape in Weights(bench.model).checkpoint.expected.items()
        if "proj" in name
    }
    assert sizes == [32, 16] and all(k % size == 0 for k in inputs for size in sizes)
