"""Every peer in one shape: how it is started, when it is ready, and how it is asked."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.peers import lanes
from benchmarks.peers.lanes import BYTES, JSON, OIP_BINARY, Lane

LaneName = Literal["json", "json_orjson", "binary"]

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".bench" / "peers"  # made by benchmarks/peers/setup


@dataclass(frozen=True)
class Model:
    """What a peer shall serve.

    Attributes:
        registry: Root of a model registry.
        name: Model in it; the newest version is served.
        engine: Name in our table of engines; `noop` needs no model.
    """

    registry: Path = ROOT / "models"
    name: str = "cnn_lstm"
    engine: str = "torch"


@dataclass(frozen=True)
class Peer:
    """A server to measure against.

    Attributes:
        name: Its key in `PEERS`.
        title: For tables.
        python: The interpreter of its environment.
        ready: Path that answers 200 once the model can be asked.
        lanes: Ways to ask it.
        folder: Of its program here; its name unless given.
        options: Words for its program beside the port and the model.
    """

    name: str
    title: str
    python: Path
    ready: str
    lanes: Mapping[LaneName, Lane]
    folder: str = ""
    options: tuple[str, ...] = ()

    @property
    def is_installed(self) -> bool:
        return self.python.exists()

    @property
    def environment(self) -> dict[str, str]:
        """Variables to add to its process: the tree on its path, one thread of each numeric library."""
        return {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def command(self, port: int, model: Model) -> list[str]:
        """The words that start it on 127.0.0.1 in the foreground.

        It ends with all its children on SIGTERM or SIGINT to its process group; start it in a session of its own.
        """
        server = ROOT / "benchmarks" / "peers" / (self.folder or self.name) / "server.py"
        return [
            *(str(self.python), "-P", str(server), "--port", str(port)),
            *("--registry", str(model.registry), "--model", model.name, "--engine", model.engine),
            *self.options,
        ]


_PYTHON_PEERS = ENVIRONMENTS / "python" / "bin" / "python"
_FIELD = "data"
_DOCUMENT_LANES: Mapping[LaneName, Lane] = {
    "json": Lane("/ray-serve/predict", JSON, lanes.json_body(_FIELD), lanes.from_document)
}
_MOSEC_LANES: Mapping[LaneName, Lane] = {
    "json": Lane("/json", JSON, lanes.json_body(_FIELD), lanes.from_columns),
    "json_orjson": Lane("/json-orjson", JSON, lanes.json_body(_FIELD), lanes.from_columns),
    "binary": Lane("/binary", BYTES, lanes.raw_body, lanes.from_columns),
}

_PEERS = (
    Peer(
        name="document_stack",
        title="design document's stack",
        python=Path(sys.executable),  # its pins are ours: FastAPI, Ray Serve
        ready="/ray-serve/stats",
        lanes=_DOCUMENT_LANES,
    ),
    Peer(
        name="document_stack_tuned",
        title="design document's stack, Serve tuned",
        python=Path(sys.executable),
        ready="/ray-serve/stats",
        lanes=_DOCUMENT_LANES,
        folder="document_stack",
        options=("--tuned",),
    ),
    Peer(
        name="triton",
        title="NVIDIA Triton",
        python=ENVIRONMENTS / "triton" / "bin" / "python",
        ready="/v2/models/cnn_lstm/ready",
        lanes={
            "json": Lane("/v2/models/cnn_lstm/infer", JSON, lanes.oip_json_body, lanes.from_oip_json),
            "binary": Lane("/v2/models/cnn_lstm/infer", OIP_BINARY, lanes.oip_binary_body, lanes.from_oip_binary),
        },
    ),
    Peer(
        name="litserve",
        title="LitServe",
        python=_PYTHON_PEERS,
        ready="/health",
        lanes={"json": Lane("/predict", JSON, lanes.json_body(_FIELD), lanes.from_columns)},
    ),
    Peer(
        name="bentoml",
        title="BentoML",
        python=_PYTHON_PEERS,
        ready="/readyz",
        lanes={"json": Lane("/predict", JSON, lanes.json_body(_FIELD), lanes.from_rows)},
    ),
    Peer(name="mosec", title="mosec", python=_PYTHON_PEERS, ready="/", lanes=_MOSEC_LANES),
    Peer(
        name="mosec_10ms",
        title="mosec, its default wait of 10 ms",
        python=_PYTHON_PEERS,
        ready="/",
        lanes=_MOSEC_LANES,
        folder="mosec",
        options=("--wait-ms", "10"),
    ),
)

PEERS: Mapping[str, Peer] = {peer.name: peer for peer in _PEERS}
