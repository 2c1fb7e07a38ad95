"""Every depth mechanism on the paper's small models (Table 6), 24 and 48 layers: who compares them starts here.

    --config=configs/family.py:NAME          24 layers            NAME: none, denseformer, moda, attnres, attnres_block,
    --config=configs/family.py:48_NAME       48 layers            attnres_delta, mudd, value_mixing, value_residual, hc,
                                                                  mhc, depth_attention, moda_REST

moda_REST is MoDA with one of its open questions answered in another way: REST is own_kv (no FFN entry), window, hybrid,
stride, top (8 slots at most, or every fourth layer), chunk (a token reads the slots of the earlier tokens of its chunk
of 16, by XLA alone), float8 (entries in 8 bits), null_slot, entry_bias, separate (two softmaxes and a gate),
writer_norm, reader_norm, reader_norm_unrotated (the key's treatment). All are pre-norm, which every mechanism knows:
`--config.model.norm=post` is OLMo 2's. All else is configs/small.py's.
"""

from ml_collections import ConfigDict

from configs import small
from moda_jax.depth_config import MECHANISMS

MODA = {
    "own_kv": {"ffn_kv": False},
    "window": {"read": "window"},
    "hybrid": {"read": "hybrid"},
    "stride": {"read": "stride"},
    "top": {"read": "top"},
    "chunk": {"chunk": 16},
    "float8": {"entry_dtype": "float8_e4m3fn"},
    "null_slot": {"null_slot": True},
    "entry_bias": {"entry_bias": True},
    "separate": {"softmax": "separate"},
    "writer_norm": {"key": "writer_norm"},
    "reader_norm": {"key": "reader_norm"},
    "reader_norm_unrotated": {"key": "reader_norm", "query_rotated": False},
}
NAMES = {name: {"depth": name} for name in MECHANISMS}
NAMES |= {f"moda_{name}": {"depth": "moda", "moda": fields} for name, fields in MODA.items()}


def get_config(name: str = "moda") -> ConfigDict:
    layers, _, rest = name.partition("_")
    layers, rest = (layers, rest) if layers in ("24", "48") else ("24", name)
    if rest not in NAMES:
        raise ValueError(f"configs/family.py:{name}: unknown argument; known: {', '.join(NAMES)}, each also as 48_NAME")
    config = small.get_config(f"{layers}_post")
    config.model.norm = "pre"
    config.model.update(NAMES[rest])
    return config
