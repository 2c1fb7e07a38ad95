"""The two ends of the model on the mesh: token look-up and cross-entropy over a vocabulary that is split over `tensor`.

Both see this device's V / tensor rows of the table, gathered over fsdp in the compute dtype. The look-up takes the rows
that it has and sums over tensor. The cross-entropy is `moda_jax.numerics.cross_entropy`'s; here are its collectives.
The table's gradient is summed in float32 over all tokens of all devices and goes back to the split layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moda_jax.numerics.cross_entropy import ALONE, Exchange
from moda_jax.numerics.loss_chunks import LossSums
from moda_jax.numerics.row_sums import sum_rows
from moda_jax.parallel.mesh import RULES, current_mesh, partition_spec

Array = jax.Array

_TOKEN_AXES = (*RULES["batch"], *RULES["tokens"])  # the mesh axes that tokens are split over

_TABLE = partition_spec("vocabulary", "width")
_TOKENS = partition_spec("batch", "tokens")
_HIDDEN = partition_spec("batch", "tokens", "channels")
_SCALAR = PartitionSpec()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: Array, tokens: Array, dtype: jnp.dtype) -> Array:
    """`table[tokens]` in `dtype`.

    Args:
        table: [V padded, D] float32.
        tokens: [B, T] int32.
        dtype: of the result.

    Returns:
        [B, T, D].
    """

    def local(table: Array, tokens: Array) -> Array:
        rows = _whole_rows(table, dtype)
        own, here = _own_rows(tokens, rows.shape[0])
        found = jnp.take(rows, own, axis=0)  # [B, T, D]
        return lax.psum(jnp.where(here[..., None], found, 0), "tensor")

    return _on_devices(local, (_TABLE, _TOKENS), _HIDDEN)(table, tokens)


def _lookup_fwd(table: Array, tokens: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return lookup(table, tokens, dtype), (table, tokens)


def _lookup_bwd(dtype: jnp.dtype, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    def local(table: Array, tokens: Array, gradient: Array) -> Array:
        own, here = _own_rows(tokens, table.shape[0])
        indices = jnp.where(here, own, -1).reshape(-1)  # of others' rows the sum takes no notice
        return _split_sum(sum_rows(indices, gradient.reshape(-1, gradient.shape[-1]), table.shape[0]))

    return _on_devices(local, (_TABLE, _TOKENS, _HIDDEN), _TABLE)(*residuals, gradient), None


lookup.defvjp(_lookup_fwd, _lookup_bwd)


class VocabularyExchange(Exchange):
    """The loss's exchange on the current mesh: the vocabulary split over tensor, the tokens over the other axes."""

    def run(self, local: Callable, operands: tuple[Array, ...], *, gradients: bool) -> Any:
        """As `Exchange.run`, under `shard_map`."""
        sums = LossSums(_SCALAR, _SCALAR, _SCALAR)
        out_specs = (sums, (_HIDDEN, _TABLE)) if gradients else sums
        return _on_devices(local, (_HIDDEN, _TABLE, _TOKENS, _TOKENS), out_specs)(*operands)

    def rows(self, table: Array, dtype: jnp.dtype) -> Array:
        """[V / tensor, D]."""
        return _whole_rows(table, dtype)

    def first_column(self, rows: Array) -> Array:
        """Of the device's place along tensor."""
        return lax.axis_index("tensor") * rows.shape[0]

    def total(self, x: Array) -> Array:
        """Over tensor."""
        return lax.psum(x, "tensor")

    def largest(self, x: Array) -> Array:
        """Over tensor."""
        return lax.pmax(x, "tensor")

    def over_tokens(self, sums: Any) -> Any:
        """Over batch and tokens."""
        return jax.tree.map(lambda x: lax.psum(x, _TOKEN_AXES), sums)

    def everywhere(self, condition: Array) -> Array:
        """Over batch and tokens."""
        return lax.pmin(condition.astype(jnp.int32), _TOKEN_AXES) > 0

    def table_gradient(self, gradient: Array) -> Array:
        """Over batch and tokens, split over fsdp."""
        return _split_sum(gradient)


def loss_exchange() -> Exchange:
    """For the loss of the function being traced: with the current mesh, or none on one device."""
    return ALONE if current_mesh() is None else VocabularyExchange()


def _on_devices(local, in_specs, out_specs):
    """`shard_map` on the current mesh; every sum over devices is written out above, so none has to be derived."""
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _whole_rows(table: Array, dtype: jnp.dtype) -> Array:
    """This device's rows of the table, with the whole width: [V / tensor, D] in `dtype`."""
    return lax.all_gather(table.astype(dtype), "fsdp", axis=1, tiled=True)


def _split_sum(gradient: Array) -> Array:
    """The sum over all devices' tokens of a gradient [V / tensor, D], in the table's layout."""
    gradient = lax.psum_scatter(gradient, "fsdp", scatter_dimension=1, tiled=True)
    return lax.psum(gradient, tuple(axis for axis in _TOKEN_AXES if axis != "fsdp"))


def _own_rows(tokens: Array, rows: int) -> tuple[Array, Array]:
    """(index into this device's rows, whether the token is one of them); the index is 0 where it is not."""
    own = tokens - lax.axis_index("tensor") * rows
    here = (own >= 0) & (own < rows)
    return jnp.where(here, own, 0), here
