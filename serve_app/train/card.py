"""The model card: every figure of a run, and what it does not show."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from serve_app.train.judge import BOOSTING, FUSION, LINEAR, MODEL, PRIOR, RIDGE
from serve_app.train.metrics import Interval

COLUMNS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "log_loss": "log-loss",
    "brier": "Brier",
    "ece": "ECE",
    "auc_move": "AUC move",
    "auc_direction": "AUC direction",
    "nll": "NLL",
    "r2": "R²",
    "coverage_90": "90 % covers",
}
LEVELS = ("50", "80", "90", "95", "99")


@dataclass(frozen=True, slots=True)
class Refit:
    """The published weights: what they saw, and how they do on the bars held out.

    Attributes:
        train, validation, held_out: Rows.
        trained_until, chosen_until: Last day whose return was learned from, and chosen by.
        epoch: Epoch the weights are from; zero is the linear start.
        ensemble_weights: By member.
        held_out_metrics: By name of model, then of metric.
    """

    train: int
    validation: int
    trained_until: str
    chosen_until: str
    epoch: int
    ensemble_weights: dict[str, float]
    held_out: int
    held_out_metrics: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Report:
    """All figures of one run, in plain values.

    Attributes:
        name: Model name.
        settings: The run's `TrainConfig`.
        n_params: Trained values.
        hashes: SHA-256 of data, features and scaler.
        packages: Versions the run used.
        symbols: Symbol → bars, first and last day, first held-out day.
        metrics: By name of model, then of metric.
        by_seed: Metrics of the network for each seed.
        differences: (loss, baseline) → network less baseline.
        by_fold: One row of figures for each test block.
        volatility: Predicted and actual deviation, by fifths.
        audit: What `audit_uncertainty` found.
        refit: The published weights.
        wall_time_s: Of the whole run.
    """

    name: str
    settings: dict[str, Any]
    n_params: int
    hashes: dict[str, str]
    packages: dict[str, str]
    symbols: dict[str, dict[str, Any]]
    metrics: dict[str, dict[str, float]]
    by_seed: list[dict[str, float]]
    differences: dict[tuple[str, str], Interval]
    by_fold: list[dict[str, Any]]
    volatility: list[tuple[float, float]]
    audit: dict[str, float]
    refit: Refit
    wall_time_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        differences = {f"{loss}, {name}": asdict(interval) for (loss, name), interval in self.differences.items()}
        return {**asdict(self), "differences": differences}


def render(report: Report) -> str:
    """The card as Markdown."""
    sections = (_head, _aims, _results, _folds, _calibration, _uncertainty, _refit, _limits, _again)
    paragraphs = "\n\n".join(section(report) for section in sections).split("\n\n")
    return "\n\n".join(_reflow(paragraph) for paragraph in paragraphs) + "\n"


def _head(report: Report) -> str:
    s = report.settings
    return f"""# {report.name}: CNN+LSTM on daily bars

{report.n_params:,} parameters. From 50 features of the last 60 daily bars of one stock it forecasts the next bar's
return in units of the stock's volatility over 60 bars: chances of down, flat and up (beyond ± {s["threshold"]:g}), an
expected value, and a deviation split in two. It exists to show a serving system with an honest model in it.
**It claims no trading edge**: no costs, no market impact, no portfolio was modelled."""


def _aims(report: Report) -> str:
    gain, lead = report.differences["log_loss", PRIOR], report.differences["log_loss", LINEAR]
    covered, linear = report.metrics[MODEL]["coverage_90"], report.metrics[LINEAR]["log_loss"]
    rows = [
        ("log-loss gain over the class prior, interval above zero", _gain(gain), gain.high < 0),
        ("90 % interval covers 88 to 93 %", f"{covered:.1%}", 0.88 <= covered <= 0.93),
        (
            "within 0.003 nats of the linear baseline's log-loss, same rows",
            f"{report.metrics[MODEL]['log_loss']:.4f} against {linear:.4f}, {lead.mean:+.4f}",
            lead.mean <= 0.003,
        ),
    ]
    return "## Aims\n\n" + _table(
        ("aim", "found", ""), [(aim, found, "met" if met else "**missed**") for aim, found, met in rows]
    )


def _results(report: Report) -> str:
    order = (PRIOR, RIDGE, LINEAR, BOOSTING, FUSION, MODEL)
    rows = [
        (f"**{name}**" if name == MODEL else name, *(_figure(report.metrics[name].get(column)) for column in COLUMNS))
        for name in order
    ]
    losses = [seed["log_loss"] for seed in report.by_seed]
    n = sum(fold["test"] for fold in report.by_fold)
    differences = [
        (f"{loss.replace('_', '-').replace('nll', 'NLL')}, against {name}", _interval(interval))
        for (loss, name), interval in report.differences.items()
    ]
    s = report.settings
    return f"""## Out of sample, {n:,} rows of {len(report.symbols)} stocks

