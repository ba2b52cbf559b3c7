"""Two workers of a real gateway while its keys change: who has a valid credential is never refused."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.app.auth.signing import PrivateKey, ec_key, issue, jwks, public_jwk, rsa_key
from tests.integration.processes import GatewayProcess, wait_until
from tests.integration.redis_server import RedisServer

pytestmark = pytest.mark.integration

RATE = 100
OLD, NEW = ec_key("old"), rsa_key()


@dataclass
class Site:
    """A gateway, the file of its issuer's keys, and the folder in which its operator's commands run."""

    gateway: GatewayProcess
    key_file: Path
    folder: Path
    client: httpx.AsyncClient
    statuses: list[tuple[float, str, int]] = field(default_factory=list)

    def publish(self, *rows: dict[str, object]) -> float:
        """Replace the key file in one step; gives the time of that."""
        beside = self.key_file.with_name("new.json")
        beside.write_bytes(jwks(*rows))
        beside.chmod(0o644)
        beside.rename(self.key_file)
        return time.monotonic()

    def sluice(self, *words: str) -> str:
        """What an operator's command prints, next to the running gateway."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
        command = [sys.executable, "-m", "app.cli", *words]
        return subprocess.run(
            command, cwd=self.folder, env=environment, check=True, capture_output=True, text=True
        ).stdout

    async def ask(self, credential: str) -> int:
        """The status of one request on a connection of its own, so that either worker may get it."""
        headers = {"Authorization": f"Bearer {credential}", "Connection": "close"}
        return (await self.client.get("/v2", headers=headers)).status_code

    async def load(self, credential: Callable[[], tuple[str, str]], seconds: float) -> None:
        """So many requests a second, each due at its own time, each with the credential of its moment."""
        started_at = time.monotonic()
        asked = []
        for n in range(int(RATE * seconds)):
            await asyncio.sleep(max(0.0, started_at + n / RATE - time.monotonic()))
            asked.append(asyncio.create_task(self._note(*credential())))
        await asyncio.gather(*asked)

    async def _note(self, name: str, credential: str) -> None:
        asked_at = time.monotonic()
        self.statuses.append((asked_at, name, await self.ask(credential)))


def token(private: PrivateKey, kid: str, subject: str = "desk") -> str:
    now = int(time.time())
    return issue(private, kid, sub=subject, iat=now, exp=now + 600, scope="predict")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    key_file = folder / "jwks.json"
    key_file.write_bytes(jwks(public_jwk(OLD, "old")))
    key_file.chmod(0o644)
    with RedisServer(tmp_path_factory.mktemp("redis")) as redis:
        gateway = GatewayProcess(
            folder,
            {
                "GATEWAY_JWT_SECRET": "",
                "GATEWAY_JWT_JWKS_FILE": str(key_file),
                "GATEWAY_WORKERS": "2",
                "GATEWAY_ENGINE": "noop",
                "GATEWAY_AUTH_FAILURES_PER_MIN": "10000",
                "REDIS_URL": redis.url,
            },
        )
        try:
            gateway.wait_for("legacy")
            wait_until(lambda: len(gateway.worker_pids()) == 2, 30, "both workers")
            client = httpx.AsyncClient(base_url=gateway.url, trust_env=False, timeout=5)
            yield Site(gateway, key_file, folder, client)
        finally:
            gateway.stop()


async def test_keys_rotate_under_load_without_one_wrong_refusal(site: Site) -> None:
    """The new key signs from the moment in which it is published; the old one is taken away two seconds later."""
    signing = ["old"]
    site.publish(public_jwk(OLD, "old"))
    loading = asyncio.create_task(
        site.load(lambda: (signing[0], token(OLD if signing[0] == "old" else NEW, signing[0])), seconds=5)
    )
    await asyncio.sleep(1)
    site.publish(public_jwk(OLD, "old"), public_jwk(NEW, "new"))
    signing[0] = "new"
    await asyncio.sleep(1)
    assert {await site.ask(token(OLD, "old")) for _ in range(10)} == {200}  # both live for a while
    site.publish(public_jwk(NEW, "new"))
    await asyncio.sleep(1)
    assert {await site.ask(token(OLD, "old", f"late-{n}")) for n in range(20)} == {401}
    await loading
    wrong = [row for row in site.statuses if row[2] != 200]
    print(f"\n{len(site.statuses)} requests at {RATE}/s over a rotation: {len(wrong)} wrongly refused")
    assert wrong == []
    assert {name for _, name, _ in site.statuses} == {"old", "new"}
    assert len(site.statuses) == 5 * RATE


async def test_a_removed_key_is_refused_by_both_workers_within_a_second_though_it_was_remembered(site: Site) -> None:
    site.publish(public_jwk(OLD, "old"), public_jwk(NEW, "new"))
    remembered = token(OLD, "old")
    await until(site, remembered, 200)
    removed_at = site.publish(public_jwk(NEW, "new"))
    let_in_s = await until(site, remembered, 401) - removed_at
    print(f"\nlet in until {let_in_s:.2f} s after its key was removed")
    assert let_in_s < 1.0


async def test_an_api_key_counts_and_ends_for_both_workers_within_a_second(site: Site) -> None:
    credential = site.sluice("key", "create", "--sub", "script").strip()
    made_at = time.monotonic()
    refused_s = await until(site, credential, 200) - made_at
    site.sluice("key", "revoke", credential[3:11])
    revoked_at = time.monotonic()
    let_in_s = await until(site, credential, 401) - revoked_at
    print(f"\nrefused until {refused_s:.2f} s after it was made, let in until {let_in_s:.2f} s after its end")
    assert refused_s < 1.0
    assert let_in_s < 1.0
    assert json.loads(site.sluice("key", "list", "--json")) == []


async def test_no_credential_is_in_the_log_nor_in_what_others_see_of_the_processes(site: Site) -> None:
    credential = site.sluice("key", "create", "--sub", "script").strip()
    spoken = [credential, token(NEW, "new"), token(OLD, "unknown"), credential[:-4] + "AAAA"]
    for one in spoken:
        await site.ask(one)
    await asyncio.sleep(0.5)
    seen = site.gateway.log.read_text()
    for pid in (site.gateway.pid, *site.gateway.worker_pids()):
        for name in ("cmdline", "environ"):
            seen += Path(f"/proc/{pid}/{name}").read_bytes().decode("utf-8", "replace")
    pepper = (site.folder / ".run/state/api_keys.pepper").read_text()
    for secret in (*spoken, credential[12:], pepper):
        assert secret not in seen
        assert secret.split(".")[-1] not in seen


async def until(site: Site, credential: str, status: int) -> float:
    """Wait until both workers answer so; gives when the last request was sent that got another answer.

    Both do when many in a row have, each on a connection of its own, of which either worker gets some.
    """
    in_a_row, last_other_at = 0, time.monotonic()
    async with asyncio.timeout(10):
        while in_a_row < 24:
            asked_at = time.monotonic()
            if await site.ask(credential) == status:
                in_a_row += 1
            else:
                in_a_row, last_other_at = 0, asked_at
    return last_other_at
