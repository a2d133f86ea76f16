"""Which control plane a command talks to and with which token: options, then environment, then the login file.

The login file holds a secret and is written 0600. This file reads only what it is handed: environment and home come
in from the command.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model_registry.client import ControlClient, connect
from wire.errors import InvalidInputError, NotAuthenticatedError
from wire.process import replace_durably

MAX_FILE_BYTES = 64 * 1024


@dataclass(frozen=True)
class ConnectionOptions:
    """What the command line said; the entry point hands it down as the context's object."""

    url: str | None = None
    token_file: Path | None = None
    as_json: bool = False


@dataclass(frozen=True)
class Login:
    """Where to go, as whom. `tenant` is what the person said at login, to check answers against."""

    url: str
    token: str
    tenant: str | None = None
    ca_file: str | None = None

    def connect(self) -> ControlClient:
        """A client with this login."""
        return connect(self.url, self.token, ca_file=self.ca_file)


def config_folder(environment: Mapping[str, str], home: Path) -> Path:
    """Where this person's Foreshore files are."""
    base = environment.get("XDG_CONFIG_HOME")
    return (Path(base) if base else home / ".config") / "foreshore"


def find_login(options: ConnectionOptions, environment: Mapping[str, str], home: Path) -> Login:
    """The login to use; raises `NotAuthenticatedError` when neither options, environment nor file name one."""
    saved = _read_saved(config_folder(environment, home) / "login.json")
    url = options.url or environment.get("FORESHORE_URL") or saved.get("url")
    if not url:
        raise NotAuthenticatedError("no control plane is named", remedy="foreshore login URL, or give --url")
    token_file = options.token_file or _path(environment.get("FORESHORE_TOKEN_FILE"))
    same_server = saved.get("url") == url
    token = read_token(token_file) if token_file else saved.get("token") if same_server else None
    if not token:
        raise NotAuthenticatedError(f"no token for {url}", remedy="foreshore login URL, or give --token-file")
    tenant = environment.get("FORESHORE_TENANT") or (saved.get("tenant") if same_server else None)
    ca_file = environment.get("FORESHORE_CA_FILE") or (saved.get("ca_file") if same_server else None)
    return Login(url, token, tenant, ca_file)


def save_login(login: Login, environment: Mapping[str, str], home: Path) -> Path:
    """Write the login file and say where it is."""
    path = config_folder(environment, home) / "login.json"
    document = {"url": login.url, "token": login.token, "tenant": login.tenant, "ca_file": login.ca_file}
    replace_durably(path, json.dumps({k: v for k, v in document.items() if v is not None}).encode(), mode=0o600)
    return path


def read_token(path: Path) -> str:
    """The token in a file: one line."""
    try:
        with path.open(encoding="ascii") as file:
            token = file.read(MAX_FILE_BYTES).strip()
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"token file {path} cannot be read: {error}", remedy="give a text file") from error
    if not token or any(char.isspace() for char in token):
        raise InvalidInputError(f"token file {path} does not hold one token", remedy="put the token on one line")
    return token


def _read_saved(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(MAX_FILE_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path} cannot be read: {error}", remedy="run foreshore login again") from error
    if not isinstance(document, dict):
        raise InvalidInputError(f"{path} is not a login", remedy="run foreshore login again")
    return {str(name): value for name, value in document.items() if isinstance(value, str)}


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None
