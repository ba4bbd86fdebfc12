"""Layers of the transformers library as blocks: against our own decoder for families that have a
table, and against the whole model of the library for one that has none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from quantflow.calibration.statistics import Hessian
from quantflow.checkpoints.tensor_file import TensorFile
from quantflow.decoder.block import Block, Streams
from quantflow.decoder.decoder import open_decoder
from quantflow.decoder.hosted import HostedDecoder
from quantflow.decoder.native import NativeDecoder
from quantflow.decoder.stream import Stream
from quantflow.formats.reader import Weights
from quantflow.models.config import ConfigProblem
from quantflow.models.library import Library
from quantflow.models.segments import Fold
from tests.helpers.hosted import write_gemma3, write_other
from tests.helpers.zoo import INNER, decoder_logits, random_tokens, specimen, write

WINDOWS, LENGTH = 3, 20
CPU = torch.device("cpu")
BOTH = (
    "llama3", "llama_bias", "qwen2", "qwen3", "mixtral", "qwen3_moe", "olmo2", "granite", "phi3",
    "phi4_mini", "glm", "glm4", "gemma2", "gemma3",
)  # fmt: skip


class Pair:
    """One checkpoint behind both kinds of decoder."""

    def __init__(self, folder: Path) -> None:
        self.weights = Weights(folder)
        checkpoint = self.weights.checkpoint
        self.native = NativeDecoder(checkpoint.architecture, checkpoint.config, LENGTH)
        self.hosted = HostedDecoder(Library(checkpoint.raw_config))
        self.tokens = random_tokens(WINDOWS, LENGTH)
        self.outer = self.weights.outer()

    def blocks(self, index: int) -> tuple[Block, Block]:
        tensors = self.weights.layer(index)
        return (
            self.native.block(index, tensors, torch.float32),
            self.hosted.block(index, tensors, torch.float32),
        )


@pytest.fixture(params=BOTH)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return Pair(write(tmp_path, specimen(request.param)))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_table_and_the_library_have_the_same_tensors(pair: Pair) -> None:
    assert dict(pair.hosted.library.expected()) == pair.weights.checkpoint.expected
    assert set(pair.hosted.embeds + pair.hosted.heads) == set(pair.weights.checkpoint.outer_names())


def test_the_segments_of_the_table_are_found(pair: Pair) -> None:
    for index in range(pair.weights.checkpoint.config.layers):
        native, hosted = pair.blocks(index)
        assert hosted.segments == native.segments
        plain = [segment.linears for segment in pair.weights.checkpoint.segments(index)]
        assert [s.linears for s in pair.hosted.library.segments(index)] == plain


def test_both_compute_the_same(pair: Pair) -> None:
    """Embedding, K and V as they are cached, every linear's input and output, the layers, the
    head."""
    x = pair.native.embed(pair.outer, pair.tokens, torch.float32)
    assert torch.equal(pair.hosted.embed(pair.outer, pair.tokens, torch.float32), x)
    for index in range(pair.weights.checkpoint.config.layers):
        outputs, cached, seen = [], [], []
        for block in pair.blocks(index):
            taps: dict[str, tuple[Tensor, Tensor]] = {}
            block.tap = lambda name, a, b, taps=taps: taps.update({name: (a, b)})
            outputs.append(block.forward(x, keep(cached)))
            seen.append(taps)
        close(outputs[1], outputs[0])
        for found, expected in zip(cached[1], cached[0], strict=True):
            close(found, expected)
        chosen = {name for name in seen[0] if name.endswith(".gate")}  # a router is no linear there
        assert seen[0].keys() - chosen == seen[1].keys()
        for name in seen[1]:
            both = seen[0][name]
            for expected, found in zip(both, seen[1][name], strict=True):
                close(found.flatten(0, -2), expected.flatten(0, -2))
        x = outputs[0]
    close(pair.hosted.logits(pair.outer, x[0]), pair.native.logits(pair.outer, x[0]))


def keep(cached: list[tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def observe(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        cached.append((k, v))
        return k, v

    return observe


def test_what_an_observer_returns_is_what_attention_uses(pair: Pair) -> None:
    x = pair.native.embed(pair.outer, pair.tokens, torch.float32)
    native, hosted = pair.blocks(0)
    plain = native.forward(x)
    changed = native.forward(x, lambda k, v: (k, v.flip(-1)))
    assert not torch.allclose(plain, changed, atol=1e-2)
    close(hosted.forward(x, lambda k, v: (k, v.flip(-1))), changed)


def test_readings_and_parents_are_the_same(pair: Pair) -> None:
    x = pair.native.embed(pair.outer, pair.tokens, torch.float32)
    native, hosted = pair.blocks(pair.weights.checkpoint.config.layers - 1)
    for expected, found in zip(native.readings(x), hosted.readings(x), strict=True):
        assert found.segment == expected.segment
        close(found.rows.flatten(0, -2), expected.rows.flatten(0, -2))
        assert (found.parent is None) == (expected.parent is None)
        if expected.parent and found.parent:
            close(found.parent(found.source[:1]), expected.parent(expected.source[:1]))
            # the weights are those of the moment
            name = f"{expected.segment.names[0]}.weight"
            for block in (native, hosted):
                block.tensors[name] = block.tensors[name] * 1.5
            close(found.parent(found.source), expected.parent(expected.source))


def stream(x: Tensor) -> Stream:
    filled = Stream(tuple(x.shape), x.dtype, CPU, None)
    filled.write(0, x)
    return filled


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("feeds", [True, False])
def test_passages_see_the_same(pair: Pair, feeds: bool, everywhere: bool) -> None:
    """Hessians of every segment over weights that were replaced before it, K and V once, and the
    stream, unless nobody reads it."""
    x = pair.native.embed(pair.outer, pair.tokens, torch.float32)
    config = pair.weights.checkpoint.config
    index, hessians, cached, streams = config.layers - 1, [], [], []
    for block in pair.blocks(index):
        context = torch.zeros(WINDOWS, LENGTH, config.heads * config.head_dim)
        inner = torch.zeros(WINDOWS, LENGTH, config.hidden if config.experts else INNER)
        at = Streams(stream(x), stream(context), stream(inner))
        kv: list[tuple[Tensor, Tensor]] = []
        block.everywhere = everywhere
        passage, seen = block.passage(at, 2, keep(kv)), []
        for segment in pair.weights.checkpoint.segments(index):
            for _ in range(2):  # as often as one asks
                hessian = Hessian(segment.channels, CPU)
                for rows in passage.rows(segment):
                    hessian.add(rows)
                if everywhere:  # every expert sees all of them
                    assert hessian.rows == WINDOWS * LENGTH
                seen.append(hessian.matrix)
            for name in segment.names:
                key = f"{name}.weight"
                block.tensors[key] = (block.tensors[key] * 8).round() / 8
            passage.advance(segment, feeds=feeds)
        hessians.append(seen)
        cached.append(kv)
        streams.append(at.x.read(0, WINDOWS))
    for found, expected in zip(hessians[1], hessians[0], strict=True):
        close(found, expected)
    assert [k.shape[0] for k, _ in cached[0]] == [k.shape[0] for k, _ in cached[1]] == [2, 1]
    for expected, found in zip(cached[0], cached[1], strict=True):
        for one, other in zip(expected, found, strict=True):
            close(other, one)
    if feeds:
        close(streams[1], streams[0])


@pytest.fixture
def gemma3(tmp_path: Path) -> tuple[Path, HostedDecoder, dict[str, Tensor]]:
    folder = write_gemma3(tmp_path)
    values = transformers.AutoConfig.from_pretrained(folder).to_dict()
    file = TensorFile(folder / "model.safetensors")
    return folder, HostedDecoder(Library(values)), {n: file.read(n) for n in file.tensors}


def of_layer(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{index}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def test_layer_by_layer_is_the_whole_model(gemma3: Any) -> None:
    folder, decoder, tensors = gemma3
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = random_tokens(2, 24)
    with torch.inference_mode():
        expected = model(tokens).logits
        outer = {n: tensors[n] for n in decoder.embeds}
        x = decoder.embed(outer, tokens, torch.float32)
        for index in range(3):
            x = decoder.block(index, of_layer(tensors, index), torch.float32).forward(x)
        heads = {n: tensors[n] for n in decoder.heads}
        found = decoder.logits(heads, x.flatten(0, 1)).view_as(expected)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_the_folds_of_a_norm_that_adds_one(gemma3: Any) -> None:
    """Gemma's norms multiply by 1 + weight; the two that follow a block feed no linear."""
    _, decoder, tensors = gemma3
    for index in range(3):
        segments = decoder.block(index, of_layer(tensors, index), torch.float32).segments
        assert [segment.names for segment in segments] == [
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        ]
        assert [segment.fold for segment in segments] == [
            Fold(norm="input_layernorm", offset=1.0),
            Fold(linear="self_attn.v_proj", heads=(2, 16)),
            Fold(norm="pre_feedforward_layernorm", offset=1.0),
            Fold(linear="mlp.up_proj"),
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_something_else_reads_a_little_takes_no_scale(
    gemma3: Any, dtype: torch.dtype
) -> None:
    """A hundredth of the norm's output goes past the linears: less than bfloat16 would tell."""
    _, decoder, tensors = gemma3
    mlp = decoder.library.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) + 0.01 * x
    segments = decoder.block(1, of_layer(tensors, 1), dtype).segments
    assert [segment.fold for segment in segments] == [
        Fold(norm="input_layernorm", offset=1.0),
        Fold(linear="self_attn.v_proj", heads=(2, 16)),
        None,
        Fold(linear="mlp.up_proj"),
    ]


