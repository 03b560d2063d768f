"""The size of a run's network, held to the network itself: parameters, checkpoint tensors, and the tensors of a real step."""

import torch

from cxr_dist.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from cxr_dist.model.densenet import DenseNet121, build
from cxr_dist.train.footprint import _peak, footprint
from cxr_dist.train.optimize import make_optimizer


def config() -> Config:
    return Config(model=ModelConfig(weights="random", bn_group=4), train=TrainConfig(global_batch=8))


def bytes_of(tensors: object) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)  # type: ignore[attr-defined]


def test_what_is_counted_without_computing_is_what_a_step_makes() -> None:
    given = config()
    found = footprint(given, num_findings=14, size=64, share=8, use_gpu=False)
    prefix, tail = build(DenseNet121(14).state_dict(), given.model, 14)
    trained = [parameter for parameter in tail.train().parameters() if parameter.requires_grad]
    features = prefix(torch.zeros(8, 3, 64, 64))
    peak, _ = _peak(lambda: tail(features).sum().backward())
    assert found.feature_shape == tuple(features.shape[1:])
    assert found.gradient_bytes == bytes_of(trained)
    assert found.step_peak_bytes == peak - bytes_of(trained) + bytes_of([features])
    optimizer = make_optimizer(OptimizerConfig(name="adam"), trained, 8)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert found.checkpoint_bytes == bytes_of(tail.state_dict().values()) + bytes_of(moments)
    assert found.peak_bytes > found.weights_bytes > found.checkpoint_bytes


def test_sixteen_bits_halve_a_step_and_no_weight() -> None:
    wide = footprint(config(), num_findings=8, size=64, share=8, use_gpu=False)
    narrow = footprint(
        Config(model=config().model, train=TrainConfig(global_batch=8, precision="bf16")),
        num_findings=8,
        size=64,
        share=8,
        use_gpu=False,
    )
    assert narrow.weights_bytes == wide.weights_bytes
    assert narrow.step_peak_bytes == wide.step_peak_bytes // 2
