"""`foreshore cloud`: run the control plane with its broker and web pages."""

from __future__ import annotations

import logging
import signal
import socket
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from fastapi import FastAPI

from cloud.control.app import create_app, stop_streams
from cloud.control.settings import Settings
from wire.process import die_with_parent, write_port_file

GRACE_S = 3

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Server(uvicorn.Server):
    """Writes the port file once it accepts, and ends event streams when it is told to stop."""

    def __init__(self, config: uvicorn.Config, application: FastAPI, port_file: Path | None) -> None:
        super().__init__(config)
        self._application, self._port_file = application, port_file

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say where."""
        await super().startup(sockets)
        if self.started and sockets and self._port_file is not None:
            host, port = sockets[0].getsockname()[:2]
            write_port_file(self._port_file, host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, then everything else."""
        stop_streams(self._application)
        await super().shutdown(sockets)


@app.command(epilog="Example: foreshore cloud --home ~/foreshore --port 8080")
def cloud(
    home: Annotated[Path, typer.Option(help="Folder of database, blobs, keys, certificates and tokens.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 0,
    port_file: Annotated[Path | None, typer.Option(help="Written once the server accepts.")] = None,
    database_url: Annotated[str | None, typer.Option(help="postgresql+psycopg://... instead of SQLite.")] = None,
    blob_url: Annotated[str | None, typer.Option(help="s3://BUCKET/PREFIX instead of a folder.")] = None,
    broker_host: Annotated[str | None, typer.Option(help="A broker of your own; ours is not started.")] = None,
    broker_port: Annotated[int, typer.Option(help="Port of your own broker.")] = 8883,
    mqtt_port: Annotated[int, typer.Option(help="Port of the managed broker; 0 takes a free one.")] = 0,
    gateway_url: Annotated[str | None, typer.Option(help="Where devices send what they offload.")] = None,
    advertise_host: Annotated[str, typer.Option(help="Name under which devices reach the broker.")] = "127.0.0.1",
    die_with_parent_: Annotated[bool, typer.Option("--die-with-parent", help="End when the parent ends.")] = False,
) -> None:
    """Run the control plane with its broker and web pages."""
    if die_with_parent_:
        die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    application = create_app(
        Settings(
            home=home.expanduser().resolve(), host=host, port=port, database_url=database_url, blob_url=blob_url,
            mqtt_port=mqtt_port, broker_host=broker_host, broker_port=broker_port, gateway_url=gateway_url,
            advertise_host=advertise_host,
        )
    )  # fmt: skip
    config = uvicorn.Config(
        application, host=host, port=port, log_level="warning", timeout_graceful_shutdown=GRACE_S, server_header=False
    )
    listening = config.bind_socket()
    typer.echo(f"control plane: http://{host}:{listening.getsockname()[1]}  (admin token: {home}/tokens/admin)")
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: None)  # the server stops on it, then raises it again: a clean stop exits 0
    Server(config, application, port_file).run(sockets=[listening])
