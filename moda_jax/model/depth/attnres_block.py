"""Attention Residuals, block form: a sub-layer's input is a mixture of what came before, and nothing else.

Sub-layers j = 1..2L, v_0 the embedding, v_j = f_j(h_j) with f_j's own norm inside. There is no residual stream: h_j is
the mixture

    h_j = sum_i a_i s_i,    a = softmax_i( w_j . (g_j * s_i / rms(s_i)) )

over the sources s: the sums b_n of every closed block of `block_size` sub-layers, b_0 = v_0, and the running sum p of
the open block, unless j is its first. The head reads one more mixture, of all b and the open p. With blocks of one
sub-layer this is the full form. Under post-norm, of which the source knows nothing, v_j = norm(f_j(h_j)).

Source: arXiv 2603.15031. Axes: B batch, T tokens, D model width, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.model.depth.mechanism import ATTENTION, FFN, OUTPUT, DepthMechanism, SubLayer
from moda_jax.model.depth.operations import Operation
from moda_jax.model.depth.reads import HiddenStream, SoftmaxMixture, joined
from moda_jax.model.depth.stream import Entry, Stream
from moda_jax.model.initial_keys import InitialKeys

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig
from moda_jax.parameter import parameter
from pallas_kernels.mixture import MASKED, mixture_logit
from pallas_kernels.norm import beside

Array = jax.Array

EPSILON = 1e-6  # of the sources' RMSNorm


class Direction(nnx.Module):
    """A read's parameters, float32: w (`vector`, 0 at the start: the average) and the norm's g (`scale`, 1)."""

    def __init__(self, width: int) -> None:
        self.vector = parameter(jnp.zeros((width,), jnp.float32), "channels")
        self.scale = parameter(jnp.ones((width,), jnp.float32), "channels")

    def __call__(self) -> Array:
        """w * g, [D]."""
        return self.vector[...] * self.scale[...]


class BlockAttentionResiduals(DepthMechanism):
    """The carry is p [B, T, D], the open block's sum; the stream holds the closed blocks' sums.

    Args:
        config: of the model.
        last: also holds the head's read.
    """

    stream_type: ClassVar[type[Stream]] = HiddenStream
    numbered: ClassVar[bool] = True

    def __init__(self, config: TransformerConfig, *, last: bool) -> None:
        self.block_size = self.sublayers_a_source(config)
        self.num_sublayers = 2 * config.num_layers
        self.attention_read = Direction(config.width)
        self.ffn_read = Direction(config.width)
        self.output_read = Direction(config.width) if last else None

    @classmethod
    def build(cls, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> BlockAttentionResiduals:
        del rngs
        return cls(config, last=last)

    @classmethod
    def sublayers_a_source(cls, config: TransformerConfig) -> int:
        """The block size."""
        return config.attnres_block.block_size

    @classmethod
    def slots(cls, config: TransformerConfig) -> int:
        return 1 + 2 * config.num_layers // cls.sublayers_a_source(config)

    @classmethod
    def parameters(cls, config: TransformerConfig) -> int:
        return 2 * config.width * (2 * config.num_layers + 1)

    @classmethod
    def read_flops(cls, config: TransformerConfig) -> int:
        """Two products of 2 D FLOPs a source: its logit, and the sum."""
        size = cls.sublayers_a_source(config)
        sources = sum(1 + done // size + (done % size > 0) for done in range(2 * config.num_layers + 1))
        return 4 * config.width * sources

    @classmethod
    def slots_read(cls, config: TransformerConfig) -> int:
        """The sources but the unfinished block, which is the carry."""
        size = cls.sublayers_a_source(config)
        return sum(1 + done // size for done in range(2 * config.num_layers + 1))

    @classmethod
    def operations(cls, config: TransformerConfig) -> dict[str, Operation]:
        return dict.fromkeys((ATTENTION, FFN, OUTPUT), SoftmaxMixture(EPSILON, beside(config.attention_implementation)))

    def begin(self, config: TransformerConfig, x: Array, spare: int = 0) -> tuple[Array, HiddenStream]:
        return jnp.zeros_like(x), HiddenStream.starting_with(x, self.slots(config))

    def request(self, site: str, carry: Array, layer: Array | int) -> Array:
        return self._direction(site)

    def input(self, site: str, carry: Array, result: tuple[Array, Array], layer: Array | int) -> tuple[Array, None]:
        return self._with_open(site, carry, result, self._opens(site, layer)), None

    def residual(self, site: str, carry: Array, context: None, output: Array, layer: Array | int) -> Array:
        """p with the sub-layer's output; the output alone in a block's first."""
        opened = output if self.block_size == 1 else jnp.where(self._opens(site, layer), output, carry + output)
        return super().residual(site, jnp.zeros_like(opened), context, opened, layer)

    def entries(self, sublayer: SubLayer) -> tuple[Entry, ...]:
        """The block's sum, behind the last of its sub-layers."""
        done = _done(sublayer.site, sublayer.layer) + 1
        if self.block_size == 1 or (self.block_size == 2 and sublayer.site == FFN):
            return (Entry((sublayer.carry,)),)
        if self.block_size % 2 == 0 and sublayer.site == ATTENTION:
            return ()  # an even number of sub-layers never ends here
        return (Entry((sublayer.carry,), jnp.asarray(done % self.block_size == 0)),)

    def finish(self, carry: Array, result: tuple[Array, Array]) -> Array:
        return self._with_open(OUTPUT, carry, result, self.num_sublayers % self.block_size == 0).astype(carry.dtype)

    def _direction(self, site: str) -> Array:
        return {ATTENTION: self.attention_read, FFN: self.ffn_read, OUTPUT: self.output_read}[site]()

    def _opens(self, site: str, layer: Array | int) -> Array | bool:
        """Whether a block has no sub-layer yet: it is not a source."""
        return _done(site, layer) % self.block_size == 0

    def _with_open(self, site: str, carry: Array, result: tuple[Array, Array], opens: Array | bool) -> Array:
        """The mixture of the closed blocks and, unless it opens here, the open one."""
        if opens is True or self.block_size == 1:
            return result[0]
        logit, _ = mixture_logit(self._direction(site), carry, EPSILON)
        return joined(result, jnp.where(opens, MASKED, logit), carry)


def _done(site: str, layer: Array | int) -> Array | int:
    """Sub-layers before this one."""
    return 2 * layer + int(site == FFN)
