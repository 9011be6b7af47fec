"""The mathematics: representation, bases, projection, networks, schedule, metrics, against plain forms and hand-worked values.

The functions of sections 4 to 6 are equal in all scripts (test_consistency.py) but for those that main_pmnist.py lists.
"""
import math
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import benchmark
import main_cifar100 as gpm
import main_cifar100_superclass
import main_five_datasets
import main_pmnist


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def build(script):
    return script.build_model(script.parse_args([]))


def orthonormal(d, r):
    return torch.linalg.qr(torch.randn(d, r))[0]


def random_bases(bases, share):
    return {name: orthonormal(len(M), max(1, int(share * len(M)))) for name, M in bases.items()}


# Representation -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kernel, stride, padding, dilation", [
    (3, 1, 1, 1), (4, 1, 0, 1), (3, 2, 1, 1), (1, 2, 0, 1), (5, 1, 2, 1), (3, 2, 1, 2)])
def test_representation_of_a_convolution_is_its_patches(kernel, stride, padding, dilation):
    layer, x = nn.Conv2d(3, 7, kernel, stride, padding, dilation, bias=False), torch.randn(2, 3, 9, 9)
    extent = dilation * (kernel - 1) + 1
    padded = F.pad(x, [padding] * 4)
    columns = [padded[b, :, i : i + extent : dilation, j : j + extent : dilation].flatten() for b in range(2)
               for i in range(0, padded.shape[2] - extent + 1, stride) for j in range(0, padded.shape[3] - extent + 1, stride)]
    R = gpm.representation_matrix(layer, x)
    assert torch.equal(R, torch.stack(columns, dim=1))
    assert torch.allclose(layer.weight.flatten(1) @ R, layer(x).transpose(0, 1).flatten(1), atol=1e-5)
    x = x.to(memory_format=torch.channels_last)
    assert torch.equal(gpm.representation_matrix(layer, x), R)
    assert torch.equal(gpm.representation_matrix(nn.Linear(3, 2), x[:, :, 0, 0]), x[:, :, 0, 0].T)


# Bases ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("d, n", [(30, 200), (30, 30), (60, 20)])
@pytest.mark.parametrize("eps", [0.5, 0.9, 0.99])
def test_first_basis_is_the_smallest_that_holds_eps(d, n, eps):
    R = torch.randn(d, n).relu() * torch.rand(d, 1)
    M = gpm.update_basis(torch.empty(d, 0), R, eps)
    U, S, _ = torch.linalg.svd(R.double(), full_matrices=False)
    r = M.shape[1]
    assert S[: r - 1].square().sum() < eps * S.square().sum() <= S[:r].square().sum() + 1e-9
    assert torch.allclose(M.double() @ M.double().T, U[:, :r] @ U[:, :r].T, atol=1e-5)  # the same space
    assert M.dtype == torch.float32 and torch.allclose(M.T @ M, torch.eye(r), atol=1e-5)


def test_an_svd_that_does_not_converge_is_repeated(monkeypatch):
    M, R = orthonormal(40, 8), torch.randn(40, 60)
    expected = gpm.update_basis(M, R, 0.9)
    monkeypatch.setattr(torch.linalg, "svd", Mock(side_effect=torch.linalg.LinAlgError("The algorithm failed to converge")))
    found = gpm.update_basis(M, R, 0.9)
    assert found.shape == expected.shape and torch.allclose(found @ found.T, expected @ expected.T, atol=1e-5)


@pytest.mark.parametrize("eps, noise", [(0.0, 1e-3), (0.99, 1e-3), (1.0, 0)])
def test_a_basis_that_holds_enough_is_left_alone(eps, noise):
    """But for rounding it holds all where there is no noise."""
    M = orthonormal(20, 6)
    assert torch.equal(gpm.update_basis(M, M @ torch.randn(6, 400) + noise * torch.randn(20, 400), eps), M)
    for R in torch.randn(20, 50), torch.randn(20, 7), torch.ones(20, 3):  # eps = 0: plain SGD
        assert eps or gpm.update_basis(torch.empty(20, 0), R, eps).shape == (20, 0)


