"""How fast a model runs and what it takes: prefill and decode, time to the first token, memory, for
some batches and lengths.

Every row is measured in a process of its own, so that its peak of memory is its own: `python -m
quantflow.evaluate.throughput JSON`.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantflow.errors import Problem, QuantFlowError, ResourceError, UserError
from quantflow.machine import ending, peak_resident_bytes, resident_bytes


@dataclass(frozen=True)
class Case:
    """What is measured: `batch` sequences of `prompt` random tokens each, `new` tokens generated.

    engine: "quantflow", "transformers" or "llama.cpp", whose model is a GGUF file."""

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
    """first_token_s: until every sequence has its first token. prefill_tokens_s: prompt tokens over
    that. decode_tokens_s: what comes after that, over its time. step_ms: the median of a decode
    step. peak_bytes: of memory above what the imports take (on a GPU, its own).
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


_MEMORY = "the system ends what takes too much memory: lower --batch or --prompt"
_COMPILE = (
    "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
)
HINTS: dict[int, dict[str, str]] = {
    signal.SIGILL: {
        "llama.cpp": f"It was built for another processor. To compile it for this one: {_COMPILE}"
    },
    signal.SIGKILL: dict.fromkeys(
        ("quantflow", "transformers", "llama.cpp"), f"If nobody did that, {_MEMORY}"
    ),
}
"""What to do about a measured process that a signal ended: signal -> engine -> advice."""


def measure(case: Case, timeout_s: float | None = None) -> Row:
    """Runs a case in a fresh process. Raises QuantFlowError with what it said where it failed;
    where a signal ended it, UserError for another engine than ours, and ResourceError where that
    was SIGKILL."""
    command = [sys.executable, "-m", "quantflow.evaluate.throughput", json.dumps(asdict(case))]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise QuantFlowError(Problem(case.name, f"not done after {error.timeout:g} s")) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        if done.returncode < 0:  # then its last words are about something else
            hint = HINTS.get(-done.returncode, {}).get(case.engine, "")
            lacking = ResourceError if done.returncode == -signal.SIGKILL else UserError
            kind = (
                QuantFlowError if case.engine == "quantflow" and lacking is UserError else lacking
            )
            raise kind(Problem(case.name, ending(done.returncode), hint=hint))
        raise QuantFlowError(Problem(case.name, lines[-1] if lines else ending(done.returncode)))
    record = json.loads(done.stdout.splitlines()[-1])
    return Row(**{**record, "case": case})


def memory_table(
    model: str | Path, batches: list[int], contexts: list[int]
) -> list[dict[str, int]]:
    """Computed bytes by batch and context, none beyond the model's own.

    Weights: the sum of the checkpoint's tensors, as stored. KV, in the model's dtype and in int8
    with static scales: 2 · layers · kv_heads · head_dim · bytes, a token.
    """
    from quantflow.checkpoints.checkpoint import Checkpoint, resolve_model
    from quantflow.formats.reader import checkpoint_folder

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
        for c in (
            contexts if config.stretches else sorted({min(c, config.context) for c in contexts})
        )
    ]


def _prompts(case: Case, vocabulary: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (case.batch, case.prompt), generator=generator).tolist()


