"""The engine in asyncio: tokens arrive, leaving gives blocks back, and whatever happens nobody
waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from quantflow import AsyncLLM, SamplingParams
from quantflow.engine.llm import LLM
from quantflow.engine.postprocess import append
from quantflow.errors import RequestError, ResourceError

PROMPT = [5, 9, 13, 17, 21]
LONG = SamplingParams(ignore_eos=True)


def within(seconds: float, work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, seconds))


async def emptied(llm: AsyncLLM) -> None:
    """Returns once the engine has nothing to do."""
    while await asyncio.wrap_future(llm.call(lambda engine: engine.has_work)):
        await asyncio.sleep(0.01)


def slowly(llm: AsyncLLM) -> None:
    """A step takes 10 ms at least: what is to be interrupted has not ended on a fast machine."""
    step = llm.engine.step

    def slow() -> Any:
        time.sleep(0.01)
        return step()

    llm.engine.step = slow  # type: ignore[method-assign]


def test_many_at_once_are_what_each_is_alone(tiny: Path) -> None:
    prompts = [[3 + i, 9, 4] * (i + 1) for i in range(12)]
    params = [
        SamplingParams(max_tokens=5 + i, temperature=0.5, seed=i, n=1 + i % 2) for i in range(12)
    ]
    expected = [o.completions for o in LLM(tiny, device="cpu").generate(prompts, params)]

    async def run() -> list[Any]:
        async with AsyncLLM(tiny, device="cpu") as llm:
            return await asyncio.gather(
                *(llm.generate(p, s) for p, s in zip(prompts, params, strict=True))
            )

    assert [o.completions for o in within(120, run())] == expected


def test_leaving_or_being_cancelled_gives_blocks_back(tiny: Path) -> None:
    async def run() -> None:
        async with AsyncLLM(tiny, device="cpu", check=True) as llm:
            async for token in llm.stream(PROMPT, LONG):
                assert token.token is not None
                break
            slowly(llm)
            task = asyncio.create_task(llm.generate(PROMPT, LONG))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await emptied(llm)
            assert not await asyncio.wrap_future(llm.call(lambda engine: engine.blocks.used_blocks))

    within(120, run())


def test_who_leaves_costs_one_step_at_most(tiny: Path) -> None:
    async def run() -> None:
        async with AsyncLLM(tiny, device="cpu", check=True) as llm:
            step, begun = llm.engine.step, list[float]()

            def timed() -> Any:
                begun.append(time.monotonic())
                return step()

            llm.engine.step = timed  # type: ignore[method-assign]
            for _ in range(5):
                stream = await llm.open(PROMPT, SamplingParams(ignore_eos=True, n=3))
                await stream.some()
                stream.close()
                left = time.monotonic()
                assert (
                    await asyncio.wrap_future(llm.call(lambda engine: engine.blocks.used_blocks))
                    == 0
                )
                assert sum(at > left for at in begun) <= 1

    within(120, run())


def test_tokens_gather_while_nobody_takes_them(tiny: Path) -> None:
    async def run() -> None:
        async with AsyncLLM(tiny, device="cpu") as llm:
            stream = await llm.open(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True))
            began = time.monotonic()
            await stream.rest(100)
            assert time.monotonic() - began < 90  # the last token ends the rest
            assert len(await stream.some()) == 40 and stream.done and await stream.some() == []
            slowly(llm)
            endless = await llm.open(PROMPT, LONG)
            await endless.rest(0.02)
            assert not endless.done
            endless.close()

    within(120, run())


def test_who_wants_all_at_once_is_woken_once(tiny: Path) -> None:
    async def run() -> None:
        async with AsyncLLM(tiny, device="cpu") as llm:
            stream = await llm.open(
                PROMPT, SamplingParams(max_tokens=30, ignore_eos=True, n=2), whole=True
            )
            assert len(await stream.some()) == 60 and stream.done

    within(120, run())


def test_an_opening_that_was_cancelled_leaves_nothing(tiny: Path) -> None:
    async def run() -> None:
        async with AsyncLLM(tiny, device="cpu", check=True) as llm:
            release = threading.Event()
            busy = llm.call(lambda engine: release.wait(60))
            opening = asyncio.create_task(llm.open(PROMPT, LONG))
            await asyncio.sleep(0.05)
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            release.set()
            slowly(llm)  # else it might have ended by itself
            await asyncio.wrap_future(busy)
            await asyncio.sleep(0.05)
            assert not await asyncio.wrap_future(llm.call(lambda engine: engine.has_work))

    within(120, run())


def test_a_thread_that_hangs_is_left_behind(tiny: Path) -> None:
    llm = AsyncLLM(tiny, device="cpu")
    release = threading.Event()
    llm.call(lambda engine: release.wait(60))
    assert not llm.close(0.1)
    release.set()
    assert llm.close(60)


def test_one_event_for_several_streams(tiny: Path) -> None:
    async def run() -> None:
        async with AsyncLLM(tiny, device="cpu") as llm:
            arrived, params = asyncio.Event(), SamplingParams(max_tokens=9, ignore_eos=True)
            streams = await llm.open_by(
                lambda engine: engine.submit_all([PROMPT, PROMPT[:2], [7]], params), arrived=arrived
            )
            got: list[list[int | None]] = [[], [], []]
            while not all(stream.done for stream in streams):
                await arrived.wait()
                arrived.clear()
                for tokens, stream in zip(got, streams, strict=True):
                    tokens += [token.token for token in stream.take()]
            expected = LLM(tiny, device="cpu").generate([PROMPT, PROMPT[:2], [7]], params)
            assert [tuple(tokens) for tokens in got] == [
                output.completions[0].token_ids for output in expected
            ]

    within(120, run())


def test_a_bad_request_is_refused_and_the_engine_goes_on(tiny: Path) -> None:
    async def run() -> None:
        async with AsyncLLM(tiny, device="cpu") as llm:
            with pytest.raises(RequestError, match="token 999"):
                await llm.generate([999])
            assert (await llm.generate(PROMPT, SamplingParams(max_tokens=2))).completions

    within(120, run())


def test_a_dead_engine_answers_everybody(tiny: Path) -> None:
    async def run() -> None:
        llm = AsyncLLM(tiny, device="cpu")
        step, steps = llm.engine.step, []

        def broken() -> Any:
            steps.append(1)
            if len(steps) > 3:
                raise RuntimeError("shapes do not match")
            return step()

        llm.engine.step = broken  # type: ignore[method-assign]
        waiting = [
            asyncio.create_task(llm.generate(PROMPT, SamplingParams(ignore_eos=True, n=n)))
            for n in (1, 3)
        ]
        for task in waiting:
            with pytest.raises(ResourceError, match="shapes do not match"):
                await task
        assert not llm.alive and isinstance(llm.failure, RuntimeError)
        with pytest.raises(ResourceError, match="shapes do not match"):
            await llm.generate(PROMPT)
        llm.close()

    within(120, run())


def test_closing_ends_what_runs(tiny: Path) -> None:
    async def run() -> None:
        llm = AsyncLLM(tiny, device="cpu")
        slowly(llm)
        task = asyncio.create_task(llm.generate(PROMPT, LONG))
        await asyncio.sleep(0.05)
        llm.close()
        with pytest.raises(ResourceError, match="closed"):
            await task
        with pytest.raises(ResourceError, match="closed"):
            await llm.generate(PROMPT)

    within(120, run())


def test_an_idle_engine_says_that_it_is_alive(tiny: Path) -> None:
    async def run() -> None:
        async with AsyncLLM(tiny, device="cpu") as llm:
            before = llm.progress
            while llm.progress == before:
                await asyncio.sleep(0.05)

    within(120, run())


def test_a_loop_that_is_closed_does_not_stop_the_engine(tiny: Path) -> None:
    llm = AsyncLLM(tiny, device="cpu")

    async def leave() -> None:
        stream = llm.stream(PROMPT, LONG)
        await stream.__anext__()
        # The generator is not closed: its loop goes away under it.
        llm_streams.append(stream)

    llm_streams: list[Any] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    end = time.monotonic() + 60
    while llm.call(lambda engine: engine.has_work).result(60) and time.monotonic() < end:
        time.sleep(0.01)
    assert llm.alive and time.monotonic() < end
    llm.close()


def test_waiters_of_the_step_that_failed_are_answered(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text ends in the very step that raises for another: its end is lost, and both are
    told."""

    async def run() -> None:
        llm = AsyncLLM(tiny, device="cpu")
        seen = []

        def broken(*arguments: Any) -> Any:
            seen.append(1)
            if len(seen) == 2:
                raise RuntimeError("shapes do not match")
            return append(*arguments)

        monkeypatch.setattr("quantflow.engine.engine.append", broken)
        llm.engine.step, step = (lambda: []), llm.engine.step  # type: ignore[method-assign]
        waiting = [
            asyncio.create_task(llm.generate(PROMPT, SamplingParams(max_tokens=1)))
            for _ in range(2)
        ]
        while len(list(llm.engine.scheduler.sequences())) < 2:
            await asyncio.sleep(0.01)
        llm.engine.step = step  # type: ignore[method-assign]
        for task in waiting:
            with pytest.raises(ResourceError, match="shapes do not match"):
                await task

    within(120, run())


