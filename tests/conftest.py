"""The environment of all tests, set before anything that reads it is imported, and models that
several of them share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for a network
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes run tests: one thread each, and in what they start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# set in processes that share the work, and a console would keep them for good
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
# Where the tests are started in the background, Ctrl-C is ignored, and so it would be in the
# processes that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = (
    "tests/quality",
    "tests/notebooks",
    "tests/pipeline/test_memory",
    "tests/serve/test_page",
    "tests/docs",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes go first: where several processes share the work, none of them begins
    one when the others are done."""
    items.sort(
        key=lambda item: next(
            (n for n, path in enumerate(LONGEST) if item.nodeid.startswith(path)), len(LONGEST)
        )
    )


def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes are named by their length: packed ones hold the time, which two processes that collect
    the same tests see differently."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


@pytest.fixture(autouse=True, scope="session")
def no_pictures() -> Iterator[None]:
    if find_spec("pydantic") is None:  # a machine for the kernels and the engine alone
        yield
        return
    from tests.helpers.runs import blank_pages

    with pytest.MonkeyPatch.context() as patch:
        blank_pages(patch)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama in bfloat16."""
    from tests.helpers.tiny import write_llama

    return write_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It in 4 bits, with calibrated parameters of an int8 KV cache."""
    from tests.helpers.runs import invoke, make_bench

    bench = make_bench(tmp_path_factory.mktemp("artifact"), intermediate_size=128)
    stages = ["calibrate", "gptq", "kv_qparams", {"pack": {"format": "compressed-tensors"}}]
    result = invoke("run", bench.recipe(weights={"bits": 4, "group_size": 32}, stages=stages))
    assert result.exit_code == 0, result.output
    return bench.output
