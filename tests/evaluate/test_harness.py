"""lm-evaluation-harness over the engine: the same scores as ours on the same questions, and
transformers' where there is only one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantflow.engine.config import EngineConfig
from quantflow.engine.engine import Engine
from quantflow.engine.llm import LLM
from quantflow.engine.request import SamplingParams
from quantflow.errors import RequestError, UserError
from quantflow.evaluate import harness
from quantflow.evaluate.tasks import Settings, answer, read_tasks
from tests.helpers.tiny import SENTENCES

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed"
)
# What lm_eval's own imports and data sets warn of is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
QUESTIONS = [
    {
        "query": f"{SENTENCES[7 * i]} The",
        "choices": ["fox", "jumps over the river", "Käfer", "no"],
        "gold": i % 4,
    }
    for i in range(10)
] + [{"query": " ".join(SENTENCES[:40]), "choices": ["cat", "bird"], "gold": 1}]
SCHEMAS = [
    {
        "context_options": [SENTENCES[5 * i], SENTENCES[5 * i + 40]],
        "continuation": "It looks at the hill.",
        "gold": i % 2,
    }
    for i in range(6)
]
EXACT = [{"query": SENTENCES[i][:-1], "answer": "fox"} for i in range(6)]


def local_task(path: Path, rows: list[dict[str, Any]], **config: Any) -> dict[str, Any]:
    """An lm_eval task over a local file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "task": f"local_{path.stem}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "metric_list": [{"metric": m} for m in ("acc", "acc_norm", "acc_bytes")],
        **config,
    }


@pytest.fixture(scope="module")
def model(artifact: Path) -> Any:
    """The artifact, as lm_eval makes it from `--model quantflow --model_args pretrained=…`."""
    harness.register()
    harness.register()  # twice does no harm
    from lm_eval.api.registry import get_model

    return get_model("quantflow").create_from_arg_string(
        f"pretrained={artifact},kv=int8", {"batch_size": 8, "device": "cpu"}
    )


@pytest.fixture(scope="module")
def results(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the three tasks, by lm_eval: `path` of the file, `scores`, `samples`."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("harness")
    first = (
        LLM(model.engine.path, device="cpu", kv="int8")
        .generate(EXACT[0]["query"], SamplingParams(max_tokens=7, stop=("\n",)))[0]
        .text
    )
    tasks = [
        local_task(
            folder / "choice.jsonl",
            QUESTIONS,
            doc_to_text="{{query}}\nAnswer:",
            doc_to_target="{{gold}}",
            doc_to_choice="{{choices}}",
        ),
        local_task(
            folder / "schema.jsonl",
            SCHEMAS,
            doc_to_text="{{gold}}",
            doc_to_target="{{continuation}}",
            doc_to_choice="{{context_options}}",
            metric_list=[{"metric": "acc"}],
        ),
        local_task(
            folder / "exact.jsonl",
            [{**EXACT[0], "answer": first.strip()}, *EXACT[1:]],
            output_type="generate_until",
            doc_to_text="{{query}}",
            doc_to_target="{{answer}}",
            metric_list=[{"metric": "exact_match"}],
            generation_kwargs={"until": ["\n"], "max_gen_toks": 7, "do_sample": False},
            filter_list=[{"name": "strip", "filter": [{"function": "remove_whitespace"}]}],
        ),
    ]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        found = simple_evaluate(
            model=model,
            tasks=tasks,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=TaskManager(include_defaults=False),
        )
    return {
        name: {
            "path": folder / f"{name}.jsonl",
            "scores": {
                key.split(",")[0]: value for key, value in found["results"][f"local_{name}"].items()
            },
            "samples": found["samples"][f"local_{name}"],
        }
        for name in ("choice", "schema", "exact")
    }


@pytest.fixture
def engine(artifact: Path) -> Engine:
    return Engine(artifact, EngineConfig(device="cpu", kv="int8"))  # type: ignore[arg-type]


@needs_lm_eval
def test_multiple_choice_scores_are_ours(results: dict[str, Any], engine: Engine) -> None:
    theirs = results["choice"]
    ours = answer(engine, read_tasks([theirs["path"]], [Settings(delimiter="\nAnswer: ")])[0], 64)
    for metric in ("acc", "acc_norm", "acc_bytes"):
        assert ours.accuracy(metric)[0] == theirs["scores"][metric]
    assert 0 < theirs["scores"]["acc"] < 1 and ours.answers[-1].cut
    for sample, own in zip(theirs["samples"], ours.answers, strict=True):  # bit for bit
        assert [response[0] for response in sample["filtered_resps"]] == list(own.logprobs)
        assert [response[1] for response in sample["filtered_resps"]] == list(own.greedy)


@needs_lm_eval
def test_winograd_scores_are_ours(results: dict[str, Any], engine: Engine) -> None:
    theirs = results["schema"]
    ours = answer(engine, read_tasks([theirs["path"]], [Settings()])[0], 3)
    assert ours.accuracy("acc")[0] == theirs["scores"]["acc"]
    assert [tuple(r[0] for r in sample["filtered_resps"]) for sample in theirs["samples"]] == [
        own.logprobs for own in ours.answers
    ]


@needs_lm_eval
def test_exact_match_is_ours(results: dict[str, Any], engine: Engine) -> None:
    theirs = results["exact"]
    ours = answer(engine, read_tasks([theirs["path"]], [Settings(max_tokens=7)])[0], 64)
    assert [sample["resps"][0][0].strip() for sample in theirs["samples"]] == [
        own.text for own in ours.answers
    ]
    assert theirs["scores"]["exact_match"] == ours.accuracy("acc")[0] > 0


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=own, idx=i) for i, own in enumerate(arguments)
    ]  # type: ignore[arg-type]


