"""The measure that other tools' results are held to, against torch's own."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.quality import compare


def test_the_measure() -> None:
    torch.manual_seed(0)
    windows = [torch.randint(0, 50, (9,)).tolist() for _ in range(3)]
    reference, found = ([torch.randn(9, 50).log_softmax(-1) for _ in windows] for _ in range(2))
    measured = compare(reference, found, windows)
    a, b = torch.stack(reference).double(), torch.stack(found).double()
    assert measured["kl_mean"] == pytest.approx(
        float(torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(-1).mean())
    )
    assert measured["top1"] == float((a.argmax(-1) == b.argmax(-1)).double().mean())
    loss = torch.nn.functional.nll_loss(
        b[:, :-1].reshape(-1, 50), torch.tensor(windows)[:, 1:].reshape(-1)
    )
    assert measured["perplexity"] == pytest.approx(math.exp(loss))
    assert compare(reference, reference, windows)["kl_mean"] == 0
