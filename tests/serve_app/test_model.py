"""The model: its folded inference against plain loops, its uncertainty identities, its file round trip."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from serve_app.contract import MEMBERS
from serve_app.model import HybridModel, ModelConfig

DEFAULT = ModelConfig()
TINY = ModelConfig(
    n_features=3,
    n_steps=4,
    filter_sizes=(1, 3),
    channels=2,
    excite_ratio=2,
    width=4,
    lstm_hidden=2,
    head_hidden=3,
    mc_samples=4,
)


def make_model(config: ModelConfig = DEFAULT, seed: int = 0) -> HybridModel:
    """A model with random weights everywhere, also where training starts from zero."""
    torch.manual_seed(seed)
    model = HybridModel(config)
    for head in model.heads:
        torch.nn.init.normal_(head.out.weight, std=0.2)
    torch.nn.init.normal_(model.highway.weight, std=0.2)
    torch.nn.init.normal_(model.highway.bias, std=0.2)
    with torch.no_grad():
        model.ensemble_logits.copy_(torch.tensor([0.4, -0.3, 0.1]))
        model.normalise.mean.normal_()
        model.normalise.sd.uniform_(0.5, 2.0)
    return model


def windows(n: int, config: ModelConfig = DEFAULT, seed: int = 1) -> Tensor:
    return torch.randn(n, config.n_features, config.n_steps, generator=torch.Generator().manual_seed(seed))


def loop_over_masks(model: HybridModel, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every member under every mask by the textbook: mask the activations, one sample after another, nothing folded."""
    model.eval()
    x = model.normalise(x)
    assert model.cnn.first_kernel is None, "the oracle must not run folded convolutions"
    views = model.views(x)
    starts = [0, 2 * model.config.width, 4 * model.config.width]
    outputs = []
    for m, (head, view) in enumerate(zip(model.heads, views, strict=True)):
        samples = []
        for s in range(model.config.mc_samples):
            mask = model.input_masks[s, starts[m] : starts[m] + view.shape[1]]
            hidden = functional.gelu(head.hidden(view * mask)) * model.hidden_masks[m, s]
            samples.append(head.out(hidden) + model.highway(x[:, :, -1] * model.highway_masks[s]))
        outputs.append(torch.stack(samples, dim=1))
    out = torch.stack(outputs)  # [M,B,S,outputs]
    return out[..., :3].softmax(-1), out[..., 3], out[..., 4].clamp(-6, 6).exp()


def answer(model: HybridModel, x: Tensor, **options: Any) -> dict[str, Tensor]:
    with torch.inference_mode():
        return {k: v for k, v in model.predict(x, **options).items() if v is not None}


@pytest.mark.parametrize("use_ensemble", [True, False])
def test_folded_samples_equal_a_plain_loop_and_the_law_of_total_variance(use_ensemble: bool) -> None:
    model, x = make_model(), windows(5)
    with torch.no_grad():
        probs, mu, var = loop_over_masks(model, x)
        w = model.ensemble_logits.softmax(0) if use_ensemble else torch.tensor([0.0, 0.0, 1.0])
    got = answer(model.fold(), x, use_ensemble=use_ensemble)

    torch.testing.assert_close(
        got["classification_probs"], torch.einsum("m,mbsc->bc", w, probs) / 32, atol=1e-5, rtol=0
    )
    mean = torch.einsum("m,mbs->b", w, mu) / 32
    torch.testing.assert_close(got["regression_pred"], mean, atol=1e-5, rtol=0)
    # Variance of the mixture straight from its definition, over all M·S components at once.
    second_moment = torch.einsum("m,mbs->b", w, var + mu.square()) / 32
    per_sample = torch.einsum("m,mbs->bs", w, mu)
    correction = per_sample.var(dim=1, correction=1) - per_sample.var(dim=1, correction=0)
    total = got["aleatoric"].square() + got["epistemic"].square()
    torch.testing.assert_close(total, second_moment - mean.square() + correction, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got["aleatoric"].square(), torch.einsum("m,mbs->b", w, var) / 32, atol=1e-5, rtol=1e-5)


def test_a_row_alone_is_the_same_row_in_a_batch() -> None:
    model, x = make_model().fold(), windows(33)
    together = answer(model, x, return_features=True)
    for i in (0, 7, 32):
        alone = answer(model, x[i : i + 1], return_features=True)
        for name, value in alone.items():
            torch.testing.assert_close(value, together[name][i : i + 1], atol=1e-5, rtol=1e-5, msg=name)


def test_the_same_input_twice_is_bit_equal() -> None:
    model, x = make_model().fold(), windows(3)
    first, second = answer(model, x), answer(model, x)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fusion_alone_has_no_weights_and_ignores_the_other_members() -> None:
    model, x = make_model(), windows(4)
    before = answer(model.fold(), x, use_ensemble=False)
    with torch.no_grad():
        for head in list(model.heads)[: MEMBERS.index("fusion")]:
            head.out.weight.mul_(100)
    after = answer(model.fold(), x, use_ensemble=False)
    assert "ensemble_weights" not in after
    torch.testing.assert_close(before["classification_probs"], after["classification_probs"])
    assert not torch.allclose(answer(model, x)["regression_pred"], after["regression_pred"])


