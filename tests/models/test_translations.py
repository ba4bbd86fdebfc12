"""Model types that are read as another family, against their own definitions in float64: written
down here from what their makers' code computes, over the tensors under their own names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.engine.llm import LLM
from quantflow.engine.request import SamplingParams
from quantflow.errors import ModelError
from quantflow.formats.reader import Weights
from quantflow.models.registry import TRANSLATIONS
from tests.helpers.library import write_tiny
from tests.helpers.runs import invoke
from tests.helpers.zoo import Specimen, Tensors, decoder_logits, random_tokens, write

HIDDEN, INNER, HEADS, KV, D, LAYERS, VOCABULARY = 64, 96, 4, 2, 16, 2, 320


@dataclass(frozen=True)
class Layer:
    """One layer's weights and biases in float64, apart from each other."""

    weights: dict[str, Tensor]
    biases: dict[str, Tensor] = field(default_factory=dict)

    def linear(self, name: str, x: Tensor) -> Tensor:
        result = x @ self.weights[name].double().T
        return result + self.biases[name].double() if name in self.biases else result


@dataclass(frozen=True)
class Definition:
    """What a family computes. rotary: (q or k `[B, L, heads, D]`, positions) -> turned."""

    layers: list[Layer]
    embedding: Tensor
    head: Tensor
    final: tuple[Tensor, ...]
    rotary: Callable[[Tensor, Tensor], Tensor]
    kv: int = KV
    eps: float = 1e-5
    layer_norm: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0

    def norm(self, x: Tensor, *parts: Tensor) -> Tensor:
        if self.layer_norm:
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * parts[0].double()
        return x + parts[1].double() if self.layer_norm else x

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embedding.double()[tokens] * self.embedding_scale
        for layer in self.layers:
            norms = [
                [
                    part
                    for name in (norm, f"{norm}_bias")
                    if (part := layer.weights.get(name)) is not None
                ]
                for norm in ("norm1", "norm2")
            ]
            x = x + self.residual_scale * self.attention(layer, self.norm(x, *norms[0]))
            y = self.norm(x, *norms[1])
            gate = layer.linear("gate", y)
            inner = gate / (1 + (-gate).exp()) * layer.linear("up", y)
            x = x + self.residual_scale * layer.linear("down", inner)
        return self.norm(x, *self.final) @ self.head.double().T * self.logits_scale

    def attention(self, layer: Layer, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        positions = torch.arange(length).double()
        q = self.rotary(layer.linear("q", x).view(batch, length, HEADS, D), positions)
        k = self.rotary(layer.linear("k", x).view(batch, length, self.kv, D), positions)
        v = layer.linear("v", x).view(batch, length, self.kv, D)
        heads = []
        for h in range(HEADS):
            of = h * self.kv // HEADS
            scores = q[:, :, h] @ k[:, :, of].transpose(1, 2) / math.sqrt(D)
            ahead = torch.ones(length, length).triu(1).bool()
            heads.append(scores.masked_fill(ahead, -math.inf).softmax(-1) @ v[:, :, of])
        return layer.linear("o", torch.cat(heads, -1))


def halves(theta: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Channel i turns with channel i + D/2."""

    def turn(x: Tensor, positions: Tensor) -> Tensor:
        result = x.clone()
        for i in range(D // 2):
            angle = (positions * theta ** (-2 * i / D))[None, :, None]
            a, b = x[..., i], x[..., i + D // 2]
            result[..., i] = a * angle.cos() - b * angle.sin()
            result[..., i + D // 2] = b * angle.cos() + a * angle.sin()
        return result

    return turn


def pairs_of_first_half(theta: float, stretch: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Of the first half of a head, channel 2i turns with channel 2i + 1; the rest stays."""

    def turn(x: Tensor, positions: Tensor) -> Tensor:
        result = x.clone()
        for i in range(D // 4):
            angle = (positions / stretch * theta ** (-2 * i / (D // 2)))[None, :, None]
            a, b = x[..., 2 * i], x[..., 2 * i + 1]
            result[..., 2 * i] = a * angle.cos() - b * angle.sin()
            result[..., 2 * i + 1] = b * angle.cos() + a * angle.sin()
        return result

    return turn


class Random:
    """Float32 tensors of one generator."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(7)

    def __call__(self, *shape: int, scale: float = 0.15) -> Tensor:
        return torch.randn(shape, generator=self._generator) * scale

    def norm(self) -> Tensor:
        return torch.randn(HIDDEN, generator=self._generator).mul(0.4).exp()

    def layer(self, p: str, kv: int = KV) -> Iterator[tuple[str, Tensor]]:
        """A layer as Llama names it."""
        yield f"{p}.input_layernorm.weight", self.norm()
        yield f"{p}.post_attention_layernorm.weight", self.norm()
        for name, rows in (("q", HEADS), ("k", kv), ("v", kv), ("o", HEADS)):
            yield f"{p}.self_attn.{name}_proj.weight", self(rows * D, HIDDEN)
        for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN))):
            yield f"{p}.mlp.{name}_proj.weight", self(*shape)
        yield f"{p}.mlp.down_proj.weight", self(HIDDEN, INNER)

    def llama(self, *, kv: int = KV, head: bool = True) -> Tensors:
        tensors = {"model.embed_tokens.weight": self(VOCABULARY, HIDDEN, scale=0.5)}
        tensors |= {"model.norm.weight": self.norm()}
        if head:
            tensors["lm_head.weight"] = self(VOCABULARY, HIDDEN)
        for i in range(LAYERS):
            tensors |= dict(self.layer(f"model.layers.{i}", kv))
        return tensors


_LLAMA_PARTS = {
    "norm1": "input_layernorm.weight", "norm2": "post_attention_layernorm.weight",
    "norm1_bias": "input_layernorm.bias", "norm2_bias": "post_attention_layernorm.bias",
    "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight", "o": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight",
}  # fmt: skip


def llama_layers(tensors: Tensors) -> list[Layer]:
    return [
        Layer(
            {
                part: tensors[f"model.layers.{i}.{name}"]
                for part, name in _LLAMA_PARTS.items()
                if f"model.layers.{i}.{name}" in tensors
            }
        )
        for i in range(LAYERS)
    ]


def llama_definition(tensors: Tensors, **changes: Any) -> Definition:
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    final = [tensors[n] for n in ("model.norm.weight", "model.norm.bias") if n in tensors]
    return Definition(
        **{
            "layers": llama_layers(tensors),
            "embedding": tensors["model.embed_tokens.weight"],
            "head": head,
            "final": tuple(final),
            "rotary": halves(10000.0),
            **changes,
        }
    )


def llama_config(model_type: str, architecture: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "auto_map": {"AutoModelForCausalLM": f"modeling_{model_type}.{architecture}"},
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
        **changes,
    }


@dataclass(frozen=True)
class Case:
    """kind: the class of transformers that the artifact is written for. linears: how many are
    quantised."""

    specimen: Specimen
    definition: Definition
    kind: str
    linears: int = LAYERS * 7


def baichuan(first: bool) -> Case:
    random = Random()
    tensors = random.llama(kv=HEADS)
    definition = llama_definition(tensors, kv=HEADS, eps=1e-6)
    if not first:
        head = tensors["lm_head.weight"].double()
        lengths = head.square().sum(-1, keepdim=True).sqrt()
        definition = llama_definition(tensors, kv=HEADS, eps=1e-6, head=head / lengths)
    stored = {
        n: t for n, t in tensors.items() if not n.endswith(tuple(f"{c}_proj.weight" for c in "qkv"))
    }
    for i in range(LAYERS):
        parts = [tensors[f"model.layers.{i}.self_attn.{c}_proj.weight"] for c in "qkv"]
        stored[f"model.layers.{i}.self_attn.W_pack.weight"] = torch.cat(parts)
    own = {} if first else {"z_loss_weight": 0, "model_max_length": 128}
    name = "BaiChuanForCausalLM" if first else "BaichuanForCausalLM"
    config = llama_config("baichuan", name, rms_norm_eps=1e-6, **own)
    del config["num_key_value_heads"]
    return Case(Specimen(config, stored), definition, "LlamaForCausalLM")


def chatglm(theta: float = 10000.0, stretch: float = 1.0, **changes: Any) -> Case:
    random = Random()
    stored: Tensors = {
        "transformer.embedding.word_embeddings.weight": random(VOCABULARY, HIDDEN, scale=0.5),
        "transformer.rotary_pos_emb.inv_freq": torch.rand(D // 4),
        "transformer.encoder.final_layernorm.weight": random.norm(),
        "transformer.output_layer.weight": random(VOCABULARY, HIDDEN),
    }
    layers = []
    for i in range(LAYERS):
        p = f"transformer.encoder.layers.{i}"
        qkv, bias = random((HEADS + 2 * KV) * D, HIDDEN), random((HEADS + 2 * KV) * D)
        inner = random(2 * INNER, HIDDEN)
        own = {"o": random(HIDDEN, HIDDEN), "down": random(HIDDEN, INNER)}
        norms = {"norm1": random.norm(), "norm2": random.norm()}
        stored |= {
            f"{p}.self_attention.query_key_value.weight": qkv,
            f"{p}.self_attention.query_key_value.bias": bias,
            f"{p}.self_attention.dense.weight": own["o"],
            f"{p}.mlp.dense_h_to_4h.weight": inner,
            f"{p}.mlp.dense_4h_to_h.weight": own["down"],
            f"{p}.input_layernorm.weight": norms["norm1"],
            f"{p}.post_attention_layernorm.weight": norms["norm2"],
        }
        at = (HEADS * D, (HEADS + KV) * D)
        weights = {"q": qkv[: at[0]], "k": qkv[at[0] : at[1]], "v": qkv[at[1] :]}
        biases = {"q": bias[: at[0]], "k": bias[at[0] : at[1]], "v": bias[at[1] :]}
        weights |= {"gate": inner[:INNER], "up": inner[INNER:], **own, **norms}
        layers.append(Layer(weights, biases))
    config = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration"},
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True,
        "ffn_hidden_size": INNER,
        "fp32_residual_connection": False,
        "hidden_size": HIDDEN,
        "kv_channels": D,
        "layernorm_epsilon": 1e-5,
        "multi_query_attention": True,
        "multi_query_group_num": KV,
        "num_attention_heads": HEADS,
        "num_layers": LAYERS,
        "original_rope": True,
        "padded_vocab_size": VOCABULARY,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": 128,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        **changes,
    }
    definition = Definition(
        layers,
        stored["transformer.embedding.word_embeddings.weight"],
        stored["transformer.output_layer.weight"],
        (stored["transformer.encoder.final_layernorm.weight"],),
        pairs_of_first_half(theta, stretch),
    )
    # gate and up are one linear in GLM's class
    return Case(Specimen(config, stored), definition, "GlmForCausalLM", LAYERS * 6)


def exaone() -> Case:
    tensors = Random().llama()
    names = {
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "model.layers": "transformer.h",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.attention.out_proj",
        "self_attn": "attn.attention",
        "gate_proj": "c_fc_0",
        "up_proj": "c_fc_1",
        "down_proj": "c_proj",
    }
    stored = {}
    for name, tensor in tensors.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        stored[name] = tensor
    config = llama_config("exaone", "ExaoneForCausalLM", rope_theta=500000.0)
    for ours, theirs in (
        ("num_hidden_layers", "num_layers"),
        ("rms_norm_eps", "layer_norm_epsilon"),
        ("hidden_act", "activation_function"),
    ):
        config[theirs] = config.pop(ours)
    definition = llama_definition(tensors, rotary=halves(500000.0))
    return Case(Specimen(config, stored), definition, "LlamaForCausalLM")


def minicpm() -> Case:
    tensors = Random().llama(head=False)
    config = llama_config(
        "minicpm", "MiniCPMForCausalLM", scale_emb=12, scale_depth=1.4, dim_model_base=16
    )
    del config["tie_word_embeddings"]
    definition = llama_definition(
        tensors,
        embedding_scale=12.0,
        residual_scale=1.4 / math.sqrt(LAYERS),
        logits_scale=16 / HIDDEN,
    )
    return Case(Specimen(config, tensors), definition, "GraniteForCausalLM")


def orion() -> Case:
    random = Random()
    tensors = random.llama()
    norms = ["model.norm"]
    for i in range(LAYERS):
        norms += [f"model.layers.{i}.{n}_layernorm" for n in ("input", "post_attention")]
    tensors |= {f"{norm}.bias": random(HIDDEN) for norm in norms}
    config = llama_config("orion", "OrionForCausalLM", attention_bias=False, pretraining_tp=1)
    definition = llama_definition(tensors, layer_norm=True)
    return Case(Specimen(config, tensors), definition, "StableLmForCausalLM")


def yi() -> Case:
    tensors = Random().llama()
    short = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    stored = {}
    for name, tensor in tensors.items():
        for ours, theirs in short.items():
            name = name.replace(ours, theirs)
        stored[name] = tensor
    config = llama_config("Yi", "YiForCausalLM", rope_theta=5000000.0)
    definition = llama_definition(tensors, rotary=halves(5000000.0))
    return Case(Specimen(config, stored), definition, "LlamaForCausalLM")


def plain(model_type: str, architecture: str) -> Case:
    tensors = Random().llama()
    config = llama_config(model_type, architecture)
    return Case(Specimen(config, tensors), llama_definition(tensors), "LlamaForCausalLM")


CASES: dict[str, Callable[[], Case]] = {
    "baichuan": lambda: baichuan(first=True),
    "baichuan2": lambda: baichuan(first=False),
    "chatglm2": chatglm,
    "chatglm2-32k": lambda: chatglm(
        stretch=4.0, rope_ratio=4, _name_or_path="THUDM/chatglm2-6b-32k"
    ),
    "chatglm3-32k": lambda: chatglm(
        50 * 10000.0, rope_ratio=50, _name_or_path="THUDM/chatglm3-6b-32k"
    ),
    "exaone": exaone,
    "minicpm": minicpm,
    "orion": orion,
    "Yi": yi,
    "aquila": lambda: plain("aquila", "AquilaForCausalLM"),
    "xverse": lambda: plain("xverse", "XverseForCausalLM"),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_its_makers_define(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    weights = Weights(write(tmp_path, case.specimen))
    assert weights.checkpoint.problems() == []
    tokens = random_tokens(2, 24)
    expected = case.definition.logits(tokens)
    assert 0.2 < expected.std() < 50
    result = decoder_logits(weights, tokens)
    torch.testing.assert_close(
        result.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max())
    )


@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_what_is_written_without_remote_code(name: str, tmp_path: Path) -> None:
    """Eight bits in groups of 32, dequantised: near the definition, and what the class computes is
    what the weights say."""
    case = CASES[name]()
    model = write(tmp_path / "model", case.specimen)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\nweights: {bits: 8, group_size: 32}\nstages: [rtn, pack: {format: huggingface}]\n"
    )
    output = tmp_path / "out"
    result = invoke("run", recipe, "--model", model, "--output", output, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    report = json.loads((output / "report.json").read_text())
    assert len(report["linears"]) == case.linears
    assert any("no remote code" in note for note in report["notes"])
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        output, dtype=torch.float32, output_loading_info=True
    )
    assert type(loaded).__name__ == case.kind
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = random_tokens(2, 24)
    with torch.inference_mode():
        theirs = loaded.eval()(tokens).logits
    torch.testing.assert_close(theirs, decoder_logits(Weights(output), tokens), rtol=0, atol=1e-4)
    expected = case.definition.logits(tokens)
    assert float((theirs - expected).norm() / expected.norm()) < 0.05


def test_kimi_is_read_as_deepseek(tmp_path: Path) -> None:
    """DeepSeek-V3's weights, in a directory that says kimi_k2 and names code: what transformers
    computes of the one is what is computed of the other."""
    deepseek, kimi = (write_tiny(tmp_path / n, "deepseek_v3") for n in ("deepseek", "kimi"))
    config = json.loads((kimi / "config.json").read_text())
    config["model_type"] = "kimi_k2"
    config |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    (kimi / "config.json").write_text(json.dumps(config))
    weights = Weights(kimi)
    assert weights.checkpoint.problems() == []
    assert any("written as DeepSeek-V3" in note for note in weights.checkpoint.notes)
    written = weights.checkpoint.architecture.native_config(weights.checkpoint.raw_config)
    assert written["model_type"] == "deepseek_v3" and "auto_map" not in written

    theirs = transformers.AutoModelForCausalLM.from_pretrained(deepseek, dtype=torch.float32)
    tokens = random_tokens(2, 16)
    with torch.inference_mode():
        expected = theirs.eval()(tokens).logits
    torch.testing.assert_close(decoder_logits(weights, tokens), expected, rtol=0, atol=1e-5)

    config["scoring_func"] = "softmax"
    (kimi / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="scoring_func is 'softmax'"):
        Checkpoint(kimi)


# Those whose family has a table; GLM's has no stretched positions.
ENGINE = [name for name in CASES if name not in ("orion", "chatglm2-32k")]


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_says_what_its_makers_define(name: str, tmp_path: Path) -> None:
    """Sixteen greedy tokens: each the likeliest by the definition, within float32's rounding."""
    case = CASES[name]()
    llm = LLM(write(tmp_path, case.specimen), device="cpu", dtype="float32", block_size=16)
    prompt = random_tokens(1, 10)[0].tolist()
    sampling = SamplingParams(max_tokens=16, ignore_eos=True)
    tokens = list(llm.generate(prompt, sampling)[0].completions[0].token_ids)
    logits = case.definition.logits(torch.tensor([[*prompt, *tokens[:-1]]]))[0, len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float((logits.max(-1).values - chosen).max()) < 1e-4 * float(logits.abs().max())


def test_stablelms_first_config_is_read(tmp_path: Path) -> None:
    config = llama_config(
        "stablelm_epoch", "StableLMEpochForCausalLM", rope_pct=0.25, norm_eps=1e-5
    )
    del config["rms_norm_eps"]
    built = transformers.AutoConfig.for_model(**TRANSLATIONS["stablelm_epoch"].config(config))
    assert isinstance(built, transformers.StableLmConfig)
    assert built.layer_norm_eps == 1e-5
    assert built.rope_parameters["partial_rotary_factor"] == 0.25


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("baichuan2", {"max_position_embeddings": None}, "ALiBi"),
        ("baichuan", {"hidden_size": 5120}, "ALiBi"),
        ("baichuan2", {"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ("chatglm2", {"position_encoding_2d": True}, "the first ChatGLM-6B"),
        ("chatglm2", {"rmsnorm": False}, "rmsnorm is False"),
        ("chatglm2", {"add_bias_linear": True}, "add_bias_linear is True"),
        ("chatglm2", {"vision_config": {}}, "GLM-4V"),
        ("chatglm2", {"rope_ratio": 8}, "chatglm2 or chatglm3"),
        ("minicpm", {"num_experts": 8}, "num_experts"),
        ("minicpm", {"hidden_act": "fatrelu"}, "'fatrelu'"),
    ],
)
def test_what_the_family_does_not_compute_is_refused_by_name(
    name: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    found = CASES[name]().specimen
    with pytest.raises(ModelError) as caught:
        Checkpoint(write(tmp_path, Specimen({**found.config, **changes}, found.tensors)))
    (problem,) = caught.value.problems
    assert problem.where.endswith("config.json") and named in problem.found


def test_internlm3_with_biases_that_llama_has_no_flag_for(tmp_path: Path) -> None:
    found = plain("internlm3", "InternLM3ForCausalLM").specimen
    with pytest.raises(ModelError, match="qkv_bias is True and bias False"):
        Checkpoint(write(tmp_path, Specimen({**found.config, "qkv_bias": True}, found.tensors)))


def test_the_page_has_every_translation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "supported.md").read_text()
    assert all(f"`{model_type}`" in page for model_type in TRANSLATIONS)


def test_every_translation_has_a_test() -> None:
    there = {make().specimen.config["model_type"] for make in CASES.values()}
    elsewhere = {"internlm", "internlm2", "internlm3", "kimi_k2", "stablelm_epoch"}
    assert there | elsewhere == set(TRANSLATIONS)
