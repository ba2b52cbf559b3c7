"""Evil and broken versions in the registry of the real legacy arm: each is refused, and the old version serves on."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from app.backends.base import Call
from app.backends.in_process import InProcessBackend, RegistrySource
from serve_app.artefacts import import_folder
from serve_app.contract import NotReady, Options
from serve_app.registry import Registry, open_registry
from serve_app.signing import generate
from tests.serve_app.model_files import random_state, renamed_tensors, system_call, wrong_shapes, zip_bomb

NAME = "cnn_lstm"
SHIPPED = Path(__file__).parents[3] / "models" / NAME / "1"
WINDOWS = np.random.default_rng(4).standard_normal((2, 50, 60), dtype=np.float32)


class House:
    """A registry with one good signed version, its keys, and the arm that serves it."""

    def __init__(self, folder: Path) -> None:
        self.models = folder / "models"
        generate(folder / "registry.key", folder / "registry.pub")
        self.publisher = open_registry(
            self.models, key_file=folder / "registry.pub", signing_key_file=folder / "registry.key"
        )
        good = import_folder(SHIPPED)
        self.facts = good.facts
        self.publisher.publish(NAME, files=good.files, **good.facts)
        source = RegistrySource(self.models, NAME, "1", "torch", "cpu", 1, key_file=folder / "registry.pub")
        self.arm = InProcessBackend(source)

    def publish(self, weights: bytes, registry: Registry | None = None) -> str:
        """Seal and sign bytes as they are: whoever can do so has the publisher's key or made a mistake."""
        sizes = {"channels": 4, "width": 8, "lstm_hidden": 8, "head_hidden": 8, "mc_samples": 4}
        files = {"model.safetensors": weights, "config.json": json.dumps(sizes).encode()}
        return (registry or self.publisher).publish(NAME, files=files, **self.facts)

    async def predict(self, version: str | None) -> str:
        deadline = asyncio.get_running_loop().time() + 30
        answer = await self.arm.predict(Call(WINDOWS, Options(), deadline, "r", "0" * 16, version))
        answer.prediction.check()
        return answer.prediction.model_version

    async def settled(self) -> None:
        async with asyncio.timeout(30):
            while not self.arm.status().ready or self.arm._loading:
                await asyncio.sleep(0.01)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    await house.arm.start()
    await house.settled()
    yield house
    await house.arm.stop()


def a_pickle_that_calls_the_system(house: House, canary: Path) -> str:
    return house.publish(system_call(canary))


def a_bare_pickle(house: House, canary: Path) -> str:
    return house.publish(pickle.dumps({"canary": str(canary)}))


def a_zip_bomb(house: House, canary: Path) -> str:
    return house.publish(zip_bomb(canary, unpacked_bytes=64 << 20))


def a_header_that_claims_an_exbibyte(house: House, canary: Path) -> str:
    return house.publish((1 << 60).to_bytes(8, "little") + b"{}")


def renamed(house: House, canary: Path) -> str:
    state = {name.replace("highway.bias", "highway.bais"): tensor for name, tensor in random_state().items()}
    return house.publish(safetensors.torch.save(state))


def of_wrong_shape(house: House, canary: Path) -> str:
    return house.publish(safetensors.torch.save({**random_state(), "highway.bias": random_state()["highway.weight"]}))


def truncated_after_publication(house: House, canary: Path) -> str:
    version = house.publish(safetensors.torch.save(random_state()))
    weights = house.models / NAME / version / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return version


def with_right_hashes_and_a_wrong_signature(house: House, canary: Path) -> str:
    generate(canary.with_name("other.key"), canary.with_name("other.pub"))
    intruder = open_registry(house.models, signing_key_file=canary.with_name("other.key"))
    return house.publish(safetensors.torch.save(random_state()), intruder)


def without_signature(house: House, canary: Path) -> str:
    return house.publish(safetensors.torch.save(random_state()), Registry(house.models))


EVIL: dict[Callable[[House, Path], str], str] = {
    a_pickle_that_calls_the_system: "no safetensors file",
    a_bare_pickle: "no safetensors file",
    a_zip_bomb: "no safetensors file",
    a_header_that_claims_an_exbibyte: "no safetensors file",
    renamed: "highway.bais, highway.bias",
    of_wrong_shape: "highway.bias is torch.float32",
    truncated_after_publication: "not the file that was published",
    with_right_hashes_and_a_wrong_signature: "not one of the trusted key",
    without_signature: "is not signed",
}


@pytest.mark.parametrize("evil", EVIL, ids=lambda evil: evil.__name__)
async def test_an_evil_version_is_refused_and_the_old_one_serves_on(
    house: House, tmp_path: Path, caplog: pytest.LogCaptureFixture, evil: Callable[[House, Path], str]
) -> None:
    canary = tmp_path / "canary"
    version = evil(house, canary)
    with caplog.at_level(logging.ERROR), pytest.raises(NotReady):
        await house.predict(version)
    assert await house.predict(None) == "1", "while it is tried"
    await house.settled()
    with pytest.raises(NotReady, match="damaged or of another kind"):
        await house.predict(version)
    assert EVIL[evil] in caplog.text
    assert await house.predict(None) == "1"
    assert house.arm.status().detail["versions_in_memory"] == ["1"]
    assert not canary.exists()


async def test_a_good_version_beside_it_is_loaded_and_serves(house: House) -> None:
    version = house.publish(safetensors.torch.save(random_state()))
    with pytest.raises(NotReady):
        await house.predict(version)
    await house.settled()
    assert await house.predict(version) == version
    assert await house.predict(None) == "1"


@pytest.mark.parametrize("evil", [system_call, renamed_tensors, wrong_shapes], ids=lambda evil: evil.__name__)
def test_an_evil_folder_never_becomes_a_version(house: House, tmp_path: Path, evil: Callable[[Path], bytes]) -> None:
    from serve_app.registry import ArtefactRejected

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "model.pth").write_bytes(evil(tmp_path / "canary"))
    with pytest.raises(ArtefactRejected):
        import_folder(tmp_path / "old")
    assert house.publisher.versions(NAME) == ["1"]
    assert not (tmp_path / "canary").exists()