def test_a_norm_whose_other_reader_is_another_segment_takes_no_scale(gemma3: Any) -> None:
    """`gate` reads a copy of what `up` reads, and nothing of either gets through `down`."""
    _, decoder, tensors = gemma3
    mlp = decoder.library.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x.clone())) * mlp.up_proj(x))
    own = of_layer(tensors, 1)
    own["mlp.down_proj.weight"] = torch.zeros_like(own["mlp.down_proj.weight"])
    segments = decoder.block(1, own, torch.float32).segments
    folds = {segment.names: segment.fold for segment in segments}
    assert folds["mlp.gate_proj",] is None and folds["mlp.up_proj",] is None
    assert folds["mlp.down_proj",] == Fold(linear="mlp.up_proj")


def test_the_outer_models_buffers_are_where_the_tokens_are(gemma3: Any) -> None:
    """When its first pass begins, and those of the layers too."""
    _, decoder, tensors = gemma3
    library, seen = decoder.library, list[str]()

    def look(module: torch.nn.Module, args: object) -> None:
        buffers = [b for m in (module, *library.layers) for b in m.buffers()]
        seen.extend(buffer.device.type for buffer in buffers)
        raise InterruptedError  # the meta device cannot make masks

    library.model.register_forward_pre_hook(look)
    outer = {name: tensors[name].to("meta") for name in decoder.embeds}
    with pytest.raises(ConfigProblem, match="cannot be followed"):
        decoder.embed(outer, torch.zeros(1, 4, dtype=torch.long, device="meta"), torch.float32)
    assert seen and set(seen) == {"meta"}


