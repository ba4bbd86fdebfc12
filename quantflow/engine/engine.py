"""The engine: requests in, tokens out, one step at a time.

A request's way:

1. `Engine.submit`: the `admission` makes token ids of its text, puts its session's history before
   them (`sessions`), and holds it against what model and cache can do. It waits in the `scheduler`
   as a `Sequence`.
2. `Engine.step`: the `scheduler` chooses whose tokens go through the model, and gives them blocks
   of the cache (`block_manager`).
3. The `model_runner` takes them through the `model`; the `sampler` draws a token for each sequence
   whose last one went through.
4. `postprocess` adds the token to its sequence and says what text can be shown, and whether it
   ends. Then its blocks go back, or to its session.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantflow.checkpoints.checkpoint import Checkpoint, resolve_model
from quantflow.engine.admission import Admission, Admitted
from quantflow.engine.block_manager import BlockManager
from quantflow.engine.config import EngineConfig, Mode, default_step_tokens
from quantflow.engine.grammar import Grammars
from quantflow.engine.graphs import CudaRecorder, why_eager
from quantflow.engine.kv_cache import KVFormat, block_count, cache_bytes, kv_format, make_caches
from quantflow.engine.load import Loaded, load_model, open_weights, rank_config
from quantflow.engine.model_runner import ModelRunner
from quantflow.engine.ops import Ops
from quantflow.engine.postprocess import append, fault, last_token
from quantflow.engine.prompt_logprobs import score_prompts
from quantflow.engine.request import Finish, Request, SamplingParams, Sequence, Token
from quantflow.engine.sampler import Drawn, NotANumber, draw
from quantflow.engine.scheduler import Limits, Scheduler, Step, Work
from quantflow.engine.sessions import Sessions
from quantflow.engine.tensor_parallel import Ranks, join
from quantflow.engine.text import Text
from quantflow.errors import Problem, RequestError, ResourceError
from quantflow.formats.reader import Weights, checkpoint_folder
from quantflow.machine import is_out_of_memory, resolve_device
from quantflow.tokenizers.load import has_tokenizer


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
            # What is wrong with it is reported before other processes are started.
            rank_config(Checkpoint(checkpoint_folder(self.path)).config, config.tp)
            ranks = ranks or join(config.tp, device)
            device = ranks.device
        self.ranks = ranks
        self._tell(None, model=str(self.path.resolve()), config=asdict(config))

        # what is known before a weight is read
        weights = open_weights(self.path, ranks.rank if ranks else 0, config.tp)
        checkpoint = weights.checkpoint
        self.notes, self.architecture = checkpoint.remarks, checkpoint.architecture
        self.model_config = rank_config(checkpoint.config, config.tp)
        dtype = config.dtype_of(self.model_config, device)
        self.ops = Ops(device, dtype, config.mode == Mode.exact, ranks)
        self.context = config.context_of(self.model_config)
        folder = checkpoint.tokenizer_path
        self.text = Text(folder, config.dialogue) if has_tokenizer(folder) else None
        self.kv: KVFormat = kv or self._kv_format(weights)
        if ranks and checkpoint.tp != config.tp:  # the files hold all heads
            self.kv = self.kv.part(ranks.rank, ranks.size)
        unused = weights.kv_scales if weights.kv_scales != "int8" else None
        self._kv_note = f" (the checkpoint's own scales, {unused}, are not used)" if unused else ""

        # the model and its cache
        with torch.inference_mode():
            self.loaded: Loaded = load_model(weights, self.ops, progress)
            size = config.block_size
            count = block_count(config, self.model_config, self.kv, self.context, self.ops)
            self.caches = make_caches(self.model_config, self.kv, dtype, device, count, size)
        self.blocks = BlockManager(count, size, prefix_cache=config.prefix_cache)
        self.runner = ModelRunner(self.loaded.model, self.caches, size, progress)
        self.why_eager = why_eager(self.loaded.model, graphs=config.graphs)
        if not self.why_eager:
            self.runner.record_decodes(config.max_batch_size, self.context, CudaRecorder())

        # who runs
        self.sessions = Sessions(self.blocks)
        step_tokens = config.step_tokens or default_step_tokens(
            device.type, config.max_batch_size, size
        )
        limits = Limits(config.max_batch_size, step_tokens, self.context)
        self.scheduler = Scheduler(self.blocks, limits, self.sessions.give_back)
        self._requests: dict[str, list[Sequence]] = {}
        self._arrivals = itertools.count()

        # what may be asked
        vocabulary = self.model_config.vocabulary
        ends = self.text.end_tokens if self.text else frozenset()
        self.end_tokens = frozenset(t for t in ends if t < vocabulary)  # the model makes no others
        self.grammars = (
            Grammars(self.text.tokenizer, vocabulary, self.end_tokens) if self.text else None
        )
        self.admission = Admission(
            folder=self.path,
            text=self.text,
            grammars=self.grammars,
            vocabulary=vocabulary,
            limits=limits,
            blocks=self.blocks,
            sessions=self.sessions,
            running=self._requests,
        )

    def _kv_format(self, weights: Weights) -> KVFormat:
        checkpoint = weights.checkpoint
        in_files = checkpoint.config if checkpoint.tp != self.config.tp else self.model_config
        prefix, own = self.architecture.prefix, weights.kv_parameters()
        return kv_format(self.config.kv, checkpoint.path, in_files, prefix, own)

    def _tell(self, call: str | None, **details: Any) -> None:
        """Makes the other ranks do what this one, the leader, is about to do."""
        if self.ranks and self.ranks.leads:
            self.ranks.tell({**details, **({"call": call} if call else {})})

    def close(self) -> None:
        """Ends the other ranks."""
        if self.ranks and self.ranks.leads:
            self.ranks.end()

    # --- what it is

    def describe(self) -> dict[str, str]:
        """What runs, for the line that is printed at start."""
        ways = ", ".join(f"{count} × {way}" for way, count in self.loaded.ways.items())
        tokens = self.blocks.count * self.blocks.size
        cache = f"{cache_bytes(self.caches) / 2**20:.0f} MiB for {tokens} tokens"
        decodes = f"eager: {self.why_eager}" if self.why_eager else "CUDA graphs"
        return {
            "mode": str(self.config.mode),
            "device": str(self.ops.device),
            "dtype": str(self.ops.dtype).removeprefix("torch."),
            "kernels": self.ops.way,
            **({"decodes": decodes} if self.ops.cuda else {}),
            "linears": ways,
            "weights": f"{self.loaded.weight_bytes / 2**20:.0f} MiB",
            "KV cache": f"{self.kv}{self._kv_note}, {cache}",
            "context": f"{self.context} tokens",
        }

    @property
    def tokenizer(self) -> Text:
        """Raises RequestError for a model without one."""
        return self.admission.tokenizer

    @property
    def room(self) -> int:
        """Tokens that one sequence may have, its answer included."""
        return self.admission.room

    @property
    def room_is(self) -> str:
        """What `room` comes from, for messages."""
        return self.admission.room_is

    def occupancy(self) -> Occupancy:
        """How busy it is. Any thread may ask: the numbers are each right, if not of one moment."""
        scheduler, blocks = self.scheduler, self.blocks
        return Occupancy(
            len(scheduler.running),
            len(scheduler.waiting),
            blocks.used_blocks,
            blocks.count,
            len(self.sessions),
            scheduler.preemptions,
        )

    def problems(self) -> list[str]:
        """What is wrong with the books of the cache: [] unless blocks leak."""
        owned = [sequence.blocks for sequence in self.scheduler.sequences()]
        owned += [session.blocks for session in self.sessions.values()]
        return self.blocks.problems(owned)

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
        params = params or SamplingParams()
        return self._queue(self.admission.admit(prompt, params, id, priority, session))

    def submit_all(
        self,
        prompts: Tokens[str | Tokens[int]],
        params: SamplingParams | Tokens[SamplingParams] | None = None,
        *,
        priority: int = 0,
    ) -> list[Request]:
        """Queues a request for each prompt, or none at all: RequestError has everything that is
        wrong with any of them. params: one for all, or one each."""
        requests: list[Request] = []
        try:
            for admitted in self.admission.admit_all(prompts, params, priority):
                requests.append(self._queue(admitted))
        except BaseException:
            for request in requests:
                self.abort(request.id)
            raise
        return requests

    def _queue(self, admitted: Admitted) -> Request:
        id, tokens, session = admitted.id, admitted.tokens, admitted.session
        arrival = next(self._arrivals)
        while id is None or (admitted.id is None and id in self._requests):
            id = f"request-{next(self._arrivals)}"
        seed = admitted.params.seed
        seed = seed % 2**64 if seed is not None else secrets.randbits(64)
        params = replace(admitted.params, seed=seed)
        self._tell(
            "submit",
            prompt=list(tokens[admitted.history :]),
            params=asdict(params),
            id=id,
            priority=admitted.priority,
            session=session,
        )
        wanted = self.context if params.max_tokens is None else params.max_tokens
        most = max(0, min(wanted, self.room - len(tokens)))
        # The last token never goes through the model.
        stretch = self.runner.rotary.stretch(len(tokens) + most - 1)
        request = Request(id, tokens, params, most, arrival, admitted.priority, stretch, session)
        sequence = Sequence(
            request,
            0,
            list(tokens) if most else list(tokens[:-1]),
            forks=params.n > 1,
            matcher=admitted.matcher,
            prompt_logprobs=[] if params.prompt_logprobs is None else [None] * len(tokens),
        )
        self._requests[id] = [sequence]
        if session is not None:
            self.sessions.begin(session, id)
        self.scheduler.add(sequence)
        return request

    def abort(self, id: str) -> list[Token]:
        """Takes a request out, if it is there, and gives its blocks back at once."""
        if id not in self._requests:
            return []
        self._tell("abort", id=id)
        sequences = list(self._requests[id])
        return [token for s in sequences for token in self._give_up(s, Finish.abort)]

    def rewind(self, session: int, tokens: int) -> None:
        """Takes a session back to its first `tokens` tokens. Raises RequestError for one that is
        not known, or busy."""
        length = len(self.sessions.idle(session).tokens)
        if not 0 <= tokens <= length:
            asked = f"rewound to {tokens} tokens"
            raise RequestError(Problem(f"session {session}", asked, f"at most its {length}"))
        self._tell("rewind", session=session, tokens=tokens)
        self.sessions.rewind(session, tokens)

    def end(self, session: int) -> None:
        """Forgets a session. Raises RequestError for one that is not known, or busy."""
        self.sessions.idle(session)
        self._tell("end", session=session)
        self.sessions.end(session)

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
            drawn = self._run(step)
        except (MemoryError, RuntimeError) as error:
            # other ranks wait for what this one did not compute
            if not is_out_of_memory(error) or self.ranks:
                raise
            # The largest share of the step is the likeliest cause; the others go on in the next
            # one.
            failed = max(step.work, key=lambda work: work.count).sequence
            reason = f"out of memory with {len(step.work)} sequences in a step"
            return self._give_up(failed, Finish.error, reason)
        tokens = self._postprocess(step, drawn)
        if self.config.check and (problems := self.problems()):
            raise RuntimeError("the books of the KV cache are wrong: " + "; ".join(problems))
        return tokens

    def tokens(self) -> Iterator[Token]:
        """Steps until nothing is left to do."""
        while self.has_work:
            yield from self.step()

    def _run(self, step: Step) -> list[Drawn]:
        """A step's tokens through the model, and the next ones of those whose last went through.
        Changes nothing that another attempt would not write again."""
        states = self.runner.run(step)
        ending = [
            i for i, work in enumerate(step.work) if work.ends and work.sequence.request.most_tokens
        ]
        logits = self.runner.logits(states.last(ending)) if ending else None
        score_prompts(self.runner, step.work, states)
        if logits is None:
            return []
        return draw([step.work[i].sequence for i in ending], logits, self.end_tokens)

    def _postprocess(self, step: Step, drawn: list[Drawn]) -> list[Token]:
        scored = [w.sequence for w in step.work if w.ends and not w.sequence.request.most_tokens]
        for work in step.work:
            self.scheduler.advance(work)
        for d in drawn:  # before their parent can end, and take its blocks with it
            if d.parent is not None:
                d.parent.forks = False
                self.scheduler.fork(d.parent, d.sequence)
                self._requests[d.sequence.request.id].append(d.sequence)
        tokens = []
        for d in drawn:
            if isinstance(d.token, NotANumber):
                tokens.append(self._end(d.sequence, fault(d.sequence), str(d.token)))
                continue
            token = append(d.sequence, d.token, d.logprob, self.text, self.end_tokens)
            if token.finish is not None:
                self._remove(d.sequence)
            tokens.append(token)
        for sequence in scored:  # nothing but the log-probabilities of its prompt was asked for
            known = tuple(sequence.prompt_logprobs)
            tokens.append(replace(self._end(sequence, Finish.length), prompt_logprobs=known))
        return tokens

    def _give_up(self, sequence: Sequence, finish: Finish, reason: str = "") -> list[Token]:
        """Ends a sequence, and the siblings that would have begun where its prompt ends."""
        unborn = range(1, sequence.request.params.n) if sequence.forks else ()
        ended = self._end(sequence, finish, reason)
        return [ended, *(replace(ended, index=index, text="") for index in unborn)]

    def _end(self, sequence: Sequence, finish: Finish, reason: str = "") -> Token:
        self._remove(sequence)
        return last_token(sequence, finish, reason)

    def _remove(self, sequence: Sequence) -> None:
        """Takes a sequence that has ended out; its blocks go back, or to its session."""
        request = sequence.request
        blocks = self.scheduler.remove(sequence)
        siblings = self._requests[request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[request.id]
        if request.session is not None:
            self.sessions.keep(request.session, list(sequence.tokens), blocks)
        else:
            self.blocks.release(blocks)

    # --- measurements

    @torch.inference_mode()
    def hidden_states(self, tokens: Tokens[int]) -> Tensor:
        """What the head reads after each token of a text, `[L, H]`, for measurements; nothing is
        kept of it. `runner.logits` reads it.

        Raises RequestError for a text that does not fit.
        """
        if problems := self.admission.problems(tuple(tokens[:-1]), SamplingParams(), id=None):
            raise RequestError(problems)
        self._tell("hidden_states", tokens=list(tokens))
        stretch = self.runner.rotary.stretch(len(tokens))
        params = SamplingParams(prompt_logprobs=0)
        request = Request("", tuple(tokens), params, 0, 0, rope_length=stretch)
        sequence, states = Sequence(request, 0, list(tokens)), []
        needed = self.blocks.blocks_for(len(tokens))
        while not self.blocks.can_allocate(needed):
            if not self.sessions.give_back():
                free = f"{self.blocks.free_blocks} free blocks"
                expected = f"{needed} for {len(tokens)} tokens"
                raise ResourceError(Problem("KV cache", free, expected))
        sequence.blocks = [self.blocks.allocate() for _ in range(needed)]
        try:
            while sequence.pending:
                work = Work(sequence, min(sequence.pending, self.scheduler.limits.tokens))
                states.append(self.runner.run(Step([work])).of(0))
                sequence.computed += work.count
        finally:
            self.blocks.release(sequence.blocks)
        return torch.cat(states)
