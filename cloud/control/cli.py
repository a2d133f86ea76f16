"""`foreshore cloud`: run the control plane with its broker and web pages."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
import uvicorn
from fastapi import FastAPI

from cloud.control.app import create_app, stop_streams
from cloud.control.listeners import DeviceServer, device_config, people_config
from cloud.control.plane import ControlPlane
from cloud.control.settings import Settings
from cloud.ports import Ports
from wire.errors import InvalidInputError
from wire.exposure import listen, require_tls_off_loopback
from wire.process import die_with_parent, write_port_file

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Server(uvicorn.Server):
    """The door for people. It opens and shuts the devices' door too, and writes the port file once both accept."""

    def __init__(
        self, config: uvicorn.Config, application: FastAPI, port_file: Path | None, device_socket: socket.socket
    ) -> None:
        super().__init__(config)
        self._application, self._port_file, self._device_socket = application, port_file, device_socket
        plane: ControlPlane = application.state.plane
        certificate, key = plane.server_certificate()
        self._devices = DeviceServer(device_config(application, certificate, key, plane.authority.ca_file))
        self._serving: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start both, then say where."""
        await super().startup(sockets)
        if not self.started:
            return
        self._serving = asyncio.create_task(self._devices.serve(sockets=[self._device_socket]), name="devices-door")
        while not self._devices.started and not self._serving.done():  # noqa: ASYNC110 - uvicorn has no event for this
            await asyncio.sleep(0.01)
        if sockets and self._port_file is not None:
            host, port = sockets[0].getsockname()[:2]
            write_port_file(self._port_file, host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams and the devices' door, then everything else."""
        stop_streams(self._application)
        self._devices.should_exit = True
        if self._serving is not None:
            await self._serving
        await super().shutdown(sockets)


@app.command(epilog="Example: foreshore cloud --home ~/foreshore --port 8080")
def cloud(
    home: Annotated[Path, typer.Option(help="Folder of database, blobs, keys, certificates and tokens.")],
    host: Annotated[str, typer.Option(help="Address for people: API and pages.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port for people; 0 takes a free one.")] = 0,
    port_file: Annotated[Path | None, typer.Option(help="Written once the server accepts.")] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Certificate of the people's port; needed off loopback.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    device_host: Annotated[
        str, typer.Option(help="Address for devices: their HTTPS port and the broker, both with mutual TLS.")
    ] = "127.0.0.1",
    device_port: Annotated[int, typer.Option(help="Port for devices; 0 keeps the one chosen at the first start.")] = 0,
    database_url: Annotated[
        str | None,
        typer.Option(envvar="FORESHORE_DATABASE_URL", help="postgresql+psycopg://...; the variable hides a password."),
    ] = None,
    blob_url: Annotated[str | None, typer.Option(help="s3://BUCKET/PREFIX instead of a folder.")] = None,
    broker_host: Annotated[str | None, typer.Option(help="A broker of your own; ours is not started.")] = None,
    broker_port: Annotated[int, typer.Option(help="Port of your own broker.")] = 8883,
    mqtt_port: Annotated[int, typer.Option(help="Port of the managed broker; 0 keeps the first start's.")] = 0,
    gateway_url: Annotated[str | None, typer.Option(help="Where devices send what they offload.")] = None,
    advertise_host: Annotated[str, typer.Option(help="Name under which devices reach us.")] = "127.0.0.1",
    device_certificate_hours: Annotated[
        float, typer.Option(help="Lifetime of devices' certificates; renewed at two thirds.", min=0.001, max=87600)
    ] = 365 * 24,
    die_with_parent_: Annotated[bool, typer.Option("--die-with-parent", help="End when the parent ends.")] = False,
) -> None:
    """Run the control plane with its broker and web pages."""
    if die_with_parent_:
        die_with_parent()
    tls = _tls_files(host, tls_cert, tls_key)
    os.umask(0o077)  # whatever is written below the home folder is ours alone
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    home = home.expanduser().resolve()
    home.mkdir(parents=True, exist_ok=True)
    ports = Ports(home / "ports.json", device_host)
    people, devices = listen(host, port), listen(device_host, device_port or ports.get("devices"))
    application = create_app(
        Settings(
            home=home, database_url=database_url, blob_url=blob_url,
            device_host=device_host, device_port=devices.getsockname()[1],
            device_lifetime=timedelta(hours=device_certificate_hours),
            mqtt_port=0 if broker_host else mqtt_port or ports.get("mqtt"),
            broker_host=broker_host, broker_port=broker_port, gateway_url=gateway_url, advertise_host=advertise_host,
        )
    )  # fmt: skip
    scheme = "https" if tls else "http"
    typer.echo(f"control plane: {scheme}://{host}:{people.getsockname()[1]}  (admin token: {home}/tokens/admin)")
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: None)  # the server stops on it, then raises it again: a clean stop exits 0
    Server(people_config(application, tls), application, port_file, devices).run(sockets=[people])


def _tls_files(host: str, certificate: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    require_tls_off_loopback(host, has_tls=certificate is not None, remedy="give --tls-cert and --tls-key")
    if (certificate is None) != (key is None):
        raise InvalidInputError("one of --tls-cert and --tls-key is missing", remedy="give both")
    return (certificate, key) if certificate and key else None