ATTENTION, DENSE = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
OTHERS: dict[str, list[tuple[tuple[str, ...], str | None]]] = {
    # norms stand behind the linears: nothing could take a scale of what is read
    "olmo2": [
        (ATTENTION, None),
        (("o_proj",), "v_proj"),
        (DENSE, None),
        (("down_proj",), "up_proj"),
    ],
    # attention and MLP read one norm
    "cohere2": [
        ((*ATTENTION, *DENSE), "input_layernorm"),
        (("o_proj",), "v_proj"),
        (("down_proj",), "up_proj"),
    ],
    # gelu lets no scale through
    "starcoder2": [
        (ATTENTION, "input_layernorm"),
        (("o_proj",), "v_proj"),
        (("c_fc",), "post_attention_layernorm"),
        (("c_proj",), None),
    ],
    # q, k and v are one linear, whose rows are not all values
    "phi3": [
        (("qkv_proj",), "input_layernorm"),
        (("o_proj",), None),
        (("gate_up_proj",), "post_attention_layernorm"),
        (("down_proj",), None),
    ],
}


@pytest.mark.parametrize("model_type", sorted(OTHERS))
def test_other_families_are_found_or_left_alone(model_type: str, tmp_path: Path) -> None:
    folder = write_other(tmp_path, model_type)
    weights, tokens = Weights(folder), random_tokens(2, 20)
    assert weights.checkpoint.problems() == []
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = model(tokens).logits
    torch.testing.assert_close(decoder_logits(weights, tokens), expected, rtol=0, atol=2e-5)
    decoder = open_decoder(weights.checkpoint, 20, "cpu")
    segments = decoder.block(0, weights.layer(0), torch.float32).segments
    leaves = [
        (
            tuple(name.rpartition(".")[2] for name in segment.names),
            (
                (fold.norm or fold.linear or "").rpartition(".")[2]
                if (fold := segment.fold)
                else None
            ),
        )
        for segment in segments
    ]
    assert leaves == OTHERS[model_type]


