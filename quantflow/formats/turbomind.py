"""TurboMind's workspace, of LMDeploy v0.1: what AWQ holds, in other files and another order of
nibbles.

A weight is handed over in AWQ's three tensors, and read back in them; how the workspace arranges
those, and the rest of the model, is `checkpoints/turbomind/workspace.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantflow.errors import Problem
from quantflow.formats.awq import Awq
from quantflow.formats.base import ConfigRequest, fitting_group

if TYPE_CHECKING:
    from quantflow.quant.scheme import Scheme


@dataclass(frozen=True)
class TurboMind(Awq):
    name: str = "turbomind"
    container: str = "workspace"

    def check(
        self,
        module: str,
        shape: tuple[int, int],
        scheme: Scheme,
        *,
        act_order_index: bool,
        tp: int = 1,
        tp_dim: int | None = None,
    ) -> list[Problem]:
        problems = super().check(
            module, shape, scheme, act_order_index=act_order_index, tp=tp, tp_dim=tp_dim
        )
        for axis, kind in enumerate(("output", "input")):
            period = 128 * tp if tp > 1 and tp_dim == axis else 32
            if shape[axis] % period:
                expected = f"a multiple of {period}{', 128 on each rank' if period > 32 else ''}"
                problems.append(
                    Problem(
                        module,
                        f"{shape[axis]} {kind} channels",
                        expected,
                        "Use awq or gptq, or fewer ranks",
                    )
                )
        return problems

    def nearest(self, module: str, scheme: Scheme, shape: tuple[int, int]) -> Scheme:
        scheme = super().nearest(module, scheme, shape)
        # config.ini has one number for all, so that a whole row's scale is repeated for smaller
        # groups.
        return (
            replace(scheme, group_size=fitting_group(shape[1], 128))
            if scheme.group_size == -1
            else scheme
        )

    def doubts(self, request: ConfigRequest) -> list[Problem]:
        return []

    def quantization_config(self, request: ConfigRequest) -> dict[str, Any]:
        return {
            **super().quantization_config(replace(request, kv_scales=None)),
            "quant_method": "turbomind",
        }
