from __future__ import annotations

import json
import os
import pickle
import re
import secrets
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from app.environment import load_settings
from app.settings import ConfigError, Settings, variable_of

EXAMPLE = Path(__file__).parents[2] / ".env.example"
GOOD_SECRET = "pR8-vQ2mZxT5nK0bLw7yHdJ4sGfA9cUeE1iN6oXr3tVq"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for field in Settings.model_fields:
        monkeypatch.setenv(variable_of(field), "")  # so that what a test puts there is taken out again
        monkeypatch.delenv(variable_of(field))
    monkeypatch.chdir(tmp_path)


def example_values() -> dict[str, str]:
    lines = EXAMPLE.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if re.match(r"[A-Z_]+=", line))


def test_the_example_file_names_every_setting_and_no_other() -> None:
    assert set(example_values()) == {variable_of(field) for field in Settings.model_fields}


def test_what_libraries_read_themselves_reaches_them_from_the_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"RAY_AUTH_TOKEN_PATH=token\nPROMETHEUS_MULTIPROC_DIR={tmp_path}\n")
    load_settings()
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == "token"
    assert os.environ["PROMETHEUS_MULTIPROC_DIR"] == str(tmp_path)


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN_PATH", "PROMETHEUS_MULTIPROC_DIR"])
def test_an_empty_path_is_unset_for_libraries_too(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")  # Ray would ask for a token then, and the metrics library write into the folder
    load_settings()
    assert name not in os.environ


def test_the_example_file_gives_the_defaults(tmp_path: Path) -> None:
    without_file = load_settings(None)
    assert load_settings(EXAMPLE) == without_file
    for field in Settings.model_fields:
        text, default = example_values()[variable_of(field)], getattr(without_file, field)
        assert (text == "") == (default in (None, frozenset(), {})), (
            f"{field} in .env.example does not show its default"
        )


def test_every_setting_says_what_it_is_for() -> None:
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("RAY_ADDRESS", "ray://head:10001", "host:6379"),
        ("RAY_ADDRESS", "head", "host:port"),
        ("RAY_ADDRESS", "head:99999", "host:port"),
        ("GATEWAY_WORKERS", "2", "Redis"),
        ("GATEWAY_PORT", "eighty", "integer"),
        ("GATEWAY_PORT", "70000", "65535"),
        ("GATEWAY_LEGACY_URL", "ftp://old:21", "http://"),
        ("GATEWAY_LEGACY_URL", "old:8000", "http://"),
        ("GATEWAY_LEGACY_URL", "http://", "name a host"),
        ("GATEWAY_LEGACY_URL", "http://old service:8000", "name a host"),
        ("GATEWAY_LEGACY_URL", "http://user:secret@old:8000", "no user"),
        ("GATEWAY_LEGACY_URL", "http://old:8000/predict", "the path has its own setting"),
        ("GATEWAY_LEGACY_URL", "http://old:8000?to=elsewhere", "the path has its own setting"),
        ("GATEWAY_LEGACY_URL", "http://old:99999", "scheme, host and port"),
        ("GATEWAY_LEGACY_URL", "http://old:0", "a port"),
        ("GATEWAY_LEGACY_PATH", "predict", "pattern"),
        ("GATEWAY_LEGACY_PATH", "/predict?x=1", "pattern"),
        ("GATEWAY_LEGACY_TOKEN_FILE", "/nowhere/at/all", "cannot read"),
        ("GATEWAY_LEGACY", "maybe", "in_process"),
        ("GATEWAY_RAY_SERVE_FRACTION", "1.5", "less than or equal to 1"),
        ("GATEWAY_RAY_SERVE_FRACTION", "nan", ""),
        ("GATEWAY_MODEL", "../etc", "pattern"),
        ("GATEWAY_ENGINE", "magic", "noop"),
        ("GATEWAY_STICKY_KEY", "short", "16 to 64"),
        ("PROMETHEUS_MULTIPROC_DIR", "/nowhere/at/all", "existing folder"),
    ],
)
def test_a_wrong_value_gives_one_line_that_names_the_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, hint: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert hint in message
    assert "\n" not in message


