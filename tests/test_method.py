"""The mathematics against plain forms and values worked out by hand, in the order of the scripts.

Representation, bases, projection, the method in networks of other people, the scripts' networks,
schedule, metrics. What is equal in all scripts (test_consistency.py) is tested on one of them.
"""

import copy
import functools
import io
import math
import pickle
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import benchmark
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import main_cifar100 as gpm
import main_cifar100_superclass
import main_five_datasets
import main_pmnist

SCRIPTS = [main_pmnist, gpm, main_cifar100_superclass, main_five_datasets]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def build(script):
    return script.build_model(script.parse_args([]))


def orthonormal(d, r):
    return torch.linalg.qr(torch.randn(d, r))[0]


def set_random_bases(layers, share):
    """Give each layer a basis of this share of its width."""
    for layer in layers.values():
        d = len(layer.M)
        layer.M = orthonormal(d, max(1, int(share * d)))


def assert_orthonormal(M):
    assert torch.linalg.norm(M.T @ M - torch.eye(M.shape[1])) < 1e-5


# Representation -----------------------------------------------------------------------------------
def patches_one_by_one(x, kernel, stride, padding, dilation):
    """R (d, n) of a convolution, from pairs (vertical, horizontal)."""
    x = F.pad(x, [padding[1], padding[1], padding[0], padding[0]])
    extents = [step * (size - 1) + 1 for size, step in zip(kernel, dilation, strict=True)]
    columns = []
    for image in x:
        for i in range(0, x.shape[2] - extents[0] + 1, stride[0]):
            for j in range(0, x.shape[3] - extents[1] + 1, stride[1]):
                rows = slice(i, i + extents[0], dilation[0])
                across = slice(j, j + extents[1], dilation[1])
                columns.append(image[:, rows, across].flatten())
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize(
    "kernel, stride, padding, dilation",
    [
        (3, 1, 1, 1),
        (4, 1, 0, 1),
        (3, 2, 1, 1),
        (1, 2, 0, 1),
        (5, 1, 2, 1),
        (3, 2, 1, 2),
        ((3, 2), (1, 2), (0, 1), (2, 1)),
    ],
)
def test_representation_of_a_convolution_is_its_patches(kernel, stride, padding, dilation):
    layer = gpm.ProjectedConv2d(3, 7, kernel, stride, padding, dilation)
    x = torch.randn(2, 3, 9, 9)
    R = layer.representation(x)
    pairs = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    assert torch.equal(R, patches_one_by_one(x, *pairs))
    y = layer(x)
    assert torch.allclose(layer.weight.flatten(1) @ R, y.transpose(0, 1).flatten(1), atol=1e-5)
    assert torch.allclose(y, F.conv2d(x, layer.weight, None, stride, padding, dilation))
    x = x.to(memory_format=torch.channels_last)
    assert torch.equal(layer.representation(x), R)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (2, 2, 4, 3)])
def test_representation_of_a_linear_layer_is_its_inputs(shape):
    layer = gpm.ProjectedLinear(3, 2)
    x = torch.randn(shape)
    R = layer.representation(x)
    assert torch.equal(R, torch.stack([*x.reshape(-1, 3)], dim=1))
    assert torch.allclose(layer.weight @ R, layer(x).reshape(-1, 2).T, atol=1e-6)


# Bases --------------------------------------------------------------------------------------------
def share_held(M, R):
    """||M^T R||^2 / ||R||^2."""
    return (torch.linalg.norm(M.double().T @ R.double()) / torch.linalg.norm(R.double())) ** 2


@pytest.mark.parametrize(
    "eps, directions",
    [(0, []), (0.60, [2]), (0.65, [2, 0]), (0.92, [2, 0]), (0.93, [2, 0, 1]), (1, [2, 0, 1])],
)
def test_directions_of_known_energies(eps, directions):
    """Energies 4, 1, 9 and 0, of 14: the largest alone holds 0.643, the two largest 0.929."""
    R = torch.diag(torch.tensor([2.0, 1.0, 3.0, 0.0]))
    M = gpm.update_basis(torch.empty(4, 0), R, eps)
    assert torch.equal(M.abs(), torch.eye(4)[:, directions])


