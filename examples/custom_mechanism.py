"""A depth mechanism of one's own: every layer reads the embedding again, as much of it as the layer has learned.

    x_l <- x_l + gate_l x_0        before the attention sub-layer; gate_l is a number, 0 at the start

From the repository, on the quickstart's text and with nothing else changed:

    python train.py --config=configs/quickstart.py --workdir=runs/embedding_again \
        --config.model.depth=examples.custom_mechanism:EmbeddingAgain

The class says what is stored, read and written, and what it costs. Training, decoding, export, meshes and the search
for a NaN ask it, and need nothing more.

Axes: B rows, T tokens, D width, L layers.
"""

import jax.numpy as jnp
from flax import nnx

from moda_jax.model.depth.mechanism import ATTENTION, DepthMechanism
from moda_jax.model.depth.reads import HiddenStream, WeightedSum
from moda_jax.parameter import parameter


class Gate(nnx.Module):
    """A layer's weight of the embedding, [1] float32."""

    def __init__(self):
        self.weight = parameter(jnp.zeros((1,), jnp.float32), None)


class EmbeddingAgain(DepthMechanism):
    """The stream holds the embedding, one slot; the carry is the residual stream."""

    stream_type = HiddenStream

    def __init__(self):
        self.gate = Gate()

    @classmethod
    def slots(cls, config):
        return 1

    @classmethod
    def parameters(cls, config):
        return config.num_layers

    @classmethod
    def slots_read(cls, config):
        return config.num_layers

    @classmethod
    def read_flops(cls, config):
        return 2 * config.width * config.num_layers

    @classmethod
    def operations(cls, config):
        """A weighted sum of the slots, with a backward of its own: memory stays linear in the slots."""
        return {ATTENTION: WeightedSum()}

    def begin(self, config, x, spare=0):
        """The embedding [B, T, D] is the first carry, and what the slot holds."""
        return x, HiddenStream.starting_with(x, self.slots(config))

    def request(self, site, carry, layer):
        """The weights of the sum, one per slot."""
        return self.gate.weight[...]

    def input(self, site, carry, result, layer):
        """What a sub-layer gets; the FFN has no operation, and its result is None."""
        return (carry if result is None else carry + result), None
