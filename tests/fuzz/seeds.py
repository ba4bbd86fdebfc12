"""Valid inputs of every target to begin from, made by code: small models and texts, as the product
and other software write them."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import lzma
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import torch
import yaml
from safetensors.torch import save
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from quantflow.formats import FORMATS
from quantflow.formats.base import ConfigRequest
from quantflow.models.expected import expected_tensors
from quantflow.models.registry import ARCHITECTURES
from quantflow.models.segments import segments
from quantflow.quant.numbers.nf4 import Nf4Tensor
from quantflow.quant.scheme import Scheme
from quantflow.tokenizers.byte_level import QWEN_PATTERN, byte_characters
from tests.formats.helpers import random_tensor
from tests.fuzz.mutation import joined
from tests.helpers.tiny import SENTENCES
from tests.helpers.zoo import ZOO, specimen

ROOT = Path(__file__).parents[2]
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 32, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": True,
    "torch_dtype": "float16",
}  # fmt: skip
ROLES = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

Tensors = dict[str, torch.Tensor]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _plain() -> Tensors:
    """The tensors of LLAMA."""
    architecture = ARCHITECTURES["llama"]
    generator = torch.Generator().manual_seed(3)
    shapes = expected_tensors(architecture, architecture.read_config(LLAMA))
    return {name: torch.randn(shape, generator=generator).mul(0.1).half() for name, shape in shapes}


def _packed(name: str, scheme: Scheme) -> tuple[Tensors, dict[str, Any]]:
    """LLAMA with its linears in a format, and the `quantization_config`."""
    tensors, form, architecture = _plain(), FORMATS[name], ARCHITECTURES["llama"]
    modules = {}
    specs = [
        spec
        for segment in segments(architecture, architecture.read_config(LLAMA), 0)
        for spec in segment.linears
    ]
    for linear, (n, k) in ((spec.name, spec.shape) for spec in specs):
        module = f"model.layers.0.{linear}"
        tensor: Any = (
            random_tensor(n, k, scheme, smallest_zero=1) if scheme.kind == "integer" else None
        )
        if tensor is None:
            tensor = Nf4Tensor(
                scheme,
                torch.randint(0, 16, (n, k), dtype=torch.uint8),
                torch.rand(n, k // scheme.group_size),
            )
        del tensors[f"{module}.weight"]
        tensors |= form.encode(module, tensor, torch.float16)
        modules[module] = scheme
    return tensors, form.quantization_config(
        ConfigRequest(modules, ["lm_head"], scheme, model_dtype="float16")
    )


SCHEMES = {
    "compressed-tensors": Scheme(4, 32, False),
    "awq": Scheme(4, 32, False),
    "gptq": Scheme(4, 32, True),
    "gptq_v2": Scheme(8, -1, False),
    "bitsandbytes": Scheme(4, 64, True, "nf4"),
}


def _safetensors() -> list[bytes]:
    dtypes = (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.int16, torch.int8, torch.uint8, torch.bool,
    )  # fmt: skip
    mixed = {f"t{i}": torch.ones((2, i), dtype=dtype) for i, dtype in enumerate(dtypes)}
    return [
        save(mixed, {"format": "pt"}),
        save({"scalar": torch.tensor(1.0), "a": torch.zeros(4)}),
        save({}),
    ]


def _directory() -> list[bytes]:
    plain = _plain()
    names = sorted(plain)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    weight_map = {name: file for file, inside in halves.items() for name in inside}
    files = {
        file: save({n: plain[n] for n in inside}, {"format": "pt"})
        for file, inside in halves.items()
    }
    index = _json({"metadata": {"total_size": 1}, "weight_map": weight_map})
    found = [{"config.json": _json(LLAMA), "model.safetensors.index.json": index, **files}]
    for name, scheme in SCHEMES.items():
        tensors, config = _packed(name, scheme)
        found.append(
            {
                "config.json": _json({**LLAMA, "quantization_config": config}),
                "a.safetensors": save(tensors),
            }
        )
    tensors, config = _packed("gptq", SCHEMES["gptq"])
    found.append(
        {
            "config.json": _json(LLAMA),
            "quantize_config.json": _json(config),
            "a.safetensors": save(tensors),
        }
    )
    # recognised by its tensors
    found.append({"config.json": _json(LLAMA), "a.safetensors": save(tensors)})
    return [joined(files) for files in found]


def _config() -> list[bytes]:
    found = [{"config.json": _json(specimen(name).config)} for name in ZOO]
    for scaling in (
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
        },
    ):
        found.append({"config.json": _json({**LLAMA, "rope_scaling": scaling})})
    for name, scheme in SCHEMES.items():
        form = FORMATS[name]
        modules = {
            f"model.layers.{i}.{part}": scheme
            for i in range(2)
            for part in ("self_attn.q_proj", "mlp.down_proj")
        }
        said = form.quantization_config(
            ConfigRequest(modules, ["lm_head"], scheme, model_dtype="float16")
        )
        found.append({"config.json": _json({**LLAMA, "quantization_config": said})})
        if name == "gptq":
            said = {
                **said,
                "dynamic": {r"-:.*down_proj": {}, r"+:model\.layers\.0\..*": {"bits": 8}},
            }
            found.append({"config.json": _json({**LLAMA, "quantization_config": said})})
            found.append({"config.json": _json(LLAMA), "quantize_config.json": _json(said)})
    found.append(
        {
            "config.json": _json(LLAMA),
            "quant_config.json": _json({"w_bit": 4, "q_group_size": 32, "version": "GEMM"}),
        }
    )
    return [joined(files) for files in found]


# --- tokenizers


def _byte_level(pattern: str | None = None, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=275,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES[:32], trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<|extra|>", normalized=True, lstrip=True)])
    return tokenizer


def _small(
    model: Any, *, normalizer: Any = None, split: Any = None, decoder: Any = None
) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if split is not None:
        tokenizer.pre_tokenizer = split
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def _tokenizers() -> list[Tokenizer]:
    names = {
        name: i
        for i, name in enumerate(
            ("<unk>", "<s>", "</s>", *"▁aberThiv", "▁a", "er", "##er", "The", "<0x41>")
        )
    }
    spaces = normalizers.Sequence(
        [
            normalizers.Prepend("▁"),
            normalizers.Replace(" ", "▁"),
            normalizers.NFKC(),
            normalizers.Lowercase(),
        ]
    )
    undo = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bpe = models.BPE(
        names, [("▁", "a"), ("e", "r")], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    unigram = models.Unigram([(name, -float(i)) for name, i in names.items()], 0, True)
    pieces = models.WordPiece(names, unk_token="<unk>", max_input_chars_per_word=100)
    punctuation = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(True)]
    )
    return [
        _byte_level(),
        _byte_level(QWEN_PATTERN, ignore_merges=True),
        _small(bpe, normalizer=spaces, decoder=undo),
        _small(unigram, split=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace()),
        _small(
            pieces,
            normalizer=normalizers.BertNormalizer(),
            split=pre_tokenizers.BertPreTokenizer(),
            decoder=decoders.WordPiece(),
        ),
        _small(models.WordLevel(names, "<unk>"), split=punctuation),
    ]


def _beside() -> list[dict[str, bytes]]:
    """Sets of the other files of a tokenizer."""
    placed = {
        "275": {"content": "<|im_start|>", "special": True, "normalized": False},
        "300": {"content": "<pad>", "special": True},
    }
    return [
        {
            "tokenizer_config.json": _json(
                {"tokenizer_class": "PreTrainedTokenizerFast", **ROLES, "chat_template": CHAT}
            )
        },
        {
            "tokenizer_config.json": _json(
                {
                    **ROLES,
                    "add_bos_token": True,
                    "add_eos_token": True,
                    "added_tokens_decoder": placed,
                    "auto_map": {"AutoTokenizer": ["a.B", None]},
                    "extra_special_tokens": ["<e>"],
                }
            ),
            "generation_config.json": _json({"eos_token_id": [1, 2], "chat_format": "chatml"}),
            "config.json": _json(
                {"model_type": "qwen", "vocab_size": 600, "eos_token_id": 1, "pad_token_id": 0}
            ),
        },
        {
            "special_tokens_map.json": _json(
                {
                    **ROLES,
                    "unk_token": {"content": "<unk>"},
                    "additional_special_tokens": ["<a>", "<b>"],
                }
            ),
            "added_tokens.json": _json({"<pad>": 290, "<sep>": 291}),
            "tokenizer_config.json": _json(
                {
                    "chat_template": [
                        {"name": name, "template": CHAT} for name in ("default", "tool_use")
                    ]
                }
            ),
            "chat_template.json": _json({"chat_template": CHAT}),
            "config.json": _json(
                {"model_type": "internlm2", "vocab_size": 400, "bos_token_id": [1]}
            ),
        },
    ]


def _tokenizer() -> list[bytes]:
    beside = _beside()
    return [
        joined({"tokenizer.json": tokenizer.to_str().encode(), **beside[i % len(beside)]})
        for i, tokenizer in enumerate(_tokenizers())
    ]


def _vocabulary() -> list[bytes]:
    state = json.loads(_byte_level().to_str())["model"]
    merges = "#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in state["merges"])
    found = [
        {"vocab.json": _json(state["vocab"]), "merges.txt": merges.encode(), **files}
        for files in _beside()
    ]
    found.append({**found[0], "config.json": _json({"model_type": "opt", "vocab_size": 400})})
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"in", b"ing"]
    tiktoken = b"".join(
        base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)
    )
    found += [
        {"qwen.tiktoken": tiktoken, **files, "generation_config.json": _json({"eos_token_id": 261})}
        for files in _beside()[:2]
    ]
    found += [{"tokenizer.model": _handmade(), **files} for files in _beside()[1:]]
    return [joined(files) for files in found]


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _piece(text: str, kind: int = 1, score: float = 0.0) -> bytes:
    return _field(
        1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
    )


def _handmade(
    kind: int = 2, *, fallback: bool = False, charsmap: bytes = b"", symbols: tuple[str, ...] = ()
) -> bytes:
    """A tokenizer.model. kind: 1 for unigram, 2 for BPE."""
    names = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((text, 4) for text in symbols)]
    names += [(f"<0x{byte:02X}>", 6) for byte in range(256)] if fallback else []
    names += [(text, 1) for text in ("▁", *"Therivcd", "▁r", "er", "▁ri", "ver", "▁river")]
    trainer = (
        b"\x18"
        + _varint(kind)
        + (_varint(35 << 3) + b"\x01" if fallback else b"")
        + _varint(41 << 3)
        + b"\x01"
    )
    normalizer = (
        (_field(2, charsmap) if charsmap else b"") + b"\x18\x01\x20" + bytes([bool(symbols)])
    )
    return (
        b"".join(_piece(text, of, -float(i)) for i, (text, of) in enumerate(names))
        + _field(2, trainer)
        + _field(3, normalizer)
    )


def _charsmap() -> bytes:
    """A character map as SentencePiece has one, with one rule: A becomes b. A trie in a double
    array, and the texts it points to."""
    units = [0] * 512
    # darts: bit 8 says that a leaf hangs below, bits 10 on are the offset; a unit's low byte is its
    # letter.
    units[0] = 256 << 10
    at = (0 ^ 256) ^ ord("A")
    units[at] = ord("A") | 1 << 8 | 64 << 10
    units[at ^ 64] = 1 << 31 | 0
    trie = struct.pack("<512I", *units)
    return struct.pack("<I", len(trie)) + trie + b"b\0"


def _sentencepiece() -> list[bytes]:
    return [
        _handmade(),
        _handmade(1),
        _handmade(fallback=True),
        _handmade(1, fallback=True, symbols=("<eoh>", "<b>")),
        _handmade(symbols=("<eoh>",)),
        _handmade(1, charsmap=_charsmap()),
    ]


# --- GGUF


def _gguf_file(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Any, Any]]
) -> bytes:
    """As the `gguf` package writes it. tensors: numpy arrays and their type, None for the array's
    own."""
    import gguf

    writer = gguf.GGUFWriter(path, str(metadata.get("general.architecture", "llama")))
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        if key != "general.architecture":
            add[type(value)](key, value)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def _decoder_keys(architecture: str) -> dict[str, Any]:
    numbers = {
        "block_count": 1, "context_length": 64, "embedding_length": 64, "feed_forward_length": 64,
        "attention.head_count": 2, "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0, "vocab_size": 32,
    }  # fmt: skip
    return {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in numbers.items()},
    }


def _superblocks() -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Metadata and tensors of a decoder in Q4_K, Q5_K and Q6_K, as small as superblocks allow. All
    its blocks are zeros."""
    import gguf

    rows = {
        "token_embd": 4,
        "blk.0.attn_q": 4,
        "blk.0.attn_k": 2,
        "blk.0.attn_v": 2,
        "blk.0.ffn_gate": 4,
        "blk.0.ffn_up": 4,
    }
    kinds = gguf.GGMLQuantizationType
    packed = {
        f"{name}.weight": (torch.zeros(n, size, dtype=torch.uint8).numpy(), kind)
        for (name, n), (kind, size) in zip(
            rows.items(), [(kinds.Q4_K, 144), (kinds.Q5_K, 176), (kinds.Q6_K, 210)] * 2, strict=True
        )
    }
    plain = {
        "blk.0.attn_output": (256, 4),
        "blk.0.ffn_down": (256, 4),
        "blk.0.attn_norm": (256,),
        "blk.0.ffn_norm": (256,),
        "output_norm": (256,),
    }
    sizes = {"embedding_length": 256, "feed_forward_length": 4, "vocab_size": 4}
    metadata = (
        _decoder_keys("llama")
        | {f"llama.{key}": size for key, size in sizes.items()}
        | {"llama.attention.key_length": 2}
    )
    return metadata, packed | {
        f"{name}.weight": (torch.ones(shape).numpy(), None) for name, shape in plain.items()
    }


