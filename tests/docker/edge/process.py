"""The edge as compose runs it: its own start script, a real nginx, nobody's rights, a certificate made for the test."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.integration.processes import ROOT, free_port, wait_until

FILES = ROOT / "docker" / "edge"
STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
HOST = "sluice.test"
USER = 10001  # of our images
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing() -> str | None:
    """What has to be installed before an edge can run here."""
    if shutil.which("nginx", path=PATH) is None or not STREAM_MODULE.exists():
        return "apt-get install nginx libnginx-mod-stream"
    return None


class Said(NamedTuple):
    """What came over a connection, and whether the other side ended it."""

    data: bytes
    ended: bool

    @property
    def statuses(self) -> list[int]:
        """The status of each answer in it."""
        return [int(status) for status in re.findall(rb"(?:^|\n|})HTTP/1\.1 (\d{3})", self.data)]


class EdgeProcess:
    """An edge in front of some gateways, on loopback.

    Args:
        gateways: host:port of each.
        settings: The edge's own, beside those that a test needs.
    """

    def __init__(self, gateways: Sequence[str], **settings: str) -> None:
        self.port = free_port()
        self.alive_port = free_port()
        self.url = f"https://{HOST}:{self.port}"
        self.folder = Path(tempfile.mkdtemp(prefix="edge-", dir="/tmp"))
        shutil.copytree(FILES, self.folder / "etc")
        make_certificate(self.folder)
        _give_away(self.folder)
        self._log = self.folder / "log"
        command = [self.folder / "etc" / "start"]
        environment = self._environment(gateways, settings)
        user = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}
        with self._log.open("wb") as log:
            _give_away(self._log)
            self._process = subprocess.Popen(
                command, cwd="/", env=environment, stdout=log, stderr=log, start_new_session=True, **user
            )
        try:
            wait_until(self._answers, 10, "the edge to listen")
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> EdgeProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def configuration(self) -> str:
        """nginx's configuration as it was filled in."""
        return (self.folder / "run" / "nginx.conf").read_text()

    @property
    def socket_path(self) -> str:
        """Where the stream layer hands connections to the http layer, each with its client's address."""
        return str(self.folder / "run" / "tls.sock")

    def context(self, *protocols: str) -> ssl.SSLContext:
        """A client's TLS that believes the throw-away authority, and offers these protocols by ALPN."""
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context

    def connect(self, source: str = "127.0.0.1", *protocols: str, timeout_s: float = 15.0) -> ssl.SSLSocket:
        """A TLS connection from this loopback address."""
        raw = socket.create_connection(("127.0.0.1", self.port), timeout_s, source_address=(source, 0))
        return self.context(*protocols).wrap_socket(raw, server_hostname=HOST)

    def say(self, message: bytes, source: str = "127.0.0.1", patience_s: float = 1.0) -> Said:
        """Send these bytes over a connection of their own; listen until the edge ends it, or is silent for a while."""
        with self.connect(source, timeout_s=patience_s) as connection:
            with contextlib.suppress(OSError):  # it may be refused before all of it is sent
                connection.sendall(message)
            return listen(connection)

    def client(self, *, http2: bool = False, source: str | None = None, **options: Any) -> httpx.Client:
        """A client that finds the edge's name at its loopback address."""
        transport = _Loopback(verify=self.context(), http1=not http2, http2=http2, local_address=source)
        return httpx.Client(base_url=self.url, transport=transport, timeout=15.0, trust_env=False, **options)

    def log_lines(self) -> list[dict[str, Any]]:
        """The access log's lines, once those of the last second are written."""
        time.sleep(1.2)
        return [json.loads(line) for line in self.log().splitlines()]

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def worker_pids(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def memory_bytes(self) -> int:
        """Resident memory of all workers."""
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.worker_pids())
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Its exit status, once it has ended by itself."""
        return self._process.wait(timeout_s)

    def reload(self) -> None:
        """What `nginx -s reload` does: new workers for new connections, the old ones finish what they have."""
        before = set(self.worker_pids())
        self.signal(signal.SIGHUP)
        wait_until(lambda: bool(set(self.worker_pids()) - before), 10, "new workers")

    def stop(self) -> int:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(10)
        finally:
            self._process.kill()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        assert self._process.poll() is None, self.log()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.alive_port), 1) as connection:
            connection.sendall(b"GET /alive HTTP/1.0\r\n\r\n")
            return connection.recv(64).startswith(b"HTTP/1.1 204")
        return False

    def _environment(self, gateways: Sequence[str], settings: dict[str, str]) -> dict[str, str]:
        return {
            "PATH": PATH,
            "EDGE_RUN": str(self.folder / "run"),
            "EDGE_LISTEN": f"0.0.0.0:{self.port}",
            "EDGE_ALIVE_PORT": str(self.alive_port),
            "EDGE_CERTIFICATE": str(self.folder / "edge.crt"),
            "EDGE_KEY": str(self.folder / "edge.key"),
            "EDGE_HOSTS": HOST,
            "EDGE_GATEWAYS": " ".join(gateways),
            **settings,
        }


class _Loopback(httpx.HTTPTransport):
    """Resolves the edge's name to loopback, as /etc/hosts would."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions["sni_hostname"] = HOST
        request.url = request.url.copy_with(host="127.0.0.1")
        return super().handle_request(request)


def listen(connection: socket.socket) -> Said:
    """What comes until the other side ends the connection, by whatever means, or is silent for the socket's timeout."""
    said = b""
    try:
        while part := connection.recv(65536):
            said += part
    except TimeoutError:
        return Said(said, ended=False)
    except OSError:
        pass
    return Said(said, ended=True)


def make_certificate(folder: Path) -> None:
    """Write ca.crt, edge.crt and edge.key: an authority that lives for this call, and what it signed."""
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "throw-away")])
    ca = _signed(ca_name, ca_name, ca_key, ca_key, x509.BasicConstraints(ca=True, path_length=0))
    names = x509.SubjectAlternativeName([x509.DNSName(HOST), x509.IPAddress(ip_address("127.0.0.1"))])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    certificate = _signed(subject, ca_name, key, ca_key, names, usage)
    (folder / "ca.crt").write_bytes(ca.public_bytes(serialization.Encoding.PEM))
    (folder / "edge.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "edge.key").write_bytes(pem)


def _signed(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    *extensions: x509.ExtensionType,
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
    return builder.sign(issuer_key, hashes.SHA256())


def _give_away(path: Path) -> None:
    """Root's files become those of the edge's user."""
    if os.geteuid() == 0:
        for part in (path, *(path.rglob("*") if path.is_dir() else ())):
            os.chown(part, USER, USER)
