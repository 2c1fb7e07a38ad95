"""The op in plain JAX, blockwise, for any device."""
