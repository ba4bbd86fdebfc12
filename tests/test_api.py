"""The public surface: which names there are, what their docstrings say, and that the functions do
what the command line does."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import quantflow
from quantflow.arguments import for_callers
from quantflow.pipeline.progress import Silent
from tests.helpers.runs import Bench, contents, invoke, make_bench

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "LLM", "AsyncLLM", "SamplingParams", "Output",
    "plan", "quantize", "export", "measure",
    "Plan", "Artifact", "Exported", "Divergence", "Progress",
    "Problem", "QuantFlowError", "UserError", "RecipeError", "ModelError", "DataError",
    "FormatError", "OutputError", "RequestError", "GateError", "ResourceError", "ServerError",
}  # fmt: skip
FUNCTIONS = (quantflow.plan, quantflow.quantize, quantflow.export, quantflow.measure)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return make_bench(tmp_path_factory.mktemp("api"), intermediate_size=128)


def recipe(bench: Bench, **gates: float) -> dict[str, Any]:
    path = bench.recipe(
        weights={"bits": 4, "group_size": 32},
        stages=["rtn", {"pack": {"format": "compressed-tensors"}}, bench.evaluate(gates=gates)],
    )
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


# The names


def test_the_public_names_are_these() -> None:
    assert set(quantflow.__all__) == PUBLIC <= set(dir(quantflow))
    modules = {path.stem for path in (ROOT / "quantflow").iterdir()}
    # a module of that name would take its place when it is imported
    assert not PUBLIC & modules
    for name in PUBLIC:
        assert getattr(quantflow, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        quantflow.quantise  # noqa: B018


def test_the_functions_are_there_before_torch_is() -> None:
    code = "import sys; from quantflow import export, measure, plan, quantize, GateError\n"
    code += "print(sorted({'torch', 'numpy', 'pydantic', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def sections(text: str) -> dict[str, str]:
    """A docstring's sections in Google's style, by their titles."""
    parts = re.split(r"^(Args|Attributes|Returns|Raises|Yields):$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(section: str) -> list[str]:
    return re.findall(r"^    (\w+):", section, re.M)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: str(f.__name__))
def test_a_functions_docstring_names_every_parameter_and_error(function: Any) -> None:
    found = sections(inspect.getdoc(function) or "")
    assert entries(found["Args"]) == [*inspect.signature(function).parameters]
    assert found["Returns"].strip()
    assert entries(found["Raises"])[0] in ("UserError", "FormatError")
    assert set(entries(found["Raises"])) <= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_everything_public_says_what_it_is(name: str) -> None:
    value = getattr(quantflow, name)
    own = value.__doc__ or ""
    assert own and not own.startswith(f"{name}("), f"{name} has no docstring of its own"
    if isinstance(value, type):
        named = {*entries(sections(inspect.getdoc(value) or "").get("Attributes", ""))}
        named |= {*entries(sections(inspect.getdoc(value) or "").get("Args", ""))}
        fields = {*getattr(value, "__dataclass_fields__", {})}
        assert fields == named or not fields, f"{name} does not say what {fields ^ named} are"


@pytest.mark.parametrize(
    "name", ["LLM", "AsyncLLM", "Artifact", "Exported", "Divergence", "Progress"]
)
def test_every_method_says_what_it_does(name: str) -> None:
    for method, call in vars(getattr(quantflow, name)).items():
        if callable(call) and not method.startswith("_"):
            assert inspect.getdoc(call), f"{name}.{method} has no docstring"


# What they do


def test_a_dictionary_makes_the_bytes_that_the_file_makes(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = recipe(bench)
    before = json.dumps(content)
    artifact = quantflow.quantize(content, output=tmp_path / "ours" / "tiny", device="cpu")
    assert json.dumps(content) == before and capsys.readouterr() == ("", "")
    assert artifact.path == tmp_path / "ours" / "tiny" and not artifact.existed
    assert artifact.quality["weights"]["kl_mean"] > 0 and artifact.failures == []

    done = invoke(
        "run",
        bench.root / "recipe.yaml",
        "--output",
        tmp_path / "theirs" / "tiny",
        "--device",
        "cpu",
    )
    assert done.exit_code == 0, done.stderr
    assert contents(tmp_path / "ours" / "tiny") == contents(tmp_path / "theirs" / "tiny")


def test_a_plan_is_looked_at_and_run(bench: Bench, tmp_path: Path) -> None:
    plan = quantflow.plan(
        recipe(bench), output=tmp_path / "out", device="cpu", overrides=["weights.bits=8"]
    )
    assert {linear.scheme.bits for linear in plan.linears if linear.scheme} == {8}
    heard = Heard()
    artifact = quantflow.quantize(plan, progress=heard)
    assert artifact.path == tmp_path / "out" and "evaluate" in heard.phases
    assert quantflow.quantize(plan).existed

    with pytest.raises(quantflow.UserError) as refused:
        quantflow.quantize(plan, model="other", output="elsewhere")
    assert [problem.where for problem in refused.value.problems] == ["model", "output"]


class Heard(Silent):
    def __init__(self) -> None:
        self.phases: list[str] = []
        self.notes: list[str] = []

    def phase(self, name: str, total: int, unit: str = "steps") -> None:
        self.phases.append(name)

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_missed_gate_raises_and_the_artifact_is_kept(bench: Bench, tmp_path: Path) -> None:
    content = recipe(bench, kl_mean=1e-9)
    with pytest.raises(quantflow.GateError, match="kl_mean"):
        quantflow.quantize(content, output=tmp_path / "out", device="cpu")
    artifact = quantflow.quantize(
        content, output=tmp_path / "out", device="cpu", enforce_gates=False
    )
    assert artifact.existed and len(artifact.failures) == 1


def test_all_problems_of_a_dictionary_are_said_at_once(bench: Bench) -> None:
    content = recipe(bench) | {"modle": "x", "weights": {"bits": 99}}
    with pytest.raises(quantflow.RecipeError) as refused:
        quantflow.plan(content, overrides=["stages.awq.grid=3"])
    text = str(refused.value)
    assert "modle" in text and "weights.bits" in text and "stages.awq.grid" in text
    assert "recipe:" in text and not re.search(r"recipe:\d", text)  # it has no lines
    with pytest.raises(quantflow.RecipeError, match="w44"):
        quantflow.plan("w44")


def test_export_is_the_command(artifact: Path, tmp_path: Path) -> None:
    done = quantflow.export(artifact, "huggingface", tmp_path / "ours", dtype="float32")
    assert (done.output, done.format, done.modules) == (tmp_path / "ours", "huggingface", 14)
    theirs = invoke("export", artifact, "--format", "huggingface", "--output", tmp_path / "theirs")
    assert theirs.exit_code == 0 and contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    with pytest.raises(quantflow.FormatError) as refused:
        quantflow.export(artifact, "marlin", tmp_path / "none")
    assert "marlin" in str(refused.value) and not (tmp_path / "none").exists()
    with pytest.raises(quantflow.UserError, match="max_shard_size"):
        quantflow.export(artifact, "huggingface", tmp_path / "none", max_shard_size="5 apples")


def test_a_model_beside_itself_has_no_divergence_and_others_have(
    bench: Bench, tmp_path: Path
) -> None:
    text = bench.root / "eval.txt"
    heard = Heard()
    same = quantflow.measure(
        bench.model, bench.model, text, windows=2, length=32, device="cpu", progress=heard
    )
    assert (same.kl_mean, same.top1, same.perplexity) == (0.0, 1.0, same.reference_perplexity)
    assert heard.phases == ["evaluate"]
    made = quantflow.quantize(recipe(bench), output=tmp_path / "out", device="cpu")
    other = quantflow.measure(made.path, bench.model, text, windows=2, length=32, device="cpu")
    command = [
        "eval", made.path, "--reference", bench.model, "--data", text, "--windows", "2",
        "--length", "32", "--device", "cpu", "--json",
    ]  # fmt: skip
    assert json.loads(invoke(*command).stdout) == other.as_dict() and other.kl_mean > 0
    with pytest.raises(quantflow.UserError, match="length"):
        quantflow.measure(bench.model, bench.model, text, length=10**6)


def test_nothing_is_added_to_a_plan(bench: Bench, tmp_path: Path) -> None:
    plan = quantflow.plan(recipe(bench), output=tmp_path / "out", device="cpu")
    with pytest.raises(quantflow.UserError) as caught:
        quantflow.quantize(plan, device="cuda", overrides=["weights.bits=3"])
    assert [problem.where for problem in caught.value.problems] == ["overrides", "device"]
    assert not (tmp_path / "out").exists()


# What a caller reads


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_shard_size": "much"}, "max_shard_size: 'much'; expected a size such as"),
        ({"format": "ggml"}, "format: 'ggml'; expected one of "),
        ({"dtype": "float16"}, 'expected format="huggingface", the one that dequantises'),
        ({"kv_scales": "fp9"}, "kv_scales: 'fp9'"),
        ({"output": "full"}, "expected a new directory, or an empty one"),
    ],
)
def test_a_caller_of_export_is_told_of_arguments(
    artifact: Path, tmp_path: Path, given: dict[str, Any], expected: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    arguments = {"format": "awq", **given, "output": tmp_path / given.get("output", "new")}
    with pytest.raises(quantflow.UserError) as error:
        quantflow.export(artifact, **arguments)
    assert expected in str(error.value) and "--" not in str(error.value)


def test_a_caller_of_quantize_is_told_of_arguments(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, full = recipe(bench), tmp_path / "full"
    full.mkdir()
    (full / "notes").touch()
    without = {name: value for name, value in own.items() if name != "model"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments, expected in (
        ({"recipe": without}, "Pass model=DIR"),
        ({"recipe": own, "output": full}, "Pass output=DIR"),
        ({"recipe": own, "device": "cuda"}, 'device="cuda": torch sees no GPU'),
        ({"recipe": own, "overrides": ["stages.gptq.damp=1"]}, 'overrides=["stages.gptq.damp=1"]'),
    ):
        with pytest.raises(quantflow.QuantFlowError) as error:
            quantflow.quantize(**arguments)
        assert expected in str(error.value) and "--" not in str(error.value)


def test_commands_and_other_options_stay_as_they_are() -> None:
    def quantize(model: str = "", fresh: bool = False) -> None:
        raise quantflow.UserError(
            quantflow.Problem(
                "--model", "none", "`quantflow run --model DIR`", "--fresh, --kv int8"
            )
        )

    with pytest.raises(quantflow.UserError) as error:
        for_callers(quantize)()
    assert str(error.value) == (
        "model: none; expected `quantflow run --model DIR`. fresh=True, --kv int8"
    )
