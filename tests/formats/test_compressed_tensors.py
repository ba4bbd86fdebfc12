"""compressed-tensors against the package of that name, and a checkpoint against transformers, which
reads it through the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from quantflow.errors import FormatError
from quantflow.formats.base import ConfigRequest
from quantflow.formats.compressed_tensors import CompressedTensors
from quantflow.quant.numbers.integer import IntegerTensor
from quantflow.quant.scheme import Scheme
from tests.formats.helpers import assert_same, field, random_tensor

FORMAT = CompressedTensors()
COMPRESSOR = BaseCompressor.get_value_from_registry("pack-quantized")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(5, 12, 4), (32, 128, 32), (33, 172, 43), (7, 22, -1)]
)
def test_every_weight_by_hand(bits: int, symmetric: bool, n: int, k: int, group: int) -> None:
    tensor = random_tensor(n, k, Scheme(bits, group, symmetric), dtype=torch.bfloat16)
    encoded = FORMAT.encode("m", tensor, torch.bfloat16)
    assert encoded["m.weight_shape"].tolist() == [n, k]
    assert ("m.weight_zero_point" in encoded) == (not symmetric)
    weight, scale = tensor.dequantize(torch.float64), encoded["m.weight_scale"]
    group = k if group == -1 else group
    middle = 2 ** (bits - 1)
    for row in range(n):
        words = encoded["m.weight_packed"][row].tolist()
        for column in range(k):
            g = column // group
            zero = (
                0
                if symmetric
                else field(encoded["m.weight_zero_point"][:, g].tolist(), row, bits) - middle
            )
            code = field(words, column, bits) - middle
            assert (code - zero) * scale[row, g].item() == weight[row, column].item()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "group"), [(5, 12, 4), (33, 172, 43), (7, 22, -1)])
def test_the_package_writes_and_reads_the_same(
    bits: int, symmetric: bool, n: int, k: int, group: int
) -> None:
    scheme = Scheme(bits, group, symmetric)
    tensor = random_tensor(n, k, scheme, dtype=torch.float32)
    ours = {
        name.removeprefix("m."): value
        for name, value in FORMAT.encode("m", tensor, torch.float32).items()
    }
    codes, zeros = (
        part.to(torch.int16).sub(scheme.midpoint).to(torch.int8)
        for part in (tensor.codes, tensor.zeros)
    )

    assert torch.equal(ours["weight_packed"], pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(ours["weight_packed"], bits, torch.Size((n, k))), codes)
    config = FORMAT.quantization_config(ConfigRequest({"m": scheme}, [], scheme))
    theirs = QuantizationConfig.model_validate(config).config_groups["group_0"]
    read = COMPRESSOR.decompress(ours, theirs)
    assert torch.equal(read["weight"], tensor.dequantize())
    written = COMPRESSOR.compress(
        {"weight": tensor.dequantize(), "weight_scale": tensor.scales, "weight_zero_point": zeros},
        theirs,
    )
    assert written.keys() == ours.keys()
    for name, value in written.items():
        assert value.dtype == ours[name].dtype and torch.equal(value, ours[name]), name
    assert_same(
        FORMAT.decode("m", {f"m.{name}": value for name, value in written.items()}, config), tensor
    )


def test_a_group_index_is_refused_as_the_package_refuses_it() -> None:
    # Without this refusal the weights would be read in the wrong groups, and nobody would say so.
    with pytest.raises(ValidationError, match="has been removed"):
        QuantizationArgs(num_bits=4, group_size=32, actorder="group")
    scheme = Scheme(4, 32, True)
    tensor = random_tensor(32, 64, scheme, index=True)
    with pytest.raises(FormatError, match="m: a group index"):
        FORMAT.encode("m", tensor, torch.float16)
    with pytest.raises(FormatError, match="act_order: static"):
        FORMAT.quantization_config(ConfigRequest({"m": scheme}, [], scheme, act_order=True))


def test_a_group_index_of_an_older_writer_is_read() -> None:
    scheme = Scheme(4, 32, False)
    tensor = random_tensor(32, 64, scheme, index=True)
    plain = IntegerTensor(scheme, tensor.codes, tensor.scales, tensor.zeros)
    config = FORMAT.quantization_config(ConfigRequest({"m": scheme}, [], scheme))
    encoded = FORMAT.encode("m", plain, torch.float16)
    assert tensor.group_index is not None
    assert_same(
        FORMAT.decode("m", encoded | {"m.weight_g_idx": tensor.group_index}, config), tensor
    )
    unset = torch.full_like(tensor.group_index, -1)
    assert_same(FORMAT.decode("m", encoded | {"m.weight_g_idx": unset}, config), plain)
    with pytest.raises(FormatError, match=r"m\.weight_g_idx: groups of unequal size"):
        FORMAT.decode("m", encoded | {"m.weight_g_idx": unset + 1}, config)


def test_three_bits_in_ten_to_a_word_are_refused() -> None:
    # What the package wrote before its version 0.18.
    scheme = Scheme(3, 32, True)
    encoded = FORMAT.encode("m", random_tensor(4, 128, scheme), torch.float16)
    encoded["m.weight_packed"] = torch.zeros(4, 13, dtype=torch.int32)
    with pytest.raises(FormatError, match=r"m\.weight_packed: shape \[4, 13\]; expected \[4, 12\]"):
        FORMAT.decode(
            "m", encoded, FORMAT.quantization_config(ConfigRequest({"m": scheme}, [], scheme))
        )


def test_config() -> None:
    scheme = Scheme(4, 128, False)
    modules = {
        f"model.layers.{i}.mlp.{part}": scheme
        for i in range(12)
        for part in ("up_proj", "down_proj")
    }
    modules |= {f"model.layers.{i}.mlp.down_proj": Scheme(8, -1, True) for i in range(12)}
    config = FORMAT.quantization_config(ConfigRequest(modules, ["lm_head"], scheme))
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
    assert (
        config["quantization_status"] == "compressed"
        and config["ignore"] == ["lm_head"]
        and config["kv_cache_scheme"] is None
    )
    first, second = config["config_groups"].values()
    assert first["targets"] == ["Linear"]
    assert second["targets"] == [r"re:^model\.layers\.\d+\.mlp\.down_proj$"]
    assert first["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 128,
        "actorder": None,
        "dynamic": False,
    }
    assert (second["weights"]["strategy"], second["weights"]["group_size"]) == ("channel", None)
    # LMDeploy 0.18 looks in the group, and fails with a KeyError
    assert first["format"] == second["format"] == "pack-quantized"
    read = QuantizationConfig.model_validate(config)  # as does the package, which keeps it
    assert [group.format for group in read.config_groups.values()] == ["pack-quantized"] * 2
    assert json.loads(json.dumps(config)) == config


def test_uniform_asymmetric_weights_are_unpacked_as_they_are_read() -> None:
    # transformers can do that with one scheme only; see the comment in the code.
    modules = {
        "model.layers.0.up_proj": Scheme(4, 32, False),
        "model.layers.0.down_proj": Scheme(4, 32, False),
    }
    assert (
        FORMAT.quantization_config(ConfigRequest(modules, [], Scheme(4, 32, False)))["dequantize"]
        is True
    )
    modules["model.layers.0.mlp.experts.0.up_proj"] = Scheme(4, 64, True)
    assert (
        FORMAT.quantization_config(ConfigRequest(modules, [], Scheme(4, 32, False)))["dequantize"]
        is True
    )
    modules["model.layers.0.down_proj"] = Scheme(8, 32, False)
    assert "dequantize" not in FORMAT.quantization_config(
        ConfigRequest(modules, [], Scheme(4, 32, False))
    )
    assert "dequantize" not in FORMAT.quantization_config(
        ConfigRequest({"a": Scheme(4, 32, True)}, [], Scheme(4, 32, True))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"config_groups": {"a": {"targets": ["Linear"], "format": "int-quantized"}}},
            "'int-quantized'; expected 'pack-quantized'",
        ),
        (
            {"format": "int-quantized", "config_groups": {"a": {"targets": ["Linear"]}}},
            "'int-quantized'; expected 'pack-quantized'",
        ),
        (
            {"config_groups": {"group_0": {"targets": ["Linear"]}}},
            "config_groups.group_0.weights: missing",
        ),
        (
            {
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 4, "type": "float", "group_size": 16},
                    }
                }
            },
            "'float'",
        ),
        (
            {
                "config_groups": {
                    "group_0": {"targets": ["Linear"], "weights": {"num_bits": 9, "group_size": 16}}
                }
            },
            "9 bits",
        ),
        (
            {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}},
            "'tensor'; expected 'group' or 'channel'",
        ),
        (
            {"config_groups": {"group_0": {"targets": ["re:("], "weights": {}}}},
            "no regular expression",
        ),
        ({"config_groups": ["W4A16"]}, "a value of type dict"),
    ],
)
def test_what_is_not_read(change: dict[str, object], message: str) -> None:
    config = FORMAT.quantization_config(ConfigRequest({}, [], Scheme(4, 32, True))) | change
    with pytest.raises(FormatError, match=message):
        FORMAT.scheme_of("m", config)


def test_names_come_before_expressions_and_those_before_classes() -> None:
    def group(targets: list[str], bits: int) -> dict[str, object]:
        return {
            "targets": targets,
            "weights": {"num_bits": bits, "group_size": 32, "strategy": "group", "symmetric": True},
        }

    config = {
        "format": "pack-quantized",
        "config_groups": {
            "a": group(["Linear"], 2),
            "b": group(["re:.*up"], 3),
            "c": group(["m.up"], 4),
        },
    }
    bits = {
        name: scheme.bits
        for name in ("m.up", "n.up", "m.down")
        if (scheme := FORMAT.scheme_of(name, config)) is not None
    }
    assert bits == {"m.up": 4, "n.up": 3, "m.down": 2}


# A checkpoint in transformers


def round_to_nearest(weight: torch.Tensor, scheme: Scheme) -> IntegerTensor:
    n, k = weight.shape
    grouped = weight.view(n, -1, scheme.group_of(k))
    if scheme.symmetric:
        scales = grouped.abs().amax(-1) / (scheme.midpoint - 0.5)
        zeros = torch.full_like(scales, scheme.midpoint)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = (high - low) / scheme.levels
        zeros = (-low / scales).round()
    codes = (grouped / scales[..., None]).round().add(zeros[..., None]).clamp(0, scheme.levels)
    return IntegerTensor(scheme, codes.view(n, k).to(torch.uint8), scales, zeros.to(torch.uint8))


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            num_hidden_layers=2,
            tie_word_embeddings=False,
            attention_bias=True,
            **sizes,
        )
    ).eval()


def write(
    model: PreTrainedModel,
    directory: Path,
    scheme_of: Callable[[str], Scheme | None],
    kv: dict[str, tuple[float, float]] | None = None,
) -> dict[str, torch.Tensor]:
    """The state dict of the dequantised model; the compressed checkpoint in `directory`."""
    model.save_pretrained(directory)
    # under the checkpoint's names, which for experts are not the model's
    state = load_file(directory / "model.safetensors")
    default = Scheme(4, 32, True)
    stored: dict[str, torch.Tensor] = {}
    modules: dict[str, Scheme] = {}
    ignored: list[str] = []
    for name, value in state.items():
        module = name.removesuffix(".weight")
        scheme = scheme_of(module) if value.dim() == 2 and "embed" not in name else None
        if scheme is None:
            stored[name] = value
            if value.dim() == 2 and "embed" not in name:
                ignored.append(module)
            continue
        tensor = round_to_nearest(value, scheme)
        modules[module] = scheme
        stored |= FORMAT.encode(module, tensor, torch.float32)
        state[name] = tensor.dequantize()
    for attention, (k_scale, v_scale) in (kv or {}).items():
        stored |= {
            f"{attention}.k_scale": torch.tensor([k_scale]),
            f"{attention}.v_scale": torch.tensor([v_scale]),
        }
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = FORMAT.quantization_config(
        ConfigRequest(modules, ignored, default, kv_scales="fp8" if kv else None)
    )
    (directory / "config.json").write_text(json.dumps(config))
    return state


def load(directory: Path) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


MIXED = {
    "q_proj": Scheme(8, 32, True),
    "down_proj": Scheme(8, -1, True),
    "up_proj": Scheme(3, 16, True),
}


@pytest.mark.parametrize(
    "scheme_of",
    [
        lambda module: Scheme(4, -1 if "down_proj" in module else 32, True),
        lambda module: Scheme(4, 4, False),
        lambda module: Scheme(4, -1, False),
        lambda module: Scheme(3, 4, False),
        lambda module: Scheme(8, -1, True),
        lambda module: MIXED.get(module.rpartition(".")[2], Scheme(4, 32, True)),
        lambda module: (
            None
            if "layers.0.mlp.down" in module
            else Scheme(2 if "layers.1" in module else 3, -1, True)
        ),
        lambda module: None if "layers.0.mlp.down" in module else Scheme(4, 4, False),
    ],
    ids=["symmetric", "asymmetric", "channel", "3_bits", "w8", "mixed", "2_and_3_bits", "partly"],
)
def test_transformers_computes_what_the_dequantised_model_does(
    scheme_of: Callable[[str], Scheme | None], tmp_path: Path
) -> None:
    model = tiny_llama()
    tokens = torch.arange(40)[None]
    original = model(tokens).logits
    model.load_state_dict(
        write(model, tmp_path, lambda module: None if module == "lm_head" else scheme_of(module))
    )
    with torch.no_grad():
        logits = load(tmp_path)(tokens).logits
        assert torch.equal(logits, model(tokens).logits)
    assert not torch.equal(logits, original)


@pytest.mark.parametrize(
    "attention", [Scheme(4, 32, True), Scheme(8, 32, False)], ids=["one", "two"]
)
def test_transformers_reads_experts(attention: Scheme, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    }
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=False, **sizes)
    ).eval()

    def scheme_of(module: str) -> Scheme | None:
        if ".experts." in module:
            return Scheme(4, 32, True)
        return attention if "self_attn" in module else None

    dense, packed = tmp_path / "dense", tmp_path / "packed"
    model.save_pretrained(dense)
    save_file(
        write(model, packed, scheme_of), dense / "model.safetensors", metadata={"format": "pt"}
    )
    with torch.no_grad():
        tokens = torch.arange(40)[None]
        assert torch.equal(load(packed)(tokens).logits, load(dense)(tokens).logits)


def test_experts_share_a_scheme() -> None:
    modules = {
        f"model.layers.0.mlp.experts.0.{part}": Scheme(8 if part == "down_proj" else 4, 32, True)
        for part in ("up_proj", "down_proj")
    }
    with pytest.raises(FormatError, match="one scheme for all experts"):
        FORMAT.quantization_config(ConfigRequest(modules, [], Scheme(4, 32, True)))


def test_kv_scales_round_keys_and_values_in_transformers(tmp_path: Path) -> None:
    model = tiny_llama()
    scales = {f"model.layers.{i}.self_attn": (0.003 / (i + 1), 0.00047) for i in range(2)}
    state = write(
        model, tmp_path, lambda module: None if module == "lm_head" else Scheme(4, -1, True), scales
    )
    model.load_state_dict(state)

    class Rounded(DynamicCache):  # type: ignore[misc]
        def update(
            self,
            key_states: torch.Tensor,
            value_states: torch.Tensor,
            layer_idx: int,
            *args: object,
            **kwargs: object,
        ):  # type: ignore[no-untyped-def]
            rounded = [
                (states / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(states.dtype) * scale
                for states, scale in zip(
                    (key_states, value_states),
                    scales[f"model.layers.{layer_idx}.self_attn"],
                    strict=True,
                )
            ]
            return super().update(*rounded, layer_idx, *args, **kwargs)

    tokens = torch.arange(40)[None]
    with torch.no_grad():
        logits = load(tmp_path)(tokens).logits
        assert torch.equal(
            logits, model(tokens, past_key_values=Rounded(config=model.config)).logits
        )
        assert not torch.equal(logits, model(tokens).logits)


def test_which_kv_scales_a_config_says() -> None:
    scheme = Scheme(4, 32, True)
    config = FORMAT.quantization_config(ConfigRequest({"m": scheme}, [], scheme, kv_scales="fp8"))
    theirs = QuantizationConfig.model_validate(config).kv_cache_scheme
    assert (theirs.num_bits, theirs.type, theirs.strategy, theirs.symmetric, theirs.dynamic) == (
        8,
        "float",
        "tensor",
        True,
        False,
    )
    as_llm_compressor = theirs.model_dump(mode="json")  # every field written out
    for said, expected in (
        (None, None),
        (config["kv_cache_scheme"], "fp8"),
        (as_llm_compressor, "fp8"),
        (as_llm_compressor | {"type": "int"}, "int8"),
        (
            as_llm_compressor | {"strategy": "attn_head"},
            "type float, num_bits 8, strategy attn_head, symmetric True, dynamic False",
        ),
        ({"num_bits": 4, "type": "int"}, "type int, num_bits 4"),
    ):
        assert FORMAT.stored_kv_scales(config | {"kv_cache_scheme": said}) == expected
