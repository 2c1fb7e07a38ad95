"""What a picture shows, read from its figure and not from its pixels."""

import contextlib

from moda_jax import pictures


def keep_figures(monkeypatch, *modules):
    """The figures that these modules draw from now on, in a list that grows; they are written as always."""
    figures, picture = [], pictures.picture

    @contextlib.contextmanager
    def keep(*arguments):
        with picture(*arguments) as figure:
            figures.append(figure)
            yield figure

    for module in modules:
        monkeypatch.setattr(module, "picture", keep)
    return figures


def legend_texts(figure):
    """What the legends of a figure say, and of its subfigures."""
    legends = [legend for part in (figure, *figure.subfigs) for legend in part.legends]
    return [text.get_text() for legend in legends for text in legend.get_texts()]
