"""Every setting of the gateway: its default, its range and what it is for; `app.environment` reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, PrivateAttr, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.secret_files import check_secret, read_secret_file, read_webhook_secret
from app.shared.address import RedisAddress, parse_redis_url
from app.urls import check_key_url, check_origin, check_proxies, check_webhook_url, is_host
from serve_app.serve_config import FAULT_ENGINE, STUB_ENGINES, EngineName

PREFIX = "GATEWAY_"
MAX_RATE_LIMIT = 1_000_000_000
MIN_STICKY_KEY_BYTES, MAX_STICKY_KEY_BYTES = 16, 64  # of BLAKE2b, the longest is its own


_TOKEN = re.compile(rb"[\x21-\x7e]+")

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]


class ConfigError(Exception):
    """The settings do not make sense; the message is one plain line, safe to print."""


class Settings(BaseSettings):
    """Settings of the gateway, from the environment and a `.env` file in the working folder."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="ignore", frozen=True, populate_by_name=True, hide_input_in_errors=True
    )

    registry_path: Path = Field(
        Path("models/"),
        validation_alias=AliasChoices("MODEL_REGISTRY_PATH", "registry_path"),
        description="Folder of the model registry.",
    )
    registry_key_file: Path | None = Field(
        None,
        description="Public key; only versions signed with its pair are served. Empty: signatures are not asked for.",
    )
    ray_address: str | None = Field(
        None,
        validation_alias=AliasChoices("RAY_ADDRESS", "ray_address"),
        description="Ray cluster to join: host:6379 or auto. Empty: no Ray, legacy answers.",
    )
    ray_auth_token_path: Path | None = Field(
        None,
        validation_alias=AliasChoices("RAY_AUTH_TOKEN_PATH", "ray_auth_token_path"),
        description="File of the cluster's authentication token. Empty: the cluster asks for none.",
    )
    ray_dashboard_url: str = Field(
        "http://127.0.0.1:8265", description="Dashboard of the cluster; `sluice deploy` puts its configuration there."
    )
    multiproc_dir: Path | None = Field(
        None,
        validation_alias=AliasChoices("PROMETHEUS_MULTIPROC_DIR", "multiproc_dir"),
        description="Existing folder in which several workers add up their metrics. Empty: one worker.",
    )

    host: str = Field("127.0.0.1", description="Address to listen on.", min_length=1)
    port: int = Field(8000, description="Port to listen on; 0 takes a free one.", ge=0, le=65535)
    workers: int = Field(1, description="Gateway processes. More than one needs Redis.", ge=1, le=64)
    trusted_proxies: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(), description="Addresses or networks of proxies whose X-Forwarded-For is believed, by commas."
    )
    allowed_hosts: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(), description="Names in the Host header that are answered, by commas, no ports. Empty: any name."
    )
    cors_origins: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(), description="Origins (https://desk.example) whose pages may call, by commas. Empty: none."
    )
    behind_tls: bool = Field(False, description="Clients come by TLS, which ends before us: browsers are told to.")
    start_patience_ms: int = Field(
        0,
        description="Before listening, wait so long for every arm to be ready: for one gateway of several.",
        ge=0,
        le=60_000,
    )
    drain_notice_ms: int = Field(
        5000, description="After SIGTERM: not ready, but still answering, for so many ms.", ge=0, le=60_000
    )
    docs: bool = Field(True, description="Serve /docs and /openapi.json.")
    metrics_public: bool = Field(False, description="Serve /metrics without a token.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    access_log: bool = Field(True, description="Log one line per request.")

    jwt_secret: SecretStr | None = Field(None, description="Secret of the HS256 tokens, at least 32 random bytes.")
    jwt_secret_file: Path | None = Field(None, description="File that holds it instead, mode 0600.")
    jwt_jwks_file: Path | None = Field(
        None, description="Public keys of another token issuer (a JWKS document), read again when it changes."
    )
    jwt_jwks_url: str | None = Field(
        None, description="Where that issuer publishes them instead: https, or http on this machine."
    )
    jwt_jwks_ca_file: Path | None = Field(
        None, description="Certificates, PEM, of which one must have signed the URL's. Empty: the public ones."
    )
    jwt_jwks_refresh_s: float = Field(300, description="Longest time between two fetches of the URL.", ge=1, le=86_400)
    jwt_jwks_max_age_s: float = Field(
        86_400,
        description="Keys of an URL that has given none for so long count no longer: as long as a token may live.",
        ge=60,
        le=2_592_000,
    )
    jwt_denied_file: Path | None = Field(
        None, description="Tokens to refuse before they end, a line each with its `jti`. Read again when it changes."
    )
    _file_secret: bytes | None = PrivateAttr(None)
    jwt_issuer: str = Field("sluice", description="The only `iss` a token may have.", min_length=1, max_length=255)
    jwt_audience: str = Field("sluice", description="The only `aud` a token may have.", min_length=1, max_length=255)

    redis_url: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("REDIS_URL", "redis_url"),
        description="Redis that workers and gateways share: redis://, rediss:// (TLS) or unix://. Empty: none.",
    )
    redis_password_file: Path | None = Field(
        None, description="File of its password, mode 0600, read again for each connection. Empty: the URL's, if any."
    )
    redis_ca_file: Path | None = Field(
        None, description="Certificates, PEM, of which one must have signed that of rediss://. Empty: the public ones."
    )
    instances: int = Field(
        1, description="Gateways that share the Redis: while it is away, each admits its part of a limit.", ge=1, le=256
    )

    api_keys_file: Path | None = Field(
        None, description="Table of API keys (`sluice key`). Empty: api_keys.json in the state folder."
    )
    api_key_pepper_file: Path | None = Field(
        None, description="Secret of their hashes, mode 0600, made with the first key. Empty: beside the table."
    )
    auth_failures_per_min: int = Field(
        10, description="Invalid credentials per minute and address that are told 401, the others 429.", ge=1, le=10_000
    )

    rate_limit: int = Field(60_000, description="Windows per minute and principal.", ge=1, le=MAX_RATE_LIMIT)
    rate_limits: Annotated[dict[str, int], NoDecode] = Field(
        {},
        description='Other limits of single accounts, as JSON: {"tenant:fund-a": 600000, "sub:ann": 600}. Empty: none.',
        max_length=1000,
    )
    ops_rate_limit: int = Field(
        6000, description="Other requests with a token, per minute and principal.", ge=1, le=MAX_RATE_LIMIT
    )
    max_concurrent: int = Field(
        256, description="Predictions of one principal under way at a time in this gateway.", ge=1, le=100_000
    )
    max_body_bytes: int = Field(1 << 20, description="Largest request body, in bytes.", ge=1024, le=64 << 20)
    max_timeout_ms: int = Field(2000, description="Longest deadline, and the default, in ms.", ge=1, le=60_000)
    max_wait_ms: int = Field(
        500,
        description="Longest wait for the model; who expects a longer one is told 503. A quick model's wait less.",
        ge=1,
        le=60_000,
    )
    route_key_subjects: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(),
        description="Who may choose their arm's key by X-Route-Key: subjects, or TENANT/SUBJECT, by commas.",
    )

    ray_serve_fraction: float = Field(1.0, description="Share of Ray Serve at the very first start.", ge=0, le=1)
    legacy: Literal["in_process", "remote", "off"] = Field(
        "in_process", description="The old path: in this process, a service of its own (remote), or off."
    )
    legacy_url: str | None = Field(
        None, description="Scheme, host and port of the remote legacy service: http://old.example:8000."
    )
    legacy_path: Annotated[str, Field(pattern=r"^/[A-Za-z0-9_./~-]{0,254}$")] = Field(
        "/ray-serve/predict", description="Path of its prediction route."
    )
    legacy_token_file: Path | None = Field(
        None, description="File of the bearer token it asks for, mode 0600, read again when it changes. Empty: none."
    )
    legacy_ca_file: Path | None = Field(
        None, description="Certificates, PEM, of which one must have signed its own. Empty: the public ones."
    )
    state_dir: Path = Field(Path(".run/state"), description="Folder of what must outlive a restart.")
    sticky_key: SecretStr | None = Field(
        None,
        description="Key that keeps callers on their arm, 16 to 64 bytes. Empty: a random one in the state folder.",
    )

    experiment_days: float = Field(
        14, description="Days for which an experiment's assignments are kept, in the state folder.", gt=0, le=366
    )
    experiment_mb: int = Field(
        64, description="Most megabytes of them; beyond, the oldest requests are dropped.", ge=4, le=4096
    )

    webhook_url: str | None = Field(
        None,
        description="Where every change of the rollout and of the kill switch is told: http or https. Empty: none.",
    )
    webhook_secret_file: Path | None = Field(
        None,
        description="File of the secret that signs what is told, whsec_ and base64, mode 0600, read again when it "
        "changes.",
    )

    model: Name = Field("cnn_lstm", description="Model that legacy serves.")
    model_version: Name = Field("latest", description="Its version or alias.")
    engine: EngineName = Field(
        "torch",
        description="Engine of legacy; auto takes the quickest that is installed, noop and sleep have no model.",
    )
    exact: bool = Field(
        False, description="Answer bits that do not depend on what else is in a batch: dearer for large batches."
    )
    engine_threads: int = Field(1, description="Threads of legacy's engine.", ge=1, le=256)
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = Field("cpu", description="Device of legacy.")
    model_cache_size: int = Field(3, description="Most versions that legacy keeps in memory.", ge=1, le=64)
    model_cache_ttl_s: float = Field(
        3600, description="Seconds without a call after which legacy lets a version without alias go.", ge=1, le=604800
    )

    prod: bool = Field(
        False,
        validation_alias=AliasChoices("PROD", "prod"),
        description="Refuse whatever is there for tests and measurements alone.",
    )
    fault_file: Path | None = Field(
        None, description="What the engine faulty is told by, which fails on purpose. Empty: there are no faults."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any, info: Any) -> Any:
        """An empty variable means the default, as `KEY=` in a `.env` file is meant."""
        if value == "":
            return cls.model_fields[info.field_name].default
        return value

    @field_validator("route_key_subjects", "trusted_proxies", "allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            return frozenset(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _check_trusted_proxies(cls, value: frozenset[str]) -> frozenset[str]:
        check_proxies(value)
        return value

    @field_validator("rate_limits", mode="before")
    @classmethod
    def _parse_rate_limits(cls, value: Any) -> Any:
        if not isinstance(value, str) or not value:
            return value
        try:
            return json.loads(value, object_pairs_hook=_without_twins)
        except (ValueError, RecursionError):
            raise ValueError("must be a JSON object that names no account twice") from None

    @field_validator("rate_limits")
    @classmethod
    def _check_rate_limits(cls, value: dict[str, int]) -> dict[str, int]:
        for account, limit in value.items():
            kind, _, name = account.partition(":")
            if kind not in {"tenant", "sub"} or not 1 <= len(name) <= 255 or not name.isprintable():
                raise ValueError("must name accounts as tenant:NAME, or sub:NAME for who has no tenant")
            if not 1 <= limit <= MAX_RATE_LIMIT:
                raise ValueError(f"must be limits from 1 to {MAX_RATE_LIMIT} windows per minute")
        return value

    @field_validator("allowed_hosts")
    @classmethod
    def _check_allowed_hosts(cls, value: frozenset[str]) -> frozenset[str]:
        if not all(is_host(host.strip("[]")) for host in value):
            raise ValueError("must be names or addresses in lower case, without ports")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _check_cors_origins(cls, value: frozenset[str]) -> frozenset[str]:
        for origin in value:
            if check_origin(origin) != origin:
                raise ValueError("must end with the host or its port")  # a browser writes no slash behind it
        return value

    @field_validator("legacy_url")
    @classmethod
    def _check_legacy_url(cls, value: str | None) -> str | None:
        return value if value is None else check_origin(value)

    @field_validator("legacy_token_file")
    @classmethod
    def _check_legacy_token_file(cls, value: Path | None) -> Path | None:
        if value is not None and not _TOKEN.fullmatch(read_secret_file(value)):
            raise ValueError(f"the file {value} must hold one token: visible ASCII characters and nothing else")
        return value

    @field_validator("webhook_url")
    @classmethod
    def _check_webhook_url(cls, value: str | None) -> str | None:
        return value if value is None else check_webhook_url(value)

    @field_validator("webhook_secret_file")
    @classmethod
    def _check_webhook_secret_file(cls, value: Path | None) -> Path | None:
        if value is not None:
            read_webhook_secret(read_secret_file(value))
        return value

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            parse_redis_url(value.get_secret_value())
        return value

    @field_validator("redis_password_file")
    @classmethod
    def _check_redis_password_file(cls, value: Path | None) -> Path | None:
        if value is not None and not read_secret_file(value):
            raise ValueError(f"the file {value} is empty")
        return value

    @field_validator("ray_address")
    @classmethod
    def _check_ray_address(cls, value: str | None) -> str | None:
        if value is None or value == "auto":
            return value
        if value.startswith("ray://"):
            raise ValueError("ray:// cannot carry Ray Serve's calls; give host:6379 of the cluster's head, or auto")
        host, _, port = value.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError("must be host:port of the cluster's head, or auto")
        return value

    @field_validator("multiproc_dir")
    @classmethod
    def _check_multiproc_dir(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError("must be an existing folder")
        return value

    @field_validator("jwt_secret")
    @classmethod
    def _check_jwt_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_secret(value.get_secret_value().encode(), "the token secret")
        return value

    @field_validator("jwt_jwks_url")
    @classmethod
    def _check_jwks_url(cls, value: str | None) -> str | None:
        return value if value is None else check_key_url(value)

    @field_validator("sticky_key")
    @classmethod
    def _check_sticky_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return value
        if not MIN_STICKY_KEY_BYTES <= len(value.get_secret_value().encode()) <= MAX_STICKY_KEY_BYTES:
            raise ValueError(f"must have {MIN_STICKY_KEY_BYTES} to {MAX_STICKY_KEY_BYTES} bytes")
        return value

    @model_validator(mode="after")
    def _check_secret_file(self) -> Settings:
        if self.jwt_secret_file is None:
            return self
        if self.jwt_secret is not None:
            raise ValueError("GATEWAY_JWT_SECRET and GATEWAY_JWT_SECRET_FILE are both set; keep one")
        self._file_secret = read_secret_file(self.jwt_secret_file)
        check_secret(self._file_secret, f"the token secret in {self.jwt_secret_file}")
        return self

    @model_validator(mode="after")
    def _check_key_source(self) -> Settings:
        """Whoever signs with a public key's bytes as a secret must find no verifier that takes both."""
        if self.jwt_jwks_file is None and self.jwt_jwks_url is None:
            return self
        if self.jwt_jwks_file is not None and self.jwt_jwks_url is not None:
            raise ValueError("GATEWAY_JWT_JWKS_FILE and GATEWAY_JWT_JWKS_URL are both set; keep one")
        if self.jwt_jwks_max_age_s < self.jwt_jwks_refresh_s:
            raise ValueError("GATEWAY_JWT_JWKS_MAX_AGE_S must not be less than GATEWAY_JWT_JWKS_REFRESH_S")
        if self.jwt_secret is not None or self.jwt_secret_file is not None:
            raise ValueError("tokens are judged by public keys or by a secret, never both: unset GATEWAY_JWT_SECRET…")
        return self

    @model_validator(mode="after")
    def _check_sticky_secret(self) -> Settings:
        """Who has learnt the one key must not be able to use it as the other."""
        secret = self._file_secret if self.jwt_secret is None else self.jwt_secret.get_secret_value().encode()
        if self.sticky_key is not None and self.sticky_key.get_secret_value().encode() == secret:
            raise ValueError("GATEWAY_STICKY_KEY must be another secret than that of the tokens")
        return self

    @model_validator(mode="after")
    def _check_url_of_files(self) -> Settings:
        """What goes with an URL that is not there was meant to protect something."""
        for url, field in (
            ("jwt_jwks_url", "jwt_jwks_ca_file"),
            ("redis_url", "redis_ca_file"),
            ("redis_url", "redis_password_file"),
            ("webhook_url", "webhook_secret_file"),
        ):
            if getattr(self, url) is None and getattr(self, field) is not None:
                raise ValueError(f"{variable_of(field)} goes with {variable_of(url)}, which is not set")
        return self

    @model_validator(mode="after")
    def _check_webhook(self) -> Settings:
        if self.webhook_url is not None and self.webhook_secret_file is None:
            raise ValueError("GATEWAY_WEBHOOK_URL needs GATEWAY_WEBHOOK_SECRET_FILE: what is told there is signed")
        return self

    @model_validator(mode="after")
    def _check_legacy(self) -> Settings:
        if self.legacy == "remote" and self.legacy_url is None:
            raise ValueError("GATEWAY_LEGACY=remote needs GATEWAY_LEGACY_URL: scheme, host and port of the service")
        return self

    @model_validator(mode="after")
    def _check_redis(self) -> Settings:
        address = self.redis_address()
        if address is None:
            for field in ("workers", "instances"):
                if getattr(self, field) > 1:
                    raise ValueError(
                        f"{variable_of(field)}: more than one needs Redis for limits and state: set REDIS_URL"
                    )
            return self
        if address.password is not None and self.redis_password_file is not None:
            raise ValueError("REDIS_URL holds a password and GATEWAY_REDIS_PASSWORD_FILE is set; keep one")
        if self.redis_ca_file is not None and (address.scheme != "rediss" or not self.redis_ca_file.is_file()):
            raise ValueError("GATEWAY_REDIS_CA_FILE must be a file, and goes with rediss://")
        if self.instances > 1 and self.sticky_key is None:
            raise ValueError("several gateways must know a caller by one name: set one GATEWAY_STICKY_KEY for all")
        return self

    @model_validator(mode="after")
    def _check_faults(self) -> Settings:
        if self.prod and (self.engine in STUB_ENGINES or self.fault_file is not None):
            raise ValueError(
                f"with PROD=1 there is none of the engines {', '.join(STUB_ENGINES)}, and no GATEWAY_FAULT_FILE"
            )
        if self.engine == FAULT_ENGINE and self.fault_file is None:
            raise ValueError(f"GATEWAY_ENGINE={FAULT_ENGINE} needs GATEWAY_FAULT_FILE")
        return self

    def with_overrides(self, **values: Any) -> Settings:
        """These settings with some fields replaced, checked anew. Raises `ConfigError`."""
        try:
            return type(self).model_validate({**self.model_dump(), **values})
        except ValidationError as error:
            raise ConfigError(one_line(error)) from None

    def redis_address(self) -> RedisAddress | None:
        """The shared Redis, None where there is none."""
        return None if self.redis_url is None else parse_redis_url(self.redis_url.get_secret_value())

    def ray_auth_token(self) -> str | None:
        """The cluster's token, None where it asks for none. Raises `ConfigError` where its file cannot be read."""
        if self.ray_auth_token_path is None:
            return None
        try:
            return read_secret_file(self.ray_auth_token_path).decode("ascii")
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def judges_by_public_keys(self) -> bool:
        """Whether another issuer signs the tokens, so that no secret here does."""
        return self.jwt_jwks_file is not None or self.jwt_jwks_url is not None

    def api_key_paths(self) -> tuple[Path, Path]:
        """The table of API keys and the pepper of their hashes."""
        table = self.api_keys_file or self.state_dir / "api_keys.json"
        return table, self.api_key_pepper_file or table.with_name("api_keys.pepper")

    def signing_secret(self) -> bytes:
        """The secret of HS256 tokens.

        That of a file is the one that was read and checked with the settings: all workers judge by the same one, and a
        file that has gone bad since harms nobody.

        Raises:
            ConfigError: None is set.
        """
        if self.jwt_secret is not None:
            return self.jwt_secret.get_secret_value().encode()
        if self.judges_by_public_keys:
            raise ConfigError("tokens come from the issuer whose keys GATEWAY_JWT_JWKS_… names; none are made here")
        if self._file_secret is None:
            raise ConfigError(
                "no token secret: set GATEWAY_JWT_SECRET_FILE to a file of at least 32 random bytes, mode 0600"
            )
        return self._file_secret


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def variable_of(field: str) -> str:
    """The environment variable of a field of `Settings`."""
    alias = Settings.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return str(alias.choices[0])
    return f"{PREFIX}{field.upper()}"


def one_line(error: ValidationError) -> str:
    """What is wrong, by the names that the operator knows, without the values: secrets may be among them."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(_fault(fault["loc"], fault["msg"]) for fault in faults)


def _fault(loc: tuple[int | str, ...], message: str) -> str:
    text = " ".join(message.removeprefix("Value error, ").split())
    if not loc:
        return text
    name = str(loc[0])
    return f"{variable_of(name) if name in Settings.model_fields else name}: {text}"
