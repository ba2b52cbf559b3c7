"""Whatever comes: an answer, or a refusal in the protocol's form; never a fault of ours."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib

import httpx
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.auth import mint_token
from app.backends.fake import FakeBackend
from app.main import create_app
from app.settings import Settings
from tests.app.under_test import NOW, some_windows

_GOOD = json.dumps(
    {
        "id": "a",
        "inputs": [
            {"name": "windows", "datatype": "FP32", "shape": [1, 50, 60], "parameters": {"binary_data_size": 12000}}
        ],
        "outputs": [{"name": "features", "parameters": {"binary_data": True}}],
        "parameters": {"timeout": 500000},
    }
).encode()
_VALUES = some_windows(1).tobytes()

_BODIES = st.one_of(
    st.binary(max_size=300),
    st.just(_GOOD + _VALUES),
    st.tuples(st.integers(0, len(_GOOD)), st.binary(max_size=4)).map(
        lambda damage: _GOOD[: damage[0]] + damage[1] + _GOOD[damage[0] :] + _VALUES
    ),
    st.text(max_size=100).map(lambda text: json.dumps({"inputs": text, "id": text}).encode()),
)
_CODINGS = st.sampled_from(["", "identity", "gzip", "deflate", "br"])
_ENCODERS = {"gzip": gzip.compress, "deflate": zlib.compress}
_TYPES = st.sampled_from(["", "application/json", "application/octet-stream", "text/plain", "é", ";"])
_LENGTHS = st.sampled_from(["", "0", "1", str(len(_GOOD)), "12000", "99999999", "-1", "x"])
_PATHS = st.sampled_from(
    ["cnn_lstm/infer", "cnn_lstm/versions/1/infer", "cnn_lstm/versions/%00/infer", "x%2Fy/infer", "/infer", "cnn_lstm"]
)


def test_no_request_is_answered_by_a_fault(settings: Settings) -> None:
    app = create_app(
        settings.with_overrides(rate_limit=1_000_000_000),
        backends=[FakeBackend("ray_serve"), FakeBackend("legacy")],
        wall_clock=lambda: NOW,
    )
    token = mint_token(
        settings.signing_secret(),
        subject="desk",
        scopes=["predict"],
        issuer=settings.jwt_issuer,
        audience=settings.jwt_audience,
        lifetime_s=3600,
        now=NOW,
    )
    statuses = set()

    with asyncio.Runner() as runner:
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")

        @hypothesis_settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(_PATHS, _BODIES, _CODINGS, st.booleans(), _TYPES, _LENGTHS)
        @example("cnn_lstm/infer", _GOOD + _VALUES, "gzip", True, "application/json", str(len(_GOOD)))
        @example("cnn_lstm/infer", _GOOD + _VALUES, "br", False, "", "0")
        @example("cnn_lstm/infer", _GOOD + _VALUES, "", False, "", "1")
        @example("other/infer", _GOOD + _VALUES, "", False, "", "1")
        def ask(path: str, body: bytes, coding: str, is_encoded: bool, content_type: str, length: str) -> None:
            headers = [
                ("Authorization", f"Bearer {token}"),
                *(
                    (name, value)
                    for name, value in [("Content-Encoding", coding), ("Content-Type", content_type)]
                    if value
                ),
                *([("Inference-Header-Content-Length", length)] if length else []),
            ]
            encode = _ENCODERS.get(coding) if is_encoded else None
            response = runner.run(
                client.post(
                    f"/v2/models/{path}",
                    content=encode(body) if encode else body,
                    headers=[(name.encode(), value.encode()) for name, value in headers],
                )
            )
            statuses.add(response.status_code)
            if response.status_code != 200:
                assert response.status_code < 500
                assert list(response.json()) == ["error"]
                assert len(response.content) <= 4096

        ask()
        runner.run(client.aclose())
    assert statuses >= {200, 400, 404, 415}