def test_a_misspelt_setting_is_refused_with_the_right_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_RATELIMIT", "5")
    with pytest.raises(ConfigError, match=r"unknown setting GATEWAY_RATELIMIT; did you mean GATEWAY_RATE_LIMIT\?"):
        load_settings()


def test_a_misspelt_setting_in_the_file_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("GATEWAY_HOTS=0.0.0.0\n")
    with pytest.raises(ConfigError, match="GATEWAY_HOTS"):
        load_settings()


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("GATEWAY_PORT=9001\nGATEWAY_HOST=::1\n")
    monkeypatch.setenv("GATEWAY_PORT", "9002")
    settings = load_settings()
    assert (settings.port, settings.host) == (9002, "::1")


@pytest.mark.parametrize(
    "secret",
    [
        "hunter2",
        "a" * 64,
        "0123456789" * 5,
        "abcabcabcabcabcabcabcabcabcabcabcabc",
        "change-me-change-me-change-me-change-me!",
        "Your-Secret-Key-Your-Secret-Key-1234567890",
        "MySuperPassword-8372-xkQ-zzy-1138-TTw",
        "please-change-this-before-production-42",
        "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE",
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJx8Qp4mVn3rT7yZ",
        GOOD_SECRET[:31],
    ],
)
def test_a_weak_secret_is_refused_and_not_printed(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv("GATEWAY_JWT_SECRET", secret)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert secret not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_weak_secret_is_not_printed_by_the_validation_either() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(_env_file=None, jwt_secret="hunter2-hunter2")
    assert "hunter2" not in str(caught.value)


def test_secrets_are_shown_nowhere_and_leave_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_JWT_SECRET", GOOD_SECRET)
    monkeypatch.setenv("GATEWAY_STICKY_KEY", "sixteen bytes or more")
    settings = load_settings()
    assert settings.signing_secret() == GOOD_SECRET.encode()
    assert GOOD_SECRET not in f"{settings!r} {settings} {settings.model_dump_json()}"
    assert not {"GATEWAY_JWT_SECRET", "GATEWAY_STICKY_KEY"} & set(os.environ)


def test_the_secret_may_stand_in_a_file_of_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    file.write_text(GOOD_SECRET + "\n")
    file.chmod(0o600)
    monkeypatch.setenv("GATEWAY_JWT_SECRET_FILE", str(file))
    assert load_settings().signing_secret() == GOOD_SECRET.encode()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622, 0o777])
def test_a_secret_file_that_others_may_open_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    file = tmp_path / "secret"
    file.write_text(GOOD_SECRET)
    file.chmod(mode)
    monkeypatch.setenv("GATEWAY_JWT_SECRET_FILE", str(file))
    with pytest.raises(ConfigError, match="chmod 600"):
        load_settings()


def test_a_missing_secret_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_JWT_SECRET_FILE", "/nowhere/secret")
    with pytest.raises(ConfigError, match="cannot read the secret file"):
        load_settings()


def owned(file: Path, content: str) -> Path:
    """A new file in the place of `file`, as a rotation puts it there, for its owner alone."""
    fresh = file.with_suffix(".new")
    fresh.write_text(content)
    fresh.chmod(0o600)
    return fresh.rename(file)


@pytest.mark.parametrize("content", ["", "two words", "two\nlines", "tökén"])
def test_a_token_file_that_holds_no_token_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setenv("GATEWAY_LEGACY_TOKEN_FILE", str(owned(tmp_path / "token", content)))
    with pytest.raises(ConfigError, match="must hold one token"):
        load_settings()


def test_a_remote_legacy_needs_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_LEGACY", "remote")
    with pytest.raises(ConfigError, match="GATEWAY_LEGACY_URL"):
        load_settings()


