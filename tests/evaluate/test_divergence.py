"""The divergence against transformers and float64, and against what must hold whatever the
models."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from quantflow.calibration.statistics import evenly
from quantflow.checkpoints.tensor_file import TensorFile, save_tensors
from quantflow.decoder.block import ObserveKV
from quantflow.decoder.stream import Room
from quantflow.evaluate import distributions, divergence
from quantflow.evaluate.divergence import Divergence, Variant, compare
from quantflow.formats.reader import Weights
from quantflow.quant.kv import kv_parameters
from quantflow.stages.kv_parameters import rounding
from tests.helpers.tiny import write_llama

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def changed(source: Path, target: Path, noise: float, **changes: torch.Tensor) -> Path:
    """A copy of the checkpoint with noise on every linear, and single tensors replaced."""
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((source / name).read_bytes())
    file, generator = TensorFile(source / "model.safetensors"), torch.Generator().manual_seed(9)
    tensors = {}
    for name in file.tensors:
        value = file.read(name)
        if "proj" in name:
            value = (value.float() + noise * torch.randn(value.shape, generator=generator)).to(
                value.dtype
            )
        tensors[name] = changes.get(name, value)
    save_tensors(target / "model.safetensors", tensors, {"format": "pt"})
    return target


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    reference = write_llama(folder / "reference", dtype=torch.float32)
    return reference, changed(reference, folder / "noisy", 0.02)


def windows_of(count: int, length: int, seed: int = 0, vocabulary: int = 300) -> list[list[int]]:
    return torch.randint(
        0, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed)
    ).tolist()


def by_transformers(
    reference: Path, model: Path, windows: list[list[int]]
) -> tuple[dict[str, float], np.ndarray]:
    """Everything but p99 token by token in float64 from transformers' logits, and the KL of each
    position."""
    from transformers import AutoModelForCausalLM

    first, second = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64, attn_implementation="eager")
        for p in (reference, model)
    )
    kl, same, nll, reference_nll = [], [], [], []
    with torch.no_grad():
        for window in windows:
            a, b = (
                m(torch.tensor([window])).logits[0].double().log_softmax(-1).numpy()
                for m in (first, second)
            )
            for position in range(len(window)):
                kl.append(float((np.exp(a[position]) * (a[position] - b[position])).sum()))
                same.append(int(a[position].argmax()) == int(b[position].argmax()))
                if position + 1 < len(window):
                    following = window[position + 1]
                    nll.append(-float(b[position, following]))
                    reference_nll.append(-float(a[position, following]))
    values = {
        "perplexity": math.exp(np.mean(nll)),
        "reference_perplexity": math.exp(np.mean(reference_nll)),
        "kl_mean": float(np.mean(kl)),
        "top1": float(np.mean(same)),
        "tokens": len(kl),
    }
    return values, np.array(kl)


@pytest.mark.parametrize(("count", "length"), [(5, 16), (1, 33), (3, 2)])
def test_equals_transformers(models: tuple[Path, Path], count: int, length: int) -> None:
    windows = windows_of(count, length)
    expected, kl = by_transformers(*models, windows)
    found = compare(Variant(Weights(models[0])), {"noisy": Variant(Weights(models[1]))}, windows)[
        "noisy"
    ]
    assert 0.001 < expected["kl_mean"] < 1 and expected["perplexity"] != pytest.approx(
        expected["reference_perplexity"], rel=1e-3
    )
    for name, value in expected.items():
        assert found.as_dict()[name] == pytest.approx(value, rel=1e-4), name
    # The least of the values that at least 99% do not exceed.
    assert found.kl_p99 == pytest.approx(
        float(np.quantile(kl, 0.99, method="inverted_cdf")), rel=1e-4
    )
    assert list(found.as_dict()) == [
        "perplexity",
        "reference_perplexity",
        "kl_mean",
        "kl_p99",
        "top1",
        "tokens",
    ]


@pytest.mark.parametrize(
    "changes", [{"dtype": torch.bfloat16}, {"dtype": torch.float16, "tie_word_embeddings": True}]
)
def test_16_bit_and_tied_checkpoints(tmp_path: Path, changes: dict[str, object]) -> None:
    reference = write_llama(tmp_path / "reference", **changes)  # type: ignore[arg-type]
    noisy = changed(reference, tmp_path / "noisy", 0.02)
    windows = windows_of(3, 16)
    expected, _ = by_transformers(reference, noisy, windows)
    found = compare(Variant(Weights(reference)), {"noisy": Variant(Weights(noisy))}, windows)[
        "noisy"
    ]
    for name, value in expected.items():
        assert found.as_dict()[name] == pytest.approx(value, rel=1e-4), name


def test_the_profile_is_that_of_positions_and_layers(models: tuple[Path, Path]) -> None:
    """Against transformers: KL of each position, and the hidden states after each layer (its own
    last one is normalised: left out)."""
    from transformers import AutoModelForCausalLM

    windows = windows_of(3, 100)
    _, kl = by_transformers(*models, windows)
    found = compare(Variant(Weights(models[0])), {"noisy": Variant(Weights(models[1]))}, windows)[
        "noisy"
    ].profile
    assert found.bin == 2 and len(found.kl) == 50  # 100 positions in at most 64 bins
    assert np.allclose(found.kl, kl.reshape(3, 50, 2).mean((0, 2)), rtol=1e-3)
    states = []
    for folder in models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.inference_mode():
            states.append(
                model(torch.tensor(windows), output_hidden_states=True)
                .hidden_states[1]
                .reshape(-1, model.config.hidden_size)
            )
    ratio = (states[1] - states[0]).square().sum(-1) / states[0].square().sum(-1)
    # 300 positions, of which 128 are looked at
    picked = torch.tensor([round(i * 299 / 127) for i in range(128)])
    expected = float(ratio[picked].mean())
    assert (
        len(found.layers) == 2
        and found.layers[0] == pytest.approx(expected, rel=1e-4)
        and found.layers[1] > found.layers[0]
    )


@pytest.mark.parametrize(
    ("count", "length"), [(128, 64), (64, 512), (128, 512), (64, 2048), (7, 100)]
)
def test_layers_are_compared_all_over_the_windows(count: int, length: int) -> None:
    """Whole steps would meet the first position of each window again and again."""
    positions = torch.arange(length).repeat(count)[:, None].float()
    found = evenly(positions, divergence.SAMPLED)
    assert len(found) == 128
    assert len(found.unique()) >= min(length, 128) / 2
    assert float(found.mean()) == pytest.approx((length - 1) / 2, rel=0.1)


def test_a_reference_of_another_width_has_no_layers_to_compare(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    wide = write_llama(tmp_path / "wide", hidden_size=128, num_attention_heads=4)
    found = compare(Variant(Weights(wide)), {"m": Variant(Weights(models[0]))}, windows_of(2, 16))[
        "m"
    ]
    assert found.profile.layers == () and found.kl_mean > 0


def test_a_model_is_no_different_from_itself(models: tuple[Path, Path]) -> None:
    found = compare(
        Variant(Weights(models[0])), {"same": Variant(Weights(models[0]))}, windows_of(4, 16)
    )["same"]
    assert (found.kl_mean, found.kl_p99, found.top1, found.tokens) == (0.0, 0.0, 1.0, 64)
    assert found.perplexity == found.reference_perplexity


def test_a_window_is_not_predicted_across_its_end(models: tuple[Path, Path]) -> None:
    """Each window alone, weighted, gives all of them together."""
    reference, noisy = (Variant(Weights(m)) for m in models)
    windows = windows_of(4, 12)
    together = compare(reference, {"m": noisy}, windows)["m"]
    alone = [compare(reference, {"m": noisy}, [w])["m"] for w in windows]
    for mean, values in (
        (math.log(together.perplexity), [math.log(d.perplexity) for d in alone]),
        (
            math.log(together.reference_perplexity),
            [math.log(d.reference_perplexity) for d in alone],
        ),
        (together.kl_mean, [d.kl_mean for d in alone]),
        (together.top1, [d.top1 for d in alone]),
    ):
        assert mean == pytest.approx(float(np.mean(values)), rel=1e-5)
    assert together.tokens == 48 and sum(d.tokens for d in alone) == 48


def test_batches_make_no_difference(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, noisy = (Variant(Weights(m)) for m in models)
    windows = windows_of(5, 16)
    whole = compare(reference, {"m": noisy}, windows)["m"]
    monkeypatch.setattr(divergence, "BATCH_TOKENS", 32)  # two windows at a time
    monkeypatch.setattr(distributions, "LOGIT_ELEMENTS", 7 * 320)  # seven positions, across windows
    parts = compare(reference, {"m": noisy}, windows)["m"]
    for name, value in whole.as_dict().items():
        assert parts.as_dict()[name] == pytest.approx(value, rel=1e-5), name


def test_hidden_states_in_files_give_the_same_bits(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a budget they lie in two files, and nowhere else; rows of logits go across windows."""
    reference, noisy = (Variant(Weights(m)) for m in models)
    windows, nbytes = windows_of(5, 16), 2 * 5 * 16 * 64 * 4
    monkeypatch.setattr(distributions, "LOGIT_ELEMENTS", 7 * 320)
    seen: set[str] = set()

    def measured(budget: int) -> dict[str, Divergence]:
        seen.clear()

        def look(share: float) -> None:
            seen.update(p.name for p in tmp_path.iterdir())

        room = Room(torch.device("cpu"), tmp_path, budget)
        found = compare(reference, {"a": noisy, "b": reference}, windows, room, look)
        assert not list(tmp_path.iterdir())
        return found

    held = measured(nbytes)
    assert not seen and held["a"].kl_mean > 0
    assert measured(nbytes - 1) == held
    assert seen == {".work-reference.bin", ".work-variant.bin"}


