"""A model with depth that starts from a trained model without, close to it.

Every weight of the base is taken over; new is what the mechanism adds, as its `added` says. In MoDA these are the extra
projections of the depth entries. A depth slot cannot be
switched off: it takes exp(logit) of the softmax even if its logit is 0, and since a depth key passes the layer's key
norm, no small projection makes a small key. What can be chosen:

- values: 0. An entry then adds nothing, it only takes mass m from the sequence: a head's output is scaled by 1 - m,
  which OLMo 2's norm behind the attention undoes where the heads agree. The values' gradient is not 0: they learn.
- keys: normal, as every other matrix. Zero keys would give logits of exactly 0 and cost about as much, but there the
  key norm's derivative is 1 / sqrt(epsilon): the first step's gradient norm rises tenfold (below), and clipping would
  slow all other weights down.

Rows 3 and 4 of the paper's Table 3 also append each layer's own keys and values, which are the base's and cannot be
initialised: a perturbation that no choice here removes. With `depth_attn_kv` (row 5) a projection replaces them.

Measured on 64 validation rows of 256 bytes, float32, first-step loss in nats per byte and gradient norm of one batch:

                                          base            row 3           row 4           row 5           row 4, keys 0
    quickstart, depth none, 1400 steps    1.5988, 0.556   1.6000, 0.555   1.6008, 0.556   1.6001, 0.558   1.6004, 4.55
    depth_comparison:none, 900 steps      1.7373, 0.834   1.7401, 0.838   1.7407, 0.842   1.7390, 0.845   1.7408, 9.53
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from moda_jax.config import TransformerConfig
from moda_jax.depth_config import DepthSections
from moda_jax.model.depth.mechanism import DepthMechanism
from moda_jax.model.depth.registry import find_mechanism
from moda_jax.model.function import split_model

Array = jax.Array

# Fields that may differ between the base and the model that starts from it.
DEPTH_FIELDS = ("depth", *(field.name for field in dataclasses.fields(DepthSections)))
OPEN_FIELDS = (
    *DEPTH_FIELDS, "attention_implementation", "dtype", "remat", "layer_loop", "depth_gradient_dtype",
    "depth_gradient_group", "initializer_range", "stochastic_depth",
)  # fmt: skip


def add_depth(
    base: TransformerConfig,
    params: Any,
    config: TransformerConfig,
    key: Array,
    initial: Callable[[Array], Any] | None = None,
) -> Any:
    """Parameters of a model with depth from those of a model without.

    Args:
        base: `depth="none"`.
        params: of the base, nested dicts, see `TrainState`.
        config: the model to start; it differs from the base in OPEN_FIELDS only.
        key: a typed PRNG key, the source of the projections' keys.
        initial: fresh parameters of the model to start, from a key; None: a `Transformer`'s.

    Returns:
        Nested dicts of float32 arrays.

    Raises:
        ValueError: the base has depth already, or another field differs.
    """
    if base.depth != "none":
        raise ValueError(f"depth={base.depth!r}: expected a base with depth='none'")
    for field in dataclasses.fields(base):
        ours, theirs = getattr(config, field.name), getattr(base, field.name)
        if field.name not in OPEN_FIELDS and ours != theirs:
            raise ValueError(f"model.{field.name}={ours!r}: expected the base's {theirs!r}")
    fresh = jax.jit(initial or (lambda key: split_model(config, key)[1]))(key)  # not one operation at a time
    return with_added(fresh, params, find_mechanism(config.depth))


def with_added(fresh: Any, params: Any, mechanism: type[DepthMechanism], path: tuple[str, ...] = ()) -> Any:
    """The base's leaves where it has some; of the rest, what the mechanism makes of them.

    Args:
        fresh: all parameters of the model that starts, as initialised.
        params: of the base.
        mechanism: of the model that starts.
        path: of both in the model's parameters.
    """
    merged = {}
    for name, leaf in fresh.items():
        if isinstance(leaf, dict):
            merged[name] = with_added(leaf, params.get(name, {}), mechanism, (*path, name))
        else:
            own = ".".join((*path, name)[2:])  # behind "layers.depth" or "last_layer.depth"
            merged[name] = params[name] if name in params else mechanism.added(own, leaf)
    return merged