def test_bases_stay_orthonormal_over_20_tasks():
    M = torch.empty(300, 0)
    for task in range(20):
        M = gpm.update_basis(M, torch.randn(300, 40) @ torch.randn(40, 500) + 0.01 * torch.randn(300, 500), 0.98 + 0.001 * task)
        assert M.shape[1] <= 300 and torch.linalg.norm(M.T @ M - torch.eye(M.shape[1])) < 1e-5
    assert M.shape[1] == 300  # the last tasks found no room left
    M = gpm.update_basis(M[:, :150], M[:, :150] @ torch.randn(150, 500) + 1e-3 * torch.randn(300, 500), 1 - 1e-8)  # faint ones
    assert M.shape[1] > 290 and torch.linalg.norm(M.T @ M - torch.eye(M.shape[1])) < 1e-5


@pytest.mark.parametrize("R, rank", [
    (torch.zeros(10, 25), 0), (torch.arange(1.0, 11)[:, None] * torch.ones(25), 1), (torch.eye(10)[:, :4] * 3, 4)])
@pytest.mark.parametrize("eps", [0.9999, 1.0])
def test_degenerate_representations(R, rank, eps):
    M = gpm.update_basis(torch.empty(10, 0), R, eps)
    assert M.shape == (10, rank) and torch.allclose(M.T @ M, torch.eye(rank), atol=1e-6)
    assert torch.equal(gpm.update_basis(torch.eye(10), R, eps), torch.eye(10))  # no space is left


# Projection -----------------------------------------------------------------------------------------------------------
def test_weights_receive_the_projected_gradient():
    model, x, y, found = Small(), torch.randn(8, 2, 6, 6), torch.randint(0, 3, (8,)), []
    bases, layers = gpm.project_gradients(model), gpm.projected_layers(model)
    for M in bases, random_bases(bases, 0.6):  # without columns as yet, then with some
        bases.update(M)
        model.zero_grad()
        F.cross_entropy(model(x, 0), y).backward()
        found.append({name: layer.weight.grad.flatten(1) for name, layer in [*layers.items(), ("head", model.heads[0])]})
    for name, G in found[0].items():
        M = bases.get(name, torch.zeros(20, 0))
        assert torch.allclose(found[1][name], G - G @ (M @ M.T), atol=1e-5 * G.abs().max()) and G.norm() > 0
        assert (found[1][name] @ M).norm() < 1e-5 * G.norm() < 1e-4 * found[1][name].norm()  # orthogonal, and something is left


@pytest.mark.parametrize("script", [main_pmnist, gpm, main_cifar100_superclass, main_five_datasets])
def test_full_bases_keep_the_logits_of_an_old_task(script):
    model, shape = build(script), (784,) if script is main_pmnist else (3, 32, 32)
    x, y, old = torch.randn(16, *shape), torch.randint(0, 5, (16,)), torch.randn(16, *shape)
    script.freeze_batchnorm(model)
    task = 0 if script is main_pmnist else 1  # where there are heads, the new task trains its own
    before, started = model.eval()(old, 0).detach(), {name: W.detach().clone() for name, W in model.named_parameters()}
    bases = script.project_gradients(model)
    bases.update(random_bases(bases, 1.0))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(10):
        script.train_epoch(model, task, x, y, optimizer, 16)
    assert torch.allclose(model.eval()(old, 0), before, atol=1e-5)
    moved = {name for name, W in model.named_parameters() if not torch.allclose(W, started[name], atol=1e-5)}
    assert moved == ({"heads.1.weight"} if task else set())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_lean_step_of_pmnist_is_that_of_sgd(momentum):
    """Its projected inputs are compared with the plain form in test_reference.py."""
    W, plain = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.empty(3, 4))
    plain.data.copy_(W)
    ours, theirs = (torch.optim.SGD([weight], 0.1, momentum) for weight in (W, plain))
    for G in torch.randn(3, 3, 4):
        W.grad, plain.grad = G.clone(), G.clone()
        main_pmnist.sgd_step(ours)
        theirs.step()
        assert torch.equal(W, plain) and W.grad is None


def test_section_4_by_itself_keeps_old_outputs_of_another_network():
    """What people carry into their own code: it needs torch alone, and keeps the outputs whose inputs the bases hold."""
    code = re.split(r"(?m)^# \d\. .*$", Path(gpm.__file__).read_text())[4]
    section = {}
    exec(f"import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n{code}", section)
    model = Small()
    bases = section["project_gradients"](model)
    tasks = [(torch.randn(12, 2, 6, 6), torch.randint(0, 3, (12,))) for _ in range(2)]
    assert list(bases) == ["conv", "fc1", "fc2"]
    for task, (x, y) in enumerate(tasks):
        optimizer, losses = torch.optim.SGD(model.parameters(), 0.5), []
        for _ in range(60):
            optimizer.zero_grad()
            losses.append(F.cross_entropy(model(x, task), y))
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.8 * losses[0]
        if task == 0:
            before = model(x, 0).detach()
            section["update_bases"](model, 0, x, bases, [1 - 1e-9] * 3, [12] * 3)
            started = model.fc1.weight.detach().clone()
    assert torch.allclose(model(tasks[0][0], 0), before, atol=1e-4)
    assert not torch.allclose(model.fc1.weight, started, atol=1e-3)


