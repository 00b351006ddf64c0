"""What can go wrong in a user's hands, and the exit code of each.

Every message names the field or file, the value found and the remedy, in one line. Exit codes are
part of the interface (docs/exit-codes.md): a launcher or a batch system acts on them.
"""

from typing import Self

EXIT_DONE = 0
EXIT_FAILED = 1
"""Something failed that a second run with the same input would probably meet again."""
EXIT_USAGE = 2
"""The configuration or the arguments are wrong; nothing was started."""
EXIT_STOPPED = 75
"""Stopped by a signal, everything committed: run the same command again to go on (EX_TEMPFAIL)."""


class UnisonoError(Exception):
    """An error that a user can act on; printed as one line, without a traceback."""

    exit_code = EXIT_FAILED
    everywhere = False
    """Every rank raises the same, so that one of them may say it for all."""

    def on_every_rank(self) -> Self:
        self.everywhere = True
        return self


class ConfigError(UnisonoError):
    """The configuration asks for something that does not exist or cannot be honoured."""

    exit_code = EXIT_USAGE


class DataError(UnisonoError):
    """The data cannot be used as it is."""


class CheckpointError(UnisonoError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another run."""


class ReplicaError(UnisonoError):
    """Replicas disagree, or one of them failed and the others stopped with it."""


class LostReplicas(ReplicaError):
    """A collective did not end: a peer is gone, stands still, or does something else."""


class Stopped(UnisonoError):
    """A signal asked for the end and everything is committed."""

    exit_code = EXIT_STOPPED


class Interrupted(BaseException):
    """A second signal: leave now, committing nothing more. Not an Exception, so nobody handles it."""


class Elsewhere(ReplicaError):
    """Another rank failed and has said why; this one only stops, with the same exit code."""

    def __init__(self, rank: int, exit_code: int) -> None:
        super().__init__(f"rank {rank} failed; its message says why")
        self.exit_code = exit_code
