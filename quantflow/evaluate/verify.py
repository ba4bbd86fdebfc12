"""Is an artifact what it says, and does it run? Files against the manifest, each layer of the
engine against the dequantised weights in float32, logits, and generation alone and in company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantflow.artifacts.artifact import file_entries, foreign_files, read_manifest
from quantflow.checkpoints.checkpoint import resolve_model
from quantflow.decoder.block import ObserveKV
from quantflow.decoder.native import NativeBlock, embed, final_hidden, logits, sequences
from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.llm import Collector
from quantflow.engine.request import Request, SamplingParams, Sequence
from quantflow.engine.scheduler import Work
from quantflow.formats.reader import Weights
from quantflow.quant.kv import KVParameters, round_kv

SAMPLE = (
    "The quick brown fox jumps over the lazy dog. In 1969 two people walked on the Moon; it took 8"
    " days, 3 hours and 18 minutes. def add(a, b): return a + b. 春天来了，花开了。 A model that is"
    " made smaller should still say the same things."
)
TOKENS = 128
# Of what float32 gives, in the norm of the difference: what an engine's rounding alone does, with
# room for deep layers' outliers.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
INT8_KV = 0.01  # more, where codes next to a boundary may fall the other way
FAR = 0.5  # from the unquantised layer: more than two bits do, when they are the right weights
MOST_APART = 0.1  # mean difference of log-probabilities between the engine and float32


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. passed: None where there was nothing to look at."""

    name: str
    passed: bool | None
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    path: Path,
    reference: str | None = None,
    device: str = "auto",
    begin: Callable[[int], None] = lambda steps: None,
    step: Callable[[str], None] = lambda what: None,
) -> list[Check]:
    """Everything that was checked. reference: the unquantised model, to compare each layer's output
    with. Raises UserError where the directory cannot be read at all. begin: told how many times
    `step` will be called."""
    checks = [_files(path)]
    engine = Engine(path, EngineConfig(device=device, max_batch_size=8, check=True))
    checks.append(
        Check(
            "loads", True, "; ".join(f"{name} {value}" for name, value in engine.describe().items())
        )
    )
    begin(engine.model_config.layers + 1)
    with torch.inference_mode():
        checks += _layers(engine, Weights(resolve_model(reference)) if reference else None, step)
    checks.append(_generation(engine))
    step("generation")
    return checks


def _files(path: Path) -> Check:
    manifest = read_manifest(path)
    if manifest is None:
        return Check("files", None, "no quantflow.json: nothing to compare the files with")
    stored, listed = file_entries(path), manifest["files"]
    wrong = [f"{n} is missing" for n in sorted(set(listed) - set(stored))]
    wrong += [
        f"{n} differs from its sha256"
        for n in sorted(set(listed) & set(stored))
        if stored[n] != listed[n]
    ]
    wrong += [f"{n} is not in the manifest" for n in foreign_files(path)]
    if manifest["failed_gates"]:
        wrong.append("it failed its quality gates")
    return Check(
        "files", not wrong, "; ".join(wrong) or f"{len(listed)} files as the manifest has them"
    )


def _tokens(engine: Engine) -> list[int]:
    limit = min(TOKENS, engine.room - 1)
    if engine.text is not None:
        return engine.text.encode(SAMPLE)[:limit]
    return torch.randint(
        0, engine.model_config.vocabulary, (limit,), generator=torch.Generator().manual_seed(0)
    ).tolist()


def _layers(engine: Engine, original: Weights | None, step: Callable[[str], None]) -> list[Check]:
    weights, config, device = Weights(engine.path), engine.model_config, engine.ops.device
    architecture, tokens = weights.checkpoint.architecture, _tokens(engine)
    seq = sequences(config, len(tokens), device)
    outer = {n: t.to(device) for n, t in weights.outer().items()}
    ids = torch.tensor([tokens], device=device)
    x = embed(architecture, config, outer, ids, torch.float32)
    limit = TOLERANCE[engine.ops.dtype] + (INT8_KV if engine.kv.int8 else 0)
    off, worst, far, furthest = [], 0.0, [], 0.0
    for index in range(config.layers):
        stored = {n: t.to(device) for n, t in weights.layer(index).items()}
        start = x.to(engine.ops.dtype).float()  # both begin with what the engine can hold
        x = NativeBlock(architecture, config, index, stored, seq, torch.float32).forward(
            start, _rounding(engine, index)
        )
        expected = final_hidden(architecture, config, outer, x)
        error = _difference(_engine_layer(engine, index, start[0], len(tokens)), expected[0])
        worst = max(worst, error)
        if not error <= limit:
            off.append(f"layer {index}: {error:.2e}")
        if original is not None:
            own = {n: t.to(device) for n, t in original.layer(index).items()}
            plain = NativeBlock(
                original.checkpoint.architecture,
                original.checkpoint.config,
                index,
                own,
                seq,
                torch.float32,
            )
            error = _difference(x - start, plain.forward(start) - start)
            furthest = max(furthest, error)
            if not error <= FAR:
                far.append(f"layer {index}: {error:.2e}")
        step(f"layer {index}")
    result = (
        f"engine against dequantised weights in float32, largest relative difference {worst:.2e},"
        f" at most {limit:g}"
    )
    checks = [Check("layers", not off, "; ".join(off) or result)]
    if original is not None:
        result = (
            "what a layer adds against the unquantised one's, largest relative difference"
            f" {furthest:.2e}, at most {FAR}"
        )
        checks.append(Check("reference", not far, "; ".join(far) or result))
    target = logits(architecture, config, outer, x)[0].log_softmax(-1)
    return [*checks, _logits(engine, tokens, target)]


