"""`sluice registry`: model versions from a folder to what a replica may serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from app.cli.access import client_settings
from app.cli.options import AsJson, SignWith
from app.cli.terminal import EX_CONFIG, err, fail, out, told
from app.settings import Settings

if TYPE_CHECKING:
    from serve_app.registry import Registry

commands = typer.Typer(no_args_is_help=True, help="Model versions: list, verify, alias.")


@commands.command("list")
def registry_list(as_json: AsJson = False) -> None:
    """Show every model, version and alias."""
    registry = told(lambda: registry_of(client_settings()))
    rows = told(
        lambda: [
            {
                "model": model,
                "version": version,
                "aliases": sorted(alias for alias, to in registry.aliases(model).items() if to == version),
                "published": registry.verify(model, version).created_at.isoformat(timespec="seconds"),
            }
            for model in registry.models()
            for version in registry.versions(model)
        ]
    )
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("model", "version", "aliases", "published")
    for row in rows:
        table.add_row(str(row["model"]), str(row["version"]), ", ".join(row["aliases"]), str(row["published"]))
    out.print(table)


@commands.command("verify")
def registry_verify(model: str = "cnn_lstm", version: str = "latest") -> None:
    """Check every byte of a version against its manifest, and that against its signature where a key is set."""
    settings = client_settings()
    manifest = told(lambda: registry_of(settings).verify(model, version))
    signed = "; the signature is good" if settings.registry_key_file else ""
    out.print(f"{model} {manifest.version}: {len(manifest.files)} files as they were published{signed}")


@commands.command("publish")
def registry_publish(
    folder: Annotated[Path, typer.Argument(help="Holds model.pth or model.safetensors, and config.json.")],
    name: Annotated[str, typer.Option(help="Model to publish it under.")] = "cnn_lstm",
    version: Annotated[str | None, typer.Option(help="Version; default: the next number.")] = None,
    alias: Annotated[str | None, typer.Option(help="Alias that shall stand for it from now on.")] = None,
    sign_with: SignWith = None,
) -> None:
    """Check a model folder, convert it to safetensors and publish it as a new version."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from serve_app.artefacts import import_folder

    registry = publishing_registry(client_settings(), sign_with)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=err) as bars:
        bar = bars.add_task("reading", total=None)
        imported = told(lambda: import_folder(folder, lambda stage: bars.update(bar, description=stage)))
        bars.update(bar, description="sealing")
        published = told(lambda: registry.publish(name, version=version, files=imported.files, **imported.facts))
        bars.update(bar, description="done", total=1, completed=1)
    if imported.left_out:
        err.print(f"Left out: {', '.join(imported.left_out)}", markup=False)
    out.print(f"Published {name} {published}", highlight=False)
    if alias is not None:
        told(lambda: registry.set_alias(name, alias, published))
        out.print(f"{name}: {alias} is now version {published}", highlight=False)


@commands.command("keygen")
def registry_keygen(
    folder: Annotated[Path, typer.Argument(help="Existing folder for registry.key and registry.pub.")],
) -> None:
    """Make a pair of keys: registry.key signs and stays with whoever publishes, registry.pub verifies."""
    from serve_app.signing import generate

    private, public = folder / "registry.key", folder / "registry.pub"
    told(lambda: generate(private, public))
    out.print(
        f"{private}: private, 0600; for --sign-with. Keep it off the machines that serve.",
        highlight=False,
        soft_wrap=True,
    )
    out.print(
        f"{public}: public; GATEWAY_REGISTRY_KEY_FILE={public} serves signed versions only.",
        highlight=False,
        soft_wrap=True,
    )


@commands.command("sign")
def registry_sign(
    version: Annotated[str, typer.Argument(help="Version, no alias.")],
    sign_with: Annotated[Path, typer.Option(help="Private key file.")],
    model: str = "cnn_lstm",
) -> None:
    """Sign a published version after checking every byte of it: you vouch for it from now on."""
    told(lambda: registry_of(client_settings(), sign_with).sign(model, version))
    out.print(f"{model} {version} is signed", highlight=False)


@commands.command("alias")
def registry_alias(alias: str, version: str, model: str = "cnn_lstm") -> None:
    """Let an alias stand for a version."""
    told(lambda: registry_of(client_settings()).set_alias(model, alias, version))
    out.print(f"{model}: {alias} is now version {version}")


def registry_of(settings: Settings, signing_key_file: Path | None = None) -> Registry:
    from serve_app.registry import open_registry

    return open_registry(settings.registry_path, key_file=settings.registry_key_file, signing_key_file=signing_key_file)


def publishing_registry(settings: Settings, signing_key_file: Path | None) -> Registry:
    """A registry to publish into; it is told before the work, not after, that a version would be refused unsigned."""
    if settings.registry_key_file is not None and signing_key_file is None:
        fail("GATEWAY_REGISTRY_KEY_FILE is set, so versions must be signed: give --sign-with", EX_CONFIG)
    return told(lambda: registry_of(settings, signing_key_file))
