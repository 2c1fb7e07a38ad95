"""What devices can do at most, which a model FLOPs utilisation is a share of."""

from __future__ import annotations

# Dense bfloat16/float16 matrix throughput in FLOP/s, from the vendors' data sheets, by a part of JAX's device_kind. The
# first match counts, so the special comes before the general.
PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H800", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s that a device can do at most in a compute dtype; None where it is unknown (every CPU, and float32).

    Args:
        device_kind: `jax.Device.device_kind`.
        dtype: "float32", "bfloat16" or "float16".
    """
    if dtype not in ("bfloat16", "float16"):
        return None
    return next((peak for name, peak in PEAK_FLOPS if name in device_kind), None)
