"""The engine as a model of lm-evaluation-harness. `harness` gives it its name there, and needs no
lm_eval to be imported."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.request import SamplingParams
from quantflow.engine.text import OFFLINE_DATE
from quantflow.errors import Problem, RequestError, UserError
from quantflow.evaluate.scoring import Encoder, Pair, Prompt, generate, loglikelihoods

BATCH = 64
DRAWN = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed",
)  # fmt: skip

Request = tuple[tuple[str, str] | None, list[int], list[int]]


class QuantFlowLM(TemplateLM):  # type: ignore[misc]
    """pretrained: an artifact, a checkpoint or a hub id. batch_size: texts that run at once; auto
    is 64. max_length: the longest context, by default the model's. max_gen_toks: of an answer,
    where the task says nothing. kv, mode, dtype, device, tp, dialogue, cache_bytes: as of
    `EngineConfig`. Raises UserError for what the engine cannot load, and for unknown arguments."""

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        kv: str = "auto",
        mode: str = "exact",
        dtype: str = "auto",
        tp: int = 1,
        dialogue: str | None = None,
        cache_bytes: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        problems = []
        if pretrained is None:
            problems.append(
                Problem(
                    "model_args pretrained",
                    "not given",
                    "pretrained=DIR: an artifact, a checkpoint or a hub id",
                )
            )
        names = [name for name in inspect.signature(QuantFlowLM).parameters if name != "unknown"]
        problems += [
            Problem(f"model_args {name}", repr(value)[:80], f"one of {', '.join(names)}")
            for name, value in unknown.items()
        ]
        if pretrained is None or problems:
            raise UserError(problems)
        if str(batch_size) != "auto" and not str(batch_size).isdecimal():
            raise UserError(Problem("batch_size", repr(batch_size), "a number, or auto"))
        self.batch_size = (
            (max_batch_size or BATCH) if str(batch_size) == "auto" else int(batch_size)
        )
        # lm_eval says cuda:0 where its user says nothing, GPU or not
        where = "auto" if device in (None, "cuda:0") else device
        options: dict[str, Any] = {
            "kv": kv, "mode": mode, "dtype": dtype, "device": where, "session_len": max_length,
            "tp": tp, "dialogue": dialogue, "cache_bytes": cache_bytes,
        }  # fmt: skip
        self.engine = Engine(
            pretrained, EngineConfig(max_batch_size=self.batch_size, block_size=16, **options)
        )
        self.encoder, self._dated = Encoder(self.engine), self.engine.tokenizer.on(OFFLINE_DATE)
        self.max_length, self.max_gen_toks = self.engine.room, max_gen_toks
        self._name = str(pretrained)

    @property
    def eot_token_id(self) -> int:
        return min(self.engine.end_tokens, default=self.encoder.prefix)

    @property
    def prefix_token_id(self) -> int:
        return self.encoder.prefix

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self.encoder.encode(string, special=add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own; lm_eval's fingerprint of it is in the results."""
        template = self.engine.tokenizer.template
        return template.default if template and chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._dated.render(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **more: Any
    ) -> list[tuple[float, bool]]:
        # A context of white space alone makes no token.
        pairs = (
            Pair(tuple(context or [self.prefix_token_id]), tuple(continuation))
            for _, context, continuation in requests
        )
        answers = []
        scores = loglikelihoods(self.engine, pairs, self.batch_size)
        for (text, _, _), score in zip(
            requests, _shown(scores, len(requests), disable_tqdm), strict=True
        ):
            answers.append((score.logprob, score.greedy))
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answers[-1])
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The sum over each whole text, in windows of the context that do not overlap in what they
        score."""
        windows: list[Request] = []
        counts: list[int] = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(
                tokens,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own: list[Request] = [(None, *make_disjoint_window(window)) for window in cut]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = []
        for request, count in zip(requests, counts, strict=True):
            sums.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, sums[-1])
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raises RequestError for generation settings that the engine does not have."""
        prompts = (self._prompt(*request.args) for request in requests)
        answers = []
        outputs = generate(self.engine, prompts, self.batch_size)
        for request, output in zip(
            requests, _shown(outputs, len(requests), disable_tqdm), strict=True
        ):
            answers.append(output.text)
            self.cache_hook.add_partial("generate_until", request.args, output.text)
        return answers

    def _prompt(self, context: str, settings: dict[str, Any]) -> Prompt:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        stops, most = [stop for stop in wanted.pop("until") if stop], wanted.pop("max_gen_toks")
        if not wanted.pop("do_sample"):
            wanted = {
                name: value
                for name, value in wanted.items()
                if name not in ("temperature", "top_p", "top_k", "min_p")
            }
        foreign = sorted(set(wanted) - set(DRAWN))
        if foreign:
            raise RequestError(
                [
                    Problem(f"gen_kwargs {name}", repr(wanted[name]), "one of " + ", ".join(DRAWN))
                    for name in foreign
                ]
            )
        room = self.max_length - most
        if room < 1:
            raise RequestError(
                Problem("max_gen_toks", str(most), f"less than the context, {self.max_length}")
            )
        # A special token is never shown as text: it is a stop by its number.
        special = {stop: self.engine.tokenizer.special_id(stop) for stop in stops}
        params = SamplingParams(
            max_tokens=most,
            stop=tuple(stop for stop in stops if special[stop] is None),
            stop_token_ids=tuple(token for token in special.values() if token is not None),
            **wanted,
        )
        tokens = self.tok_encode(context)[-room:]
        return Prompt(tuple(tokens), params, len(tokens))


def _shown(results: Iterator[Any], count: int, quiet: bool) -> Iterator[Any]:
    return iter(tqdm(results, total=count, disable=quiet, desc="quantflow"))
