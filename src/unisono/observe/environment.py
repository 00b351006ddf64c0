"""What a run ran on: versions, device, host. Rank 0's, written once as environment.json."""

import os
import platform
from importlib import metadata
from typing import Any

import psutil

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def environment(**known: Any) -> dict[str, Any]:
    """Facts by name, those that are `known` first. No variables of the environment and no paths: a page of them may be shared."""
    return {
        **known,
        "host": platform.node(),
        "machine": f"{platform.machine()}, {platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from the source
        return None
