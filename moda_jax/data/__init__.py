"""Text and images to batches: sources, tokenizers and packing, augmentation, and the Grain pipelines."""
