"""The two ends of the model on the mesh: token look-up and cross-entropy over a vocabulary that is split over `tensor`.

Both see this device's V / tensor rows of the table, gathered over fsdp in the compute dtype. The look-up takes the rows
that it has and sums over tensor. The cross-entropy takes the tokens in chunks and computes a chunk's gradients while
its logits are there, as `moda_jax.numerics.loss_chunks` explains; per token two numbers cross the tensor axis: the
target's logit and the sum of exponentials. The table's gradient is summed in float32 over all tokens of all devices and
goes back to the split layout.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from moda_jax.numerics.loss_chunks import (
    LOGITS_BYTES,
    LossSums,
    block_gradients,
    block_sums,
    in_one_pass_if_representable,
    no_sums,
    num_blocks,
)
from moda_jax.numerics.precision import contract
from moda_jax.numerics.row_sums import sum_rows
from moda_jax.parallel.mesh import RULES, partition_spec

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def projected_loss_sums(
    z_loss: float, vocab_size: int, hidden: Array, table: Array, targets: Array, target_mask: Array
) -> tuple[Array, LossSums]:
    """`moda_jax.training.loss.projected_loss_sums` on the mesh: the same sums, over all devices.

    Args:
        z_loss: weight of the z-loss in the objective.
        vocab_size: V; rows of the table behind it are padding.
        hidden: [B, T, D] in the compute dtype.
        table: [V padded, D] float32.
        targets, target_mask: [B, T].

    Returns:
        As there: the objective, through which alone gradients flow, and the sums.
    """
    local = functools.partial(_local_loss, z_loss, vocab_size, False)
    sums = _on_devices(local, (_HIDDEN, _TABLE, _TOKENS, _TOKENS), LossSums(_SCALAR, _SCALAR, _SCALAR))(
        hidden, table, targets, target_mask
    )
    return sums.loss + z_loss * sums.z_loss, sums


def _loss_fwd(z_loss: float, vocab_size: int, *operands: Array) -> tuple[tuple[Array, LossSums], tuple[Array, Array]]:
    local = functools.partial(_local_loss, z_loss, vocab_size, True)
    out_specs = LossSums(_SCALAR, _SCALAR, _SCALAR), (_HIDDEN, _TABLE)
    sums, gradients = _on_devices(local, (_HIDDEN, _TABLE, _TOKENS, _TOKENS), out_specs)(*operands)
    return (sums.loss + z_loss * sums.z_loss, sums), gradients


def _loss_bwd(z_loss: float, vocab_size: int, gradients: tuple[Array, Array], cotangents: tuple) -> tuple:
    dhidden, dtable = gradients
    scale = cotangents[0]
    return (dhidden * scale).astype(dhidden.dtype), dtable * scale, None, None


projected_loss_sums.defvjp(_loss_fwd, _loss_bwd)


def _local_loss(
    z_loss: float, vocab_size: int, gradients: bool, hidden: Array, table: Array, targets: Array, target_mask: Array
) -> LossSums | tuple[LossSums, tuple[Array, Array]]:
    """The sums over all devices and, if asked for, this device's part of the objective's gradients."""
    rows = _whole_rows(table, hidden.dtype)  # [V / tensor, D]
    tokens = targets.size
    first = lax.axis_index("tensor") * rows.shape[0]
    in_vocabulary = first + jnp.arange(rows.shape[0]) < vocab_size
    count = num_blocks(tokens, math.ceil(tokens * rows.shape[0] * 4 / LOGITS_BYTES))
    chunk = math.ceil(tokens / count)

    def chunks(x: Array) -> Array:
        """[B, T, ...] of this device to [count, chunk, ...]; the padding's mask is 0."""
        x = x.reshape(tokens, *x.shape[2:])
        return jnp.pad(x, ((0, count * chunk - tokens), *((0, 0),) * (x.ndim - 1))).reshape(count, chunk, *x.shape[1:])

    def chunk_logits(hidden: Array) -> Array:
        logits = lax.optimization_barrier(contract("td,vd->tv", hidden, rows, jnp.float32))  # as in training.loss
        return jnp.where(in_vocabulary, logits, -jnp.inf)

    total_over = functools.partial(lax.psum, axis_name="tensor")
    largest_over = functools.partial(lax.pmax, axis_name="tensor")

    def sums_of(total: LossSums, block: tuple[Array, Array, Array]) -> tuple[LossSums, None]:
        hidden, targets, mask = block
        sums = block_sums(chunk_logits(hidden), targets - first, mask, total=total_over, largest=largest_over)
        return jax.tree.map(jnp.add, total, sums), None

    def compute(normalise_first: bool) -> tuple[tuple[LossSums, Array, Array], Array]:
        def one(carry: tuple[LossSums, Array, Array], block: tuple[Array, Array, Array]):
            total, dtable, representable = carry
            hidden, targets, mask = block
            sums, dlogits, weight, fits = block_gradients(
                z_loss, chunk_logits(hidden), targets - first, mask, hidden.dtype,
                normalise_first=normalise_first, total=total_over, largest=largest_over,
            )  # fmt: skip
            dtable += contract("tv,td->vd", dlogits, (weight * hidden).astype(hidden.dtype), jnp.float32)
            dhidden = weight * contract("tv,vd->td", dlogits, rows, jnp.float32)
            total = jax.tree.map(jnp.add, total, sums)
            return (total, dtable, representable & fits), dhidden.astype(hidden.dtype)

        carry = no_sums(), jnp.zeros(rows.shape, jnp.float32), jnp.bool(True)
        (total, dtable, representable), dhidden = lax.scan(one, carry, blocks)
        # All devices take the same way: there are collectives in it.
        everywhere = lax.pmin(representable.astype(jnp.int32), _TOKEN_AXES) > 0
        return (total, dhidden, dtable), everywhere

    blocks = chunks(hidden), chunks(targets), chunks(target_mask.astype(jnp.float32))
    if not gradients:
        total, _ = lax.scan(sums_of, no_sums(), blocks)
        return jax.tree.map(lambda x: lax.psum(x, _TOKEN_AXES), total)
    total, dhidden, dtable = in_one_pass_if_representable(compute, hidden.dtype)
    total = jax.tree.map(lambda x: lax.psum(x, _TOKEN_AXES), total)
    dhidden = dhidden.reshape(count * chunk, -1)[:tokens].reshape(hidden.shape)
    return total, (lax.psum(dhidden, "tensor"), _split_sum(dtable))


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
