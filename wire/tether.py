"""Start a command that ends when its parent does: `python -m wire.tether SIGNAL PARENT COMMAND ...`.

The kernel keeps the parent-death signal across `exec`, so the command gets it, whatever it is. `tethered` makes the
words; the parent is the thread that starts the process, so that thread has to wait for the command's end.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from wire.process import die_with_parent


def tethered(command: Sequence[str], signum: signal.Signals = signal.SIGTERM) -> list[str]:
    """`command` for a child of this very process, which gets `signum` when this process ends, however it ends."""
    return [sys.executable, "-m", "wire.tether", str(int(signum)), str(os.getpid()), *command]


def main() -> None:
    """Become the command given as arguments."""
    die_with_parent(int(sys.argv[1]), parent=int(sys.argv[2]))
    os.execvp(sys.argv[3], sys.argv[3:])


if __name__ == "__main__":
    main()
