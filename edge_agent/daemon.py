"""`foreshore-agent run`: the agent's process. Objects are composed here and nowhere else.

It reads its few options without the command line library: that costs ten megabytes, and this process stays.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_agent.config import Home, Profile
from edge_agent.thrift import use_one_heap
from wire.errors import InvalidInputError
from wire.exposure import KEEP_ALIVE_S, is_loopback, listen

SHUTDOWN_S = 5


def main(arguments: Sequence[str]) -> None:
    """Serve the local API and follow the control plane's wishes until SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="foreshore-agent run",
        description=main.__doc__,
        epilog="Example: foreshore-agent run --home /var/lib/foreshore-agent --port 8600",
    )
    parser.add_argument("--home", type=Path, required=True, help="folder of this agent")
    parser.add_argument("--host", default="127.0.0.1", help="address of the local API, on loopback [%(default)s]")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--port-file", type=Path, default=None, help="written once the local API accepts requests")
    parser.add_argument("--die-with-parent", action="store_true", help="end when the parent ends")
    options = parser.parse_args(arguments)
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]  # httpx's own command: megabytes for nothing
    if options.die_with_parent:
        from wire.process import die_with_parent

        die_with_parent()
    if not is_loopback(options.host):
        raise InvalidInputError(
            f"--host {options.host}: the local API asks nobody who they are",
            remedy="stay on loopback, put a proxy before it",
        )
    use_one_heap()
    os.umask(0o077)
    asyncio.run(_run(Home(options.home), options.host, options.port, options.port_file))


async def _run(home: Home, host: str, port: int, port_file: Path | None) -> None:
    import uvicorn

    from edge_agent.agent import Agent
    from edge_agent.cloud import Cloud
    from edge_agent.credentials import Credentials, open_keys
    from edge_agent.local_api.app import create_app
    from edge_agent.thrift import stay_small
    from edge_agent.verify import open_trust
    from wire.process import write_port_file

    profile: Profile = home.profile()
    identity = home.identity()
    keys = open_keys(home)
    credentials = Credentials(home, keys)
    trust = open_trust(home, identity, credentials.context)
    agent = Agent(home, profile, identity, credentials, keys, trust)
    cloud = Cloud(identity.gateway_url, identity.device_token)
    listener = listen(host, port)
    address = listener.getsockname()
    agent.local_url = f"http://{address[0]}:{address[1]}"
    settings = uvicorn.Config(
        create_app(agent, cloud), log_level="warning", lifespan="off", timeout_graceful_shutdown=SHUTDOWN_S,
        timeout_keep_alive=KEEP_ALIVE_S,
    )  # fmt: skip
    server = uvicorn.Server(settings)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(server.serve(sockets=[listener]), name="local-api")
        working = tasks.create_task(agent.run(stopping), name="agent")
        trimming = tasks.create_task(stay_small(), name="stay-small")
        while not server.started and not serving.done():  # noqa: ASYNC110 - uvicorn has no event for this
            await asyncio.sleep(0.02)
        for number in (signal.SIGTERM, signal.SIGINT):  # after uvicorn has set its own
            loop.add_signal_handler(number, stopping.set)
        if port_file is not None:
            write_port_file(port_file, address[0], address[1])
        await working
        server.should_exit = True
        trimming.cancel()
        await serving
    await cloud.close()