@pytest.mark.parametrize(
    "url", ["http://old.example", "https://old.example:8443/", "http://[::1]:8000", "http://10.0.0.7:80"]
)
def test_scheme_host_and_port_make_a_url(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("GATEWAY_LEGACY", "remote")
    monkeypatch.setenv("GATEWAY_LEGACY_URL", url)
    assert load_settings().legacy_url == url.rstrip("/")


def test_two_secrets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_JWT_SECRET_FILE", str(tmp_path / "secret"))
    monkeypatch.setenv("GATEWAY_JWT_SECRET", GOOD_SECRET)
    with pytest.raises(ConfigError, match="keep one"):
        load_settings()


def test_no_secret_has_a_default() -> None:
    with pytest.raises(ConfigError, match="no token secret"):
        load_settings().signing_secret()


def test_an_override_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    settings = load_settings()
    assert settings.with_overrides(ray_address="head:6379").ray_address == "head:6379"
    assert settings.with_overrides(port=1).ray_address == "auto"


def test_an_override_is_checked_and_keeps_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_JWT_SECRET", GOOD_SECRET)
    settings = load_settings()
    assert settings.with_overrides(port=1).jwt_secret == SecretStr(GOOD_SECRET)
    with pytest.raises(ConfigError, match="GATEWAY_PORT"):
        settings.with_overrides(port=-1)


def test_subjects_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_ROUTE_KEY_SUBJECTS", "gateway-a, gateway-b,")
    assert load_settings().route_key_subjects == {"gateway-a", "gateway-b"}


@pytest.mark.parametrize("limits", [{}, {"tenant:fund, a=b": 1, "sub:ann": 1_000_000_000, "sub:tenant:x": 5}])
def test_single_accounts_may_have_limits_of_their_own(monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]) -> None:
    monkeypatch.setenv("GATEWAY_RATE_LIMITS", json.dumps(limits))
    assert load_settings().rate_limits == limits


@pytest.mark.parametrize(
    "text",
    [
        *(
            "x",
            "[]",
            "1",
            "null",
            "[" * 100_000,
            '{"sub:a": 1, "sub:a": 2}',
            '{"ann": 5}',
            '{"sub:": 5}',
            '{"Sub:a": 5}',
        ),
        *(
            '{"sub:a": 0}',
            '{"sub:a": -1}',
            '{"sub:a": 1.5}',
            '{"sub:a": NaN}',
            '{"sub:a": 1000000001}',
            '{"sub:a": null}',
        ),
        *('{"sub:a\\n": 5}', '{"sub:%s": 5}' % ("x" * 256), json.dumps({f"sub:{i}": 1 for i in range(1001)})),
    ],
)
def test_a_table_of_limits_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("GATEWAY_RATE_LIMITS", text)
    with pytest.raises(ConfigError, match="GATEWAY_RATE_LIMITS"):
        load_settings()


