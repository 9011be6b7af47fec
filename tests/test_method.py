"""The mathematics: representation, bases, projection, metrics and the schedule, against plain forms and hand-worked values.

The functions of sections 4 to 6 are equal in all scripts (test_consistency.py), so one script stands for all here.
"""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import main_cifar100 as gpm
import main_cifar100_superclass
import main_five_datasets
import main_pmnist

NETWORKS = {
    "MLP": (main_pmnist, (784,)),
    "AlexNet": (gpm, (3, 32, 32)),
    "LeNet": (main_cifar100_superclass, (3, 32, 32)),
    "ResNet18": (main_five_datasets, (3, 32, 32)),
}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=NETWORKS)
def network(request):
    """(model, shape of an image) of each script."""
    script, shape = NETWORKS[request.param]
    return script.build_model(script.parse_args([])), shape


def orthonormal(d, r):
    return torch.linalg.qr(torch.randn(d, r))[0]


def random_bases(model, share):
    return {name: orthonormal(d, max(1, int(share * d))) for name, d in gpm.widths(gpm.projected_layers(model)).items()}


def energy_share(M, R):
    M, R = M.double(), R.double()
    return ((M.T @ R).square().sum() / R.square().sum()).item()


# Representation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel, stride, padding", [(3, 1, 1), (4, 1, 0), (3, 2, 1), (1, 2, 0), (5, 1, 2)])
def test_representation_of_a_convolution_is_its_patches(kernel, stride, padding):
    layer = nn.Conv2d(3, 7, kernel, stride=stride, padding=padding, bias=False)
    x = torch.randn(2, 3, 9, 9)
    padded = F.pad(x, [padding] * 4)
    columns = [padded[b, :, i : i + kernel, j : j + kernel].flatten()
               for b in range(2)
               for i in range(0, padded.shape[2] - kernel + 1, stride)
               for j in range(0, padded.shape[3] - kernel + 1, stride)]
    R = gpm.representation_matrix(layer, x)
    assert torch.equal(R, torch.stack(columns, dim=1))
    assert torch.allclose(layer.weight.flatten(1) @ R, layer(x).transpose(0, 1).flatten(1), atol=1e-5)


def test_representation_of_a_linear_layer_is_its_inputs():
    layer, x = nn.Linear(5, 3, bias=False), torch.randn(4, 5)
    assert torch.equal(gpm.representation_matrix(layer, x), x.T)


def test_layer_inputs_are_what_the_layers_see(network):
    model, shape = network
    x = torch.randn(6, *shape)
    inputs = gpm.layer_inputs(model, x, 0)
    assert list(inputs) == list(gpm.projected_layers(model))
    assert torch.equal(next(iter(inputs.values())), x)
    assert not model.training
    again = gpm.layer_inputs(model, x, 0)  # dropout is off
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    for name, layer in gpm.projected_layers(model).items():
        assert inputs[name].shape[1] == layer.weight.shape[1]
        assert not layer._forward_pre_hooks


# Bases ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d, n", [(30, 200), (30, 30), (60, 20)])
@pytest.mark.parametrize("eps", [0.5, 0.9, 0.99])
def test_first_basis_is_the_smallest_that_holds_eps(d, n, eps):
    R = torch.randn(d, n).relu() * torch.rand(d, 1)
    M = gpm.update_basis(torch.empty(d, 0), R, eps)
    U, S, _ = torch.linalg.svd(R.double(), full_matrices=False)
    r = M.shape[1]
    assert energy_share(M, R) >= eps - 1e-6
    assert S[: r - 1].square().sum() < eps * S.square().sum() <= S[:r].square().sum() + 1e-9
    assert torch.allclose(M.double() @ M.double().T, U[:, :r] @ U[:, :r].T, atol=1e-5)  # the same space
    assert M.dtype == torch.float32 and torch.allclose(M.T @ M, torch.eye(r), atol=1e-5)


