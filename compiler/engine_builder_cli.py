"""`foreshore builder`: a machine that builds engines for the hardware keys of a fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog="Example: foreshore builder --capability 8.6 --capability 8.9 --token-file worker.token")
def builder(
    url: Annotated[str, typer.Option(envvar="FORESHORE_URL", help="The control plane's address.")],
    token_file: Annotated[Path, typer.Option(envvar="FORESHORE_TOKEN_FILE", help="A file with a worker's token.")],
    capability: Annotated[list[str], typer.Option(help="Compute capability to build for; may be repeated.")],
    runtime: Annotated[str, typer.Option(help="tensorrt-rtx (needs no GPU) or tensorrt.")] = "tensorrt-rtx",
    architecture: Annotated[list[str] | None, typer.Option(help="Processor of the devices [x86_64].")] = None,
    home: Annotated[Path, typer.Option(help="Where artefacts and engines lie meanwhile.")] = Path(
        "~/.cache/foreshore/builder"
    ),
    once: Annotated[bool, typer.Option("--once", help="End when there is nothing to build.")] = False,
) -> None:
    """Build engines for devices of these compute capabilities, as they are wanted."""
    from compiler.engine_builder import build_agent, keys_of, work
    from model_registry.client import connect
    from model_registry.engine_builder import Outcome

    def told(outcome: Outcome) -> None:
        end = f"failed: {outcome.error}" if outcome.error else "built"
        typer.echo(f"{outcome.lease.model} for {outcome.lease.hardware_key}: {end}")

    keys = keys_of(runtime, capability, architecture or ["x86_64"])
    with connect(url, token_file.read_text().strip()) as control:
        work(build_agent(control, home.expanduser(), keys), told, once=once)
