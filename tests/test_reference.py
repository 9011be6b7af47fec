"""A whole run of the scripts against a textbook loop: dense projection, plain SVD, torch.optim.SGD, no shortcut of any kind.

The loop draws its random numbers in the scripts' order (weights; per epoch the order of the images, then dropout; the samples
of the bases), so that the two must agree but for rounding: in the weights, the accuracies, the ranks and the epochs.
"""
import importlib
import json

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from data_files import small_arrays, write_npz

RUNS = {
    "main_pmnist": (["mnist"], (300, 60), "--n_tasks 3 --n_epochs 2 --n_samples 40 --threshold 0.9 0.8 0.8 --lr 0.05 --seed 7"),
    "main_cifar100": (["cifar100"], (1000, 300), "--n_tasks 2 --n_epochs 2 --n_samples 1 3 4 5 5 --batch_size_train 50 --batch_size_test 28 "
                                                 "--threshold 0.8 --threshold_increment 0.05 --pc_valid 0.4 --lr 0.005"),
    "main_cifar100_superclass": (["cifar100"], (1000, 300), "--n_tasks 2 --n_epochs 2 --n_samples 4 --batch_size_train 20 --threshold 0.8 --t_order 2"),
    "main_five_datasets": (["cifar10", "mnist", "svhn", "fashion_mnist", "notmnist"], (80, 30), "--n_tasks 2 --n_epochs 1 --n_samples 2 --lr 0.01"),
}


def mean_loss_and_accuracy(model, task, x, y, batch_size):
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(batch, task) for batch in x.split(batch_size)])
    return F.cross_entropy(logits, y).item(), 100 * (logits.argmax(1) == y).float().mean().item()


def columns(layer, x):
    """Every input vector of the layer, one after another."""
    if isinstance(layer, nn.Linear):
        return x.flatten(1).T
    k, stride, pad = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    x = F.pad(x, [pad] * 4)
    found = [x[b, :, i : i + k, j : j + k].flatten() for b in range(len(x))
             for i in range(0, x.shape[2] - k + 1, stride) for j in range(0, x.shape[3] - k + 1, stride)]
    return torch.stack(found, dim=1)


def grown(M, R, eps):
    """Eq. 5 and 8-9 in double precision."""
    M, R = M.double(), R.double()
    R_old = M @ (M.T @ R)
    U, S, _ = torch.linalg.svd(R - R_old, full_matrices=False)
    energy, r = R_old.norm() ** 2, 0
    while energy < eps * R.norm() ** 2:
        energy, r = energy + S[r] ** 2, r + 1
    return torch.cat([M, U[:, :r]], dim=1).float()


def plain_run(script, args):
    """(model, accuracy matrix, ranks per task, epochs per task) of the textbook loop."""
    torch.manual_seed(args.seed)
    model = script.build_model(args).to(memory_format=torch.channels_last)  # the dropout of AlexNet draws in the order of the memory
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith("heads.")}
    per_layer = {name: (eps, n) for name, eps, n in zip(layers, args.threshold * (len(layers) // len(args.threshold)),
                                                       args.n_samples * (len(layers) // len(args.n_samples)))}
    M = {name: torch.zeros(layer.weight[0].numel(), 0) for name, layer in layers.items()}
    tasks = script.benchmark.load(args.data_dir, args)
    acc, ranks, epochs = np.zeros((args.n_tasks, args.n_tasks)), [], []
    for t in range(args.n_tasks):
        (x, y), valid = tasks[t].train, tasks[t].valid
        P = {name: basis @ basis.T for name, basis in M.items()}
        lr, best, best_loss, waited, epoch = args.lr, None, float("inf"), 0, 0
        while epoch < args.n_epochs and lr >= args.lr_min:
            batchnorm = {id(W) for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for W in module.parameters()}
            optimizer = torch.optim.SGD([W for W in model.parameters() if t == 0 or id(W) not in batchnorm], lr=lr)
            model.train()
            for batch in torch.randperm(len(x)).split(args.batch_size_train):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch], t), y[batch]).backward()
                for name, layer in layers.items():
                    G = layer.weight.grad.flatten(1)
                    layer.weight.grad = (G - G @ P[name]).view_as(layer.weight)
                optimizer.step()
            model.zero_grad()
            epoch += 1
            if args.lr_patience:
                loss, _ = mean_loss_and_accuracy(model, t, *valid, args.batch_size_test)
                if loss < best_loss:
                    best, best_loss, waited = {key: value.clone() for key, value in model.state_dict().items()}, loss, 0
                else:
                    waited += 1
                if waited == args.lr_patience:
                    lr, waited = lr / args.lr_factor, 0
        if best:
            model.load_state_dict(best)

        inputs = {}
        hooks = [layer.register_forward_hook(lambda _, x, y, name=name: inputs.update({name: x[0].detach()})) for name, layer in layers.items()]
        model.eval()
        model(x[torch.randperm(len(x))[: max(args.n_samples)]], t)
        for hook in hooks:
            hook.remove()
        for name, (eps, n) in per_layer.items():
            M[name] = grown(M[name], columns(layers[name], inputs[name][:n]), eps + t * args.threshold_increment)
        acc[t, : t + 1] = [mean_loss_and_accuracy(model, u, *tasks[u].test, args.batch_size_test)[1] for u in range(t + 1)]
        ranks.append({name: basis.shape[1] for name, basis in M.items()})
        epochs.append(epoch)
    return model, acc, ranks, epochs


@pytest.mark.parametrize("name", RUNS)
def test_a_run_equals_the_textbook_loop(name, tmp_path):
    script = importlib.import_module(name)
    sets, sizes, flags = RUNS[name]
    for data_set in sets:
        write_npz(tmp_path, data_set, small_arrays(data_set, *sizes))
    args = script.parse_args([*flags.split(), "--device", "cpu", "--data_dir", str(tmp_path), "--models_dir", str(tmp_path)])
    script.main(args)
    folder = tmp_path / name.removeprefix("main_") / args.run_name
    results, weights = json.loads((folder / "results.json").read_text()), torch.load(folder / "checkpoint.pt", weights_only=True)["model"]

    model, acc, ranks, epochs = plain_run(script, args)
    assert [sum(row[0] == t + 1 for row in results["history"]) for t in range(args.n_tasks)] == epochs
    assert results["ranks"] == ranks
    np.testing.assert_allclose(results["accuracy_matrix"], acc, atol=1e-4)
    for key, W in model.state_dict().items():
        torch.testing.assert_close(weights[key], W, rtol=0, atol=1e-3 * W.abs().max().item(), msg=lambda text: f"{key}: {text}")
    torch.manual_seed(args.seed)
    start = script.build_model(args).state_dict()
    assert any(not torch.allclose(start[key], W, atol=3e-3) for key, W in model.state_dict().items())  # something was learned