def test_an_id_may_be_used_again(tiny: Path) -> None:
    async def run() -> None:
        async with AsyncLLM(tiny, device="cpu") as llm:
            old = llm.stream(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True), id="mine")
            await old.__anext__()
            await emptied(llm)
            new = asyncio.create_task(
                llm.generate(PROMPT, SamplingParams(max_tokens=60, ignore_eos=True), id="mine")
            )
            await asyncio.sleep(0.02)
            await old.aclose()
            assert len((await new).completions[0].token_ids) == 60

    within(120, run())


def test_abort_answers_who_waits(tiny: Path) -> None:
    async def run() -> None:
        async with AsyncLLM(tiny, device="cpu") as llm:
            slowly(llm)
            task = asyncio.create_task(llm.generate(PROMPT, LONG, id="mine"))
            await asyncio.sleep(0.05)
            await asyncio.wrap_future(llm.abort("mine"))
            with pytest.raises(ResourceError, match="aborted"):
                await task

    within(120, run())


def test_calls_that_were_cancelled_do_not_disturb_the_end(tiny: Path) -> None:
    llm = AsyncLLM(tiny, device="cpu")
    free = [threading.Event(), threading.Event()]
    llm.call(lambda engine: free[0].wait(60))
    cancelled, waiting = llm.call(lambda engine: 1), llm.call(lambda engine: 2)
    assert cancelled.cancel()
    free[0].set()
    assert waiting.result(60) == 2
    llm.engine.step = None  # type: ignore[method-assign, assignment]
    llm.call(lambda engine: free[1].wait(60))
    futures = [llm.call(lambda engine: engine.submit(PROMPT)), llm.call(lambda engine: 1)]
    assert futures[1].cancel()
    free[1].set()
    llm._thread.join(60)
    late = llm.call(lambda engine: 3)
    with pytest.raises(ResourceError):
        late.result(60)
