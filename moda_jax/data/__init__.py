"""Text to batches: corpus and TFDS sources, tokenizers, packing, and the Grain pipeline."""
