"""What the attention op has to return, in float64 NumPy, one query row at a time. Shares no code with the package.

For one query q and the rows k_j, v_j (j over the visible keys of the sequence and the filled depth slots of its token,
and with a chunk of C tokens of the earlier tokens at the same place // C of the same document):

    z_j = scale * q . k_j        lse = log(sum_j exp(z_j))       p_j = exp(z_j - lse)       out = sum_j p_j v_j

and, given dout and dlse, by the chain rule:

    dv_j = p_j dout              dz_j = p_j (dout . v_j - dout . out + dlse)
    dq   = scale * sum_j dz_j k_j                      dk_j = scale * dz_j q
"""

from __future__ import annotations

import numpy as np

OUTPUTS = ("out", "lse")
GRADIENTS = ("dquery", "dkey", "dvalue", "ddepth_key", "ddepth_value")


def attention(
    query,
    key,
    value,
    depth_key=None,
    depth_value=None,
    depth_length=None,
    *,
    scale,
    causal,
    query_positions=None,
    key_positions=None,
    query_segment_ids=None,
    key_segment_ids=None,
    key_length=None,
    depth_chunk=1,
    dout=None,
    dlse=None,
) -> dict[str, np.ndarray]:
    """out, lse and, if dout and dlse are given, the five gradients by name. Arrays as in `pallas_kernels.block`."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    batch, tokens, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    if depth_key is None:
        depth_key = depth_value = np.zeros((batch, tokens, 0, kv_heads, head_dim))
    depth_key, depth_value = (np.asarray(array, np.float64) for array in (depth_key, depth_value))
    filled = depth_key.shape[2] if depth_length is None else int(depth_length)
    query_positions = np.tile(np.arange(tokens), (batch, 1)) if query_positions is None else np.asarray(query_positions)
    key_positions = np.tile(np.arange(keys), (batch, 1)) if key_positions is None else np.asarray(key_positions)

    result = {"out": np.zeros_like(query), "lse": np.full(query.shape[:3], -np.inf)}
    inputs = {"dquery": query, "dkey": key, "dvalue": value, "ddepth_key": depth_key, "ddepth_value": depth_value}
    if dout is not None:
        dout, dlse = np.asarray(dout, np.float64), np.asarray(dlse, np.float64)
        result |= {name: np.zeros_like(array) for name, array in inputs.items()}

    for b in range(batch):
        for t in range(tokens):
            visible = np.ones(keys, bool)
            if causal:
                visible &= key_positions[b] <= query_positions[b, t]
            if query_segment_ids is not None:
                visible &= np.asarray(key_segment_ids)[b] == np.asarray(query_segment_ids)[b, t]
            if key_length is not None:
                visible &= np.arange(keys) < np.asarray(key_length)[b]
            seen = np.flatnonzero(visible)
            begin = t
            while begin > 0 and (
                query_segment_ids is None or query_segment_ids[b][begin - 1] == query_segment_ids[b][t]
            ):
                begin -= 1
            near = [s for s in range(begin, t + 1) if (s - begin) // depth_chunk == (t - begin) // depth_chunk]
            if seen.size + filled == 0:
                continue
            for n in range(heads):
                kv = n // (heads // kv_heads)
                q = query[b, t, n]
                row_keys = np.concatenate([key[b, seen, kv], *(depth_key[b, s, :filled, kv] for s in near)])
                row_values = np.concatenate([value[b, seen, kv], *(depth_value[b, s, :filled, kv] for s in near)])
                z = scale * (row_keys @ q)
                lse = z.max() + np.log(np.exp(z - z.max()).sum())
                p = np.exp(z - lse)
                out = p @ row_values
                result["out"][b, t, n], result["lse"][b, t, n] = out, lse
                if dout is None:
                    continue
                do = dout[b, t, n]
                dz = p * (row_values @ do - out @ do + dlse[b, t, n])
                dk, dv = scale * np.outer(dz, q), np.outer(p, do)
                result["dquery"][b, t, n] = scale * (dz @ row_keys)
                result["dkey"][b, seen, kv] += dk[: seen.size]
                result["dvalue"][b, seen, kv] += dv[: seen.size]
                for i, s in enumerate(near):
                    part = slice(seen.size + i * filled, seen.size + (i + 1) * filled)
                    result["ddepth_key"][b, s, :filled, kv] += dk[part]
                    result["ddepth_value"][b, s, :filled, kv] += dv[part]
    return result
