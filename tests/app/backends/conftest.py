"""Imports Ray once, with its own warnings let pass: in this project's tests a warning is an error."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401
