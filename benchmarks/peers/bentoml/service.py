"""The service that `server.py` starts."""

from __future__ import annotations

from typing import Annotated, Any

import bentoml
import numpy as np
from bentoml.validators import DType, Shape

from benchmarks.peers.answer import MAX_BATCH_SIZE, answer_columns
from benchmarks.peers.served import ServedModel
from serve_app.contract import Options

Windows = Annotated[np.ndarray, Shape((-1, 50, 60)), DType("float32")]


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Predictor:
    """Batches along the first axis, the windows; a batch's answer is a list with one object per window."""

    def __init__(self) -> None:
        self.engine = ServedModel.from_environment().load()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE)
    def predict(self, data: Windows) -> list[dict[str, Any]]:
        columns = answer_columns(self.engine.predict(data, Options()))
        names, lists = columns.keys(), [column.tolist() for column in columns.values()]
        return [dict(zip(names, row, strict=True)) for row in zip(*lists, strict=True)]
