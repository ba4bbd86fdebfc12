"""Every tensor of a source is used, copied, or left out for a reason that is named; and the head of
a model that says it is tied."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantflow.checkpoints import checkpoint as checkpoint_module
from quantflow.checkpoints import tensor_file
from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.checkpoints.tensor_file import TensorFile
from quantflow.engine.llm import LLM
from quantflow.formats.reader import Weights
from quantflow.pipeline.export import Options, export
from quantflow.pipeline.plan import make_plan
from quantflow.pipeline.progress import Silent
from quantflow.pipeline.run import run
from quantflow.report.page import report_page
from quantflow.stages.registry import load_recipe
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_llama, write_text
from tests.helpers.zoo import LAYERS, ZOO, Specimen, decoder_logits, random_tokens, specimen, write

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
EMBEDDINGS = {
    "internlm2": "model.tok_embeddings.weight",
    "qwen": "transformer.wte.weight",
    "opt": "decoder.embed_tokens.weight",
    "opt_prefixed": "model.decoder.embed_tokens.weight",
}
HEADS = {"internlm2": "output.weight"}


def strangers(name: str, found: Specimen) -> dict[str, Tensor]:
    """What files of that family have been seen with: buffers, and layers that the config does not
    count."""
    last = f".{LAYERS - 1}."
    beyond = {
        n.replace(last, f".{LAYERS + 5}."): t.clone()
        for n, t in found.tensors.items()
        if last in n and "experts" not in n
    }
    assert beyond
    layer = next(n for n in found.tensors if last in n).partition(last)[0] + last
    buffers = [
        "self_attn.rotary_emb.inv_freq",
        "attention.rotary_emb.cos_cached",
        "attn.masked_bias",
        "attn.bias",
    ]
    return beyond | {layer + b: torch.ones(4) for b in buffers if layer + b not in found.tensors}


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("more", [False, True], ids=["as it is", "with strangers"])
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied twice"])
def test_every_tensor_is_used_or_left_out(
    name: str, more: bool, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """used: what is really read for the tensors that are computed with and written."""
    found = specimen(name)
    tensors, config = dict(found.tensors), dict(found.config)
    if tied and name == "baichuan2":
        pytest.skip("its head is normalised, so that no embedding is like it: refused")
    if tied:
        config["tie_word_embeddings"] = True
        tensors[HEADS.get(name, HEAD)] = tensors[EMBEDDINGS.get(name, EMBEDDING)].clone()
    if more:
        tensors |= strangers(name, found)
    source = Checkpoint(write(tmp_path, Specimen(config, tensors)))
    assert source.problems() == []
    read: set[str] = set()
    inner = source.container.read
    monkeypatch.setattr(
        source.container,
        "read",
        lambda tensor, index=None: read.add(tensor) or inner(tensor, index),
    )
    for native in (*source.expected, *source.copied):
        assert source.tensor(native).shape == source.shape_of(native)
    assert read | set(source.left_out) == set(tensors)
    assert not read & set(source.left_out)
    assert all(source.left_out.values())
    if more:
        more_layers = {n for n in strangers(name, found) if f".{LAYERS + 5}." in n}
        beyond = {n for n in more_layers if not n.endswith("rotary_emb.inv_freq")}
        assert set(strangers(name, found)) - beyond <= set(source.left_out)
        assert {source.sources[native].name for native in source.copied} == beyond
        assert any("num_hidden_layers is 2" in note for note in source.remarks)
    elif tied:
        assert source.left_out[HEADS.get(name, HEAD)].startswith(
            f"a second copy of {EMBEDDINGS.get(name, EMBEDDING)}"
        )


@pytest.mark.parametrize("format", ["compressed-tensors", "awq", "gptq", "bitsandbytes", "gguf"])
def test_quantised_checkpoints_too(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama(tmp_path / "m", hidden_size=64, intermediate_size=128, dtype=torch.float16)
    recipe = (
        "name: r\nweights: {bits: 4, group_size: 32, symmetric: true}\nstages: [rtn, {pack:"
        f" {{format: {format}}}}}]\n"
    )
    (tmp_path / "r.yaml").write_text(recipe)
    if format == "bitsandbytes":
        (tmp_path / "r.yaml").write_text("name: r\nstages: [nf4, {pack: {format: bitsandbytes}}]\n")
    if format == "awq":
        (tmp_path / "r.yaml").write_text(recipe.replace("symmetric: true", "symmetric: false"))
    out = tmp_path / "out"
    run(
        make_plan(
            load_recipe(tmp_path / "r.yaml", model=str(folder), output=str(out)), device="cpu"
        ),
        Silent(),
    )
    if format == "gptq":  # as AutoGPTQ writes: biases of zeros, and others' KV scales
        file = out / "model.safetensors"
        odd = {
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(64),
            "model.layers.0.self_attn.k_scale": torch.ones(1),
        }
        save_file(load_file(file) | odd, file, {"format": "pt"})
        index = json.loads((out / "model.safetensors.index.json").read_text())
        index["weight_map"] |= dict.fromkeys(odd, "model.safetensors")
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = Weights(out)
    container, read = weights.checkpoint.container, set()
    inner = container.read
    monkeypatch.setattr(
        container, "read", lambda tensor, index=None: read.add(tensor) or inner(tensor, index)
    )
    for native in weights.checkpoint.expected:
        weights.tensor(native)
    assert read | set(weights.left_out) == set(container.tensors)
    assert not read & set(weights.left_out)
    assert len(weights.left_out) == (2 if format == "gptq" else 0)


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    found = specimen("opt")
    double = found.tensors | {
        "model.decoder.layers.0.fc1.weight": found.tensors["decoder.layers.0.fc1.weight"] + 1
    }
    (problem,) = Checkpoint(write(tmp_path, Specimen(found.config, double))).problems()
    assert "both decoder.layers.0.fc1.weight and model.decoder.layers.0.fc1.weight" in problem.found


# --- a head that says it is tied


def contradictory(folder: Path, **changes: Any) -> Path:
    """A Llama whose config says that its head, which differs from the embedding, is tied."""
    write_llama(folder, **changes)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


def theirs(folder: Path, tokens: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        return model(tokens).logits


def test_a_head_that_differs_is_kept_as_transformers_does(tmp_path: Path) -> None:
    folder, tokens = contradictory(tmp_path, dtype=torch.float32), random_tokens(2, 24)
    weights = Weights(folder)
    assert not weights.checkpoint.config.tied and weights.checkpoint.left_out == {}
    (note,) = weights.checkpoint.remarks
    assert HEAD in note and "tie_word_embeddings" in note
    torch.testing.assert_close(
        decoder_logits(weights, tokens), theirs(folder, tokens), rtol=0, atol=5e-5
    )


@pytest.mark.parametrize("changed", [0, -1])
def test_one_number_in_any_slice_makes_another_head(
    changed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared a few rows at a time, and never whole."""
    folder = contradictory(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(tensor_file, "COMPARED_BYTES", 7 * 64 * 2)
    assert Checkpoint(folder).config.tied
    tensors[HEAD].view(-1)[changed] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    taken: list[int] = []
    inner = checkpoint_module.open_container

    def opened(*arguments: Any, **options: Any) -> Any:
        container = inner(*arguments, **options)
        read = container.read

        def spied(name: str, index: Any = None) -> Tensor:
            found = read(name, index)
            taken.append(len(found))
            return found

        container.read = spied  # type: ignore[method-assign]
        return container

    monkeypatch.setattr(checkpoint_module, "open_container", opened)
    assert not Checkpoint(folder).config.tied
    assert max(taken) == 7


def test_equal_tables_are_read_once_in_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank, the plan and the run open the model; a table of 128256 rows is half a
    gigabyte."""
    folder = contradictory(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {HEAD: tensors[EMBEDDING].clone()}, folder / "model.safetensors", {"format": "pt"}
    )
    read: list[str] = []
    inner = TensorFile.read
    monkeypatch.setattr(
        TensorFile,
        "read",
        lambda self, name, index=None: read.append(name) or inner(self, name, index),
    )
    assert Checkpoint(folder).config.tied and sorted(set(read)) == [HEAD, EMBEDDING]
    read.clear()
    assert Checkpoint(folder).config.tied and read == []
    tensors[HEAD] = tensors[EMBEDDING] + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    # the clock of files ticks every few milliseconds
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert not Checkpoint(folder).config.tied


def test_tables_of_one_number_are_a_message(tmp_path: Path) -> None:
    folder = contradictory(tmp_path)
    for one, other in ((1.0, 1.0), (1.0, 2.0)):
        tensors = load_file(folder / "model.safetensors") | {
            HEAD: torch.tensor(one),
            EMBEDDING: torch.tensor(other),
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        shown = invoke("inspect", folder)
        assert shown.exit_code == 2 and "embed_tokens.weight: shape []" in "".join(
            shown.stderr.split("\n")
        )


def test_equal_numbers_in_other_dtypes_are_a_copy(tmp_path: Path) -> None:
    folder = contradictory(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {HEAD: tensors[EMBEDDING].float()}, folder / "model.safetensors", {"format": "pt"}
    )
    found = Checkpoint(folder)
    assert found.config.tied and list(found.left_out) == [HEAD] and found.remarks == ()


def test_the_only_copy_may_be_the_heads(tmp_path: Path) -> None:
    folder, tokens = (
        write_llama(tmp_path, dtype=torch.float32, tie_word_embeddings=True),
        random_tokens(2, 24),
    )
    expected = theirs(folder, tokens)
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(theirs(folder, tokens), expected, rtol=0, atol=0)
    weights = Weights(folder)
    assert weights.checkpoint.config.tied and weights.checkpoint.left_out == {}
    torch.testing.assert_close(decoder_logits(weights, tokens), expected, rtol=0, atol=5e-5)
    done = export(folder, "huggingface", tmp_path / "out", Options(dtype="float32"))
    assert EMBEDDING in load_file(done.output / "model.safetensors")
    torch.testing.assert_close(theirs(done.output, tokens), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "format", ["compressed-tensors", "gptq", "gguf", "huggingface", "turbomind"]
)
def test_artifacts_keep_the_head_for_every_reader(format: str, tmp_path: Path) -> None:
    folder = contradictory(
        tmp_path / "m",
        dtype=torch.float16,
        hidden_size=128,
        intermediate_size=128,
        num_key_value_heads=4,
    )
    tokens, head = random_tokens(1, 16), load_file(folder / "model.safetensors")[HEAD]
    recipe = f"""
name: r
weights: {{bits: 4, group_size: 32, symmetric: {str(format != "turbomind").lower()}}}
stages: [rtn, {{pack: {{format: {format}}}}}]
"""
    (tmp_path / "r.yaml").write_text(recipe)
    out, before = tmp_path / "out", decoder_logits(Weights(folder), tokens)
    plan = make_plan(
        load_recipe(tmp_path / "r.yaml", model=str(folder), output=str(out)), device="cpu"
    )
    assert any("tie_word_embeddings" in note for note in plan.notes)
    run(plan, Silent())
    report = json.loads((out / "report.json").read_text())
    assert (
        any("tie_word_embeddings" in note for note in report["notes"])
        and report["kept"]["lm_head"] == "weights.ignore"
    )
    again = Weights(out)
    assert not again.checkpoint.config.tied and torch.equal(again.tensor(HEAD), head)
    assert (decoder_logits(again, tokens) - before).norm() < 0.2 * before.norm()
    if format not in ("gguf", "turbomind"):
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    if format == "huggingface":
        torch.testing.assert_close(
            theirs(out, tokens), decoder_logits(again, tokens), rtol=0, atol=5e-4
        )


def test_ranks_and_the_engine_keep_it(tmp_path: Path) -> None:
    folder = contradictory(tmp_path / "m", dtype=torch.float32)
    stages = "[rtn, {pack: {format: compressed-tensors}}, {shard: {tp: 2}}]"
    (tmp_path / "r.yaml").write_text(
        f"name: r\nweights: {{bits: 8, group_size: 16, symmetric: true}}\nstages: {stages}\n"
    )
    run(
        make_plan(
            load_recipe(tmp_path / "r.yaml", model=str(folder), output=str(tmp_path / "out")),
            device="cpu",
        ),
        Silent(),
    )
    for rank in range(2):
        place = tmp_path / "out" / "tp2" / f"rank-{rank}"
        assert not Weights(place, tp=2).checkpoint.config.tied
        assert torch.equal(
            load_file(place / "model.safetensors")[HEAD],
            load_file(folder / "model.safetensors")[HEAD],
        )
    llm = LLM(folder, device="cpu")
    assert any(HEAD in note for note in llm.engine.notes)
    tokens = [5, 6, 7, 8]
    (answer,) = llm.generate([tokens])[0].completions
    assert answer.token_ids[0] == int(theirs(folder, torch.tensor([tokens]))[0, -1].argmax())


def test_a_quantised_head_of_a_tied_config_is_kept(tmp_path: Path) -> None:
    """What is packed cannot be a copy of the embedding: it is a head of its own."""
    folder = write_llama(tmp_path / "m", dtype=torch.float16)
    (tmp_path / "r.yaml").write_text(
        "name: r\nweights: {bits: 4, group_size: 32, symmetric: true}\nstages: [rtn, {pack:"
        " {format: compressed-tensors}}]\n"
    )
    out = tmp_path / "out"
    run(
        make_plan(
            load_recipe(tmp_path / "r.yaml", model=str(folder), output=str(out)), device="cpu"
        ),
        Silent(),
    )
    tensors, parts = (
        load_file(out / "model.safetensors"),
        ("weight_packed", "weight_scale", "weight_shape"),
    )
    like = "model.layers.0.mlp.up_proj"
    del tensors[HEAD]
    rows = -(-320 // 96)
    head = {f"lm_head.{p}": torch.cat([tensors[f"{like}.{p}"]] * rows)[:320] for p in parts[:2]}
    head["lm_head.weight_shape"] = torch.tensor(
        [320, 64], dtype=tensors[f"{like}.weight_shape"].dtype
    )
    save_file(tensors | head, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors.index.json").unlink()
    config = json.loads((out / "config.json").read_text()) | {
        "tie_word_embeddings": True,
        "vocab_size": 320,
    }
    config["quantization_config"]["ignore"] = []
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear"]
    (out / "config.json").write_text(json.dumps(config))
    weights = Weights(out)
    assert not weights.checkpoint.config.tied and weights.is_quantised(HEAD)
    expected = torch.cat([weights.tensor(f"{like}.weight")] * rows)[:320]
    assert torch.equal(weights.tensor(HEAD), expected)


# --- what a user sees


def test_plan_report_and_export_name_what_is_left_out(tmp_path: Path) -> None:
    found = specimen("internlm")
    folder = write(
        tmp_path / "m", Specimen(found.config, found.tensors | strangers("internlm", found))
    )
    text = write_text(tmp_path / "eval.txt")
    (tmp_path / "r.yaml").write_text(
        "name: r\nweights: {bits: 8, group_size: 32, symmetric: true}\nstages: [rtn, {pack:"
        f" {{format: compressed-tensors}}}}, {{evaluate: {{data: {text}, windows: 2, length:"
        " 16}}]\n"
    )
    shown = invoke("plan", tmp_path / "r.yaml", "--model", folder, "--output", tmp_path / "out")
    said = "".join(shown.stdout.replace("│", "").split())  # the table wraps
    for part in (
        "a buffer that is computed",
        "beyond num_hidden_layers = 2",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ):
        assert "".join(part.split()) in said
    done = invoke(
        "run",
        tmp_path / "r.yaml",
        "--model",
        folder,
        "--output",
        tmp_path / "out",
        "--device",
        "cpu",
    )
    assert done.exit_code == 0 and "num_hidden_layers is 2" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    tensors = report["tensors"]
    every = set(found.tensors) | set(strangers("internlm", found))
    linears = {n for n in found.tensors if n.endswith("_proj.weight")}
    assert tensors["source"] == len(every) and tensors["quantised"] == len(linears)
    buffers = {n for n in every if "rotary_emb" in n or ".attn." in n}
    assert set(tensors["left_out"]) == buffers
    assert set(tensors["copied"]) == {n for n in every if ".7." in n} - buffers
    parts = (len(tensors["copied"]), len(tensors["left_out"]))
    assert tensors["quantised"] + tensors["kept"] + sum(parts) == tensors["source"]
    page = report_page(report)
    assert (
        "model.layers.0.self_attn.rotary_emb.inv_freq" in page
        and "a buffer that is computed" in page
    )
    exported = invoke(
        "export",
        folder,
        "--format",
        "huggingface",
        "--output",
        tmp_path / "exported",
        "--dtype",
        "float32",
    )
    assert "Left out: " in exported.stdout and "a buffer that is computed" in exported.stdout
    inspected = json.loads(invoke("inspect", folder, "--json").stdout)
    assert inspected["left_out"] == tensors["left_out"]
    assert inspected["copied"] == tensors["copied"]