def test_later_bases_grow_by_the_fewest_columns():
    M = gpm.update_basis(torch.empty(40, 0), torch.randn(40, 15), 0.9)
    R = torch.randn(40, 60)
    grown = gpm.update_basis(M, R, 0.9)
    assert torch.equal(grown[:, : M.shape[1]], M)
    assert M.shape[1] < grown.shape[1] < 40
    assert energy_share(grown[:, :-1], R) < 0.9 <= energy_share(grown, R) + 1e-9


def test_a_basis_that_holds_enough_is_left_alone():
    M = orthonormal(20, 6)
    R = M @ torch.randn(6, 50) + 1e-3 * torch.randn(20, 50)
    assert torch.equal(gpm.update_basis(M, R, 0.99), M)


def test_bases_stay_orthonormal_over_20_tasks():
    M = torch.empty(300, 0)
    for task in range(20):
        R = torch.randn(300, 40) @ torch.randn(40, 500) + 0.01 * torch.randn(300, 500)
        M = gpm.update_basis(M, R, 0.98 + 0.001 * task)
        assert M.shape[1] <= 300
        assert torch.linalg.norm(M.T @ M - torch.eye(M.shape[1])) < 1e-5
    assert M.shape[1] == 300  # the last tasks found no room left


@pytest.mark.parametrize("R, rank", [
    (torch.zeros(10, 25), 0),
    (torch.arange(1.0, 11)[:, None] * torch.ones(25), 1),
    (torch.eye(10)[:, :4] * 3, 4),
], ids=["zero", "rank one", "rank four"])
@pytest.mark.parametrize("eps", [0.9999, 1.0])
def test_degenerate_representations(R, rank, eps):
    M = gpm.update_basis(torch.empty(10, 0), R, eps)
    assert M.shape == (10, rank)
    assert torch.allclose(M.T @ M, torch.eye(rank), atol=1e-6)


@pytest.mark.parametrize("eps", [0.99, 1.0])
def test_rounding_noise_adds_no_skewed_columns(eps):
    M = orthonormal(50, 30)
    R = M @ torch.randn(30, 400)  # in the space of M but for float32's rounding
    grown = gpm.update_basis(M, R, eps)
    assert grown.shape[1] == 30
    assert torch.linalg.norm(grown.T @ grown - torch.eye(grown.shape[1])) < 1e-5


def test_no_space_is_left_beside_a_full_basis():
    M = orthonormal(12, 12)
    assert torch.equal(gpm.update_basis(M, torch.randn(12, 30), 1.0), M)


def test_update_bases_uses_the_first_samples_of_one_draw(network):
    model, shape = network
    x = torch.randn(20, *shape)
    layers = gpm.projected_layers(model)
    eps, n_samples = [0.9] * len(layers), list(range(6, 6 + len(layers)))
    torch.manual_seed(5)
    bases = gpm.update_bases(model, 0, x, {}, eps, n_samples)
    torch.manual_seed(5)
    inputs = gpm.layer_inputs(model, x[torch.randperm(20)[: max(n_samples)]], 0)
    for (name, layer), n in zip(layers.items(), n_samples):
        R = gpm.representation_matrix(layer, inputs[name][:n])
        assert torch.equal(bases[name], gpm.update_basis(torch.empty(len(R), 0), R, 0.9))


# Projection -----------------------------------------------------------------------------------------------------------


def gradients(model, x, y, bases, known=None):
    """Gradients of a batch, {parameter: tensor}, dropout the same every time."""
    model.train()
    torch.manual_seed(1)
    with gpm.gradient_projection(gpm.projected_layers(model), bases, known or {}):
        F.cross_entropy(model(x, 0), y).backward()
    found = {name: W.grad for name, W in model.named_parameters() if W.grad is not None}
    model.zero_grad()
    return found


