"""The agent's TUF client as a command for any repository: `python -m model_registry.trust ... init|refresh|download`.

The options are those by which the public conformance suite calls a client (docs/trust.md says how to run it). Exit code
0: done; 1: refused or failed, with the reason's code on standard error.
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import TargetFile

from model_registry.trust.client import MAX_ROOT_BYTES, TrustClient
from model_registry.trust.clock import TrustedClock
from model_registry.trust.errors import MetadataUnavailableError, MixedError
from model_registry.trust.source import HttpSource, read_limited
from wire.errors import ForeshoreError
from wire.process import replace_durably

LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
"""A foreign repository may be looked at as of any time: the floor of our own build does not apply to it."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "init":
            TrustClient.initialise(given.metadata_dir, read_limited(given.root, MAX_ROOT_BYTES))
            return 0
        client = TrustClient(given.metadata_dir, HttpSource(given.metadata_url), TrustedClock(not_before=LONG_AGO))
        client.refresh()
        for name in given.target_name if given.command == "download" else ():
            _download(client, name, HttpSource(given.target_base_url), given.target_dir)
    except ForeshoreError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m model_registry.trust", description=__doc__)
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--metadata-url")
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-base-url")
    parser.add_argument("--target-dir", type=Path)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    return parser


def _download(client: TrustClient, name: str, source: HttpSource, folder: Path) -> None:
    target = client.get_target(name)
    place = folder / quote(name, "")
    if place.is_file() and place.stat().st_size == target.length and _matches(target, place.read_bytes()):
        return
    data = source.fetch(_path(client, target), target.length)
    if data is None:
        raise MetadataUnavailableError(f"{name} is listed and not served", remedy="try again")
    if not _matches(target, data):
        raise MixedError(f"{name} is not what is listed", remedy="do not use it")
    replace_durably(place, data)


def _matches(target: TargetFile, data: bytes) -> bool:
    try:
        target.verify_length_and_hashes(data)
    except LengthOrHashMismatchError:
        return False
    return True


def _path(client: TrustClient, target: TargetFile) -> str:
    if not client.view.root.consistent_snapshot:
        return target.path
    folder, slash, name = target.path.rpartition("/")
    digest = next((target.hashes[kind] for kind in ("sha256", "sha512") if kind in target.hashes), None)
    return f"{folder}{slash}{digest or next(iter(target.hashes.values()))}.{name}"


if __name__ == "__main__":
    sys.exit(main())
