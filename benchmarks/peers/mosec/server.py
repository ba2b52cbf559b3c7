"""mosec: a Rust front, behind it one Python worker per route that batches whole requests.

One way of reading bodies per route; only one of them is asked at a time, the other workers sleep.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import mosec
import numpy as np
import orjson

from benchmarks.peers.answer import MAX_BATCH_SIZE, answer_columns
from benchmarks.peers.served import ServedModel, argument_parser
from serve_app.contract import N_FEATURES, N_STEPS, FloatArray, Options, Prediction


class JsonPredictor(mosec.Worker):
    """JSON in and out, read and written by mosec's own defaults."""

    def __init__(self) -> None:
        self.engine = ServedModel.from_environment().load()

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        windows = [np.asarray(request["data"], np.float32) for request in data]
        columns = [answer_columns(prediction) for prediction in self.predict(windows)]
        return [{name: column.tolist() for name, column in answer.items()} for answer in columns]

    def predict(self, requests: list[FloatArray]) -> list[Prediction]:
        """Answer the windows of all requests in one pass, then cut the answer where requests meet."""
        prediction = self.engine.predict(np.concatenate(requests), Options())
        stops = np.cumsum([len(windows) for windows in requests])
        return [prediction.rows(stop - len(windows), stop) for windows, stop in zip(requests, stops, strict=True)]


class BinaryPredictor(JsonPredictor):
    """Raw little-endian float32 in; JSON out by orjson."""

    def deserialize(self, data: bytes) -> FloatArray:
        return np.frombuffer(data, "<f4").reshape(-1, N_FEATURES, N_STEPS)

    def forward(self, data: list[FloatArray]) -> list[Prediction]:
        return self.predict(data)

    def serialize(self, data: Prediction) -> bytes:
        return orjson.dumps(answer_columns(data), option=orjson.OPT_SERIALIZE_NUMPY)


class OrjsonPredictor(BinaryPredictor):
    """JSON in and out by orjson: what a user of mosec who looks for speed changes first."""

    def deserialize(self, data: bytes) -> FloatArray:
        return np.asarray(orjson.loads(data)["data"], np.float32)


ROUTES = {"/json": JsonPredictor, "/json-orjson": OrjsonPredictor, "/binary": BinaryPredictor}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--wait-ms", type=int, default=1, help="what a batch waits to be filled; mosec's least is 1")
    arguments = parser.parse_args()
    os.environ.update(ServedModel.from_arguments(arguments).to_environment())
    # mosec reads the command line by itself, here and in its workers. Its 3 s of time are refusals when many large
    # requests wait on a slow machine; with more they count as the latency that they are.
    sys.argv[1:] = ["--address=127.0.0.1", f"--port={arguments.port}", "--timeout=10000", "--log-level=warning"]
    server = mosec.Server()
    for route, worker in ROUTES.items():
        server.append_worker(worker, max_batch_size=MAX_BATCH_SIZE, max_wait_time=arguments.wait_ms, route=route)
    server.run()


if __name__ == "__main__":
    main()
