"""How often the rollout's judge is wrong, and how soon it is right, on simulated traffic and with the real code.

traffic: what the arms answer ─► study: many runs, shown to the rules ─► results.json ─► report, picture
                                   rules: the judge, a fixed-horizon test, Flagger's
"""
