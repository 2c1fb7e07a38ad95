"""Where numbers stop being finite: the tensors of one step in the order in which they come to be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.config import TrainConfig
from moda_jax.model.depth_stream import DepthStream
from moda_jax.model.transformer import Transformer
from moda_jax.training.loss import loss_sums
from moda_jax.training.state import ModelFunction

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

    Runs layer by layer and micro-batch by micro-batch, and takes its time.

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
    run_layer, gradient = _layer_function(module), _gradient_function(model, config.z_loss)
    parts = config.accumulation_steps
    for number in range(parts):
        where = f" in micro-batch {number}" if parts > 1 else ""
        micro_batch = jax.tree.map(lambda x, n=number: x[n::parts], batch)
        tensors = _forward(module, run_layer, micro_batch)
        for tensor in _non_finite((name + where, value) for name, value in tensors):
            found = True
            yield tensor
    for number in range(0 if found else parts):
        where = f" in micro-batch {number}" if parts > 1 else ""
        micro_batch = jax.tree.map(lambda x, n=number: x[n::parts], batch)
        gradients = gradient(params, micro_batch, divisor)
        named = ((f"gradient of {_name(path)}{where}", leaf) for path, leaf in jax.tree.leaves_with_path(gradients))
        yield from _non_finite(named)


def _forward(module: Transformer, run_layer: Callable, batch: Any) -> Iterator[tuple[str, Array]]:
    """The residual stream after each part of the model, the logits, and the sums of the loss."""
    config = module.config
    tokens, positions, segment_ids = (jnp.asarray(x) for x in (batch.tokens, batch.positions, batch.segment_ids))
    x = module.embedding(tokens)
    yield "embedding output", x
    stream = DepthStream.empty(*tokens.shape, config.depth_slots, config.num_kv_heads, config.head_dim, x.dtype)
    for number in range(config.num_layers):
        x, stream = run_layer(number, x, stream, positions, segment_ids)
        yield f"output of layer {number}", x
    x = module.final_norm(x)
    yield "output of the final norm", x
    logits = module.logits(x)
    yield "logits", logits
    sums = loss_sums(logits, jnp.asarray(batch.targets), jnp.asarray(batch.target_mask))
    yield "loss", sums.loss
    yield "z-loss", sums.z_loss


def _layer_function(module: Transformer) -> Callable:
    """(layer's number, x, stream, positions, segment_ids) -> (x, stream); compiled once for all layers but the last."""
    last_graph, last = nnx.split(module.last_layer)
    run_last = jax.jit(lambda params, *arguments: nnx.merge(last_graph, params)(*arguments))
    if module.layers is None:
        return lambda number, *arguments: run_last(last, *arguments)
    graph, stacked = nnx.split(module.layers)
    run = jax.jit(lambda params, *arguments: nnx.merge(graph, params)(*arguments))

    def run_layer(number: int, *arguments: Any) -> tuple[Array, DepthStream]:
        if number == module.config.num_layers - 1:
            return run_last(last, *arguments)
        return run(jax.tree.map(lambda p: p[number], stacked), *arguments)

    return run_layer


def _gradient_function(model: ModelFunction, z_loss: float) -> Callable:
    """(params, batch, divisor) -> the gradient of the batch's share of the objective."""

    def objective(params: Any, batch: Any, divisor: Array) -> Array:
        logits = model(params, batch.tokens, batch.segment_ids, batch.positions)
        sums = loss_sums(logits, batch.targets, batch.target_mask)
        return (sums.loss + z_loss * sums.z_loss) / divisor

    return jax.jit(jax.grad(objective))


def _non_finite(named: Any) -> Iterator[NonFiniteTensor]:
    for name, value in named:
        value = jnp.asarray(value)
        count = int(jnp.sum(~jnp.isfinite(value)))
        if count:
            yield NonFiniteTensor(name, count, value.size)


def _name(path: tuple) -> str:
    return ".".join(str(key.key) for key in path)
