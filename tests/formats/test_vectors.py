"""AWQ and GPTQ against tensors that AutoAWQ, AutoGPTQ and GPTQModel packed and dequantised;
`vectors/README.md` says how.

Those packages multiply in fp16, a single product of a scale and a small integer, so that our
float32 rounded to fp16 must be the same bits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from quantflow.errors import FormatError
from quantflow.formats import FORMATS
from quantflow.quant.numbers.integer import IntegerTensor

FOLDER = Path(__file__).parent / "vectors"
# what it writes into every quantization_config
GPTQMODEL = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}


def load(package: str) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Every case's settings and tensors."""
    with safe_open(FOLDER / f"{package}.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["cases"])
        names = list(file.keys())
        return {
            case: (
                own,
                {
                    name.removeprefix(f"{case}."): file.get_tensor(name)
                    for name in names
                    if name.startswith(f"{case}.")
                },
            )
            for case, own in settings.items()
        }


AWQ, AUTOGPTQ, GPTQ = load("autoawq"), load("autogptq"), load("gptqmodel")
WRAPPED = "4_asymmetric_wrapped"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, so that a negative zero is not a positive one."""
    return a.dtype == b.dtype == torch.float16 and torch.equal(
        a.view(torch.int16), b.view(torch.int16)
    )


def check(
    name: str,
    config: dict[str, Any],
    theirs: dict[str, Tensor],
    weight: Tensor,
    *,
    written: bool = True,
) -> IntegerTensor:
    """Reads the tensors as `name`, compares the weight with theirs, and writes them again as they
    were."""
    form = FORMATS[name]
    tensors = {f"m.{part}": tensor for part, tensor in theirs.items()}
    tensor = form.decode("m", tensors, config)
    assert same_bits(tensor.dequantize(torch.float16), weight.t().contiguous())
    if written:
        ours = form.encode("m", tensor, torch.float16)
        assert ours.keys() == tensors.keys()
        for key, value in tensors.items():
            assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), key
    return tensor


def gptq_config(own: dict[str, Any], checkpoint_format: str, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": own["bits"],
        "group_size": own["group_size"],
        "sym": own["symmetric"],
        "checkpoint_format": checkpoint_format,
        **more,
    }


def parts(tensors: dict[str, Tensor], qzeros: str = "qzeros") -> dict[str, Tensor]:
    return {
        name: tensors[qzeros if name == "qzeros" else name]
        for name in ("qweight", "qzeros", "scales", "g_idx")
    }


def test_the_vectors_are_all_there() -> None:
    # A case that was lost would otherwise be a test that nobody misses.
    assert (len(AWQ), len(AUTOGPTQ), len(GPTQ)) == (3, 9, 17)


@pytest.mark.parametrize("case", AWQ)
def test_autoawq(case: str) -> None:
    own, tensors = AWQ[case]
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": own["group_size"],
        "zero_point": True,
        "version": "gemm",
    }
    tensor = check(
        "awq",
        config,
        {part: tensors[part] for part in ("qweight", "qzeros", "scales")},
        tensors["weight"],
    )
    assert tensor.scheme.symmetric == own["symmetric"] and tensor.zeros.unique().numel() == (
        1 if own["symmetric"] else 16
    )


@pytest.mark.parametrize("case", GPTQ)
def test_gptqmodel_version_2(case: str) -> None:
    own, tensors = GPTQ[case]
    tensor = check(
        "gptq_v2", gptq_config(own, "gptq_v2", **GPTQMODEL), parts(tensors), tensors["weight"]
    )
    assert (tensor.group_index is not None) == ("act_order" in case)
    if not own["symmetric"]:
        assert bool((tensor.zeros == 0).any())  # which version 1 cannot hold


@pytest.mark.parametrize("case", GPTQ)
def test_gptqmodel_version_1(case: str) -> None:
    own, tensors = GPTQ[case]
    # It subtracts a word of ones, so that a zero point of 0 borrows from the field above: only what
    # is symmetric is written as we write.
    check(
        "gptq",
        gptq_config(own, "gptq", **GPTQMODEL),
        parts(tensors, "qzeros_v1"),
        tensors["weight"],
        written=own["symmetric"],
    )


@pytest.mark.parametrize("case", [case for case in GPTQ if GPTQ[case][0]["symmetric"]])
def test_a_symmetric_version_is_not_taken_for_the_other(case: str) -> None:
    own, tensors = GPTQ[case]
    for name, qzeros in (("gptq", "qzeros"), ("gptq_v2", "qzeros_v1")):
        with pytest.raises(FormatError, match="the other GPTQ version"):
            check(name, gptq_config(own, name), parts(tensors, qzeros), tensors["weight"])


@pytest.mark.parametrize("case", [case for case in AUTOGPTQ if case != WRAPPED])
def test_autogptq(case: str) -> None:
    own, tensors = AUTOGPTQ[case]
    config = gptq_config(own, "gptq")
    del config["checkpoint_format"]  # it wrote none
    tensor = check("gptq", config, parts(tensors), tensors["weight"])
    assert (tensor.group_index is not None) == ("act_order" in case)


def test_autogptq_with_zero_points_of_0() -> None:
    own, tensors = AUTOGPTQ[WRAPPED]
    with pytest.raises(
        FormatError, match=r"m\.qzeros: \d+ zero points are -1, over which version 1 loses others"
    ):
        check("gptq", gptq_config(own, "gptq"), parts(tensors), tensors["weight"])
    # What the message says: from a field of -1 on there is nothing else in its word, and the
    # package itself reads 16 there.
    words = tensors["qzeros"].flatten().tolist()
    fields = [[(word >> shift) & 15 for shift in range(0, 32, 4)] for word in words]
    damaged = [f for f in fields if 15 in f[:-1]]
    assert len(damaged) > 5 and all(set(f[f.index(15) :]) == {15} for f in damaged)
    groups = tensors["g_idx"].long()
    zeros = torch.tensor(fields).view(len(tensors["scales"]), -1)[groups] + 1
    codes = torch.stack(
        [(tensors["qweight"] >> shift) & 15 for shift in range(0, 32, 4)], 1
    ).reshape(zeros.shape)
    assert (
        same_bits(((codes - zeros) * tensors["scales"][groups].float()).half(), tensors["weight"])
        and int(zeros.max()) == 16
    )
