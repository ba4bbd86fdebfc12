"""A quantised weight that is to be written: what is wrong with its scheme whatever the format, and
the nearest that is not. Nothing here imports torch: recipe planning reads it.

Shapes: `N` output channels, `K` input channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from quantflow.errors import Problem

if TYPE_CHECKING:
    from quantflow.quant.scheme import Scheme

LEAST_GROUP = 16  # in smaller groups the scales take as much as the bits save


@dataclass(frozen=True)
class Weight:
    """What is known of a weight before it is read.

    shape: `(N, K)` of the whole. indexed: it has a group index. ranks, cut: it is cut into so many
    along its outputs (0) or its inputs (1), and each must be writable; None where every rank holds
    all of it.
    """

    module: str
    shape: tuple[int, int]
    scheme: Scheme
    indexed: bool = False
    ranks: int = 1
    cut: int | None = None

    @property
    def rank_shape(self) -> tuple[int, int]:
        """`(N, K)` of what one rank holds."""
        return rank_shape(self.shape, self.ranks, self.cut)

    @property
    def whole(self) -> Self:
        """The same, not cut."""
        return replace(self, ranks=1, cut=None)


def rank_shape(shape: tuple[int, int], ranks: int, cut: int | None) -> tuple[int, int]:
    """`(N, K)` of what one rank holds."""
    n, k = shape
    if cut is None:
        return n, k
    return (n // ranks, k) if cut == 0 else (n, k // ranks)


def grid_problems(weight: Weight, kinds: tuple[str, ...] = ()) -> list[Problem]:
    """What is wrong with a weight whatever the format: bits, group size, ranks. kinds: of numbers
    that may be stored; empty for any."""
    module, scheme, cut = weight.module, weight.scheme, weight.cut
    problems = []
    if kinds and scheme.kind not in kinds:
        problems.append(_other_numbers(weight, kinds))
    if scheme.bits not in scheme.numbers.widths:
        expected = in_words(scheme.numbers.widths)
        problems.append(Problem(module, f"{scheme.bits} bits", expected))
    if weight.ranks > 1 and cut is not None and weight.shape[cut] % weight.ranks:
        channels = f"{weight.shape[cut]} {('output', 'input')[cut]} channels"
        problems.append(Problem(module, channels, f"a multiple of tp = {weight.ranks}"))
        return problems
    if weight.ranks > 1 and cut == 1 and weight.indexed:
        problems.append(
            Problem(
                module,
                "a group index on a weight that is split along its inputs",
                "groups that do not cross ranks",
                "Use act_order: static",
            )
        )
    problems.extend(_group_problems(weight))
    return problems


def in_words(widths: tuple[int, ...]) -> str:
    """`2 to 8`, or `8`."""
    return f"{widths[0]} to {widths[-1]}" if len(widths) > 1 else str(widths[0])


def _other_numbers(weight: Weight, kinds: tuple[str, ...]) -> Problem:
    from quantflow.quant.numbers import NUMBERS

    stages = " or ".join(NUMBERS[kinds[0]].stages)
    hint = (
        f"A recipe's stage {stages} makes one; requantize: true in pack, or export --requantize,"
        " goes from one to the other"
    )
    return Problem(
        weight.module,
        f"{weight.scheme}, a grid {weight.scheme.numbers.grid}",
        " or ".join(f"a grid {NUMBERS[kind].grid}" for kind in kinds),
        hint,
    )


def _group_problems(weight: Weight) -> Iterator[Problem]:
    """Groups that do not fill the inputs of each rank, and what would."""
    module, scheme, inputs = weight.module, weight.scheme, weight.shape[1]
    k = weight.rank_shape[1]
    group = scheme.group_of(k)
    if group < 1:
        expected = "a positive number, or -1 for per channel"
        yield Problem(module, f"group_size {group}", expected)
    elif k % group and scheme.numbers.fixed_groups:
        expected = f"a multiple of the blocks of {group}"
        hint = "Ignore this module: it stays in 16 bits"
        yield Problem(module, f"{k} input channels", expected, hint)
    elif k % group:
        ranks = weight.ranks if weight.cut == 1 else 1
        each = f" on each of {ranks} ranks" if ranks > 1 else ""
        straddling = (
            ", so that a group straddles two of them" if ranks > 1 and inputs % group == 0 else ""
        )
        fitting = usual_group(k, group)
        # what kernels like, behind the largest
        sizes = [fitting, *(size for size in (64, 32, 16) if size < fitting and k % size == 0)]
        offered = f"{', '.join(str(size) for size in sizes if size > 0)} or -1".removeprefix(" or ")
        padded = -(-inputs // (group * ranks)) * group * ranks
        hint = f"Use group_size {offered} (per channel) for this module, or ignore it"
        hint += f"; {group} fits if the {inputs} inputs are padded with zeros to {padded}"
        yield Problem(
            module,
            f"{k} input channels{each}{straddling}",
            f"a multiple of group_size {group}",
            hint,
        )


def integer_scheme(weight: Weight) -> Scheme:
    """The scheme with integer zero points that is nearest to the weight's, of any kind, its groups
    no larger than they were."""
    scheme, k = weight.scheme, weight.rank_shape[1]
    size = scheme.group_size if k % scheme.group_of(k) == 0 else fitting_group(k, scheme.group_size)
    return replace(scheme, group_size=size, kind="integer", double=False)


def fitting_group(k: int, most: int) -> int:
    """The largest group size up to `most` that divides `k` input channels."""
    return max(d for d in range(1, min(most, k) + 1) if k % d == 0)


def usual_group(k: int, most: int) -> int:
    """The largest group size up to `most` that divides `k` input channels and is worth its scales;
    -1, the whole row, for none."""
    size = fitting_group(k, most)
    return size if size >= min(LEAST_GROUP, most) else -1