def _difference(computed: Tensor, expected: Tensor) -> float:
    return float((computed.float() - expected).norm() / expected.norm())


def _rounding(engine: Engine, index: int) -> ObserveKV | None:
    """What the engine's cache does to K and V."""
    if not engine.kv.int8:
        return None
    if engine.kv.parameters:
        p = {n: t.to(engine.ops.device) for n, t in engine.kv.parameters[index].items()}
        key, value = (
            KVParameters(8, p[f"{letter}_scale"], p[f"{letter}_zero_point"]) for letter in "kv"
        )
        return lambda k, v: (round_kv(k, key), round_kv(v, value))
    return lambda k, v: (_round_tokens(k), _round_tokens(v))


def _round_tokens(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x / scale).round().clamp(-127, 127) * scale


def _engine_layer(engine: Engine, index: int, x: Tensor, length: int) -> Tensor:
    """The final norm of layer `index`'s output `[L, H]` for hidden states `x`: a model of one
    layer, whose embedding is its input."""
    model = engine.loaded.model
    alone = replace(
        model,
        config=replace(model.config, embedding_scale=1.0),
        layers=(model.layers[index],),
        embedding=x.to(engine.ops.dtype),
        positions=None,
    )
    request = Request(
        "verify",
        (0,) * length,
        SamplingParams(),
        1,
        0,
        rope_length=engine.runner.rotary.stretch(length),
    )
    sequence = Sequence(request, 0, list(range(length)))
    sequence.blocks = [engine.blocks.allocate() for _ in range(engine.blocks.blocks_for(length))]
    try:
        return alone.forward(engine.runner.inputs([Work(sequence, length)]), [engine.caches[index]])
    finally:
        engine.blocks.release(sequence.blocks)


def _logits(engine: Engine, tokens: list[int], target: Tensor) -> Check:
    """The engine's next-token distributions over the sample against float32's."""
    request = engine.submit(tokens, SamplingParams(max_tokens=1, prompt_logprobs=1))
    collector = Collector(request)
    for token in engine.tokens():
        collector.add(token)
    logprobs = collector.output().prompt_logprobs
    scored = [(i - 1, p) for i, p in enumerate(logprobs) if p is not None]
    error = sum(abs(p.logprob - float(target[i, p.token])) for i, p in scored) / max(1, len(scored))
    same = sum(p.top[0][0] == int(target[i].argmax()) for i, p in scored) / max(1, len(scored))
    passed = error <= MOST_APART and same >= 0.9
    result = (
        f"mean difference of log-probabilities {error:.2e}, top-1 agreement {same:.1%} over"
        f" {len(scored)} tokens"
    )
    return Check("logits", passed, result)


def _generation(engine: Engine) -> Check:
    """Greedy text alone, and among others that come and go: the same in exact mode."""
    tokens = _tokens(engine)[: engine.room // 2]
    most = min(16, engine.room - len(tokens))
    params = SamplingParams(max_tokens=most, ignore_eos=True)

    def run(prompts: list[list[int]]) -> list[tuple[int, ...]]:
        collectors = [Collector(engine.submit(prompt, params)) for prompt in prompts]
        for token in engine.tokens():
            next(c for c in collectors if c.request.id == token.request).add(token)
        return [c.output().completions[0].token_ids for c in collectors]

    prompts = [tokens[: max(1, len(tokens) // n)] for n in (1, 2, 3)]
    alone = [run([prompt])[0] for prompt in prompts]
    together = run(prompts)
    whole = all(len(sequence) == most for sequence in alone)
    passed = whole and alone == together and not engine.problems()
    result = (
        f"{len(prompts)} prompts, {most} tokens each: the same alone and together"
        if passed
        else "texts differ alone and together"
    )
    return Check(
        "generation", passed, result if whole else "a text ended early: logits that are no numbers"
    )
