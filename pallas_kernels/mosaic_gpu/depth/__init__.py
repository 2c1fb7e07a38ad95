"""The depth part: memory-bound kernels, a warp for each token and KV head."""
