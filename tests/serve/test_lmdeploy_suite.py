"""LMDeploy's own client and its public tests of /v1/chat/completions and /v1/completions, against a
server of ours.

    git clone https://github.com/InternLM/lmdeploy && QUANTFLOW_LMDEPLOY=$PWD/lmdeploy pytest
    tests/serve/test_lmdeploy_suite.py

Each of its tests is a row here. Those that must fail are named, with the reason: a row that fails
and is none of them, or passes and is one, is a change, of theirs or of ours. Written for LMDeploy
0.16 (1263d5cd, August 2026).
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from quantflow.serve.config import ServerConfig
from tests.helpers.serving import DEMO, serving

CHECKOUT = os.environ.get("QUANTFLOW_LMDEPLOY", "")
SUITE = Path(CHECKOUT) / "autotest" / "interface" / "restful"
FILES = ("test_restful_chat_completions_v1.py", "test_restful_completions_v1.py")
ROOT = Path(__file__).parents[2]

LONG = (
    "LMDeploy's own error body, which is flat: {object, message, type, code, param}; ours is"
    " OpenAI's"
)
NAMED = "the same: `code` is 404 there"
FIRST = "every event must have logprobs there; OpenAI's first event, which has the role, has none"
PENALTY = "a repetition_penalty of 1e-7; ours begins at 0.01"
CHAT, OPENAI, BASE = (
    "TestRestfulInterfaceChatCompletions",
    "TestRestfulOpenAI",
    "TestRestfulInterfaceBase",
)
MUST_FAIL = {
    f"{CHAT}.test_minimum_repetition_penalty": PENALTY,
    f"{CHAT}.test_minimum_repetition_penalty_streaming": PENALTY,
    f"{CHAT}.test_mistake_modelname_return": NAMED,
    f"{CHAT}.test_mistake_modelname_return_streaming": NAMED,
    **{
        f"{name}.test_longtext_input{how}": LONG
        for name in (CHAT, OPENAI)
        for how in ("", "_streaming")
    },
    f"{CHAT}.test_logprobs_streaming": FIRST,
    f"{OPENAI}.test_logprobs_streaming": FIRST,
    f"{CHAT}.test_max_tokens_default_cap_no_overshoot_followup": (
        "a model of more context than max_tokens, 8192"
    ),
    f"{BASE}.test_batch_prompt_order": (
        "a large model; and min_tokens within `kwargs`, which LMDeploy's server drops"
    ),
}
# Words that let a small model speak in sentences, with a stop word or two, and come to an end.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ '\\n\\nNote\\n\\n' }}"
)


def rows() -> list[str]:
    found = []
    for file in FILES if CHECKOUT else ():
        for node in ast.parse((SUITE / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                tests = [
                    f
                    for f in node.body
                    if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")
                ]
                found += [f"{node.name}.{test.name}" for test in tests]
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What became of each test: "", or why it failed."""
    folder = tmp_path_factory.mktemp("suite")
    shutil.copytree(DEMO, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    with serving(
        folder / "model", config=ServerConfig(port=0, names=("quantflow",)), check=True
    ) as running:
        environment = {
            **os.environ,
            "LMDEPLOY_PORT": str(running.port),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        }
        command = [
            sys.executable, "-m", "pytest", "-p", "tests.helpers.lmdeploy_suite", "-p",
            "no:cacheprovider", "--noconftest", "-c", os.devnull,
        ]  # fmt: skip
        given = [
            f"--rootdir={folder}",
            f"--junit-xml={folder / 'report.xml'}",
            "-q",
            *(str(SUITE / file) for file in FILES),
        ]
        done = subprocess.run(
            [*command, *given],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert (folder / "report.xml").is_file(), done.stdout[-3000:] + done.stderr[-3000:]
        cases = ElementTree.parse(folder / "report.xml").getroot().iter("testcase")
    found = {}
    for case in cases:
        failed = [
            child.get("message", "?")
            for child in case
            if child.tag in ("failure", "error", "skipped")
        ]
        found[
            f"{case.get('classname', '').rsplit('.', 1)[-1]}.{case.get('name', '').split('[')[0]}"
        ] = " ".join(failed)
    yield found


@pytest.mark.skipif(
    not CHECKOUT, reason="no checkout of LMDeploy: QUANTFLOW_LMDEPLOY does not name one"
)
@pytest.mark.parametrize("row", rows())
def test_lmdeploys_own(outcomes: dict[str, str], row: str) -> None:
    why = outcomes[row]
    if row in MUST_FAIL:
        assert why, f"it passes now: take it out of MUST_FAIL ({MUST_FAIL[row]})"
        pytest.xfail(MUST_FAIL[row])
    assert not why
