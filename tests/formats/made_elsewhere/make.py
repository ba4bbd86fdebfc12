"""Makes the checkpoints of this folder: a tiny random Llama, quantised by other software; README.md
says how.

`python make.py llmcompressor|llmcompressor-older|gptqmodel|autoround`, each where that package is
installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# it asks for two, however few processors there are
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
KEPT = ("config.json", "quantize_config.json", "model.safetensors")
VOCABULARY, TOKENS, GROUP = 64, 32, 16


def texts() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(3, VOCABULARY, (TOKENS,), generator=generator).tolist(),
            "attention_mask": [1] * TOKENS,
        }
        for _ in range(32)
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """Both packages want one, and nothing is ever given to it."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="0", bos_token="1", eos_token="2", pad_token="0"
    )


def dense(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.mlp.down_proj):
            # groups without a negative weight, whose zero point is 0
            linear.weight.data[::5].abs_()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def keep(made: Path, name: str) -> None:
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    (FOLDER / name).mkdir()
    for file in KEPT:
        if (made / file).is_file():
            shutil.copyfile(made / file, FOLDER / name / file)


def llmcompressor(name: str, dense: Path, made: Path, **weights: Any) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot

    try:
        from llmcompressor.modifiers.gptq import GPTQModifier
    except ImportError:  # older versions
        from llmcompressor.modifiers.quantization import GPTQModifier

    groups = {"group_0": {"targets": ["Linear"], "weights": {"type": "int", **weights}}}
    model = LlamaForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    oneshot(
        model=model,
        dataset=Dataset.from_list(texts()),
        processor=tokenizer(),
        num_calibration_samples=32,
        max_seq_length=TOKENS,
        shuffle_calibration_samples=False,
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
    )
    model.save_pretrained(made, save_compressed=True)
    keep(made, name)


def llmcompressor_older(name: str, dense: Path, made: Path, **weights: Any) -> None:
    """With a group index, which later packages refuse: so this one's own reading of it is kept as
    well."""
    llmcompressor(name, dense, made, **weights)
    from compressed_tensors.compressors import ModelCompressor

    model = LlamaForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    compressor = ModelCompressor.from_pretrained(str(made))
    assert compressor is not None
    compressor.decompress(str(made), model)
    digests(
        name,
        {
            n: m.weight
            for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and n != "lm_head"
        },
    )


