"""`python -m cloud.demo`: the main job on this machine (see scripts/demo)."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType

from rich.console import Console

from cloud.demo.platform import Platform
from cloud.demo.report import Report
from cloud.demo.story import LARGE_MODEL, Story

MODELS = Path(__file__).resolve().parent.parent.parent / ".cache" / "models"
LARGE_FOLDER = "qwen2.5-coder-0.5b-instruct"


def main() -> int:
    """Run the story; the exit code is 0 only if every step held."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Publish, compile, sign, distribute over MQTT, infer on the edge, offload to the cloud.",
        epilog="Example: scripts/demo --exit --json summary.json",
    )
    parser.add_argument("--exit", action="store_true", help="stop everything at the end")
    parser.add_argument("--large", action="store_true", help="also serve Qwen2.5-Coder-0.5B, as a cloud-only model")
    parser.add_argument("--home", type=Path, default=Path(".foreshore/demo"), help="folder for all state, made anew")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the summary here")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(width=None if sys.stdout.isatty() else 160)
    shutil.rmtree(arguments.home, ignore_errors=True)
    platform = Platform(arguments.home.resolve(), _cloud_models(arguments.large, console))
    has_large = arguments.large and _has_large_model()
    story = Story(platform, MODELS, _photograph(), console, has_large_model=has_large)
    try:
        report = story.run()
        report.print(console)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report.to_dict(), indent=1))
        if not arguments.exit:
            _stay(platform, report, console)
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        platform.stop()
    return 0 if story.report.ok else 1


def _stay(platform: Platform, report: Report, console: Console) -> None:
    if report.ok:
        console.print(f"Pages: {platform.address('control')}/   (log in with the token in {platform.token_file})")
        console.print("Everything keeps running; Ctrl-C stops it.")
        platform.wait()


def _cloud_models(is_large: bool, console: Console) -> list[str]:
    models = [f"smollm2={MODELS / 'smollm2-135m-instruct'}"]
    if is_large and _has_large_model():
        models.append(f"{LARGE_MODEL}={MODELS / LARGE_FOLDER}")
    elif is_large:
        console.print(f"{LARGE_MODEL} is skipped: its packages could not be had (see the set-up's lines above)")
    return models


def _has_large_model() -> bool:
    return (MODELS / LARGE_FOLDER / "config.json").is_file()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _photograph() -> Path:
    import skimage

    return Path(skimage.__file__).parent / "data" / "chelsea.png"


if __name__ == "__main__":
    sys.exit(main())
