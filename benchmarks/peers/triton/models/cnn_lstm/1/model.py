"""Triton's Python backend around our engine: one forward pass for all requests of a batch."""

from __future__ import annotations

import numpy as np
import triton_python_backend_utils as pb_utils  # Triton brings it

from benchmarks.peers.answer import answer_columns
from benchmarks.peers.served import ServedModel
from serve_app.contract import Options


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self.engine = ServedModel.from_environment().load()

    def execute(self, requests: list) -> list:
        inputs = [pb_utils.get_input_tensor_by_name(request, "windows").as_numpy() for request in requests]
        windows = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
        columns = answer_columns(self.engine.predict(windows, Options()))
        responses, start = [], 0
        for array in inputs:
            stop = start + len(array)
            tensors = [pb_utils.Tensor(name, column[start:stop]) for name, column in columns.items()]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
            start = stop
        return responses
