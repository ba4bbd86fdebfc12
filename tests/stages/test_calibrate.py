"""What `calibrate` records, against a recomputation from every tensor that passed by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantflow.decoder.rope import rotate
from quantflow.decoder.stream import Stream
from quantflow.stages.calibrate_layer import calibrate_layer
from tests.helpers.layers import CONFIGS, TinyLayer

STATISTICS = ("max", "min", "mean", "absmax", "absmean")


def expected_statistics(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = rows.double()
    values = (rows.amax(0), rows.amin(0), rows.mean(0), rows.abs().amax(0), rows.abs().mean(0))
    return dict(zip(STATISTICS, values, strict=True))


def stream_of(x: torch.Tensor, path: Path | None = None) -> Stream:
    stream = Stream((x.shape[0], x.shape[1], x.shape[2]), x.dtype, torch.device("cpu"), path)
    stream.write(0, x)
    return stream


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_linears_input_and_output(model_type: str) -> None:
    tiny = TinyLayer(model_type, dtype=torch.float32)
    x = tiny.input(5, 8, torch.float32)
    inputs: dict[str, list[torch.Tensor]] = {}
    outputs: dict[str, list[torch.Tensor]] = {}
    cached: list[tuple[torch.Tensor, torch.Tensor]] = []

    def tap(name: str, given: torch.Tensor, result: torch.Tensor) -> None:
        inputs.setdefault(name, []).append(given.reshape(-1, given.shape[-1]).clone())
        outputs.setdefault(name, []).append(result.reshape(-1, result.shape[-1]).clone())

    def observe(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cached.append((k, v))
        return k, v

    stream = stream_of(x)
    with torch.inference_mode():
        layer = tiny.layer(dtype=torch.float32)
        layer.tap = tap
        after = torch.cat([layer.forward(part, observe) for part in x.split(2)])
        result = calibrate_layer(tiny.layer(dtype=torch.float32), stream, 2)
    assert torch.equal(stream.read(0, 5), after)
    linears = set(tiny.linears()) | ({tiny.architecture.layer.router} - {""})
    assert set(inputs) == linears
    names = {f"{n}.{kind}.{s}" for n in linears for kind in ("input", "output") for s in STATISTICS}
    assert set(result) == names | {
        f"{n}.{s}" for n in ("key", "value") for s in ("max", "min", "absmax")
    }
    for kind, records in (("input", inputs), ("output", outputs)):
        for name, parts in records.items():
            for statistic, value in expected_statistics(torch.cat(parts)).items():
                torch.testing.assert_close(
                    result[f"{name}.{kind}.{statistic}"].double(),
                    value,
                    rtol=1e-5,
                    atol=1e-6,
                    msg=f"{name} {statistic}",
                )
    for which, name in enumerate(("key", "value")):
        rows = torch.cat([pair[which] for pair in cached])
        assert torch.equal(result[f"{name}.max"], rows.amax((0, 2))) and torch.equal(
            result[f"{name}.min"], rows.amin((0, 2))
        )
        assert result[f"{name}.max"].shape == (tiny.config.kv_heads, tiny.config.head_dim)


def test_keys_are_seen_after_rotation() -> None:
    tiny = TinyLayer("llama")
    x = tiny.input(3, 8)
    result = calibrate_layer(tiny.layer(), stream_of(x), 3)
    layer = tiny.layer()
    h = layer.attention_input(x)
    k = (h @ tiny.tensors["self_attn.k_proj.weight"].T).view(3, 8, 2, 8).transpose(1, 2)
    assert layer.seq.cos is not None and layer.seq.sin is not None
    turned = rotate(k, layer.seq.cos[:8], layer.seq.sin[:8])
    torch.testing.assert_close(result["key.max"].double(), turned.amax((0, 2)), rtol=1e-6, atol=0)
    assert not torch.allclose(k.amax((0, 2)), turned.amax((0, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_and_files_make_no_difference(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny = TinyLayer("llama", dtype=dtype)
    x = tiny.input(6, 8, dtype)
    with torch.inference_mode():
        held, filed = stream_of(x), stream_of(x, tmp_path / "x.bin")
        a, b = (calibrate_layer(tiny.layer(dtype=dtype), stream, 2) for stream in (held, filed))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert torch.equal(held.read(0, 6), filed.read(0, 6))
    with torch.inference_mode():
        whole = calibrate_layer(tiny.layer(dtype=dtype), stream_of(x), 6)
    eps = torch.finfo(dtype).eps
    for name, value in a.items():
        torch.testing.assert_close(value, whole[name], rtol=4 * eps, atol=4 * eps, msg=name)


def test_experts_see_only_their_tokens() -> None:
    tiny = TinyLayer("mixtral")
    names = tiny.architecture.layer
    x = tiny.input(2, 4)
    layer = tiny.layer()
    attended = x + layer.attention_output(layer.context(layer.attention_input(x)))
    h = layer.mlp_input(attended).reshape(-1, 32)
    logits = h @ tiny.tensors[f"{names.router}.weight"].T
    result = calibrate_layer(layer, stream_of(x), 2)
    for e in range(3):
        mine = [
            t for t in range(8) if e in sorted(range(3), key=lambda i: -float(logits[t, i]))[:2]
        ]
        torch.testing.assert_close(
            result[f"{names.mlp(e)[0]}.input.mean"].double(), h[mine].mean(0), rtol=1e-5, atol=1e-6
        )


def test_an_expert_without_tokens_has_no_statistics() -> None:
    tiny = TinyLayer("mixtral")
    names = tiny.architecture.layer
    tiny.tensors[f"{names.router}.weight"][:] = torch.tensor([[1.0], [1.0], [-1.0]])
    tiny.tensors[f"{names.mlp_norm}.weight"].abs_()
    tiny.tensors[f"{names.o}.weight"] *= 1e-3
    result = calibrate_layer(tiny.layer(), stream_of(1 + 0.1 * tiny.input(1, 4)), 1)
    assert f"{names.mlp(0)[0]}.input.mean" in result
    assert not [n for n in result if n.startswith(f"{names.expert.format(e=2)}.")]
