"""The catalogue names every peer that there is, with a program, pins and a way to ask it."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.peers.answer import ANSWERED, MAX_BATCH_SIZE
from benchmarks.peers.catalogue import PEERS, ROOT, Model, Peer

FOLDER = ROOT / "benchmarks" / "peers"
peers = pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS.keys())


def program(peer: Peer) -> Path:
    return Path(next(word for word in peer.command(9000, Model()) if word.endswith(".py")))


def test_every_folder_with_a_program_is_in_the_catalogue() -> None:
    assert {path.parent for path in FOLDER.glob("*/server.py")} == {program(peer).parent for peer in PEERS.values()}


@peers
def test_a_command_names_port_registry_model_and_engine(peer: Peer) -> None:
    words = peer.command(9000, Model(registry=Path("/registry"), name="other", engine="noop"))
    named = dict(pairwise(words))
    assert (named["--port"], named["--registry"], named["--model"], named["--engine"]) == (
        "9000",
        "/registry",
        "other",
        "noop",
    )


@peers
def test_a_peer_finds_our_engine(peer: Peer) -> None:
    assert (Path(peer.environment["PYTHONPATH"]) / "serve_app").is_dir()


@peers
def test_every_peer_takes_json(peer: Peer) -> None:
    assert "json" in peer.lanes


@pytest.mark.parametrize("folder", ["triton", "litserve", "bentoml", "mosec"])
def test_what_is_installed_is_pinned(folder: str) -> None:
    files = [FOLDER / folder / "requirements.txt", FOLDER / "engine-requirements.txt"]
    lines = [line for file in files for line in file.read_text().splitlines() if not line.startswith("#")]
    assert lines
    assert all(re.match(r"[\w.-]+==[\w.]+(  #.*)?$", line) for line in lines), lines


def test_an_engine_is_the_same_in_peers_and_at_home() -> None:
    ours = set(re.findall(r"[\w-]+==[\w.]+", (ROOT / "pyproject.toml").read_text()))
    lines = (FOLDER / "engine-requirements.txt").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} <= ours


def test_triton_answers_what_the_others_do_in_batches_of_the_same_size() -> None:
    config = (FOLDER / "triton" / "models" / "cnn_lstm" / "config.pbtxt").read_text()
    assert tuple(re.findall(r'name: "(\w+)"', config)[2:]) == ANSWERED
    assert f"max_batch_size: {MAX_BATCH_SIZE}\n" in config
