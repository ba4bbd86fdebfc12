"""GPTQ, both versions, against an independent reading of its description, one bit at a time."""

from __future__ import annotations

import pytest
import torch

from quantflow.errors import FormatError
from quantflow.formats import FORMATS, detect
from quantflow.formats.base import ConfigRequest
from quantflow.quant.numbers.integer import IntegerTensor
from quantflow.quant.scheme import Scheme
from tests.formats.helpers import field, random_tensor


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("index", [True, False])
def test_every_weight_by_hand(bits: int, version: int, symmetric: bool, index: bool) -> None:
    n, k, group = 32, 96, 24
    tensor = random_tensor(
        n, k, Scheme(bits, group, symmetric), index=index, smallest_zero=2 - version
    )
    encoded = FORMATS["gptq" if version == 1 else "gptq_v2"].encode("m", tensor, torch.bfloat16)
    qweight, qzeros, scales, g_idx = (
        encoded[f"m.{name}"] for name in ("qweight", "qzeros", "scales", "g_idx")
    )
    assert qweight.shape == (k * bits // 32, n) and qzeros.shape == (k // group, n * bits // 32)
    weight = tensor.dequantize(torch.float64)
    for column in range(n):
        words = qweight[:, column].tolist()
        for row in range(k):
            g = int(g_idx[row])
            zero = (field(qzeros[g].tolist(), column, bits) + (version == 1)) % 2**bits
            code = field(words, row, bits)
            assert (code - zero) * scales[g, column].item() == weight[column, row].item()


def test_v1_differs_from_v2_by_one_in_each_field_without_carry() -> None:
    tensor = random_tensor(32, 32, Scheme(4, 16, False), smallest_zero=1)
    one, two = (
        FORMATS[name].encode("m", tensor, torch.float16)["m.qzeros"] for name in ("gptq", "gptq_v2")
    )
    assert torch.equal(one + 0x11111111, two)


def test_v1_refuses_a_zero_point_of_0() -> None:
    tensor = random_tensor(32, 32, Scheme(4, 16, False), smallest_zero=1)
    tensor.zeros[3, 1] = 0
    with pytest.raises(
        FormatError, match=r"m\.qzeros: 1 zero points are 0, which version 1 would store as -1"
    ) as error:
        FORMATS["gptq"].encode("m", tensor, torch.float16)
    assert "gptq_v2" in str(error.value)
    FORMATS["gptq_v2"].encode("m", tensor, torch.float16)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_point_of_0_is_read_where_its_writer_says_that_it_is_there(bits: int) -> None:
    # The vectors have what GPTQModel and AutoGPTQ write; this is every spelling of who wrote it.
    scheme = Scheme(bits, 16, False)
    tensor = random_tensor(32, 32, scheme, smallest_zero=1)
    encoded = FORMATS["gptq"].encode("m", tensor, torch.float16)
    config = FORMATS["gptq"].quantization_config(ConfigRequest({"m": scheme}, [], scheme))
    tensor.zeros[31] = 0  # the last field of its word, above which there is nothing to borrow from
    encoded["m.qzeros"] = FORMATS["gptq_v2"].encode("m", tensor, torch.float16)["m.qzeros"]
    if bits == 3:
        minus_one = IntegerTensor(scheme, tensor.codes, tensor.scales, (tensor.zeros - 1) & 7)
        encoded["m.qzeros"] = FORMATS["gptq_v2"].encode("m", minus_one, torch.float16)["m.qzeros"]
    else:
        encoded["m.qzeros"] -= sum(1 << shift for shift in range(0, 32, bits))
    for meta in (
        {"quantizer": ["optimum:1.20", "GPTQModel:1.4.0"]},
        {"quantizer": "gptqmodel:2.0"},
    ):
        assert torch.equal(
            FORMATS["gptq"].decode("m", encoded, config | {"meta": meta}).zeros, tensor.zeros
        )
    for meta in ({}, None, "gptqmodel", {"quantizer": None}, {"quantizer": ["autoround:0.5"]}):
        with pytest.raises(FormatError, match=r"m\.qzeros: 2 zero points are -1"):
            FORMATS["gptq"].decode("m", encoded, config | {"meta": meta})


def test_the_newer_name_of_the_version() -> None:
    # A file of version 2 that is taken for version 1 is off by one in every asymmetric zero point,
    # which nothing else would show.
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 16,
        "sym": False,
        "format": "gptq_v2",
    }
    assert detect({"quantization_config": config}) == "gptq_v2"
    assert FORMATS["gptq_v2"].scheme_of("m", config) == Scheme(4, 16, False)
    with pytest.raises(FormatError, match="'gptq_v2'; expected 'gptq'"):
        FORMATS["gptq"].scheme_of("m", config)
    assert detect({"quantization_config": config | {"checkpoint_format": "gptq"}}) == "gptq"


