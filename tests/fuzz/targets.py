"""What is fuzzed: every parser of bytes that come from somewhere else, and a server's requests. A
target reads all there is in the files of one input.

Only errors that name what the user can mend (`UserError`) may come out, with a message of a
readable length; nothing may take long, or much memory. Whatever else happens is a `Finding`.
"""

from __future__ import annotations

import resource
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from quantflow.artifacts.artifact import foreign_files, is_whole, read_manifest
from quantflow.calibration.data import cut_windows, documents
from quantflow.checkpoints.checkpoint import Checkpoint
from quantflow.checkpoints.tensor_file import TensorFile
from quantflow.checkpoints.turbomind.config import CONFIG, WEIGHTS, read_ini
from quantflow.checkpoints.turbomind.workspace import Workspace
from quantflow.decoder.rope import rotary_table
from quantflow.engine.text import Text
from quantflow.errors import UserError
from quantflow.formats import FORMATS
from quantflow.formats.reader import Weights, checkpoint_folder
from quantflow.formats.recognise import recognise
from quantflow.models.segments import segments
from quantflow.pipeline.release_comparison import compare_releases, read_release
from quantflow.recipe import dump
from quantflow.report.page import read_report
from quantflow.stages.registry import load_recipe
from quantflow.tokenizers import gguf  # noqa: F401  (imported late by others: here it is instrumented)
from quantflow.tokenizers.byte_level import byte_characters
from quantflow.tokenizers.chat_templates import chat_template
from quantflow.tokenizers.export import export_tokenizer
from tests.fuzz import server
from tests.fuzz.mutation import split

LONGEST_MESSAGE = 20_000  # characters
MOST_SECONDS = 5.0  # of the processor, for one input
MOST_BYTES = 512 * 2**20  # that the process may grow by at one input
TEXTS = ("", "The river 42 — 春天\n\tdef f(x): return x  # 😀", "<s>a</s><0x41><|im_end|>▁▁ \x00")


@dataclass(frozen=True)
class Target:
    """use: reads the files in a folder. files: names that an input may have; of one alone, the
    input is its bytes. covers: the product's files whose branches are counted."""

    use: Callable[[Path], None]
    files: tuple[str, ...]
    covers: tuple[str, ...]


def _safetensors(place: Path) -> None:
    file = TensorFile(place / "model.safetensors")
    for name, info in file.tensors.items():
        file.read(name)
        if info.shape and info.shape[0]:
            file.read(name, info.shape[0] - 1)


def _read_all(path: Path) -> None:
    """Every tensor of a checkpoint, dequantised."""
    weights = Weights(path)
    for name in weights.checkpoint.expected:
        weights.tensor(name)
    weights.kv_parameters()


def _gguf(place: Path) -> None:
    """The tokenizer first, whose keys a file of it alone has too."""
    path = place / "model.gguf"
    with suppress(UserError):
        _use_tokenizer(path)
    _read_all(path)


def _use_tokenizer(path: Path) -> None:
    text = Text(path)
    for example in TEXTS:
        for special in (True, False):
            text.decode(text.encode(example, special=special))
    for token in range(0, min(text.tokenizer.get_vocab_size(), 2000), 7):
        text.token_text(token)


def _tokenizer(place: Path) -> None:
    """What is exported is what was read, and is used as an artifact's."""
    chat_template(place)
    export_tokenizer(place, place / "exported")
    _use_tokenizer(place / "exported")


def _config(place: Path) -> None:
    """What planning asks of a config.json: the decoder, its tensors, the artifact's config, the
    quantisation of each linear."""
    checkpoint = Checkpoint(place, config_only=True)
    config, architecture = checkpoint.config, checkpoint.architecture
    architecture.native_config(checkpoint.raw_config)
    found = recognise(checkpoint)
    for layer in range(min(config.layers, 3)):
        for name in islice(
            (n for segment in segments(architecture, config, layer) for n in segment.names), 20
        ):
            module = f"{architecture.layer_prefix(layer)}.{name}"
            if found:
                FORMATS[found[0]].scheme_of(module, found[1])
    _ = checkpoint.weight_bytes
    if config.family != "opt" and config.head_dim <= 1024:
        for length in (8, 2 * min(config.max_positions, 2**12)):
            cos, sin = rotary_table(config, length)
            assert bool(cos.isfinite().all()) and bool(sin.isfinite().all()), (
                f"{config.rope} gives what is not finite"
            )


def _recipe(place: Path) -> None:
    dump(load_recipe(place / "recipe.yaml"))


