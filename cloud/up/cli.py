"""`foreshore up`: everything on one machine, until Ctrl-C."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from cloud.up.child import Child, ChildState
from cloud.up.fleet import load_fleet
from cloud.up.laptop import CloudModel, Laptop
from cloud.up.supervisor import Supervisor
from wire.errors import InvalidInputError

app = typer.Typer(rich_markup_mode=None, add_completion=False)

DEFAULT_HOME = Path(".foreshore")
COLOURS = {
    ChildState.STARTING: "cyan",
    ChildState.RUNNING: "green",
    ChildState.WAITING: "yellow",
    ChildState.STOPPED: "dim",
}


@app.command(epilog="Example: foreshore up --cloud-model smollm2=.cache/models/smollm2-135m-instruct")
def up(
    home: Annotated[Path, typer.Option(help="Folder for all state; starting again resumes it.")] = DEFAULT_HOME,
    fleet: Annotated[str, typer.Option(help="Name of a shipped fleet or path of a fleet file.")] = "laptop",
    cloud_model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Language model of the serving tier; repeat for more."),
    ] = None,
) -> None:
    """Start control plane, broker, compile worker, serving workers, gateway and devices on this machine.

    A process that dies is restarted with back-off. Ctrl-C stops everything and leaves nothing behind.
    """
    os.umask(0o077)  # state, logs and port files are for this person alone
    console = Console()
    stop = _StopFlag()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop.set)
    home = home.resolve()
    supervisor = Supervisor(home / "state.json", on_change=lambda child: _say(console, child))
    try:
        laptop = Laptop(home, load_fleet(fleet), [_cloud_model(text) for text in cloud_model or []], supervisor)
        laptop.start()
        console.print(f"[bold]Foreshore is up.[/bold] Pages: {laptop.control_url}/", soft_wrap=True)
        console.print(f"Log in with the token in {laptop.admin_token_file}. Ctrl-C stops everything.", soft_wrap=True)
        supervisor.is_ready = True
        supervisor.run_until(lambda: stop.is_set)
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        supervisor.stop()


class _StopFlag:
    """Set by a signal; during start-up, when nobody looks at it, the signal interrupts instead."""

    def __init__(self) -> None:
        self.is_set = False

    def set(self, signum: int, frame: FrameType | None) -> None:
        if not self.is_set:
            self.is_set = True
            raise KeyboardInterrupt


def _cloud_model(text: str) -> CloudModel:
    name, separator, folder = text.partition("=")
    if not separator or not (Path(folder) / "config.json").is_file():
        raise InvalidInputError(
            f"cloud model {text!r} is not NAME=FOLDER of a Hugging Face style folder",
            remedy="make one with: foreshore import MODEL.gguf --out FOLDER",
        )
    return CloudModel(name, Path(folder).resolve())


def _say(console: Console, child: Child) -> None:
    detail = f"pid {child.pid}" if child.pid is not None else f"exit {child.last_exit}"
    restarts = f", restart {child.num_restarts}" if child.num_restarts else ""
    colour = COLOURS[child.state]
    console.print(f"[{colour}]{child.state:>9}[/{colour}]  {child.spec.name}  ({detail}{restarts})", highlight=False)
