"""MUDD: query, key, value and residual each read a sum of all earlier hidden states, with weights of the token's own.

X_0 the embedding, X_i the output of layer i = 1..L. Behind layer i, for c = query, key, value, residual:

    [A_c0 .. A_ci] = (GELU(norm(X_i) W1) W2 + b)_c,    X_i^c = sum_{j <= i} A_cj X_j

and the next layer's query, key and value are projections of X_i^query, X_i^key and X_i^value, each behind a norm of its
own; attention is added to X_i^residual, which the FFN reads. The final norm gets X_L^residual. There is no softmax; the
weights' norm has no scale, and GELU is the exact one. W2 starts as 0, b as the identity: the plain transformer. Under
post-norm, of which the source knows nothing, query, key and value have no norm before them.

Source: arXiv 2502.12170. Axes: B batch, T tokens, S slots, C sums, D model width, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moda_jax.model.depth.mechanism import ATTENTION, FFN, OUTPUT, DepthMechanism, SubLayer
from moda_jax.model.depth.operations import Operation
from moda_jax.model.depth.reads import HiddenStream, WeightedSums
from moda_jax.model.depth.stream import Entry, Stream
from moda_jax.model.initial_keys import InitialKeys
from moda_jax.model.layers import RMSNorm
from moda_jax.numerics.precision import compute_dtype, contract
from moda_jax.parallel.mesh import constrain
from moda_jax.parameter import parameter
from pallas_kernels.norm import beside

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig

Array = jax.Array

EPSILON = 1e-6  # of the norm that the weights are made from
HIDDEN_MULTIPLE = 64


class First(nnx.Module):
    """W1 [D, hidden], padded."""

    def __init__(self, width: int, hidden: int, *, initializer_range: float, rngs: InitialKeys) -> None:
        init = nnx.initializers.normal(initializer_range)
        kernel = init(rngs.params(), (width, hidden), jnp.float32)
        self.kernel = parameter(kernel, "width", None, decays=True, is_cast=True)


class Second(nnx.Module):
    """W2 [hidden, C, ages] and b [C, ages], from the newest source backwards, padded."""

    def __init__(self, hidden: int, sums: int, ages: int) -> None:
        kernel = jnp.zeros((hidden, sums, ages), jnp.float32)
        self.kernel = parameter(kernel, None, None, None, decays=True, is_cast=True)
        self.offset = parameter(jnp.zeros((sums, ages), jnp.float32).at[:, 0].set(1.0), None, None)


class Weights(nnx.Module):
    """What makes a token's weights.

    Args:
        config: of the model.
        sums: C.
        number: the last layer behind which it stands: sets the padded sizes.
        rngs: source of W1.
    """

    def __init__(self, config: TransformerConfig, sums: int, number: int, rngs: InitialKeys) -> None:
        self.sums = sums
        self.dtype = compute_dtype(config.dtype)
        hidden = _hidden(sums, number)
        self.first = First(config.width, hidden, initializer_range=config.initializer_range, rngs=rngs.at("first"))
        self.second = Second(hidden, sums, number + 1)

    def __call__(self, x: Array, number: Array | int, slots: int) -> Array:
        """Behind layer `number`, from its output x [B, T, D], the weights of X_0, X_1, ...: [B, T, C, S] float32."""
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPSILON)
        first, second = (part.kernel[...].astype(self.dtype) for part in (self.first, self.second))
        hidden = contract("btd,dm->btm", (wide * inverse).astype(self.dtype), first, jnp.float32)
        used = jnp.arange(hidden.shape[-1], dtype=jnp.int32) < _hidden(self.sums, number)
        hidden = jnp.where(used, jax.nn.gelu(hidden, approximate=False), 0.0).astype(self.dtype)
        by_age = contract("btm,mca->btca", hidden, second, jnp.float32) + self.second.offset[...][None, None]
        age = number - jnp.arange(slots, dtype=jnp.int32)
        chosen = (age[:, None] == jnp.arange(by_age.shape[-1], dtype=jnp.int32)[None]).astype(jnp.float32)  # [S, ages]
        return contract("btca,sa->btcs", by_age, chosen, jnp.float32)


class MultiwayDynamicDense(DepthMechanism):
    """The stream holds X_0, X_1, ...; the carry is the last of them, within a layer the residual behind attention.

    Args:
        config: of the model.
        last: also makes the weights behind the last layer.
        rngs: source of W1.
    """

    stream_type: ClassVar[type[Stream]] = HiddenStream
    numbered: ClassVar[bool] = True
    has_context: ClassVar[bool] = True

    def __init__(self, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> None:
        layers = config.num_layers
        self.num_slots = self.slots(config)
        number = layers - 1 if last else max(layers - 2, 0)
        self.attention_weights = Weights(config, 4, number, rngs.at("attention_weights"))
        self.output_weights = Weights(config, 1, layers, rngs.at("output_weights")) if last else None
        norm = {"epsilon": config.norm_epsilon, "implementation": beside(config.attention_implementation)}
        pre = config.norm == "pre"
        self.key_input_norm = RMSNorm(config.width, **norm) if pre else None
        self.value_input_norm = RMSNorm(config.width, **norm) if pre else None

    @classmethod
    def build(cls, config: TransformerConfig, *, last: bool, rngs: InitialKeys) -> MultiwayDynamicDense:
        return cls(config, last=last, rngs=rngs)

    @classmethod
    def slots(cls, config: TransformerConfig) -> int:
        return config.num_layers + 1

    @classmethod
    def parameters(cls, config: TransformerConfig) -> int:
        norms = 2 * config.width * config.num_layers if config.norm == "pre" else 0
        offsets = sum(sums * (number + 1) for sums, number in _generators(config))
        return cls.matrix_parameters(config) + offsets + norms

    @classmethod
    def matrix_parameters(cls, config: TransformerConfig) -> int:
        return sum(_hidden(sums, number) * (config.width + sums * (number + 1)) for sums, number in _generators(config))

    @classmethod
    def read_flops(cls, config: TransformerConfig) -> int:
        return 2 * config.width * sum(sums * (number + 1) for sums, number in _generators(config))

    @classmethod
    def slots_read(cls, config: TransformerConfig) -> int:
        """All sums of a generator are one read."""
        return sum(number + 1 for _, number in _generators(config))

    @classmethod
    def operations(cls, config: TransformerConfig) -> dict[str, Operation]:
        return dict.fromkeys((ATTENTION, OUTPUT), WeightedSums(beside(config.attention_implementation)))

    @classmethod
    def used_sizes(cls, config: TransformerConfig, name: str, layer: int) -> tuple[int, ...] | None:
        """Nothing stands before the first layer."""
        generator, _, parameter = name.partition(".")
        if not generator.endswith("_weights"):
            return None
        sums, number = (4, layer) if generator.startswith(ATTENTION) else (1, config.num_layers)
        hidden, ages = (_hidden(sums, number), number + 1) if number > 0 else (0, 0)
        sizes = {"first.kernel": (config.width, hidden), "second.kernel": (hidden, sums, ages)}
        return sizes.get(parameter, (sums, ages))

    def begin(self, config: TransformerConfig, x: Array, spare: int = 0) -> tuple[Array, HiddenStream]:
        return x, HiddenStream.starting_with(x, self.num_slots)

    def request(self, site: str, carry: Array, layer: Array | int) -> Array:
        """The sums' weights; the embedding alone before the first layer."""
        weights = (self.attention_weights if site == ATTENTION else self.output_weights)(carry, layer, self.num_slots)
        embedding = (jnp.arange(self.num_slots, dtype=jnp.int32) == 0).astype(jnp.float32)
        return jnp.where(layer == 0, embedding[None, None, None], weights)

    def input(self, site: str, carry: Array, result: Array | None, layer: Array | int):
        if site == FFN:
            return carry, None
        *inputs, residual = (constrain(result[:, :, c], "batch", "tokens", "channels") for c in range(4))
        return tuple(inputs), residual

    def residual(self, site: str, carry: Array, context: Array | None, output: Array, layer: Array | int) -> Array:
        return super().residual(site, context if site == ATTENTION else carry, None, output, layer)

    def entries(self, sublayer: SubLayer) -> tuple[Entry, ...]:
        """The layer's output."""
        return (Entry((sublayer.carry,)),) if sublayer.site == FFN else ()

    def finish(self, carry: Array, result: Array) -> Array:
        return result[:, :, 0]


def _hidden(sums: int, number: Array | int) -> Array | int:
    """Columns of W1 behind layer `number`: more than its weights, in multiples."""
    return HIDDEN_MULTIPLE * (sums * (number + 1) // HIDDEN_MULTIPLE + 1)


def _generators(config: TransformerConfig) -> list[tuple[int, int]]:
    """(sums, number of the layer behind which they stand) of the whole model."""
    return [*((4, number) for number in range(1, config.num_layers)), (1, config.num_layers)]
