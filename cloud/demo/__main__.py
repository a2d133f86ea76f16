"""`python -m cloud.demo`: the main job on this machine (see scripts/demo)."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from rich.console import Console

from cloud.demo.platform import Platform
from cloud.demo.story import Story

MODELS = Path(__file__).resolve().parent.parent.parent / ".cache" / "models"


def main() -> int:
    """Run the story; the exit code is 0 only if every step held."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="Publish, distribute, infer, offload.")
    parser.add_argument("--exit", action="store_true", help="stop everything at the end")
    parser.add_argument("--large", action="store_true", help="also fetch Qwen2.5-Coder-0.5B as a cloud-only model")
    parser.add_argument("--home", type=Path, default=Path(".foreshore/demo"), help="folder for all state, made anew")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the summary here")
    arguments = parser.parse_args()
    console = Console()
    shutil.rmtree(arguments.home, ignore_errors=True)
    platform = Platform(arguments.home.resolve(), f"smollm2={MODELS / 'smollm2-135m-instruct'}")
    story = Story(platform, MODELS, _photograph(), lambda text: console.print(text, highlight=False, soft_wrap=True))
    try:
        report = story.run()
        report.print(console)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report.to_dict(), indent=1))
        if not arguments.exit and report.ok:
            console.print(f"Running on: {platform.address('control')}/  (Ctrl-C stops everything)")
            platform.wait()
    except KeyboardInterrupt:
        console.print("stopping")
    finally:
        platform.stop()
    return 0 if story.report.ok else 1


def _photograph() -> Path:
    import skimage

    return Path(skimage.__file__).parent / "data" / "chelsea.png"


if __name__ == "__main__":
    sys.exit(main())
