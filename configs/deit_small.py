"""DeiT-S on ImageNet-1k, as configs/deit_tiny.py: configs/deit_small.py:none, :moda and :moda_64l (64 layers)."""

from ml_collections import ConfigDict

from configs import deit_tiny


def get_config(name: str = "moda") -> ConfigDict:
    return deit_tiny.deit("configs/deit_small.py", name, width=384, num_heads=6)
