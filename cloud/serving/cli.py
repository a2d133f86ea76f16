"""`foreshore serve`: run one serving worker. Composes model, engine and server; nothing else happens here."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from wire.errors import InvalidInputError, UnavailableError
from wire.exposure import is_loopback
from wire.process import die_with_parent, write_port_file

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(epilog="Example: foreshore serve --role both --model .cache/models/smollm2-135m-instruct")
def serve(
    model: Annotated[Path, typer.Option(help="Hugging Face style folder: config.json, safetensors.")],
    role: Annotated[str, typer.Option(help="prefill, decode or both.")] = "both",
    name: Annotated[str, typer.Option(help="Name in records and metrics (default: the role).")] = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 0,
    port_file: Annotated[Path | None, typer.Option(help="Written once the worker accepts requests.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda; cuda needs the gpu extra.")] = "cpu",
    weight_bits: Annotated[int, typer.Option(help="16, or round weights to 8 or 4 bits when loading them.")] = 16,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: OMP_NUM_THREADS, else measured at start.")] = 0,
    kv_blocks: Annotated[int, typer.Option(help="Blocks of the KV pool; 0 fits 1 GiB.")] = 0,
    block_size: Annotated[int, typer.Option(help="Tokens per KV block.")] = 16,
    max_context: Annotated[int, typer.Option(help="Most tokens of prompt plus answer.")] = 8192,
    max_running: Annotated[int, typer.Option(help="Most answers computed at once.")] = 32,
    max_waiting: Annotated[int, typer.Option(help="Most requests that wait; more are refused.")] = 128,
    chunk_tokens: Annotated[int, typer.Option(help="Prompt tokens computed per step.")] = 256,
    token_file: Annotated[Path | None, typer.Option(help="Shared secret; needed off loopback.")] = None,
    drain_s: Annotated[float, typer.Option(help="Time for running answers after SIGTERM.")] = 10.0,
    die_with_parent_: Annotated[bool, typer.Option("--die-with-parent", help="End when the parent ends.")] = False,
) -> None:
    """Run a serving worker. Prints one JSON line when it is ready; SIGTERM lets running answers finish."""
    if die_with_parent_:
        die_with_parent()
    token = token_file.read_text(encoding="utf-8").strip() if token_file else None
    if token is None and not is_loopback(host):
        raise InvalidInputError(f"--host {host} without --token-file", remedy="give --token-file, or stay on loopback")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    from cloud.serving.engine import EngineConfig, build_engine
    from cloud.serving.scheduler import SchedulerConfig
    from cloud.serving.worker import WorkerConfig

    config = WorkerConfig(name or role, role, token)
    limits = SchedulerConfig(
        max_batch_tokens=chunk_tokens * 2 + max_running,
        max_chunk_tokens=chunk_tokens,
        max_running=max_running,
        max_waiting=max_waiting,
        max_context_tokens=max_context,
    )
    engine = build_engine(EngineConfig(model, dtype, kv_blocks, block_size, limits, device, weight_bits))
    if device == "cpu":
        engine.threads = _threads(engine, threads)
        typer.echo(f"threads of {config.name}: {engine.threads.reason}", err=True)
    gc.collect()
    gc.freeze()  # what lives as long as the engine need not be looked at again between two tokens
    raise typer.Exit(asyncio.run(_run(engine, config, host, port, port_file, drain_s)))


def _threads(engine: Any, num_threads: int) -> Any:
    """As somebody said, else measured on the loaded model."""
    from cloud.serving.cpu_threads import count_cores, given, measure, wanted
    from cloud.serving.probe import probe_steps

    if said := wanted(num_threads, os.environ):
        return given(said)
    return measure(*probe_steps(engine), count_cores(os.sched_getaffinity(0)), time.perf_counter)


async def _run(engine: Any, config: Any, host: str, port: int, port_file: Path | None, drain_s: float) -> int:
    from cloud.serving.engine_thread import EngineThread
    from cloud.serving.worker import WorkerServer

    thread = EngineThread(engine)
    server = WorkerServer(config, thread)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    bound = await server.start(host, port)
    if port_file is not None:
        write_port_file(port_file, host, bound)
    ready = {"ready": True, "address": f"{host}:{bound}", "worker": config.name, "role": config.role}
    typer.echo(json.dumps(ready))
    waits = {asyncio.create_task(stop.wait(), name="stop"), asyncio.create_task(thread.failed.wait(), name="failure")}
    _, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await server.drain(0.0 if thread.failure else drain_s)
    if thread.failure is not None:
        raise UnavailableError(f"the engine has failed: {thread.failure!r}", remedy="restart it") from thread.failure
    return 0


if __name__ == "__main__":
    app()
