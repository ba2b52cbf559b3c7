"""TLS as it is spoken: versions, ciphers, resumption, HTTP/2."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import warnings
from datetime import datetime
from pathlib import Path

import pytest
from cryptography import x509

from tests.docker.edge.process import FILES, HOST, EdgeProcess, make_certificate
from tests.docker.edge.recorder import Recorder

pytestmark = pytest.mark.integration


def shake(edge: EdgeProcess, context: ssl.SSLContext, name: str = HOST) -> ssl.SSLSocket:
    raw = socket.create_connection(("127.0.0.1", edge.port), 5)
    return context.wrap_socket(raw, server_hostname=name)


def only(edge: EdgeProcess, version: ssl.TLSVersion, ciphers: str = "ALL:@SECLEVEL=0") -> ssl.SSLContext:
    context = edge.context()
    context.set_ciphers(ciphers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python knows too that these are old
        context.minimum_version = context.maximum_version = version
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_versions_are_refused(edge: EdgeProcess, version: ssl.TLSVersion) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        shake(edge, only(edge, version))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_current_versions_are_spoken_with_forward_secrecy_and_authenticated_ciphers(
    edge: EdgeProcess, version: ssl.TLSVersion
) -> None:
    with shake(edge, only(edge, version)) as connection:
        assert connection.version() == {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name]
        cipher = connection.cipher()
        assert cipher is not None
        assert "GCM" in cipher[0] or "CHACHA20" in cipher[0]


@pytest.mark.parametrize(
    "ciphers", ["AES128-GCM-SHA256", "ECDHE-ECDSA-AES128-SHA", "DHE-RSA-AES128-GCM-SHA256", "eNULL", "aNULL"]
)
def test_weak_ciphers_are_refused(edge: EdgeProcess, ciphers: str) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        shake(edge, only(edge, ssl.TLSVersion.TLSv1_2, f"{ciphers}:@SECLEVEL=0"))


def test_a_client_that_does_not_know_the_authority_goes_no_further(edge: EdgeProcess) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(edge, ssl.create_default_context())
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(edge, edge.context(), "other.test")


def test_no_tickets_are_given_whose_key_nobody_rotates(edge: EdgeProcess) -> None:
    with shake(edge, only(edge, ssl.TLSVersion.TLSv1_2)) as connection:
        session = connection.session
        assert session is not None
        assert not session.has_ticket
        assert session.id  # it is remembered here instead


@pytest.mark.parametrize(("offered", "spoken"), [(["h2", "http/1.1"], "h2"), (["http/1.1"], "http/1.1"), ([], None)])
def test_http2_is_for_who_offers_it(edge: EdgeProcess, offered: list[str], spoken: str | None) -> None:
    with edge.connect("127.0.0.1", *offered) as connection:
        assert connection.selected_alpn_protocol() == spoken


def test_http2_works(edge: EdgeProcess, recorder: Recorder) -> None:
    with edge.client(http2=True) as client:
        answers = [client.post("/ray-serve/predict", content=bytes(12_000)) for _ in range(3)]
    assert {(answer.http_version, answer.status_code) for answer in answers} == {("HTTP/2", 200)}
    assert [len(request.body) for request in recorder.requests] == [12_000] * 3


@pytest.mark.parametrize("http2", [False, True])
def test_browsers_are_told_to_stay_with_tls(edge: EdgeProcess, http2: bool) -> None:
    with edge.client(http2=http2) as client:
        for path in ("/health", "/nowhere"):
            assert client.get(path).headers.get_list("Strict-Transport-Security") == ["max-age=63072000"]


def test_the_development_script_makes_a_certificate_once(tmp_path: Path, edge: EdgeProcess) -> None:
    assert shutil.which("openssl"), "apt-get install openssl"
    script = edge.folder / "etc" / "make-certificate.sh"
    for _ in range(2):
        subprocess.run([script, tmp_path, HOST, "127.0.0.1"], check=True, capture_output=True)
    made = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert made == {"edge.crt": 0o400, "edge.key": 0o400, "edge_ca.crt": 0o444}
    first = (tmp_path / "edge.crt").read_bytes()
    subprocess.run([script, tmp_path], check=True, capture_output=True)
    assert (tmp_path / "edge.crt").read_bytes() == first

    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "edge.crt", tmp_path / "edge.key")
    client = ssl.create_default_context(cafile=str(tmp_path / "edge_ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    assert _shake_in_memory(server, client, HOST)
    assert _shake_in_memory(server, client, "127.0.0.1")
    make_certificate(tmp_path / "..")  # another authority's
    with pytest.raises(ssl.SSLCertVerificationError):
        _shake_in_memory(server, ssl.create_default_context(cafile=str(tmp_path.parent / "ca.crt")), HOST)


def end_of(certificate: Path) -> datetime:
    return x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc


def make_it_expire(folder: Path, issuer: str) -> None:
    """Replace edge.crt by one of this issuer that ends within the day for which one is kept."""
    command = ["openssl", "req", "-x509", "-key", folder / "edge.key", "-subj", f"/CN={issuer}", "-days", "1"]
    made = subprocess.run(command, check=True, capture_output=True).stdout
    (folder / "edge.crt").unlink()
    (folder / "edge.crt").write_bytes(made)


def test_a_certificate_that_expires_is_renewed_if_it_was_made_here(tmp_path: Path) -> None:
    script = FILES / "make-certificate.sh"
    subprocess.run([script, tmp_path, HOST], check=True, capture_output=True)
    year = end_of(tmp_path / "edge.crt")
    make_it_expire(tmp_path, "Somebody else")
    theirs = (tmp_path / "edge.crt").read_bytes()
    refused = subprocess.run([script, tmp_path, HOST], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "was not made here" in refused.stderr
    assert (tmp_path / "edge.crt").read_bytes() == theirs
    make_it_expire(tmp_path, "Sluice development")
    subprocess.run([script, tmp_path, HOST], check=True, capture_output=True)
    assert end_of(tmp_path / "edge.crt") >= year
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tmp_path / "edge.crt", tmp_path / "edge.key")


def _shake_in_memory(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> bool:
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[0].version() is not None
