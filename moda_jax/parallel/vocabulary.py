"""The two ends of the model on the mesh: token look-up and cross-entropy over a vocabulary that is split over `tensor`.

Both see this device's V / tensor rows of the table, gathered over fsdp. The look-up takes the rows that it has and sums
over tensor. The cross-entropy never has more than a chunk of tokens times its own rows of logits; per token three
numbers cross the tensor axis: the maximum, the sum of exponentials and the target's logit. The backward recomputes the
logits chunk by chunk.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moda_jax.model.precision import contract
from moda_jax.parallel.mesh import RULES, partition_spec

Array = jax.Array

LOGITS = 2**26  # elements of a chunk of logits, float32
_MASKED = -1e30  # a padded row's logit; finite, so that no difference is NaN

_TABLE = ("vocabulary", "width")
_ROWS = (*RULES["batch"], *RULES["tokens"])  # the mesh axes that a token lies on


def lookup(table: Array, tokens: Array, dtype: jnp.dtype) -> Array:
    """`table[tokens]` in `dtype`.

    Args:
        table: [V padded, D] float32, split as its logical axes say.
        tokens: [B, T] int32.
        dtype: of the result.

    Returns:
        [B, T, D], split over batch and tokens. The table's gradient is summed in float32.
    """

    def local(table: Array, tokens: Array) -> Array:
        rows = _gather_width(table, dtype)  # [V / tensor, D]
        own = tokens - lax.axis_index("tensor") * rows.shape[0]
        here = (own >= 0) & (own < rows.shape[0])
        found = jnp.take(rows, jnp.where(here, own, 0), axis=0).astype(dtype)  # [B, T, D]
        return lax.psum(jnp.where(here[..., None], found, 0), "tensor")

    tokens_spec = partition_spec("batch", "tokens")
    out_spec = partition_spec("batch", "tokens", "channels")
    return jax.shard_map(local, in_specs=(partition_spec(*_TABLE), tokens_spec), out_specs=out_spec)(table, tokens)


def cross_entropy_sums(
    hidden: Array,
    table: Array,
    targets: Array,
    target_mask: Array,
    *,
    vocab_size: int,
    dtype: jnp.dtype,
    transposed: bool = False,
) -> tuple[Array, Array, Array]:
    """The sums of `moda_jax.training.loss.LossSums`, from the final hidden states; no logits in full anywhere.

    Args:
        hidden: [B, T, D].
        table: [V padded, D] float32, or [D, V padded] where `transposed`: the output projection.
        targets: [B, T] int32 in 0..V-1; any value where the mask is 0.
        target_mask: [B, T] float32.
        vocab_size: V; logits of rows beyond it are masked.
        dtype: of the matrix product's operands; its result and all else is float32.
        transposed: the table is an untied head's kernel.

    Returns:
        (loss, z_loss, num_targets), float32 scalars over all devices.
    """

    def local(hidden: Array, table: Array, targets: Array, target_mask: Array) -> tuple[Array, ...]:
        rows = _gather_width(table.T if transposed else table, dtype)  # [V / tensor, D]
        first = lax.axis_index("tensor") * rows.shape[0]
        tokens = targets.size
        chunk = min(tokens, max(1, LOGITS // rows.shape[0]))
        count = -(-tokens // chunk)

        def chunks(x: Array) -> Array:
            x = x.reshape(tokens, *x.shape[2:])
            x = jnp.pad(x, [(0, count * chunk - tokens)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(count, chunk, *x.shape[1:])

        @jax.checkpoint
        def chunk_sums(rows: Array, hidden: Array, targets: Array, mask: Array) -> tuple[Array, ...]:
            logits = contract("td,vd->tv", hidden.astype(dtype), rows.astype(dtype), jnp.float32)
            columns = first + jnp.arange(rows.shape[0])
            logits = jnp.where(columns < vocab_size, logits, _MASKED)
            largest = lax.pmax(lax.stop_gradient(jnp.max(logits, axis=-1)), "tensor")  # [tokens]
            log_z = largest + jnp.log(lax.psum(jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1), "tensor"))
            own = jnp.where(columns == targets[:, None], logits, 0)
            target_logits = lax.psum(jnp.sum(own, axis=-1), "tensor")
            # Where the mask is 0 the target may lie outside of the vocabulary: its logit is then 0, and does not count.
            return jnp.sum(mask * (log_z - target_logits)), jnp.sum(mask * jnp.square(log_z)), jnp.sum(mask)

        def step(sums: tuple[Array, ...], operands: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
            return tuple(map(jnp.add, sums, chunk_sums(rows, *operands))), None

        zeros = (lax.pcast(jnp.zeros(()), _ROWS, to="varying"),) * 3
        sums, _ = lax.scan(step, zeros, (chunks(hidden), chunks(targets), chunks(target_mask.astype(jnp.float32))))
        return tuple(lax.psum(x, _ROWS) for x in sums)

    tokens_spec = partition_spec("batch", "tokens")
    in_specs = (
        partition_spec("batch", "tokens", "channels"), partition_spec(*(_TABLE[::-1] if transposed else _TABLE)),
        tokens_spec, tokens_spec,
    )  # fmt: skip
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=(PartitionSpec(),) * 3)
    return mapped(hidden, table, targets, target_mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_width(table: Array, dtype: jnp.dtype) -> Array:
    """This device's rows of the table [V / tensor, D] with the whole width: float32, of values rounded to `dtype`.

    It travels in `dtype`; its gradient is summed in float32, over all tokens of all devices.
    """
    whole = lax.all_gather(table.astype(dtype), "fsdp", axis=1, tiled=True).astype(jnp.float32)
    return lax.pcast(whole, tuple(axis for axis in _ROWS if axis != "fsdp"), to="varying")


def _gather_width_fwd(table, dtype):
    return _gather_width(table, dtype), None


def _gather_width_bwd(dtype, _, gradient):
    gradient = lax.psum_scatter(gradient, "fsdp", scatter_dimension=1, tiled=True)
    return (lax.psum(gradient, tuple(axis for axis in _ROWS if axis != "fsdp")),)


_gather_width.defvjp(_gather_width_fwd, _gather_width_bwd)
