"""Attention Residuals, delta form: the residual stream stays; a sub-layer reads it plus a mixture of earlier outputs.

Sub-layers j = 1..2L, x_1 = v_0 the embedding, v_j = f_j(h_j) with f_j's own norm inside:

    h_j = x_j + sum_{i < j} a_i v_i,    a = softmax_i( w_j . (g_j * v_i / rms(v_i)) ),    x_{j+1} = x_j + v_j

The first sub-layer has no sources, and the head reads x alone. A null source, if there is one, is a vector of each
sub-layer's own among its sources, the first's too; it starts at 0, where its weight is what a token reads less. w
starts random; no start of it is the plain transformer. Under post-norm, of which the source knows nothing, v_j =
norm(f_j(h_j)).

Source: arXiv 2605.18855. Axes: B batch, T tokens, D model width, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.model.depth.attnres_block import EPSILON, Direction
from moda_jax.model.depth.mechanism import ATTENTION, FFN, DepthMechanism, SubLayer
from moda_jax.model.depth.operations import Operation
from moda_jax.model.depth.reads import HiddenStream, SoftmaxMixture, joined
from moda_jax.model.depth.stream import Entry, Stream
from moda_jax.model.initial_keys import InitialKeys

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig
from moda_jax.parameter import parameter
from pallas_kernels.mixture import mixture_logit
from pallas_kernels.norm import beside

Array = jax.Array


class DeltaRead(Direction):
    """A sub-layer's read: w random, g, and the null source (`null.vector`, 0 at the start) if there is one."""

    def __init__(self, config: TransformerConfig, rngs: InitialKeys) -> None:
        super().__init__(config.width)
        init = nnx.initializers.normal(config.initializer_range)
        self.vector = parameter(init(rngs.params(), (config.width,), jnp.float32), "channels")
        self.null = NullSource(config.width) if config.attnres_delta.null_source else None


class NullSource(nnx.Module):
    """[D] float32, the same for every token."""

    def __init__(self, width: int) -> None:
        self.vector = parameter(jnp.zeros((width,), jnp.float32), "channels")


class DeltaAttentionResiduals(DepthMechanism):
    """The carry is x; the stream holds the embedding and the outputs of all sub-layers but the last.

    Args:
        config: of the model.
        last: nobody reads the last FFN's output from the stream.
        rngs: source of w.
    """

    stream_type: ClassVar[type[Stream]] = HiddenStream
    numbered: ClassVar[bool] = True

    def __init__(self, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> None:
        self.last = last
        self.attention_read = DeltaRead(config, rngs.at("attention_read"))
        self.ffn_read = DeltaRead(config, rngs.at("ffn_read"))

    @classmethod
    def build(cls, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> DeltaAttentionResiduals:
        return cls(config, last=last, rngs=rngs)

    @classmethod
    def slots(cls, config: TransformerConfig) -> int:
        return 2 * config.num_layers

    @classmethod
    def parameters(cls, config: TransformerConfig) -> int:
        """The first sub-layer's w and g are counted, though they have nothing to choose from."""
        return 2 * config.num_layers * config.width * (3 if config.attnres_delta.null_source else 2)

    @classmethod
    def read_flops(cls, config: TransformerConfig) -> int:
        """Two products of 2 D FLOPs a source: its logit, and the sum."""
        null_sources = 2 * config.num_layers if config.attnres_delta.null_source else 0
        return 4 * config.width * (cls.slots_read(config) + null_sources)

    @classmethod
    def slots_read(cls, config: TransformerConfig) -> int:
        sublayers = 2 * config.num_layers
        return sublayers * (sublayers + 1) // 2 - 1  # the first has none

    @classmethod
    def operations(cls, config: TransformerConfig) -> dict[str, Operation]:
        return dict.fromkeys((ATTENTION, FFN), SoftmaxMixture(EPSILON, beside(config.attention_implementation)))

    def begin(self, config: TransformerConfig, x: Array, spare: int = 0) -> tuple[Array, HiddenStream]:
        return x, HiddenStream.starting_with(x, self.slots(config))

    def request(self, site: str, carry: Array, layer: Array | int) -> Array:
        return self._read(site)()

    def input(self, site: str, carry: Array, result: tuple[Array, Array], layer: Array | int) -> tuple[Array, None]:
        mixture, lse = result
        if site == ATTENTION:
            first = jnp.asarray(layer == 0)
            mixture, lse = jnp.where(first, 0, mixture), jnp.where(first, -jnp.inf, lse)
        read = self._read(site)
        if read.null is not None:
            null = read.null.vector[...]
            logit, _ = mixture_logit(read(), null, EPSILON)
            mixture = joined((mixture, lse), logit, jnp.broadcast_to(null, mixture.shape))
        return (carry.astype(jnp.float32) + mixture.astype(jnp.float32)).astype(carry.dtype), None

    def entries(self, sublayer: SubLayer) -> tuple[Entry, ...]:
        """The sub-layer's output."""
        if self.last and sublayer.site == FFN:
            return ()
        return (Entry((sublayer.output,)),)

    def _read(self, site: str) -> DeltaRead:
        return self.attention_read if site == ATTENTION else self.ffn_read
