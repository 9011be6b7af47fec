"""Time of the scripts' functions against a plain implementation of the same mathematics, on the same random images in one run.

    python tests/benchmark.py --benchmarks pmnist cifar100 --device cuda

Plain is the method as its equations read: each gradient times a dense d x d matrix M M^T after the backward pass, patches
gathered in loops, two SVDs per basis, all heads, the paper's order of layers, PyTorch's dropout, LocalResponseNorm and number
of threads, an evaluation of the training images after each epoch. Here is what main calls. An epoch has its share of what is
done once per task: M M^T, or PMNIST's projected images. Both are faster with run_experiments.sh's settings of the allocator.
"""
import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts
THREADS = torch.get_num_threads()
BENCHMARKS = {  # shape of an image; images of an epoch, for 5-Datasets not of a whole one; steps timed in one go
    "pmnist": ((784,), 54_000, 200),
    "cifar100": ((3, 32, 32), 4_750, 2),
    "cifar100_superclass": ((3, 32, 32), 2_375, 2),
    "five_datasets": ((3, 32, 32), 1_280, 2),
}


class AllHeads(nn.ModuleList):
    def __getitem__(self, task):  # all heads are computed for the logits of one
        return lambda x: [head(x) for head in self][task]


def plain_alexnet(net, x, task):
    """Logits (B, 10), with ReLU, dropout and pooling in this order."""
    x = F.max_pool2d(F.dropout(F.relu(net.bn1(net.conv1(x))), net.drop1.p, net.training), 2)
    x = F.max_pool2d(F.dropout(F.relu(net.bn2(net.conv2(x))), net.drop1.p, net.training), 2)
    x = F.max_pool2d(F.dropout(F.relu(net.bn3(net.conv3(x))), net.drop2.p, net.training), 2)
    x = F.dropout(F.relu(net.bn4(net.fc1(x.flatten(1)))), net.drop2.p, net.training)
    return net.heads[task](F.dropout(F.relu(net.bn5(net.fc2(x))), net.drop2.p, net.training))


def plain_matrix(layer, x):
    """R (d, n): the layer's inputs x as columns; for a convolution its patches, one after another."""
    if isinstance(layer, nn.Linear):
        return torch.stack([sample.flatten() for sample in x], dim=1)
    k, stride, x = layer.kernel_size[0], layer.stride[0], F.pad(x, [layer.padding[0]] * 4)
    corners = range(0, x.shape[2] - k + 1, stride)  # images are square
    return torch.stack([sample[:, i : i + k, j : j + k].flatten() for sample in x for i in corners for j in corners], dim=1)


def plain_update(M, R, eps):
    """M (d, r) and the directions that Eq. 8-9 append to it."""
    energy = torch.linalg.svd(R, full_matrices=False).S.square().sum()
    U, S, _ = torch.linalg.svd(R - M @ M.T @ R, full_matrices=False)
    held = energy - S.square().sum() + S.square().cumsum(0) - S.square()  # by M and the columns before each one
    return torch.cat([M, U[:, : (held < eps * energy).sum()]], dim=1)


class Form:
    """A benchmark's network at work: by the functions of its script or, if plain, by those above."""

    def __init__(self, name, plain, device, dtype=torch.float32):
        torch.set_num_threads(THREADS)
        torch.manual_seed(0)  # the same weights in both forms
        self.script = script = importlib.import_module(f"main_{name}")
        self.plain, self.pairs, self.args = plain, name == "pmnist" and not plain, script.parse_args(["--device", "cpu"])
        self.net = net = script.build_model(self.args)
        self.threads = THREADS if plain else torch.get_num_threads()
        if plain and name == "cifar100":
            net.forward = lambda x, task: plain_alexnet(net, x, task)
        if plain and name == "cifar100_superclass":
            net.lrn1 = net.lrn2 = nn.LocalResponseNorm(4, alpha=0.001 / 9, beta=0.75, k=1.0)
        if plain and name != "pmnist":
            net.heads = AllHeads(net.heads)
        net.to(device, dtype, memory_format=torch.preserve_format if plain or device.type != "cpu" else torch.channels_last)
        self.layers, self.bases = script.projected_layers(net), {} if plain else script.project_gradients(net)

    def start(self, task, x, y, bases):
        """Begin a task with its training part, x (N, ...) and y (N,): train() is a pass, inputs() what reaches the layers."""
        net, args, script, self.task, W = self.net, self.args, self.script, task, next(self.net.parameters())
        self.bases.update({name: M.to(W) for name, M in bases.items()})
        if task > 0:
            script.freeze_batchnorm(net)
        x, y, optimizer = x.to(W), y.to(W.device), torch.optim.SGD(net.parameters(), args.lr, args.momentum)
        loop = importlib.import_module("main_cifar100") if self.plain else script  # PMNIST's has an SGD of its own
        if self.plain and task > 0:
            dense = {layer: self.bases[name] @ self.bases[name].T for name, layer in self.layers.items()}

            def project(*_):  # G - G M M^T, after the backward pass (Eq. 6-7)
                for layer, P in dense.items():
                    layer.weight.grad.sub_((layer.weight.grad.flatten(1) @ P).view_as(layer.weight))
            optimizer.register_step_pre_hook(project)
        images = torch.stack([x, script.project(x, self.bases["fc1"])], dim=1) if self.pairs else x  # as in train_task
        self.train = lambda: loop.train_epoch(net, task, images, y, optimizer, args.batch_size_train)
        self.epoch = lambda: (self.train(), self.plain and script.evaluate(net, task, x, y, args.batch_size_test))
        self.inputs = lambda: script.layer_inputs(net, x[: max(args.n_samples)], task)

    def update(self, inputs):
        """({name: R}, {name: M}) after the task."""
        R, M, args, script, n_layers = {}, {}, self.args, self.script, len(self.layers)
        matrix, update = (plain_matrix, plain_update) if self.plain else (script.representation_matrix, script.update_basis)
        for (name, layer), n, eps in zip(self.layers.items(), args.n_samples * n_layers, args.threshold * n_layers):
            R[name] = matrix(layer, inputs[name][:n])
            M[name] = update(self.bases[name], R[name], eps + self.task * args.threshold_increment)
        return R, M


