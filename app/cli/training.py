"""`sluice train`: a fit on the shipped bars, or a search for better settings of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app import development
from app.cli.access import client_settings
from app.cli.options import SignWith
from app.cli.registry import publishing_registry
from app.cli.terminal import EX_CONFIG, err, fail, out, require_extra, told

if TYPE_CHECKING:
    from app.local_ray import LocalRay
    from serve_app.registry import Registry
    from serve_app.search import Searched
    from serve_app.train import FitConfig, TrainConfig


def train(
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0)] = 0,
    seeds: Annotated[int, typer.Option(help="Networks per fold.", min=1)] = 3,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training rows at most.", min=1)] = None,
    publish: Annotated[bool, typer.Option(help="Publish the final refit as the next version.")] = True,
    output: Annotated[Path | None, typer.Option(help="Folder for the version's or the search's files.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings of the fit, as `--search` writes them.")] = None,
    search: Annotated[int | None, typer.Option(help="Try so many settings on Ray instead.", min=2, max=1000)] = None,
    sign_with: SignWith = None,
) -> None:
    """Train walk-forward on the shipped bars, judge beside the baselines, refit, publish with a model card."""
    require_extra("train", "training", "sklearn", "matplotlib")
    from serve_app.train import TrainConfig

    settings = TrainConfig(seed=seed, n_seeds=seeds, fit=_fit_settings(config, epochs))
    if search is None:
        _train(settings, publishing_registry(client_settings(), sign_with) if publish else None, output)
    else:
        _search(settings, search, output or development.RUN_DIR / "search")


def _fit_settings(file: Path | None, epochs: int | None) -> FitConfig:
    from serve_app.train import FitConfig

    try:
        fit = FitConfig() if file is None else FitConfig.from_dict(json.loads(file.read_text()))
    except OSError as error:
        fail(f"cannot read {file}: {error.strerror}", EX_CONFIG)
    except (ValueError, TypeError, AttributeError) as error:
        fail(f"{file} is no file of settings: {error}", EX_CONFIG)
    return fit if epochs is None else replace(fit, max_epochs=epochs)


def _train(config: TrainConfig, registry: Registry | None, output: Path | None) -> None:
    from rich.markdown import Markdown
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from serve_app.train import train as run

    columns = (TextColumn("{task.description:<32}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=err) as bars:
        bar = bars.add_task("reading bars", total=None)

        def show(stage: str, done: int, total: int) -> None:
            bars.update(bar, description=stage, completed=done, total=total)

        trained = told(lambda: run(config, registry=registry, output=output, progress=show))
        bars.update(bar, description="done", completed=1, total=1)
    out.print(Markdown(trained.files["CARD.md"].decode()))
    if trained.version is not None:
        out.print(f"Published cnn_lstm {trained.version}", highlight=False)


def _search(settings: TrainConfig, n_trials: int, folder: Path) -> None:
    """Search on a Ray of our own, which ends with the search, however that ends."""
    require_extra("tune", "a search", "pandas", "pyarrow", "tensorboardX")
    from rich.markdown import Markdown

    from app.local_ray import LocalRay, LocalRayFailed

    err.print("Starting Ray on this machine …")
    try:
        with LocalRay(num_cpus=os.cpu_count() or 1) as ray:
            searched = _search_on(ray, settings, n_trials)
    except LocalRayFailed as error:
        fail(str(error))
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in searched.files.items():
        (folder / name).write_bytes(data)
    out.print(Markdown(searched.files["SEARCH.md"].decode()))
    out.print(f"Wrote {', '.join(searched.files)} to {folder}", highlight=False)


def _search_on(ray: LocalRay, settings: TrainConfig, n_trials: int) -> Searched:
    """Search with a live table of the trials."""
    os.environ.update(ray.environment)  # before Ray is imported: it reads some of it only then
    from rich.live import Live

    from app.search_table import render
    from serve_app.search import SearchConfig, SearchFailed, search

    with Live(console=err, refresh_per_second=2) as live:
        try:
            return search(
                SearchConfig(settings, n_trials),
                ray_address=ray.address,
                scratch=ray.directory / "tune",
                on_change=lambda trials: live.update(render(trials, n_trials)),
            )
        except SearchFailed as error:
            fail(str(error))
