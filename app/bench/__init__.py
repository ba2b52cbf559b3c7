"""The load test behind `sluice bench`.

inputs ─► targets (HTTP, or the Ray Serve handle) ◄─ load: who asks when ─► report ─► picture
"""