@needs_lm_eval
def test_rolling_windows_are_transformers(tiny: Path) -> None:
    """Each token is predicted once, with as much before it as the context holds in windows that
    begin where the one before ended."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from quantflow.evaluate.harness_model import QuantFlowLM

    lm = QuantFlowLM(str(tiny), device="cpu", dtype="float32", batch_size="auto", max_length=32)
    texts = [" ".join(SENTENCES[:9]), SENTENCES[3]]
    found = lm.loglikelihood_rolling(
        instances("loglikelihood_rolling", *[(text,) for text in texts]), disable_tqdm=True
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
        AutoTokenizer.from_pretrained(tiny),
    )
    for text, total in zip(texts, found, strict=True):
        tokens = tokenizer.encode(text)
        whole, expected, done = [tokenizer.bos_token_id, *tokens], 0.0, 0
        while done < len(tokens):
            count = min(32, len(tokens) - done)
            end = done + count
            inputs = whole[max(0, end - 32) : end]
            with torch.no_grad():
                rows = model(torch.tensor([inputs])).logits[0].double().log_softmax(-1)[-count:]
            expected += float(rows.gather(1, torch.tensor(tokens[done:end])[:, None]).sum())
            done = end
        assert total == pytest.approx(expected, rel=1e-5)


@needs_lm_eval
def test_generation_settings(model: Any, artifact: Path) -> None:
    llm = LLM(artifact, device="cpu", kv="int8")
    prompt = SENTENCES[5]
    drawn = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "seed": 4, "max_gen_toks": 9}
    found = model.generate_until(
        instances(
            "generate_until",
            (prompt, drawn),
            (prompt, {"until": "e", "max_gen_toks": 9}),
            (prompt, {"until": ["</s>"], "max_gen_toks": 9}),
        ),
        disable_tqdm=True,
    )
    expected = [
        SamplingParams(temperature=1.3, top_p=0.9, seed=4, max_tokens=9),
        SamplingParams(stop=("e",), max_tokens=9),
    ]
    assert found[:2] == [output.text for output in llm.generate([prompt, prompt], expected)]
    with pytest.raises(RequestError, match="gen_kwargs num_beams: 4"):
        model.generate_until(
            instances("generate_until", (prompt, {"num_beams": 4})), disable_tqdm=True
        )
    with pytest.raises(
        RequestError, match="max_gen_toks: 128; expected less than the context, 128"
    ):
        model.generate_until(
            instances("generate_until", (prompt, {"max_gen_toks": 128})), disable_tqdm=True
        )


@needs_lm_eval
def test_what_lm_eval_passes_on_by_itself(tiny: Path) -> None:
    from quantflow.evaluate.harness_model import QuantFlowLM

    for arguments, said in (
        ("kv=int8", r"model_args pretrained: not given; expected pretrained=DIR"),
        (
            f"pretrained={tiny},foo=1",
            r"model_args foo: 1; expected one of pretrained, batch_size, .*, cache_bytes$",
        ),
        ("foo=1,bar=x", r"pretrained: not given.*\n.*foo: 1.*\n.*bar: 'x'"),
    ):
        with pytest.raises(UserError, match=said):
            QuantFlowLM.create_from_arg_string(arguments, {"batch_size": 8, "device": "cpu"})
    with pytest.raises(UserError, match="batch_size: 'many'; expected a number, or auto"):
        QuantFlowLM(str(tiny), batch_size="many")
    with pytest.raises(UserError, match="device: 'cuda:3'; expected auto, cpu or cuda"):
        QuantFlowLM(str(tiny), device="cuda:3")
    # lm_eval's own default, on any machine
    assert QuantFlowLM(str(tiny), device="cuda:0").batch_size == 64


def test_without_lm_eval_it_is_said_what_to_install() -> None:
    """Nothing of lm_eval is imported with the rest, and its absence is one line."""
    code = """if True:
        import sys
        sys.modules["lm_eval"] = None
        import quantflow.cli.main
        from quantflow.evaluate import harness
        harness.importlib.util.find_spec = lambda name: None
        harness.main()
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (
        done.returncode == 2
        and done.stderr.strip()
        == "quantflow: lm-evaluation-harness: the package lm_eval is not installed. pip install"
        " 'quantflow-llm[lm-eval]'"
    )