def test_weights_receive_the_projected_gradient(network):
    model, shape = network
    x, y = torch.randn(8, *shape), torch.randint(0, 5, (8,))
    bases = random_bases(model, 0.6)
    plain, projected = gradients(model, x, y, {}), gradients(model, x, y, bases)
    assert plain.keys() == projected.keys()
    for name, G in plain.items():
        layer = name.removesuffix(".weight")
        if layer in bases:
            M = bases[layer]
            expected = G.flatten(1) - G.flatten(1) @ (M @ M.T)
            assert torch.allclose(projected[name].flatten(1), expected, atol=1e-5 * G.abs().max())
            assert (projected[name].flatten(1) @ M).abs().max() < 1e-5 * G.abs().max()
            assert expected.norm() > 0.1 * G.norm()  # something is left to compare
        else:
            assert torch.allclose(projected[name], G, atol=1e-6)


def test_only_layers_with_a_basis_are_projected(network):
    model, shape = network
    x, y = torch.randn(8, *shape), torch.randint(0, 5, (8,))
    last = list(gpm.projected_layers(model))[-1]
    M = random_bases(model, 0.5)[last]
    plain, projected = gradients(model, x, y, {}), gradients(model, x, y, {last: M})
    for name, G in plain.items():
        assert torch.allclose(projected[name], G, atol=1e-6) == (name != f"{last}.weight")


def test_projected_inputs_may_be_known_beforehand():
    model = main_pmnist.build_model(main_pmnist.parse_args([]))
    x, y = torch.randn(10, 784), torch.randint(0, 10, (10,))
    bases = random_bases(model, 0.6)
    computed = gradients(model, x, y, bases)
    known = gradients(model, x, y, bases, {"fc1": gpm.project(x, bases["fc1"])})
    assert computed.keys() == known.keys() and all(torch.equal(computed[name], known[name]) for name in computed)


def test_layers_are_as_before_after_the_projection(network):
    model, shape = network
    layers = gpm.projected_layers(model)
    with pytest.raises(KeyboardInterrupt), gpm.gradient_projection(layers, random_bases(model, 0.5), {}):
        raise KeyboardInterrupt
    for layer in layers.values():
        assert "forward" not in vars(layer)
        assert not layer.weight._backward_hooks


def test_full_bases_keep_the_logits_of_an_old_task(network):
    model, shape = network
    x, y, old = torch.randn(16, *shape), torch.randint(0, 5, (16,)), torch.randn(16, *shape)
    gpm.freeze_batchnorm(model)
    task = 0 if isinstance(model, main_pmnist.MLP) else 1  # where there are heads, the new task trains its own
    before = model.eval()(old, 0).detach()
    weights = {name: W for name, W in model.named_parameters() if W.requires_grad}
    started = {name: W.detach().clone() for name, W in weights.items()}
    model.train()
    with gpm.gradient_projection(gpm.projected_layers(model), random_bases(model, 1.0), {}):
        for _ in range(10):
            F.cross_entropy(model(x, task), y).backward()
            gpm.sgd_step(weights, 0.01, 0.0, {})
    assert torch.allclose(model.eval()(old, 0), before, atol=1e-5)
    moved = {name for name, W in weights.items() if not torch.allclose(W, started[name], atol=1e-5)}
    assert moved == ({"heads.1.weight"} if task else set())


def test_frozen_batchnorm_does_not_train():
    model = gpm.build_model(gpm.parse_args([]))
    gpm.freeze_batchnorm(model)
    frozen = {name for name, W in model.named_parameters() if not W.requires_grad}
    assert frozen == {f"bn{i}.{part}" for i in range(1, 6) for part in ("weight", "bias")}


# Networks -------------------------------------------------------------------------------------------------------------


def test_projected_layers():
    widths = {script: gpm.widths(gpm.projected_layers(script.build_model(script.parse_args([])))) for script, _ in NETWORKS.values()}
    assert widths[main_pmnist] == {"fc1": 784, "fc2": 100, "fc3": 100}
    assert widths[gpm] == {"conv1": 48, "conv2": 576, "conv3": 512, "fc1": 1024, "fc2": 2048}
    assert widths[main_cifar100_superclass] == {"conv1": 75, "conv2": 500, "fc1": 3200, "fc2": 800}
    resnet = widths[main_five_datasets]
    assert len(resnet) == 20 and {name: d for name, d in resnet.items() if "shortcut" in name} == {
        "stage2.0.shortcut.0": 20, "stage3.0.shortcut.0": 40, "stage4.0.shortcut.0": 80}
    assert [resnet["conv1"], resnet["stage1.0.conv1"], resnet["stage4.0.conv1"], resnet["stage4.1.conv2"]] == [27, 180, 720, 1440]


