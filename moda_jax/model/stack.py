"""The trunk of a transformer: its layers, the one walk over them, and the final norm.

Training, prefill, decoding, attention maps and diagnosis are all this walk; they differ in a `Step`: how attention's
softmax is computed, and what a layer leaves behind. The first L-1 layers are stacked parameters under one loop; the
last stands apart, because a mechanism may write nothing in it and hold what belongs to the whole model there.

Axes: B batch, T tokens, D model width, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config import TransformerConfig
from moda_jax.model.attention import default_positions
from moda_jax.model.block import Block, layer_norm
from moda_jax.model.depth.cut_layer import Cut, Layer, Values, run_layer
from moda_jax.model.depth.loop import depth_scan
from moda_jax.model.depth.mechanism import OUTPUT, DepthMechanism
from moda_jax.model.depth.operations import SoftmaxAttention
from moda_jax.model.depth.registry import find_mechanism
from moda_jax.model.depth.stream import Stream
from moda_jax.model.initial_keys import InitialKeys
from moda_jax.model.module import Module
from moda_jax.numerics.precision import compute_dtype
from moda_jax.parallel.mesh import current_mesh
from moda_jax.parallel.parameters import LayerGather
from moda_jax.parameter import cast_matrices

Array = jax.Array
PyTree = Any


class Step:
    """What a walk does at every layer besides the layer itself. The base does nothing.

    Attributes:
        spare_slots: empty slots that `attend` needs in a stream whose slots are part of the softmax.
        numbered: `attend` is told the layer's number.
    """

    spare_slots = 0
    numbered = False

    def attend(
        self,
        operation: SoftmaxAttention,
        request: tuple[Array, Array, Array],
        stream: Stream,
        shared: tuple,
        number: Array | int | None,
        held: PyTree,
    ) -> tuple[Array, PyTree, Stream, int]:
        """Attention's softmax in one layer.

        Args:
            operation: the softmax as the model has it.
            request: query [B, T, N, H], key and value [B, T, K, H].
            stream: as the operation finds it.
            shared: positions and segment ids.
            number: of the layer.
            held: as given to the walk; changed by nobody.

        Returns:
            attended [B, T, N, H]; what the layer leaves behind; the stream; how many entries of the sub-layer stand in
            that stream already, beyond its length.
        """
        del number, held
        return operation(request, stream, shared), None, stream, 0

    def keep(self, stream: Stream, held: PyTree) -> PyTree:
        """What the walk returns in the place of `held`; stream: the last layer's. By default `held` itself."""
        del stream
        return held

    def leave(self, left: PyTree, carry: PyTree) -> PyTree:
        """What the layer leaves behind, from what `attend` left and the layer's result."""
        del carry
        return left