{_table(("", *COLUMNS.values()), rows)}

Log-loss and NLL in nats. {MODEL}: mean over {len(losses)} seeds (log-loss {min(losses):.4f} to {max(losses):.4f}), as
served: {s["fit"]["model"]["mc_samples"]} weight samples. The network learned from training rows; the baselines, their
penalties chosen, were fitted again on training and validation rows, a year more. AUC move: some move against none; AUC
direction: up against down among moves (the prior's is not one half because it differs between test blocks). NLL of a
Gaussian; R² against a forecast of zero. The chances and the Gaussian are not tied to one another.

Differences of the mean loss, below zero in favour of the network. The intervals are 95 %, from
{s["bootstrap_draws"]:,} bootstrap draws of blocks of {s["block_days"]} trading days, all stocks together:

{_table(("", "difference"), differences)}

What the network adds to the linear model: in log-loss {_verdict(report, "log_loss")}, in NLL {_verdict(report, "nll")}.

How far a day will move is forecast better than where to. By fifths of predicted deviation, calm to wild: predicted
{_list(p for p, _ in report.volatility)}, actual {_list(a for _, a in report.volatility)} (first seed)."""


def _folds(report: Report) -> str:
    rows = [
        (
            f"{fold['first']} to {fold['last']}", f"{fold['train']:,} / {fold['validation']:,} / {fold['test']:,}",
            *(f"{fold[f'log_loss, {name}']:.4f}" for name in (PRIOR, LINEAR, MODEL)), _gain(Interval(*fold["gain"])),
            *(f"{fold[f'nll, {name}']:.4f}" for name in (PRIOR, LINEAR, MODEL)),
            f"{fold['coverage_90']:.1%}", f"{fold['auc_direction']:.3f}", " ".join(map(str, fold["epochs"])),
        )
        for fold in report.by_fold
    ]  # fmt: skip
    losses = ("linear", "network")
    header = ("test block", "rows: train / validation / test", "log-loss: prior", *losses, "gain over prior",
              "NLL: prior", *losses, "90 % covers", "AUC direction", "epoch kept")  # fmt: skip
    s = report.settings
    return f"""## Test block by test block

{_table(header, rows)}

Expanding walk-forward. The {s["validation_days"]} days before a test block are the validation block; every label was
known {s["embargo_days"]} days before the next block began. Features are causal, and their mean and deviation were taken
from training rows only. Epoch kept: for each seed, that of least validation loss; at 0 the network is the linear model
of the training rows, with nothing learned beyond it."""


def _calibration(report: Report) -> str:
    rows = [
        (name, *(f"{report.metrics[name][f'coverage_{level}']:.1%}" for level in LEVELS))
        for name in (PRIOR, RIDGE, LINEAR, MODEL)
    ]
    return f"""## Calibration

Share of returns inside central Gaussian intervals:

{_table(("", *(f"{level} %" for level in LEVELS)), rows)}

![How often each class happened against how likely it was called](reliability.png)

Bars: ± 1.96 standard errors as if rows were independent; days on which all stocks move make them too short.

![Coverage of intervals, and predicted against actual volatility](coverage.png)"""


def _uncertainty(report: Report) -> str:
    audit = report.audit
    strange = {kind: ratio for kind, ratio in audit.items() if kind not in ("share", "epistemic", "refits")}
    ratio = audit["epistemic"] / audit["refits"]
    return f"""## What the two uncertainties mean

*Aleatoric* is the noise the model expects; *epistemic* is how far weight samples of the heads, and the three members,
disagree about the mean. Squares add up to the variance. On the last test block the epistemic part is
{audit["share"]:.2%} of it: daily returns are noise, and knowing the weights would hardly help.

Its size is chosen, not learned: the highway's dropout ({report.settings["fit"]["model"]["highway_dropout"]:g}) sets it.
Mean epistemic deviation {audit["epistemic"]:.4f}; deviation of the linear mean over
{report.settings["bootstrap_refits"]} refits to block-bootstrap draws of the training rows {audit["refits"]:.4f}; ratio
**{ratio:.2f}**, where 1 would be right for a linear model. It samples the heads only and says nothing of the trunk's
weights.

**It does not detect strange input.** Epistemic deviation on windows that are no market, relative to the usual:

{_table(("windows", "ratio"), [(kind, f"{value:.1f}") for kind, value in strange.items()])}

It answers to size, not to nonsense: check range, age and flatness of the input elsewhere."""


def _refit(report: Report) -> str:
    refit = report.refit
    symbols = [
        (symbol, f"{s['bars']:,}", s["first"], s["last"], s["held_out_from"]) for symbol, s in report.symbols.items()
    ]
    weights = ", ".join(f"{name} {weight:.3f}" for name, weight in refit.ensemble_weights.items())
    held = {name: refit.held_out_metrics[name] for name in (PRIOR, MODEL)}
    return f"""## The published weights

Fitted once more by the same recipe with seed {report.settings["seed"]}: {refit.train:,} training rows with returns up
to {refit.trained_until}, {refit.validation:,} validation rows up to {refit.chosen_until}; epoch kept: {refit.epoch}.
Weights of the members: {weights}. They are shown, and nothing is claimed for them.

{_table(("symbol", "bars", "first", "last", "out of sample from"), symbols)}

On the {refit.held_out} rows held out, too few to conclude from: log-loss {held[MODEL]["log_loss"]:.4f} (class prior
{held[PRIOR]["log_loss"]:.4f}), NLL {held[MODEL]["nll"]:.4f} ({held[PRIOR]["nll"]:.4f}), 90 % interval covers
{held[MODEL]["coverage_90"]:.1%}. The figures of the walk-forward judge the recipe, not these weights."""


def _limits(report: Report) -> str:
    return f"""## Limits

- Five large companies, known survivors, up to March 2013. Nothing here speaks of other stocks, other times or intraday
  bars, and nothing was tested after 2013.
- The network starts at the linear model of the last bar and is stopped early. Beside that model it is a way to exercise
  a serving system; whoever wants the forecasts alone should take the linear one unless the differences above say more.
- AUC of direction by test block: {_list(fold["auc_direction"] for fold in report.by_fold)}. What there is may be
  short-term reversal from bid-ask bounce, which cannot be traded at the close that the features use.
- Returns are more peaked than a Gaussian and have heavier tails, so its intervals are too wide around 50 % and too
  narrow around 99 %.
- The same test blocks were looked at while the recipe was made, so even these figures flatter it somewhat."""


def _again(report: Report) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in report.packages.items())
    hashes = "\n".join(f"- SHA-256 of {name}: `{value}`" for name, value in report.hashes.items())
    s = report.settings
    return f"""## Made by

`sluice train`, seed {s["seed"]} ({s["n_seeds"]} seeds per fold), {s["threads"]} thread, {report.wall_time_s / 60:.1f}
minutes; {packages}. All figures with their settings: `metrics.json`. Data: `serve_app/data/NOTICE.md`.

{hashes}"""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _reflow(paragraph: str) -> str:
    """Figures vary in length, so prose is wrapped after they are in; tables and lists keep their lines."""
    return paragraph if paragraph[0] in "#|-!" else textwrap.fill(paragraph, width=100, break_on_hyphens=False)


def _verdict(report: Report, loss: str) -> str:
    difference = report.differences[loss, LINEAR]
    if difference.low <= 0 <= difference.high:
        return "nothing that can be told from zero" + (", if anything worse" if difference.mean > 0 else "")
    return "something, for the better" if difference.high < 0 else "nothing: it is worse"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _interval(interval: Interval) -> str:
    return f"{interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _gain(difference: Interval) -> str:
    return _interval(Interval(-difference.mean, -difference.high, -difference.low))


def _list(values: Iterable[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
