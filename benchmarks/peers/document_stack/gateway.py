"""The design document's gateway as written, mended only where it cannot run; each mend says why."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, HTTPException
from pydantic import BaseModel
from ray.serve.handle import DeploymentHandle


class PredictionRequest(BaseModel):
    data: list
    return_uncertainty: bool = True
    use_ensemble: bool = True


class PredictionResponse(BaseModel):
    predictions: dict
    processing_time_ms: float
    uncertainty: dict | None = None  # mended: the type refused the None that it defaults to


def create_app(cnn_lstm_handle: DeploymentHandle) -> FastAPI:
    """The document's routes in an application of their own."""
    router = APIRouter(prefix="/ray-serve", tags=["ray-serve"])

    @router.post("/predict", response_model=PredictionResponse)
    async def predict(request: PredictionRequest) -> PredictionResponse:
        try:
            input_data = np.array(request.data, dtype=np.float32)
            result = await cnn_lstm_handle.remote(input_data)
            return PredictionResponse(
                predictions=result["predictions"],
                processing_time_ms=result["processing_time_ms"],
                uncertainty=result.get("uncertainty"),
            )
        except Exception as e:
            raise HTTPException(status_code=500, detail=str(e)) from e

    @router.get("/stats")
    async def get_deployment_stats() -> dict[str, Any]:
        try:
            return await cnn_lstm_handle.get_stats.remote()
        except Exception as e:
            raise HTTPException(status_code=500, detail=str(e)) from e

    app = FastAPI()
    app.include_router(router)
    return app