def _gguf() -> list[bytes]:
    import gguf

    from quantflow.checkpoints.gguf.names import to_gguf_name

    plain = _plain()
    kinds = gguf.GGMLQuantizationType

    def array(name: str, kind: Any) -> tuple[Any, Any]:
        value = plain[name]
        if value.dim() == 1 or kind is None:
            return value.float().numpy(), None
        return gguf.quants.quantize(value.float().numpy(), kind), kind

    letters = byte_characters()
    merges = ["t h", "i n", "th e"]
    byte_level = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*letters, "th", "in", "the", "<s>", "</s>"],
        "tokenizer.ggml.token_type": [1] * 259 + [3, 3],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 259,
        "tokenizer.ggml.eos_token_id": 260,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": CHAT,
    }
    tokens = [
        "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Theriv", "▁r",
        "er",
    ]  # fmt: skip
    pieces = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 9,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    scaled = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 2.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    own = {
        "quantflow.config": json.dumps(LLAMA), "quantflow.vectors": "F16",
        "quantflow.schemes": json.dumps({"model.layers.0.mlp.up_proj": [4, 32, True, "integer"]}),
    }  # fmt: skip
    cases: list[tuple[dict[str, Any], Any]] = [
        (_decoder_keys("llama") | byte_level, None),
        (_decoder_keys("llama") | pieces | scaled, kinds.Q4_0),
        (_decoder_keys("llama") | own, kinds.Q4_0),
        (_decoder_keys("qwen2") | {**byte_level, "tokenizer.ggml.pre": "gpt-2"}, kinds.Q8_0),
        (_decoder_keys("llama"), kinds.Q4_1),
    ]
    found = []
    with TemporaryDirectory() as folder:
        for i, (metadata, kind) in enumerate(cases):
            tensors = {
                f"{to_gguf_name(name.rpartition('.')[0])}.weight": array(name, kind)
                for name in plain
            }
            if metadata["general.architecture"] == "qwen2":
                tensors |= {
                    f"blk.0.attn_{part}.bias": (
                        plain["model.norm.weight"].float().numpy()[:size],
                        None,
                    )
                    for part, size in (("q", 64), ("k", 32), ("v", 32))
                }
            found.append(_gguf_file(Path(folder) / f"{i}.gguf", metadata, tensors))
        found.append(_gguf_file(Path(folder) / "k.gguf", *_superblocks()))
    return found


