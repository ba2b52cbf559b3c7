"""`sluice token` as a process: what it prints, where, and with which exit code."""

from __future__ import annotations

from pathlib import Path

from app.auth import Key, KeySet, TokenVerifier
from tests.app.cli.command import EX_CONFIG, SECRET, assert_one_plain_line, sluice


def test_token_prints_one_token_that_the_gateway_takes_and_nothing_else(tmp_path: Path) -> None:
    result = sluice("token", "--sub", "desk", "--scope", "predict ops", cwd=tmp_path, GATEWAY_JWT_SECRET=SECRET)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (token,) = result.stdout.splitlines()
    verifier = TokenVerifier(KeySet({None: Key.hs256(SECRET.encode())}), issuer="sluice", audience="sluice")
    principal = verifier.verify(token)
    assert (principal.subject, principal.scopes) == ("desk", {"predict", "ops"})


def test_without_a_secret_there_is_one_line_that_says_so(tmp_path: Path) -> None:
    assert_one_plain_line(sluice("token", "--sub", "desk", cwd=tmp_path), EX_CONFIG, "secret")
    assert_one_plain_line(sluice("serve", cwd=tmp_path), EX_CONFIG, "secret")


def test_tenant_and_models_of_a_token_are_options(tmp_path: Path) -> None:
    words = ("token", "--sub", "desk", "--tenant", "fund-a", "--models", "cnn_lstm other")
    result = sluice(*words, cwd=tmp_path, GATEWAY_JWT_SECRET=SECRET)
    verifier = TokenVerifier(KeySet({None: Key.hs256(SECRET.encode())}), issuer="sluice", audience="sluice")
    principal = verifier.verify(result.stdout.strip())
    assert (principal.tenant, principal.models) == ("fund-a", {"cnn_lstm", "other"})