def tasks_of(name):
    """(number, images, labels, bases so far) of task 1 and of the last one, and a note on the ranks of the bases."""
    (shape, n, _), form = BENCHMARKS[name], Form(name, False, torch.device("cpu"))
    late = [(path.parent.name, ranks[-1]) for path in sorted((ROOT / "models" / name).glob("*/results.json"))
            if len(ranks := json.loads(path.read_text())["ranks"]) == form.args.n_tasks]
    run, ranks = [*late, ("no run: 0.7 of the widths", {layer: round(0.7 * len(M)) for layer, M in form.bases.items()})][0]
    bases = {layer: torch.linalg.qr(torch.randn(len(M), ranks[layer]).double())[0] for layer, M in form.bases.items()}
    x, y = torch.randn(n, *shape), torch.arange(n) % 5
    return [(0, x, y, form.bases), (form.args.n_tasks - 1, x, y, bases)], f"{name}: {n:,} images in an epoch, ranks of {run}"


def check(name, tasks, device):
    """End the program with status 1 unless both forms come to the same numbers, with dropout off."""
    forms = [Form(name, plain, device, torch.float64) for plain in (False, True)]
    for task, x, y, bases in tasks:
        numbers = []
        for form in forms:
            for module in form.net.modules():
                module.p = 0.0  # of dropout
            form.start(task, x[:3], y[:3], {layer: M[:, : len(M) // 8] for layer, M in bases.items()})
            form.train()
            R, M = form.update(form.inputs())
            numbers.append((dict(form.net.named_parameters()), R, {layer: B @ B.T for layer, B in M.items()}))
        for what, here, plain in zip(("weight after a step", "representation matrix", "space of the basis"), *numbers):
            for layer, P in plain.items():
                if here[layer].shape != P.shape or not torch.linalg.norm(here[layer] - P) <= 1e-9 * torch.linalg.norm(P):
                    raise SystemExit(f"benchmark.py: error: the two forms of {name} differ on task {task + 1}: {what}, {layer}")


def race(work, forms, device):
    """Median seconds of work(form), for each form, in at least 4 rounds and 2 seconds; the first round is not counted."""
    synchronize, times = torch.cuda.synchronize if device.type == "cuda" else lambda: None, []
    while len(times) < 4 or sum(map(sum, times)) < 2:
        times.append([])
        for form in forms:
            torch.set_num_threads(form.threads)
            start = time.perf_counter()
            work(form)
            synchronize()  # so the next one begins with nothing to wait for; what went before delays the first round only
            times[-1].append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in zip(*times[1:])]


def measure(name, device):
    """Cells {row: text} of the benchmark's column, and a note."""
    tasks, note = tasks_of(name)
    check(name, tasks, device)
    forms, times = [Form(name, plain, device) for plain in (True, False)], {}
    args = forms[0].args
    for row, (task, x, y, bases) in zip(("step of task 1", "step of the last task"), tasks):
        n = min(BENCHMARKS[name][-1] * args.batch_size_train, len(x))
        for form in forms:
            form.start(task, x[:n], y[:n], bases)
        times[row] = [1e3 * s * args.batch_size_train / n for s in race(lambda form: form.train(), forms, device)]
    once = race(lambda form: form.start(task, x, y, bases), forms, device)
    epoch = race(lambda form: form.epoch(), forms, device)
    times["epoch of the last task"] = [e + o / args.n_epochs for e, o in zip(epoch, once)]
    inputs = {form: form.inputs() for form in forms}
    times["update of the bases"] = race(lambda form: form.update(inputs[form]), forms, device)
    return {row: f"{p:.3g} / {h:.3g} {'ms' if 'step' in row else 's'} = {p / h:.1f}" for row, (p, h) in times.items()}, note


def main():
    parser = argparse.ArgumentParser(description="The scripts against a plain implementation")
    parser.error = lambda message: parser.exit(2, f"benchmark.py: error: {message}\n")
    parser.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="what to measure")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure it")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda cannot be used: torch sees no GPU")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # as in the scripts
    torch.backends.cudnn.deterministic = True
    columns, notes = zip(*(measure(name, torch.device(args.device)) for name in args.benchmarks))
    processor = subprocess.getoutput("grep -m1 'model name' /proc/cpuinfo 2>/dev/null | sed 's/.*: //' | grep . || uname -m")
    git = f"cd '{ROOT}'; git rev-parse --short HEAD 2>/dev/null || echo unknown; git status --porcelain -- '*.py' 2>/dev/null"
    commit, *changed = subprocess.getoutput(git).splitlines()
    print(f"{torch.cuda.get_device_name() if args.device == 'cuda' else processor}, threads: {THREADS}, "
          f"torch {torch.__version__}, commit {commit}{' with changes' * bool(changed)}\n")
    print("| plain / here = ratio |", " | ".join(args.benchmarks), "|\n|---|" + "---|" * len(columns))
    for row in columns[0]:
        print(f"| {row} |", " | ".join(column[row] for column in columns), "|")
    print("", *notes, sep="\n")


if __name__ == "__main__":
    main()
