"""The base of the modules that others import."""

from __future__ import annotations

import inspect
from typing import Any

from flax import nnx


class Module(nnx.Module):
    """An NNX module that shows its arguments.

    NNX makes objects by a metaclass: `inspect.signature`, editors and notebooks would see `(*args, **kwargs)`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = inspect.signature(cls.__init__)
        cls.__signature__ = own.replace(parameters=list(own.parameters.values())[1:], return_annotation=own.empty)