def test_energy_that_old_directions_hold_counts():
    """Eq. 9: with 9 of 14 in M, one more direction reaches 13 of 14."""
    R = torch.diag(torch.tensor([2.0, 1.0, 3.0, 0.0]))
    M = torch.eye(4)[:, [3, 2]]  # the first is of no use for this R
    assert torch.equal(gpm.update_basis(M, R, 0.64), M)
    assert torch.equal(gpm.update_basis(M, R, 0.92).abs(), torch.eye(4)[:, [3, 2, 0]])


@pytest.mark.parametrize("d, n", [(30, 200), (30, 30), (60, 20)])
@pytest.mark.parametrize("eps", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("r_before", [0, 4])
def test_a_basis_grows_by_the_fewest_directions_that_reach_eps(d, n, eps, r_before):
    before = orthonormal(d, r_before)
    R = torch.randn(d, n).relu() * torch.rand(d, 1)
    M = gpm.update_basis(before, R, eps)
    assert M.dtype == torch.float32
    assert_orthonormal(M)
    assert torch.equal(M[:, :r_before], before)
    R_hat = R.double() - before.double() @ (before.double().T @ R.double())
    U = torch.linalg.svd(R_hat, full_matrices=False)[0]
    k = M.shape[1] - r_before
    added = M[:, r_before:].double()
    assert torch.allclose(added @ added.T, U[:, :k] @ U[:, :k].T, atol=1e-5)  # the same space
    assert share_held(M[:, :-1], R) < eps <= share_held(M, R) + 1e-9


def test_an_svd_that_does_not_converge_is_repeated(monkeypatch):
    M, R = orthonormal(40, 8), torch.randn(40, 60)
    expected = gpm.update_basis(M, R, 0.9)
    error = torch.linalg.LinAlgError("The algorithm failed to converge")
    monkeypatch.setattr(torch.linalg, "svd", Mock(side_effect=error))
    repeated = gpm.update_basis(M, R, 0.9)
    assert repeated.shape == expected.shape
    assert torch.allclose(repeated @ repeated.T, expected @ expected.T, atol=1e-5)


@pytest.mark.parametrize("eps, noise", [(0.0, 1e-3), (0.99, 1e-3), (1.0, 0)])
def test_a_basis_that_holds_enough_is_left_alone(eps, noise):
    """Without noise it holds everything but rounding."""
    M = orthonormal(20, 6)
    R = M @ torch.randn(6, 400) + noise * torch.randn(20, 400)
    assert torch.equal(gpm.update_basis(M, R, eps), M)


@pytest.mark.parametrize("R", [torch.ones(20, 3), torch.arange(1000.0).view(20, 50)])
def test_eps_0_is_plain_sgd(R):
    assert gpm.update_basis(torch.empty(20, 0), R, 0).shape == (20, 0)


def test_bases_stay_orthonormal_over_20_tasks():
    M = torch.empty(300, 0)
    for task in range(20):
        R = torch.randn(300, 40) @ torch.randn(40, 500) + 0.01 * torch.randn(300, 500)
        M = gpm.update_basis(M, R, 0.98 + 0.001 * task)
        assert M.shape[1] <= 300
        assert_orthonormal(M)
    assert M.shape[1] == 300  # the last tasks found no room left


def test_faint_directions_are_orthonormal_too():
    M = orthonormal(300, 150)
    R = M @ torch.randn(150, 500) + 1e-3 * torch.randn(300, 500)
    M = gpm.update_basis(M, R, 1 - 1e-8)
    assert M.shape[1] > 290
    assert_orthonormal(M)


@pytest.mark.parametrize(
    "R, rank",
    [
        (torch.zeros(10, 25), 0),
        (torch.arange(1.0, 11)[:, None] * torch.ones(25), 1),
        (torch.eye(10)[:, :4] * 3, 4),
    ],
)
@pytest.mark.parametrize("eps", [0.9999, 1.0])
def test_degenerate_representations(R, rank, eps):
    M = gpm.update_basis(torch.empty(10, 0), R, eps)
    assert M.shape == (10, rank)
    assert_orthonormal(M)
    full = torch.eye(10)
    assert torch.equal(gpm.update_basis(full, R, eps), full)  # no space is left


# Projection ---------------------------------------------------------------------------------------
class Small(nn.Module):
    """A network that is none of the scripts', with the layers of a method or plain ones."""

    def __init__(self, method):
        super().__init__()
        self.conv = method.ProjectedConv2d(3, 40, 4, stride=4)
        self.fc1 = method.ProjectedLinear(160, 60)
        self.fc2 = method.ProjectedLinear(60, 40)
        self.heads = nn.ModuleList(nn.Linear(40, 3, bias=False) for _ in range(2))

    def forward(self, x, task):
        """Logits (B, 3) for images x (B, 3, 8, 8)."""
        x = F.relu(self.conv(x)).flatten(1)
        return self.heads[task](F.relu(self.fc2(F.relu(self.fc1(x)))))


PLAIN_LAYERS = SimpleNamespace(
    ProjectedConv2d=functools.partial(nn.Conv2d, bias=False),
    ProjectedLinear=functools.partial(nn.Linear, bias=False),
)


def gradients(model, *batch):
    """{name: gradient (out, d)} of each weight."""
    x, y = batch
    F.cross_entropy(model(x, 0), y).backward()
    weights = {name: W for name, W in model.named_parameters() if W.grad is not None}
    return {name.removesuffix(".weight"): W.grad.flatten(1) for name, W in weights.items()}


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_weights_receive_the_projected_gradient(share):
    model, plain = Small(gpm), Small(PLAIN_LAYERS)
    plain.load_state_dict(model.state_dict(), strict=False)  # plain layers know of no bases
    layers = gpm.projected_layers(model)
    assert list(layers) == ["conv", "fc1", "fc2"]
    if share:
        set_random_bases(layers, share)
    batch = torch.randn(8, 3, 8, 8), torch.randint(0, 3, (8,))
    raw, received = gradients(plain, *batch), gradients(model, *batch)
    assert list(raw) == list(received) == ["conv", "fc1", "fc2", "heads.0"]
    assert torch.equal(raw["heads.0"], received["heads.0"])
    for name, layer in layers.items():
        G, M = raw[name], layer.M
        expected = G - G @ (M @ M.T)
        assert torch.allclose(received[name], expected, atol=1e-5 * G.abs().max())
        assert (received[name] @ M).norm() < 1e-5 * G.norm()  # orthogonal to M
        assert received[name].norm() > 0.1 * G.norm()  # and something is left


@pytest.mark.parametrize("dilation", [1, 2])
def test_a_convolution_with_stride_padding_and_dilation_is_projected(dilation):
    layer = gpm.ProjectedConv2d(2, 5, 3, stride=2, padding=1, dilation=dilation)
    x, delta = torch.randn(4, 2, 9, 9), torch.randn(4, 5, 5 - (dilation - 1), 5 - (dilation - 1))
    layer.M = orthonormal(18, 7)
    layer(x).backward(delta)
    G = delta.transpose(0, 1).flatten(1) @ layer.representation(x).T  # Eq. 2
    expected = G - G @ layer.M @ layer.M.T
    assert torch.allclose(layer.weight.grad.flatten(1), expected, atol=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_full_bases_keep_the_logits_of_an_old_task(script):
    model = build(script)
    shape = (784,) if script is main_pmnist else (3, 32, 32)
    x, old = torch.randn(16, *shape), torch.randn(16, *shape)
    y = torch.randint(0, 5, (16,))
    script.freeze_batchnorm(model)
    task = 0 if script is main_pmnist else 1  # where there are heads, the new task trains its own
    before = model.eval()(old, 0).detach()
    weights_before = {name: W.detach().clone() for name, W in model.named_parameters()}
    set_random_bases(script.projected_layers(model), 1.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(5):
        script.train_epoch(model, task, x, y, optimizer, 16)
    assert torch.allclose(model.eval()(old, 0), before, atol=1e-5)
    moved = {
        name
        for name, W in model.named_parameters()
        if not torch.allclose(W, weights_before[name], atol=1e-5)
    }
    assert moved == ({"heads.1.weight"} if task else set())


# Steps of PMNIST ----------------------------------------------------------------------------------
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_lean_step_of_pmnist_is_that_of_sgd(momentum):
    W, plain = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.empty(3, 4))
    plain.data.copy_(W)
    lean_optimizer = torch.optim.SGD([W], 0.1, momentum)
    plain_optimizer = torch.optim.SGD([plain], 0.1, momentum)
    for G in torch.randn(3, 3, 4):
        W.grad, plain.grad = G.clone(), G.clone()
        main_pmnist.sgd_step(lean_optimizer)
        plain_optimizer.step()
        assert torch.equal(W, plain)
        assert W.grad is None


def test_images_projected_once_give_the_gradient_of_images_projected_in_each_step():
    """2,500 images, because they are projected in parts of 1,000."""
    model = build(main_pmnist)
    set_random_bases(main_pmnist.projected_layers(model), 0.3)
    x, y, M = torch.randn(2500, 784), torch.randint(0, 10, (2500,)), model.fc1.M
    x_hat = main_pmnist.projected_images(model, x)
    assert torch.allclose(x_hat, x - x @ (M @ M.T), atol=1e-4)
    found = []
    for arguments in (x, 0, x_hat), (x, 0):
        logits = model(*arguments)
        F.cross_entropy(logits, y).backward()
        found.append((logits.detach(), model.fc1.weight.grad))
        model.zero_grad()
    (logits, G), (plain_logits, plain_G) = found
    assert torch.equal(logits, plain_logits)
    assert torch.allclose(G, plain_G, atol=1e-5 * plain_G.abs().max())


# The method in other networks ---------------------------------------------------------------------
# What people carry into their own code: section 3 by itself, which needs torch alone.
@pytest.fixture(scope="module")
def method():
    """Section 3 of the script as a module, which pickles can refer to."""
    sections = re.split(r"(?m)^# (\d)\. .*$", Path(gpm.__file__).read_text(encoding="utf-8"))
    code = sections[sections.index("3") + 1]
    module = ModuleType("section_3")
    module.__dict__.update(torch=torch, nn=nn, F=F)
    exec(code, module.__dict__)
    sys.modules["section_3"] = module
    yield module
    del sys.modules["section_3"]


class SmallWithTwoBranches(Small):
    """The first task does not use branches.1, the second does not use branches.0."""

    def __init__(self, method):
        super().__init__(method)
        self.branches = nn.ModuleList(method.ProjectedLinear(60, 60) for _ in range(2))

    def forward(self, x, task):
        x = F.relu(self.conv(x)).flatten(1)
        x = F.relu(self.branches[task](F.relu(self.fc1(x))))
        return self.heads[task](F.relu(self.fc2(x)))


class SmallWithRepeatedLayers(nn.Module):
    """A convolution and a linear layer, each used three times."""

    def __init__(self, method):
        super().__init__()
        self.conv = method.ProjectedConv2d(16, 16, 3, padding=1)
        self.fc = method.ProjectedLinear(64, 64)
        self.heads = nn.ModuleList(nn.Linear(64, 3, bias=False) for _ in range(2))

    def forward(self, x, task):
        x = x.reshape(len(x), -1, 2, 2)[:, :16]  # (B, 16, 2, 2)
        for _ in range(3):
            x = x + F.relu(self.conv(x))
        x = x.flatten(1)
        for _ in range(3):
            x = x + F.relu(self.fc(x))
        return self.heads[task](x)


class SmallWithTokens(nn.Module):
    """Each row of an image is a token; linear layers map (B, tokens, d)."""

    def __init__(self, method):
        super().__init__()
        self.embed = method.ProjectedLinear(96, 80)
        self.mix = method.ProjectedLinear(80, 80)
        self.heads = nn.ModuleList(nn.Linear(80, 3, bias=False) for _ in range(2))

    def forward(self, x, task):
        tokens = x.reshape(len(x), 2, 96)
        tokens = F.relu(self.mix(F.relu(self.embed(tokens))))
        return self.heads[task](tokens.mean(1))


def two_tasks():
    """[(x, y), (x, y)]: 8 random images each, so few that no basis fills its layer."""
    return [(torch.randn(8, 3, 8, 8), torch.arange(8) % 3) for _ in range(2)]


def learn(forward, parameters, task, x, y):
    """Some steps of SGD, after which the loss must have halved at least."""
    optimizer = torch.optim.SGD(parameters, 0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(forward(x, task), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def update_all(method, model, task, x):
    """Bases that hold all inputs of the task."""
    n_layers = len(method.projected_layers(model))
    method.update_bases(model, task, x, [1] * n_layers, [len(x)] * n_layers)


def assert_first_task_stays(method, model, tasks, forward):
    """Learn the second task: the outputs on the first stay, though the used layers move."""
    x = tasks[0][0]
    before = model(x, 0).detach()
    weights_before = copy.deepcopy(dict(model.named_parameters()))
    learn(forward, model.parameters(), 1, *tasks[1])
    assert (model(x, 0) - before).abs().max() <= 1e-5
    for name, W in model.named_parameters():
        if W.grad is not None:
            assert (W - weights_before[name]).norm() > 1e-3 * W.norm(), name


NETWORKS = [Small, SmallWithRepeatedLayers, SmallWithTokens]


def after_the_first_task(method, network, wrap=lambda model: model):
    """(model, tasks, what to call in its place) after the first task, with bases that hold it."""
    model, tasks = network(method), two_tasks()
    forward = wrap(model)
    learn(forward, model.parameters(), 0, *tasks[0])
    update_all(method, model, 0, tasks[0][0])
    return model, tasks, forward


@pytest.mark.parametrize("network", NETWORKS)
def test_old_outputs_stay(method, network):
    model, tasks, forward = after_the_first_task(method, network)
    for layer in method.projected_layers(model).values():
        assert 0 < layer.M.shape[1] < len(layer.M)
        assert_orthonormal(layer.M)
    assert_first_task_stays(method, model, tasks, forward)


def test_without_bases_old_outputs_move(method):
    """So the test above would notice."""
    model, tasks, forward = after_the_first_task(method, Small)
    for layer in method.projected_layers(model).values():
        layer.M = layer.M[:, :0]
    with pytest.raises(AssertionError, match="1e-05"):
        assert_first_task_stays(method, model, tasks, forward)


def test_a_layer_that_a_task_does_not_use(method):
    model, tasks, forward = after_the_first_task(method, SmallWithTwoBranches)
    used, unused = (branch.M for branch in model.branches)
    assert used.shape[1] > 0
    assert unused.shape == (60, 0)
    assert_first_task_stays(method, model, tasks, forward)
    update_all(method, model, 1, tasks[1][0])
    assert torch.equal(model.branches[0].M, used)
    assert model.branches[1].M.shape[1] > 0


def compiled(model):
    """Traced and differentiated as by torch.compile's default, but without a C++ compiler."""
    return torch.compile(model, backend="aot_eager")


def test_a_compiled_model(method):
    """The bases come from the model itself."""
    torch.compiler.reset()
    model, tasks, forward = after_the_first_task(method, Small, compiled)
    assert_first_task_stays(method, model, tasks, forward)


def test_bases_from_a_compiled_model_are_refused(method):
    """The hooks of update_bases would be ignored where the model has been compiled before."""
    torch.compiler.reset()
    model, x = Small(method).eval(), torch.randn(8, 3, 8, 8)
    forward = compiled(model)
    with torch.no_grad():
        forward(x, 0)
    with pytest.raises(RuntimeError, match="pass the model itself"):
        update_all(method, forward, 0, x)


def under_autocast(model):
    def forward(x, task):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x, task)

    return forward


@pytest.mark.parametrize("network", NETWORKS)
def test_autocast(method, network):
    """The outputs are compared without it, because bfloat16 rounds to three digits."""
    model, tasks, forward = after_the_first_task(method, network, under_autocast)
    assert forward(tasks[0][0], 0).dtype == torch.bfloat16
    assert_first_task_stays(method, model, tasks, forward)


def pickled(model, method):
    return pickle.loads(pickle.dumps(model))


def saved_and_loaded(model, method):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = type(model)(method)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def deep_copied(model, method):
    return copy.deepcopy(model)


@pytest.mark.parametrize("duplicate", [deep_copied, pickled, saved_and_loaded])
def test_a_copy_of_a_model(method, duplicate):
    model, tasks, _ = after_the_first_task(method, Small)
    copied = duplicate(model, method)
    layers = method.projected_layers(model)
    bases = {name: layer.M.clone() for name, layer in layers.items()}
    for name, layer in method.projected_layers(copied).items():
        assert torch.equal(layer.M, bases[name])
    assert_first_task_stays(method, copied, tasks, copied)
    update_all(method, copied, 1, tasks[1][0])
    for name, layer in layers.items():  # the original has bases of its own
        assert torch.equal(layer.M, bases[name])
    assert_first_task_stays(method, model, tasks, model)


def test_bases_follow_the_model_to_another_type(method):
    model, tasks, _ = after_the_first_task(method, Small)
    model.double()
    tasks = [(x.double(), y) for x, y in tasks]
    assert {layer.M.dtype for layer in method.projected_layers(model).values()} == {torch.float64}
    assert_first_task_stays(method, model, tasks, model)


@pytest.mark.parametrize("eps, n_samples", [([1], [8] * 3), ([1] * 3, [8] * 2), ([1] * 4, [8] * 4)])
def test_values_for_more_or_fewer_layers_are_refused(method, eps, n_samples):
    message = r"eps and n_samples need a value for each of the layers \['conv', 'fc1', 'fc2'\]"
    with pytest.raises(ValueError, match=message):
        method.update_bases(Small(method), 0, torch.randn(8, 3, 8, 8), eps, n_samples)


def test_each_layer_uses_its_own_number_of_images(method):
    """With eps 1 the rank is the number of a layer's inputs: 4 patches per image, or 1."""
    model = Small(method)
    method.update_bases(model, 0, torch.randn(20, 3, 8, 8), [1] * 3, [7, 3, 5])
    ranks = [layer.M.shape[1] for layer in method.projected_layers(model).values()]
    assert ranks == [28, 3, 5]


class SmallInPlace(nn.Module):
    """It overwrites the input of its layer after use."""

    def __init__(self, method):
        super().__init__()
        self.fc = method.ProjectedLinear(12, 5)

    def forward(self, x, task):
        y = self.fc(x)
        x.zero_()
        return y


def test_inputs_that_the_network_overwrites_later(method):
    model, x = SmallInPlace(method), torch.randn(4, 12)
    update_all(method, model, 0, x)
    assert share_held(model.fc.M, x.T) > 1 - 1e-6


def test_update_bases_leaves_no_hook_behind(method):
    model, _, _ = after_the_first_task(method, Small)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "error, build_layer",
    [
        (TypeError, lambda method: method.ProjectedLinear(4, 5, bias=True)),
        (TypeError, lambda method: method.ProjectedLinear(4, 5, True)),
        (TypeError, lambda method: method.ProjectedConv2d(4, 6, 3, bias=True)),
        (TypeError, lambda method: method.ProjectedConv2d(4, 6, 3, groups=2)),
        (TypeError, lambda method: method.ProjectedConv2d(4, 6, 3, 1, 0, 1, 2)),
        (TypeError, lambda method: method.ProjectedConv2d(4, 6, 3, padding_mode="circular")),
        (ValueError, lambda method: method.ProjectedConv2d(4, 6, 3, padding="same")),
        (ValueError, lambda method: method.ProjectedConv2d(4, 6, 3, 1, "valid")),
    ],
)
def test_layers_that_would_not_be_protected_are_refused(method, error, build_layer):
    with pytest.raises(
        error, match="argument|padding must be a number or a pair, not '(same|valid)'"
    ):
        build_layer(method)


def test_layers_without_a_basis_are_named(method):
    """BatchNorm is among them if it keeps running statistics, which nothing freezes."""
    model = nn.Sequential(
        method.ProjectedConv2d(3, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4),
        nn.Linear(144, 30),
        method.ProjectedLinear(30, 20),
        nn.BatchNorm1d(20, affine=False),
    )
    model.heads = nn.ModuleList([nn.Linear(20, 3)])
    assert method.unprotected_layers(model) == ["2", "3", "5", "heads.0"]
    model.scale = nn.Parameter(torch.ones(1))
    assert method.unprotected_layers(model)[0] == "the model itself"
    assert list(method.projected_layers(model)) == ["0", "4"]


# Networks -----------------------------------------------------------------------------------------
WIDTHS = {
    main_pmnist: {"fc1": 784, "fc2": 100, "fc3": 100},
    gpm: {"conv1": 48, "conv2": 576, "conv3": 512, "fc1": 1024, "fc2": 2048},
    main_cifar100_superclass: {"conv1": 75, "conv2": 500, "fc1": 3200, "fc2": 800},
    main_five_datasets: {
        "conv1": 27,
        "stage1.0.conv1": 180,
        "stage4.0.shortcut.0": 80,
        "stage4.1.conv2": 1440,
    },
}
SIZES = {
    main_pmnist: 89_400,
    gpm: 6_713_216,
    main_cifar100_superclass: 3_036_500,
    main_five_datasets: 1_125_140,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_networks_have_the_published_layers_without_biases(script):
    model = build(script)
    widths = {name: len(layer.M) for name, layer in script.projected_layers(model).items()}
    if script is main_five_datasets:
        assert len(widths) == 20
        widths = {name: widths[name] for name in WIDTHS[script]}
    assert widths == WIDTHS[script]
    assert sum(W.numel() for W in model.parameters()) == SIZES[script]
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert all(layer.bias is None for layer in layers)
    assert not any(getattr(m, "track_running_stats", False) for m in model.modules())


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_heads_are_without_a_basis(script):
    names = [f"heads.{t}" for t in range(script.N_TASKS)]
    assert script.unprotected_layers(build(script)) == ([] if script is main_pmnist else names)


def test_samples_of_resnet():
    script = main_five_datasets
    names, samples = [*script.projected_layers(build(script))], script.parse_args([]).n_samples
    assert samples == [10] * 9 + [50] * 4 + [100] * 7
    assert (names[9], names[13]) == ("stage2.1.conv2", "stage3.1.conv1")


def test_alexnet_drops_in_the_order_and_at_the_rates_of_the_paper(monkeypatch):
    """The rest of it, and its gradients, are compared in test_benchmark.py."""
    monkeypatch.setattr(gpm.Dropout, "forward", nn.Dropout.forward)
    model, x = build(gpm), torch.randn(8, 3, 32, 32)
    assert (model.drop1.p, model.drop2.p) == (0.2, 0.5)
    torch.manual_seed(2)
    logits = model(x, 3)
    torch.manual_seed(2)
    assert torch.allclose(logits, benchmark.plain_alexnet(model, x, 3), atol=1e-6)


def test_lenet_equals_the_published_network():
    model, norm = build(main_cifar100_superclass), nn.LocalResponseNorm(4, 0.001 / 9, 0.75, 1.0)
    x = 30 * torch.rand(4, 3, 32, 32)
    h = F.max_pool2d(norm(F.relu(model.conv1(x))), 3, 2, 1)
    h = F.max_pool2d(norm(F.relu(model.conv2(h))), 3, 2, 1)
    h = F.relu(model.fc2(F.relu(model.fc1(h.flatten(1)))))
    assert torch.allclose(model(x, 7), model.heads[7](h), rtol=1e-4, atol=1e-4)
    for W in model.parameters():  # kaiming_uniform_ for ReLU; PyTorch's default is sqrt(1 / fan_in)
        bound = math.sqrt(6 / W[0].numel())
        assert 0.95 * bound < W.abs().max() <= bound


def plain_resnet(weights, x, task):
    """Logits of the reduced ResNet18, from {name: weight}."""

    def normalised(h, name):
        mean = h.mean((0, 2, 3), keepdim=True)
        variance = h.var((0, 2, 3), unbiased=False, keepdim=True)
        h = (h - mean) / (variance + 1e-5).sqrt()
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return h * scale[:, None, None] + shift[:, None, None]

    def convolved(h, name, **more):
        return F.conv2d(h, weights[f"{name}.weight"], **more)

    h = F.relu(normalised(convolved(x, "conv1", padding=1), "bn1"))
    for stage in 1, 2, 3, 4:
        for block in 0, 1:
            name = f"stage{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = convolved(h, f"{name}.conv1", stride=stride, padding=1)
            y = F.relu(normalised(y, f"{name}.bn1"))
            y = normalised(convolved(y, f"{name}.conv2", padding=1), f"{name}.bn2")
            if stride == 2:
                h = convolved(h, f"{name}.shortcut.0", stride=2)
                h = normalised(h, f"{name}.shortcut.1")
            h = F.relu(y + h)
    features = h.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))  # means of 2 x 2 fields
    return F.linear(features.flatten(1), weights[f"heads.{task}.weight"])


def test_resnet_equals_the_published_network():
    model, x = build(main_five_datasets), torch.randn(4, 3, 32, 32)
    expected = plain_resnet(dict(model.named_parameters()), x, 3)
    assert expected.shape == (4, 10)
    assert torch.allclose(model(x, 3), expected, atol=1e-4)


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout(p):
    drop, x = gpm.Dropout(p), torch.ones(1000, 1001)
    y = drop(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    dropped = (y == 0).double().mean().item()
    assert abs(dropped - p) < 4 * math.sqrt(p * (1 - p) / x.numel())  # four standard deviations
    assert not torch.equal(y, drop(x))
    assert torch.equal(drop.eval()(x), x)


# Training and evaluation --------------------------------------------------------------------------
@pytest.mark.parametrize("script", [main_pmnist, main_cifar100_superclass])
def test_an_epoch_sees_every_image_once_and_returns_the_mean_loss(script):
    """At a learning rate of 0 the batches together have the loss of all images at once."""
    shape = (784,) if script is main_pmnist else (3, 32, 32)
    model, x, y = build(script), torch.randn(25, *shape), torch.randint(0, 5, (25,))
    before = [W.detach().clone() for W in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    loss = script.train_epoch(model, 0, x, y, optimizer, 10)
    assert loss == pytest.approx(F.cross_entropy(model(x, 0), y).item(), rel=1e-5)
    assert all(map(torch.equal, model.parameters(), before))


def test_batchnorm_is_frozen_and_all_else_is_not():
    model = build(gpm)
    gpm.freeze_batchnorm(model)
    trained = {name for name, W in model.named_parameters() if W.requires_grad}
    layers = {*WIDTHS[gpm], *(f"heads.{t}" for t in range(10))}
    assert trained == {f"{name}.weight" for name in layers}


SCHEDULES = [
    # Losses: lower, lower, wait, halve, lower, wait (equal), halve, wait, halve, wait, halve: the
    # rate of 0.05 is below lr_min.
    (
        [1.0, 0.9, 0.95, 0.95, 0.80, 0.80, 0.85, 0.90, 0.90, 0.90, 0.90],
        {},
        [0.8] * 4 + [0.4] * 3 + [0.2] * 2 + [0.1] * 2,
        5,
    ),
    ([3.0, 2.0, 2.5, 2.6], {"n_epochs": 4}, [0.8] * 4, 2),  # the number of epochs is a limit
    # A constant rate, and the last weights are kept.
    ([1.0, 2.0, 3.0, 4.0, 5.0], {"lr_patience": 0, "n_epochs": 5}, [0.8] * 5, 5),
]


def scripted_task(losses, flags, monkeypatch):
    """Run train_task on these validation losses; epoch n leaves all weights at n.

    Returns the model, the rates, what end_epoch was told, and the progress at the end.
    """
    defaults = {
        "seed": 1,
        "n_epochs": 100,
        "lr": 0.8,
        "lr_min": 0.1,
        "lr_patience": 2,
        "lr_factor": 2.0,
        "momentum": 0.0,
        "batch_size_train": 5,
        "batch_size_test": 5,
    }
    args = SimpleNamespace(**defaults | flags)
    model, coming = nn.Sequential(nn.Linear(2, 2, bias=False)), iter(losses)
    rates, epochs = [], []

    def train_epoch(model, task, x, y, optimizer, batch_size):
        rates.append(optimizer.param_groups[0]["lr"])
        model[0].weight.data.fill_(len(rates))
        return 7.0

    def end_epoch(*numbers, seconds):
        epochs.append((progress.epoch, *numbers))

    monkeypatch.setattr(gpm, "train_epoch", train_epoch)
    monkeypatch.setattr(gpm, "evaluate", lambda *_: (next(coming), 50.0))
    part = torch.zeros(4, 2), torch.zeros(4).long()
    progress = gpm.Progress(lr=args.lr)
    gpm.train_task(model, part, part, args, progress, end_epoch)
    return model, rates, epochs, progress


@pytest.mark.parametrize("losses, flags, expected, kept", SCHEDULES)
def test_schedule_of_the_learning_rate_and_the_weights_that_are_kept(
    losses, flags, expected, kept, monkeypatch
):
    model, rates, epochs, progress = scripted_task(losses, flags, monkeypatch)
    assert rates == expected
    assert (model[0].weight == kept).all()
    assert progress.epoch == len(losses)
    assert progress.best_loss == losses[kept - 1]
    numbers = zip(expected, losses, strict=True)
    assert epochs == [(n, lr, 7.0, loss, 50.0) for n, (lr, loss) in enumerate(numbers, 1)]


def test_validation_batches_are_drawn_anew_without_touching_other_random_numbers():
    x, y = torch.arange(100.0)[:, None], torch.arange(100)
    state = torch.get_rng_state()
    orders = [gpm.shuffled((x, y), 1, task, epoch) for task in (0, 1) for epoch in (1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    for shuffled_x, shuffled_y in orders:
        assert torch.equal(shuffled_x[:, 0].long(), shuffled_y)
        assert torch.equal(shuffled_y.sort().values, y)
    assert len({tuple(order.tolist()) for _, order in orders}) == 4
    assert torch.equal(gpm.shuffled((x, y), 1, 1, 2)[1], orders[3][1])


# Metrics ------------------------------------------------------------------------------------------
def test_metrics():
    acc = [[90.0, None, None], [80.0, 70.0, None], [60.0, 65.0, 88.0]]
    assert gpm.average_accuracy(acc) == pytest.approx(71.0)
    assert gpm.backward_transfer(acc) == pytest.approx((60 - 90 + 65 - 70) / 2)
    assert gpm.average_accuracy([[42.0]]) == 42.0
    assert gpm.backward_transfer([[42.0]]) == 0.0
