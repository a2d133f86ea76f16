"""Entry point of `foreshore-agent`: the daemon by its own short way, everything else through `commands`."""

from __future__ import annotations

import sys

from model_registry.exit_codes import exit_code
from wire.errors import ForeshoreError


def main() -> None:
    """Errors become one line and an exit code."""
    try:
        if sys.argv[1:2] == ["run"]:
            from edge_agent import daemon

            daemon.main(sys.argv[2:])
        else:
            from edge_agent.commands import app

            app()
    except ForeshoreError as error:
        sys.stderr.write(f"foreshore-agent: {error}\n")
        sys.exit(exit_code(error))


if __name__ == "__main__":
    main()
