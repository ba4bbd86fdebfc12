"""A weight as it is stored, in numbers of any kind: codes, and what the codes of each group stand
for.

Shapes: `N` output channels, `K` input channels, `G` groups of them a row. A kind says here what it
is and what it has a group; rows, ranks, the store's tensors and the check then follow. Store,
sharding and formats know no kind but by its name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from quantflow.errors import Problem
from quantflow.quant.packing import pack_rows, unpack_rows

if TYPE_CHECKING:
    from quantflow.quant.grid import GridRules
    from quantflow.quant.scheme import Scheme


BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class QuantizedTensor(ABC):
    """codes: uint8 `[N, K]`, in `0..2^bits - 1`. scales: floating `[N, G]`, in the dtype that is
    stored.

    Of a kind: kind: its name in `NUMBERS` and in files. grid: what its codes stand for, in words
    that follow "a grid". method: how a weight is rounded to it without calibration, as reports call
    it. stages: those of a recipe that make it. widths: bits of a code that it can have.
    zero_points: a scheme may leave them free. fixed_groups: a recipe does not choose the size of
    its groups. floats, integers: the parts that have one number a group, `[N, G]`; integers are
    uint8, as codes are.
    """

    kind: ClassVar[str]
    grid: ClassVar[str]
    method: ClassVar[str] = "rtn"
    stages: ClassVar[tuple[str, ...]] = ("rtn",)
    widths: ClassVar[tuple[int, ...]] = BITS
    zero_points: ClassVar[bool] = False
    fixed_groups: ClassVar[bool] = False
    floats: ClassVar[tuple[str, ...]] = ("scales",)
    integers: ClassVar[tuple[str, ...]] = ()

    scheme: Scheme
    codes: Tensor
    scales: Tensor

    # What a kind has of its own.

    @classmethod
    @abstractmethod
    def title(cls, scheme: Scheme, group: str) -> str:
        """What people call a scheme of this kind, such as `W4 g128 asymmetric`. group: its groups
        in short, `g128` or `channel`."""

    @classmethod
    @abstractmethod
    def group_bits(cls, scheme: Scheme) -> int:
        """Bits that a group takes in a packed weight, beside its codes."""

    @classmethod
    @abstractmethod
    def quantize(
        cls,
        weight: Tensor,
        scheme: Scheme,
        rules: GridRules,
        *,
        search: bool = False,
        importance: Tensor | None = None,
    ) -> Self:
        """`weight` `[N, K]`, rounded to the nearest of these numbers. search: for the range of
        least error, where the kind has one; importance: what that error is weighed by (see
        `grid.group_loss`)."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]` in `dtype`, computed in float32 (float64 if that is `dtype`)."""

    # What most kinds have alike.

    @classmethod
    def candidates(
        cls, weight: Tensor, scheme: Scheme, rules: GridRules, source: QuantizedTensor | None
    ) -> Iterator[Self]:
        """Ways to write `weight` `[N, K]` (float32) in these numbers, of which the one of least
        error is taken. source: what it was dequantised from, if anything."""
        yield cls.quantize(weight, scheme, rules, search=True)

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def indexed(self) -> bool:
        """Whether its channels are not in the order of their groups."""
        return False

    def steps(self) -> tuple[Tensor, Tensor] | None:
        """The distance of two neighbouring numbers, and where zero lies in such steps, both float32
        `[N, G]`; None where the steps of a group are not even, or its channels are not together."""
        return None

    def spanned(self, weight: Tensor) -> Tensor | None:
        """The share of each group's range (zero included) that its numbers span, `[groups that have
        a range]`; None for a kind that clips nothing. weight: float32 `[N, K]`, what was
        rounded."""
        return None

    def remarks(self, rules: GridRules) -> dict[str, Any]:
        """What a report should say of the numbers that came out."""
        return {}

    def rows(self, part: slice) -> Self:
        """Some of its output channels."""
        return replace(
            self,
            codes=self.codes[part],
            **{name: getattr(self, name)[part] for name in self.floats + self.integers},
        )

    def cut(self, dimension: int, rank: int, tp: int) -> Self:
        """Rank `rank`'s part of `tp`; `dimension` 0 cuts the outputs, 1 the inputs (whole groups:
        the plan has checked). Raises ValueError for what cannot be cut."""

        def part(whole: Tensor) -> Tensor:
            # One group a row is every rank's, if the inputs are cut.
            return (
                whole
                if dimension == 1 and whole.shape[1] == 1
                else whole.chunk(tp, dimension)[rank].contiguous()
            )

        codes = self.codes.chunk(tp, dimension)[rank].contiguous()
        groups: dict[str, Any] = {
            name: part(getattr(self, name)) for name in self.floats + self.integers
        }
        return replace(self, codes=codes, **groups)

    def parts(self) -> dict[str, Tensor]:
        """Its tensors as the store keeps them: codes packed along the row, low bits first, and the
        others by their names."""
        groups = {name: getattr(self, name) for name in self.floats + self.integers}
        return {"codes": pack_rows(self.codes, self.scheme.bits), **groups}

    @classmethod
    def from_parts(cls, scheme: Scheme, parts: Mapping[str, Tensor], in_features: int) -> Self:
        """The tensor of which `parts` came; others among them are not looked at."""
        codes = unpack_rows(parts["codes"], scheme.bits, in_features)
        return cls(scheme, codes, *(parts[name] for name in cls.floats + cls.integers))

    def problems(self, name: str) -> list[Problem]:
        """What keeps it from being what its scheme says: shapes, ranges of codes, finite numbers.
        The scheme fits the shape.

        An encoder that trusted its input would spill a code that is out of range into its
        neighbours.
        """
        scheme, (n, k) = self.scheme, self.shape
        groups, problems = scheme.groups(k), []
        for part in self.floats + self.integers:
            if tuple(shape := getattr(self, part).shape) != (n, groups):
                problems.append(
                    Problem(
                        f"{name} {part}", f"shape {list(shape)}", f"[{n}, {groups}] for {scheme}"
                    )
                )
        for part in ("codes", *self.integers):
            stored = getattr(self, part)
            if stored.dtype != torch.uint8:
                problems.append(Problem(f"{name} {part}", f"dtype {stored.dtype}", "torch.uint8"))
            elif stored.numel() and (most := int(stored.max())) > scheme.levels:
                problems.append(
                    Problem(
                        f"{name} {part}",
                        f"a value of {most}",
                        f"at most {scheme.levels} for {scheme.bits} bits",
                    )
                )
        # Extremes: torch finds them in a tenth of the time that `all` takes over truth values, and
        # NaN is one.
        for part in self.floats:
            stored = getattr(self, part)
            if stored.numel() and not all(math.isfinite(end) for end in stored.aminmax()):
                problems.append(Problem(f"{name} {part}", "NaN or infinity", "finite numbers"))
        return problems
