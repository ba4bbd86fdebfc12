"""What the store already has of a plan, as far as that is known without reading a weight."""

from __future__ import annotations

from quantflow.calibration.data import Windows
from quantflow.pipeline.identities import calibrate_key, sweep_key
from quantflow.pipeline.plan import Plan
from quantflow.pipeline.texts import local_text
from quantflow.pipeline.windows import recipe_windows
from quantflow.tokenizers.load import load_tokenizer


def stored_layers(plan: Plan) -> int | None:
    """Finished layers of the sweep, or of `calibrate` where that is all.

    None where the weights have never been hashed, or the text is not at hand."""
    digests = plan.store.cached_digests(plan.checkpoint.files)
    if digests is None:
        return None
    calibration = plan.recipe.calibration
    windows = Windows([], frozenset(), "")
    if (plan.needs_stream or not plan.rounds) and calibration:
        if local_text(calibration) is None:
            return None
        windows = recipe_windows(
            plan, load_tokenizer(plan.checkpoint.tokenizer_path), "calibration"
        )
    weights = plan.weights_key(digests.values())
    key = (
        sweep_key(plan, weights, windows.digest)
        if plan.rounds
        else calibrate_key(plan, weights, windows.digest)
    )
    return plan.store.finished_layers(key, plan.config.layers)
