import errno
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from serve_app import features
from serve_app.registry import (
    Artefact,
    ArtefactRejected,
    NameRefused,
    Registry,
    RegistryUnavailable,
    VersionExists,
    VersionNotFound,
)

WEIGHTS = b"\x00weights" * 100
FILES = {"model.safetensors": WEIGHTS, "config.json": b'{"hidden": 8}', "CARD.md": b"# card\n", "plot.png": b"\x89PNG"}
NAME = "cnn_lstm"


def publish(registry: Registry, name: str = NAME, **changes: Any) -> str:
    facts: dict[str, Any] = {
        "files": FILES,
        "feature_names": features.FEATURE_NAMES,
        "features_fingerprint": features.fingerprint(),
        "scaler_fingerprint": "0" * 64,
        "training": {"seed": 7, "data_sha256": "1" * 64, "held_out_from": {"MSFT": "2012-12-01"}},
    }
    return registry.publish(name, **{**facts, **changes})


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models")


@pytest.fixture
def folder(tmp_path: Path, registry: Registry) -> Path:
    """The folder of the one published version."""
    return tmp_path / "models" / NAME / publish(registry)


def reseal(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    (folder / "MANIFEST.json").write_text(json.dumps({**manifest, **changes}))


def test_what_was_published_is_what_is_loaded(registry: Registry) -> None:
    version = publish(registry)
    artefact = registry.load(NAME)
    assert (artefact.name, artefact.version, artefact.config, artefact.weights) == (
        NAME,
        version,
        {"hidden": 8},
        WEIGHTS,
    )
    assert artefact.manifest.files["plot.png"].sha256 == hashlib.sha256(FILES["plot.png"]).hexdigest()
    assert artefact.manifest.training.held_out_from["MSFT"].isoformat() == "2012-12-01"
    assert registry.verify(NAME) == artefact.manifest


def test_versions_count_up_and_latest_is_the_highest_number(registry: Registry) -> None:
    for _ in range(10):
        publish(registry)
    publish(registry, version="candidate")
    assert registry.versions(NAME) == [*map(str, range(1, 11)), "candidate"]
    assert registry.resolve(NAME) == "10"
    assert registry.models() == [NAME]


def test_an_alias_wins_over_the_highest_number_and_moves_in_place(registry: Registry) -> None:
    publish(registry)
    publish(registry)
    registry.set_alias(NAME, "latest", "1")
    registry.set_alias(NAME, "stable", "1")
    registry.set_alias(NAME, "stable", "2")
    assert registry.aliases(NAME) == {"latest": "1", "stable": "2"}
    assert (registry.resolve(NAME), registry.resolve(NAME, "stable")) == ("1", "2")


def test_an_alias_needs_a_version_and_a_name_of_its_own(registry: Registry) -> None:
    publish(registry, version="candidate")
    with pytest.raises(VersionNotFound):
        registry.set_alias(NAME, "stable", "3")
    for taken in ("candidate", "12"):
        with pytest.raises(NameRefused):
            registry.set_alias(NAME, taken, "candidate")
    registry.set_alias(NAME, "stable", "candidate")
    with pytest.raises(NameRefused):
        publish(registry, version="stable")


def test_a_published_version_never_changes(registry: Registry) -> None:
    publish(registry)
    with pytest.raises(VersionExists):
        publish(registry, version="1", files={**FILES, "CARD.md": b"other"})
    assert registry.verify(NAME).files["CARD.md"].size_bytes == len(FILES["CARD.md"])


@pytest.mark.parametrize(
    "evil",
    [
        "..",
        "../other",
        "a/../b",
        "/etc",
        "a..b",
        "",
        " 1",
        "1 ",
        "1\n",
        "A",
        ".hidden",
        "a\x00",
        "%2e%2e",
        "․․",
        "a" * 65,
    ],
)
def test_a_name_that_could_leave_the_registry_is_refused(registry: Registry, folder: Path, evil: str) -> None:
    with pytest.raises(NameRefused):
        registry.load(NAME, evil)
    with pytest.raises(NameRefused):
        registry.load(evil)
    with pytest.raises(NameRefused):
        publish(registry, evil)
    with pytest.raises(ArtefactRejected, match="no file name"):
        publish(registry, files={**FILES, evil + "/x": b""})


def test_unknown_names_are_not_found(registry: Registry, folder: Path) -> None:
    with pytest.raises(VersionNotFound):
        registry.load("other")
    with pytest.raises(VersionNotFound):
        registry.load(NAME, "9")


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(RegistryUnavailable, match="nowhere"):
        Registry(tmp_path / "nowhere").load(NAME)


def change_a_byte(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"\x00")


def truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1])


