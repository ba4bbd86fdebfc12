"""The engine: requests in, tokens out, one step at a time.

A request's way: `submit` → `scheduler` (waits, runs, is preempted) → `model_runner` (its tokens
through the model) → `sampler` → `_append` (stop strings, lengths) → a `Token` from `step`.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantflow.checkpoints.checkpoint import Checkpoint, resolve_model
from quantflow.engine.block_manager import BlockManager
from quantflow.engine.grammar import Grammars, Matcher
from quantflow.engine.graphs import CudaRecorder, obstacle
from quantflow.engine.kv_cache import (
    KVFormat,
    KVPrecision,
    block_bytes,
    cache_bytes,
    kv_format,
    make_caches,
)
from quantflow.engine.load import Loaded, load_model, rank_config
from quantflow.engine.model import Model
from quantflow.engine.model_runner import ModelRunner, States
from quantflow.engine.ops import Ops
from quantflow.engine.request import Finish, Logprob, Request, SamplingParams, Sequence, Token
from quantflow.engine.sampler import NotANumber, logprob_of, sample
from quantflow.engine.scheduler import Limits, Scheduler, Step, Work
from quantflow.engine.tensor_parallel import Ranks, join
from quantflow.engine.text import Detokenizer, Text
from quantflow.errors import ModelError, Problem, RequestError, ResourceError, UserError
from quantflow.formats.reader import Weights, checkpoint_folder
from quantflow.machine import free_bytes, is_out_of_memory, resolve_device
from quantflow.models.config import DecoderConfig
from quantflow.tokenizers.tokenizer import has_tokenizer


class Mode(StrEnum):
    """exact: the same tokens and log-probabilities whatever the batch, arrival order, chunking,
    prefix hits or preemption. fast: products are computed in the way that is fastest for their
    size, so that last bits depend on what else is in the batch."""

    exact = "exact"
    fast = "fast"


class DType(StrEnum):
    """auto: the checkpoint's; bfloat16 for float16 on a CPU, which has no fast arithmetic for
    it."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class EngineConfig:
    """How a model is run.

    session_len: the longest context; None: the model's own. max_batch_size: sequences that run at
    once. step_tokens: tokens that go through the model in a step. cache_max_entry_count: the share
    of free memory that the KV cache may take; cache_bytes: its size instead.
    dialogue: a dialogue format by name, in place of the model's own. tp: tensor-parallel ranks.
    graphs: on a GPU, decodes run as CUDA graphs. check: the books of the cache are checked after
    every step.
    """

    mode: Mode = Mode.exact
    device: str = "auto"
    dtype: DType = DType.auto
    kv: KVPrecision = KVPrecision.auto
    session_len: int | None = None
    max_batch_size: int = 64
    step_tokens: int | None = None
    block_size: int = 64
    cache_max_entry_count: float | None = None
    cache_bytes: int | None = None
    prefix_cache: bool = True
    dialogue: str | None = None
    tp: int = 1
    graphs: bool = True
    check: bool = False

    def __post_init__(self) -> None:
        wrong = []
        # Python users write strings
        for name, kind in (("mode", Mode), ("dtype", DType), ("kv", KVPrecision)):
            try:
                object.__setattr__(self, name, kind(getattr(self, name)))
            except ValueError:
                wrong.append(Problem(name, repr(getattr(self, name)), " or ".join(kind)))
        for name in (
            "session_len",
            "step_tokens",
            "cache_bytes",
            "max_batch_size",
            "block_size",
            "tp",
        ):
            value = getattr(self, name)
            optional = name in ("session_len", "step_tokens", "cache_bytes")
            if not (value is None and optional) and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                wrong.append(Problem(name, repr(value), "an integer of at least 1"))
        if self.device not in ("auto", "cpu", "cuda"):
            wrong.append(Problem("device", repr(self.device), "auto, cpu or cuda"))
        for name in ("prefix_cache", "graphs", "check"):
            if not isinstance(getattr(self, name), bool):
                wrong.append(Problem(name, repr(getattr(self, name)), "True or False"))
        faulty = {problem.where for problem in wrong}
        if "block_size" not in faulty and (
            self.block_size < 16 or self.block_size & (self.block_size - 1)
        ):
            wrong.append(Problem("block_size", str(self.block_size), "a power of two, at least 16"))
        share = self.cache_max_entry_count
        if share is not None and not (isinstance(share, (int, float)) and 0 < share <= 1):
            wrong.append(
                Problem(
                    "cache_max_entry_count",
                    repr(share),
                    "a share of the free memory, more than 0 and at most 1",
                )
            )
        if (
            self.step_tokens is not None
            and not faulty & {"step_tokens", "max_batch_size"}
            and self.step_tokens <= self.max_batch_size
        ):
            wrong.append(
                Problem(
                    "step_tokens",
                    str(self.step_tokens),
                    f"more than max_batch_size, {self.max_batch_size}",
                )
            )
        if wrong:
            raise UserError(wrong)


