"""What every peer serves: one of our engines on a model of a registry, named on the peer's command line.

This runs in each peer's own environment, so it needs no more than the engine does.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from serve_app.engine import WITHOUT_ARTEFACT, Engine, load_engine
from serve_app.registry import Registry

_REGISTRY, _MODEL, _ENGINE = "PEER_REGISTRY", "PEER_MODEL", "PEER_ENGINE"


@dataclass(frozen=True)
class ServedModel:
    """Which engine answers, on which model.

    Attributes:
        registry: Root of the registry.
        model: Name in the registry; its newest version is served.
        engine: Name in our table of engines.
    """

    registry: Path
    model: str
    engine: str

    def load(self) -> Engine:
        """The engine, warm, with one thread of its own as every replica of ours has."""
        artefact = None if self.engine in WITHOUT_ARTEFACT else Registry(self.registry).load(self.model)
        engine = load_engine(artefact, engine=self.engine, threads=1)
        engine.warm_up()
        return engine

    def to_environment(self) -> dict[str, str]:
        """Variables that carry it into worker processes which a framework starts by itself."""
        return {_REGISTRY: str(self.registry.resolve()), _MODEL: self.model, _ENGINE: self.engine}

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> ServedModel:
        """What a command line of `argument_parser` names."""
        return cls(arguments.registry, arguments.model, arguments.engine)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ServedModel:
        """The way back from `to_environment`."""
        return cls(Path(environment[_REGISTRY]), environment[_MODEL], environment[_ENGINE])


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that every peer has."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--registry", type=Path, default=Path("models"))
    parser.add_argument("--model", default="cnn_lstm")
    parser.add_argument("--engine", default="torch")
    return parser
