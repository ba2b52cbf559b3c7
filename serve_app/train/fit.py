"""One network, fitted in four steps.

The linear highway starts at the best linear model. Everything is trained on cross-entropy and Gaussian likelihood and
stopped early on the validation block, where the start counts as an epoch. The members' weights are fitted by
expectation-maximisation on that block; last, one factor on the variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from serve_app.contract import MEMBERS, FloatArray
from serve_app.model import HybridModel, Members, ModelConfig
from serve_app.train.baselines import Block, Forecast, Linear, choose_penalties, fit_linear
from serve_app.train.samples import Floats, Integers, Samples, Split

BATCH = 512  # windows of one forward pass where nothing is learned


@dataclass(frozen=True)
class FitConfig:
    """How one network is fitted.

    Attributes:
        model: Sizes of the network.
        max_epochs: Passes over the training rows at most.
        patience: Epochs without a better validation loss before stopping.
        batch_size: Windows of one step.
        learning_rate: Peak of a one-cycle schedule.
        warm_up: Share of the steps before the peak.
        weight_decay: Of AdamW.
        gradient_clip: Largest norm of one step's gradient.
        y_clip: Returns beyond ± this are set to it in fitting, never in judging.
        dirichlet: Prior of the ensemble weights; above 1 pulls them together.
        em_steps: Steps of expectation-maximisation.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    max_epochs: int = 5
    patience: int = 2
    batch_size: int = 128
    learning_rate: float = 5e-4
    warm_up: float = 0.2
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    y_clip: float = 5.0
    dirichlet: float = 2.0
    em_steps: int = 200

    def __post_init__(self) -> None:
        may_be_zero = ("weight_decay", "warm_up")
        for name, value in vars(self).items():
            if name != "model" and (value < 0 or (value == 0 and name not in may_be_zero)):
                raise ValueError(f"{name} must be above zero")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the way back."""
        return {**asdict(self), "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FitConfig:
        """Build from what `to_dict` made; what is left out is the default.

        Raises:
            ValueError: A key that is no setting, or a value of the wrong kind or out of range.
        """
        defaults = cls().to_dict()
        if unknown := sorted(set(values) - set(defaults)):
            raise ValueError(f"unknown settings of a fit: {', '.join(unknown)}")
        for name, value in values.items():
            kinds = (int, float) if isinstance(defaults[name], float) else (type(defaults[name]),)
            if type(value) not in kinds:
                raise ValueError(f"{name} must be of the kind of {defaults[name]!r:.20}")
        return cls(**{**values, "model": ModelConfig.from_dict(values.get("model", {}))})


class Fitted(NamedTuple):
    """A network ready to predict, and the epoch its weights are from; zero is the linear start."""

    model: HybridModel
    epoch: int


def fit_network(
    samples: Samples,
    split: Split,
    config: FitConfig,
    *,
    seed: int,
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> Fitted:
    """Fit one network to the training rows of a split, choosing by its validation rows.

    Args:
        samples: Windows and labels.
        split: Rows to learn from and to choose by; its test rows are not looked at.
        config: How.
        seed: Of initial weights, order and dropout.
        on_epoch: Called after each epoch with its number, from 1.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HybridModel(config.model)
        set_normaliser(model, samples, split.train)
        train, validation = (
            last_bar_block(model, samples, rows, config.y_clip) for rows in (split.train, split.validation)
        )
        start_highway(model, fit_linear(train, choose_penalties(train, validation)))
        epoch = descend(model, samples, split, config, on_epoch)
    members = judge_members(model, samples, split.validation)
    set_ensemble_weights(model, members, samples, split.validation, config)
    scale_variance(model, samples, split.validation, config)
    return Fitted(model.fold(), epoch)


def set_normaliser(model: HybridModel, samples: Samples, rows: Integers) -> None:
    """Take mean and deviation of each feature from training rows only."""
    x = samples.last_bars(rows).astype(np.float64)
    model.normalise.mean.copy_(torch.from_numpy(x.mean(axis=0)))
    model.normalise.sd.copy_(torch.from_numpy(np.maximum(x.std(axis=0), 1e-6)))


def last_bar_block(model: HybridModel, samples: Samples, rows: Integers, y_clip: float) -> Block:
    """What the baselines see: last bars through the model's own normaliser, labels and clipped returns."""
    with torch.no_grad():
        z = model.normalise(torch.from_numpy(samples.last_bars(rows))[:, :, None]).squeeze(2)
    return Block(z.double().numpy(), samples.labels[rows], np.clip(samples.y[rows], -y_clip, y_clip))


def start_highway(model: HybridModel, linear: Linear) -> None:
    """Start training at the linear model: the heads' last layers are zero, the highway is its weights."""
    with torch.no_grad():
        model.highway.weight.copy_(torch.from_numpy(linear.weights.T))
        model.highway.bias.copy_(torch.from_numpy(linear.bias))


