"""The CNN+LSTM hybrid: from a window of features to class probabilities, an expected return and its uncertainty.

Reading order is data flow:

    x[B,F,T] ─ normalise, clip ─┬─ convolutions k=3,5,7 ─ squeeze-excite ─── tokens c[B,T,d] ─┐
                                ├─ bidirectional LSTM ────────────────────── tokens h[B,T,d] ─┤
                                │                                                             │
                                │      cross-attention both ways: c' = c asks h, h' = h asks c
                                │      three views: cnn [pool c, c_T] · lstm [pool h, h_T]
                                │                   fusion [pool c', c'_T, pool h', h'_T]
                                │                                                             │
                                └─ linear highway of the last bar ─ added to ─ three heads, one per view
                                                                                  │
                                             3 logits, mean mu, log variance ─────┘

Two ways through the heads. `forward` is for training: ordinary dropout, one sample, the members apart. `predict` is
for inference: the trunk runs once without dropout, the heads run under S fixed dropout masks, the same for every row
and every call. That is Monte Carlo dropout whose answer for a row depends on that row alone.

Sources: squeeze-excite, Hu et al. 2018; attention pooling, Bahdanau et al. 2015; scaled dot-product attention, Vaswani
et al. 2017; the linear highway, Lai et al. 2018 (LSTNet); Monte Carlo dropout, Gal and Ghahramani 2016; fixed masks,
Durasov et al. 2021 (Masksembles); mean and log variance as outputs, Kendall and Gal 2017; the mixture of members and
its variance, Lakshminarayanan et al. 2017.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor, nn

from serve_app.contract import CLASSES, MEMBERS, N_FEATURES, N_STEPS

Layer = TypeVar("Layer", bound=nn.Module)
FUSION = MEMBERS.index("fusion")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one model; the defaults are the model that ships.

    Attributes:
        n_features: F, rows of a window.
        n_steps: T, columns of a window, oldest first.
        filter_sizes: Widths of the parallel convolutions, odd.
        channels: Channels per filter size.
        excite_ratio: How much narrower the squeeze-excite bottleneck is than its input.
        width: d, of one token of either view.
        lstm_hidden: Per direction.
        attention_heads: Of each cross-attention; divides `width`.
        head_hidden: H, hidden units of each member's head.
        backbone_dropout: On tokens, in training only.
        head_dropout: On a head's input and hidden units, in training and under the masks of `predict`.
        highway_dropout: On the highway's input, likewise. It sets most of the epistemic scale.
        clip: Normalised features beyond ± this are set to it.
        log_var_limit: Log variance is kept within ± this.
        mc_samples: S, weight samples of the heads; at least 2, for a variance.
        mask_seed: Seed of the dropout masks.
    """

    n_features: int = N_FEATURES
    n_steps: int = N_STEPS
    filter_sizes: tuple[int, ...] = (3, 5, 7)
    channels: int = 16
    excite_ratio: int = 4
    width: int = 32
    lstm_hidden: int = 32
    attention_heads: int = 2
    head_hidden: int = 32
    backbone_dropout: float = 0.2
    head_dropout: float = 0.3
    highway_dropout: float = 0.3
    clip: float = 5.0
    log_var_limit: float = 6.0
    mc_samples: int = 32
    mask_seed: int = 20130301

    def __post_init__(self) -> None:
        if not self.filter_sizes or any(size % 2 == 0 or size < 1 for size in self.filter_sizes):
            raise ValueError("filter_sizes must be odd and positive, so that the output is as long as the input")
        sizes = (self.channels, self.excite_ratio, self.width, self.lstm_hidden, self.attention_heads, self.head_hidden)
        if min(sizes) < 1:
            raise ValueError("sizes must be positive")
        if not (self.clip > 0 and self.log_var_limit > 0):
            raise ValueError("clip and log_var_limit must be positive")
        if self.width % self.attention_heads:
            raise ValueError("attention_heads must divide width")
        if self.mc_samples < 2:
            raise ValueError("mc_samples must be at least 2: one sample has no variance")
        if not all(0 <= p < 1 for p in (self.backbone_dropout, self.head_dropout, self.highway_dropout)):
            raise ValueError("dropout must be in [0, 1)")

    @property
    def n_outputs(self) -> int:
        """Per head: one logit for each class, the mean, the log variance."""
        return len(CLASSES) + 2

    @property
    def view_widths(self) -> tuple[int, int, int]:
        """Widths of the cnn, lstm and fusion views, in the order of `MEMBERS`."""
        return 2 * self.width, 2 * self.width, 4 * self.width

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the way back."""
        return {**asdict(self), "filter_sizes": list(self.filter_sizes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from what `to_dict` made.

        Raises:
            ValueError: A key that is no field (a newer or foreign config), or a value out of range.
        """
        if unknown := sorted(set(values) - {field.name for field in fields(cls)}):
            raise ValueError(f"unknown model settings: {', '.join(unknown)}")
        known = dict(values)
        if "filter_sizes" in known:
            known["filter_sizes"] = tuple(known["filter_sizes"])
        return cls(**known)


