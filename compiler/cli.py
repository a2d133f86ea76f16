"""Commands of the compiler: `import`, `compile` and `worker`, mounted by the `foreshore` command."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Annotated

import typer

CACHE_HOME = Path("~/.cache/foreshore")

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)


@app.command("import", epilog="Example: foreshore import model.gguf --out model/")
def import_(
    source: Annotated[Path, typer.Argument(help="A GGUF file.")],
    out: Annotated[Path, typer.Option(help="The folder to make; it must not exist yet.")],
) -> None:
    """Turn a GGUF file into a Hugging Face style folder."""
    from compiler.gguf_import import import_gguf
    from model_registry.sources import recognise

    recognise(source)
    import_gguf(source, out)
    typer.echo(f"wrote {out}")


@app.command("compile", epilog="Example: foreshore compile model.onnx --targets cpu-x86,jetson-orin --out built/")
def compile_(
    source: Annotated[Path, typer.Argument(help="An ONNX or GGUF file or a Hugging Face style folder.")],
    targets: Annotated[str, typer.Option(help="Names of targets, separated by commas.")],
    out: Annotated[Path, typer.Option(help="The folder to make, with one folder per target.")],
    recipe: Annotated[Path | None, typer.Option(help="A recipe (YAML).")] = None,
    golden: Annotated[Path | None, typer.Option(help="Golden inputs and outputs (.npz).")] = None,
    vision: Annotated[Path | None, typer.Option(help="Preprocessing and labels (JSON).")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where built stages are kept.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object last.")] = False,
) -> None:
    """Compile a model for targets on this machine, without a control plane."""
    import yaml

    from compiler.cache import BuildCache
    from compiler.pipeline import CompileJob, compile_model
    from compiler.recipe import parse_recipe
    from compiler.targets import load_target
    from model_registry.manifest import Vision
    from model_registry.sources import hash_source, recognise, source_digest
    from wire.errors import ConflictError

    if out.exists():
        raise ConflictError(f"{out} exists", remedy="remove it or choose another folder")
    chosen = [load_target(name.strip()) for name in targets.split(",") if name.strip()]
    plan = parse_recipe(yaml.safe_load(recipe.read_text()) if recipe else None)
    found = hash_source(recognise(source))
    digest = source_digest(found.format, found.files)
    summary = {}
    for target in chosen:
        job = CompileJob(
            name="model",
            kind=found.kind,
            target=target,
            recipe=plan,
            source_format=found.format,
            source=source,
            source_digest=digest,
            golden=golden,
            vision=Vision.model_validate_json(vision.read_bytes()) if vision else None,
        )
        store = BuildCache(cache or CACHE_HOME.expanduser() / "build")
        built = compile_model(job, out / target.name, store, lambda *event: _show(target.name, event, quiet=as_json))  # noqa: B023
        summary[target.name] = {
            "manifest": built.manifest.digest,
            "size_bytes": built.manifest.size_bytes,
            "gates": [gate.model_dump() for gate in built.manifest.gates],
        }
    if as_json:
        typer.echo(json.dumps(summary))


def _show(target: str, event: tuple[str, float, str], *, quiet: bool) -> None:
    if not quiet:
        typer.echo(f"{target} {event[1]:4.0%} {event[0]:9} {event[2]}")


@app.command("worker", epilog="Example: foreshore --url http://127.0.0.1:8080 worker --token-file worker.token")
def worker(
    url: Annotated[str, typer.Option(envvar="FORESHORE_URL", help="The control plane's address.")],
    token_file: Annotated[Path, typer.Option(envvar="FORESHORE_TOKEN_FILE", help="A file with a worker's token.")],
    home: Annotated[
        Path | None,
        typer.Option(help="Where sources and the build cache are kept (default: ~/.cache/foreshore/worker)."),
    ] = None,
    name: Annotated[str, typer.Option(help="This worker's name.")] = "",
    num_jobs: Annotated[int, typer.Option("--num-jobs", min=0, help="End after so many jobs; 0 = never.")] = 0,
) -> None:
    """Run compile jobs of a control plane."""
    from compiler.worker import Worker
    from model_registry.client import connect

    with connect(url, token_file.read_text().strip()) as client:
        Worker(client, home or CACHE_HOME.expanduser() / "worker", name or f"{socket.gethostname()}-{os.getpid()}").run(
            num_jobs=num_jobs or None
        )