# --- texts


def _recipe() -> list[bytes]:
    found = [path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    everything = {
        "name": "all",
        "model": "m",
        "output": "o",
        "calibration": {"data": "c4", "samples": 8, "seqlen": 64},
        "weights": {
            "bits": 4,
            "group_size": 128,
            "symmetric": True,
            "ignore": ["lm_head"],
            "overrides": [
                {"match": "*.down_proj", "bits": 8},
                {"match": "*.o_proj", "ignore": True},
            ],
        },
        "stages": [
            "calibrate",
            {"awq": {"grid": 4}},
            {"gptq": {"damp": 0.01, "act_order": "static"}},
            {"kv_qparams": {}},
            {"pack": {"format": "gptq"}},
            {"evaluate": {"data": "wikitext2", "gates": {"kl_mean": 0.1}}},
        ],
    }
    # Sections that are said once and used twice, with and without changes.
    shared = (
        b"name: a\nmodel: m\ncalibration: &c {data: c4, samples: 8}\nstages:\n  - rtn\n  - pack:"
        b" {format: gptq}\n"
    )
    merged = shared.replace(b"name: a\n", b"") + b"<<: [{name: b}, {seed: 1}]\nname: c\n"
    twice = shared + b"weights: {overrides: [&o {match: a, bits: 8}, *o]}\n"
    return [*found, yaml.safe_dump(everything, sort_keys=False).encode(), twice, merged]


def _calibration() -> list[bytes]:
    text = [{"id": str(i), "text": sentence} for i, sentence in enumerate(SENTENCES[:3])]
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]},
    ]
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
    }
    rows: list[Any] = [
        *text,
        {"id": "1", "messages": [*chat, call], "tools": '[{"type": "function"}]'},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be short"},
        {"prompt": "a", "chosen": chat, "rejected": chat},
        {"prompt": "a", "completion": "b"},
        "text alone",
    ]
    lines = b"".join(_json(row) + b"\n" for row in rows)
    tables = {}
    for end, delimiter in (("csv", ","), ("tsv", "\t")):
        table = io.StringIO()
        writer = csv.DictWriter(table, ["id", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(text)
        tables[end] = table.getvalue().encode()
    files = {
        "jsonl": lines,
        "json": _json(rows),
        "txt": "\n<|endoftext|>\n".join(SENTENCES[:4]).encode(),
        **tables,
        **_arrow_files(text),
        "jsonl.gz": gzip.compress(lines, mtime=0),
        "jsonl.xz": lzma.compress(lines),
        "jsonl.zst": pyarrow.compress(lines, codec="zstd", asbytes=True),
    }
    return [joined({f"text.{end}": content}) for end, content in files.items()] + [
        joined({"text.jsonl": _json(row)}) for row in rows
    ]


def _arrow_files(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    table = pyarrow.Table.from_pylist(
        [{**row, "messages": [{"role": "user", "content": "a"}]} for row in rows]
    )
    parquet, arrow = io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet)
    with pyarrow.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    return {"parquet": parquet.getvalue(), "arrow": arrow.getvalue()}


def _workspace() -> list[bytes]:
    common = {
        "model_name": "m", "tensor_para_size": 1, "head_num": 4, "kv_head_num": 2,
        "vocab_size": 320, "num_layer": 2, "inter_size": 128, "norm_eps": 1e-6, "attn_bias": 0,
        "start_id": 1, "end_id": 2, "session_len": 136, "weight_type": "fp16",
        "rotary_embedding": 16, "rope_theta": 10000.0, "size_per_head": 16, "group_size": 0,
        "max_batch_size": 64, "max_context_token_num": 1, "step_length": 1,
        "cache_max_entry_count": 0.5, "cache_block_seq_len": 128, "cache_chunk_size": 1,
        "use_context_fmha": 1, "quant_policy": 0, "max_position_embeddings": 128,
        "rope_scaling_factor": 0.0, "use_logn_attn": 0,
    }  # fmt: skip
    changes: tuple[dict[str, Any], ...] = (
        {},
        {
            "weight_type": "int4",
            "group_size": 32,
            "head_num": 8,
            "tensor_para_size": 1,
            "quant_policy": 4,
        },
        {
            "weight_type": "bf16",
            "tensor_para_size": 2,
            "attn_bias": 1,
            "rope_scaling_factor": 1.0,
            "use_dynamic_ntk": 1,
        },
    )
    return [
        "".join(["[llama]\n", *(f"{k} = {v}\n" for k, v in {**common, **change}.items())]).encode()
        for change in changes
    ]


def _artifact() -> list[bytes]:
    """A manifest, a report and a release as runs write them."""
    entry = {"bytes": 4, "sha256": "0" * 64}
    manifest = {
        "version": 1,
        "name": "tiny",
        "fingerprint": "0" * 64,
        "status": "ok",
        "failed_gates": [],
        "formats": {"awq": "awq", "gptq": "gptq"},
        "source": {"path": "m"},
        "quality": {"quantised": {"perplexity": 2.0}},
        "files": {"awq/config.json": entry, "report.json": entry},
    }
    report = {
        "version": 1, "name": "tiny", "asked": {"name": "tiny"}, "quality": {}, "profile": {},
        "linears": {}, "activations": {}, "sizes": {}, "memory": [], "kept": {},
    }  # fmt: skip
    numbers = {
        "perplexity": 2.0,
        "perplexity_excess": 0.1,
        "kl_mean": 0.1,
        "kl_p99": 0.2,
        "disagreement": 0.1,
        "bytes": 100,
    }
    release = {
        "version": 1,
        "artifacts": {
            "tiny": {"numbers": numbers, "measured_on": "texts"},
            "b": {"numbers": {"bytes": 1}},
        },
    }
    files = {"quantflow.json": manifest, "report.json": report, "release.json": release}
    return [joined({name: _json(content)}) for name, content in files.items()] + [
        joined({n: _json(c) for n, c in files.items()})
    ]


_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]},
    },
}
_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
_MOST: dict[str, Any] = {"max_tokens": 2, "temperature": 0.7, "top_p": 0.9, "seed": 7}
_BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "v1/chat/completions",
        {
            **_MOST,
            "messages": [{"role": "system", "content": "Hi"}, {"role": "user", "content": "A"}],
        },
    ),
    (
        "v1/chat/completions",
        {
            **_MOST,
            "model": "m",
            "stream": True,
            "stream_options": {"include_usage": True},
            "n": 2,
            "logprobs": True,
            "top_logprobs": 2,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "stop": ["a", "b"],
            "logit_bias": {"5": -1.5},
        },
    ),
    (
        "v1/chat/completions",
        {
            **_MOST,
            "tools": [_TOOL],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "max_tokens": 12,
            "messages": [
                {"role": "user", "content": ""},
                {"role": "assistant", "content": None, "tool_calls": [_CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "7"},
            ],
        },
    ),
    (
        "v1/chat/completions",
        {
            **_MOST,
            "messages": "Hi",
            "tools": [_TOOL],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "user": "u",
            "max_completion_tokens": 2,
            "metadata": {"a": "b"},
            "skip_special_tokens": False,
        },
    ),
    (
        "v1/chat/completions",
        {
            **_MOST,
            "messages": "Hi",
            "max_tokens": 8,
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "s",
                    "strict": True,
                    "schema": {
                        "type": "object",
                        "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/c"}},
                        "$defs": {"c": {"type": "string", "pattern": "a+"}},
                    },
                },
            },
        },
    ),
    (
        "v1/completions",
        {**_MOST, "prompt": "The", "echo": True, "logprobs": 2, "best_of": 2, "n": 1},
    ),
    (
        "v1/completions",
        {
            **_MOST,
            "prompt": [[5, 6], [7]],
            "stream": True,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.1,
            "min_tokens": 1,
            "top_k": 5,
            "min_p": 0.01,
            "stop_token_ids": [9],
        },
    ),
    (
        "v1/completions",
        {
            **_MOST,
            "prompt": ["a", "b"],
            "response_format": {"type": "json_object"},
            "max_tokens": 4,
        },
    ),
    (
        "v1/chat/interactive",
        {
            "prompt": "Hi",
            "session_id": 3,
            "interactive_mode": True,
            "request_output_len": 2,
            "stream": True,
        },
    ),
    (
        "v1/chat/interactive",
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "request_output_len": 2,
            "cancel": False,
            "seed": 1,
        },
    ),
    ("generate", {"prompt": "Hi", "max_tokens": 2, "return_logprob": True, "top_logprobs_num": 2}),
    (
        "generate",
        {"input_ids": [5, 6, 7], "max_tokens": 0, "return_logprob": True, "logprob_start_len": 0},
    ),
    ("tokenize", {"prompt": "The table </s>", "add_special_tokens": True, "model": "m"}),
    ("tokenize", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("detokenize", {"tokens": [5, 6, 7]}),
    ("v1/encode", {"input": ["a", "b"], "do_preprocess": True, "add_bos": True}),
    (
        "v1/responses",
        {"input": "Hi", "model": "m", "max_output_tokens": 2, "instructions": "x", "stream": True},
    ),
    (
        "v1/responses",
        {
            "input": [
                {
                    "type": "message",
                    "role": "user",
                    "content": [{"type": "input_text", "text": "Hi"}],
                },
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "7"},
            ],
            "tools": [
                {
                    "type": "function",
                    "name": "f",
                    "parameters": {"type": "object", "properties": {}},
                }
            ],
            "max_output_tokens": 16,
            "tool_choice": "auto",
            "temperature": 1,
            "store": False,
            "text": {"format": {"type": "text"}},
            "metadata": {"a": "b"},
        },
    ),
    ("v1/responses/input_tokens", {"input": "Hi", "model": "m"}),
    (
        "v1/messages",
        {
            "model": "m",
            "max_tokens": 12,
            "system": [{"type": "text", "text": "x"}],
            "stop_sequences": ["a"],
            "top_k": 3,
            "stream": False,
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "7"}],
                },
            ],
            "tools": [{"name": "f", "input_schema": {"type": "object", "properties": {}}}],
            "tool_choice": {"type": "auto"},
        },
    ),
    (
        "v1/messages",
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "model": "m",
            "max_tokens": 2,
            "system": "x",
            "stream": True,
        },
    ),
    ("v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hi"}], "model": "m"}),
)


