"""One update: its clipping, its learning rate, what it forgets."""

import math

import pytest
import torch

import p3o


class Model(torch.nn.Module):
    """A body and a head, two parameters each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Parameter(torch.zeros(2))
        self.head = torch.nn.Parameter(torch.zeros(2))


def sgd(model: Model) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [model.body]}, {"params": [model.head], "lr_scale": 10}])


def test_a_step_clips_the_gradient_to_norm_1_and_reports_its_norm_before():
    model = Model()
    (model.body * torch.tensor([3.0, 4.0])).sum().backward()
    norm = p3o.gradient_step(model, sgd(model), 1.0)
    assert norm == pytest.approx(5.0), "the norm should be this loss's, before it is clipped"
    assert torch.allclose(model.body.detach(), torch.tensor([-0.6, -0.8]))


def test_a_step_clips_the_norm_over_all_parameter_groups():
    """Clipped apart, body and head would leave the gradient's direction."""
    model = Model()
    (3 * model.body[0] + 4 * model.head[0]).backward()
    assert p3o.gradient_step(model, sgd(model), 0.1) == pytest.approx(5.0)
    assert model.body[0].item() == pytest.approx(-0.06)
    assert model.head[0].item() == pytest.approx(-0.8), "the head's rate is ten times the body's"


def test_a_step_forgets_the_gradient_of_the_step_before():
    model = Model()
    optimizer = sgd(model)
    for _ in range(2):
        (model.body * torch.tensor([0.3, 0.4])).sum().backward()
        p3o.gradient_step(model, optimizer, 1.0)
    assert torch.allclose(model.body.detach(), -2 * torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_a_gradient_that_is_not_finite_stops_before_the_update(bad):
    model = Model()
    (model.body * bad).sum().backward()
    with pytest.raises(FloatingPointError):
        p3o.gradient_step(model, sgd(model), 1.0)
    assert torch.equal(model.body.detach(), torch.zeros(2))


def test_the_learning_rate_warms_up_over_a_twentieth_then_falls_and_is_never_0():
    rates = [p3o.learning_rate(2.0, step, 100) for step in range(100)]
    assert rates[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6])
    assert max(rates) == rates[4]
    assert rates[5:] == pytest.approx([2.0 * (1 - step / 100) for step in range(5, 100)])
    assert min(rates) > 0


def test_a_stage_of_one_step_has_the_peak_rate():
    assert p3o.learning_rate(2.0, 0, 1) == 2.0
