"""KV parameters of a layer, of a rank, and what they do to the layer."""

from __future__ import annotations

import pytest
import torch

from quantflow.calibration.statistics import KVStatistics
from quantflow.quant.kv import KVParameters, round_kv
from quantflow.stages.kv_parameters import (
    largest_of_extremes,
    largest_of_parameters,
    layer_parameters,
    parameter_tensors,
    rounding,
)
from quantflow.stages.kv_qparams import KvQparams
from tests.helpers.layers import TinyLayer

# Two heads of two channels.
EXTREMES = {
    "key.min": torch.tensor([[-1.0, -2.0], [0.0, -8.0]]),
    "key.max": torch.tensor([[1.0, 6.0], [4.0, 0.0]]),
    "value.min": torch.tensor([[-51.0, 0.0], [0.0, 0.0]]),
    "value.max": torch.tensor([[0.0, 0.0], [51.0, 204.0]]),
}


def test_by_hand() -> None:
    found = layer_parameters(EXTREMES, KvQparams())
    assert (float(found["key"].zero_point), float(found["value"].zero_point)) == (-1.0, 76.5)
    assert float(found["value"].scale) == 1.0 and float(found["key"].scale) == pytest.approx(
        14 / 255
    )
    symmetric = layer_parameters(EXTREMES, KvQparams(symmetric=True))
    assert float(symmetric["key"].zero_point) == 0.0 and float(
        symmetric["key"].scale
    ) == pytest.approx(8 / 127)


def test_a_rank_looks_at_its_own_heads() -> None:
    first, second = (layer_parameters(EXTREMES, KvQparams(), rank, 2) for rank in range(2))
    assert (float(first["key"].zero_point), float(second["key"].zero_point)) == (2.0, -2.0)
    assert float(first["value"].scale) == pytest.approx(0.2) and float(
        second["value"].scale
    ) == pytest.approx(0.8)
    # Of finer parameters, the ranks' are parts of the whole's.
    for granularity in ("head", "channel"):
        settings = KvQparams(granularity=granularity)
        whole = layer_parameters(EXTREMES, settings)
        parts = [layer_parameters(EXTREMES, settings, rank, 2) for rank in range(2)]
        for name in ("key", "value"):
            assert torch.equal(torch.cat([p[name].scale for p in parts]), whole[name].scale)
            assert torch.equal(
                torch.cat([p[name].zero_point for p in parts]), whole[name].zero_point
            )


def test_names() -> None:
    tensors = parameter_tensors(
        "model.layers.3.self_attn", layer_parameters(EXTREMES, KvQparams(granularity="head"))
    )
    assert list(tensors) == [
        f"model.layers.3.self_attn.{n}"
        for n in ("k_scale", "k_zero_point", "v_scale", "v_zero_point")
    ]
    assert all(t.dtype == torch.float32 and t.shape == (2,) for t in tensors.values())
    assert tensors["model.layers.3.self_attn.k_zero_point"].tolist() == [2.0, -2.0]
    torch.testing.assert_close(
        tensors["model.layers.3.self_attn.v_scale"], torch.tensor([0.2, 0.8])
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_the_largest_magnitude_is_never_less_than_was_seen(
    granularity: str, symmetric: bool
) -> None:
    """A scale of 1 is a head's own as well as that of what is constant: read as the latter, its
    range would be clipped."""
    by_hand = {f"a.{letter}_scale": torch.tensor([1.0, 0.5]) for letter in "kv"}
    by_hand |= {f"a.{letter}_zero_point": torch.zeros(2) for letter in "kv"}
    assert largest_of_parameters(by_hand, "a") == {"key": 127.0, "value": 127.0}
    extremes = {
        **EXTREMES,
        "key.min": torch.tensor([[-127.0, 3.0], [0.0, -8.0]]),
        "key.max": torch.tensor([[128.0, 3.0], [4.0, 0.0]]),
    }
    tensors = parameter_tensors(
        "a", layer_parameters(extremes, KvQparams(symmetric=symmetric, granularity=granularity))
    )
    seen, found = largest_of_extremes(extremes), largest_of_parameters(tensors, "a")
    assert seen == {"key": 128.0, "value": 204.0}
    for name, largest in seen.items():
        # of the channel that is 3 throughout
        assert largest * (1 - 1e-6) <= found[name] <= max(largest * 1.005, 3 + 127.5), name


def test_rounding_uses_each_layers_own_parameters() -> None:
    def of_layer(index: int) -> dict[str, KVParameters]:
        return {
            n: KVParameters(8, torch.tensor(float(index + 1 + i)), torch.tensor(0.0))
            for i, n in enumerate(("key", "value"))
        }

    observe = rounding(of_layer)
    k = v = torch.tensor([3.2, 5.0]).view(1, 1, 1, 2)
    # 5 / 2 goes to the even 2
    assert [t.flatten().tolist() for t in observe(0)(k, v)] == [[3.0, 5.0], [4.0, 4.0]]
    assert [t.flatten().tolist() for t in observe(4)(k, v)] == [[5.0, 5.0], [6.0, 6.0]]


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_eight_bits_hardly_change_a_layer(granularity: str) -> None:
    tiny = TinyLayer("llama")
    x, statistics, layer = tiny.input(4, 16), KVStatistics(), tiny.layer()
    expected = layer.forward(x, statistics)
    parameters = layer_parameters(statistics.result(), KvQparams(granularity=granularity))
    seen: list[float] = []

    def check(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rounded = round_kv(k, parameters["key"])
        seen.append(float((rounded - k).abs().max() / parameters["key"].scale.max()))
        return rounded, round_kv(v, parameters["value"])

    found = layer.forward(x, check)
    assert 0.3 < seen[0] <= 0.501  # rounded, and by half a step at most
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.01
    assert torch.equal(layer.forward(x, rounding(lambda index: parameters)(0)), found)