def _request() -> list[bytes]:
    return [joined({f"{path}.json": _json(body)}) for path, body in _BODIES]


def _http(line: str, *fields: str, body: bytes = b"") -> bytes:
    return "\r\n".join([line, "Host: localhost", *fields, "", ""]).encode("latin-1") + body


def _headers() -> list[bytes]:
    body = b'{"prompt": "Hi", "max_tokens": 2}'
    kind, length = "Content-Type: application/json; charset=utf-8", f"Content-Length: {len(body)}"
    tokenize = _http("POST /tokenize HTTP/1.1", kind, length, body=body)
    return [
        _http("GET /health HTTP/1.1", "Accept: */*", "User-Agent: x"),
        _http("HEAD /docs HTTP/1.1"),
        _http("GET /v1/models/m?a=b HTTP/1.0"),
        _http(
            "GET /metrics HTTP/1.1", "Authorization: Bearer key-of-a-user-0001", "Connection: close"
        ),
        tokenize,
        tokenize + tokenize,
        _http("GET /nothing HTTP/1.1", "Host: 127.0.0.1:80")
        + _http("HEAD /health HTTP/1.1")
        + tokenize,
        _http(
            "POST /v1/completions HTTP/1.1",
            kind,
            "Transfer-Encoding: chunked",
            body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
        ),
        _http(
            "POST /v1/completions HTTP/1.1",
            kind,
            length,
            "Expect: 100-continue",
            "Origin: http://a",
            body=body,
        ),
        _http(
            "POST /tokenize HTTP/1.1",
            kind,
            length,
            "Connection: Upgrade, HTTP2-Settings",
            "Upgrade: h2c",
            body=body,
        ),
        _http(
            "POST /tokenize HTTP/1.1",
            kind,
            length,
            "Content-Encoding: gzip",
            "Accept-Encoding: gzip, br",
            body=body,
        ),
        _http(
            "OPTIONS * HTTP/1.1",
            "Access-Control-Request-Method: POST",
            "Cookie: a=b; c=d",
            "X-Request-Id: 7",
        ),
        _http("POST /admin/drain HTTP/1.1", kind, "Content-Length: 0", "Authorization: Basic eDp5"),
    ]


_MAKERS: dict[str, Callable[[], list[bytes]]] = {
    "safetensors": _safetensors, "directory": _directory, "gguf": _gguf,
    "sentencepiece": _sentencepiece, "tokenizer": _tokenizer, "vocabulary": _vocabulary,
    "config": _config, "recipe": _recipe, "calibration": _calibration, "workspace": _workspace,
    "artifact": _artifact, "request": _request, "headers": _headers,
}  # fmt: skip


def seeds(target: str) -> list[bytes]:
    """Valid inputs of a target, the same at every call."""
    return _MAKERS[target]()
