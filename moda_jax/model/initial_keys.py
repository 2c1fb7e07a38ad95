"""Keys of initial values: a function of the seed and of a parameter's path, and of nothing else.

So two models share the initial value of every parameter that both have, whatever else is in them, and a layer has its
own wherever it stands in the tree.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib

import jax
from flax import nnx

Array = jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base"], meta_fields=["path"])
@dataclasses.dataclass(frozen=True)
class InitialKeys:
    """The keys below one place of the model; takes the place of `nnx.Rngs` in a constructor.

    Attributes:
        base: a typed PRNG key.
        path: names that lead from where `base` belongs to the place.
    """

    base: Array
    path: tuple[str, ...] = ()

    @classmethod
    def of(cls, rngs: nnx.Rngs | InitialKeys) -> InitialKeys:
        """From a stream of keys, of which one is drawn; keys of this kind as they are."""
        return rngs if isinstance(rngs, cls) else cls(rngs.params())

    def at(self, name: str) -> InitialKeys:
        """The keys of the part that the module calls `name`."""
        return InitialKeys(self.base, (*self.path, name))

    def layer(self, number: Array | int) -> InitialKeys:
        """The keys of a layer; the paths below count from there."""
        return InitialKeys(jax.random.fold_in(self.at("layers").params(), number))

    def params(self) -> Array:
        """The key of the parameter that is made here; a module makes one."""
        return jax.random.fold_in(self.base, zlib.crc32(".".join(self.path).encode()))
