"""A token issuer on loopback that publishes its keys over HTTP, in good ways and bad ones."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from tests.app.auth.signing import ec_key


class Issuer:
    """Answers every request alike.

    Attributes:
        body: Sent with status 200, unless `answer` is set.
        headers: Of the answer, as lines.
        answer: Sent as it is instead, when set.
        hangs: Nothing is sent at all.
        hits: Requests so far, each with its head.
    """

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.headers: list[str] = []
        self.answer: bytes | None = None
        self.hangs = False
        self.hits: list[str] = []
        self.url = ""
        self._serving = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            self.hits.append((await reader.readuntil(b"\r\n\r\n")).decode())
            while self.hangs:
                await asyncio.sleep(0.01)
            lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(self.body)}", "Connection: close", *self.headers]
            head = "\r\n".join([*lines, "", ""]).encode()
            writer.write(head + self.body if self.answer is None else self.answer)
            await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()
        self._serving -= 1


@asynccontextmanager
async def issuing(body: bytes, tls: ssl.SSLContext | None = None, port: int = 0) -> AsyncIterator[Issuer]:
    """An issuer that listens, on a free port unless one is given."""
    issuer = Issuer(body)
    server = await asyncio.start_server(issuer._serve, "127.0.0.1", port, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    issuer.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{port}/keys"
    try:
        yield issuer
    finally:
        issuer.hangs = False
        server.close()
        await server.wait_closed()
        while issuer._serving:
            await asyncio.sleep(0.001)


def certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's side of TLS for 127.0.0.1, and the file of the certificate that vouches for it."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "issuer")])
    now = datetime.datetime.now(datetime.UTC)
    private = ec_key("tls")
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(private, hashes.SHA256())
    )
    file, key_file = folder / "issuer.pem", folder / "issuer.key"
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key_file)
    return context, file
