"""What several workers and gateways share: one Redis, asked in one way."""