def _calibration(place: Path) -> None:
    """Every document, and its tokens by a tokenizer of single bytes."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(byte_characters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for file in sorted(place.iterdir()):
        texts = list(documents(str(file)))
        assert all(isinstance(text, str) and text.strip() for text in texts), repr(texts)[:200]
        cut_windows(tokenizer, texts, count=4, length=16, least=0, source=str(file))


def _workspace(place: Path) -> None:
    """The numbers, and which files they ask for; without these, as here, there is no more to
    read."""
    read_ini(place / WEIGHTS / CONFIG)
    with suppress(UserError):
        Workspace(place)


def _artifact(place: Path) -> None:
    """Each file for itself: what is wrong with one must not hide the next."""
    for read in (_manifest, checkpoint_folder, read_report, _release):
        try:
            read(place)
        except UserError as error:
            _check_message(error)


def _manifest(place: Path) -> None:
    manifest = read_manifest(place)
    if manifest is not None:
        is_whole(place, manifest)
        foreign_files(place)


def _release(place: Path) -> None:
    found = read_release(place)
    compare_releases(found, {"quantflow": "1", "artifacts": found["artifacts"]}, 0.1)


_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "config.json",
    "chat_template.json",
)
_TOKENIZER_MODULES = tuple(
    f"tokenizers/{name}.py"
    for name in ("load", "byte_level", "sentencepiece", "declared", "loaded", "export")
)
_SERVED = (
    "app", "body", "protocol", "requests", "unreadable", "answer", "chat", "completion",
    "interactive", "generate", "tools", "sampling", "service", "errors", "wire",
)  # fmt: skip
_FORMATS = (
    "awq", "base", "bitsandbytes", "compressed_tensors", "gptq", "recognise", "settings", "tensors",
)  # fmt: skip
TARGETS = {
    "safetensors": Target(_safetensors, ("model.safetensors",), ("checkpoints/tensor_file.py",)),
    "directory": Target(
        _read_all,
        (
            "model.safetensors.index.json",
            "config.json",
            "a.safetensors",
            "b.safetensors",
            "quantize_config.json",
            "tensor_parallel.json",
        ),
        (
            "checkpoints/directory.py",
            "checkpoints/checkpoint.py",
            "formats/reader.py",
            *(f"formats/{name}.py" for name in _FORMATS),
        ),
    ),
    "gguf": Target(
        _gguf,
        ("model.gguf",),
        (
            *(f"checkpoints/gguf/{name}.py" for name in ("file", "header", "config")),
            "tokenizers/gguf.py",
            "checkpoints/gguf/superblocks.py",
            "formats/gguf.py",
        ),
    ),
    "sentencepiece": Target(
        _use_tokenizer, ("tokenizer.model",), ("tokenizers/sentencepiece_model.py",)
    ),
    "tokenizer": Target(
        _tokenizer, ("tokenizer.json", *_TOKENIZER_FILES), (*_TOKENIZER_MODULES, "engine/text.py")
    ),
    "vocabulary": Target(
        _tokenizer,
        ("vocab.json", "merges.txt", "qwen.tiktoken", "tokenizer.model", *_TOKENIZER_FILES),
        _TOKENIZER_MODULES,
    ),
    "config": Target(
        _config,
        ("config.json", "quantize_config.json", "quant_config.json"),
        (
            *(
                f"models/{name}.py"
                for name in ("config", "llama", "internlm", "qwen", "mixture", "opt", "rope")
            ),
            *(f"formats/{name}.py" for name in _FORMATS),
        ),
    ),
    "recipe": Target(_recipe, ("recipe.yaml",), ("recipe/loader.py", "recipe/schema.py")),
    "calibration": Target(
        _calibration,
        tuple(
            f"text.{end}"
            for end in (
                "jsonl",
                "json",
                "txt",
                "csv",
                "tsv",
                "parquet",
                "arrow",
                "jsonl.gz",
                "jsonl.zst",
                "jsonl.xz",
            )
        ),
        (
            "calibration/data.py",
            "calibration/rows.py",
            "calibration/shapes.py",
            "calibration/beginnings.py",
        ),
    ),
    "workspace": Target(
        _workspace,
        (f"{WEIGHTS / CONFIG}",),
        tuple(f"checkpoints/turbomind/{name}.py" for name in ("config", "files", "workspace")),
    ),
    "artifact": Target(
        _artifact,
        ("quantflow.json", "report.json", "release.json"),
        ("artifacts/artifact.py", "pipeline/release_comparison.py"),
    ),
    "request": Target(
        server.request,
        tuple(server.FILES),
        (*(f"serve/{name}.py" for name in _SERVED), "serve/messages/*.py", "serve/responses/*.py"),
    ),
    "headers": Target(
        server.headers,
        ("request.http",),
        ("serve/guard.py", "serve/connection.py", "serve/errors.py"),
    ),
}


@dataclass(frozen=True)
class Finding:
    """What one input did that none may do. name: the same for inputs that go wrong in the same
    way."""

    name: str
    text: str


def _check_message(error: UserError) -> None:
    assert len(str(error)) <= LONGEST_MESSAGE, (
        f"a message of {len(str(error))} characters: {str(error)[:200]}"
    )


def lay_out(data: bytes, files: Sequence[str], place: Path) -> None:
    """Writes the files of an input into `place`, and removes those of the one before."""
    present = {files[0]: data} if len(files) == 1 else split(data, files)
    if len(files) > 1:
        for file in sorted(place.rglob("*")):
            if file.is_file() and str(file.relative_to(place)) not in present:
                file.unlink()
    for name, content in present.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)


def judge(target: Target, data: bytes, place: Path) -> Finding | None:
    """Reads one input in the folder `place`; what is wrong about how that went."""
    lay_out(data, target.files, place)
    began, largest = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        try:
            target.use(place)
        except UserError as error:
            _check_message(error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if "/quantflow/" in f.filename or "/fuzz/" in f.filename
        ]
        at = f"{Path(frames[-1].filename).name} {frames[-1].name}" if frames else ""
        return Finding(f"{type(error).__name__} {at}", "".join(traceback.format_exception(error)))
    seconds = time.process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest) * 1024
    if seconds > MOST_SECONDS:
        return Finding("slow", f"{seconds:.1f} s of the processor")
    if grown > MOST_BYTES:
        return Finding("large", f"{grown // 2**20} MiB more memory")
    return None


def quiet() -> None:
    """One thread, which is all that small inputs need."""
    torch.set_num_threads(1)