def descend(
    model: HybridModel, samples: Samples, split: Split, config: FitConfig, on_epoch: Callable[[int], None]
) -> int:
    """Train, keep the weights of the epoch with the least validation loss, and return its number; the start is zero."""
    steps = math.ceil(len(split.train) / config.batch_size)
    optimiser = AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = OneCycleLR(
        optimiser, config.learning_rate, total_steps=steps * config.max_epochs, pct_start=config.warm_up
    )
    best, best_epoch = _weights_of(model), 0
    best_loss = _validation_loss(model, samples, split.validation, config)
    for epoch in range(1, config.max_epochs + 1):
        model.train()
        for rows in _shuffled(split.train, config.batch_size):
            optimiser.zero_grad()
            _loss(model, samples, rows, config).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
            optimiser.step()
            schedule.step()
        loss = _validation_loss(model, samples, split.validation, config)
        on_epoch(epoch)
        if loss < best_loss:
            best, best_epoch, best_loss = _weights_of(model), epoch, loss
        elif epoch - best_epoch >= config.patience:
            break
    model.load_state_dict(best)
    return best_epoch


def judge_members(model: HybridModel, samples: Samples, rows: Integers) -> Members:
    """What each member says of each row, without dropout: logits[M,N,C], mu[M,N], log_var[M,N]."""
    model.eval()
    with torch.inference_mode():
        parts = [model(torch.from_numpy(samples.windows(chunk))) for chunk in _chunks(rows)]
    return Members(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))


def set_ensemble_weights(
    model: HybridModel, members: Members, samples: Samples, rows: Integers, config: FitConfig
) -> None:
    """Fit the members' weights: expectation-maximisation of the mixture's likelihood under a Dirichlet prior.

    The problem is convex and has three numbers, so it cannot overfit the way weights trained with the network do:
    those go to whichever member overfits the training rows fastest.
    """
    y = _returns(samples, rows, config)
    log_class = F.log_softmax(members.logits, dim=2)[:, torch.arange(len(rows)), torch.from_numpy(samples.labels[rows])]
    log_likelihood = (log_class - _gaussian_nll(members.mu, members.log_var, y)).double()  # [M,N]
    prior = config.dirichlet - 1
    w = torch.full((len(MEMBERS),), 1 / len(MEMBERS), dtype=torch.float64)
    for _ in range(config.em_steps):
        responsibility = (log_likelihood + w.log()[:, None]).softmax(dim=0)  # [M,N]
        w = (responsibility.sum(dim=1) + prior) / (len(rows) + prior * len(MEMBERS))
    with torch.no_grad():
        model.ensemble_logits.copy_(w.log())


def scale_variance(model: HybridModel, samples: Samples, rows: Integers, config: FitConfig) -> None:
    """Multiply all variances by one factor, the one of most likelihood on the validation rows."""
    forecast = forecast_of(model.fold(), samples, rows)
    assert forecast.mu is not None
    assert forecast.sd is not None
    y = np.clip(samples.y[rows], -config.y_clip, config.y_clip)
    factor = np.square((y - forecast.mu) / forecast.sd).mean()
    with torch.no_grad():
        model.highway.bias[-1] += math.log(factor)


def forecast_of(model: HybridModel, samples: Samples, rows: Integers, *, use_ensemble: bool = True) -> Forecast:
    """What a folded model answers for some rows, the way it is served."""
    answer = answers_of(model, samples, rows, use_ensemble=use_ensemble)
    sd = np.hypot(answer["aleatoric"], answer["epistemic"])
    return Forecast(answer["classification_probs"], answer["regression_pred"], sd)


def answers_of(model: HybridModel, samples: Samples, rows: Integers, *, use_ensemble: bool = True) -> dict[str, Floats]:
    """All outputs of `HybridModel.predict` for some rows, in float64."""
    parts = [predict(model, samples.windows(chunk), use_ensemble=use_ensemble) for chunk in _chunks(rows)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def predict(model: HybridModel, windows: FloatArray, *, use_ensemble: bool = True) -> dict[str, Floats]:
    """The same for windows float32[B,F,T] themselves."""
    with torch.inference_mode():
        answer = model.predict(torch.from_numpy(windows), use_ensemble=use_ensemble)
    return {name: value.double().numpy() for name, value in answer.items() if value is not None}


def _loss(model: HybridModel, samples: Samples, rows: Integers, config: FitConfig) -> Tensor:
    """Cross-entropy plus Gaussian negative log likelihood, both in nats and so one to one, averaged over members."""
    members = model(torch.from_numpy(samples.windows(rows)))
    labels = torch.from_numpy(samples.labels[rows]).expand(len(MEMBERS), -1)
    classes = F.cross_entropy(members.logits.flatten(0, 1), labels.flatten())
    returns: Tensor = _gaussian_nll(members.mu, members.log_var, _returns(samples, rows, config)).mean()
    return classes + returns


def _validation_loss(model: HybridModel, samples: Samples, rows: Integers, config: FitConfig) -> float:
    model.eval()
    with torch.inference_mode():
        return sum(_loss(model, samples, chunk, config).item() * len(chunk) for chunk in _chunks(rows)) / len(rows)


def _gaussian_nll(mu: Tensor, log_var: Tensor, y: Tensor) -> Tensor:
    return (log_var + (y - mu).square() * (-log_var).exp() + math.log(2 * math.pi)) / 2


def _returns(samples: Samples, rows: Integers, config: FitConfig) -> Tensor:
    return torch.from_numpy(samples.y[rows].astype(np.float32)).clamp(-config.y_clip, config.y_clip)


def _weights_of(model: HybridModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _shuffled(rows: Integers, size: int) -> Iterator[Integers]:
    order = rows[torch.randperm(len(rows)).numpy()]
    return (order[i : i + size] for i in range(0, len(order), size))


def _chunks(rows: Integers) -> Iterator[Integers]:
    return (rows[i : i + BATCH] for i in range(0, len(rows), BATCH))
