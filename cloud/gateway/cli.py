"""`foreshore gateway`: composes tokens, models, workers and the HTTP server."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import uvicorn

from cloud.gateway.app import Gateway, ServedModel, create_app
from cloud.gateway.auth import Authenticator, ControlPlaneTokens, FileTokens
from cloud.gateway.decisions import DecisionLog
from cloud.gateway.fleet import Fleet, WorkerSpec, parse_worker
from model_registry.chat_tokenizer import ChatTokenizer
from wire.errors import InvalidInputError
from wire.exposure import KEEP_ALIVE_S, is_loopback, listen, require_tls_off_loopback
from wire.process import die_with_parent, write_port_file

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(
    epilog="Example: foreshore gateway --worker p=prefill@127.0.0.1:7001 --worker d=decode@127.0.0.1:7002 "
    "--model-name smollm2 --tokenizer .cache/models/smollm2-135m-instruct --token-file tokens.txt"
)
def gateway(
    worker: Annotated[list[str], typer.Option(help="NAME=prefill|decode|both@HOST:PORT[#MODEL]; repeat.")],
    model_name: Annotated[list[str], typer.Option(help="Public name of a model; repeat with --tokenizer.")],
    tokenizer: Annotated[list[Path], typer.Option(help="Folder with tokenizer.json, in the order of --model-name.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 0,
    port_file: Annotated[Path | None, typer.Option(help="Written once the gateway accepts requests.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate to serve with; needed off loopback.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    control: Annotated[str | None, typer.Option(help="Control plane's URL: checks tokens, keeps decisions.")] = None,
    control_token_file: Annotated[Path | None, typer.Option(help="The gateway's own token there.")] = None,
    control_ca: Annotated[Path | None, typer.Option(help="CA of the control plane's certificate.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="Stand-alone: one allowed token per line.")] = None,
    worker_token_file: Annotated[Path | None, typer.Option(help="Shared secret of the serving tier.")] = None,
    die_with_parent_: Annotated[bool, typer.Option("--die-with-parent", help="End when the parent ends.")] = False,
) -> None:
    """Run the OpenAI-compatible endpoint before the serving workers. Tokens are always checked."""
    if die_with_parent_:
        die_with_parent()
    require_tls_off_loopback(host, has_tls=tls_cert is not None, remedy="give --tls-cert and --tls-key")
    if (tls_cert is None) != (tls_key is None):
        raise InvalidInputError("one of --tls-cert and --tls-key is missing", remedy="give both")
    if len(model_name) != len(tokenizer):
        raise InvalidInputError(
            f"{len(model_name)} --model-name and {len(tokenizer)} --tokenizer", remedy="give them in pairs"
        )
    specs = [parse_worker(text) for text in worker]
    client = _control_client(control, control_token_file, control_ca)
    auth = _authenticator(client, token_file)
    worker_token = worker_token_file.read_text(encoding="utf-8").strip() if worker_token_file else None
    folders = dict(zip(model_name, tokenizer, strict=True))
    asyncio.run(_serve(folders, specs, worker_token, auth, client, host, port, port_file, (tls_cert, tls_key)))


async def _serve(
    folders: dict[str, Path],
    specs: list[WorkerSpec],
    worker_token: str | None,
    auth: Authenticator,
    client: httpx.AsyncClient | None,
    host: str,
    port: int,
    port_file: Path | None,
    tls: tuple[Path | None, Path | None],
) -> None:
    first = next(iter(folders))
    unknown = {spec.model for spec in specs} - {"", *folders}
    if unknown:
        raise InvalidInputError(f"no model {', '.join(sorted(unknown))}", remedy="name it with --model-name")
    models = {
        name: ServedModel(
            name, ChatTokenizer(folder), Fleet([s for s in specs if (s.model or first) == name], worker_token)
        )
        for name, folder in folders.items()
    }
    application = create_app(Gateway(models, auth, DecisionLog(client), has_open_metrics=is_loopback(host)))
    config = uvicorn.Config(
        application, log_level="warning", ws="none", access_log=False, timeout_graceful_shutdown=10,
        timeout_keep_alive=KEEP_ALIVE_S, server_header=False, ssl_certfile=tls[0], ssl_keyfile=tls[1],
    )  # fmt: skip
    server = _Server(config)
    listener = listen(host, port)
    announcer = asyncio.create_task(_announce(server, listener, host, port_file), name="announce")
    try:
        await server.serve(sockets=[listener])
    finally:
        announcer.cancel()
        listener.close()
        if client is not None:
            await client.aclose()


class _Server(uvicorn.Server):
    """uvicorn kills itself again with the signal that ended it; a supervisor wants exit code 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.handle_exit, signum, None)
        yield


async def _announce(server: uvicorn.Server, listener: socket.socket, host: str, port_file: Path | None) -> None:
    while not server.started:  # noqa: ASYNC110 - uvicorn offers a flag only
        await asyncio.sleep(0.02)
    bound: Any = listener.getsockname()[1]
    if port_file is not None:
        write_port_file(port_file, host, bound)
    typer.echo(json.dumps({"ready": True, "address": f"{host}:{bound}"}))


def _control_client(url: str | None, token_file: Path | None, ca: Path | None) -> httpx.AsyncClient | None:
    if url is None:
        return None
    if token_file is None:
        raise InvalidInputError("--control without --control-token-file", remedy="give the gateway's own token")
    token = token_file.read_text(encoding="utf-8").strip()
    verify: Any = str(ca) if ca else True
    if verify is not True:
        import ssl

        verify = ssl.create_default_context(cafile=verify)
    headers = {"authorization": f"Bearer {token}"}
    limits = httpx.Limits(max_connections=32)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=5.0, limits=limits, verify=verify)


def _authenticator(client: httpx.AsyncClient | None, token_file: Path | None) -> Authenticator:
    if token_file is not None:
        return FileTokens(token_file)
    if client is not None:
        return ControlPlaneTokens(client)
    raise InvalidInputError("nobody checks tokens", remedy="give --control with its token file, or --token-file")


if __name__ == "__main__":
    app()
