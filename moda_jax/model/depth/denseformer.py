"""DenseFormer: the next layer reads a weighted sum of all earlier layers' outputs, with static scalar weights.

X_0 the embedding, X_i the output of layer i = 1..L. Behind every `period`-th layer

    Y_i = sum_{j <= i, j = i mod dilation} A_ij X_j

and Y_i = X_i behind the others; the next layer's input is Y_i, and Y_L goes through the final norm. A starts as the
identity. Here the sum behind layer i is what layer i (counted from 0) reads first.

Source: arXiv 2402.02622. Axes: B batch, T tokens, S slots, D model width, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.model.depth.mechanism import ATTENTION, FFN, OUTPUT, DepthMechanism, SubLayer
from moda_jax.model.depth.operations import Operation
from moda_jax.model.depth.reads import HiddenStream, WeightedSum
from moda_jax.model.depth.stream import Entry, Stream
from moda_jax.model.initial_keys import InitialKeys

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig
from moda_jax.parameter import parameter

Array = jax.Array


class Weights(nnx.Module):
    """A row of A, float32, from X_i (1 at the start) backwards in steps of the dilation, padded."""

    def __init__(self, size: int) -> None:
        self.vector = parameter(jnp.zeros((size,), jnp.float32).at[0].set(1.0), None)

    def __call__(self, number: Array | int, dilation: int, slots: int) -> Array:
        """Behind layer `number`, the weights of X_0, X_1, ...: [S]."""
        age = number - jnp.arange(slots, dtype=jnp.int32)
        place = jnp.where((age >= 0) & (age % dilation == 0), age // dilation, -1)
        chosen = place[:, None] == jnp.arange(self.vector.shape[0], dtype=jnp.int32)[None]  # [S, ages]
        return jnp.sum(jnp.where(chosen, self.vector[...][None], 0.0), axis=1)


class DenseFormer(DepthMechanism):
    """The stream holds X_0, X_1, ...; the carry is the last of them, from a layer's first read on Y.

    Args:
        config: of the model.
        last: also holds the row behind the last layer.
    """

    stream_type: ClassVar[type[Stream]] = HiddenStream
    numbered: ClassVar[bool] = True
    has_context: ClassVar[bool] = True

    def __init__(self, config: TransformerConfig, *, last: bool) -> None:
        section, layers = config.denseformer, config.num_layers
        self.dilation, self.period, self.num_slots = section.dilation, section.period, layers + 1
        self.attention_weights = Weights(_ages(config, layers - 1 if last else max(layers - 2, 0)))
        self.output_weights = Weights(_ages(config, layers)) if last else None

    @classmethod
    def build(cls, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> DenseFormer:
        del rngs
        return cls(config, last=last)

    @classmethod
    def slots(cls, config: TransformerConfig) -> int:
        return config.num_layers + 1

    @classmethod
    def parameters(cls, config: TransformerConfig) -> int:
        return sum(_used(config, number) for number in range(config.num_layers + 1))

    @classmethod
    def read_flops(cls, config: TransformerConfig) -> int:
        return 2 * config.width * cls.slots_read(config)

    @classmethod
    def slots_read(cls, config: TransformerConfig) -> int:
        """Each with a weight of its own."""
        return cls.parameters(config)

    @classmethod
    def operations(cls, config: TransformerConfig) -> dict[str, Operation]:
        return dict.fromkeys((ATTENTION, OUTPUT), WeightedSum())

    @classmethod
    def used_sizes(cls, config: TransformerConfig, name: str, layer: int) -> tuple[int]:
        return (_used(config, layer if name.startswith(ATTENTION) else config.num_layers),)

    def begin(self, config: TransformerConfig, x: Array, spare: int = 0) -> tuple[Array, HiddenStream]:
        return x, HiddenStream.starting_with(x, self.slots(config))

    def request(self, site: str, carry: Array, layer: Array | int) -> Array:
        """A row of A; the identity where there is no sum."""
        weights = self.attention_weights if site == ATTENTION else self.output_weights
        sums = (layer > 0) & (layer % self.period == 0)
        identity = (jnp.arange(self.num_slots, dtype=jnp.int32) == layer).astype(jnp.float32)
        return jnp.where(sums, weights(layer, self.dilation, self.num_slots), identity)

    def input(self, site: str, carry: Array, result: Array | None, layer: Array | int) -> tuple[Array, Array | None]:
        return (result, result) if site == ATTENTION else (carry, None)

    def residual(self, site: str, carry: Array, context: Array | None, output: Array, layer: Array | int) -> Array:
        return super().residual(site, context if site == ATTENTION else carry, None, output, layer)

    def entries(self, sublayer: SubLayer) -> tuple[Entry, ...]:
        """The layer's output."""
        return (Entry((sublayer.carry,)),) if sublayer.site == FFN else ()

    def finish(self, carry: Array, result: Array) -> Array:
        return result


def _ages(config: TransformerConfig, number: int) -> int:
    """The length of the row behind layer `number`."""
    return number // config.denseformer.dilation + 1


def _used(config: TransformerConfig, number: int) -> int:
    """As `_ages`; 0 where there is no sum."""
    return _ages(config, number) if number > 0 and number % config.denseformer.period == 0 else 0