def test_several_variants_share_the_reference_and_report_every_layer(
    models: tuple[Path, Path],
) -> None:
    reference, noisy = (Variant(Weights(m)) for m in models)
    steps: list[float] = []
    found = compare(reference, {"a": noisy, "b": reference}, windows_of(2, 16), step=steps.append)
    assert list(found) == ["a", "b"] and found["b"].kl_mean == 0.0
    assert found["a"] == compare(reference, {"a": noisy}, windows_of(2, 16))["a"]
    assert sum(steps) == pytest.approx(3 * 2)  # three models of two layers


def test_hidden_states_are_transformers(models: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor(windows_of(3, 16))
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    before: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, given: before.append(given[0]))
    with torch.no_grad():
        model(tokens)
    found = Variant(Weights(models[0])).states(tokens, Room(torch.device("cpu")))
    torch.testing.assert_close(found.read(0, 3), before[0], rtol=1e-4, atol=1e-4)


def test_what_the_kv_cache_does_is_in_the_forward(models: tuple[Path, Path]) -> None:
    weights, windows = Weights(models[0]), windows_of(4, 16)
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {0: [], 1: []}

    def watch(index: int) -> ObserveKV:
        def observe(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen[index].append((k, v))
            return k, v

        return observe

    reference = Variant(weights)
    assert compare(reference, {"m": Variant(weights, watch)}, windows)["m"].kl_mean == 0.0
    extremes = {
        i: [torch.cat([pair[j] for pair in pairs]) for j in range(2)] for i, pairs in seen.items()
    }
    assert extremes[0][0].shape == (4, 2, 16, 16)
    divergences = []
    for bits in (8, 4, 2):

        def of_layer(index: int, bits: int = bits) -> dict[str, object]:
            return {
                n: kv_parameters(x.amin((0, 2)), x.amax((0, 2)), bits=bits)
                for n, x in zip(("key", "value"), extremes[index], strict=True)
            }

        divergences.append(
            compare(reference, {"m": Variant(weights, rounding(of_layer))}, windows)["m"].kl_mean
        )  # type: ignore[arg-type]
    assert 0 < 20 * divergences[0] < divergences[1] < divergences[2]
    # Zeroing V alone removes attention: as far as can be.
    gone = compare(
        reference,
        {"m": Variant(weights, lambda index: lambda k, v: (k, torch.zeros_like(v)))},
        windows,
    )["m"]
    assert gone.kl_mean > divergences[1]


def broken(found: Divergence) -> bool:
    return not math.isfinite(found.kl_mean) or not math.isfinite(found.perplexity)


def test_a_model_whose_logits_are_not_finite_is_not_called_good(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    reference = Variant(Weights(models[0]))
    head = TensorFile(models[0] / "model.safetensors").read("lm_head.weight")
    # Every weight is finite, but one logit overflows float32; and one hidden channel does, from the
    # first layer on.
    huge = head.clone()
    huge[7] = 3e38
    one = changed(models[0], tmp_path / "one", 0, **{"lm_head.weight": huge})
    down = torch.full((64, 96), 3e38)
    all_ = changed(models[0], tmp_path / "all", 0, **{"model.layers.0.mlp.down_proj.weight": down})
    windows = windows_of(2, 16)
    for folder in (one, all_):
        found = compare(reference, {"m": Variant(Weights(folder))}, windows)["m"]
        assert broken(found), found
        assert found.top1 <= 0.6
    # Not even against itself.
    itself = compare(Variant(Weights(all_)), {"m": Variant(Weights(all_))}, windows)["m"]
    assert broken(itself) and math.isnan(itself.kl_mean)
