"""Failing together: what one rank meets, every rank learns, and none is left waiting."""

from collections.abc import Callable
from typing import TypeVar

from unisono.errors import EXIT_FAILED, Elsewhere, UnisonoError
from unisono.sync.ledger import Group

T = TypeVar("T")


def attempt(group: Group, function: Callable[[], T], mine: bool = True) -> T | None:
    """Collective: run `function` where `mine`; returns its result there and None elsewhere.

    Every rank waits for the others. If it raises anywhere, the exception rises there and Elsewhere
    on the other ranks.
    """
    error: BaseException | None = None
    result: T | None = None
    if mine:
        try:
            result = function()
        except Exception as caught:
            error = caught
    code = 0
    if error is not None:
        code = error.exit_code if isinstance(error, UnisonoError) else EXIT_FAILED
    codes = group.each(float(code))[:, 0].tolist()
    if error is not None:
        raise error
    failed = [r for r, c in enumerate(codes) if c]
    if failed:
        raise Elsewhere(failed[0], int(codes[failed[0]]))
    return result
