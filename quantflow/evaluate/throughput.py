"""How fast a model runs and what it takes: prefill and decode, time to the first token, memory, for some batches and lengths.

Every row is measured in a process of its own, so that its peak of memory is its own: `python -m quantflow.evaluate.throughput JSON`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantflow.errors import Problem, QuantFlowError
from quantflow.machine import peak_resident_bytes, resident_bytes


@dataclass(frozen=True)
class Case:
    """What is measured. engine: "quantflow" or "transformers". batch sequences of `prompt` random tokens each, `new` tokens generated."""

    name: str
    engine: str
    model: str
    kv: str
    mode: str
    device: str
    batch: int
    prompt: int
    new: int


@dataclass(frozen=True)
class Row:
    """first_token_s: until every sequence has its first token. prefill_tokens_s: prompt tokens over that. decode_tokens_s: what comes
    after that, over its time. step_ms: the median of a decode step. peak_bytes: of memory above what the imports take (on a GPU, its own).
    weight_bytes, cache_bytes: as the engine counts them; 0 where it does not tell."""

    case: Case
    first_token_s: float
    prefill_tokens_s: float
    decode_tokens_s: float
    step_ms: float
    peak_bytes: int
    weight_bytes: int = 0
    cache_bytes: int = 0
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(case: Case, timeout_s: float | None = None) -> Row:
    """Runs a case in a fresh process. Raises QuantFlowError with what it said where it failed."""
    command = [sys.executable, "-m", "quantflow.evaluate.throughput", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise QuantFlowError(Problem(case.name, lines[-1] if lines else f"exit code {done.returncode}"))
    found = json.loads(done.stdout.splitlines()[-1])
    return Row(**{**found, "case": case})


def memory_table(model: str | Path, batches: list[int], contexts: list[int]) -> list[dict[str, int]]:
    """Computed bytes by batch and context: weights as stored, and the KV cache in the model's dtype and in int8.

    Weights: the sum of the checkpoint's tensors. KV: 2 · layers · kv_heads · head_dim · bytes, a token; int8 with static scales.
    """
    from quantflow.formats.reader import checkpoint_folder
    from quantflow.models.checkpoint import Checkpoint, resolve_model

    checkpoint = Checkpoint(checkpoint_folder(resolve_model(str(model))))
    config = checkpoint.config
    token = 2 * config.layers * config.kv_heads * config.head_dim
    item = 4 if config.dtype == "float32" else 2
    return [
        {
            "batch": b,
            "context": c,
            "weight_bytes": checkpoint.weight_bytes,
            "kv_bytes": b * c * token * item,
            "kv_int8_bytes": b * c * token,
        }
        for b in batches
        for c in contexts
    ]


def _prompts(case: Case, vocabulary: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (case.batch, case.prompt), generator=generator).tolist()


def _run_engine(case: Case) -> dict[str, Any]:
    import torch

    from quantflow.engine.engine import Engine, EngineConfig, Mode
    from quantflow.engine.kv_cache import KVPrecision, block_bytes
    from quantflow.engine.request import SamplingParams
    from quantflow.formats.reader import checkpoint_folder
    from quantflow.models.checkpoint import Checkpoint, resolve_model

    imports = _imported()
    length, block = case.prompt + case.new, 64
    config = Checkpoint(checkpoint_folder(resolve_model(case.model))).config
    size = -(-length // block) * block
    most = config.layers * config.kv_heads * config.head_dim * 8 * size * case.batch  # float32: room in any precision
    stretched = config.rope.kind in ("dynamic", "qwen") and length > config.max_positions
    engine = Engine(
        case.model,
        EngineConfig(
            mode=Mode(case.mode), kv=KVPrecision(case.kv), device=case.device, max_batch_size=case.batch, block_size=block,
            prefix_cache=False, cache_bytes=most, session_len=length if stretched else None,
        ),
    )  # fmt: skip
    if length > engine.context:
        raise QuantFlowError(Problem(case.name, f"{length} tokens", f"at most the context of {engine.context}"))
    prompts = _prompts(case, engine.model_config.vocabulary)
    # Kernels are compiled, pages touched; on a GPU, decodes of this size recorded.
    for warm in prompts if engine.ops.cuda else prompts[:1]:
        engine.submit(warm, SamplingParams(max_tokens=min(4 if engine.ops.cuda else 2, case.new), ignore_eos=True))
    list(engine.tokens())
    for prompt in prompts:
        engine.submit(prompt, SamplingParams(max_tokens=case.new, ignore_eos=True))
    began, first, decoded, seen, steps = time.perf_counter(), 0.0, 0, set(), []
    while engine.has_work:
        start = time.perf_counter()
        tokens = engine.step()
        now = time.perf_counter()
        seen |= {token.request for token in tokens}
        if first:  # what the first prompts' texts got while the last were read is no part of the decode's time
            decoded += len(tokens)
            steps.append(now - start)
        elif len(seen) == case.batch:
            first = now - began
    total = time.perf_counter() - began
    used = case.batch * engine.blocks.blocks_for(length - 1)
    each = block_bytes(engine.model_config, engine.kv, engine.ops.dtype, block)
    peak = torch.cuda.max_memory_allocated() if engine.ops.cuda else peak_resident_bytes() - imports
    note = "; ".join(f"{count} × {way}" for way, count in engine.loaded.ways.items())
    return _row(case, first, decoded, total, steps, peak) | {
        "weight_bytes": engine.loaded.weight_bytes,
        "cache_bytes": used * each,
        "note": note,
    }


def _run_transformers(case: Case) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    imports, device = _imported(), "cuda" if case.device != "cpu" and torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype="auto").to(device).eval()
    tokens = torch.tensor(_prompts(case, model.config.vocab_size), device=device)

    def run(ids: Any, new: int) -> tuple[float, list[float]]:
        began = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        chosen = out.logits[:, -1:].argmax(-1)
        chosen.cpu()
        first, steps = time.perf_counter() - began, []
        for _ in range(new - 1):
            start = time.perf_counter()
            out = model(chosen, past_key_values=out.past_key_values, use_cache=True)
            chosen = out.logits[:, -1:].argmax(-1)
            chosen.cpu()
            steps.append(time.perf_counter() - start)
        return first, steps

    with torch.inference_mode():
        run(tokens[:1], min(2, case.new))
        first, steps = run(tokens, case.new)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident_bytes() - imports
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    decoded = case.batch * (case.new - 1)
    return _row(case, first, decoded, first + sum(steps), steps, peak) | {
        "weight_bytes": weights,
        "note": str(model.dtype).removeprefix("torch."),
    }


def _imported() -> int:
    """The resident size once everything is imported and torch has computed something."""
    import torch

    torch.ones(64, 64) @ torch.ones(64, 64)
    return resident_bytes()


def _row(case: Case, first: float, decoded: int, total: float, steps: list[float], peak: int) -> dict[str, Any]:
    return {
        "first_token_s": first, "prefill_tokens_s": case.batch * case.prompt / first,
        "decode_tokens_s": decoded / (total - first) if decoded else 0.0, "step_ms": statistics.median(steps) * 1e3 if steps else 0.0,
        "peak_bytes": peak,
    }  # fmt: skip


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    try:
        print(json.dumps(_run_engine(case) if case.engine == "quantflow" else _run_transformers(case)))
    except QuantFlowError as error:
        raise SystemExit("; ".join(map(str, error.problems))) from error


if __name__ == "__main__":
    main()
