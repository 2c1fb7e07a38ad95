"""Run configurations: `base.py` holds every field and its default, the others say how they differ from it."""
