"""The model: layers, the depth stream and its loop, the transformer, and what it costs."""
