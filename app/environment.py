"""The only reader of the environment: what it says becomes `Settings`, and secrets are taken out of it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from dotenv import dotenv_values
from pydantic import ValidationError

from app.settings import PREFIX, ConfigError, Settings, one_line, variable_of


def load_settings(env_file: str | Path | None = ".env") -> Settings:
    """Read the settings, and leave in the environment what child processes and libraries shall see: no secrets.

    Args:
        env_file: File of KEY=value lines that is read too where it exists; the environment wins over it.

    Raises:
        ConfigError: A value is wrong or a name unknown.
    """
    in_file = dotenv_values(env_file) if env_file is not None and Path(env_file).is_file() else {}
    _refuse_unknown([*in_file, *os.environ])
    try:
        settings = Settings(_env_file=env_file)  # type: ignore[call-arg]  # pydantic-settings' own parameter
    except ValidationError as error:
        raise ConfigError(one_line(error)) from None  # the cause would carry the values, secrets among them
    except OSError as error:
        raise ConfigError(f"cannot read {env_file}: {error.strerror}") from error
    for field in ("jwt_secret", "sticky_key", "redis_url"):
        _forget(variable_of(field))
    for field in ("ray_auth_token_path", "multiproc_dir"):
        _export(variable_of(field), getattr(settings, field))
    return settings


def _forget(name: str) -> None:
    """Take a secret out of the environment, and out of the copy of it that /proc shows for as long as we run."""
    value = os.environ.get(name)
    if value is None:
        return
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    if address := libc.getenv(name.encode()):
        ctypes.memset(address, ord("x"), len(os.fsencode(value)))
    del os.environ[name]


def _export(name: str, path: Path | None) -> None:
    """Let libraries that read the environment themselves see what we read: of a `.env` file, and nothing for empty."""
    if path is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = str(path)


def _refuse_unknown(names: Iterable[str]) -> None:
    known = {variable_of(field) for field in Settings.model_fields}
    for name in sorted(names):
        if name.startswith(PREFIX) and name not in known:
            similar = get_close_matches(name, known, n=1)
            raise ConfigError(f"unknown setting {name}" + (f"; did you mean {similar[0]}?" if similar else ""))