def append(folder: Path) -> None:
    (folder / "config.json").write_bytes(FILES["config.json"] + b" ")


def remove_a_picture(folder: Path) -> None:
    (folder / "plot.png").unlink()


def add_a_file(folder: Path) -> None:
    (folder / "model.pth").write_bytes(b"")


def link_out(folder: Path) -> None:
    outside = folder.parent.parent.parent / "outside"
    outside.write_bytes(WEIGHTS)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(outside)


def put_a_pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def break_the_manifest(folder: Path) -> None:
    (folder / "MANIFEST.json").write_bytes(b'{"schema_version": 1')


def nest_the_manifest(folder: Path) -> None:
    (folder / "MANIFEST.json").write_bytes(b"[" * 100_000)


def seal_with_an_unknown_field(folder: Path) -> None:
    reseal(folder, extra=1)


def seal_under_a_new_schema(folder: Path) -> None:
    reseal(folder, schema_version=2)


def seal_a_file_elsewhere(folder: Path) -> None:
    seal = {"sha256": "0" * 64, "size_bytes": 0}
    reseal(folder, files={**json.loads((folder / "MANIFEST.json").read_text())["files"], "../x": seal})


def swap_two_features(folder: Path) -> None:
    second, first, *rest = features.FEATURE_NAMES
    reseal(folder, feature_names=[first, second, *rest])


def define_features_otherwise(folder: Path) -> None:
    reseal(folder, features_fingerprint="f" * 64)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (change_a_byte, "SHA-256 differs"),
        (truncate, "SHA-256 differs"),
        (append, "larger than"),
        (remove_a_picture, "missing: plot.png"),
        (add_a_file, "does not know: model.pth"),
        (link_out, "plain file"),
        (put_a_pipe, "not a plain file"),
        (break_the_manifest, "MANIFEST.json is invalid"),
        (nest_the_manifest, "MANIFEST.json is invalid"),
        (seal_with_an_unknown_field, "invalid at extra"),
        (seal_under_a_new_schema, "invalid at schema_version"),
        (seal_a_file_elsewhere, "no file name"),
        (swap_two_features, "another order"),
        (define_features_otherwise, "other definitions"),
    ],
)
def test_a_harmed_version_is_rejected_with_its_reason(registry: Registry, folder: Path, harm: Any, reason: str) -> None:
    registry.load(NAME)
    harm(folder)
    with pytest.raises(ArtefactRejected, match=reason):
        registry.load(NAME)


def test_a_picture_is_checked_by_verify(registry: Registry, folder: Path) -> None:
    (folder / "plot.png").write_bytes(b"\x89PNH")
    registry.load(NAME)
    with pytest.raises(ArtefactRejected, match=r"plot.png"):
        registry.verify(NAME)


def test_a_linked_version_folder_is_no_version(registry: Registry, folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "outside")
    folder.symlink_to(tmp_path / "outside")
    with pytest.raises(VersionNotFound):
        registry.load(NAME, folder.name)


def test_one_version_cannot_pose_as_another(registry: Registry, folder: Path) -> None:
    folder.rename(folder.with_name("2"))
    with pytest.raises(ArtefactRejected, match="seals cnn_lstm 1, not cnn_lstm 2"):
        registry.load(NAME)


