"""Attention Residuals, full form: every sub-layer's output is a source of its own.

The equations are `attnres_block`'s with blocks of one sub-layer: h_j is a mixture of v_0..v_{j-1}, and the head reads a
mixture of all. The first sub-layer has one source, so that its read gets no gradient.

Source: arXiv 2603.15031.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moda_jax.model.depth.attnres_block import BlockAttentionResiduals

if TYPE_CHECKING:
    from moda_jax.config import TransformerConfig


class AttentionResiduals(BlockAttentionResiduals):
    """The stream holds the embedding and every sub-layer's output."""

    @classmethod
    def sublayers_a_source(cls, config: TransformerConfig) -> int:
        return 1
