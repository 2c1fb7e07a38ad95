"""A layer cut at its operations on the depth stream: the form in which `depth_scan` takes one, and one such layer run.

Between two operations stands a part, a function that never touches the stream. So the loop can keep an operation's
result instead of computing it again, and its backward can add into the stream's gradient directly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from moda_jax.model.depth.operations import Operation, SoftmaxAttention, no_segments
from moda_jax.model.depth.stream import Entry, Stream

Array = jax.Array
PyTree = Any
Values = dict[str, PyTree]


@dataclasses.dataclass(frozen=True)
class Part:
    """What a layer computes between two operations. It never touches the stream.

    Attributes:
        run: (params, values, *shared) -> (values, entries): a dict of what `takes` names to a dict of what `gives`
            names, and what is written to the stream before the next operation.
        takes: names of values: "x", the layer's input; "layer", its int32 number, counted from 0; what earlier parts
            and operations gave.
        gives: names of values. The last part gives "output", the layer's result, and may give "aux".
    """

    run: Callable[..., tuple[Values, tuple[Entry, ...]]]
    takes: tuple[str, ...]
    gives: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where an operation stands between two parts.

    Attributes:
        operation: what is done.
        takes: names of the values that it is asked with.
        gives: name of its result.
    """

    operation: Operation
    takes: tuple[str, ...]
    gives: str


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer cut at its operations, for `depth_scan`.

    Attributes:
        parts: one more than there are cuts.
        cuts: the operations between them.
        reread: (name of a value, number of a buffer, number of the layer's entry): values that stand in the stream
            unchanged, so that they are read again from there instead of being stored. Only for a layer that writes all
            of its entries.
        prepare: one layer's parameters -> what the parts get, differentiable; on a mesh, the gather of that layer.
    """

    parts: tuple[Part, ...]
    cuts: tuple[Cut, ...]
    reread: tuple[tuple[str, int, int], ...] = ()
    prepare: Callable[[PyTree], PyTree] = lambda params: params

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.cuts) + 1:
            raise ValueError(
                f"Layer: {len(self.parts)} parts and {len(self.cuts)} cuts, expected one part more than cuts"
            )
        known, used = {"x", "layer"}, {"output", "aux"}
        for i, part in enumerate(self.parts):
            cut = self.cuts[i] if i < len(self.cuts) else None
            for name in part.takes:
                _require_known(name, known, f"part {i}")
            known |= set(part.gives)
            used |= set(part.takes)
            if cut is not None:
                for name in cut.takes:
                    _require_known(name, known, f"the operation behind part {i}")
                known.add(cut.gives)
                used |= set(cut.takes)
        if "output" not in self.parts[-1].gives:
            raise ValueError(f"Layer: the last part gives {self.parts[-1].gives}, expected 'output' among it")
        idle = sorted(known - used - {"x", "layer"})
        if idle:
            raise ValueError(f"Layer: nobody takes {idle[0]!r}")

    @property
    def numbered(self) -> bool:
        """Whether a part asks for the layer's number."""
        return any("layer" in part.takes for part in self.parts)

    @property
    def has_aux(self) -> bool:
        """Whether the layer returns an auxiliary output."""
        return "aux" in self.parts[-1].gives


def _require_known(name: str, known: set[str], where: str) -> None:
    if name not in known:
        raise ValueError(f"Layer: {where} takes {name!r}, expected one of {', '.join(sorted(known))}")


@dataclasses.dataclass(frozen=True)
class PartedBlock:
    """A layer cut at its attention op alone, for `depth_scan`; its stream is a `DepthStream`.

    Attributes:
        before: (params, x, *shared) -> (query [B, T, N, H], key, value [B, T, K, H]).
        after: (params, x, key, value, attended [B, T, N, H], *shared) -> (x, entries); entries is a tuple of
            `entries_per_layer` pairs (key, value), [B, T, K, H] each.
        entries_per_layer: slots that the layer fills.
        writes_own_key_value: entries[0] is `before`'s (key, value): they are then re-read from the stream, not stored.
        segment_ids: (*shared) -> [B, T] int32 or None: the op's mask.
        scale: of the logits; None: H ** -0.5.
        implementation: of the op; None: the best for the device.
        causal: a token sees the sequence up to itself; False: all of it.
        prepare: one layer's parameters -> what both parts get, differentiable; on a mesh, the gather of that layer.
    """

    before: Callable[..., tuple[Array, Array, Array]]
    after: Callable[..., tuple[PyTree, tuple[tuple[Array, Array], ...]]]
    entries_per_layer: int
    writes_own_key_value: bool = False
    segment_ids: Callable[..., Array | None] = no_segments
    scale: float | None = None
    implementation: str | None = None
    prepare: Callable[[PyTree], PyTree] = lambda params: params
    causal: bool = True

    def layer(self) -> Layer:
        """The same as a `Layer`."""
        op = SoftmaxAttention(True, self.segment_ids, self.scale, self.implementation, causal=self.causal)
        return Layer(
            parts=(
                Part(_Before(self), ("x",), ("query", "key", "value")),
                Part(_After(self), ("x", "key", "value", "attended"), ("output",)),
            ),
            cuts=(Cut(op, ("query", "key", "value"), "attended"),),
            reread=(("key", 0, 0), ("value", 1, 0)) if self.writes_own_key_value else (),
            prepare=self.prepare,
        )


@dataclasses.dataclass(frozen=True)
class _Before:
    block: PartedBlock

    def __call__(self, params: PyTree, values: Values, *shared: PyTree) -> tuple[Values, tuple[Entry, ...]]:
        query, key, value = self.block.before(params, values["x"], *shared)
        return {"query": query, "key": key, "value": value}, ()


@dataclasses.dataclass(frozen=True)
class _After:
    block: PartedBlock

    def __call__(self, params: PyTree, values: Values, *shared: PyTree) -> tuple[Values, tuple[Entry, ...]]:
        x, entries = self.block.after(params, values["x"], values["key"], values["value"], values["attended"], *shared)
        if len(entries) != self.block.entries_per_layer:
            raise ValueError(
                f"depth_scan: `after` returned {len(entries)} entries, expected entries_per_layer="
                f"{self.block.entries_per_layer}"
            )
        return {"output": x}, tuple(Entry(tuple(entry)) for entry in entries)


def run_layer(
    layer: Layer,
    params: PyTree,
    x: PyTree,
    stream: Stream,
    number: Array | int | None,
    shared: tuple,
    operate: Callable[[Cut, Values, Stream], tuple[PyTree, Stream, int]] | None = None,
) -> tuple[PyTree, Stream]:
    """One layer outside of the loop, differentiable by JAX.

    Args:
        layer, params, x, stream, shared: as in `depth_scan`, the parameters of one layer.
        number: the layer's.
        operate: (cut, the values so far, stream) -> (result, stream, how many of the next part's entries stand in the
            stream already); None: runs the cut's operation.
    """
    params = layer.prepare(params)
    values, there = {"x": x, "layer": number}, 0
    for i, part in enumerate(layer.parts):
        given, entries = part.run(params, {name: values[name] for name in part.takes}, *shared)
        values |= given
        stream = stream if there == 0 else stream.with_length(stream.length_after(there))
        for entry in entries[there:]:
            stream = stream.write(entry)
        there = 0
        if i < len(layer.cuts):
            cut = layer.cuts[i]
            if operate is None:
                values[cut.gives] = cut.operation(tuple(values[name] for name in cut.takes), stream, shared)
            else:
                values[cut.gives], stream, there = operate(cut, values, stream)
    return values["output"], stream
