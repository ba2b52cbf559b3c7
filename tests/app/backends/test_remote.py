"""The remote legacy arm: the old shape in and out, closed errors whatever the service does, nothing else passed on."""

from __future__ import annotations

import asyncio
import json
import ssl
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app.backends import remote
from app.backends.base import Answer, Call
from app.backends.breaker import SILENCE_S, Guarded
from app.backends.fake import FakeBackend
from app.backends.remote import RemoteBackend, decode_answer
from serve_app.contract import (
    DeadlineExceeded,
    ModelFailed,
    ModelNotFound,
    ModelOutputInvalid,
    NotReady,
    Options,
    Overloaded,
    ReplicaLost,
    ServingError,
    Unavailable,
)
from tests.app.under_test import MakeGateway

from .hand_driven import windows
from .old_service import Behaviour, OldService, Received, answer_for, response

MINUTE = 60.0
A_MOMENT = 0.05  # seconds; what is slow here never answers at all
_DEFAULT = Options()
SECRETS_OF_THEIRS = b'{"detail": "Traceback: /srv/old/model.py, key=hunter2"}'


@pytest.fixture
async def old() -> AsyncIterator[OldService]:
    async with OldService() as service:
        yield service


@asynccontextmanager
async def running(url: str, **arguments: Any) -> AsyncIterator[RemoteBackend]:
    backend = RemoteBackend(url, **{"timeout_s": 5.0, **arguments})
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop()


def call(*marks: float, options: Options = _DEFAULT, within_s: float = MINUTE, version: str | None = None) -> Call:
    deadline = asyncio.get_running_loop().time() + within_s
    return Call(windows(*marks), options, deadline, "r", "0" * 16, version)


async def ask(service: OldService, options: Options = _DEFAULT, **arguments: Any) -> Answer:
    async with running(service.url, **arguments) as backend:
        return await backend.predict(call(1.0, options=options))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # what is awaited happens on the other end of a socket
            await asyncio.sleep(0.001)


def always(reply: bytes | None) -> Behaviour:
    return lambda _: reply


def without(part: str, *names: str) -> Behaviour:
    """The whole answer but for some fields of one of its parts."""

    def behave(received: Received) -> bytes:
        answer = answer_for(received)
        answer[part] = {name: value for name, value in answer[part].items() if name not in names}
        return response(json.dumps(answer).encode())

    return behave


# The shape.


async def test_windows_travel_in_the_old_shape_and_rows_come_back_in_order(old: OldService) -> None:
    async with running(old.url, path="/old/predict", token=lambda: b"their-token") as backend:
        answer = await backend.predict(call(*range(20), options=Options(use_ensemble=False)))
    assert answer.prediction.regression_pred.tolist() == list(range(20))
    assert [len(received.marks) for received in old.received] == [8, 8, 4]
    first = old.received[0]
    assert first.path == "/old/predict"
    assert {name: first.document[name] for name in first.document if name != "data"} == {
        "return_uncertainty": True,
        "use_ensemble": False,
    }
    assert first.headers["authorization"] == "Bearer their-token"
    assert first.headers["host"] == f"127.0.0.1:{old.port}"


async def test_what_the_service_tells_is_told(old: OldService) -> None:
    prediction = (await ask(old)).prediction
    assert prediction.classification_probs.tolist() == [[0.25, 0.5, 0.25]]
    assert prediction.ensemble_weights is not None
    np.testing.assert_allclose(prediction.ensemble_weights, [[0.2, 0.3, 0.5]])
    for name, value in answer_for(old.received[0])["uncertainty"].items():
        np.testing.assert_allclose(getattr(prediction, name), value)
    assert prediction.model_time_ms == 0.5


@pytest.mark.parametrize("name", ["aleatoric", "epistemic", "predictive_entropy"])
async def test_a_part_of_the_uncertainty_that_is_not_told_is_none(old: OldService, name: str) -> None:
    old.behave = without("uncertainty", name)
    prediction = (await ask(old)).prediction
    assert getattr(prediction, name) is None
    assert prediction.regression_uncertainty is not None