def gptqmodel(name: str, dense: Path, made: Path, **settings: Any) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    config = QuantizeConfig(
        group_size=GROUP, act_group_aware=False, offload_to_disk=False, **settings
    )
    model = GPTQModel.load(str(dense), config, device="cpu")
    model.quantize(texts(), batch_size=1)
    model.save(str(made))
    keep(made, name)
    # else it rounds the scales to bf16
    read = GPTQModel.load(str(made), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
    linears = {n: m for n, m in read.model.named_modules() if isinstance(m, TorchLinear)}
    # The class's own method: the instance's is compiled, which needs a compiler.
    digests(name, {n: TorchLinear.dequantize_weight(m).t() for n, m in linears.items()})


def autoround(
    name: str,
    dense: Path,
    made: Path,
    *,
    packing: str,
    layers: dict[str, Any] | None = None,
    **settings: Any,
) -> None:
    from auto_round import AutoRound

    model = LlamaForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    quantiser = AutoRound(
        model,
        tokenizer(),
        iters=0,
        layer_config=layers,
        device_map="cpu",
        enable_torch_compile=False,
        disable_opt_rtn=True,
        group_size=GROUP,
        **settings,
    )
    quantiser.quantize_and_save(str(made), format=packing)
    (made,) = (path.parent for path in made.rglob("model.safetensors"))
    keep(made, name)
    # A row of the unit matrix takes out one column, exactly.
    taken = {
        n: m(torch.eye(m.infeatures, dtype=torch.float16)).t()
        for n, m in autoround_layers(made, packing, settings["bits"]).items()
    }
    digests(name, taken)


def autoround_layers(made: Path, packing: str, bits: int) -> dict[str, Any]:
    """The package's own layers. Where it has one for the GPU alone, its classes and functions are
    given the tensors."""
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    if packing in ("auto_round", "auto_round:gptqmodel"):
        read = AutoModelForCausalLM.from_pretrained(
            made, device_map="cpu", quantization_config=AutoRoundConfig(backend="torch")
        )
        return {n: m for n, m in read.named_modules() if hasattr(m, "qweight")}
    found: dict[str, Any] = {}
    tensors = load_file(made / "model.safetensors")
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        parts = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")}
        k, n = parts["scales"].shape[0] * GROUP, parts["scales"].shape[1]
        if packing == "auto_round:auto_awq":
            found[name] = torch.nn.Linear(k, n, bias=False, dtype=torch.float16)
            found[name].weight.data = dequantize_gemm(*parts.values(), bits, GROUP).t()
            found[name].infeatures = k
        else:
            found[name] = QuantLinear(bits, GROUP, k, n, bias=False)
            found[name].load_state_dict(parts)
    return found


def digests(name: str, weights: dict[str, torch.Tensor]) -> None:
    """What the package dequantised: each weight's dtype, and the SHA-256 of its `[N, K]`
    numbers."""
    found = {}
    for module, weight in weights.items():
        bits = weight.detach().contiguous().view(torch.int16).numpy().tobytes()
        found[module] = [str(weight.dtype).removeprefix("torch."), hashlib.sha256(bits).hexdigest()]
    (FOLDER / name / "dequantised.json").write_text(json.dumps(found, indent=1) + "\n")


MIXED: dict[str, dict[str, Any]] = {
    "model.layers.0.mlp.down_proj": {"bits": 8, "sym": True},
    "k_proj": {"bits": 2, "group_size": 32, "sym": True},
    "model.layers.1.self_attn.o_proj": {"bits": 16},
}
W4 = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
SETS: dict[str, tuple[Callable[..., None], dict[str, dict[str, Any]]]] = {
    "llmcompressor": (
        llmcompressor,
        {
            "llmcompressor_w4_asymmetric": {**W4, "symmetric": False},
            "llmcompressor_w4_static": {**W4, "symmetric": True, "actorder": "static"},
            "llmcompressor_w8_channel": {"num_bits": 8, "strategy": "channel", "symmetric": True},
        },
    ),
    "llmcompressor-older": (
        llmcompressor_older,
        {"llmcompressor_older_w4_group": {**W4, "symmetric": True, "actorder": "group"}},
    ),
    "gptqmodel": (
        gptqmodel,
        {
            "gptqmodel_v1_asymmetric": {
                "bits": 4,
                "sym": False,
                "desc_act": False,
                "format": "gptq",
            },
            "gptqmodel_v2_act_order": {
                "bits": 4,
                "sym": False,
                "desc_act": True,
                "format": "gptq_v2",
                "lm_head": True,
            },
        },
    ),
    "autoround": (
        autoround,
        {
            "autoround_v1_symmetric": {"packing": "auto_round", "bits": 4, "sym": True},
            "autoround_v1_asymmetric": {"packing": "auto_round:auto_gptq", "bits": 4, "sym": False},
            "autoround_v2_mixed": {
                "packing": "auto_round:gptqmodel",
                "bits": 4,
                "sym": False,
                "layers": MIXED,
            },
            "autoround_awq": {"packing": "auto_round:auto_awq", "bits": 4, "sym": False},
        },
    ),
}

if __name__ == "__main__":
    make, checkpoints = SETS[sys.argv[1]]
    for name, settings in checkpoints.items():
        with tempfile.TemporaryDirectory() as scratch:
            dense(Path(scratch) / "dense")
            make(name, Path(scratch) / "dense", Path(scratch) / "made", **settings)
