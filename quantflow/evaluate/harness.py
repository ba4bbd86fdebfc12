"""lm-evaluation-harness with QuantFlow's engine: its own command line, which knows one model more.

    python -m quantflow.evaluate.harness --model quantflow --model_args pretrained=DIR,kv=int8
    --tasks arc_easy --batch_size 64

lm_eval 0.4 finds no models of other packages (its registry takes entry points, but nothing looks
for them), so `lm_eval` itself does not know this one: the name is registered here, and all else is
lm_eval's. In Python, `register()` comes before `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import importlib.util
import sys

from quantflow.distribution import missing
from quantflow.errors import QuantFlowError, UserError

NAME = "quantflow"


def register() -> None:
    """Makes `quantflow` the name of a model in lm_eval. Raises UserError where lm_eval is not
    installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(missing("lm-evaluation-harness", "lm_eval", "lm-eval"))
    import lm_eval.models  # noqa: F401 - its own names first
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target="quantflow.evaluate.harness_model:QuantFlowLM")


def main() -> None:
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except QuantFlowError as error:
        print("\n".join(f"quantflow: {problem}" for problem in error.problems), file=sys.stderr)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