async def test_what_is_not_told_at_all_is_none_and_not_made_up(old: OldService) -> None:
    def behave(received: Received) -> bytes:
        answer = answer_for(received)
        del answer["uncertainty"], answer["predictions"]["ensemble_weights"]
        return response(json.dumps(answer).encode())

    old.behave = behave
    prediction = (await ask(old, Options(return_features=True))).prediction
    untold = ("regression_uncertainty", "aleatoric", "epistemic", "predictive_entropy", "ensemble_weights", "features")
    assert {name: getattr(prediction, name) for name in untold} == dict.fromkeys(untold)
    assert (prediction.model_name, prediction.model_version) == (None, None)


async def test_what_was_not_asked_for_is_dropped(old: OldService) -> None:
    prediction = (await ask(old, Options(return_uncertainty=False, use_ensemble=False))).prediction
    assert prediction.regression_uncertainty is prediction.aleatoric is prediction.ensemble_weights is None


async def test_one_row_of_weights_holds_for_every_window(old: OldService) -> None:
    def behave(received: Received) -> bytes:
        answer = answer_for(received)
        answer["predictions"]["ensemble_weights"] = [0.2, 0.3, 0.5]
        return response(json.dumps(answer).encode())

    old.behave = behave
    async with running(old.url) as backend:
        prediction = (await backend.predict(call(1.0, 2.0))).prediction
    assert prediction.ensemble_weights is not None
    np.testing.assert_allclose(prediction.ensemble_weights, [[0.2, 0.3, 0.5]] * 2)


async def test_a_part_told_for_half_of_a_batch_is_none(old: OldService) -> None:
    old.behave = lambda received: without("uncertainty", *(["aleatoric"] if received.marks[0] else []))(received)
    async with running(old.url) as backend:
        prediction = (await backend.predict(call(*range(12)))).prediction
    assert prediction.aleatoric is None
    assert prediction.epistemic is not None
    assert len(prediction.epistemic) == 12


async def test_the_services_own_time_is_no_longer_than_what_was_waited(old: OldService) -> None:
    old.behave = lambda received: response(json.dumps({**answer_for(received), "processing_time_ms": 1e9}).encode())
    answer = await ask(old)
    assert answer.prediction.model_time_ms < 5000
    assert answer.stages_ms["model"] == answer.prediction.model_time_ms


# Garbage.


def garbage(**changes: Any) -> bytes:
    """The answer for two windows with one thing wrong in it; `part__field` names a field of a part."""
    answer = answer_for(Received("/", {}, {"data": windows(1.0, 2.0).tolist()}))
    for name, value in changes.items():
        part, _, name_in_part = name.partition("__")
        if name_in_part:
            answer[part][name_in_part] = value
        else:
            answer[part] = value
    return json.dumps(answer).encode()


GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"<html>hello</html>",
    "half of it": garbage()[:-20],
    "another kind": b"[1, 2]",
    "null": b"null",
    "deep": b"[" * 100_000,
    "NaN": garbage().replace(b"1.0", b"NaN"),
    "1e999": garbage().replace(b"1.0", b"1e999"),
    "no predictions": garbage(predictions=None),
    "predictions as a list": garbage(predictions=[[0.25, 0.5, 0.25]] * 2),
    "no probabilities": garbage(predictions__classification_probs=None),
    "two classes": garbage(predictions__classification_probs=[[0.5, 0.5]] * 2),
    "three windows": garbage(predictions__classification_probs=[[0.25, 0.5, 0.25]] * 3),
    "one window": garbage(predictions__regression_pred=[1.0]),
    "no axis": garbage(predictions__regression_pred=1.0),
    "an axis more": garbage(predictions__regression_pred=[[1.0], [2.0]]),
    "ragged": garbage(predictions__classification_probs=[[0.25, 0.5, 0.25], [0.5, 0.5]]),
    "text": garbage(predictions__regression_pred=["1.0", "2.0"]),
    "truth": garbage(predictions__regression_pred=[True, False]),
    "truth beside a number": garbage(predictions__regression_pred=[1.0, True]),
    "a null in it": garbage(predictions__regression_pred=[1.0, None]),
    "an object in it": garbage(predictions__regression_pred=[1.0, {}]),
    "no regression": garbage(predictions__regression_pred=None),
    "two weights": garbage(predictions__ensemble_weights=[0.5, 0.5]),
    "weights as text": garbage(predictions__ensemble_weights="even"),
    "uncertainty as a list": garbage(uncertainty=[1.0, 1.0]),
    "no total uncertainty": garbage(uncertainty__regression_uncertainty=None),
    "negative": garbage(uncertainty__regression_uncertainty=[1.0, -1.0]),
    "a negative part": garbage(uncertainty__epistemic=[1.0, -1.0]),
    "no time": garbage(processing_time_ms=None),
    "negative time": garbage(processing_time_ms=-1),
    "time as text": garbage(processing_time_ms="3"),
    "infinite as float32": garbage(predictions__regression_pred=[1.0, 1e300]),
    "no distribution": garbage(predictions__classification_probs=[[0.9, 0.9, 0.9]] * 2),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_an_invalid_answer(kind: str) -> None:
    with pytest.raises(ModelOutputInvalid):
        decode_answer(GARBAGE[kind], 2, Options(), elapsed_ms=1.0).check()


@pytest.mark.parametrize("field", ["classification_probs", "regression_pred", "ensemble_weights"])
def test_an_answer_of_texts_is_refused_before_it_takes_memory(field: str) -> None:
    texts = ["x"] * 2000 + ["y" * 5000]  # as an array 40 MB or more, of an answer of 15 kB
    content = garbage(**{f"predictions__{field}": texts})
    tracemalloc.start()
    try:
        with pytest.raises(ModelOutputInvalid):
            decode_answer(content, 2, Options(), elapsed_ms=1.0)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_answer_that_garbage_is_made_of_is_good() -> None:
    decode_answer(garbage(), 2, Options(), elapsed_ms=1.0).check()


async def test_garbage_from_the_service_reaches_nobody(old: OldService) -> None:
    old.behave = lambda received: response(
        json.dumps({**answer_for(received), "predictions": {"regression_pred": "hunter2"}}).encode()
    )
    with pytest.raises(ModelOutputInvalid) as caught:
        await ask(old)
    assert "hunter2" not in caught.value.detail


async def test_an_answer_that_never_ends_is_cut_off(old: OldService) -> None:
    old.behave = always(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400000\r\n" + b" " * (1 << 22))
    with pytest.raises(ModelOutputInvalid, match="too large"):
        await ask(old)


async def test_a_compressed_answer_is_not_inflated(old: OldService) -> None:
    old.behave = always(response(b"\x1f\x8b bomb", "200 OK", "Content-Encoding: gzip"))
    with pytest.raises(ModelOutputInvalid, match="compressed"):
        await ask(old)
    assert old.received[0].headers["accept-encoding"] == "identity"


# Errors of the service.

STATUSES = {
    **dict.fromkeys((400, 413, 415, 422, 500), ModelFailed),
    **dict.fromkeys((201, 204, 301, 302, 307, 401, 403, 404, 405, 418, 429, 502, 503, 504, 599), Unavailable),
}


@pytest.mark.parametrize("status", STATUSES)
async def test_an_error_of_the_service_becomes_ours_and_is_not_quoted(old: OldService, status: int) -> None:
    old.behave = always(response(SECRETS_OF_THEIRS if status != 204 else b"", f"{status} Hunter2", "Retry-After: 3600"))
    with pytest.raises(ServingError) as caught:
        await ask(old)
    assert type(caught.value) is STATUSES[status]
    assert not {"hunter2", "Traceback", str(status)} & set(caught.value.detail.split())


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"", ReplicaLost),
        (b"SSH-2.0-OpenSSH_9.2\r\n", ReplicaLost),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\nConnection: close\r\n\r\n{", ReplicaLost),
        (b"HTTP/1.1 200 OK\r\nA: " + b"x" * 200_000, ReplicaLost),
    ],
    ids=["hangs up", "another protocol", "torn", "giant header"],
)
async def test_a_broken_connection_is_a_lost_replica(old: OldService, reply: bytes, error: type[ServingError]) -> None:
    old.behave = always(reply)
    with pytest.raises(error):
        await ask(old)