class Small(nn.Module):
    """A network that is none of the scripts'."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc1 = nn.Conv2d(2, 4, 3, stride=2, bias=False), nn.Linear(16, 30, bias=False)
        self.fc2, self.heads = nn.Linear(30, 20, bias=False), nn.ModuleList(nn.Linear(20, 3, bias=False) for _ in range(2))

    def forward(self, x, task):
        return self.heads[task](F.relu(self.fc2(F.relu(self.fc1(F.relu(self.conv(x)).flatten(1))))))


# Networks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script, size, widths", [
    (main_pmnist, 89_400, {"fc1": 784, "fc2": 100, "fc3": 100}),
    (gpm, 6_713_216, {"conv1": 48, "conv2": 576, "conv3": 512, "fc1": 1024, "fc2": 2048}),
    (main_cifar100_superclass, 3_036_500, {"conv1": 75, "conv2": 500, "fc1": 3200, "fc2": 800}),
    (main_five_datasets, 1_125_140, {"conv1": 27, "stage1.0.conv1": 180, "stage4.0.shortcut.0": 80, "stage4.1.conv2": 1440})])
def test_networks_have_the_published_layers_without_biases(script, size, widths):
    model = build(script)
    layers = {name: layer.weight[0].numel() for name, layer in script.projected_layers(model).items()}
    assert widths == (layers if script is not main_five_datasets else {name: layers[name] for name in widths})
    assert sum(W.numel() for W in model.parameters()) == size
    assert all(module.bias is None for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    assert not any(getattr(module, "track_running_stats", False) for module in model.modules())


def test_samples_of_resnet():
    script = main_five_datasets
    samples = dict(zip(script.projected_layers(build(script)), script.parse_args([]).n_samples, strict=True))
    assert [*samples.values()] == [10] * 9 + [50] * 4 + [100] * 7
    assert ([*samples][9], [*samples][13]) == ("stage2.1.conv2", "stage3.1.conv1")


def test_alexnet_drops_in_the_order_and_at_the_rates_of_the_paper(monkeypatch):
    """The rest of it, and its gradients, are compared in test_benchmark.py."""
    monkeypatch.setattr(gpm.Dropout, "forward", nn.Dropout.forward)
    model, x, logits = build(gpm), torch.randn(8, 3, 32, 32), []
    assert (model.drop1.p, model.drop2.p) == (0.2, 0.5)
    for forward in model, lambda *args: benchmark.plain_alexnet(model, *args):
        torch.manual_seed(2)
        logits.append(forward(x, 3))
    assert torch.allclose(*logits, atol=1e-6)


def test_lenet_equals_the_published_network():
    model, norm = build(main_cifar100_superclass), nn.LocalResponseNorm(4, 0.001 / 9, 0.75, 1.0)
    x = 30 * torch.rand(4, 3, 32, 32)
    h = F.max_pool2d(norm(F.relu(model.conv1(x))), 3, 2, 1)
    h = F.max_pool2d(norm(F.relu(model.conv2(h))), 3, 2, 1)
    h = F.relu(model.fc2(F.relu(model.fc1(h.flatten(1)))))
    assert torch.allclose(model(x, 7), model.heads[7](h), rtol=1e-4, atol=1e-4)
    for W in model.parameters():  # kaiming_uniform_ for ReLU: within sqrt(6 / fan_in); PyTorch's default: sqrt(1 / fan_in)
        bound = math.sqrt(6 / W[0].numel())
        assert 0.95 * bound < W.abs().max() <= bound


def test_resnet_equals_the_published_network():
    model, x = build(main_five_datasets), torch.randn(4, 3, 32, 32)
    weights = dict(model.named_parameters())

    def normed(h, name):
        h = (h - h.mean((0, 2, 3), keepdim=True)) / (h.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        return h * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    h = F.relu(normed(F.conv2d(x, weights["conv1.weight"], padding=1), "bn1"))
    for stage, block in [(stage, block) for stage in (1, 2, 3, 4) for block in (0, 1)]:
        name, stride = f"stage{stage}.{block}", 2 if stage > 1 and block == 0 else 1
        y = F.relu(normed(F.conv2d(h, weights[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
        y = normed(F.conv2d(y, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if stride == 2:
            h = normed(F.conv2d(h, weights[f"{name}.shortcut.0.weight"], stride=2), f"{name}.shortcut.1")
        h = F.relu(y + h)
    h = h.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)).flatten(1)  # means over 2x2 fields
    assert h.shape == (4, 640) and torch.allclose(model(x, 3), F.linear(h, weights["heads.3.weight"]), atol=1e-4)


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout(p):
    drop, x = gpm.Dropout(p), torch.ones(1000, 1001)
    y = drop(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    assert abs((y == 0).double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / x.numel())  # four standard deviations
    assert not torch.equal(y, drop(x)) and torch.equal(drop.eval()(x), x)


# Training and evaluation ----------------------------------------------------------------------------------------------
def test_an_epoch_sees_every_image_once_and_returns_the_mean_loss():
    model, x, y = build(main_pmnist), torch.randn(25, 784), torch.randint(0, 10, (25,))
    start = [W.detach().clone() for W in model.parameters()]
    loss = gpm.train_epoch(model, 0, x, y, torch.optim.SGD(model.parameters(), 0.0), 10)  # lr 0: the same as all at once
    assert loss == pytest.approx(F.cross_entropy(model(x, 0), y).item(), rel=1e-5)
    assert all(map(torch.equal, model.parameters(), start))


@pytest.mark.parametrize("losses, flags, expected, kept", [
    # best best wait  halve best  wait  halve wait  halve wait  halve: 0.05 < lr_min
    ([1.0, 0.9, 0.95, 0.95, 0.80, 0.80, 0.85, 0.90, 0.90, 0.90, 0.90], {}, [0.8] * 4 + [0.4] * 3 + [0.2] * 2 + [0.1] * 2, 5),
    ([3.0, 2.0, 2.5, 2.6], {"n_epochs": 4}, [0.8] * 4, 2),  # the number of epochs is a limit
    ([1.0, 2.0, 3.0, 4.0, 5.0], {"lr_patience": 0, "n_epochs": 5}, [0.8] * 5, 5)])  # constant rate, last weights
def test_schedule_of_the_learning_rate_and_the_weights_that_are_kept(losses, flags, expected, kept, monkeypatch, tmp_path):
    """On a scripted sequence of validation losses."""
    args = SimpleNamespace(**{"n_epochs": 100, "lr": 0.8, "lr_min": 0.1, "lr_patience": 2, "lr_factor": 2.0, "momentum": 0.0,
                              "batch_size_train": 5, "batch_size_test": 5, **flags})
    model, rates, saves, coming = nn.Sequential(nn.Linear(2, 2, bias=False)), [], [], iter(losses)

    def train_epoch(model, task, x, y, optimizer, batch_size):
        rates.append(optimizer.param_groups[0]["lr"])
        model[0].weight.data.fill_(len(rates))
        return 1.0

    monkeypatch.setattr(gpm, "train_epoch", train_epoch)
    monkeypatch.setattr(gpm, "evaluate", lambda *args: (next(coming), 50.0))
    monkeypatch.setattr(gpm, "save_run", lambda *args, if_older_than: saves.append(if_older_than))
    run = {**gpm.START_OF_TASK, "lr": args.lr, "results": {"history": []}}
    gpm.train_task(model, 0, (None, None), (None, None), args, run, tmp_path)
    assert rates == expected and (model[0].weight == kept).all()
    assert len(saves) == len(rates) and max(saves) < 30  # less what an epoch takes: the next one counts
    assert run["results"]["history"] == [[1, i + 1, lr, 1.0, loss, 50.0] for i, (lr, loss) in enumerate(zip(expected, losses))]


def test_metrics():
    acc = [[90.0, 0.0, 0.0], [80.0, 70.0, 0.0], [60.0, 65.0, 88.0]]
    assert gpm.average_accuracy(acc) == pytest.approx(71.0)
    assert gpm.backward_transfer(np.array(acc)) == pytest.approx((60 - 90 + 65 - 70) / 2)
    assert gpm.average_accuracy([[42.0]]) == 42.0 and gpm.backward_transfer([[42.0]]) == 0.0
