"""Names without the base model's prefix, or with one too many, are read as transformers reads them;
other prefixes are said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.errors import ModelError
from quantflow.formats.reader import Weights
from quantflow.models.registry import family
from quantflow.pipeline.export import export
from quantflow.quant.scheme import Scheme
from tests.formats.test_recognise import GPTQ, written
from tests.helpers.zoo import ZOO, Specimen, specimen, write

HEADS = ("lm_head.", "output.")


def base_of(found: Specimen) -> str:
    return family(found.config, Path()).base


def changed(found: Specimen, change: Callable[[str], str]) -> Specimen:
    return Specimen(found.config, {change(name): tensor for name, tensor in found.tensors.items()})


def tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    assert checkpoint.problems() == []
    return {name: checkpoint.tensor(name) for name in checkpoint.expected}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("name", ZOO)
def test_every_family_without_its_prefix_and_with_one_more(tmp_path: Path, name: str) -> None:
    found = specimen(name)
    base = base_of(found)
    whole = tensors(write(tmp_path / "whole", found))
    same(
        whole,
        tensors(
            write(tmp_path / "without", changed(found, lambda name: name.removeprefix(f"{base}.")))
        ),
    )
    same(
        whole,
        tensors(
            write(
                tmp_path / "shards",
                changed(found, lambda name: name.removeprefix(f"{base}.")),
                shards=3,
            )
        ),
    )
    if name != "opt":  # whose older files have none
        same(
            whole, tensors(write(tmp_path / "twice", changed(found, lambda name: f"{base}.{name}")))
        )


@pytest.mark.parametrize(
    "name", ["llama3", "llama_bias", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "opt"]
)
@pytest.mark.parametrize("change", ["without", "twice"])
def test_transformers_reads_the_same(tmp_path: Path, name: str, change: str) -> None:
    """A checkpoint saved from the base class, as far as it goes, with the head that it then lacks;
    and one with `model.` before all."""
    found = specimen(name)
    prefixed = changed(found, lambda n: n if n.startswith(("model.", *HEADS)) else f"model.{n}")
    folder = write(
        tmp_path / "model",
        changed(
            prefixed,
            (lambda n: n.removeprefix("model.")) if change == "without" else lambda n: f"model.{n}",
        ),
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    tokens = torch.arange(2, 18).view(2, 8)
    reference = AutoModelForCausalLM.from_pretrained(
        write(tmp_path / "whole", found), dtype=torch.float32, local_files_only=True
    )
    with torch.inference_mode():
        assert torch.equal(theirs(tokens).logits, reference(tokens).logits)
    same(tensors(tmp_path / "whole"), tensors(folder))


def test_what_the_base_class_itself_saves(tmp_path: Path) -> None:
    source = write(tmp_path / "source", specimen("llama3"))  # tied: the base class has all of it
    AutoModel.from_pretrained(source, dtype=torch.float32, local_files_only=True).save_pretrained(
        tmp_path / "base"
    )
    same(tensors(source), tensors(tmp_path / "base"))
    source = write(tmp_path / "untied", specimen("llama_bias"))
    AutoModel.from_pretrained(source, dtype=torch.float32, local_files_only=True).save_pretrained(
        tmp_path / "headless"
    )
    (problem,) = Checkpoint(tmp_path / "headless").problems()
    assert (
        problem.found == "missing tensors: lm_head.weight"
        and "the class with a head" in problem.hint
    )


def test_a_packed_checkpoint(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", "gptq", Scheme(4, 32, True), {"quant_method": "gptq", **GPTQ})
    whole = Weights(folder)
    first = {module: whole.quantized(module).codes for module in whole.modules}
    packed = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in packed.items()},
        folder / "model.safetensors",
    )
    same(
        first,
        {module: Weights(folder).quantized(module).codes for module in Weights(folder).modules},
    )
    export(folder, "gptq_v2", tmp_path / "out")
    assert all(
        name.startswith(("model.", "lm_head."))
        for name in load_file(tmp_path / "out" / "model.safetensors")
    )


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("base_model.model.", "merge_and_unload"),
        ("module.", "DataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("language_model.", "a larger model"),
        ("llm.", "transformers would not know them either"),
    ],
)
def test_other_prefixes_are_refused_by_name(tmp_path: Path, prefix: str, said: str) -> None:
    found = specimen("llama_bias")
    count = len(found.tensors)
    for change in (lambda name: prefix + name, lambda name: prefix + name.removeprefix("model.")):
        folder = write(tmp_path, changed(found, change))
        with pytest.raises(ModelError) as refused:
            Weights(folder)
        (problem,) = refused.value.problems
        assert (
            f"of {count} tensors are called {prefix.partition('.')[0]}." in problem.found
            and said in problem.hint
        )


def test_an_adapter_among_the_tensors(tmp_path: Path) -> None:
    found = specimen("llama_bias")
    name = "model.layers.0.self_attn.q_proj"
    lora = {
        f"{name}.lora_A.default.weight": torch.zeros(4, 64),
        f"{name}.lora_B.default.weight": torch.zeros(64, 4),
    }
    folder = write(tmp_path, Specimen(found.config, found.tensors | lora))
    with pytest.raises(
        ModelError,
        match=r"an adapter that is not merged, such as model\.layers\.0\.self_attn\.q_proj\.lora_A",
    ):
        Weights(folder)


def test_both_names_of_one_tensor(tmp_path: Path) -> None:
    found = specimen("llama_bias")
    folder = write(
        tmp_path, Specimen(found.config, found.tensors | {"norm.weight": torch.ones(64)})
    )
    with pytest.raises(
        ModelError,
        match=r"both (model\.)?norm\.weight and (model\.)?norm\.weight, for model\.norm\.weight",
    ):
        Checkpoint(folder)
