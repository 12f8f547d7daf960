"""The points between two models, against numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from flow_lightning.method.path import depth_factors, point


def network(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    model[1].num_batches_tracked.fill_(seed)
    return model.state_dict()


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.8])
def test_the_straight_line_is_numpys_for_all_tensors_running_statistics_included(alpha):
    start, end = network(1), network(2)
    for name, value in point(start, end, alpha).items():
        if value.is_floating_point():
            expected = (1 - alpha) * start[name].double().numpy() + alpha * end[name].double().numpy()
            np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert point(start, end, alpha)["1.num_batches_tracked"] == 2


@pytest.mark.parametrize("shape", ["even", "depth"])
def test_the_ends_are_the_models_to_the_bit_even_if_training_has_diverged(shape):
    start, end = network(1), network(2)
    diverged = {name: value * torch.nan if value.is_floating_point() else value for name, value in end.items()}
    assert all(torch.equal(value, start[name]) for name, value in point(start, diverged, 0.0, shape).items())
    last = point(start, end, 1.0, shape)
    assert torch.equal(last["3.weight"], end["3.weight"])
    assert torch.equal(last["0.weight"], (end if shape == "even" else start)["0.weight"])


def test_the_points_are_copies():
    start, end = network(1), network(2)
    for alpha in (0.0, 0.5, 1.0):
        for value in point(start, end, alpha).values():
            value.zero_()
    assert start["0.weight"].any() and end["0.weight"].any()


def test_half_precision_is_computed_in_single_precision():
    start, end = torch.tensor([1.0, 256.0]).bfloat16(), torch.tensor([1.0078125, 258.0]).bfloat16()
    value = point({"w": start}, {"w": end}, 0.75)["w"]
    assert value.dtype == torch.bfloat16
    assert torch.equal(value, (0.25 * start.float() + 0.75 * end.float()).bfloat16())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_update_of_an_adapter_grows_with_alpha_and_not_with_its_square(alpha):
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 5)), generator.normal(size=(4, 2))
    names = ("layers.0.q_proj.lora_A.default.weight", "layers.0.q_proj.lora_B.default.weight")
    end = {name: torch.from_numpy(value) for name, value in zip(names, (first, second))}
    start = {names[0]: torch.from_numpy(generator.normal(size=(2, 5))), names[1]: torch.zeros(4, 2).double()}
    a, b = point(start, end, alpha).values()
    np.testing.assert_allclose((b @ a).numpy(), alpha * second @ first, rtol=1e-12, atol=1e-12)


def test_factors_grow_linearly_with_the_block():
    names = ["conv_stem.weight", "bn1.weight", "blocks.0.0.conv.weight", "blocks.0.0.bn.bias", "blocks.0.1.conv.weight"]
    names += ["model.layers.5.mlp.experts.3.weight", "model.layers.5.q_proj.weight", "norm.weight"]
    expected = np.array([0, 1, 2, 2, 3, 4, 4, 5]) / 5
    np.testing.assert_allclose(list(depth_factors(names).values()), expected)


def test_a_point_by_depth_is_numpys():
    start, end = network(1), network(2)
    value = point(start, end, 0.4, "depth")["1.weight"].numpy()
    middle = 0.4 * 1 / 2  # the second of three blocks with tensors
    np.testing.assert_allclose(value, (1 - middle) * start["1.weight"].numpy() + middle * end["1.weight"].numpy(), 1e-6)


def test_what_has_no_path_is_named():
    start, end = network(1), network(2)
    with pytest.raises(ValueError, match=r"3\.weight had shape \[2, 4\] and is of shape \[3, 4\] now"):
        point(start, end | {"3.weight": torch.zeros(3, 4)}, 0.5)
    with pytest.raises(ValueError, match=r"0\.bias had shape \[4\] and is missing now"):
        point(start, {name: value for name, value in end.items() if name != "0.bias"}, 0.5)
    with pytest.raises(ValueError, match="shape is 'round'; expected one of even, depth"):
        point(start, end, 0.5, "round")
