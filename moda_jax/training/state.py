"""The training state, and the model as a pure function of its parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from moda_jax.config import TransformerConfig
from moda_jax.model.transformer import Transformer
from moda_jax.training.faults import UpdateCounts

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and all that a checkpoint must hold beside the data position.

    Attributes:
        step: int32 scalar, steps done; a batch each.
        params: nested dicts of float32 arrays, named as the model names them.
        optimizer_state: optax's.
        key: a typed PRNG key, the same in every step; a random part of step n folds n into it.
        counts: how many of the steps updated the parameters, and how many were skipped.
    """

    step: Array
    params: Any
    optimizer_state: optax.OptState
    key: Array
    counts: UpdateCounts = dataclasses.field(default_factory=UpdateCounts.zero)


@dataclasses.dataclass(frozen=True)
class ModelFunction:
    """`Transformer` without its parameters: a pure function, safe to close over in a jitted one.

    Attributes:
        graph: the module's structure.
    """

    graph: nnx.GraphDef

    def __call__(
        self, params: Any, tokens: Array, segment_ids: Array | None = None, positions: Array | None = None
    ) -> Array:
        """Logits [B, T, V] float32; the arrays as in `Transformer.__call__`, `params` as in `TrainState`."""
        return self.module(params)(tokens, segment_ids, positions)

    def hidden(
        self, params: Any, tokens: Array, segment_ids: Array | None = None, positions: Array | None = None
    ) -> Array:
        """The final norm's output [B, T, D]; times `output_table`'s transpose it gives the logits."""
        return self.module(params).hidden(tokens, segment_ids, positions)

    def output_table(self, params: Any) -> Array:
        """[V, D] float32."""
        return self.module(params).output_table()

    def vocab_size(self, params: Any) -> int:
        """V, without padding."""
        return self.module(params).config.vocab_size

    def module(self, params: Any) -> nnx.Module:
        """The `Transformer` itself, holding `params`."""
        return nnx.merge(self.graph, params)


def split_model(config: TransformerConfig, key: Array) -> tuple[ModelFunction, Any]:
    """A freshly initialised model, as function and parameters.

    Args:
        config: the model's section.
        key: a typed PRNG key, the source of the parameters.

    Returns:
        The function and the parameters, nested dicts of float32 arrays.

    Raises:
        NotImplementedError: the model holds variables that are not parameters; a train step would not carry them on.
    """
    graph, params, rest = nnx.split(Transformer(config, rngs=nnx.Rngs(params=key)), nnx.Param, ...)
    others = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(rest)]
    if others:
        raise NotImplementedError(f"the train step carries parameters only; the model also holds {', '.join(others)}")
    return ModelFunction(graph), nnx.to_pure_dict(params)


def model_function(config: TransformerConfig) -> ModelFunction:
    """The model's function alone; no parameter is allocated."""
    holder: list[ModelFunction] = []

    def build() -> Any:
        model, params = split_model(config, jax.random.key(0))
        holder.append(model)
        return params

    jax.eval_shape(build)
    return holder[0]


def initial_state(config: TransformerConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step. Traceable: `jax.eval_shape` of it is the state's structure, without the memory.

    Args:
        config: the model's section.
        optimizer: from `make_optimizer`.
        seed: `train.seed`.
    """
    init_key, run_key = jax.random.split(jax.random.key(seed))
    _, params = split_model(config, init_key)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, optimizer_state=optimizer.init(params), key=run_key)
