"""A real PostgreSQL for tests: a temporary cluster on loopback that ends with its context.

PostgreSQL refuses to run as root, so root hands the cluster to the user `postgres` or `nobody`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wire.process import free_port


def find_postgres() -> Path | None:
    """The folder of initdb and postgres, or None when PostgreSQL is not installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    on_path = shutil.which("initdb")
    if on_path:
        folders.append(Path(on_path).resolve().parent)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


@contextlib.contextmanager
def running_postgres() -> Iterator[str]:
    """Start a cluster and yield its SQLAlchemy URL; needs `find_postgres()`."""
    programs = find_postgres()
    assert programs is not None
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as home:
        user = _owner()
        if user is not None:
            os.chown(home, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
        data, port = Path(home) / "data", free_port()
        _run(user, home, programs / "initdb", "-D", data, "-U", "fs", "--auth=trust", "--no-sync", "-E", "UTF8")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c fsync=off -k {home}"
        _run(user, home, programs / "pg_ctl", "-D", data, "-l", f"{home}/log", "-w", "-t", "60", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://fs@127.0.0.1:{port}/postgres"
        finally:
            _run(user, home, programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "-t", "60", "stop")


def _owner() -> str | None:
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        pwd.getpwnam("postgres")
        return "postgres"
    return "nobody"


def _run(user: str | None, home: str, *command: object) -> None:
    arguments = [str(part) for part in command]
    group = pwd.getpwnam(user).pw_gid if user else None
    with tempfile.TemporaryFile() as output:  # a pipe would be held open by the server
        done = subprocess.run(
            arguments, user=user, group=group, extra_groups=[] if user else None, cwd=home, timeout=120,
            stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "LC_ALL": "C.UTF-8"}, check=False,
        )  # fmt: skip
        output.seek(0)
        if done.returncode != 0:
            raise RuntimeError(f"{arguments[0]} failed: {output.read().decode(errors='replace')[-2000:]}")
