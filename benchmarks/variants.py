"""Models with random weights for load tests: a known amount of work, and nothing learned.

python -m benchmarks.variants DIR      publishes each of them into the registry DIR, where it is missing
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from benchmarks.peers.catalogue import ROOT, Model
from serve_app.artefacts import CARD, scaler_fingerprint
from serve_app.features import FEATURE_NAMES, fingerprint
from serve_app.model import HybridModel, ModelConfig
from serve_app.registry import CONFIG, WEIGHTS, Registry

SEED = 1
REGISTRY = ROOT / ".bench" / "variants"  # where `about_1ms` keeps its own

# 519,489 parameters. Where the shipped model took 0.28 ms per window at batch 32 on one thread, this one took 1.0.
ABOUT_1MS = ModelConfig(channels=64, width=96, lstm_hidden=128, attention_heads=4, head_hidden=64)
VARIANTS: Mapping[str, ModelConfig] = {"about_1ms": ABOUT_1MS}


def about_1ms(engine: str) -> Model:
    """The variant of about 1 ms per window, published first where it is not there yet."""
    publish_missing(REGISTRY)
    return Model(registry=REGISTRY, name="about_1ms", engine=engine)


def publish_missing(root: Path) -> list[str]:
    """Publish the variants that a registry lacks; returns their names.

    Args:
        root: Root of the registry; made when missing.
    """
    root.mkdir(parents=True, exist_ok=True)
    registry = Registry(root)
    missing = [name for name in VARIANTS if not (root / name).is_dir()]
    for name in missing:
        publish(registry, name, VARIANTS[name])
    return missing


def publish(registry: Registry, name: str, config: ModelConfig) -> None:
    """Seal a model of that config with random weights as a version of its own, labelled as untrained."""
    model = random_model(config)
    weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    registry.publish(
        name,
        files={
            WEIGHTS: safetensors.torch.save(weights),
            CONFIG: json.dumps(config.to_dict(), indent=2).encode() + b"\n",
            CARD: card(name, model).encode(),
        },
        feature_names=FEATURE_NAMES,
        features_fingerprint=fingerprint(),
        scaler_fingerprint=scaler_fingerprint(model),
        training=None,
    )


def random_model(config: ModelConfig) -> HybridModel:
    """Every weight drawn anew with deviation 0.1, also those that training starts from at zero."""
    model = HybridModel(config)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def card(name: str, model: HybridModel) -> str:
    """The model card: that there is nothing to be learned from its answers."""
    return (
        f"# {name}\n\nUntrained: {model.n_params:,} random weights (seed {SEED}), for load tests only. "
        "Its answers mean nothing and must reach nobody who could act on them.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="root of the registry")
    folder = parser.parse_args().folder
    for name in publish_missing(folder):
        print(f"{name} version 1 in {folder}, {random_model(VARIANTS[name]).n_params:,} parameters, untrained")


if __name__ == "__main__":
    main()
