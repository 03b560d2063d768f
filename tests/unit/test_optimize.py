"""Learning rates worked out by hand, and schedules that go on where they stopped."""

import copy
import math

import pytest
import torch

from cxr_dist.config import OptimizerConfig
from cxr_dist.train.optimize import Schedule, make_optimizer, scaled_lr


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([1.0]))


def config(**values: object) -> OptimizerConfig:
    return OptimizerConfig(**{"lr": 0.1, "weight_decay": 0.0, **values})  # type: ignore[arg-type]


def made(
    config: OptimizerConfig, *, steps_per_epoch: int = 4, epochs: int = 3
) -> tuple[torch.optim.Optimizer, Schedule]:
    optimizer = make_optimizer(config, [weight()], config.lr_reference_batch)
    return optimizer, Schedule(config, optimizer, steps_per_epoch=steps_per_epoch, epochs=epochs)


def rates(optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> list[float]:
    """The rate that each of so many steps uses."""
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.after_step()
    return found


@pytest.mark.parametrize(("rule", "expected"), [("none", 0.1), ("sqrt", 0.2), ("linear", 0.4)])
def test_rate_grows_with_the_batch_by_the_named_rule(rule: str, expected: float) -> None:
    assert scaled_lr(config(lr_rule=rule, lr_reference_batch=16), 64) == pytest.approx(expected)
    optimizer = make_optimizer(config(lr_rule=rule), [weight()], 64)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def test_first_update_of_each_rule_by_hand() -> None:
    # gradient 2, rate 0.1, decay 0.5
    expected = {
        # L2: gradient 2 + 0.5, its first Adam step is its sign
        "adam": 1 - 0.1,
        # decoupled: the weight shrinks by a twentieth, then a step of the sign
        "adamw": 1 * (1 - 0.1 * 0.5) - 0.1,
        "sgd": 1 - 0.1 * 2.5,
    }
    for name, value in expected.items():
        parameter = weight()
        optimizer = make_optimizer(config(name=name, weight_decay=0.5), [parameter], 16)
        parameter.grad = torch.tensor([2.0])
        optimizer.step()
        assert parameter.item() == pytest.approx(value, abs=1e-6), name


def test_sgd_has_momentum() -> None:
    parameter = weight()
    optimizer = make_optimizer(config(name="sgd"), [parameter], 16)
    for _ in range(2):
        parameter.grad = torch.tensor([1.0])
        optimizer.step()
    # 0.1 and then 0.1 * (1 + 0.9)
    assert parameter.item() == pytest.approx(1 - 0.1 - 0.19)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fused_step_is_the_ordinary_one_to_rounding(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(5, 3, generator=generator, dtype=dtype) for _ in range(2)]
    gradients = [[torch.randn(5, 3, generator=generator, dtype=dtype) for _ in start] for _ in range(20)]
    results = []
    for fused in (True, False):
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        optimizer = make_optimizer(config(name=name, lr=0.01, weight_decay=0.1), parameters, 16)
        optimizer.param_groups[0]["fused"] = fused
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        results.append(torch.cat([parameter.detach() for parameter in parameters]))
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(*results, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_restored_optimizer_goes_on_to_the_same_bits(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 7, generator=generator)
    whole, first = (torch.nn.Parameter(torch.ones(7)) for _ in range(2))
    optimizers = [make_optimizer(config(name=name), [parameter], 16) for parameter in (whole, first)]
    for step, gradient in enumerate(gradients):
        if step == 3:
            kept = copy.deepcopy(optimizers[1].state_dict())
            optimizers[1] = make_optimizer(config(name=name), [first], 16)
            optimizers[1].load_state_dict(kept)
        for parameter, optimizer in zip((whole, first), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(whole, first)


def test_constant_rate_after_warm_up() -> None:
    found = rates(*made(config(schedule="constant", warmup_epochs=1)), 12)
    assert found == pytest.approx([0.025, 0.05, 0.075] + [0.1] * 9)


def test_cosine_goes_from_full_to_nearly_zero() -> None:
    found = rates(*made(config(schedule="cosine")), 12)
    assert found == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(12)])
    assert found[0] == pytest.approx(0.1)
    assert found[6] == pytest.approx(0.05)
    warmed = rates(*made(config(schedule="cosine", warmup_epochs=1)), 12)
    assert warmed[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert warmed[8] == pytest.approx(0.05)


def test_plateau_lowers_the_rate_to_a_tenth() -> None:
    optimizer, schedule = made(config(schedule="plateau", plateau_patience=2))
    found = []
    for loss in (1.0, 0.9, 0.95, 0.95, 0.95, 0.8, 0.9):
        schedule.after_epoch(loss)
        found.append(optimizer.param_groups[0]["lr"])
    # two epochs without a lower loss are borne, the third lowers the rate
    assert found == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])


def test_plateau_does_not_move_by_steps_nor_the_others_by_epochs() -> None:
    assert rates(*made(config(schedule="plateau")), 20) == [0.1] * 20
    optimizer, schedule = made(config(schedule="cosine"))
    for _ in range(20):
        schedule.after_epoch(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("kind", ["plateau", "cosine", "constant"])
def test_a_restored_schedule_goes_on_where_it_stopped(kind: str) -> None:
    settings = config(schedule=kind, plateau_patience=0, warmup_epochs=0 if kind == "plateau" else 1)
    whole, broken = made(settings), made(settings)
    for optimizer, schedule in (whole, broken):
        rates(optimizer, schedule, 5)
        schedule.after_epoch(1.0)
    again = made(settings)
    again[0].load_state_dict(broken[0].state_dict())
    again[1].load_state_dict(broken[1].state_dict())
    for _, schedule in (whole, again):
        schedule.after_epoch(2.0)
    assert rates(*again, 5) == rates(*whole, 5)
    expected = {"plateau": 0.01, "constant": 0.1}.get(kind)
    assert expected is None or again[0].param_groups[0]["lr"] == pytest.approx(expected)
