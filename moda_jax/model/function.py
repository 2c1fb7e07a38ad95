"""The model as a pure function of its parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from moda_jax.config import TransformerConfig
from moda_jax.model.transformer import Transformer
from moda_jax.parameter import ParameterKinds

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ModelFunction:
    """A model without its parameters: a pure function, safe to close over in a jitted one. All but `module` is of a
    `Transformer`.

    Attributes:
        graph: the module's structure.
        kinds: what its parameters are.
    """

    graph: nnx.GraphDef
    kinds: ParameterKinds

    def __call__(
        self, params: Any, tokens: Array, segment_ids: Array | None = None, positions: Array | None = None
    ) -> Array:
        """Logits [B, T, V] float32; arrays as in `Transformer.__call__`, `params` as `split_model` returns them."""
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
        """The model itself, holding `params`."""
        return nnx.merge(self.graph, params)


def split_module(module: nnx.Module) -> tuple[ModelFunction, Any]:
    """A model as function and parameters.

    Args:
        module: whose parameters say what they are, see `moda_jax.parameter`.

    Returns:
        The function and the parameters, nested dicts of float32 arrays.

    Raises:
        NotImplementedError: the model holds variables that are not parameters; a train step would not carry them on.
    """
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    others = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(rest)]
    if others:
        raise NotImplementedError(f"the train step carries parameters only; the model also holds {', '.join(others)}")
    return ModelFunction(graph, ParameterKinds.of(params)), nnx.to_pure_dict(params)


def abstract_module(build: Callable[[], nnx.Module]) -> tuple[ModelFunction, Any]:
    """The function of the model that `build` makes, and its parameters' shapes and dtypes; nothing is allocated."""
    holder: list[ModelFunction] = []

    def split() -> Any:
        model, params = split_module(build())
        holder.append(model)
        return params

    params = jax.eval_shape(split)
    return holder[0], params


def split_model(config: TransformerConfig, key: Array) -> tuple[ModelFunction, Any]:
    """A freshly initialised `Transformer`, as function and parameters; see `split_module`.

    Args:
        config: the model's section.
        key: a typed PRNG key, the source of the parameters.
    """
    return split_module(Transformer(config, rngs=nnx.Rngs(params=key)))


@functools.cache
def abstract_model(config: TransformerConfig) -> tuple[ModelFunction, Any]:
    """`abstract_module` of a `Transformer`, made once for a config."""
    return abstract_module(lambda: Transformer(config, rngs=nnx.Rngs(params=jax.random.key(0))))


def model_function(config: TransformerConfig) -> ModelFunction:
    """The function of a `Transformer` alone; no parameter is allocated."""
    return abstract_model(config)[0]


@functools.cache
def parameter_kinds(config: TransformerConfig) -> ParameterKinds:
    """What the model's parameters are."""
    return model_function(config).kinds