def test_what_fails_on_purpose_needs_its_file_and_is_refused_in_production(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_ENGINE", "faulty")
    with pytest.raises(ConfigError, match="needs GATEWAY_FAULT_FILE"):
        load_settings()
    monkeypatch.setenv("GATEWAY_FAULT_FILE", "fault.json")
    assert load_settings().engine == "faulty"
    monkeypatch.setenv("PROD", "1")
    with pytest.raises(ConfigError, match="PROD=1"):
        load_settings()
    monkeypatch.setenv("GATEWAY_ENGINE", "torch")
    with pytest.raises(ConfigError, match="PROD=1"):
        load_settings()


@pytest.mark.parametrize(
    "url",
    [
        "https://issuer.example/.well-known/jwks.json",
        "https://issuer.example:8443/keys?tenant=1",
        "http://127.0.0.1:8080/keys",
        "http://localhost/keys",
        "http://[::1]:8080/keys",
    ],
)
def test_keys_may_come_by_https_and_from_this_machine(url: str) -> None:
    assert Settings(_env_file=None, jwt_jwks_url=url).judges_by_public_keys


def test_keys_of_an_url_may_not_end_before_they_are_fetched_again() -> None:
    url = "https://issuer.example/keys"
    assert Settings(_env_file=None, jwt_jwks_url=url, jwt_jwks_max_age_s=300).jwt_jwks_max_age_s == 300
    with pytest.raises(ValidationError, match="GATEWAY_JWT_JWKS_MAX_AGE_S"):
        Settings(_env_file=None, jwt_jwks_url=url, jwt_jwks_max_age_s=299)


@pytest.mark.parametrize("engine", ["noop", "sleep"])
def test_what_has_no_model_is_refused_in_production(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setenv("GATEWAY_ENGINE", engine)
    assert load_settings().engine == engine
    monkeypatch.setenv("PROD", "1")
    with pytest.raises(ConfigError, match="PROD=1"):
        load_settings()


@pytest.mark.parametrize(
    "url",
    [
        "http://issuer.example/keys",
        "http://127.0.0.1.evil.example/keys",
        "http://localhost.evil.example/",
        "ftp://127.0.0.1/",
    ],
)
def test_keys_do_not_come_by_plain_http_from_elsewhere(url: str) -> None:
    with pytest.raises(ValidationError, match="https"):
        Settings(_env_file=None, jwt_jwks_url=url)


def test_redis_url_is_shown_nowhere_and_leaves_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://:canary-77ab@cache:7000/2")
    settings = load_settings()
    address = settings.redis_address()
    assert address is not None
    assert (address.host, address.port, address.database, address.password) == ("cache", 7000, 2, "canary-77ab")
    assert "REDIS_URL" not in os.environ
    assert "canary" not in repr(settings) + str(settings) + settings.model_dump_json() + repr(address)


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"REDIS_URL": "http://:canary-77ab@cache"}, "REDIS_URL: must begin with redis://"),
        ({"REDIS_URL": "redis://:canary-77ab@cache?db=1"}, "REDIS_URL: takes no parameters"),
        ({"GATEWAY_INSTANCES": "2"}, "GATEWAY_INSTANCES: more than one"),
        ({"GATEWAY_INSTANCES": "2", "REDIS_URL": "redis://cache"}, "GATEWAY_STICKY_KEY"),
        ({"GATEWAY_REDIS_CA_FILE": __file__, "REDIS_URL": "redis://cache"}, "rediss://"),
        ({"GATEWAY_REDIS_CA_FILE": "/nowhere", "REDIS_URL": "rediss://cache"}, "must be a file"),
        ({"GATEWAY_REDIS_PASSWORD_FILE": "/nowhere", "REDIS_URL": "redis://cache"}, "cannot read the secret file"),
    ],
)
def test_what_cannot_be_meant_of_redis_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], hint: str
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert hint in str(caught.value)
    assert "canary" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_password_of_redis_stands_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (password := tmp_path / "password").write_text("canary-77ab")
    password.chmod(0o600)
    monkeypatch.setenv("GATEWAY_REDIS_PASSWORD_FILE", str(password))
    monkeypatch.setenv("REDIS_URL", "redis://cache")
    assert load_settings().redis_password_file == password
    monkeypatch.setenv("REDIS_URL", "redis://:another@cache")
    with pytest.raises(ConfigError, match="keep one"):
        load_settings()


def test_several_workers_and_gateways_share_a_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "unix:///run/redis.sock")
    monkeypatch.setenv("GATEWAY_STICKY_KEY", "0123456789abcdef")
    monkeypatch.setenv("GATEWAY_WORKERS", "2")
    monkeypatch.setenv("GATEWAY_INSTANCES", "3")
    settings = load_settings()
    assert (settings.workers, settings.instances) == (2, 3)


