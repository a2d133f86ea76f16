"""Commands of the compiler: `import`, `compile` and `worker`, mounted by the `foreshore` command."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from compiler.many import TargetResult

CACHE_HOME = Path("~/.cache/foreshore")

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)


@app.command("import", epilog="Example: foreshore import model.gguf --out model/")
def import_(
    source: Annotated[Path, typer.Argument(help="A GGUF file or a torch.export program (.pt2).")],
    out: Annotated[Path, typer.Option(help="The folder (of GGUF) or ONNX file (of .pt2) to make; it must not exist.")],
) -> None:
    """Turn a GGUF file into a Hugging Face style folder, a torch.export program into an ONNX file."""
    from compiler.gguf_import import import_gguf
    from compiler.pt2_import import import_pt2
    from model_registry.sources import recognise
    from wire.errors import InvalidInputError

    found = recognise(source)
    if found.format == "pt2":
        import_pt2(source, out)
    elif found.format == "gguf":
        import_gguf(source, out)
    else:
        raise InvalidInputError(f"{source} needs no import ({found.summary})", remedy="compile or publish it as it is")
    typer.echo(f"wrote {out}")


@app.command("compile", epilog="Example: foreshore compile model.onnx --targets all --out built/")
def compile_(
    source: Annotated[Path, typer.Argument(help="An ONNX, GGUF or .pt2 file or a Hugging Face style folder.")],
    targets: Annotated[str, typer.Option(help="Names of targets, separated by commas, or: all.")],
    out: Annotated[Path, typer.Option(help="The folder to make, with one folder per target.")],
    recipe: Annotated[Path | None, typer.Option(help="A recipe (YAML).")] = None,
    golden: Annotated[Path | None, typer.Option(help="Golden inputs and outputs (.npz).")] = None,
    vision: Annotated[Path | None, typer.Option(help="Preprocessing and labels (JSON).")] = None,
    data: Annotated[Path | None, typer.Option(help="Typical inputs of a tensor model (.npz).")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where built stages are kept.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the quality report here, as one HTML file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object last.")] = False,
) -> None:
    """Compile a model for targets on this machine, without a control plane."""
    import yaml

    from compiler.cache import BuildCache
    from compiler.many import compile_targets, hash_remembered, worst_error
    from compiler.recipe import parse_recipe
    from compiler.report import report_of, write_report
    from compiler.targets import load_targets
    from model_registry.exit_codes import exit_code
    from model_registry.manifest import Vision
    from wire.errors import ConflictError

    if out.exists():
        raise ConflictError(f"{out} exists", remedy="remove it or choose another folder")
    store = BuildCache(cache or CACHE_HOME.expanduser() / "build")
    results = compile_targets(
        source,
        load_targets(targets),
        parse_recipe(yaml.safe_load(recipe.read_text()) if recipe else None),
        out,
        store,
        _show_nothing if as_json else _ProgressLines().show,
        golden=golden,
        vision=Vision.model_validate_json(vision.read_bytes()) if vision else None,
        data=data,
    )
    if report is not None:
        write_report(report_of(source.stem, hash_remembered(source, store), results), report)
    if as_json:
        typer.echo(json.dumps({"targets": [result.to_dict() for result in results]}))
    else:
        for result in results:
            typer.echo(_summary(result))
    error = worst_error(results)
    if error is not None:
        raise typer.Exit(exit_code(error))


def _show_nothing(target: str, stage: str, share: float, message: str) -> None:
    """Progress is not wanted."""


class _ProgressLines:
    """Progress as lines: one per stage, renewed in place on a terminal."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._last = ("", "")

    def show(self, target: str, stage: str, share: float, message: str) -> None:
        """Print where the target's job is."""
        is_news, self._last = self._last != (target, stage), (target, stage)
        line = f"{target:16} {share:4.0%} {stage:13} {message}"
        if self._is_terminal:
            typer.echo(("\n" if is_news else "\r\x1b[2K") + line[:160], err=True, nl=False)
        elif is_news:
            typer.echo(line, err=True)


def _summary(result: TargetResult) -> str:
    if result.artefact is None:
        return f"{result.target.name:16} failed: {result.error}"
    from model_registry.quality_report import choice_sentences

    manifest = result.artefact.manifest
    num_cached = sum(stage.was_cached for stage in result.artefact.stages)
    figures = ", ".join(f"{gate.name} {gate.value:g}" for gate in manifest.gates)
    engine = f" + {manifest.engine.builder} engine" if manifest.engine else ""
    line = (
        f"{result.target.name:16} {manifest.size_bytes / 1e6:7.1f} MB  {manifest.precision}{engine}  {figures}"
        f"  ({result.seconds:.1f} s, {num_cached} of {len(result.artefact.stages)} stages were there)"
    )
    choice = choice_sentences(manifest.runtime_choice) if manifest.runtime_choice else ()
    return "\n".join([line, *(f"{'':16} {told}" for told in (*choice, *result.artefact.notes))])


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
