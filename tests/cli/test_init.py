"""`quantflow init`: a recipe for a model and an engine, which `plan` takes as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from quantflow.cli.init import EngineName
from quantflow.pipeline.plan import make_plan
from quantflow.pipeline.starter import TARGETS
from quantflow.stages.registry import load_recipe
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_llama, write_text
from tests.helpers.zoo import ZOO, specimen, write

# By the engines' own documentation and code: what each loads of 4 bits.
FOUR_BITS = {
    "vllm": ("compressed-tensors", True), "lmdeploy": ("awq", False), "sglang": ("awq", False),
    "transformers": ("compressed-tensors", True), "llama.cpp": ("gguf", True),
}  # fmt: skip
SLIDING, MIXED, OTHER = "a sliding window", "a mixture of experts", "model_type 'opt'"
NO_GGUF = {
    "olmo2": "model_type 'olmo2'",
    "granite": "model_type 'granite'",
    "glm": "model_type 'glm'",
    "phi3": "a sliding window",
    "gemma2": "query_pre_attn_scalar 20",
    "gemma3": "sliding windows in other layers",
    "internlm3": "biases in the MLP", "mistral": SLIDING, "qwen2": SLIDING, "mixtral": MIXED,
    "mixtral_fused": MIXED, "qwen3_moe": MIXED, "qwen3_moe_fused": MIXED, "opt": OTHER,
    "opt_prefixed": OTHER,
}  # fmt: skip
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_engines_are_the_same_on_the_command_line() -> None:
    assert [name.value for name in EngineName] == list(TARGETS) == list(FOUR_BITS)


@pytest.mark.parametrize("family", ZOO)
def test_what_is_written_plans_for_every_family(family: str) -> None:
    """Inputs of 64, 96 and 32: groups of 32, which LMDeploy takes of compressed-tensors alone. No
    engine is warned of its own recipe."""
    write(Path("model"), specimen(family))
    for engine, (form, symmetric) in FOUR_BITS.items():
        made = invoke("init", "--model", "model", "--for", engine, "--json")
        if engine == "lmdeploy":
            form, symmetric = "compressed-tensors", True
        if engine == "llama.cpp" and family in NO_GGUF:
            assert made.exit_code == 2 and NO_GGUF[family] in made.stderr
            continue
        assert made.exit_code == 0, made.stderr
        path = Path(json.loads(made.stdout)["recipe"])
        recipe = yaml.safe_load(path.read_text())
        assert recipe["weights"] == {
            "bits": 4,
            "group_size": 32,
            "symmetric": symmetric,
            "ignore": ["lm_head"],
        }
        assert {"pack": {"format": form}} in recipe["stages"]
        plan = make_plan(load_recipe(path))
        assert str(plan.output) == f"artifacts/model_w4_{engine}"
        assert not [warning for warning in plan.warnings if TARGETS[engine].title in warning]
    # and so does the recipe for any model
    plan = make_plan(load_recipe(ROOT / "recipes" / "w4.yaml", model="model"))
    assert {str(linear.scheme) for linear in plan.linears} - {"None"} == {"W4 g32 symmetric"}


def test_groups_fit_the_model_and_the_engine() -> None:
    write_llama(Path("wide"), hidden_size=256, intermediate_size=512)
    write_llama(Path("odd"), hidden_size=192, intermediate_size=576, num_attention_heads=4)
    found = {}
    for model in ("wide", "odd"):
        for engine in FOUR_BITS:
            if invoke("init", "--model", model, "--for", engine).exit_code == 0:
                found[model, engine] = yaml.safe_load(
                    Path(f"{model}_w4_{engine}.yaml").read_text()
                )["weights"]["group_size"]
    assert "format: awq" in Path("wide_w4_lmdeploy.yaml").read_text()
    assert found == {
        **{("wide", engine): 128 for engine in ("vllm", "lmdeploy", "sglang", "transformers")},
        ("wide", "llama.cpp"): 32,
        **{("odd", engine): 64 for engine in ("vllm", "sglang", "transformers")},
        ("odd", "llama.cpp"): 32,
        ("odd", "lmdeploy"): 32,
    }
    for name, inner in (("strange", 80), ("stranger", 172)):
        write_llama(
            Path(name),
            hidden_size=48,
            intermediate_size=inner,
            num_attention_heads=3,
            num_key_value_heads=3,
        )
        for engine in ("lmdeploy", "llama.cpp"):
            refused = invoke("init", "--model", name, "--for", engine)
            assert (
                refused.exit_code == 2 and "They fit vllm, sglang, transformers" in refused.stderr
            )
            assert not Path(f"{name}_w4_{engine}.yaml").exists()
        # a scale a row comes last, and fits anything
        for engine in ("vllm", "sglang", "transformers"):
            assert invoke("init", "--model", name, "--for", engine).exit_code == 0
            recipe = yaml.safe_load(Path(f"{name}_w4_{engine}.yaml").read_text())
            size = 16 if (name, engine) == ("strange", "transformers") else -1
            assert (
                recipe["weights"]["group_size"] == size
                and {"pack": {"format": "compressed-tensors"}} in recipe["stages"]
            )


def test_what_plan_would_refuse_is_not_written() -> None:
    """llama.cpp's BPE is byte-level or falls back to bytes; without the vocabulary being looked at,
    the recipe could not be run."""
    write_llama(Path("model"))
    tokenizer = json.loads(Path("model/tokenizer.json").read_text())
    tokenizer |= {
        "normalizer": {"type": "Prepend", "prepend": "▁"},
        "pre_tokenizer": None,
        "decoder": None,
    }
    tokenizer["model"] |= {"byte_fallback": False}
    Path("model/tokenizer.json").write_text(json.dumps(tokenizer))
    made = invoke("init", "--model", "model", "--for", "llama.cpp")
    assert (
        made.exit_code == 2
        and "neither byte-level nor falls back to bytes" in made.stderr
        and not list(Path().glob("*.yaml"))
    )
    Path("model/model.safetensors").unlink()  # a config and a tokenizer say that much too
    assert "neither byte-level" in invoke("init", "--model", "model", "--for", "llama.cpp").stderr
    assert invoke("init", "--model", "model").exit_code == 0


def test_commands_can_be_pasted() -> None:
    write_llama(Path("model"))
    made = invoke("init", "--model", "model", "--output", "my recipes/a b.yaml")
    assert made.stdout.splitlines()[-1] == "Next: quantflow run 'my recipes/a b.yaml'"


@pytest.mark.parametrize(
    ("bits", "engine", "says"),
    [
        (3, "sglang", "expected 4 or 8"),
        (8, "lmdeploy", "expected 4"),
        (5, "llama.cpp", "expected 4 or 8"),
        (2, "sglang", "for transformers"),
        (3, "vllm", "expected 4 or 8"),
    ],
)
def test_widths_that_an_engine_does_not_load_are_refused(bits: int, engine: str, says: str) -> None:
    write_llama(Path("model"))
    made = invoke("init", "--model", "model", "--bits", bits, "--for", engine)
    assert (
        made.exit_code == 2 and f"{bits} with --for {engine}" in made.stderr and says in made.stderr
    )
    assert not list(Path().glob("*.yaml"))


def test_no_file_is_replaced_unasked() -> None:
    write_llama(Path("model"))
    Path("mine.yaml").write_text("mine")
    made = invoke("init", "--model", "model", "--output", "mine.yaml")
    assert (
        made.exit_code == 2
        and "mine.yaml: there is such a file" in made.stderr
        and Path("mine.yaml").read_text() == "mine"
    )
    made = invoke("init", "--model", "model", "--output", "mine.yaml", "--force")
    assert (
        made.exit_code == 0
        and "quantflow run mine.yaml" in made.stdout
        and "quantflow run mine.yaml" in Path("mine.yaml").read_text()
    )


def test_what_is_written_runs_and_says_what_it_is() -> None:
    write_llama(Path("my: model"))
    write_text(Path("mine.txt"), 0, 256)
    made = invoke(
        "init", "--model", "my: model", "--bits", 8, "--for", "vllm", "--data", "mine.txt"
    )
    assert made.exit_code == 0, made.stderr
    path = Path("my-model_w8_vllm.yaml")
    text = path.read_text()
    assert (
        "in 8 bits for vLLM" in text
        and "vllm serve artifacts/my-model_w8_vllm" in text
        and "data: mine.txt" in text
    )
    changes = (
        "calibration.samples=2",
        "calibration.seqlen=32",
        "stages.evaluate.windows=2",
        "stages.evaluate.length=32",
    )
    done = invoke(
        "run", path, "--json", *(word for change in changes for word in ("--set", change))
    )
    assert (
        done.exit_code == 0 and json.loads(done.stdout)["output"] == "artifacts/my-model_w8_vllm"
    ), done.stderr


def test_wrong_paths_are_said() -> None:
    gone = invoke("init", "--model", "./gone")
    assert gone.exit_code == 2 and "./gone: no such directory" in gone.stderr
    write_llama(Path("model"))
    text = invoke("init", "--model", "model", "--data", "gone.txt")
    assert (
        text.exit_code == 2
        and "'gone.txt'" in text.stderr
        and "/tmp" not in text.stderr
        and not list(Path().glob("*.yaml"))
    )
