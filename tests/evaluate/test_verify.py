"""`quantflow verify`: passes what is right, and sees what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from quantflow.engine import ops
from quantflow.evaluate.verify import verify
from quantflow.quant.numbers.integer import IntegerTensor
from tests.helpers.runs import invoke
from tests.helpers.zoo import ZOO, specimen, write


def found(path: Path, reference: Path | None = None) -> dict[str, bool | None]:
    return {
        check.name: check.passed
        for check in verify(path, str(reference) if reference else None, "cpu")
    }


def test_an_artifact_passes(artifact: Path) -> None:
    reference = artifact.parents[1] / "model"
    assert found(artifact, reference) == dict.fromkeys(
        ("files", "loads", "layers", "reference", "logits", "generation"), True
    )


@pytest.mark.parametrize("name", [n for n in ZOO if not n.endswith("fused")])
def test_every_architecture_passes(name: str, tmp_path: Path) -> None:
    checks = found(write(tmp_path, specimen(name, torch.float32)))
    assert checks.pop("files") is None
    assert checks == dict.fromkeys(("loads", "layers", "logits", "generation"), True)


def test_a_changed_file_is_seen(artifact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    weights = next(copy.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    (copy / "more.txt").write_text("x")
    result = invoke("verify", copy, "--device", "cpu", "--json")
    assert result.exit_code == 3
    checks = {c["name"]: c for c in json.loads(result.stdout)}
    assert checks["files"]["passed"] is False
    assert (
        "differs from its sha256" in checks["files"]["detail"]
        and "more.txt is not in the manifest" in checks["files"]["detail"]
    )


def test_a_wrong_kernel_is_seen(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One zero point off in one linear, as a wrong layout would have it."""
    prepare = ops.Ops.prepare
    seen = []

    def wrong(self: ops.Ops, tensor: IntegerTensor, bias: torch.Tensor | None = None) -> ops.Linear:
        seen.append(tensor)
        if len(seen) == 6:
            zeros = tensor.zeros.roll(1, 0)
            tensor = IntegerTensor(
                tensor.scheme, tensor.codes, tensor.scales, zeros, tensor.group_index
            )
        return prepare(self, tensor, bias)

    monkeypatch.setattr(ops.Ops, "prepare", wrong)
    checks = {check.name: check for check in verify(artifact, None, "cpu")}
    assert checks["layers"].passed is False and checks["layers"].detail.startswith("layer 1:")


def test_another_models_layers_are_seen(artifact: Path, tiny: Path, tmp_path: Path) -> None:
    from tests.helpers.tiny import write_llama

    other = write_llama(tmp_path / "other", seed=5, intermediate_size=128)
    checks = found(artifact, other)
    assert checks["reference"] is False and checks["layers"] is True