def test_members_that_disagree_raise_the_epistemic_part() -> None:
    model, x = make_model(), windows(4)
    agree = answer(model.fold(), x)
    with torch.no_grad():
        model.heads[0].out.bias[3] += 2.0
        model.heads[1].out.bias[3] -= 2.0
    disagree = answer(model.fold(), x)
    assert (disagree["epistemic"].square() > agree["epistemic"].square() + 1.0).all()
    torch.testing.assert_close(disagree["aleatoric"], agree["aleatoric"])


def test_shapes_and_ranges_are_those_of_the_contract() -> None:
    got = answer(make_model().fold(), windows(2), return_features=True)
    assert {name: tuple(v.shape) for name, v in got.items()} == {
        "classification_probs": (2, 3),
        "regression_pred": (2,),
        "aleatoric": (2,),
        "epistemic": (2,),
        "predictive_entropy": (2,),
        "ensemble_weights": (2, 3),
        "features": (2, 128),
    }
    torch.testing.assert_close(got["classification_probs"].sum(1), torch.ones(2))
    assert (got["epistemic"] > 0).all()
    assert (got["predictive_entropy"] <= torch.log(torch.tensor(3.0)) + 1e-6).all()


def test_gradients_match_finite_differences_and_reach_every_parameter() -> None:
    model = make_model(TINY).double().eval()
    x = windows(2, TINY).double().requires_grad_()
    names = [name for name, _ in model.named_parameters() if name != "ensemble_logits"]

    def outputs(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,)))

    parameters = [dict(model.named_parameters())[name] for name in names]
    assert torch.autograd.gradcheck(outputs, (x, *parameters))
    sum(part.square().sum() for part in model(x)).backward()  # type: ignore[union-attr]
    assert [name for name in names if dict(model.named_parameters())[name].grad is None] == []


def test_float32_agrees_with_float64() -> None:
    model, x = make_model(), windows(4)
    single = answer(model.fold(), x)
    double = answer(model.double().fold(), x.double())
    for name in single:
        torch.testing.assert_close(single[name].double(), double[name], atol=1e-5, rtol=1e-4, msg=name)


def test_more_weight_samples_converge_as_one_over_root_s() -> None:
    reference = answer(same_weights(4096, mask_seed=99).fold(), windows(16))["classification_probs"]
    sizes = torch.tensor([4.0, 16.0, 64.0, 256.0])
    errors = []
    for size in sizes.int().tolist():
        squares = [
            (answer(same_weights(size, mask_seed=seed).fold(), windows(16))["classification_probs"] - reference)
            .square()
            .mean()
            for seed in range(12)
        ]
        errors.append(torch.stack(squares).mean().sqrt())
    slope = torch.linalg.lstsq(
        torch.stack([sizes.log(), torch.ones(4)], 1), torch.stack(errors).log()[:, None]
    ).solution[0]
    assert slope.item() == pytest.approx(-0.5, abs=0.1)


def same_weights(samples: int, mask_seed: int) -> HybridModel:
    return make_model(ModelConfig(mc_samples=samples, mask_seed=mask_seed))


def test_a_saved_model_answers_as_before() -> None:
    model, x = make_model(), windows(4)
    file = safetensors.torch.save(model.state_dict())
    config = json.loads(json.dumps(model.config.to_dict()))

    loaded = HybridModel(ModelConfig.from_dict(config))
    loaded.load_state_dict(safetensors.torch.load(file))
    before, after = answer(model.fold(), x), answer(loaded.fold(), x)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert safetensors.torch.save(model.state_dict()) == file, "folding must not enter the file"


def test_features_beyond_the_clip_change_nothing_more() -> None:
    model = make_model().fold()
    x = windows(2)
    far, farther = x.clone(), x.clone()
    far[:, 7], farther[:, 7] = 50.0, 1e6
    torch.testing.assert_close(answer(model, far)["regression_pred"], answer(model, farther)["regression_pred"])


def test_predict_refuses_to_run_unfolded_or_while_training() -> None:
    model, x = make_model(), windows(1)
    with pytest.raises(RuntimeError, match="fold"):
        model.eval().predict(x)
    with pytest.raises(RuntimeError, match="fold"):
        model.fold().train().predict(x)
    model.eval()
    with pytest.raises(RuntimeError, match="fold"):
        model.predict(x)  # what fold prepared before training is stale


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")  # torch's own, about its LSTM
def test_it_exports_with_a_free_batch_size() -> None:
    class Exported(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model().fold()

        def forward(self, x: Tensor) -> dict[str, Tensor | None]:
            return self.model.predict(x)

    module = Exported().eval()
    program = torch.export.export(
        module, (windows(4),), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    )
    x = windows(9)
    expected = answer(module.model, x)
    for name, value in program.module()(x).items():
        if value is not None:
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"wdith": 3}, "unknown model settings: wdith"),
        ({"filter_sizes": [2]}, "odd"),
        ({"width": 30, "attention_heads": 4}, "divide"),
        ({"attention_heads": 0}, "sizes"),
        ({"clip": -5.0}, "clip"),
        ({"log_var_limit": 0.0}, "log_var_limit"),
        ({"mc_samples": 1}, "variance"),
        ({"head_dropout": 1.0}, "dropout"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ModelConfig.from_dict(values)
