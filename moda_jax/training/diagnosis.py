"""Where numbers stop being finite: the tensors of one step in the order in which they come to be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config import TrainConfig
from moda_jax.model.function import ModelFunction
from moda_jax.model.stack import Step
from moda_jax.model.transformer import Transformer
from moda_jax.numerics.cross_entropy import loss_sums

Array = jax.Array


class NonFiniteTensor(NamedTuple):
    """A tensor with values that are NaN or infinite: its name, how many of them, and of how many values."""

    name: str
    count: int
    size: int

    def __str__(self) -> str:
        return f"{self.name} ({self.count} of {self.size} values)"


def non_finite_tensors(model: ModelFunction, params: Any, batch: Any, config: TrainConfig) -> Iterator[NonFiniteTensor]:
    """The tensors of a step that are not finite, in order: batch, parameters, residual stream by layer, logits, loss,
    gradients. Once the forward pass has one, gradients are not computed: they would all be.

    Runs micro-batch by micro-batch, and takes its time.

    Args:
        model, params: see `TrainState`.
        batch: see `Batch`.
        config: the training section, for `accumulation_steps` and `z_loss`.
    """
    named = [("batch.target_mask", batch.target_mask)]
    named += [(f"parameter {_name(path)}", leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    found = False
    for tensor in _non_finite(named):
        found = True
        yield tensor
    divisor = jnp.maximum(jnp.sum(batch.target_mask), 1.0)
    module = model.module(params)
    if not isinstance(module, Transformer):
        raise NotImplementedError(f"only a Transformer can be followed layer by layer, not a {type(module).__name__}")
    gradient = _gradient_function(model, config.z_loss)
    parts = config.accumulation_steps
    for number in range(parts):
        where = f" in micro-batch {number}" if parts > 1 else ""
        micro_batch = jax.tree.map(lambda x, n=number: x[n::parts], batch)
        tensors = _forward(module, micro_batch)
        for tensor in _non_finite((name + where, value) for name, value in tensors):
            found = True
            yield tensor
    for number in range(0 if found else parts):
        where = f" in micro-batch {number}" if parts > 1 else ""
        micro_batch = jax.tree.map(lambda x, n=number: x[n::parts], batch)
        gradients = gradient(params, micro_batch, divisor)
        named = ((f"gradient of {_name(path)}{where}", leaf) for path, leaf in jax.tree.leaves_with_path(gradients))
        yield from _non_finite(named)


class _Counts(Step):
    """Leaves behind how many values of each layer's result are not finite."""

    def leave(self, left: Any, carry: Any) -> Array:
        return sum(jnp.sum(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves(carry))


def _forward(module: Transformer, batch: Any) -> Iterator[tuple[str, Array | tuple[int, int]]]:
    """What each part of the model gives: the residual stream, the logits, the sums of the loss; of a layer's result the
    count of values that are not finite, and of all.
    """
    tokens, positions, segment_ids = (jnp.asarray(x) for x in (batch.tokens, batch.positions, batch.segment_ids))
    x = module.embedding(tokens)
    yield "embedding output", x
    graph, params = nnx.split(module)
    hidden, counts = _walk(graph, params, x, positions, segment_ids)
    last = module.last_layer.depth
    size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda x: last.begin(module.config, x)[0], x)))
    for number, count in enumerate(counts):
        yield f"output of layer {number}", (int(count), size)
    yield "output of the final norm", hidden
    logits = module.logits(hidden)
    yield "logits", logits
    sums = loss_sums(logits, jnp.asarray(batch.targets), jnp.asarray(batch.target_mask))
    yield "loss", sums.loss
    yield "z-loss", sums.z_loss


@functools.partial(jax.jit, static_argnums=0)
def _walk(graph: nnx.GraphDef, params: Any, x: Array, positions: Array, segment_ids: Array) -> tuple[Array, Array]:
    """The final norm's output, and the layers' counts [L]."""
    hidden, counts, _ = nnx.merge(graph, params).walk(x, positions, segment_ids, _Counts())
    return hidden, counts


def _gradient_function(model: ModelFunction, z_loss: float) -> Callable:
    """(params, batch, divisor) -> the gradient of the batch's share of the objective."""

    def objective(params: Any, batch: Any, divisor: Array) -> Array:
        logits = model(params, batch.tokens, batch.segment_ids, batch.positions)
        sums = loss_sums(logits, batch.targets, batch.target_mask)
        return (sums.loss + z_loss * sums.z_loss) / divisor

    return jax.jit(jax.grad(objective))


def _non_finite(named: Any) -> Iterator[NonFiniteTensor]:
    for name, value in named:
        if isinstance(value, tuple):  # counted already
            count, size = value
        else:
            value = jnp.asarray(value)
            count, size = int(jnp.sum(~jnp.isfinite(value))), value.size
        if count:
            yield NonFiniteTensor(name, count, size)


def _name(path: tuple) -> str:
    return ".".join(str(key.key) for key in path)