def test_a_hosted_block_can_be_differentiated(gemma3: Any) -> None:
    """Against a difference quotient of the output, along the gradient."""
    _, decoder, tensors = gemma3
    block = decoder.block(1, of_layer(tensors, 1), torch.float32)
    x = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))
    name = "self_attn.v_proj.weight"
    weight = block.tensors[name].clone().requires_grad_()
    block.tensors[name] = weight
    block.forward(x).square().sum().backward()
    assert weight.grad is not None
    direction = weight.grad / weight.grad.norm()

    def loss(step: float) -> float:
        block.tensors[name] = weight.detach() + step * direction
        return float(block.forward(x).double().square().sum())

    quotient = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert quotient == pytest.approx(float(weight.grad.norm()), rel=1e-2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "jetmoe", "num_key_value_heads": 4}, "cannot be followed here"),
        ({"model_type": "gpt2"}, "transposed"),
        ({"model_type": "gemma3_text", "hidden_size": "many"}, "gemma3_text refuses it"),
        ({"model_type": "gemma3_text", "num_hidden_layers": 10**9}, "at most 10000"),
        ({"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}}, "at most 10000"),
        ({"model_type": "chameleon"}, "does not say which part is one"),
        ({"model_type": "florence2"}, "an encoder and a decoder"),
    ],
)
def test_what_is_not_looked_after_is_refused(values: dict[str, Any], said: str) -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    small["num_attention_heads"] = 4
    with pytest.raises(ConfigProblem, match=said):
        Library({**small, **values}).segments(0)


CODE = {
    "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
    "_attn_implementation": "kernels-community/evil",
    "attn_implementation": "kernels-community/evil",
    "experts_implementation": "kernels-community/evil",
    "use_kernels": True,
    "trust_remote_code": True,
}


@pytest.mark.parametrize("inside", [False, True])
def test_keys_that_name_code_change_nothing(inside: bool) -> None:
    """A model directory chooses neither code nor kernels, nor does a config within its config."""
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    values = {**small, **CODE, "model_type": "gemma3_text"}
    if inside:
        parts = {"text_config": values, "vision_config": {"num_hidden_layers": 1, **CODE}}
        values = {"model_type": "gemma3", **parts}
    library = Library(values)
    assert library.name == f"Gemma3For{'ConditionalGeneration' if inside else 'CausalLM'}"
    if inside:
        vision = library.model.config.vision_config
        assert vision._attn_implementation in ("sdpa", "eager") and not hasattr(vision, "auto_map")
    assert library.config._attn_implementation == "sdpa"
    assert not hasattr(library.config, "auto_map")
