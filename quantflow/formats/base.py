"""What a checkpoint format is. Nothing here imports torch: recipe planning reads it.

A format translates one quantised weight to the tensors that other software reads, exactly or not at
all. Shapes: `N` output channels, `K` input channels, `G` groups a row. A module is named as in the
checkpoint, `model.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from quantflow.errors import FormatError, Problem
from quantflow.formats.abilities import Ability
from quantflow.formats.weight import Weight, grid_problems, integer_scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantflow.quant.numbers import QuantizedTensor
    from quantflow.quant.scheme import Scheme

Spec = tuple[str, tuple[int, ...]]  # a tensor's dtype as safetensors spells it, and its shape

SAFETENSORS_DTYPE = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class ConfigRequest:
    """What a checkpoint's configuration is to say.

    modules: the scheme of every quantised module. ignored: the linears that are not. default: the
    scheme that needs no naming. kv_scales: the kind of KV scales that are written too, one of the
    format's own `kv_scales`. act_order: some tensor has a group index. model_dtype: as torch names
    it.
    """

    modules: Mapping[str, Scheme]
    ignored: list[str]
    default: Scheme
    kv_scales: str | None = None
    act_order: bool = False
    model_dtype: str = "bfloat16"


@dataclass(frozen=True)
class Format(ABC):
    """A checkpoint format.

    name: in a recipe.

    Of each: title: as people write it. ability: what it holds, in the words of the table that users
    read. container: what the tensors are written into, a key of `CONTAINERS`. kinds: of numbers
    that it holds, by their names in `NUMBERS`; empty for any. suffixes: what follows the module in
    the names of its tensors. marks: those of which every quantised module has one, and no other
    module any. index_suffixes: those of a group index. min_zero: the least zero point that is held.
    keeps_codes: weights stay what they are; else they are written as the numbers that the codes
    stand for. holds_plain: a model of which no weight is quantised has a place, too.
    holds_embedding: so has a quantised embedding. holds_index: so has a group index. kv_scales: the
    kinds of KV-cache scales that it has names for among the weights, as `kv_scales` of `pack` calls
    them. parallel: it can be cut into tensor-parallel ranks.
    """

    title: ClassVar[str]
    ability: ClassVar[Ability]
    container: ClassVar[str] = "directory"
    kinds: ClassVar[tuple[str, ...]] = ("integer",)
    suffixes: ClassVar[tuple[str, ...]] = ()
    marks: ClassVar[tuple[str, ...]] = ()
    index_suffixes: ClassVar[tuple[str, ...]] = ()
    keeps_codes: ClassVar[bool] = True
    holds_plain: ClassVar[bool] = False
    holds_embedding: ClassVar[bool] = False
    holds_index: ClassVar[bool] = False
    kv_scales: ClassVar[tuple[str, ...]] = ()
    parallel: ClassVar[bool] = True

    name: str

    # What a format has of its own.

    @abstractmethod
    def scale_dtype(self, model_dtype: str) -> str:
        """The dtype, as torch names it, in which the scales of a model in `model_dtype` are stored;
        of the weights themselves where they are dequantised."""

    @abstractmethod
    def specs(self, weight: Weight, scale_dtype: str) -> dict[str, Spec]:
        """The tensors that `encode` writes of a weight that is not cut, in its order. scale_dtype:
        as `scale_dtype` says."""

    @abstractmethod
    def _encode(
        self, module: str, tensor: QuantizedTensor, model_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The tensors of a weight of which `check` and the tensor itself say nothing. Raises
        FormatError for what the numbers themselves decide."""

    @abstractmethod
    def scheme_of(self, module: str, config: Mapping[str, Any]) -> Scheme | None:
        """The scheme that a `quantization_config` gives a module, or None if it leaves it alone.
        Raises FormatError for what QuantFlow cannot read."""

    @abstractmethod
    def _decode(
        self, module: str, scheme: Scheme, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedTensor:
        """The weight of a module with that scheme. Raises FormatError for tensors that do not
        fit."""

    @abstractmethod
    def _config(self, request: ConfigRequest) -> dict[str, Any]:
        """The `quantization_config`. Raises FormatError for what it cannot express."""

    # What most formats have alike.

    @property
    def dtype(self) -> str | None:
        """What weights are dequantised into, as torch names it; None for the model's own, and where
        codes are kept."""
        return None

    @property
    def min_zero(self) -> int:
        return 0

    def holds_numbers(self, kind: str) -> bool:
        """Whether it has a place for such numbers."""
        return not self.kinds or kind in self.kinds

    def check(self, weight: Weight) -> list[Problem]:
        """Everything that keeps a weight from being written, known without reading it."""
        problems = grid_problems(weight if self.parallel else weight.whole, self.kinds)
        problems += self._refused(weight)
        if weight.indexed and not self.holds_index:
            problems.append(self._no_index(weight.module))
        return problems

    def _refused(self, weight: Weight) -> Iterable[Problem]:
        """What `check` says in this format alone."""
        return ()

    def _no_index(self, where: str) -> Problem:
        hint = "Use act_order: static, or gptq"
        return Problem(where, f"a group index, which {self.title} cannot hold", hint=hint)

    def nearest(self, weight: Weight) -> Scheme:
        """The scheme to quantise a weight with again that `check` refuses, which is its own where
        it does not. Where it is refused too, nothing helps."""
        return integer_scheme(weight)

    def prefers_symmetric(self, *, experts: bool) -> bool:
        """Whether weights are symmetric where a recipe leaves it open: what every reader of the
        format loads. experts: of a mixture."""
        return False

    def shares_scheme(self, module: str) -> bool:
        """Whether a module's width and groups must be those of all others for which this is so."""
        return False

    def encode(
        self, module: str, tensor: QuantizedTensor, model_dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The tensors of one weight, which may share memory with `tensor`. Raises FormatError for
        what cannot be held exactly."""
        weight = Weight(module, tensor.shape, tensor.scheme, tensor.indexed)
        if problems := self.check(weight) or tensor.problems(module):
            raise FormatError(problems)
        return self._encode(module, tensor, model_dtype)

    def decode(
        self, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedTensor:
        """The weight of a module, from (at least) its tensors and the `quantization_config`. Raises
        FormatError if they do not fit."""
        scheme = self.scheme_of(module, config)
        if scheme is None:
            raise FormatError(Problem(module, "not quantised, says quantization_config"))
        return self._decode(module, scheme, tensors, config)

    def quantization_config(self, request: ConfigRequest) -> dict[str, Any]:
        """The `quantization_config` of config.json. Raises FormatError for what the format cannot
        say."""
        if problems := self._unsayable(request):
            raise FormatError(problems)
        return self._config(request)

    def _unsayable(self, request: ConfigRequest) -> list[Problem]:
        """What a `quantization_config` has no words for."""
        problems = []
        if request.act_order and not self.holds_index:
            problems.append(self._no_index("act_order"))
        if request.kv_scales and request.kv_scales not in self.kv_scales:
            problems.append(Problem("kv_scales", f"{self.title} has no place for KV scales"))
        return problems

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Further JSON files that readers of the format expect, by name, from its
        `quantization_config`."""
        return {}

    def doubts(self, request: ConfigRequest) -> list[Problem]:
        """What engines are known not to load, or to misread, of a checkpoint that is right: `where`
        is the engine, with its version. It keeps nothing from being written."""
        return []

    def chances(self, request: ConfigRequest, kv_granularity: str | None = None) -> list[Problem]:
        """What it holds only if the numbers happen to be so: nobody should wait for hours to learn
        that they are not. kv_granularity: of the KV-cache parameters, where there are any."""
        return []

    def in_dtype(self, dtype: str | None, *, rounded: bool) -> Self:
        """It, writing weights in a dtype that a user asks for (None: the usual). rounded: also
        weights that do not fit into it. Raises FormatError where weights keep their codes."""
        if dtype is not None:
            raise FormatError(
                Problem(
                    "--dtype",
                    f"{dtype!r} with --format {self.name}",
                    "--format huggingface, the one that dequantises",
                )
            )
        return self

    @property
    def unrounded(self) -> Self:
        """It, for weights that nobody rounded: they are written as they are stored."""
        return self

    def all_symmetric(self, modules: Collection[str], read: Callable[[str], Tensor]) -> bool:
        """Whether all weights of a checkpoint are symmetric, where its config says the same of
        either kind. read: a tensor by its name."""
        return False

    def stored_kv_scales(self, config: Mapping[str, Any]) -> str | None:
        """Which KV scales a checkpoint says that it holds: None, `fp8` or `int8`, one each of K and
        V of a layer, or other ones in words."""
        return None