def test_a_folder_without_manifest_is_no_version_and_its_number_is_not_reused(registry: Registry, folder: Path) -> None:
    folder.with_name("2").mkdir()
    assert registry.versions(NAME) == ["1"]
    assert publish(registry) == "3"


def shut(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What `chmod 000` of the folder is to everybody but root, as whom tests may run."""
    really = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if folder in Path(path).parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return really(path, **options)

    monkeypatch.setattr(os, "stat", stat)


def test_a_version_that_cannot_be_read_keeps_no_other_from_being_served(
    registry: Registry, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry)
    shut(monkeypatch, folder.with_name("2"))
    assert registry.versions(NAME) == ["1"]
    assert registry.load(NAME).version == "1"
    assert registry.models() == [NAME]
    assert publish(registry) == "3"  # its number is taken all the same


@pytest.mark.parametrize("asked", ["1", "latest", "stable"])
def test_a_version_that_is_asked_for_and_cannot_be_read_is_named_with_its_path(
    registry: Registry, folder: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    registry.set_alias(NAME, "stable", "1")
    shut(monkeypatch, folder)
    with pytest.raises(ArtefactRejected, match=f"^{folder} cannot be read: Permission denied$"):
        registry.load(NAME, asked)


def test_a_manifest_that_is_a_loop_of_links_is_named_with_its_path(registry: Registry, folder: Path) -> None:
    (folder / "MANIFEST.json").unlink()
    (folder / "MANIFEST.json").symlink_to("MANIFEST.json")
    with pytest.raises(ArtefactRejected, match=f"^{folder} cannot be read: Too many levels"):
        registry.load(NAME, "1")


def test_a_version_above_the_size_cap_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(ArtefactRejected, match="larger than 100 bytes"):
        publish(Registry(tmp_path, max_version_bytes=100))
    assert list((tmp_path / NAME).iterdir()) == []


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_publishing_without_a_needed_file_leaves_nothing(registry: Registry, tmp_path: Path, missing: str) -> None:
    with pytest.raises(ArtefactRejected, match=missing):
        publish(registry, files={name: data for name, data in FILES.items() if name != missing})
    assert list((tmp_path / "models" / NAME).iterdir()) == []


def test_what_a_killed_publisher_left_is_swept_by_the_next(registry: Registry, folder: Path) -> None:
    left = folder.parent / ".publishing-abc"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert publish(registry) == "2"
    assert not left.exists()


def numbered(text: str) -> dict[str, bytes]:
    return {"model.safetensors": text.encode(), "config.json": json.dumps({"text": text}).encode()}


def test_readers_see_whole_versions_only_while_writers_publish(registry: Registry) -> None:
    publish(registry, files=numbered("first"))
    done = threading.Event()
    read: list[Artefact] = []

    def write(writer: int) -> None:
        for n in range(20):
            publish(registry, files=numbered(f"{writer} {n}"))

    def keep_reading() -> None:
        while not done.is_set():
            read.append(registry.load(NAME))

    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(2)]
    reader = threading.Thread(target=keep_reading)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert len({artefact.version for artefact in read}) > 1
    assert all(artefact.config["text"].encode() == artefact.weights for artefact in read)
    assert registry.versions(NAME) == [str(n + 1) for n in range(41)]


def test_a_file_swapped_while_it_is_read_is_never_taken_for_the_sealed_one(registry: Registry, folder: Path) -> None:
    done = threading.Event()
    evil = folder.parent / "evil"

    def keep_swapping() -> None:
        while not done.is_set():
            for weights in (b"\x01weights" * 100, WEIGHTS):
                evil.write_bytes(weights)
                os.replace(evil, folder / "model.safetensors")

    swapper = threading.Thread(target=keep_swapping)
    swapper.start()
    outcomes = {"loaded": 0, "rejected": 0}
    try:
        while min(outcomes.values()) < 20 or sum(outcomes.values()) < 200:
            try:
                assert registry.load(NAME).weights == WEIGHTS
                outcomes["loaded"] += 1
            except ArtefactRejected:
                outcomes["rejected"] += 1
    finally:
        done.set()
        swapper.join()
