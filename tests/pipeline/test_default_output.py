"""Where an artifact goes that nobody named a place for: two models of one name do not share it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from quantflow.errors import UserError
from quantflow.pipeline.plan import Plan, make_plan
from quantflow.pipeline.progress import Silent
from quantflow.pipeline.run import run
from quantflow.stages.registry import load_recipe
from tests.helpers.runs import invoke
from tests.helpers.tiny import write_llama

RECIPE = (
    "name: w8\nweights: {bits: 8, group_size: 32}\nstages: [rtn, {pack: {format:"
    " compressed-tensors}}]\n"
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def planned(model: Path, output: str | None = None) -> Plan:
    return make_plan(load_recipe("r.yaml", model=str(model), output=output), device="cpu")


def test_a_default_output_is_of_one_model(here: Path) -> None:
    places = [write_llama(here / part / "final", seed=seed) for seed, part in enumerate("ab")]

    run(planned(places[0]), Silent())
    planned(places[0])
    with pytest.raises(
        UserError, match=r"final_w8: an artifact of another model, .*/a/final, .*Pass --output DIR"
    ) as caught:
        planned(places[1])
    assert len(caught.value.problems) == 1
    planned(places[1], "artifacts/final_w8")  # who says so wants it replaced
    write_llama(here / "a" / "final", seed=2)
    planned(places[0])  # trained on
    shown = invoke("plan", "r.yaml", "--model", places[1])
    assert shown.exit_code == 2 and "Pass --output DIR" in " ".join(shown.stderr.split())
    artifact = here / "artifacts" / "final_w8"
    # as another machine may have it: names are all there is to go by
    (artifact / "run.json").unlink()
    planned(places[1])
    manifest = json.loads((artifact / "quantflow.json").read_text())
    manifest["source"]["model"] = "x/final"
    (artifact / "quantflow.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="an artifact of another model, x/final"):
        planned(places[1])


def test_a_model_that_was_moved_is_the_same(here: Path) -> None:
    """As far as the store knows its contents."""
    folder = write_llama(here / "a" / "m")
    plan = planned(folder)
    run(plan, Silent())
    (here / "b").mkdir()
    shutil.copytree(folder, here / "b" / "m")
    plan.store.digests([here / "b" / "m" / "model.safetensors"])
    planned(here / "b" / "m")
