"""The normal distribution and its density, for GELU: in the precision that the results' dtype can show.

Phi(a) is the probability below a, phi(a) = exp(-a^2 / 2) / sqrt(2 pi). For float32 results Phi is XLA's erfc. For half
precision that costs more time than the memory that GELU reads and writes: erfc is two series and two divisions, about
60 instructions a number. Here it is, with z = |a| / sqrt(2),
    erfc(z) = exp(-z^2) u(t),  t = 1 / (1 + p z),
with u a polynomial without constant term: the form of Abramowitz and Stegun 7.1.26, whose coefficients bound the
absolute error. These bound the relative one, so that the lower tail keeps its digits, and were fitted for this file:
the largest relative error over 0 <= z <= 10 is least (a linear program, degree 5, p searched).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

RELATIVE_ERROR = 3.2e-5  # of erfc, at every z from 0 to 10; half a unit of float16's last place is 2.4e-4
_P = 0.535
_U = (0.30096489308319846, 0.3157689061835038, 0.1776066742887099, 0.3864803274109825, -0.18085251837474006)


def below_and_density(a: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """(Phi(a), phi(a)), float32.

    Args:
        a: any shape, float32.
        dtype: of what is computed from them; float32 gets all digits, half precision `RELATIVE_ERROR`.
    """
    exponential = jnp.exp(-0.5 * a * a)
    density = exponential * (2.0 * jnp.pi) ** -0.5
    if jnp.dtype(dtype).itemsize > 2:
        return 0.5 * lax.erfc(-a * 0.5**0.5), density
    t = 1.0 / (1.0 + (_P * 0.5**0.5) * jnp.abs(a))
    polynomial = 0.5 * _U[-1]
    for coefficient in reversed(_U[:-1]):
        polynomial = polynomial * t + 0.5 * coefficient
    beyond = polynomial * t * exponential  # of |a|, in one tail
    return jnp.where(a < 0.0, beyond, 1.0 - beyond), density
