"""Sluice beside its peers on one machine: what is served, how fast, and what it costs.

systems (sluice, peers) ─► rounds: who runs when ─► session: start, verify, measure, end ─► results.json ─► report
                                                       │  wrk: closed loop      cpu: from /proc
                                                       └─ open_loop             bare engine, one connection
"""
