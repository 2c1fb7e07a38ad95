"""What the plans over configs/family.py share."""

import functools
from typing import Any

from configs import family
from experiments.plan import Arm
from experiments.plans._small import FAST


def arm(name: str, text: str, *, config: str | None = None, changes: dict[str, Any] | None = None, **rules: str) -> Arm:
    """An arm that starts from configs/family.py:CONFIG, its name if that is None, at 24 layers."""
    get_config = functools.partial(family.get_config, name if config is None else config)
    return Arm(name, get_config, changes=FAST | (changes or {}), text=text, **rules)
