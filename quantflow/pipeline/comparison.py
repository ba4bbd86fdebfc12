"""`quantflow eval` on text, and `quantflow.measure`: a checkpoint beside its full-precision
reference."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from quantflow.calibration.data import cut_windows
from quantflow.checkpoints.checkpoint import resolve_model
from quantflow.engine.config import EngineConfig, KVPrecision
from quantflow.engine.engine import Engine
from quantflow.errors import ModelError, Problem
from quantflow.evaluate.divergence import Divergence, Model, Variant, compare
from quantflow.evaluate.running import Running
from quantflow.formats.reader import Weights
from quantflow.machine import resolve_device
from quantflow.pipeline.progress import Progress
from quantflow.pipeline.room import room
from quantflow.pipeline.texts import model_documents
from quantflow.pipeline.windows import left_out_notes
from quantflow.tokenizers.load import load_tokenizer


def compare_on_text(
    model: str,
    reference: str,
    data: str,
    *,
    field: str | None,
    windows: int,
    length: int,
    skip: int,
    engine: bool,
    kv: str,
    device: str,
    progress: Progress,
) -> Divergence:
    """How far `model` is from `reference`, on windows of `data`. engine: as it runs there, with a
    KV cache of this precision. Raises UserError."""
    original, weights = Weights(resolve_model(reference)), Weights(resolve_model(model))
    for remark in (*original.checkpoint.remarks, *weights.checkpoint.remarks):
        progress.note(f"note: {remark}")
    a, b = original.checkpoint.config, weights.checkpoint.config
    if a.vocabulary != b.vocabulary:
        expected = f"{a.vocabulary}, that of {reference}"
        raise ModelError(Problem(model, f"a vocabulary of {b.vocabulary}", expected))
    if length > a.context and not a.stretches:
        expected = f"at most the model's {a.context} positions"
        raise ModelError(Problem("--length", str(length), expected))

    folder = original.checkpoint.tokenizer_path
    documents = model_documents(folder, data, field=field)
    tokenizer = load_tokenizer(folder)
    text = cut_windows(tokenizer, documents, count=windows, length=length, skip=skip, source=data)
    for note in left_out_notes(text=text):
        progress.note(f"note: {note}")

    progress.phase("evaluate", a.layers + b.layers, "layers")
    where = resolve_device(device)
    variant: Model = Variant(weights)
    if engine:
        options = EngineConfig(device=where, kv=KVPrecision(kv), max_batch_size=1)
        variant = Running(lambda: Engine(weights.checkpoint.path, options))
    with TemporaryDirectory(prefix="quantflow-") as files:
        place = room(where, Path(files))
        variants = {"weights": variant}
        return compare(Variant(original), variants, text.tokens, place, progress.advance)["weights"]
