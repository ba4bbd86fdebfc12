"""Triton's interpreter, made fit for tests of bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest


@pytest.fixture(autouse=True, scope="session")
def products_by_row() -> Iterator[None]:
    """`tl.dot` is numpy's product there, and on some processors BLAS gives a row other bits at
    another place in the matrix, which no tensor core does. In float64, rounded once, it does
    not."""
    if not os.environ.get("TRITON_INTERPRET"):
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(
        self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any
    ) -> Any:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(
            d.data.dtype
        )
        return TensorHandle(product + d.data, d.dtype.scalar)

    # infinities are among what is tested
    with pytest.MonkeyPatch.context() as patch, np.errstate(over="ignore", invalid="ignore"):
        patch.setattr(InterpreterBuilder, "create_dot", dot)
        yield
