"""The variants can be served as any model can, and nobody can take them for trained ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.variants import VARIANTS, publish_missing
from serve_app.contract import Options
from serve_app.engine import load_engine
from serve_app.registry import Registry


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("variants") / "registry"
    assert publish_missing(root) == list(VARIANTS)
    return root


def test_a_variant_is_served_from_its_registry(root: Path) -> None:
    engine = load_engine(Registry(root).load("about_1ms"))
    assert engine.n_params == 519_489
    windows = np.random.default_rng(0).standard_normal((3, 50, 60), dtype=np.float32)
    answer = engine.predict(windows, Options())
    answer.check()
    assert np.ptp(answer.regression_pred) > 0


def test_it_says_that_it_is_untrained(root: Path) -> None:
    assert "Untrained" in (root / "about_1ms" / "1" / "CARD.md").read_text()
    assert Registry(root).load("about_1ms").manifest.training is None


def test_what_is_there_is_not_published_again(root: Path) -> None:
    assert publish_missing(root) == []
    assert [path.name for path in (root / "about_1ms").iterdir() if path.is_dir()] == ["1"]
