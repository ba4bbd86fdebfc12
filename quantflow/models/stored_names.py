"""Names of tensors in a class of transformers and on disk.

The library's own table (`transformers.conversion_mapping`) says how what is stored becomes what a
class holds: names that change, and matrices of single experts that are put into one tensor. What
`save_pretrained` would write is what artifacts have.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    rename_source_key,
)


class StoredNames:
    """Of one model."""

    def __init__(self, model: Any) -> None:
        self._model, self._state = model, dict.fromkeys(model.state_dict(keep_vars=True), True)
        every = get_model_conversion_mapping(model)
        self._renames = [change for change in every if isinstance(change, WeightRenaming)]
        self._converts = [change for change in every if isinstance(change, WeightConverter)]
        changes = [
            change
            for change in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(change, PrefixChange)  # of another class's files
        ]
        back = [change.reverse_transform() for change in reversed(changes)]
        self._forward = [change for change in changes if isinstance(change, WeightRenaming)]
        self._back = [change for change in back if isinstance(change, WeightRenaming)]
        self._apart = [change for change in back if isinstance(change, WeightConverter)]

    def stored(self, name: str) -> str:
        """On disk, of a tensor that is stored as the class holds it."""
        return str(apply_renamings(name, self._back))

    def held(self, name: str) -> str:
        """In the class, of a tensor on disk that is held as it is stored."""
        return str(apply_renamings(name, self._forward))

    def as_it_is(self, name: str) -> bool:
        """Whether what the class calls `name` is stored as one tensor of the same numbers."""
        return apply_converters(name, self._apart)[1] is None

    def turned(self, name: str) -> bool:
        """Whether its inputs and outputs stand in either order on disk, which the shape tells."""
        pattern = apply_converters(name, self._apart)[1]
        change = next((c for c in self._apart if pattern in c.source_patterns), None)
        return change is not None and all(
            isinstance(operation, Transpose) and operation.check_dims
            for operation in change.operations
        )

    def loaded(self, name: str) -> tuple[str, ...]:
        """What the class makes of a tensor on disk, by all that it looks for: names of other
        classes' files, with and without a prefix. Several where it cuts the tensor."""
        parts = {"base_model_prefix": self._model.base_model_prefix, "meta_state_dict": self._state}
        own, pattern = rename_source_key(name, self._renames, self._converts, **parts)
        if own not in self._state and name in self._state:
            return (name,)
        change = next((c for c in self._converts if pattern in c.source_patterns), None)
        first, *more = change.target_patterns if change else [""]
        return (own, *(own.replace(first, other) for other in more))

    def parts(self, name: str, tensor: Tensor) -> dict[str, tuple[int, ...]]:
        """Names and shapes on disk of a tensor of the class: several, in this order, where it puts
        their rows under one another (a convolution's kernels of q, k and v)."""
        _, pattern = apply_converters(name, self._apart)
        change = next((c for c in self._apart if pattern in c.source_patterns), None)
        (cut, *more) = change.operations if change else (None,)
        if more or not isinstance(cut, Chunk) or cut.dim or cut.num_shards_attribute:
            return {self.stored(name): tuple(tensor.shape)}
        return self.taken_apart(name, tensor)

    def taken_apart(self, name: str, tensor: Tensor) -> dict[str, tuple[int, ...]]:
        """Names and shapes on disk of what the class holds as `tensor`, on the meta device."""
        first, pattern = apply_converters(name, self._apart)
        if pattern is None:
            return {self.stored(name): tuple(tensor.shape)}
        change = deepcopy(next(c for c in self._apart if pattern in c.source_patterns))
        change.add_tensor(first, name, pattern, tensor)
        parts = change.convert(first, model=self._model, config=self._model.config)
        return {
            self.stored(part): tuple((value[0] if isinstance(value, list) else value).shape)
            for part, value in parts.items()
        }
