"""Depth mechanisms: what a layer reads from earlier layers, how, and what it writes for later ones.

`mechanism` is the interface, `registry` finds a mechanism by its name, `stream` holds what layers wrote, `operations`
read it, and `loop` runs the layers with one stream. Each mechanism has a file of its own.
"""