class Members(NamedTuple):
    """What each member says: logits[M,B,C], mu[M,B], log_var[M,B]; before any mixing."""

    logits: Tensor
    mu: Tensor
    log_var: Tensor


class Mixture(NamedTuple):
    """The answer: classification_probs[B,C], regression_pred[B], its two standard deviations aleatoric[B] and
    epistemic[B], predictive_entropy[B] in nats, and the fusion view features[B,K].
    """

    classification_probs: Tensor
    regression_pred: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    predictive_entropy: Tensor
    features: Tensor


class Normaliser(nn.Module):
    """Training mean and deviation of each feature, carried with the weights; then a clip.

    What comes out is stored time step by time step, as convolutions and LSTM read it, whatever its shape says.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.clip = config.clip
        self.register_buffer("mean", torch.zeros(config.n_features))
        self.register_buffer("sd", torch.ones(config.n_features))

    def forward(self, x: Tensor) -> Tensor:
        z = (x.transpose(1, 2).contiguous() - self.mean) / self.sd  # [B,T,F]
        return z.clamp(-self.clip, self.clip).transpose(1, 2)  # [B,F,T]


class SqueezeExcite(nn.Module):
    """Attention over channels: each is scaled by a gate computed from the mean of all."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, max(1, channels // ratio))
        self.excite = nn.Linear(max(1, channels // ratio), channels)

    def forward(self, c: Tensor) -> Tensor:
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(c.mean(dim=2)))))  # [B,channels]
        return c * gate[:, :, None]