async def test_nobody_listening_is_not_ready() -> None:
    async with OldService() as gone:
        url = gone.url
    async with running(url) as backend:
        with pytest.raises(NotReady):
            await backend.predict(call(1.0))


def failures(kind: type[Exception]) -> list[type[Exception]]:
    return [kind, *(deeper for below in kind.__subclasses__() for deeper in failures(below))]


@pytest.mark.parametrize("kind", failures(httpx.HTTPError))
def test_every_failure_of_the_http_library_is_translated(kind: type[httpx.HTTPError]) -> None:
    error = httpx.HTTPStatusError("", request=None, response=None) if kind is httpx.HTTPStatusError else kind("hunter2")  # type: ignore[arg-type]
    with pytest.raises(ServingError) as caught, remote._translated():
        raise error
    assert "hunter2" not in caught.value.detail


# Time and room.


async def test_a_hanging_service_is_left_at_the_limit(old: OldService) -> None:
    old.behave = always(None)
    with pytest.raises(Unavailable, match="in time"):
        await ask(old, timeout_s=A_MOMENT)


async def test_a_callers_nearer_deadline_is_its_own_and_says_nothing_of_the_service(old: OldService) -> None:
    async with running(old.url) as backend:
        await backend.predict(call(1.0))
        old.behave = always(None)
        for _ in range(5):
            with pytest.raises(DeadlineExceeded):
                await backend.predict(call(1.0, within_s=0.02))
        assert backend.status().ready


async def test_an_answer_byte_by_byte_is_left_at_the_limit(old: OldService) -> None:
    old.dripping = True
    with pytest.raises(Unavailable, match="in time"):
        await ask(old, timeout_s=A_MOMENT)


