"""`sluice key` and `sluice token` as processes: what they print, store and refuse."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from app.auth import ApiKeyFile, ApiKeyVerifier
from tests.app.cli.command import EX_CONFIG, SECRET, assert_one_plain_line, sluice


def test_a_key_s_way_from_its_making_to_its_end(tmp_path: Path) -> None:
    made = sluice("key", "create", "--sub", "desk 7", "--scope", "predict ops", "--days", "30", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""
    (credential,) = made.stdout.splitlines()
    assert re.fullmatch(r"gk_[a-z2-7]{8}_[A-Za-z0-9_-]{43}", credential)
    table = tmp_path / ".run/state/api_keys.json"
    assert credential[12:] not in table.read_text()
    verifier = ApiKeyVerifier()
    verifier.replace(ApiKeyFile(table, table.with_name("api_keys.pepper")).read())
    assert verifier.verify(credential).scopes == {"predict", "ops"}

    listed = sluice("key", "list", "--json", cwd=tmp_path)
    (row,) = json.loads(listed.stdout)
    assert (row["id"], row["subject"], row["scopes"], row["models"]) == (
        credential[3:11],
        "desk 7",
        "ops predict",
        None,
    )
    assert not {"digest", "key", "secret"} & row.keys()
    assert credential[12:] not in listed.stdout

    assert sluice("key", "revoke", credential[3:11], cwd=tmp_path).returncode == 0
    assert json.loads(sluice("key", "list", "--json", cwd=tmp_path).stdout) == []
    assert_one_plain_line(sluice("key", "revoke", credential[3:11], cwd=tmp_path), 1, "no API key")


def test_a_key_that_no_gateway_would_take_is_not_made(tmp_path: Path) -> None:
    for words in (["--sub", ""], ["--sub", "a", "--scope", "Predict!"], ["--sub", "a", "--models", "../x"]):
        assert_one_plain_line(
            sluice("key", "create", *words, cwd=tmp_path), EX_CONFIG, "must" if words[1] == "" else ""
        )
    assert not (tmp_path / ".run/state/api_keys.json").exists()


def test_a_scope_that_no_route_asks_for_is_a_slip(tmp_path: Path) -> None:
    for words in (("key", "create"), ("token",)):
        result = sluice(*words, "--sub", "a", "--scope", "predcit", cwd=tmp_path, GATEWAY_JWT_SECRET=SECRET)
        assert_one_plain_line(result, EX_CONFIG, "predcit", "predict, ops")


def test_a_damaged_table_is_told_and_left_as_it_is(tmp_path: Path) -> None:
    sluice("key", "create", "--sub", "a", cwd=tmp_path)
    table = tmp_path / ".run/state/api_keys.json"
    table.write_bytes(table.read_bytes()[:-9])
    damaged = table.read_bytes()
    for words in (["create", "--sub", "b"], ["list"], ["revoke", "aaaaaaaa"]):
        assert_one_plain_line(sluice("key", *words, cwd=tmp_path), EX_CONFIG, "damaged")
    assert table.read_bytes() == damaged
    os.truncate(table, 0)
    assert_one_plain_line(sluice("serve", cwd=tmp_path, GATEWAY_JWT_SECRET=SECRET), EX_CONFIG, "damaged")


def test_the_table_and_its_pepper_can_lie_where_several_gateways_share_them(tmp_path: Path) -> None:
    places = {
        "GATEWAY_API_KEYS_FILE": str(tmp_path / "shared" / "keys.json"),
        "GATEWAY_API_KEY_PEPPER_FILE": str(tmp_path / "secrets" / "pepper"),
    }
    assert sluice("key", "create", "--sub", "a", cwd=tmp_path, **places).returncode == 0
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"keys.json", ".keys.json.lock", "pepper"}


def test_a_gateway_with_an_issuer_makes_no_tokens_of_its_own(tmp_path: Path) -> None:
    result = sluice("token", "--sub", "a", cwd=tmp_path, GATEWAY_JWT_JWKS_URL="https://issuer.example/keys")
    assert_one_plain_line(result, EX_CONFIG, "issuer")
