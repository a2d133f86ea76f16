"""Start a command that ends when its parent does: `python -m cloud.up.exec COMMAND ...`.

The kernel keeps the parent-death signal across `exec`, so every child of `foreshore up` gets it, whatever it runs.
"""

from __future__ import annotations

import os
import sys

from wire.process import die_with_parent


def main() -> None:
    """Become the command given as arguments."""
    die_with_parent()
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