SHARE = {"cuda": 0.8, "cpu": 0.25}  # of free memory for the cache
STEP_TOKENS = {"cuda": 2048, "cpu": 512}


def default_step_tokens(device: str, batch: int, block_size: int) -> int:
    """Tokens that go through the model in a step, where `EngineConfig.step_tokens` does not say.
    device: `cuda` or `cpu`."""
    return max(STEP_TOKENS[device], batch + block_size)


TOO_LONG = "context_length_exceeded"  # the code of a request that the context cannot hold
# the words that clients know it by who see no code: they leave out what was said long ago
SHORTEN = "The prompt is too long"


@dataclass
class Session:
    """A dialogue that is kept between turns: its tokens, and the cache blocks that hold them. turn:
    the request that continues it."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    turn: str | None = None


@dataclass(frozen=True)
class Occupancy:
    """running, waiting: sequences. used_blocks: of the cache's `blocks`, those that belong to
    somebody."""

    running: int
    waiting: int
    used_blocks: int
    blocks: int
    sessions: int
    preemptions: int


@dataclass(frozen=True)
class _Drawn:
    """A token for a sequence, not yet a part of it. parent: whose sibling the sequence begins
    as."""

    sequence: Sequence
    parent: Sequence | None
    token: int | NotANumber
    logprob: Logprob | None


@dataclass(frozen=True)
class _Checked:
    """A request that can be queued. tokens: the session's history, of `history` tokens, and the
    prompt. id: None: any."""

    tokens: tuple[int, ...]
    history: int
    params: SamplingParams
    id: str | None
    priority: int
    session: int | None
    matcher: Matcher | None


class Engine:
    """Runs a model directory, an artifact of QuantFlow's or another checkpoint in a format that it
    reads.

    Not safe for several threads at once: one thread submits, steps and aborts. Raises UserError
    where the model or the configuration is wrong, ResourceError where memory does not suffice, or a
    tensor-parallel rank has gone. progress: called after each layer that is loaded or run.
    notes: what is odd about the checkpoint, and what was made of it.
    kv: in place of what `config.kv` finds in the model's directory. ranks: of a follower; a leader
    starts its own.
    """

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig | None = None,
        progress: Callable[[], None] = lambda: None,
        *,
        kv: KVFormat | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config = config or EngineConfig()
        self.path = resolve_model(str(model))
        device = torch.device(resolve_device(config.device))
        if config.tp > 1:
            # What is wrong with it is said before other processes are started.
            rank_config(Checkpoint(checkpoint_folder(self.path)).config, config.tp)
            ranks = ranks or join(config.tp, device)
            device = ranks.device
        self.leads = ranks is not None and ranks.leads
        self.ranks = ranks
        self._tell(None, model=str(self.path.resolve()), config=asdict(config))
        weights = self._weights()
        self.notes = weights.checkpoint.remarks
        self.architecture, self.model_config = (
            weights.checkpoint.architecture,
            rank_config(weights.checkpoint.config, config.tp),
        )
        self.ops = Ops(
            device,
            _dtype(config.dtype, self.model_config, device),
            config.mode == Mode.exact,
            ranks,
        )
        self.context = _context(config, self.model_config)
        folder = weights.checkpoint.path
        texts = weights.checkpoint.tokenizer_path
        self.text = Text(texts, config.dialogue) if has_tokenizer(texts) else None
        found = weights.checkpoint
        in_folder = found.config if found.tp != config.tp else self.model_config
        self.kv: KVFormat = kv or kv_format(
            config.kv, folder, in_folder, self.architecture.prefix, weights.kv_parameters()
        )
        if ranks and found.tp != config.tp:  # the files hold all heads
            self.kv = self.kv.part(ranks.rank, ranks.size)
        unused = weights.kv_scales if weights.kv_scales != "int8" else None
        self._kv_way = (
            f"{self.kv} (the checkpoint's own scales, {unused}, are not used)"
            if unused
            else str(self.kv)
        )
        with torch.inference_mode():
            self.loaded: Loaded = load_model(weights, self.ops, progress)
            blocks = self._block_count()
            self.caches = make_caches(
                self.model_config, self.kv, self.ops.dtype, device, blocks, config.block_size
            )
        self.blocks = BlockManager(blocks, config.block_size, prefix_cache=config.prefix_cache)
        step_tokens = config.step_tokens or default_step_tokens(
            device.type, config.max_batch_size, config.block_size
        )
        self.scheduler = Scheduler(
            self.blocks,
            Limits(config.max_batch_size, step_tokens, self.context),
            self._drop_session,
        )
        self.runner = ModelRunner(self.loaded.model, self.caches, config.block_size, progress)
        self.why_eager = _why_eager(config, self.loaded.model)
        if not self.why_eager:
            self.runner.record_decodes(config.max_batch_size, self.context, CudaRecorder())
        ends = self.text.end_tokens if self.text else frozenset()
        # the model can make no others
        self.end_tokens = frozenset(t for t in ends if t < self.model_config.vocabulary)
        self.grammars = (
            Grammars(self.text.tokenizer, self.model_config.vocabulary, self.end_tokens)
            if self.text
            else None
        )
        self.sessions: dict[int, Session] = {}
        self._requests: dict[str, list[Sequence]] = {}
        self._detokenizers: dict[Sequence, Detokenizer] = {}
        self._prompt_logprobs: dict[str, list[Logprob | None]] = {}
        self._arrivals = itertools.count()

    def _weights(self) -> Weights:
        """The whole checkpoint, or this rank's files where the artifact has them."""
        tp = self.config.tp
        own = (
            checkpoint_folder(self.path)
            / f"tp{tp}"
            / f"rank-{self.ranks.rank if self.ranks else 0}"
        )
        return Weights(own, tp=tp) if tp > 1 and own.is_dir() else Weights(self.path)

    def _tell(self, call: str | None, **details: Any) -> None:
        """Makes the other ranks do what this one, the leader, is about to do."""
        if self.leads and self.ranks:
            self.ranks.tell({**details, **({"call": call} if call else {})})

    def close(self) -> None:
        """Ends the other ranks."""
        if self.leads and self.ranks:
            self.ranks.end()

    # --- what it is

    def describe(self) -> dict[str, str]:
        """What runs, for the line that is printed at start."""
        ways = ", ".join(f"{count} × {way}" for way, count in self.loaded.ways.items())
        tokens = self.blocks.count * self.blocks.size
        return {
            "mode": str(self.config.mode),
            "device": str(self.ops.device),
            "dtype": str(self.ops.dtype).removeprefix("torch."),
            "kernels": self.ops.way,
            **(
                {"decodes": f"eager: {self.why_eager}" if self.why_eager else "CUDA graphs"}
                if self.ops.cuda
                else {}
            ),
            "linears": ways,
            "weights": f"{self.loaded.weight_bytes / 2**20:.0f} MiB",
            "KV cache": (
                f"{self._kv_way}, {cache_bytes(self.caches) / 2**20:.0f} MiB for {tokens} tokens"
            ),
            "context": f"{self.context} tokens",
        }

    def _block_count(self) -> int:
        config, size = self.config, self.config.block_size
        each = block_bytes(self.model_config, self.kv, self.ops.dtype, size)
        one = -(-self.context // size)
        share = config.cache_max_entry_count or SHARE[self.ops.device.type]
        if self.ops.cuda:
            torch.cuda.empty_cache()  # what loading took is free again
        limit = config.cache_bytes or int(free_bytes(self.ops.device) * share)
        count = min(limit // each, one * config.max_batch_size)
        if self.ranks:  # free memory differs between them, and all must decide the same
            count = self.ranks.least(count)
        if count < 1:
            raise ResourceError(
                Problem(
                    "KV cache", f"{limit} bytes", f"at least {each} for one block of {size} tokens"
                )
            )
        return count

    @property
    def room(self) -> int:
        """Tokens that one sequence may have, its answer included: the context, or what the cache
        holds where that is less."""
        return min(self.context, self.blocks.count * self.blocks.size)

    @property
    def room_is(self) -> str:
        """What `room` comes from, for messages."""
        return "the model's context" if self.room == self.context else "what the KV cache holds"

    def occupancy(self) -> Occupancy:
        """How busy it is. Any thread may ask: the numbers are each right, if not of one moment."""
        scheduler, blocks = self.scheduler, self.blocks
        running, waiting, sessions = (
            len(scheduler.running),
            len(scheduler.waiting),
            len(self.sessions),
        )
        return Occupancy(
            running, waiting, blocks.used_blocks, blocks.count, sessions, scheduler.preemptions
        )

    # --- requests

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def submit(
        self,
        prompt: str | Tokens[int],
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        priority: int = 0,
        session: int | None = None,
    ) -> Request:
        """Queues a request and returns it. session: the prompt continues that session's history,
        and what comes of it is kept there.

        Raises RequestError for what can never be served: the reason is in it.
        """
        return self._queue(self._checked(prompt, params or SamplingParams(), id, priority, session))

    def submit_all(
        self,
        prompts: Tokens[str | Tokens[int]],
        params: SamplingParams | Tokens[SamplingParams] | None = None,
        *,
        priority: int = 0,
    ) -> list[Request]:
        """Queues a request for each prompt, or none at all: RequestError has everything that is
        wrong with any of them. params: one for all, or one each."""
        each = (
            [params or SamplingParams()] * len(prompts)
            if params is None or isinstance(params, SamplingParams)
            else list(params)
        )
        if len(each) != len(prompts):
            raise RequestError(
                Problem("params", f"{len(each)} of them", f"one, or {len(prompts)}: one a prompt")
            )
        checked, wrong = list[_Checked](), dict[Problem, None]()
        for at, (prompt, its) in enumerate(zip(prompts, each, strict=True)):
            try:
                checked.append(self._checked(prompt, its, None, priority, None))
            except RequestError as error:
                wrong |= dict.fromkeys(
                    replace(p, where=_of_several(p.where, at)) if prompts[1:] else p
                    for p in error.problems
                )
        if wrong:
            raise RequestError(list(wrong))
        queued: list[Request] = []
        try:
            for one in checked:
                queued.append(self._queue(one))
        except BaseException:
            for request in queued:
                self.abort(request.id)
            raise
        return queued

    def _checked(
        self,
        prompt: str | Tokens[int],
        params: SamplingParams,
        id: str | None,
        priority: int,
        session: int | None,
    ) -> _Checked:
        """Changes nothing. Raises RequestError."""
        if wrong := _wrong_kinds(prompt, id, priority, session):
            raise RequestError(wrong)
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(
                prompt, special=not (session in self.sessions and self.sessions[session].tokens)
            )
        history = self._history(session, params)
        tokens = (*history, *prompt)
        if problems := self._problems(id, tokens, params):
            raise RequestError(problems)
        return _Checked(tokens, len(history), params, id, priority, session, self._matcher(params))

    def _queue(self, checked: _Checked) -> Request:
        id, tokens, session = checked.id, checked.tokens, checked.session
        arrival = next(self._arrivals)
        while id is None or (checked.id is None and id in self._requests):
            id = f"request-{next(self._arrivals)}"
        seed = checked.params.seed
        params = replace(
            checked.params, seed=seed % 2**64 if seed is not None else secrets.randbits(64)
        )
        new = list(tokens[checked.history :])
        self._tell(
            "submit",
            prompt=new,
            params={**asdict(params)},
            id=id,
            priority=checked.priority,
            session=session,
        )
        wanted = self.context if params.max_tokens is None else params.max_tokens
        most = max(0, min(wanted, self.room - len(tokens)))
        # The last token never goes through the model.
        stretch = self.runner.rotary.stretch(len(tokens) + most - 1)
        request = Request(id, tokens, params, most, arrival, checked.priority, stretch, session)
        sequence = Sequence(
            request,
            0,
            list(tokens) if most else list(tokens[:-1]),
            forks=params.n > 1,
            matcher=checked.matcher,
        )
        self._requests[id] = [sequence]
        if session is not None:
            self.sessions.setdefault(session, Session()).turn = id
        if params.prompt_logprobs is not None:
            self._prompt_logprobs[id] = [None] * len(tokens)
        self.scheduler.add(sequence)
        return request

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        if params.grammar is None:
            return None
        if self.grammars is None:
            raise RequestError(
                Problem(
                    "grammar", "a model without a tokenizer", "one that tells what a token says"
                )
            )
        return self.grammars.matcher(params.grammar)

    @property
    def tokenizer(self) -> Text:
        """Raises RequestError for a model without one."""
        if self.text is None:
            expected = (
                "tokenizer.json, tokenizer.model, vocab.json or qwen.tiktoken, to read text with"
            )
            hint = (
                "Put the tokenizer's files beside the weights; without them, prompts are token ids"
                " (in Python, or over HTTP)"
            )
            raise RequestError(Problem(str(self.path), "no tokenizer", expected, hint))
        return self.text

    def _problems(
        self, id: str | None, tokens: tuple[int, ...], params: SamplingParams
    ) -> list[Problem]:
        vocabulary, found, room = self.model_config.vocabulary, list[Problem](), self.room
        why = self.room_is
        if id in self._requests:
            found.append(Problem("id", repr(id), "an id that no running request has"))
        if not tokens:
            found.append(Problem("prompt", "no tokens", "at least one"))
        if params.max_tokens == 0:
            if not 2 <= len(tokens) <= room + 1:
                found.append(
                    Problem(
                        "prompt",
                        f"{len(tokens)} tokens to score",
                        f"2 to {room + 1}: {why} is {room}",
                        code=TOO_LONG if tokens[2:] else "",
                    )
                )
        elif len(tokens) >= room:
            found.append(
                Problem(
                    "prompt",
                    f"{len(tokens)} tokens",
                    f"fewer than {room}, {why}",
                    SHORTEN,
                    TOO_LONG,
                )
            )
        elif params.max_tokens is not None and len(tokens) + params.max_tokens > room:
            asked = f"{params.max_tokens} after a prompt of {len(tokens)} tokens"
            found.append(
                Problem(
                    "max_tokens",
                    asked,
                    f"at most {room - len(tokens)}: {why} is {room}",
                    code=TOO_LONG,
                )
            )
        named = [
            ("prompt", tokens if len(tokens) <= room + 1 else ()),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ]
        for where, ids in named:
            wrong = sorted({t for t in ids if not 0 <= t < vocabulary})
            if wrong:
                found.append(Problem(where, f"token {wrong[0]}", f"ids from 0 to {vocabulary - 1}"))
        if params.prompt_logprobs_from and params.prompt_logprobs_from >= len(tokens):
            expected = f"less than the prompt's {len(tokens)} tokens"
            found.append(
                Problem("prompt_logprobs_from", str(params.prompt_logprobs_from), expected)
            )
        if params.n > self.config.max_batch_size:
            found.append(
                Problem(
                    "n",
                    str(params.n),
                    f"at most {self.config.max_batch_size}, the sequences that run at once",
                )
            )
        special = [
            stop
            for stop in params.stop
            if params.skip_special_tokens
            and self.text
            and self.text.tokenizer.token_to_id(stop) is not None
            and not self._shows(stop)
        ]
        if special:
            hint = "Name it in stop_token_ids"
            found.append(
                Problem(
                    "stop", repr(special[0]), "text: a special token is never shown as such", hint
                )
            )
        if params.stop and self.text is None:
            found.append(
                Problem("stop", "strings, and the model has no tokenizer", "stop_token_ids")
            )
        return found

    def _shows(self, token: str) -> bool:
        """Whether a token's name is what its text is."""
        number = self.tokenizer.tokenizer.token_to_id(token)
        return number is not None and self.tokenizer.decode([number]) != ""

    def _history(self, session: int | None, params: SamplingParams) -> list[int]:
        if session is None:
            return []
        known = self.sessions.get(session, Session())
        if known.turn is not None:
            raise RequestError(
                Problem(f"session {session}", "a turn is running", "one turn at a time")
            )
        if params.n > 1:
            raise RequestError(
                Problem("n", str(params.n), "1 in a session, which goes on from one text")
            )
        if params.max_tokens == 0:
            raise RequestError(
                Problem("max_tokens", "0", "at least 1 in a session, which goes on from its text")
            )
        return known.tokens

    def abort(self, id: str) -> list[Token]:
        """Takes a request out, if it is there, and gives its blocks back at once."""
        if id not in self._requests:
            return []
        self._tell("abort", id=id)
        return [
            token
            for s in list(self._requests.get(id, ()))
            for token in self._give_up(s, Finish.abort)
        ]

    # --- sessions

    def rewind(self, session: int, tokens: int) -> None:
        """Takes a session back to its first `tokens` tokens. Raises RequestError for one that is
        not known, or busy."""
        known = self._idle(session)
        if not 0 <= tokens <= len(known.tokens):
            raise RequestError(
                Problem(
                    f"session {session}",
                    f"rewound to {tokens} tokens",
                    f"at most its {len(known.tokens)}",
                )
            )
        self._tell("rewind", session=session, tokens=tokens)
        keep = self.blocks.blocks_for(tokens)
        self.blocks.release(known.blocks[keep:])
        known.tokens, known.blocks = known.tokens[:tokens], known.blocks[:keep]

    def end(self, session: int) -> None:
        """Forgets a session. Raises RequestError for one that is not known, or busy."""
        known = self._idle(session)
        self._tell("end", session=session)
        self.blocks.release(known.blocks)
        del self.sessions[session]

    def _idle(self, session: int) -> Session:
        known = self.sessions.get(session)
        if known is None:
            raise RequestError(
                Problem(f"session {session}", "not known", "a session that has had a turn")
            )
        if known.turn is not None:
            raise RequestError(Problem(f"session {session}", "a turn is running", "abort it first"))
        return known

    def _drop_session(self) -> bool:
        """Gives back the blocks of a session, the one whose last turn was the longest ago; its next
        turn finds or recomputes them. A turn that runs owns its blocks itself."""
        for session in self.sessions.values():  # in the order of their last turns
            if session.blocks:
                self.blocks.release(session.blocks)
                session.blocks = []
                return True
        return False

    # --- steps

    def step(self) -> list[Token]:
        """Carries all running sequences on, and returns what came of it; [] where there was nothing
        to do."""
        if not self.has_work:
            return []
        self._tell("step")
        step = self.scheduler.schedule()
        if not step.work:
            return []
        try:
            states = self.runner.run(step)
            ending = [
                i
                for i, work in enumerate(step.work)
                if work.ends and work.sequence.request.most_tokens
            ]
            logits = self.runner.logits(states.last(ending)) if ending else None
            self._score_prompts(step.work, states)
            drawn = (
                self._draw([step.work[i].sequence for i in ending], logits)
                if logits is not None
                else []
            )
        except (MemoryError, RuntimeError) as error:
            # other ranks wait for what this one did not compute
            if not is_out_of_memory(error) or self.ranks:
                raise
            # The largest share of the step is the likeliest cause; the others go on in the next
            # one.
            failed = max(step.work, key=lambda work: work.count).sequence
            return self._give_up(
                failed, Finish.error, f"out of memory with {len(step.work)} sequences in a step"
            )
        scored = [
            work.sequence
            for work in step.work
            if work.ends and not work.sequence.request.most_tokens
        ]
        for work in step.work:
            self.scheduler.advance(work)
        found = self._settle(drawn) + [self._end_scored(sequence) for sequence in scored]
        if self.config.check and (problems := self.problems()):
            raise RuntimeError("the books of the KV cache are wrong: " + "; ".join(problems))
        return found

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> list[_Drawn]:
        """A next token for each sequence, and first ones for the siblings of those whose prompt is
        done. Changes nothing."""
        wanted: list[tuple[Sequence, Sequence | None, int]] = [
            (s, None, row) for row, s in enumerate(sequences)
        ]
        for row, s in enumerate(sequences):
            if s.forks:  # the same logits for all
                matchers = [s.matcher and s.matcher.copy() for _ in range(1, s.request.params.n)]
                wanted += [
                    (Sequence(s.request, i, list(s.tokens), matcher=m), s, row)
                    for i, m in enumerate(matchers, 1)
                ]
        if len(wanted) > len(sequences):
            logits = logits[torch.tensor([row for _, _, row in wanted], device=logits.device)]
        tokens = sample(
            logits,
            [s for s, _, _ in wanted],
            [s.request.params.seed or 0 for s, _, _ in wanted],
            self.end_tokens,
        )
        found = []
        for (sequence, parent, _), token, row in zip(wanted, tokens, logits, strict=True):
            count = sequence.request.params.logprobs
            scored = (
                None
                if count is None or isinstance(token, NotANumber)
                else logprob_of(row, token, count)
            )
            found.append(_Drawn(sequence, parent, token, scored))
        return found

    def _settle(self, drawn: list[_Drawn]) -> list[Token]:
        for d in drawn:  # before their parent can end, and take its blocks with it
            if d.parent is not None:
                d.parent.forks = False
                self.scheduler.fork(d.parent, d.sequence)
                self._requests[d.sequence.request.id].append(d.sequence)
        return [
            (
                self._finish(d.sequence, _fault(d.sequence), str(d.token))
                if isinstance(d.token, NotANumber)
                else self._append(d.sequence, d.token, d.logprob)
            )
            for d in drawn
        ]

    def _append(self, sequence: Sequence, token: int, logprob: Logprob | None) -> Token:
        params, first = sequence.request.params, not sequence.generated
        sequence.tokens.append(token)
        free = sequence.generated >= params.min_tokens
        text, reason = "", ""
        finish: Finish | None = None
        stop: str | int | None = None
        ends = (
            token in self.end_tokens and not params.ignore_eos
        ) or token in params.stop_token_ids
        if self.text and (params.include_stop or not (ends and free)):
            if sequence not in self._detokenizers:
                self._detokenizers[sequence] = Detokenizer(
                    self.text,
                    sequence.request.prompt,
                    params.stop,
                    special=not params.skip_special_tokens,
                    whole_stops=params.include_stop,
                )
            try:
                text = self._detokenizers[sequence].add(token, search=free)
                stop = self._detokenizers[sequence].stop
            except ModelError as error:  # the tokenizer does not know what its tokens say: this text is over, and the others are not
                del self._detokenizers[sequence]
                finish, reason = Finish.error, str(error)
            if stop is not None:
                finish = Finish.stop
        if finish == Finish.error:
            pass
        elif ends and free:
            finish = Finish.stop
        elif sequence.matcher and finish is None:
            sequence.matcher.add(token)
            reason = sequence.matcher.problem
            if reason or sequence.matcher.ended:
                finish = _fault(sequence) if reason else Finish.stop
        if finish is None and sequence.generated >= sequence.request.most_tokens:
            finish = Finish.length
        prompt_logprobs = (
            tuple(self._prompt_logprobs.get(sequence.request.id, ()))
            if first and not sequence.index
            else ()
        )
        if finish is None:
            return Token(
                sequence.request.id,
                sequence.index,
                token,
                text,
                logprob,
                prompt_logprobs=prompt_logprobs,
                cached=sequence.cached,
            )
        ended = self._finish(sequence, finish, reason)
        if stop is None and ends and free and (token not in self.end_tokens or params.ignore_eos):
            stop = token
        return replace(
            ended,
            token=token,
            text=text + ended.text,
            logprob=logprob,
            stop=stop,
            prompt_logprobs=prompt_logprobs,
        )

    def _give_up(self, sequence: Sequence, finish: Finish, reason: str = "") -> list[Token]:
        """Ends a sequence, and the siblings that would have begun where its prompt ends."""
        unborn = range(1, sequence.request.params.n) if sequence.forks else ()
        ended = self._finish(sequence, finish, reason)
        return [ended, *(replace(ended, index=index, text="") for index in unborn)]

    def _finish(self, sequence: Sequence, finish: Finish, reason: str = "") -> Token:
        request = sequence.request
        blocks = self.scheduler.remove(sequence)
        detokenizer = self._detokenizers.pop(sequence, None)
        siblings = self._requests[request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[request.id]
            self._prompt_logprobs.pop(request.id, None)
        if request.session is not None:
            self._keep(request.session, sequence, blocks)
        else:
            self.blocks.release(blocks)
        text = detokenizer.finish() if detokenizer else ""
        return Token(
            request.id,
            sequence.index,
            None,
            text,
            finish=finish,
            reason=reason,
            cached=sequence.cached,
        )

    def _keep(self, number: int, sequence: Sequence, blocks: list[int]) -> None:
        """The turn is over: its tokens and blocks are the session's, which is now the last to be
        dropped."""
        session = self.sessions.pop(number)
        self.blocks.release(session.blocks)
        session.tokens, session.blocks, session.turn = list(sequence.tokens), blocks, None
        self.sessions[number] = session

    def _score_prompts(self, step: list[Work], states: States) -> None:
        """Notes the log-probabilities of the prompts' tokens that follow those of `step`, whose
        `states` are."""
        # whose token, its place in the prompt, what the head reads for it
        wanted: list[tuple[Sequence, int, Tensor]] = []
        for i, work in enumerate(step):
            sequence, params = work.sequence, work.sequence.request.params
            if params.prompt_logprobs is None or sequence.index:
                continue
            h = states.of(i)
            first = work.start + work.count - len(h) + 1  # the token that the first row predicts
            places = range(
                max(first, params.prompt_logprobs_from), min(first + len(h), sequence.prompt_length)
            )
            wanted += [(sequence, place, h[place - first]) for place in places]
        rows = self.runner.prompt_chunks(len(wanted))
        for start in range(0, len(wanted), rows):
            part = wanted[start : start + rows]
            for (sequence, place, _), row in zip(
                part, self.runner.logits(torch.stack([h for _, _, h in part])), strict=True
            ):
                params, found = sequence.request.params, self._prompt_logprobs[sequence.request.id]
                found[place] = logprob_of(
                    row, sequence.request.prompt[place], params.prompt_logprobs or 0
                )

    def _end_scored(self, sequence: Sequence) -> Token:
        """Ends a request for nothing but its prompt's log-probabilities."""
        found = tuple(self._prompt_logprobs[sequence.request.id])
        return replace(self._finish(sequence, Finish.length), prompt_logprobs=found)

    @torch.inference_mode()
    def hidden_states(self, tokens: Tokens[int]) -> Tensor:
        """What the head reads after each token of a text, `[L, H]`, for measurements; nothing is
        kept of it. `runner.logits` reads it.

        Raises RequestError for a text that does not fit.
        """
        if problems := self._problems("", tuple(tokens[:-1]), SamplingParams()):
            raise RequestError(problems)
        self._tell("hidden_states", tokens=list(tokens))
        request = Request(
            "",
            tuple(tokens),
            SamplingParams(prompt_logprobs=0),
            0,
            0,
            rope_length=self.runner.rotary.stretch(len(tokens)),
        )
        sequence, found = Sequence(request, 0, list(tokens)), []
        needed = self.blocks.blocks_for(len(tokens))
        while not self.blocks.can_allocate(needed):
            if not self._drop_session():
                raise ResourceError(
                    Problem(
                        "KV cache",
                        f"{self.blocks.free_blocks} free blocks",
                        f"{needed} for {len(tokens)} tokens",
                    )
                )
        sequence.blocks = [self.blocks.allocate() for _ in range(needed)]
        try:
            while sequence.pending:
                work = Work(sequence, min(sequence.pending, self.scheduler.limits.tokens))
                found.append(self.runner.run(Step([work])).of(0))
                sequence.computed += work.count
        finally:
            self.blocks.release(sequence.blocks)
        return torch.cat(found)

    def problems(self) -> list[str]:
        """What is wrong with the books of the cache: [] unless blocks leak."""
        owned = [s.blocks for s in self.scheduler.sequences()] + [
            s.blocks for s in self.sessions.values()
        ]
        return self.blocks.problems(owned)

    def tokens(self) -> Iterator[Token]:
        """Steps until nothing is left to do."""
        while self.has_work:
            yield from self.step()


def _of_several(where: str, at: int) -> str:
    """Where a problem of one of several requests is: which prompt, or what all of them share."""
    return f"prompt[{at}]" if where == "prompt" else where


def _wrong_kinds(prompt: object, id: object, priority: object, session: object) -> list[Problem]:
    """Arguments that are not what they are typed as."""
    found = []
    if not isinstance(prompt, str):
        items = prompt if isinstance(prompt, (list, tuple)) else None
        if items is None or not all(isinstance(t, int) and not isinstance(t, bool) for t in items):
            found.append(Problem("prompt", repr(prompt)[:80], "text, or a list of token ids"))
    if not (id is None or isinstance(id, str)):
        found.append(Problem("id", repr(id)[:80], "text"))
    for name, value in (("priority", priority), ("session", session)):
        if (value is not None or name == "priority") and (
            not isinstance(value, int) or isinstance(value, bool)
        ):
            found.append(Problem(name, repr(value)[:80], "an integer"))
    return found


def _fault(sequence: Sequence) -> Finish:
    """Of a sequence for which no token is possible."""
    matcher = sequence.matcher
    return Finish.grammar if matcher and matcher.problem and not matcher.panicked else Finish.error


def _why_eager(config: EngineConfig, model: Model) -> str:
    """Why decodes are not recorded as CUDA graphs; "" where they are."""
    if not model.ops.cuda:
        return "no GPU"
    return obstacle(model) if config.graphs else "asked for"


def _dtype(asked: DType, config: DecoderConfig, device: torch.device) -> torch.dtype:
    if asked != DType.auto:
        return getattr(torch, asked.value)
    return getattr(
        torch, "bfloat16" if config.dtype == "float16" and device.type == "cpu" else config.dtype
    )


def _context(config: EngineConfig, model: DecoderConfig) -> int:
    asked = config.session_len
    if asked is None:
        return model.context
    if asked > model.context and not model.stretches:
        raise UserError(
            Problem("session_len", str(asked), f"at most the model's {model.context} positions")
        )
    return asked
