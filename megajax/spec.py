"""ModuleSpec: which module fills a slot, as data. A spec is a printable factory; calling it builds the module."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

from flax.core import FrozenDict

Builder = Callable[..., Any]
"""What a slot holds: a `ModuleSpec`, a module class, or a `functools.partial` of one. Never a module instance, which
linen would adopt under the wrong parent or silently share between layers."""


@dataclasses.dataclass(unsafe_hash=True)
class ModuleSpec:
    """A module to be built later, with the parts it is to use.

    `spec(config=config, name="mlp")` builds `module(**params, submodules=submodules, config=config, name="mlp")`.
    Parts can be set in place (`spec.submodules.self_attention = MyAttention`) or in a copy (`replace`). Building a
    model never changes a spec. Counterpart of `megatron/core/transformer/spec_utils.py`.

    Example:
      >>> windowed = spec.replace(**{"self_attention.core_attention": MyKernel})
    """

    module: Builder
    submodules: Any = None
    params: Mapping[str, Any] = FrozenDict()

    def __post_init__(self) -> None:
        self.params = FrozenDict(self.params)

    def __call__(self, **kwargs: Any) -> Any:
        slots = {} if self.submodules is None else {"submodules": self.submodules}
        return self.module(**{**self.params, **slots, **kwargs})

    def replace(self, **slots: Builder) -> Self:
        """A copy with other parts; a dotted name reaches into nested specs, as does `module` or `params`."""
        own = {name: slots.pop(name) for name in ("module", "params") if name in slots}
        submodules = self.submodules
        for path, builder in slots.items():
            slot, _, rest = path.partition(".")
            names = [field.name for field in dataclasses.fields(submodules)] if submodules is not None else []
            if slot not in names:
                raise ValueError(f"{self.name} has no slot {slot!r}; it has {', '.join(names) or 'none'}")
            if rest:
                inner = getattr(submodules, slot)
                if not isinstance(inner, ModuleSpec):
                    raise ValueError(f"{self.name}.{slot} is no ModuleSpec, so {rest!r} cannot be replaced inside it")
                builder = inner.replace(**{rest: builder})
            submodules = dataclasses.replace(submodules, **{slot: builder})  # type: ignore[type-var]
        return dataclasses.replace(self, submodules=submodules, **own)

    @property
    def name(self) -> str:
        """Name of the module it builds, for messages."""
        return self.module.__name__ if isinstance(self.module, type) else repr(self.module)