class Stack(Module):
    """A transformer between its embedding and its head.

    Args:
        config: of the model; fields of embedding and head are not read.
        rngs: source of the parameters.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs | InitialKeys) -> None:
        find_mechanism(config.depth).check(config)
        keys = InitialKeys.of(rngs)
        self.config = config
        self.layers = _stacked_blocks(config, keys) if config.num_layers > 1 else None
        self.last_layer = Block(config, last=True, rngs=keys.layer(config.num_layers - 1))
        self.final_norm = layer_norm(config)

    def __call__(
        self,
        x: Array,
        segment_ids: Array | None = None,
        positions: Array | None = None,
        kept: Array | None = None,
    ) -> Array:
        """The final norm's output [B, T, D] from the embedded tokens x [B, T, D].

        Args:
            x: in the compute dtype.
            segment_ids: [B, T] int32; tokens of different segments do not see each other. None: one segment.
            positions: [B, T] int32, for the rotary embedding; or [B, T, axes], see `rotary.rotate`. None: 0..T-1.
            kept: [L, 2, B] bool, for stochastic depth: which rows keep the output of a layer's attention and of its FFN
                (`Block`). None: all.
        """
        mesh = current_mesh()
        if positions is None and mesh is not None and mesh.shape["context"] > 1:
            raise ValueError("positions: expected an array: tokens lie in balanced order under mesh.context > 1")
        return self.walk(x, default_positions(x) if positions is None else positions, segment_ids, kept=kept)[0]

    def walk(
        self,
        x: Array,
        positions: Array,
        segment_ids: Array | None,
        step: Step | None = None,
        *,
        held: PyTree = None,
        layer_params: tuple[PyTree, ...] | PyTree | None = None,
        last_token_only: bool = False,
        kept: Array | None = None,
    ) -> tuple[Array, PyTree, PyTree]:
        """Runs all layers.

        Args:
            x, positions, segment_ids: as in `__call__`, positions given.
            step: what happens besides; None: nothing, and the walk is made to be differentiated (`depth_scan`).
            held: given to every `step.attend`, through the loop, and returned as it is.
            layer_params: of the first L-1 layers, one stack or a tuple of them; None: the model's own. A tuple is
                walked layer by layer, with the numbers known in Python.
            last_token_only: the result is the last token's alone, [B, 1, D].
            kept: as in `__call__`.

        Returns:
            The final norm's output; what the layers left behind, stacked [L, ...] (of a tuple, a tuple of L); `held`,
            or what the step keeps in its place.
        """
        config = self.config
        shared = (positions, segment_ids) if kept is None else (positions, segment_ids, kept)
        last = _gathered(self.last_layer)
        mechanism: DepthMechanism = last.depth
        carry, stream = mechanism.begin(config, x, 0 if step is None else step.spare_slots)
        stream = stream if step is None else stream.bare()
        left: list[PyTree] = []
        if self.layers is not None:
            layer, params = self.layers.cut()
            params = params if layer_params is None else layer_params
            if step is None:
                carry, stream = self._differentiable_layers(layer, params, carry, stream, shared, x.dtype)
            elif isinstance(params, tuple):
                for number, params_l in enumerate(params):
                    carry, stream, left_l = _walked(layer, params_l, carry, stream, number, shared, step, held)
                    left.append(left_l)
            else:
                carry, stream, left_l, held = _scanned(layer, params, carry, stream, shared, step, held)
                left.append(left_l)
        layer, params = last.cut()
        layer = dataclasses.replace(layer, prepare=lambda params: params)  # gathered already
        if step is None:
            carry, stream = run_layer(layer, params, carry, stream, config.num_layers - 1, shared)
        else:
            carry, stream, left_l = _walked(layer, params, carry, stream, config.num_layers - 1, shared, step, held)
            left.append(left_l)
            held = step.keep(stream, held)
        if last_token_only:
            carry, buffers = jax.tree.map(lambda a: a[:, -1:], (carry, stream.buffers))
            stream = stream.with_buffers(buffers, stream.length)
        result = None
        operations = mechanism.operations(config)
        if OUTPUT in operations:
            request = mechanism.request(OUTPUT, carry, config.num_layers if mechanism.is_numbered(config) else None)
            result = operations[OUTPUT]((request,), stream, shared)
        hidden = self.final_norm(mechanism.finish(carry, result))
        return hidden, _together(left, stacked=not isinstance(layer_params, tuple)), held

    def _differentiable_layers(self, layer, params, carry, stream, shared, dtype):
        """The first L-1 layers, by the loop that keeps one depth buffer."""
        # Matrices are cast before the loop, not in every layer: the loop reads half the bytes, and keeps no casts.
        params = self.layers.kinds.map(cast_matrices(dtype), params)
        config = self.config
        return depth_scan(
            layer, params, carry, stream, *shared,
            remat=config.remat, unroll=config.layer_loop == "unroll", gradient_dtype=config.depth_gradient_dtype,
            gradient_group=config.depth_gradient_group,
        )  # fmt: skip


def _walked(layer, params, carry, stream, number, shared, step, held) -> tuple[PyTree, Stream, PyTree]:
    """One layer of a walk with a step: (carry, stream, what it left)."""
    lefts = []

    def operate(cut: Cut, values: Values, stream: Stream) -> tuple[PyTree, Stream, int]:
        request = tuple(values[name] for name in cut.takes)
        if not isinstance(cut.operation, SoftmaxAttention):
            return cut.operation(request, stream, shared), stream, 0
        attended, left, stream, there = step.attend(cut.operation, request, stream, shared, number, held)
        lefts.append(left)
        return attended, stream, there if layer.reread else 0

    carry, stream = run_layer(layer, params, carry, stream, number, shared, operate)
    (left,) = lefts
    return carry, stream, step.leave(left, carry)


def _scanned(layer: Layer, params, carry, stream, shared, step, held) -> tuple[PyTree, Stream, PyTree, PyTree]:
    """The stacked layers of a walk with a step: (carry, stream, what they left, held)."""
    numbered = layer.numbered or step.numbered

    def body(state, params_l):
        carry, stream, held = state
        params_l, number = params_l if numbered else (params_l, None)
        carry, stream, left = _walked(layer, params_l, carry, stream, number, shared, step, held)
        return (carry, stream, held), left

    count = jax.tree.leaves(params)[0].shape[0]
    xs = (params, jnp.arange(count, dtype=jnp.int32)) if numbered else params
    stream = stream.with_length(jnp.int32(stream.length))
    (carry, stream, held), left = jax.lax.scan(body, (carry, stream, held), xs)
    return carry, stream, left, held


def _together(left: list[PyTree], *, stacked: bool) -> PyTree:
    """What all layers left: the last's beside the stack, or as a tuple."""
    if not stacked:
        return tuple(left)
    if not left:
        return None
    left = [*left[:-1], jax.tree.map(lambda a: a[None], left[-1])]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *left)


def _gathered(layer: Block) -> Block:
    """The layer with its parameters whole over fsdp, gathered in the compute dtype; itself on one device."""
    if current_mesh() is None:
        return layer
    graph, params = nnx.split(layer)
    params = layer.kinds.map(cast_matrices(compute_dtype(layer.config.dtype)), params)
    return nnx.merge(graph, LayerGather(layer.kinds)(params))


def _stacked_blocks(config: TransformerConfig, keys: InitialKeys) -> Block:
    """L-1 blocks as one, a leading layer axis on every parameter."""

    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def build(number: Array) -> Block:
        return Block(config, last=False, rngs=keys.layer(number))

    return build(jnp.arange(config.num_layers - 1))
