"""`python -m benchmarks NAME [--quick] [--json FILE]`: run one benchmark by its module's name."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

import benchmarks
from benchmarks import harness

NOT_BENCHMARKS = {"__main__", "harness"}


def names() -> list[str]:
    """The benchmarks there are: the public modules of this package with a `run` of their own."""
    return sorted(
        m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name not in NOT_BENCHMARKS and m.name[0] != "_"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Run one benchmark.")
    parser.add_argument("name", nargs="?", choices=names(), help="which; without it, they are listed")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller inputs")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the result here")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for the benchmarks that know both")
    arguments = parser.parse_args()
    if arguments.name is None:
        print("\n".join(names()))
        return 0
    module = importlib.import_module(f"benchmarks.{arguments.name}")
    options = {"device": arguments.device} if getattr(module, "DEVICES", None) else {}
    figures = module.run(quick=arguments.quick, **options)
    harness.emit(harness.report(arguments.name, figures, module.GOALS), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
