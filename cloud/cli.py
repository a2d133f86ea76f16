"""The `foreshore` command: finds the command's module when it is called, so that no extra is needed for another's help.

Each process brings its own typer app; this file only knows their addresses, one line of help each, and how errors end:
0 done, 1 failed, 2 wrong usage or input, 3 not reachable, 4 refused, 5 a gate or check did not hold.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib import metadata
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from model_registry.exit_codes import exit_code
from wire.errors import ForeshoreError, MissingExtraError

COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("cloud.up.cli", "Start everything on this machine: cloud, broker, workers, gateway, agents."),
    "publish": ("model_registry.publish_cli", "Publish a model: upload, compile, gate, sign."),
    "keys": ("model_registry.keys_cli", "Make, name and use the keys that say what may exist."),
    "bundle": ("model_registry.bundle_cli", "Write an update to a file for devices without a network."),
    "engines": ("model_registry.engines_cli", "List and sign engines that were built for hardware keys."),
    "import": ("compiler.cli", "Turn a GGUF file into a Hugging Face style folder."),
    "compile": ("compiler.cli", "Compile a model for targets on this machine, without a control plane."),
    "worker": ("compiler.cli", "Run compile jobs of a control plane."),
    "builder": ("compiler.engine_builder_cli", "Build engines for the hardware keys of a fleet."),
    "cloud": ("cloud.control.cli", "Run the control plane with its broker and web pages."),
    "serve": ("cloud.serving.cli", "Run a serving worker: prefill, decode or both."),
    "gateway": ("cloud.gateway.cli", "Run the OpenAI-compatible gateway before the serving workers."),
    "login": ("cloud.fleet_cli", "Remember a control plane's address and token."),
    "devices": ("cloud.fleet_cli", "List, show and revoke devices."),
    "groups": ("cloud.fleet_cli", "List and change groups of devices."),
    "rollouts": ("cloud.rollouts_cli", "Start, watch and steer rollouts."),
    "models": ("cloud.fleet_cli", "List models, releases and artefacts."),
    "jobs": ("cloud.fleet_cli", "List and cancel compile jobs."),
    "enrolments": ("cloud.fleet_cli", "Make one-time tokens for new devices."),
    "tokens": ("cloud.fleet_cli", "Make and revoke API tokens."),
    "audit": ("cloud.changes_cli", "Read, export and verify who changed what."),
    "webhooks": ("cloud.changes_cli", "Have changes told to an address, signed."),
    "decisions": ("cloud.fleet_cli", "Read why a request, rollout or offload was decided as it was."),
}

PACKAGE_EXTRAS = {
    "torch": "engine", "safetensors": "engine", "tokenizers": "engine", "grpc": "engine",
    "onnx": "compiler", "onnxruntime": "compiler", "transformers": "compiler", "gguf": "compiler",
    "sqlalchemy": "control", "alembic": "control", "fastapi": "control", "paho": "control", "uvicorn": "control",
}  # fmt: skip


class LazyGroup(typer.core.TyperGroup):
    """A group that imports a command's module only when the command is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All commands, in the order of a model's life."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        """The command `name`, imported now; None when there is none."""
        return _load(name) if name in COMMANDS else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands from the table above, importing none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _load(name: str) -> Any:
    try:
        module: Any = importlib.import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in PACKAGE_EXTRAS:
            raise MissingExtraError(package, PACKAGE_EXTRAS[package]) from error
        raise
    command = typer.main.get_command(module.app)
    return getattr(command, "commands", {}).get(name, command)


EPILOG = "Example: foreshore up   (then open the address it prints).  Every command has --help with an example."

app = typer.Typer(cls=LazyGroup, epilog=EPILOG, rich_markup_mode=None, add_completion=False, no_args_is_help=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"foreshore {metadata.version('foreshore')}")
        raise typer.Exit


@app.callback()
def foreshore(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Foreshore: compile a model once, put it safely on a fleet, answer on the device, offload to the cloud."""


def main() -> None:
    """Entry point of `foreshore`."""
    try:
        app()
    except ForeshoreError as error:
        if "--json" in sys.argv:
            typer.echo(json.dumps({"error": error.to_dict()}))
        else:
            typer.echo(f"foreshore: {error}", err=True)
        sys.exit(exit_code(error))


if __name__ == "__main__":
    main()
