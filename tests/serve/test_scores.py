"""Log-probabilities, of which an answer may hold very many: bounded, and put together where nobody
waits for it."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from quantflow.engine.request import SamplingParams
from quantflow.errors import RequestError
from quantflow.serve import answer
from quantflow.serve.answer import MOST_SCORES, Job, bounded
from quantflow.serve.chat import ChatShape
from quantflow.serve.completion import TextShape
from quantflow.serve.wire import PIECE, encode, encode_large
from tests.helpers.serving import Running


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        [[]],
        {"a": {}, "b": []},
        list(range(PIECE)),
        list(range(PIECE + 1)),
        [[1.5, "ä"]] * (3 * PIECE),
        ((1, 2), None, True),
        {'é"': [{"top": [(0.1, 5)] * 200, "x": None}] * 130, "text": "\n"},
        "plain",
        3,
    ],
)
def test_what_is_written_in_pieces_is_what_is_written_at_once(content: Any) -> None:
    assert encode_large(content) == encode(content)


def test_what_is_no_text_is_written_in_pieces_too() -> None:
    assert json.loads(encode_large({"a": ["x\ud800"] * 70})) == {"a": ["x?"] * 70}


def job(lengths: list[int], **params: Any) -> Job:
    return Job([[1] * length for length in lengths], SamplingParams(**params), None, False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lengths", "params", "named"),
    [
        ([4096], {"prompt_logprobs": 20}, None),
        ([10], {"logprobs": 20, "max_tokens": 4096}, None),
        ([4096], {"logprobs": 20, "prompt_logprobs": 20}, None),
        ([4096] * 128, {"max_tokens": 1}, None),  # which tells none
        ([4096] * 127, {"prompt_logprobs": 0, "max_tokens": 0}, None),
        (
            [4096] * 128,
            {"prompt_logprobs": 20},
            "prompt_logprobs: 524288 tokens, each with 20 alternatives: 11010048 scores in all",
        ),
        ([4096] * 128, {"prompt_logprobs": 20, "prompt_logprobs_from": 4090}, None),
        ([10] * 64, {"logprobs": 20, "max_tokens": 4096}, "logprobs: 262144 tokens"),
        ([10], {"logprobs": 20, "max_tokens": 4096, "n": 8}, "logprobs: 32768 tokens"),
        ([8192], {"logprobs": 20, "max_tokens": None, "n": 64}, None),
    ],
)
def test_so_many_scores_are_told_and_no_more(
    lengths: list[int], params: dict[str, Any], named: str | None
) -> None:
    if named is None:
        bounded(job(lengths, **params), 8192)
        return
    with pytest.raises(RequestError) as refused:
        bounded(job(lengths, **params), 8192)
    assert named in str(refused.value) and str(MOST_SCORES) in str(refused.value)


def test_who_names_no_length_gets_as_much_as_may_be_told() -> None:
    wide = bounded(job([10], logprobs=20, max_tokens=None, n=8), 8192).params.max_tokens
    assert wide == MOST_SCORES // (8 * 21)  # the rest of the context, 8182, were too many
    assert bounded(job([10], logprobs=20, max_tokens=None), 8192).params.max_tokens is None
    assert bounded(job([10], max_tokens=None, n=64), 10**6).params.max_tokens is None


def test_a_client_is_told_by_its_own_names(server: Running) -> None:
    prompts = [[5] * 400] * 128
    for body, named in (
        ({"prompt": prompts[:80], "prompt_logprobs": 20, "max_tokens": 1}, "prompt_logprobs"),
        (
            {"prompt": prompts[:100], "prompt_logprobs": 20, "max_tokens": 0, "echo": True},
            "prompt_logprobs",
        ),
    ):
        refused = server.complete(**body)
        assert (refused.status, refused.error["param"]) == (400, named) and str(
            MOST_SCORES
        ) in refused.error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_large_answers_are_made_beside_the_loop_and_say_the_same(
    server: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    threads = set[str]()

    def noted(method: Any) -> Any:
        def noting(self: Any, *arguments: Any) -> Any:
            threads.add(threading.current_thread().name)
            return method(self, *arguments)

        return noting

    for shape, name in (
        (ChatShape, "whole"),
        (ChatShape, "more"),
        (TextShape, "whole"),
        (TextShape, "more"),
    ):
        monkeypatch.setattr(shape, name, noted(getattr(shape, name)))

    def asked() -> list[Any]:
        threads.clear()
        text = server.complete(max_tokens=20, logprobs=5, echo=True, stream=stream)
        said = server.chat(max_tokens=20, logprobs=True, top_logprobs=20, seed=1, stream=stream)
        assert (text.status, said.status) == (200, 200)
        found = []
        for made in (text, said):
            for choice in [
                c for e in (made.events if stream else [made.json]) for c in e["choices"]
            ]:
                parts = choice["logprobs"] or {}
                found += parts.get("content") or parts.get("tokens") or []
        return found

    small = asked()
    assert small and not any(name.startswith("quantflow") for name in threads)
    monkeypatch.setattr(answer, "SMALL", 0)
    assert asked() == small and threads and all(name.startswith("quantflow") for name in threads)
