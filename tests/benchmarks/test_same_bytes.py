"""What the comparison of two trees sees, and what it does not look at."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.same_bytes import FORMATS, contents, differences, zoo_cases
from quantflow.formats import FORMATS as KNOWN


def written(
    folder: Path,
    *,
    weights: bytes = b"abcd",
    key: str = "0123",
    fingerprint: str = "1",
    error: float = 0.5,
) -> Path:
    """What a case leaves."""
    artifact, store = folder / "artifact", folder / "store" / key
    artifact.mkdir(parents=True)
    store.mkdir(parents=True)
    (artifact / "model.safetensors").write_bytes(weights)
    (artifact / "report.json").write_text(
        json.dumps({"fingerprint": fingerprint, "linears": {"q": {"error": error}}})
    )
    (artifact / "run.json").write_text(json.dumps({"finished": fingerprint}))
    (store / "layer-00000.safetensors").write_bytes(b"layer")
    (folder / "outcome.txt").write_text("0\n")
    return folder


def test_identities_and_times_are_not_looked_at(tmp_path: Path) -> None:
    one, other = written(tmp_path / "a"), written(tmp_path / "b", key="4567", fingerprint="2")
    assert differences(contents(one), contents(other)) == []
    assert list(contents(one)) == [
        "artifact/model.safetensors",
        "artifact/report.json",
        "outcome.txt",
        "store/layer-00000.safetensors #0",
    ]


def test_a_byte_a_number_and_a_file_are_seen(tmp_path: Path) -> None:
    one, other = written(tmp_path / "a"), written(tmp_path / "b", weights=b"abXdY", error=0.25)
    (other / "artifact" / "config.json").write_text("{}")
    (other / "store" / "0123" / "layer-00000.safetensors").unlink()
    found = dict(differences(contents(one), contents(other)))
    assert found["artifact/model.safetensors"] == "2 of 4 and 5 bytes differ, from byte 2 on"
    assert "differ" in found["artifact/report.json"]
    assert (
        found["artifact/config.json"] == "is new"
        and found["store/layer-00000.safetensors #0"] == "is missing now"
    )
    assert len(found) == 4


def test_every_format_is_in_the_matrix(tmp_path: Path) -> None:
    known = set(KNOWN) - {"bitblas"}  # which the commit that is compared with does not know
    assert set(FORMATS) == known
    packed = {
        stage["pack"]["format"]
        for model in ("wide", "opt")
        for case in zoo_cases(model, tmp_path)
        for stage in case.get("recipe", {}).get("stages", [])
        if "pack" in stage
    }
    assert packed == known