def test_samples_of_resnet_by_layer():
    args = main_five_datasets.parse_args([])
    samples = dict(zip(gpm.projected_layers(main_five_datasets.build_model(args)), args.n_samples, strict=True))
    assert {name for name, n in samples.items() if n == 10} == {
        "conv1", *(f"stage1.{block}.conv{i}" for block in "01" for i in "12"),
        "stage2.0.conv1", "stage2.0.conv2", "stage2.0.shortcut.0", "stage2.1.conv1"}
    assert {name for name, n in samples.items() if n == 50} == {"stage2.1.conv2", "stage3.0.conv1", "stage3.0.conv2", "stage3.0.shortcut.0"}
    assert {n for n in samples.values()} == {10, 50, 100}
    assert main_five_datasets.parse_args(["--n_samples", "7"]).n_samples == [7]


def test_networks_have_no_biases_and_the_published_size(network):
    model, shape = network
    biased = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None]
    assert not biased
    assert all(not module.track_running_stats for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)))
    size = sum(W.numel() for W in model.parameters())
    assert size == {"MLP": 89_400, "AlexNet": 6_713_216, "LeNet": 3_036_500, "ResNet18": 1_125_140}[type(model).__name__]


def test_alexnet_equals_the_order_of_operations_in_the_paper():
    model = gpm.build_model(gpm.parse_args([]))
    x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))

    def published(x):
        for conv, bn, drop in ((model.conv1, model.bn1, model.drop1), (model.conv2, model.bn2, model.drop1), (model.conv3, model.bn3, model.drop2)):
            x = F.max_pool2d(drop(F.relu(bn(conv(x)))), 2)
        x = x.flatten(1)
        for fc, bn in ((model.fc1, model.bn4), (model.fc2, model.bn5)):
            x = model.drop2(F.relu(bn(fc(x))))
        return model.heads[3](x)

    found = {}
    for name, forward in (("published", published), ("ours", lambda x: model(x, 3))):
        torch.manual_seed(2)
        logits = forward(x)
        F.cross_entropy(logits, y).backward()
        found[name] = [logits.detach()] + [W.grad.clone() for W in model.parameters() if W.grad is not None]
        model.zero_grad()
    assert len(found["ours"]) == 17
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found["ours"], found["published"]))


def test_lenet_equals_the_published_network():
    model = main_cifar100_superclass.build_model(main_cifar100_superclass.parse_args([]))
    norm, x = nn.LocalResponseNorm(4, 0.001 / 9, 0.75, 1.0), 30 * torch.rand(4, 3, 32, 32)
    h = F.max_pool2d(norm(F.relu(model.conv1(x))), 3, 2, 1)
    h = F.max_pool2d(norm(F.relu(model.conv2(h))), 3, 2, 1)
    h = F.relu(model.fc2(F.relu(model.fc1(h.flatten(1)))))
    assert torch.allclose(model(x, 7), model.heads[7](h), rtol=1e-4, atol=1e-4)