def test_a_mislabelled_version_is_noticed() -> None:
    scheme = Scheme(4, 16, True)
    encoded = FORMATS["gptq"].encode("m", random_tensor(32, 32, scheme), torch.float16)
    config = FORMATS["gptq_v2"].quantization_config(ConfigRequest({"m": scheme}, [], scheme))
    with pytest.raises(FormatError, match="the other GPTQ version"):
        FORMATS["gptq_v2"].decode("m", encoded, config)
    with pytest.raises(FormatError, match="checkpoint_format: 'gptq_v2'; expected 'gptq'"):
        FORMATS["gptq"].decode("m", encoded, config)


def test_an_index_with_uneven_groups_is_refused() -> None:
    tensor = random_tensor(32, 32, Scheme(4, 16, True), index=True)
    assert tensor.group_index is not None
    index = tensor.group_index.clone()
    index[0] = 1 - index[0]
    uneven = IntegerTensor(tensor.scheme, tensor.codes, tensor.scales, tensor.zeros, index)
    with pytest.raises(FormatError, match="m group index: groups of unequal size"):
        FORMATS["gptq"].encode("m", uneven, torch.float16)


def test_config_and_its_file() -> None:
    scheme = Scheme(4, 128, False)
    config = FORMATS["gptq"].quantization_config(
        ConfigRequest({"model.layers.0.q": scheme}, ["lm_head"], scheme, act_order=True)
    )
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": True,
        "sym": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
    }
    assert FORMATS["gptq"].extra_files(config) == {"quantize_config.json": config}


def test_dynamic_as_its_readers_apply_it() -> None:
    default, wide = Scheme(4, 128, False), Scheme(8, -1, True)
    modules = {
        f"model.layers.{i}.mlp.{part}": wide if part == "down_proj" else default
        for i in range(12)
        for part in ("up_proj", "down_proj")
    }
    del modules["model.layers.1.mlp.up_proj"]
    config = FORMATS["gptq_v2"].quantization_config(
        ConfigRequest(modules, ["lm_head", "model.layers.1.mlp.up_proj"], default)
    )
    assert config["dynamic"] == {
        r"-:^model\.layers\.1\.mlp\.up_proj$": {},
        r"+:^model\.layers\.\d+\.mlp\.down_proj$": {"bits": 8, "group_size": -1, "sym": True},
    }


def test_three_bits_ten_to_a_word_are_named() -> None:
    """As EfficientQAT packs them: the same names, and other bits."""
    scheme = Scheme(3, 32, symmetric=False)
    form = FORMATS["gptq_v2"]
    config = form.quantization_config(ConfigRequest({"m": scheme}, [], scheme))
    tensors = form.encode("m", random_tensor(32, 320, scheme), torch.float16)
    assert tensors["m.qweight"].shape == (30, 32)
    tensors["m.qweight"] = torch.zeros(32, 32, dtype=torch.int32)  # 320 codes, ten to a word
    with pytest.raises(FormatError, match=r"m\.qweight: 32 words for 320 codes of 3 bits, ten to"):
        form.decode("m", tensors, config)
