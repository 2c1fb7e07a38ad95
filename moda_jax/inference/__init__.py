"""Use of a trained model: generation with a KV cache, perplexity, downstream tasks, attention maps."""
