"""AWQ against an independent reading of its description, one nibble at a time."""

from __future__ import annotations

import pytest
import torch

from quantflow.errors import FormatError
from quantflow.formats import FORMATS
from quantflow.formats.base import ConfigRequest
from quantflow.quant.scheme import Scheme
from tests.formats.helpers import random_tensor

AWQ = FORMATS["awq"]


@pytest.mark.parametrize(("n", "k", "group"), [(8, 4, 4), (24, 10, 5), (40, 172, 43), (16, 12, -1)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_by_hand(n: int, k: int, group: int, symmetric: bool) -> None:
    tensor = random_tensor(n, k, Scheme(4, group, symmetric))
    encoded = AWQ.encode("m", tensor, torch.float16)
    qweight, qzeros, scales = (
        encoded[f"m.{name}"].tolist() for name in ("qweight", "qzeros", "scales")
    )
    weight = tensor.dequantize(torch.float64)
    group = k if group == -1 else group
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    for column in range(n):
        word, nibble = column // 8, order.index(column % 8)
        for row in range(k):
            code = (qweight[row][word] >> (4 * nibble)) & 15
            zero = (qzeros[row // group][word] >> (4 * nibble)) & 15
            assert (code - zero) * scales[row // group][column] == weight[column, row].item()


def test_symmetric_weights_have_zero_points_of_8() -> None:
    encoded = AWQ.encode("m", random_tensor(8, 8, Scheme(4, 4, True)), torch.float16)
    assert encoded["m.qzeros"].eq(0x88888888 - 2**32).all()


def test_config() -> None:
    scheme = Scheme(4, 128, True)
    assert AWQ.quantization_config(ConfigRequest({"model.q": scheme}, ["lm_head"], scheme)) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    assert AWQ.quantization_config(
        ConfigRequest({"model.q": scheme}, ["lm_head", "model.gate"], scheme)
    )["modules_to_not_convert"] == ["lm_head", "model.gate"]
    assert AWQ.extra_files({}) == {}


def test_other_versions_are_refused() -> None:
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemv",
    }
    with pytest.raises(FormatError, match="'gemv'; expected 'gemm'"):
        AWQ.scheme_of("m", config)
