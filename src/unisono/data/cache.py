"""The cache folder's two rules: one process makes an entry, and an entry is there whole or not.

Contract: a folder that `publish` moved under its name is complete on disk, whatever is killed or
loses power when. `locked` is freed by the kernel when its holder dies.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unisono.files import fsync_file, fsync_folder


def read_json(path: Path) -> Any:
    """The value, or None where there is no readable JSON: the caller then makes it anew."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def publish(building: Path, final: Path) -> None:
    """Make a finished folder of files appear under its final name, in place of a damaged one."""
    for path in building.iterdir():
        fsync_file(path)
    fsync_folder(building)
    if final.exists():
        shutil.rmtree(final)
    os.rename(building, final)
    fsync_folder(final.parent)


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file `path`, beside what it guards; `waiting` is called while another does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                time.sleep(0.1)
        yield
