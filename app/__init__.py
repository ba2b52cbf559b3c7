"""The gateway: HTTP, tokens, limits, rollout; everything but the model."""
