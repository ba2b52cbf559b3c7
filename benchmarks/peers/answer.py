"""What every peer answers, and in which batches: the same four arrays that the design document's stack computes."""

from __future__ import annotations

from serve_app.contract import FloatArray, Prediction

ANSWERED = ("classification_probs", "regression_pred", "regression_uncertainty", "ensemble_weights")

MAX_BATCH_SIZE = 32  # requests of a batch, the document's figure; Triton counts windows


def answer_columns(prediction: Prediction) -> dict[str, FloatArray]:
    """The answered arrays of a batch, by name, B first."""
    return {name: getattr(prediction, name) for name in ANSWERED}