async def test_at_most_sixteen_connections_and_a_bounded_queue(old: OldService) -> None:
    old.behave = always(None)
    async with running(old.url, timeout_s=MINUTE, max_queued_windows=128) as backend:
        waiting = [asyncio.create_task(backend.predict(call(*range(8)))) for _ in range(16)]
        await until(lambda: len(old.received) == 16)
        waiting += [asyncio.create_task(backend.predict(call(*range(8)))) for _ in range(16)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await backend.predict(call(1.0))
        assert old.most_connections == 16
        assert len(old.received) == 16
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await until(lambda: old.open_connections == 0)  # a caller who leaves takes the connection along
        old.behave = OldService().behave
        assert (await backend.predict(call(7.0))).prediction.regression_pred.tolist() == [7.0]


async def test_callers_who_left_a_hanging_service_leave_it_usable(old: OldService) -> None:
    old.behave = always(None)
    async with running(old.url, timeout_s=A_MOMENT) as backend:
        for _ in range(4):
            outcomes = await asyncio.gather(
                *(backend.predict(call(float(n))) for n in range(40)), return_exceptions=True
            )
            assert {type(outcome) for outcome in outcomes} == {Unavailable}
    old.behave = OldService().behave
    async with running(old.url) as backend:
        assert len(await asyncio.gather(*(backend.predict(call(float(n))) for n in range(40)))) == 40


# What must not travel.


async def test_a_redirect_is_not_followed(old: OldService) -> None:
    async with OldService() as canary:
        old.behave = always(response(b"", "307 Temporary Redirect", f"Location: {canary.url}/ray-serve/predict"))
        with pytest.raises(Unavailable):
            await ask(old, token=lambda: b"their-token")
        assert canary.received == []


async def test_the_proxy_of_the_environment_is_not_used(old: OldService, monkeypatch: pytest.MonkeyPatch) -> None:
    async with OldService() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        await ask(old)
        assert proxy.received == []


async def test_a_cookie_is_not_sent_back(old: OldService) -> None:
    old.behave = lambda received: response(json.dumps(answer_for(received)).encode(), "200 OK", "Set-Cookie: who=desk")
    async with running(old.url) as backend:
        await backend.predict(call(1.0))
        await backend.predict(call(1.0))
    assert len(old.received) == 2
    assert not any("cookie" in received.headers for received in old.received)


async def test_the_token_is_read_whenever_it_is_needed(old: OldService) -> None:
    tokens = iter([b"first", b"second"])
    async with running(old.url, token=lambda: next(tokens)) as backend:
        await backend.predict(call(1.0))
        await backend.predict(call(1.0))
    assert [received.headers["authorization"] for received in old.received] == ["Bearer first", "Bearer second"]


async def test_without_its_token_nothing_is_sent(old: OldService) -> None:
    def unreadable() -> bytes:
        raise ValueError("the secret file can be opened by others")

    with pytest.raises(NotReady):
        await ask(old, token=unreadable)
    assert old.received == []


# The address.


async def resolved(url: str, *rounds: list[str] | OSError) -> tuple[RemoteBackend, list[tuple[str, int]]]:
    """A started backend whose resolver gives one round after another, and what the resolver was asked."""
    questions: list[tuple[str, int]] = []

    async def resolve(host: str, port: int) -> list[str]:
        questions.append((host, port))
        found = rounds[min(len(questions), len(rounds)) - 1]
        if isinstance(found, OSError):
            raise found
        return found

    backend = RemoteBackend(url, resolve=resolve, timeout_s=5.0)
    await backend.start()
    await until(lambda: backend.status().reason != "resolving")
    return backend, questions


async def test_a_name_is_resolved_once_and_kept_in_the_host_header(old: OldService) -> None:
    backend, questions = await resolved(f"http://old.example:{old.port}", ["127.0.0.1"], ["127.0.0.9"])
    for _ in range(3):
        await backend.predict(call(1.0))
    await backend.stop()
    assert questions == [("old.example", old.port)]
    assert {received.headers["host"] for received in old.received} == {f"old.example:{old.port}"}


async def test_the_next_address_is_tried_when_one_does_not_listen(old: OldService) -> None:
    backend, _ = await resolved(f"http://old.example:{old.port}", ["127.0.0.9", "127.0.0.1"])
    with pytest.raises(NotReady):
        await backend.predict(call(1.0))
    assert (await backend.predict(call(1.0))).prediction.regression_pred.tolist() == [1.0]
    await backend.stop()


@pytest.mark.parametrize("address", ["169.254.169.254", "fe80::1", "::ffff:169.254.169.254", "0.0.0.0", "224.0.0.1"])
async def test_an_address_that_no_service_has_is_refused(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(ValueError, match="link-local"):
        RemoteBackend(f"http://{host}:80")
    backend, _ = await resolved("http://old.example", [address])
    with pytest.raises(NotReady):
        await backend.predict(call(1.0))
    assert (backend.status().ready, backend.status().reason) == (False, "address-refused")
    await backend.stop()


async def test_a_name_that_does_not_resolve_is_tried_again(old: OldService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_BACKOFF_S", 0.0)
    backend, _ = await resolved(f"http://old.example:{old.port}", OSError("no such name"), ["127.0.0.1"])
    await until(lambda: backend.status().reason == "untried")
    await backend.predict(call(1.0))
    await backend.stop()


async def test_stopping_while_the_name_does_not_resolve(old: OldService) -> None:
    backend, _ = await resolved("http://old.example", OSError("no such name"))
    assert backend.status().reason == "unresolved"
    await backend.stop()


# Health.


async def test_ready_after_the_first_answer(old: OldService) -> None:
    async with running(old.url) as backend:
        well, old.behave = old.behave, always(response(b"", "500 Oh"))
        with pytest.raises(ModelFailed):
            await backend.predict(call(1.0))
        status = backend.status()
        assert (status.ready, status.reason, status.detail) == (False, "untried", {"last_http_status": 500})
        old.behave = well
        await backend.predict(call(1.0))
        assert (backend.status().ready, backend.status().reason) == (True, "ok")
        assert (await backend.stats())["gateway"]["windows_total"] == 2


async def test_three_refusals_of_the_service_open_its_breaker_and_it_is_asked_no_more(old: OldService) -> None:
    async with running(old.url) as backend:
        arm = Guarded(backend, clock=backend._clock)
        await arm.predict(call(1.0))
        await asyncio.sleep(SILENCE_S)
        well, old.behave = old.behave, always(response(b"", "503 Away"))
        for _ in range(3):
            with pytest.raises(Unavailable):
                await arm.predict(call(1.0))
        assert (arm.status().ready, arm.status().reason) == (False, "unavailable")
        asked = len(old.received)
        with pytest.raises(Unavailable, match="asked again when it answers a probe"):
            await arm.predict(call(1.0))
        assert len(old.received) == asked
        old.behave = well
        await arm.probe(call(1.0))
        assert arm.status().ready


async def test_a_version_is_not_known_here(old: OldService) -> None:
    async with running(old.url) as backend:
        with pytest.raises(ModelNotFound):
            await backend.predict(call(1.0, version="2"))


# TLS.


def certified(folder: Path, name: str) -> tuple[ssl.SSLContext, Path]:
    """A server's side of TLS for one name, and the file of the certificate that a client must trust for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names: list[x509.GeneralName] = [x509.DNSName(name), x509.IPAddress(ip_address("127.0.0.9"))]
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(hours=1))
        .not_valid_after(datetime.now(UTC) + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    ca_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    ca_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    key_file.write_bytes(key.private_bytes(*pem))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(ca_file, key_file)
    return context, ca_file


@pytest.mark.parametrize(("certified_name", "is_answered"), [("old.example", True), ("other.example", False)])
async def test_the_certificate_must_be_the_names_though_the_address_is_pinned(
    tmp_path: Path, certified_name: str, is_answered: bool
) -> None:
    tls, ca_file = certified(tmp_path, certified_name)

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    async with (
        OldService(tls) as old,
        running(f"https://old.example:{old.port}", ca_file=ca_file, resolve=resolve) as backend,
    ):
        await until(lambda: backend.status().reason == "untried")
        if is_answered:
            await backend.predict(call(1.0))
        else:
            with pytest.raises(NotReady):
                await backend.predict(call(1.0))
        assert bool(old.received) is is_answered


async def test_a_stranger_to_the_public_certificates_is_not_asked(tmp_path: Path) -> None:
    tls, _ = certified(tmp_path, "old.example")
    async with OldService(tls) as old:
        with pytest.raises(NotReady):
            await ask(old)
        assert old.received == []


def test_certificates_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for file in (tmp_path / "none.pem", tmp_path / "empty.pem"):
        with pytest.raises(ValueError, match="cannot be read"):
            RemoteBackend("https://old.example", ca_file=file)


# Behind the gateway.


async def test_what_is_not_told_is_null_for_the_caller_and_openapi_says_so(
    old: OldService, make_gateway: MakeGateway
) -> None:
    old.behave = without("uncertainty", "aleatoric", "epistemic", "predictive_entropy")
    async with make_gateway(backends=[RemoteBackend(old.url)]) as gateway:
        reply = await gateway.predict(query="?return_features=true")
        schemas = (await gateway.client.get("/openapi.json")).json()["components"]["schemas"]
    assert reply.status_code == 200
    answer = reply.json()
    assert answer["uncertainty"] == {
        "regression_uncertainty": [1.0],
        "aleatoric": None,
        "epistemic": None,
        "predictive_entropy": None,
    }
    assert (answer["predictions"]["features"], answer["model_name"], answer["model_version"]) == (None, None, None)
    assert (answer["backend"], reply.headers["X-Served-By"]) == ("legacy", "legacy")
    for schema, names in {
        "Uncertainty": ["aleatoric", "epistemic", "predictive_entropy"],
        "Predictions": ["ensemble_weights", "features"],
        "PredictionResponse": ["uncertainty", "model_name", "model_version"],
    }.items():
        for name in names:
            described = schemas[schema]["properties"][name]
            assert {"type": "null"} in described["anyOf"]
            assert "remote legacy" in described["description"]


async def test_nothing_of_the_caller_reaches_the_service_but_windows_and_flags(
    old: OldService, make_gateway: MakeGateway
) -> None:
    theirs = {"X-Request-Id": "order-17", "X-Request-Timeout-Ms": "1500", "Cookie": "a=b", "Traceparent": "00-1-2-3"}
    async with make_gateway(backends=[RemoteBackend(old.url, token=lambda: b"their-token")]) as gateway:
        token = gateway.token()
        reply = await gateway.client.post(
            "/ray-serve/predict",
            content=windows(3.0).tobytes(),
            headers={"Content-Type": "application/octet-stream", "Authorization": f"Bearer {token}", **theirs},
        )
    assert reply.json()["predictions"]["regression_pred"] == [3.0]
    own = {"host", "user-agent", "accept", "accept-encoding", "content-type", "content-length", "connection"}
    assert all(set(received.headers) == own | {"authorization"} for received in old.received)
    assert {received.headers["authorization"] for received in old.received} == {"Bearer their-token"}


@pytest.mark.parametrize(
    ("reply", "status", "code"),
    [
        (response(SECRETS_OF_THEIRS, "500 Hunter2", "X-Hunter2: 1"), 502, "model-failed"),
        (response(SECRETS_OF_THEIRS, "401 Hunter2", "WWW-Authenticate: Basic"), 503, "unavailable"),
        (response(SECRETS_OF_THEIRS, "422 Hunter2"), 502, "model-failed"),
        (response(SECRETS_OF_THEIRS), 502, "model-output-invalid"),
        (b"hunter2 speaks no HTTP\r\n\r\n", 503, "replica-lost"),
    ],
)
async def test_an_error_of_the_service_is_a_problem_of_ours(
    old: OldService, make_gateway: MakeGateway, reply: bytes, status: int, code: str
) -> None:
    old.behave = always(reply)
    async with make_gateway(backends=[RemoteBackend(old.url)]) as gateway:
        refusal = await gateway.predict()
    assert (refusal.status_code, refusal.headers["Content-Type"]) == (status, "application/problem+json")
    assert refusal.json()["type"].endswith(code)
    assert "hunter2" not in (refusal.text + str(refusal.headers)).lower()
    assert "Traceback" not in refusal.text
    assert "hunter2" not in gateway.log.getvalue().decode().lower()


async def test_the_service_makes_good_what_ray_serve_fails_at(old: OldService, make_gateway: MakeGateway) -> None:
    ray_serve = FakeBackend("ray_serve")
    ray_serve.error = ModelFailed("it raised")
    async with make_gateway(backends=[ray_serve, RemoteBackend(old.url)]) as gateway:
        reply = await gateway.predict()
    assert (reply.status_code, reply.headers["X-Served-By"]) == (200, "legacy")
    assert reply.headers["X-Fallback"] == "model-failed"
