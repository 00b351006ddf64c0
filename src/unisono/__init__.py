"""Unisono: N replicas train the model that one would have trained. Importing this loads no torch."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["World", "join", "replicate"]

if TYPE_CHECKING:
    from unisono.replicas import replicate as replicate
    from unisono.world import World as World
    from unisono.world import join as join

_HOME = {"World": "unisono.world", "join": "unisono.world", "replicate": "unisono.replicas"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'unisono' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
