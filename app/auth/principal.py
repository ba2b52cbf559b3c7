"""Who asks, and what may be said of them: the values that tokens, API keys and their makers agree on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

SCOPES = ("predict", "ops", "admin", "features")
MAX_NAME_CHARS = 255
MAX_MODELS = 64

_MAX_SCOPES_CHARS = 1024
_SCOPES = re.compile(r"[a-z][a-z0-9:._-]{0,63}( [a-z][a-z0-9:._-]{0,63})*", re.ASCII)
_MODEL = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}", re.ASCII)


Identity = tuple[str | None, str]  # tenant and subject


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks.

    Attributes:
        subject: The token's `sub`, or the name that an API key was made for.
        tenant: Whom the subject works for; limits are shared by a tenant.
        scopes: What the credential allows: `predict`, `ops`, `admin`, `features`.
        models: The only models it may use; None for every model.
    """

    subject: str
    tenant: str | None = None
    scopes: frozenset[str] = frozenset()
    models: frozenset[str] | None = None

    @property
    def account(self) -> str:
        """Whose quota this request spends; a tenant and a subject of one name stay apart."""
        return f"tenant:{self.tenant}" if self.tenant else f"sub:{self.subject}"

    @property
    def accounts(self) -> tuple[str, ...]:
        """What a share of its own may be set for, the closer first: the subject, and its tenant where it has one."""
        if self.tenant is None:
            return (f"sub:{self.subject}",)
        return (f"sub:{self.tenant}/{self.subject}", f"tenant:{self.tenant}")

    @property
    def full_name(self) -> str:
        """Of whom a record tells: the subject, of a tenant where it has one, as `read_identity` reads it."""
        if self.tenant is None:
            return f"/{self.subject}" if "/" in self.subject else self.subject
        return f"{self.tenant}/{self.subject}"

    @property
    def identity(self) -> Identity:
        """Tenant and subject: subjects of one name and two tenants are two."""
        return self.tenant, self.subject

    def key_of(self, chosen: str) -> str:
        """A key that the principal chose for itself, kept apart from those that other tenants choose.

        Args:
            chosen: Visible characters; as they are for who has no tenant.
        """
        return chosen if self.tenant is None else "\n".join((self.tenant, self.subject, chosen))

    def may_use(self, model: str) -> bool:
        """Whether the credential's list of models, where it has one, names this model."""
        return self.models is None or model in self.models


class Verifier(Protocol):
    """Tells who a bearer credential belongs to."""

    def verify(self, credential: str) -> Principal:
        """The principal of a credential.

        Raises:
            Unauthenticated: It does not count, for whatever reason.
            IdentityUnavailable: It cannot be judged now.
        """


def read_identity(text: str) -> Identity:
    """Tenant and subject of `TENANT/SUBJECT`; `SUBJECT`, or `/SUBJECT` where that holds a slash, has no tenant."""
    if "/" not in text:
        return None, text
    tenant, _, subject = text.partition("/")
    return tenant or None, subject


def read_name(value: Any) -> str:
    """A subject, a tenant or an id. Raises `ValueError` for what is no text of 1 to 255 printable characters."""
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME_CHARS or not value.isprintable():
        raise ValueError(f"a name must have 1 to {MAX_NAME_CHARS} printable characters")
    return value


def read_optional_name(value: Any) -> str | None:
    """A name, or None where there is none. Raises `ValueError`."""
    return None if value is None else read_name(value)


def read_scopes(value: Any) -> frozenset[str]:
    """The scopes of a text of lower-case words with one space between them. Raises `ValueError`."""
    if not isinstance(value, str) or len(value) > _MAX_SCOPES_CHARS or not (value == "" or _SCOPES.fullmatch(value)):
        raise ValueError("scopes must be lower-case words")
    return frozenset(value.split())


def read_models(value: Any) -> frozenset[str]:
    """The models of a list of their names; an empty one allows none.

    Raises:
        ValueError: It is no list, holds more than 64 entries or one that is no model's name.
    """
    if not isinstance(value, list) or len(value) > MAX_MODELS:
        raise ValueError(f"models must be a list of at most {MAX_MODELS} names")
    if not all(isinstance(name, str) and _MODEL.fullmatch(name) for name in value):
        raise ValueError("a model's name has 1 to 64 lower-case letters, digits, dots, hyphens and underscores")
    return frozenset(value)