def _run_engine(case: Case) -> dict[str, Any]:
    import torch

    from quantflow.checkpoints.checkpoint import Checkpoint, resolve_model
    from quantflow.engine.config import EngineConfig, KVPrecision, Mode
    from quantflow.engine.engine import Engine
    from quantflow.engine.kv_cache import block_bytes
    from quantflow.engine.request import SamplingParams
    from quantflow.formats.reader import checkpoint_folder

    # An engine with just the memory that this case needs.
    imports = _imported()
    length, block = case.prompt + case.new, 64
    config = Checkpoint(checkpoint_folder(resolve_model(case.model))).config
    size = -(-length // block) * block
    # float32: room in any precision
    most = config.layers * config.kv_heads * config.head_dim * 8 * size * case.batch
    stretched = config.stretches and length > config.context
    engine = Engine(
        case.model,
        EngineConfig(
            mode=Mode(case.mode),
            kv=KVPrecision(case.kv),
            device=case.device,
            max_batch_size=case.batch,
            block_size=block,
            prefix_cache=False,
            cache_bytes=most,
            session_len=length if stretched else None,
        ),
    )
    if length > engine.context:
        raise QuantFlowError(
            Problem(case.name, f"{length} tokens", f"at most the context of {engine.context}")
        )
    prompts = _prompts(case, engine.model_config.vocabulary)
    # Kernels are compiled, pages touched; on a GPU, decodes of all sizes recorded that the measured
    # run will have.
    for warm in prompts if engine.ops.cuda else prompts[:1]:
        engine.submit(
            warm,
            SamplingParams(
                max_tokens=case.new if engine.ops.cuda else min(2, case.new), ignore_eos=True
            ),
        )
    list(engine.tokens())
    # The measured run: until every sequence has its first token, then the decode.
    for prompt in prompts:
        engine.submit(prompt, SamplingParams(max_tokens=case.new, ignore_eos=True))
    began, first, decoded, seen, steps = time.perf_counter(), 0.0, 0, set(), []
    while engine.has_work:
        start = time.perf_counter()
        tokens = engine.step()
        now = time.perf_counter()
        seen |= {token.request for token in tokens}
        # what the first prompts' texts got while the last were read is no part of the decode's time
        if first:
            decoded += len(tokens)
            steps.append(now - start)
        elif len(seen) == case.batch:
            first = now - began
    total = time.perf_counter() - began
    # What it took.
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

    imports, device = (
        _imported(),
        "cuda" if case.device != "cpu" and torch.cuda.is_available() else "cpu",
    )
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
        run(*((tokens, case.new) if device == "cuda" else (tokens[:1], min(2, case.new))))
        first, steps = run(tokens, case.new)
    peak = (
        torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident_bytes() - imports
    )
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    decoded = case.batch * (case.new - 1)
    return _row(case, first, decoded, first + sum(steps), steps, peak) | {
        "weight_bytes": weights,
        "note": str(model.dtype).removeprefix("torch."),
    }


def _run_llama_cpp(case: Case) -> dict[str, Any]:
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        hint = "pip install llama-cpp-python, which compiles llama.cpp for this machine"
        raise QuantFlowError(
            Problem(case.name, "llama-cpp-python is not installed", hint=hint)
        ) from error
    import numpy as np
    import torch

    # The model and a context with room for all sequences.
    imports, threads, most = _imported(), torch.get_num_threads(), 512
    if case.device != "cpu" and not llama_cpp.llama_supports_gpu_offload():
        raise QuantFlowError(
            Problem(
                case.name,
                "a llama-cpp-python that was built for CPUs",
                "one for this GPU, or --device cpu",
            )
        )
    asked = llama_cpp.llama_model_default_params()
    asked.n_gpu_layers = 0 if case.device == "cpu" else -1
    model = llama_cpp.llama_model_load_from_file(case.model.encode(), asked)
    if not model:
        raise QuantFlowError(Problem(case.model, "llama.cpp does not load it"))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = case.batch * (case.prompt + case.new + 1)
    params.n_batch = params.n_ubatch = max(most, case.batch)
    params.n_seq_max, params.n_threads, params.n_threads_batch, params.kv_unified = (
        case.batch,
        threads,
        threads,
        True,
    )
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise QuantFlowError(
            Problem(case.model, f"llama.cpp makes no context of {params.n_ctx} tokens")
        )
    # A batch that every call fills anew.
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    prompts = _prompts(case, vocabulary)
    batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def decode(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Computes (token, position, sequence, whether its successor is wanted); the likeliest
        successors."""
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
                token,
                position,
                1,
                sequence,
                wanted,
            )
        if code := llama_cpp.llama_decode(context, batch):
            raise QuantFlowError(Problem(case.name, f"llama_decode gave {code}"))
        rows = (
            llama_cpp.llama_get_logits_ith(context, i) for i, token in enumerate(tokens) if token[3]
        )
        return [int(np.ctypeslib.as_array(row, (vocabulary,)).argmax()) for row in rows]

    def run(sequences: list[list[int]], new: int) -> tuple[float, list[float]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        began, chosen, steps = time.perf_counter(), list[int](), []
        tokens = [
            (token, i, sequence, i + 1 == len(text))
            for sequence, text in enumerate(sequences)
            for i, token in enumerate(text)
        ]
        for start in range(0, len(tokens), most):
            chosen += decode(tokens[start : start + most])
        first = time.perf_counter() - began
        for step in range(new - 1):
            start_s = time.perf_counter()
            chosen = decode(
                [
                    (token, case.prompt + step, sequence, True)
                    for sequence, token in enumerate(chosen)
                ]
            )
            steps.append(time.perf_counter() - start_s)
        return first, steps

    # Once to warm up, once to measure.
    run(prompts[:1], min(2, case.new))
    first, steps = run(prompts, case.new)
    # llama.cpp does not tell what it takes of a GPU
    peak = peak_resident_bytes() - imports if case.device == "cpu" else 0
    row = _row(case, first, case.batch * len(steps), first + sum(steps), steps, peak)
    return row | {
        "weight_bytes": llama_cpp.llama_model_size(model),
        "note": f"llama-cpp-python {llama_cpp.__version__}",
    }


RUNNERS = {"quantflow": _run_engine, "transformers": _run_transformers, "llama.cpp": _run_llama_cpp}


def _imported() -> int:
    """The resident size once everything is imported and torch has computed something."""
    import torch

    torch.ones(64, 64) @ torch.ones(64, 64)
    return resident_bytes()


def _row(
    case: Case, first: float, decoded: int, total: float, steps: list[float], peak: int
) -> dict[str, Any]:
    return {
        "first_token_s": first,
        "prefill_tokens_s": case.batch * case.prompt / first,
        "decode_tokens_s": decoded / (total - first) if decoded else 0.0,
        "step_ms": statistics.median(steps) * 1e3 if steps else 0.0,
        "peak_bytes": peak,
    }


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    try:
        print(json.dumps(RUNNERS[case.engine](case)))
    except QuantFlowError as error:
        raise SystemExit("; ".join(map(str, error.problems))) from error


if __name__ == "__main__":
    main()