def test_the_secret_of_a_file_is_the_one_that_was_checked_in_every_worker(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(GOOD_SECRET)
    file.chmod(0o600)
    settings = Settings(_env_file=None, jwt_secret_file=file)
    file.write_text("")  # as a careless rotation leaves it for a moment: an empty key would let anybody sign
    assert pickle.loads(pickle.dumps(settings)).signing_secret() == GOOD_SECRET.encode()
    with pytest.raises(ConfigError, match="at least 32 bytes"):
        settings.with_overrides(workers=1)
    assert GOOD_SECRET not in repr(settings)


@pytest.mark.parametrize(
    "proxies",
    [
        "10.0.0.7",
        "10.0.0.0/8,172.16.0.0/12,192.168.0.0/16",
        "10.0.0.0/8,11.0.0.0/8",
        "fd00::/16,::1",
        "::ffff:10.0.0.0/104",
    ],
)
def test_proxies_may_be_whole_private_networks(monkeypatch: pytest.MonkeyPatch, proxies: str) -> None:
    monkeypatch.setenv("GATEWAY_TRUSTED_PROXIES", proxies)
    assert load_settings().trusted_proxies == frozenset(proxies.split(","))


@pytest.mark.parametrize(
    "proxies",
    [
        "*",
        "0.0.0.0/0",
        "0.0.0.0/1,128.0.0.0/1",
        "0.0.0.0/7",
        "::/0",
        "::/1",
        "2000::/15",
        "::ffff:0:0/96",
        "::ffff:0:0/97",
        "10.0.0.7,2000::/3",
        ",".join(f"{first}.0.0.0/8" for first in range(256)),
        ",".join(f"{first}.{second}.0.0/9" for first in range(256) for second in (0, 128)),
    ],
    ids=lambda proxies: proxies[:30],
)
def test_so_many_addresses_cannot_all_be_proxies(monkeypatch: pytest.MonkeyPatch, proxies: str) -> None:
    monkeypatch.setenv("GATEWAY_TRUSTED_PROXIES", proxies)
    with pytest.raises(ConfigError, match="GATEWAY_TRUSTED_PROXIES"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("GATEWAY_JWT_JWKS_CA_FILE", "GATEWAY_JWT_JWKS_URL"),
        ("GATEWAY_REDIS_CA_FILE", "REDIS_URL"),
        ("GATEWAY_REDIS_PASSWORD_FILE", "REDIS_URL"),
        ("GATEWAY_WEBHOOK_SECRET_FILE", "GATEWAY_WEBHOOK_URL"),
    ],
)
def test_a_file_of_an_url_is_nothing_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, url: str
) -> None:
    (file := tmp_path / "file").write_text("whsec_" + 32 * "ab")
    file.chmod(0o600)
    monkeypatch.setenv(name, str(file))
    with pytest.raises(ConfigError, match=f"{name} goes with {url}"):
        load_settings()


@pytest.mark.parametrize(
    ("url", "secret", "hint"),
    [
        ("http://desk.example/hook", None, "GATEWAY_WEBHOOK_URL needs GATEWAY_WEBHOOK_SECRET_FILE"),
        ("ftp://desk.example/hook", "whsec_" + 32 * "ab", "GATEWAY_WEBHOOK_URL: must begin with http"),
        ("http://169.254.169.254/latest", "whsec_" + 32 * "ab", "GATEWAY_WEBHOOK_URL: must not be link-local"),
        ("https://desk.example/hook", "canary-77ab", "GATEWAY_WEBHOOK_SECRET_FILE: a webhook's secret is whsec_"),
        ("https://desk.example/hook", "whsec_canary77", "GATEWAY_WEBHOOK_SECRET_FILE: a webhook's secret is whsec_"),
    ],
)
def test_a_webhook_that_cannot_be_meant_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, secret: str | None, hint: str
) -> None:
    monkeypatch.setenv("GATEWAY_WEBHOOK_URL", url)
    if secret is not None:
        (file := tmp_path / "secret").write_text(secret)
        file.chmod(0o600)
        monkeypatch.setenv("GATEWAY_WEBHOOK_SECRET_FILE", str(file))
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert hint in str(caught.value)
    assert "canary" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_secret_of_the_tokens_is_the_key_of_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = secrets.token_urlsafe(36)
    (file := tmp_path / "secret").write_text(secret + "\n")
    file.chmod(0o600)
    for name, value in (("GATEWAY_JWT_SECRET", secret), ("GATEWAY_JWT_SECRET_FILE", str(file))):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            patch.setenv("GATEWAY_STICKY_KEY", secret)
            with pytest.raises(ConfigError, match="GATEWAY_STICKY_KEY must be another") as caught:
                load_settings()
            assert secret not in str(caught.value)
            patch.setenv(name, value)
            patch.setenv("GATEWAY_STICKY_KEY", secret[::-1])
            load_settings()
