"""What the layer loop stores of a layer for the backward pass: of vjp functions, and of where its entries went."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from moda_jax.model.depth.cut_layer import Part, Values
from moda_jax.model.depth.stream import Entry, Stream

Array = jax.Array
PyTree = Any


def differentiated(part: Part, params: PyTree, values: Values, shared: tuple):
    """(what the part gives, its entries, its vjp: of (given, the entries' values) to (params, taken, shared))."""

    def run(params, taken, shared):
        given, entries = part.run(params, taken, *shared)
        if set(given) != set(part.gives):
            raise ValueError(f"depth_scan: a part gave {sorted(given)}, expected {sorted(part.gives)}")
        return (given, tuple(tuple(entry.values) for entry in entries)), [entry.when for entry in entries]

    taken = {name: values[name] for name in part.takes}
    (given, entries), vjp, when = jax.vjp(run, params, taken, shared, has_aux=True)
    return given, tuple(Entry(v, w) for v, w in zip(entries, when, strict=True)), vjp


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["slots", "lengths"], meta_fields=["counts", "gradient_group"]
)
@dataclasses.dataclass(frozen=True)
class Places:
    """Where a layer's entries went, and how long the stream was at each of its operations.

    Where every entry is written that follows from their number, and nothing is stored.
    """

    counts: tuple[int, ...]  # entries of each part
    slots: tuple[tuple[Array, ...], ...] | None
    lengths: tuple[Array, ...] | None
    gradient_group: int = 1  # the most that an operation asks for

    @classmethod
    def of(cls, written: list[tuple[tuple[Array, bool], ...]], lengths: list[Array], gradient_group: int = 1) -> Places:
        """From each part's (slot, whether it is always written), and the lengths."""
        counts = tuple(len(entries) for entries in written)
        if all(always for entries in written for _, always in entries):
            return cls(counts, None, None, gradient_group)
        slots = tuple(tuple(slot for slot, _ in entries) for entries in written)
        return cls(counts, slots, tuple(lengths), gradient_group)

    def slots_of(self, part: int, stream: Stream) -> tuple[Array, ...]:
        """The slots of a part's entries; `stream` has the length that the layer found."""
        if self.slots is not None:
            return self.slots[part]
        first = sum(self.counts[:part])
        return tuple(stream.length_after(first + i) for i in range(self.counts[part]))

    def stream_at(self, cut: int, stream: Stream) -> Stream:
        """The stream as the operation found it."""
        if self.lengths is not None:
            return stream.with_length(self.lengths[cut])
        count = sum(self.counts[: cut + 1])
        return stream.with_length(stream.length_after(count)) if count else stream


@functools.partial(jax.tree_util.register_dataclass, data_fields=["kept"], meta_fields=["treedef", "sources"])
@dataclasses.dataclass(frozen=True)
class Residuals:
    """Vjp functions, and other values, as what has to be stored of them: not what the reverse loop has anyway.

    A vjp function is a pytree whose leaves are the arrays that it keeps. Many are the very inputs of its part (weights,
    the layer's input, attention's output); storing those per layer would copy them, the weights above all. An array
    that two of them keep is stored once.
    """

    kept: list[Array]
    treedef: Any
    sources: tuple[tuple[bool, int], ...]  # per leaf: whether it is known, and its place among the known or the kept

    @classmethod
    def of(cls, tree: PyTree, known: PyTree) -> Residuals:
        """What to store of `tree`, traced in the same loop body as `known`."""
        places = {id(leaf): (True, i) for i, leaf in enumerate(jax.tree.leaves(known))}
        leaves, treedef = jax.tree.flatten(tree)
        kept, sources = [], []
        for leaf in leaves:
            if id(leaf) not in places:
                places[id(leaf)] = (False, len(kept))
                kept.append(leaf)
            sources.append(places[id(leaf)])
        return cls(kept, treedef, tuple(sources))

    def restore(self, known: PyTree) -> PyTree:
        """The tree again, from what was kept and the same known values."""
        leaves = {True: jax.tree.leaves(known), False: self.kept}
        return jax.tree.unflatten(self.treedef, [leaves[is_known][i] for is_known, i in self.sources])
