"""The command `sluice`: one module per group of commands.

Every command imports what it needs when it runs, so that `sluice token` needs no torch.
"""

from __future__ import annotations

import typer

from app.cli import bench, deploy, doctor, keys, kill, migrate, predict, registry, rollout, serve, tokens, training
from app.cli.terminal import EX_CONFIG, fail
from app.settings import ConfigError

cli = typer.Typer(name="sluice", no_args_is_help=True, add_completion=False, help="A model server for trading.")

cli.command()(serve.serve)
cli.command()(tokens.token)
cli.command()(predict.predict)
cli.command()(training.train)
cli.command()(bench.bench)
cli.command()(deploy.deploy)
cli.command()(doctor.doctor)
cli.command()(kill.kill)
cli.command()(migrate.migrate)
cli.command()(rollout.rollback)
cli.add_typer(keys.commands, name="key")
cli.add_typer(registry.commands, name="registry")
cli.add_typer(rollout.commands, name="rollout")


def main() -> None:
    """Entry point: an error that an operator can mend is one plain line, never a traceback."""
    try:
        cli()
    except ConfigError as error:
        fail(str(error), EX_CONFIG)