class ConvolutionView(nn.Module):
    """Two layers of convolutions for each filter size side by side, channel attention, then tokens of width d."""

    first: Sequence[nn.Conv1d]
    second: Sequence[nn.Conv1d]
    first_kernel: Tensor | None
    first_bias: Tensor
    second_kernel: Tensor
    second_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes, channels = config.filter_sizes, config.channels
        self.first = _stack(nn.Conv1d(config.n_features, channels, k, padding=k // 2) for k in sizes)
        self.second = _stack(nn.Conv1d(channels, channels, k, padding=k // 2) for k in sizes)
        self.attention = SqueezeExcite(channels * len(sizes), config.excite_ratio)
        self.project = nn.Linear(channels * len(sizes), config.width)
        self.norm = nn.LayerNorm(config.width)
        _reserve(self, "first_kernel", "first_bias", "second_kernel", "second_bias")

    def forward(self, x: Tensor) -> Tensor:
        c = self._branches(x) if self.first_kernel is None else self._one_convolution(x, self.first_kernel)
        c = self.attention(c).transpose(1, 2)  # [B,T,channels of all sizes]
        tokens: Tensor = self.norm(self.project(c))  # [B,T,d]
        return tokens

    def _branches(self, x: Tensor) -> Tensor:
        pairs = zip(self.first, self.second, strict=True)
        return torch.cat([F.gelu(second(F.gelu(first(x)))) for first, second in pairs], dim=1)  # [B,channels of all,T]

    def _one_convolution(self, x: Tensor, first_kernel: Tensor) -> Tensor:
        """The same with every kernel padded to the widest: two calls instead of six and no copying together.

        As pictures of one row, because PyTorch knows for two dimensions only how to leave channels side by side.
        """
        padding = (0, first_kernel.shape[3] // 2)
        c = F.gelu(F.conv2d(x[:, :, None], first_kernel, self.first_bias, padding=padding))
        c = F.gelu(F.conv2d(c, self.second_kernel, self.second_bias, padding=padding, groups=len(self.second)))
        return c[:, :, 0]

    def fold(self) -> None:
        self.first_kernel, self.first_bias = _merge(self.first)
        self.second_kernel, self.second_bias = _merge(self.second)


def _merge(convolutions: Sequence[nn.Conv1d]) -> tuple[Tensor, Tensor]:
    """Kernel [sum of channels out, channels in, 1, widest] and bias of several convolutions as one."""
    kernels = [conv.weight for conv in convolutions]
    widest = max(kernel.shape[2] for kernel in kernels)
    padded = torch.cat([F.pad(kernel, [(widest - kernel.shape[2]) // 2] * 2) for kernel in kernels])
    bias = torch.cat([cast(Tensor, conv.bias) for conv in convolutions])
    return padded[:, :, None].contiguous(memory_format=torch.channels_last), bias


def _stack(modules: Iterable[Layer]) -> Sequence[Layer]:
    return cast("Sequence[Layer]", nn.ModuleList(modules))  # what it is to a type checker


def _reserve(module: nn.Module, *names: str) -> None:
    """Room for folded weights: they follow `.to(device)` and stay out of the state dict."""
    for name in names:
        module.register_buffer(name, None, persistent=False)


class RecurrentView(nn.Module):
    """A bidirectional LSTM over the window, then tokens of width d."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.lstm = nn.LSTM(config.n_features, config.lstm_hidden, batch_first=True, bidirectional=True)
        self.project = nn.Linear(2 * config.lstm_hidden, config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(x.transpose(1, 2))  # [B,T,2·hidden]
        tokens: Tensor = self.norm(self.project(h))  # [B,T,d]
        return tokens


class CrossAttention(nn.Module):
    """One view asks, the other answers; the answer is added to the asker.

    Plain products: for so few tokens PyTorch's fused kernel is slower.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.attention_heads
        self.query = nn.Linear(config.width, config.width)
        self.key_value = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, asking: Tensor, answering: Tensor) -> Tensor:
        scale = (asking.shape[2] // self.heads) ** -0.5
        q = self._split(scale * self.query(asking))
        k, v = (self._split(part) for part in self.key_value(answering).chunk(2, dim=2))
        a = (q @ k.transpose(2, 3)).softmax(dim=3) @ v  # [B,heads,T,d/heads]
        a = a.transpose(1, 2).flatten(2)  # [B,T,d]
        attended: Tensor = self.norm(asking + self.out(a))
        return attended

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(*tokens.shape[:2], self.heads, -1).transpose(1, 2)  # [B,heads,T,d/heads]


class Summary(nn.Module):
    """Tokens in two vectors: their mean under attention weights softmax_T(v·tanh(W token)), and the last of them.

    tanh z = 2 sigmoid(2z) - 1, the softmax does not see the constant, and PyTorch's sigmoid is five times as quick.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        score = 2 * self.score(torch.sigmoid(2 * self.project(tokens)))  # [B,T,1]
        attention = score.transpose(1, 2).softmax(dim=2)  # [B,1,T]
        pooled = attention @ tokens  # [B,1,d]
        return torch.cat([pooled[:, 0], tokens[:, -1]], dim=1)  # [B,2d]


class Head(nn.Module):
    """Linear, GELU, Linear. The last layer starts at zero, so that training starts at the highway alone."""

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, config.head_hidden)
        self.out = nn.Linear(config.head_hidden, config.n_outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)


class HybridModel(nn.Module):
    """The whole model.

    Use it as: build, `load_state_dict`, `eval`, `fold`, then `predict` as often as needed. Everything inference
    needs is in the config and the state dict: normaliser, ensemble weights and dropout masks too.
    """

    heads: Sequence[Head]
    input_masks: Tensor
    hidden_masks: Tensor
    highway_masks: Tensor
    fusion_alone: Tensor
    highway_kernel: Tensor | None
    highway_bias: Tensor
    out_kernel: Tensor
    out_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.normalise = Normaliser(config)
        self.cnn = ConvolutionView(config)
        self.lstm = RecurrentView(config)
        self.cnn_from_lstm = CrossAttention(config)
        self.lstm_from_cnn = CrossAttention(config)
        self.summaries = nn.ModuleDict(
            {name: Summary(config.width) for name in ("cnn", "lstm", "cnn_fused", "lstm_fused")}
        )
        self.heads = _stack(Head(width, config) for width in config.view_widths)
        self.highway = nn.Linear(config.n_features, config.n_outputs)
        nn.init.zeros_(self.highway.weight)
        nn.init.zeros_(self.highway.bias)
        self.ensemble_logits = nn.Parameter(torch.zeros(len(MEMBERS)))
        self.register_buffer("fusion_alone", torch.eye(len(MEMBERS))[FUSION], persistent=False)
        self._draw_masks()
        _reserve(self, "highway_kernel", "highway_bias", "out_kernel", "out_bias")

    @property
    def n_params(self) -> int:
        """Number of trained values."""
        return sum(p.numel() for p in self.parameters())

    # --- training -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Members:
        """One pass with ordinary dropout (none in eval mode).

        Args:
            x: float[B,F,T], raw features, oldest first.

        Returns:
            What each member says by itself; the loss is averaged over members.
        """
        p_head, p_highway = self.config.head_dropout, self.config.highway_dropout
        x = self.normalise(x)
        direct = self.highway(F.dropout(x[:, :, -1], p_highway, self.training))  # [B,outputs]
        outputs = []
        for head, view in zip(self.heads, self.views(x), strict=True):
            hidden = F.gelu(head.hidden(F.dropout(view, p_head, self.training)))
            outputs.append(direct + head.out(F.dropout(hidden, p_head, self.training)))
        return self._members(torch.stack(outputs))  # from [M,B,outputs]

    def views(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The trunk: three views of normalised windows x[B,F,T], [B,2d], [B,2d] and [B,4d]."""
        c = self._drop(self.cnn(x))  # [B,T,d]
        h = self._drop(self.lstm(x))  # [B,T,d]
        c_fused = self.cnn_from_lstm(c, h)
        h_fused = self.lstm_from_cnn(h, c)
        fused = torch.cat([self.summaries["cnn_fused"](c_fused), self.summaries["lstm_fused"](h_fused)], dim=1)
        return self.summaries["cnn"](c), self.summaries["lstm"](h), fused

    def _drop(self, tokens: Tensor) -> Tensor:
        return F.dropout(tokens, self.config.backbone_dropout, self.training)

    def _members(self, outputs: Tensor) -> Members:
        limit = self.config.log_var_limit
        logits, mu, log_var = outputs[..., :-2], outputs[..., -2], outputs[..., -1]
        return Members(logits, mu, log_var.clamp(-limit, limit))

    # --- inference ------------------------------------------------------------------------------------------------

    def predict(
        self, x: Tensor, *, use_ensemble: bool = True, return_features: bool = False
    ) -> dict[str, Tensor | None]:
        """The answer for each window, by name.

        Args:
            x: float[B,F,T], raw features, oldest first.
            use_ensemble: Mix the members by the learned weights; otherwise the fusion head answers alone (weight one).
            return_features: Return the fusion view as well.

        Returns:
            The fields of `Mixture`, features None unless asked for; ensemble_weights[B,M], None for one head alone.

        Raises:
            RuntimeError: `fold` was not called, or the model is in training mode.
        """
        w = self.member_weights(use_ensemble=use_ensemble)
        answer: dict[str, Tensor | None] = dict(self.mixture(x, w)._asdict())
        answer["ensemble_weights"] = w.expand(x.shape[0], -1) if use_ensemble else None
        if not return_features:
            answer["features"] = None
        return answer

    def member_weights(self, *, use_ensemble: bool) -> Tensor:
        """Weights w[M] of the members, which sum to one: as learned, or all of it on the fusion head."""
        return self.ensemble_logits.softmax(dim=0) if use_ensemble else self.fusion_alone

    def mixture(self, x: Tensor, w: Tensor) -> Mixture:
        """The answer for each window from S weight samples of the heads, as one graph without a branch.

        With members m of weight w_m and weight samples s, each (s, m) says N(mu_sm, var_sm) and a distribution over
        classes. The answer is their mixture. By the law of total variance, applied over m and then over s,

            E  = E_s E_m mu
            Var = E_s E_m var                                    aleatoric²
                + E_s Var_m mu + S/(S-1) Var_s E_m mu            epistemic²: members disagree, weight samples disagree

        where E_m and Var_m weigh by w, E_s and Var_s are plain means, and S/(S-1) takes out the bias of S samples.

        Args:
            x: float[B,F,T], raw features, oldest first.
            w: float[M], from `member_weights`.

        Raises:
            RuntimeError: `fold` was not called, or the model is in training mode.
        """
        x = self.normalise(x)
        views = self.views(x)
        members = self._members(self._sample_heads(views, x[:, :, -1]))  # from [M,B,S,outputs]
        return _mix(members, w, views[FUSION])

    def _sample_heads(self, views: tuple[Tensor, Tensor, Tensor], last_bar: Tensor) -> Tensor:
        if self.training or self.highway_kernel is None:
            raise RuntimeError("call eval() and fold() before predict(): its weights are prepared there")
        samples = self.config.mc_samples
        masks = torch.split(self.input_masks, list(self.config.view_widths), dim=1)  # [S,width] for each member
        parts = zip(self.heads, views, masks, strict=True)
        hidden = torch.stack([head.hidden(view[:, None] * mask) for head, view, mask in parts])  # [M,B,S,H]
        hidden = F.gelu(hidden) * self.hidden_masks[:, None]  # [M,B,S,H]
        deep = torch.baddbmm(self.out_bias, hidden.flatten(1, 2), self.out_kernel)  # [M,B·S,outputs]
        direct = torch.addmm(self.highway_bias, last_bar, self.highway_kernel)  # [B,S·outputs]
        direct = direct.reshape(-1, samples, self.config.n_outputs)  # [B,S,outputs]
        return deep.reshape(len(self.heads), *direct.shape) + direct  # [M,B,S,outputs]

    def fold(self) -> HybridModel:
        """Prepare the weights for `predict`; needed again after any change of the weights.

        Convolutions of all filter sizes become one; the highway under its S masks becomes one matrix, because
        (x·m) W = x (diag(m) W); the heads' last layers are stacked.

        Returns:
            The model itself, in eval mode.
        """
        self.eval()
        with torch.no_grad():
            self.cnn.fold()
            masked = self.highway_masks[:, :, None] * self.highway.weight.T  # [S,F,outputs]
            self.highway_kernel = masked.transpose(0, 1).flatten(1).contiguous()  # [F,S·outputs]
            self.highway_bias = self.highway.bias.repeat(self.config.mc_samples)  # [S·outputs]
            self.out_kernel = torch.stack([head.out.weight.T for head in self.heads])  # [M,H,outputs]
            self.out_bias = torch.stack([head.out.bias[None] for head in self.heads])  # [M,1,outputs]
        return self

    def train(self, mode: bool = True) -> HybridModel:
        """Training changes weights, so it forgets what `fold` prepared."""
        if mode:
            self.highway_kernel = self.cnn.first_kernel = None
        return super().train(mode)

    def _draw_masks(self) -> None:
        """S dropout masks, drawn once: one mask is one sample of the weights, so all rows of all calls share it."""
        config = self.config
        generator = torch.Generator().manual_seed(config.mask_seed)

        def masks(p: float, *shape: int) -> Tensor:
            return (torch.rand(shape, generator=generator) >= p).float() / (1 - p)

        s, m = config.mc_samples, len(MEMBERS)
        self.register_buffer("input_masks", masks(config.head_dropout, s, sum(config.view_widths)))  # [S,8d]
        self.register_buffer("hidden_masks", masks(config.head_dropout, m, s, config.head_hidden))  # [M,S,H]
        self.register_buffer("highway_masks", masks(config.highway_dropout, s, config.n_features))  # [S,F]


def _mix(members: Members, w: Tensor, features: Tensor) -> Mixture:
    """The mixture of members[M,B,S] under weights w[M]; the equations stand in `HybridModel.mixture`."""
    w = w[:, None, None]  # [M,1,1]
    probs = (w[..., None] * members.logits.softmax(dim=-1)).sum(dim=0).mean(dim=1)  # [B,C]
    mu = (w * members.mu).sum(dim=0)  # [B,S]
    disagreement = (w * (members.mu - mu).square()).sum(dim=0)  # [B,S]
    noise = (w * members.log_var.exp()).sum(dim=0)  # [B,S]
    return Mixture(
        classification_probs=probs,
        regression_pred=mu.mean(dim=1),
        aleatoric=noise.mean(dim=1).sqrt(),
        epistemic=(disagreement.mean(dim=1) + mu.var(dim=1, correction=1)).sqrt(),
        predictive_entropy=-(probs * probs.clamp_min(1e-12).log()).sum(dim=1),
        features=features,
    )
