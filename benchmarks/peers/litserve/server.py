"""LitServe: one worker that batches whole requests, in front of it one HTTP process."""

from __future__ import annotations

import os

import litserve
import numpy as np

from benchmarks.peers.answer import MAX_BATCH_SIZE, answer_columns
from benchmarks.peers.served import ServedModel, argument_parser
from serve_app.contract import FloatArray, Options, Prediction


class Predictor(litserve.LitAPI):
    """A request holds B windows, so a batch is one concatenation, and its answer is cut where requests meet."""

    def setup(self, device: str) -> None:
        self.engine = ServedModel.from_environment().load()

    def decode_request(self, request):
        return np.asarray(request["data"], np.float32)

    def batch(self, inputs: list[FloatArray]) -> tuple[FloatArray, list[int]]:
        return np.concatenate(inputs), [len(windows) for windows in inputs]

    def predict(self, batch: tuple[FloatArray, list[int]]) -> tuple[Prediction, list[int]]:
        windows, sizes = batch
        return self.engine.predict(windows, Options()), sizes

    def unbatch(self, output: tuple[Prediction, list[int]]) -> list[Prediction]:
        prediction, sizes = output
        stops = np.cumsum(sizes)
        return [prediction.rows(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]

    def encode_response(self, output):
        return {name: column.tolist() for name, column in answer_columns(output).items()}


def main() -> None:
    arguments = argument_parser(__doc__).parse_args()
    os.environ.update(ServedModel.from_arguments(arguments).to_environment())
    api = Predictor(max_batch_size=MAX_BATCH_SIZE)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=arguments.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
