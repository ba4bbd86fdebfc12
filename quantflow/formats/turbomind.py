"""TurboMind's workspace, of LMDeploy v0.1: what AWQ holds, in other files and another order of
nibbles.

A weight is handed over in AWQ's three tensors, and read back in them; how the workspace arranges
those, and the rest of the model, is `checkpoints/turbomind/`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantflow.errors import Problem
from quantflow.formats.awq import Awq
from quantflow.formats.base import ConfigRequest
from quantflow.formats.weight import Weight, fitting_group

if TYPE_CHECKING:
    from quantflow.quant.scheme import Scheme


@dataclass(frozen=True)
class TurboMind(Awq):
    ability = replace(
        Awq.ability, kv_scales="inside, one a layer and rank", tensor_parallel="yes, inside"
    )
    container = "workspace"
    holds_plain = True

    name: str = "turbomind"

    def _refused(self, weight: Weight) -> Iterator[Problem]:
        yield from super()._refused(weight)
        for axis, side in enumerate(("output", "input")):
            channels = weight.shape[axis]
            period = 128 * weight.ranks if weight.ranks > 1 and weight.cut == axis else 32
            if channels % period:
                expected = f"a multiple of {period}{', 128 on each rank' if period > 32 else ''}"
                hint = "Use awq or gptq, or fewer ranks"
                yield Problem(weight.module, f"{channels} {side} channels", expected, hint)

    def nearest(self, weight: Weight) -> Scheme:
        scheme = super().nearest(weight)
        # config.ini has one number for all, so that a whole row's scale is repeated for smaller
        # groups.
        return (
            replace(scheme, group_size=fitting_group(weight.rank_shape[1], 128))
            if scheme.group_size == -1
            else scheme
        )

    def doubts(self, request: ConfigRequest) -> list[Problem]:
        return []

    def chances(self, request: ConfigRequest, kv_granularity: str | None = None) -> list[Problem]:
        problems = []
        if request.modules and request.model_dtype == "bfloat16":
            what = (
                "embeddings and norms in bfloat16, of which int4 workspaces hold what float16 does"
            )
            problems.append(Problem(self.name, what, "a float16 model"))
        if kv_granularity not in (None, "tensor"):
            what = f"kv_qparams with granularity {kv_granularity}"
            expected = "tensor: a workspace has one scale for each layer and rank"
            problems.append(Problem(self.name, what, expected))
        return problems

    def _config(self, request: ConfigRequest) -> dict[str, Any]:
        return {**super()._config(request), "quant_method": "turbomind"}
