"""The interface of a depth mechanism: what a layer reads from earlier layers, how, and what it writes for later ones.

A layer is an attention and an FFN sub-layer. A mechanism is asked at fixed places, in this order:

    begin                                   the carry and the stream, from the embedding
    per layer
      request, operation, input             what the attention sub-layer gets
      value_request, operation, mixed       query, key and value before the softmax
      (the softmax, with the slots of the stream if `softmax_slots`)
      attended                              what comes of it, if `merges`
      residual, entries                     the carry behind the sub-layer; what is written
      request, operation, input             what the FFN sub-layer gets
      residual, entries
    request, operation, finish              what the final norm gets, from the carry and the stream

The carry travels from layer to layer: the residual stream x [B, T, D], or whatever a mechanism has in its place. What a
mechanism does not override is the plain transformer. The same methods serve training, prefill, decoding, attention maps
and diagnosis: nothing else knows how a mechanism works, and nobody asks for its name.

All methods but `begin` run inside of parts that are differentiated by JAX; they must not touch the stream. An operation
reads it, with a backward of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
from flax import nnx

from moda_jax.config_checks import require
from moda_jax.model.depth.operations import Operation
from moda_jax.model.depth.stream import Entry, NoStream, Stream
from moda_jax.model.initial_keys import InitialKeys
from moda_jax.parallel.mesh import constrain

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig
    from moda_jax.model.attention import Attention
    from moda_jax.model.layers import RMSNorm

Array = jax.Array
PyTree = Any

# Places where an operation may stand. "attention" and "ffn" are the sub-layers' inputs.
ATTENTION, VALUE, FFN, OUTPUT = "attention", "value", "ffn", "output"
SITES = (ATTENTION, VALUE, FFN, OUTPUT)


@dataclasses.dataclass
class SubLayer:
    """What a mechanism may write from.

    Attributes:
        site: "attention" or "ffn".
        attention: the layer's attention module, whose key norm and rotation depth keys get.
        inputs: () -> what the sub-layer's first matmul received, [B, T, D], or the three of `DepthMechanism.input`.
        key, value: as the softmax had them, [B, T, K, H]; None behind the FFN.
        run: () -> the sub-layer's `output` and the `carry` behind it.
        positions: [B, T] int32.
        layer: the layer's number, int32; None for a mechanism that is not `numbered`.
    """

    site: str
    attention: Attention
    inputs: Callable[[], Array | tuple[Array, Array, Array]]
    key: Array | None
    value: Array | None
    run: Callable[[], tuple[Array, PyTree]]
    positions: Array
    layer: Array | None

    @property
    def output(self) -> Array:
        """Of the sub-layer, behind its norm if that stands there, [B, T, D]. Computed when it is asked for first."""
        return self._ran[0]

    @property
    def carry(self) -> PyTree:
        """Behind the sub-layer."""
        return self._ran[1]

    @functools.cached_property
    def _ran(self) -> tuple[Array, PyTree]:
        return self.run()


class DepthMechanism(nnx.Module):
    """Depth residual: no stream, the identity read and the add that every block does. The base of all mechanisms.

    Every layer has an object of its own with the parameters that belong to it; those of the model as a whole (of
    `begin` and `finish`) are the last layer's. A parameter says itself how it is split, whether it decays and in which
    dtype it computes: it is made by `moda_jax.parameter.parameter`, or a `Projection`.

    Class attributes:
        stream_type: of the stream.
        numbered: the methods are told the layer's number; see also `is_numbered`.
        has_context: `input` leaves something for `residual`.
        norms: values of `model.norm` that it knows.
        tensors: names in an exported file by the path below the mechanism, with the leading axes that are a linear
            layer's inputs (0: stored as it is). What is not named here has its path as its name.

    Attributes:
        writes_own_key_value: the attention sub-layer's first entry is the softmax's own (key, value), unchanged: it is
            then read again from its slot in the backward, and decoding writes it once.
        key_input_norm, value_input_norm: under pre-norm, of attention's inputs where `input` gives three; the query's
            has the layer's own norm.
    """

    stream_type: ClassVar[type[Stream]] = NoStream
    numbered: ClassVar[bool] = False
    has_context: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("pre", "post")
    tensors: ClassVar[dict[str, tuple[str, int]]] = {}

    writes_own_key_value: bool = False
    key_input_norm: RMSNorm | None = None
    value_input_norm: RMSNorm | None = None

    # From the config alone.

    @classmethod
    def check(cls, config: TransformerConfig) -> None:
        """Checks the fields that the mechanism depends on.

        Raises:
            ValueError: naming the field, what came and what was expected.
        """
        norms = " or ".join(map(repr, cls.norms))
        require(config.norm in cls.norms, "model.norm", config.norm, f"{norms} with model.depth={config.depth!r}")

    @classmethod
    def build(cls, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> Self:
        """The object of one layer."""
        del config, last, rngs
        return cls()

    @classmethod
    def slots(cls, config: TransformerConfig) -> int:
        """S, the slots of the whole model's stream."""
        del config
        return 0

    @classmethod
    def parameters(cls, config: TransformerConfig) -> int:
        """Parameters of the whole model that the mechanism adds, padding left out."""
        del config
        return 0

    @classmethod
    def matrix_parameters(cls, config: TransformerConfig) -> int:
        """Those of them that are multiplied with every token: two FLOPs a token each."""
        del config
        return 0

    @classmethod
    def read_flops(cls, config: TransformerConfig) -> int:
        """FLOPs of a token's reads of the stream, forward, summed over the layers; two for each multiply-add."""
        del config
        return 0

    @classmethod
    def slots_read(cls, config: TransformerConfig) -> int:
        """Slots that a token's reads of the stream meet, summed over the layers: what must move at the least."""
        del config
        return 0

    @classmethod
    def operations(cls, config: TransformerConfig) -> dict[str, Operation]:
        """The operations on the stream by site, one of `SITES`; the same in all layers."""
        del config
        return {}

    @classmethod
    def is_numbered(cls, config: TransformerConfig) -> bool:
        """Whether the methods are told the layer's number, where that depends on the config."""
        del config
        return cls.numbered

    @classmethod
    def softmax_slots(cls, config: TransformerConfig) -> bool:
        """Whether the slots of the stream, a `DepthStream`, are part of attention's softmax."""
        del config
        return False

    @classmethod
    def softmax_window(cls, config: TransformerConfig) -> int | None:
        """Where `softmax_slots`: how many of the filled slots are part of it, the last ones; None: all."""
        del config
        return None

    @classmethod
    def softmax_chunk(cls, config: TransformerConfig) -> int:
        """Where `softmax_slots`: C, a token's softmax has the slots of the earlier tokens of its chunk of C too."""
        del config
        return 1

    @classmethod
    def merges(cls, config: TransformerConfig) -> bool:
        """Whether `attended` merges attention's result with the "value" operation's."""
        del config
        return False

    @classmethod
    def entry_sites(cls, config: TransformerConfig) -> tuple[str, ...]:
        """For attention maps: the sites that wrote a layer's entries in the softmax, in order."""
        del config
        return ()

    @classmethod
    def used_sizes(cls, config: TransformerConfig, name: str, layer: int) -> tuple[int, ...] | None:
        """The part of a padded parameter that a layer uses, from 0 along each axis; None: all of it.

        Stacked layers have parameters of one shape. Where the shape depends on the layer it is padded, with values that
        have no effect and no gradient; they are not counted, and not exported.

        Args:
            config: of the model.
            name: path of the parameter below the mechanism, as "output.vector".
            layer: the layer's number.
        """
        del config, name, layer
        return None

    @classmethod
    def added(cls, name: str, parameter: Array) -> Array:
        """A fresh parameter as it stands in a model that starts from a trained one without depth, close to it.

        Args:
            name: path below the mechanism.
            parameter: as initialised, maybe with a leading axis of layers.
        """
        del name
        return parameter

    # The model's start and end.

    def begin(self, config: TransformerConfig, x: Array, spare: int = 0) -> tuple[PyTree, Stream]:
        """The first layer's carry and the stream with its first entries; asked of the last layer's object.

        Args:
            config: of the model.
            x: the embedding, [B, T, D].
            spare: empty slots beyond those that are ever filled, which decoding needs where `softmax_slots`.
        """
        del config, spare
        return x, self.stream_type()

    def finish(self, carry: PyTree, result: PyTree) -> Array:
        """What the final norm gets [B, T, D], from the last carry and the "output" operation's result (or None)."""
        del result
        return carry

    # A sub-layer.

    def request(self, site: str, carry: PyTree, layer: Array | None) -> PyTree:
        """What the operation of a site ("attention", "ffn" or "output") is asked with."""
        raise NotImplementedError(f"{type(self).__name__}.request: an operation at {site!r} needs a request")

    def input(
        self, site: str, carry: PyTree, result: PyTree, layer: Array | None
    ) -> tuple[Array | tuple[Array, Array, Array], PyTree]:
        """A sub-layer's input [B, T, D] and, for `residual`, a context (None without `has_context`).

        Attention may have three inputs, a tuple: what query, key and value are projections of.

        Args:
            site: "attention" or "ffn".
            carry: before the sub-layer.
            result: of the site's operation, or None.
            layer: the layer's number, if `numbered`.
        """
        del site, result, layer
        return carry, None

    def value_request(
        self,
        query: Array,
        key: Array,
        value: Array,
        layer: Array | None,
        attention: Attention,
        positions: Array,
    ) -> PyTree:
        """What the "value" operation is asked with.

        Args:
            query: [B, T, N, H].
            key, value: [B, T, K, H].
            layer: the layer's number, if `numbered`.
            attention: the layer's module.
            positions: [B, T] int32, of query and key.
        """
        raise NotImplementedError(f"{type(self).__name__}.value_request: an operation at 'value' needs a request")

    def mixed(
        self, query: Array, key: Array, value: Array, result: PyTree, layer: Array | None
    ) -> tuple[Array, Array, Array]:
        """Query, key and value as the softmax gets them, from the projections and the "value" operation's result."""
        del result, layer
        return query, key, value

    def attended(self, out: Array, lse: Array, result: PyTree, layer: Array | None) -> Array:
        """What the output projection gets [B, T, N, H], if `merges`.

        Args:
            out: attention's, [B, T, N, H].
            lse: its log-sum-exp, [B, T, N] float32.
            result: of the "value" operation.
            layer: the layer's number, if `numbered`.
        """
        del lse, result, layer
        return out

    def residual(self, site: str, carry: PyTree, context: PyTree, output: Array, layer: Array | None) -> PyTree:
        """The carry behind a sub-layer, whose output [B, T, D] has passed the norm that stands behind it, if any."""
        del site, context, layer
        return constrain(carry + output, "batch", "tokens", "channels")

    def entries(self, sublayer: SubLayer) -> tuple[Entry, ...]:
        """What is written behind a sub-layer; as many entries in every layer but the last."""
        del sublayer
        return ()
