"""Metrics, logs and the ledger of where a request spent its time."""
