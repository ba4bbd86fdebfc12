"""A plugin for pytest, in a process of its own: LMDeploy's public tests of its server, from a
checkout, against a server that runs.

Only its client is imported, and not the engine that LMDeploy's packages import first. Each test
runs once, in place of once for each of the models that LMDeploy serves it with.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

CHECKOUT = Path(os.environ["QUANTFLOW_LMDEPLOY"])


def _package(name: str) -> None:
    """An empty one, whose modules are the checkout's."""
    module = ModuleType(name)
    module.__path__ = [str(CHECKOUT.joinpath(*name.split(".")))]
    sys.modules[name] = module


for name in ("lmdeploy", "lmdeploy.serve"):
    _package(name)
sys.path.insert(0, str(CHECKOUT / "autotest"))

from utils import constant  # type: ignore[import-not-found] # noqa: E402

for name in ("BACKEND_LIST", "RESTFUL_MODEL_LIST", "RESTFUL_BASE_MODEL_LIST"):
    assert hasattr(constant, name), (
        f"{name}: not in this checkout; this plugin must learn what it is called now"
    )
    setattr(constant, name, ["quantflow"])