def test_resnet_equals_the_published_network():
    model = main_five_datasets.build_model(main_five_datasets.parse_args([]))
    weights, x = dict(model.named_parameters()), torch.randn(4, 3, 32, 32)

    def normed(h, name):
        h = (h - h.mean((0, 2, 3), keepdim=True)) / (h.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        return h * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    h = F.relu(normed(F.conv2d(x, weights["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            name, stride = f"stage{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.relu(normed(F.conv2d(h, weights[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
            y = normed(F.conv2d(y, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if stride == 2:
                h = normed(F.conv2d(h, weights[f"{name}.shortcut.0.weight"], stride=2), f"{name}.shortcut.1")
            h = F.relu(y + h)
    h = h.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)).flatten(1)  # means over 2x2 fields
    assert h.shape == (4, 640)
    assert torch.allclose(model(x, 3), F.linear(h, weights["heads.3.weight"]), atol=1e-4)


def test_rates_of_dropout_and_initialisation_of_lenet():
    alexnet = gpm.build_model(gpm.parse_args([]))
    assert (alexnet.drop1.p, alexnet.drop2.p) == (0.2, 0.5)
    lenet = main_cifar100_superclass.build_model(main_cifar100_superclass.parse_args([]))
    for W in lenet.parameters():  # kaiming_uniform_ for ReLU: within sqrt(6 / fan_in), PyTorch's default within sqrt(1 / fan_in)
        bound = math.sqrt(6 / W[0].numel())
        assert 0.95 * bound < W.abs().max() <= bound


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout(p):
    drop, x = gpm.Dropout(p), torch.ones(1000, 1001)
    y = drop(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    assert abs((y == 0).double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / x.numel())  # four standard deviations
    assert not torch.equal(y, drop(x))
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("channels", [3, 20, 50])
def test_local_response_norm_equals_the_general_form(channels):
    x = 300 * torch.randn(4, channels, 6, 6)  # far more than activations are, so that the divisor runs up to 30
    general = nn.LocalResponseNorm(4, 0.001 / 9, 0.75, 1.0)
    banded = main_cifar100_superclass.LocalResponseNorm(channels)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = general(a), banded(b)
    ya.square().sum().backward()
    yb.square().sum().backward()
    assert torch.allclose(ya, yb, rtol=2e-6, atol=0)
    assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-6 * a.grad.abs().max().item())
    assert not torch.allclose(a.grad, 2 * x, rtol=0.1)  # what no norm at all would give


# Training and evaluation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torch(momentum):
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum)
    velocity, weights = {}, dict(ours.named_parameters())
    for _ in range(4):
        x = torch.randn(5, 4)
        for layer in ours, theirs:
            layer(x).square().sum().backward()
        gpm.sgd_step(weights, 0.1, momentum, velocity)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6) and torch.allclose(ours.bias, theirs.bias, atol=1e-6)
    assert bool(velocity) == bool(momentum)
    assert all(W.grad is None for W in weights.values())


def test_an_epoch_sees_every_image_once_and_reports_what_it_saw():
    model = main_pmnist.build_model(main_pmnist.parse_args([]))
    x, y = torch.randn(25, 784), torch.randint(0, 10, (25,))
    start = {name: W.detach().clone() for name, W in model.named_parameters()}
    loss, acc = gpm.train_epoch(model, 0, x, {}, y, {}, 0.0, 0.0, {}, 10)  # lr 0: batch by batch the same as at once
    assert (loss, acc) == pytest.approx(gpm.evaluate(model, 0, x, y, 64), rel=1e-5)
    assert all(torch.equal(W, start[name]) for name, W in model.named_parameters())
    gpm.train_epoch(model, 0, x, {}, y, {}, 0.1, 0.0, {}, 10)
    assert all(not torch.equal(W, start[name]) for name, W in model.named_parameters())


def test_evaluation_draws_no_random_numbers(network):
    model, shape = network
    x, y = torch.randn(9, *shape), torch.randint(0, 5, (9,))
    before = torch.get_rng_state()
    loss, acc = gpm.evaluate(model, 0, x, y, batch_size=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert math.isfinite(loss) and acc in [pytest.approx(100 * k / 9) for k in range(10)]


def test_evaluation_depends_on_the_batch_through_batchnorm():
    model = gpm.build_model(gpm.parse_args([]))
    x, y = torch.randn(12, 3, 32, 32), torch.randint(0, 10, (12,))
    by_four = torch.cat([model.eval()(part, 0) for part in x.split(4)])
    assert gpm.evaluate(model, 0, x, y, 4)[0] == pytest.approx(F.cross_entropy(by_four, y).item(), rel=1e-5)
    assert gpm.evaluate(model, 0, x, y, 4)[0] != pytest.approx(gpm.evaluate(model, 0, x, y, 12)[0], rel=1e-3)


def schedule(monkeypatch, losses, **flags):
    """Run train_task on a scripted sequence of validation losses. Returns (lr of each epoch, epoch whose weights are kept)."""
    args = SimpleNamespace(**{"n_epochs": 100, "lr": 0.8, "lr_min": 0.1, "lr_patience": 2, "lr_factor": 2.0, "momentum": 0.0,
                              "batch_size_train": 5, "batch_size_test": 5, **flags})
    model, rates, coming = nn.Sequential(nn.Linear(2, 2, bias=False)), [], iter(losses)

    def train_epoch(model, task, x, x_hat, y, bases, lr, momentum, velocity, batch_size):
        rates.append(lr)
        model[0].weight.data.fill_(len(rates))
        return 1.0, 50.0

    monkeypatch.setattr(gpm, "train_epoch", train_epoch)
    monkeypatch.setattr(gpm, "evaluate", lambda *args: (next(coming), 50.0))
    state = gpm.start_of_task(args)
    seconds = {"training": 0.0, "evaluation": 0.0}
    gpm.train_task(model, 0, (torch.zeros(1, 2), None), (None, None), {}, args, state, seconds, save=lambda: None)
    assert state["epoch"] == len(rates)
    return rates, int(model[0].weight[0, 0])


def test_learning_rate_falls_after_patience_and_the_best_weights_are_kept(monkeypatch):
    #         best  best  wait  halve best  wait  halve wait  halve wait  halve: 0.05 < lr_min
    losses = [1.00, 0.90, 0.95, 0.95, 0.80, 0.80, 0.85, 0.90, 0.90, 0.90, 0.90]
    rates, kept = schedule(monkeypatch, losses)
    assert rates == [0.8] * 4 + [0.4] * 3 + [0.2] * 2 + [0.1] * 2
    assert kept == 5


def test_number_of_epochs_is_a_limit(monkeypatch):
    rates, kept = schedule(monkeypatch, [3.0, 2.0, 2.5, 2.6], n_epochs=4)
    assert rates == [0.8] * 4 and kept == 2


def test_patience_zero_keeps_rate_and_last_weights(monkeypatch):
    rates, kept = schedule(monkeypatch, [1.0, 2.0, 3.0, 4.0, 5.0], lr_patience=0, n_epochs=5)
    assert rates == [0.8] * 5 and kept == 5


def test_metrics():
    acc = [[90.0, 0.0, 0.0], [80.0, 70.0, 0.0], [60.0, 65.0, 88.0]]
    assert gpm.average_accuracy(acc) == pytest.approx(71.0)
    assert gpm.backward_transfer(acc) == pytest.approx((60 - 90 + 65 - 70) / 2)
    assert gpm.average_accuracy([[42.0]]) == 42.0 and gpm.backward_transfer([[42.0]]) == 0.0


def test_memory():
    assert gpm.memory({"a": torch.zeros(10, 4), "b": torch.zeros(5, 5)}) == {"floats": 65, "percent_of_max": pytest.approx(52.0)}


def test_inputs_are_projected_beforehand_where_a_linear_layer_sees_the_images():
    class Shifted(nn.Module):  # fc2 is as wide as the images, but does not see them as they are
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)

        def forward(self, x, task):
            return self.fc1(x) + self.fc2(x - 1)

    model, x, bases = Shifted(), torch.randn(9, 6), {"fc1": orthonormal(6, 2), "fc2": orthonormal(6, 3)}
    x_hat = gpm.projected_inputs(model, 0, x, bases)
    assert x_hat.keys() == {"fc1"}
    torch.testing.assert_close(x_hat["fc1"], gpm.project(x, bases["fc1"]))
    assert gpm.projected_inputs(model, 0, x, {}) == {}


def test_a_gpu_computes_in_float32():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    gpm.find_device("cpu")
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is False


def test_projection_is_a_projection():
    M, G = orthonormal(30, 11), torch.randn(7, 30)
    once = gpm.project(G, M)
    assert torch.allclose(gpm.project(once, M), once, atol=1e-6)
    assert np.allclose((once @ M).numpy(), 0, atol=1e-5)
