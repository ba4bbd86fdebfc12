"""How a server is run, apart from its engine."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantflow.errors import Problem, UserError

KEY_VARIABLE = "QUANTFLOW_API_KEY"
ADMIN_KEY_VARIABLE = "QUANTFLOW_ADMIN_KEY"
LEAST_KEY = 16  # characters


@dataclass(frozen=True)
class ServerConfig:
    """keys, admin_keys: any of them opens the door; none: no key is asked for, and nothing can be
    administered. names: what the model is called; where the user gave none, any name in a request
    means it. max_queue: sequences that may wait beside those that run. Sizes in bytes, times in
    seconds: request_timeout_s of a whole answer, drain_timeout_s of those that run when the server
    is told to stop, stall_s without progress of the engine until it counts as stalled, keep_alive_s
    between comments in a stream that is silent.
    origins: other sites whose pages may call this server. literal_content: control tokens that
    somebody spells out in a message stay text.
    supervised: the process ends when the engine has.
    """

    host: str = "127.0.0.1"
    port: int = 23333
    keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    max_queue: int = 256
    max_body: int = 4 * 2**20
    request_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    stall_s: float = 4.0
    keep_alive_s: float = 15.0
    session_idle_s: float = 3600.0
    origins: tuple[str, ...] = ()
    literal_content: bool = False
    log_level: str = "info"
    supervised: bool = False

    @property
    def loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def keys(
    file: Path | None, variable: str, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """The keys of a file, one a line (# begins a comment), or of an environment variable, with
    commas between them. Raises UserError."""
    where = f"{file}" if file else variable
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                Problem(where, f"cannot be read ({error})", "a text file with a key a line")
            ) from error
    else:
        lines = environment.get(variable, "").split(",")
    allowed = tuple(
        line.strip() for line in lines if line.strip() and not line.strip().startswith("#")
    )
    if file is not None and not allowed:
        raise UserError(Problem(where, "no key", "at least one, a line each"))
    if any(len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() for key in allowed):
        hint = 'python -c "import secrets; print(secrets.token_urlsafe())" makes one'
        raise UserError(
            Problem(
                where,
                "a key that is short, or not plain ASCII",
                f"keys of at least {LEAST_KEY} ASCII characters",
                hint,
            )
        )
    return allowed
