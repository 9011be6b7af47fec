"""Time of the scripts' functions against a plain implementation of the same mathematics.

    python tests/benchmark.py --benchmarks pmnist cifar100 --device cuda

Both work on the same random images in one process.

plain   The method as its equations read: after the backward pass each gradient is multiplied by a
        dense d x d matrix M M^T; patches are gathered in loops; two SVDs per basis; all heads are
        computed; the paper's order of layers; PyTorch's layers, dropout, LocalResponseNorm and
        number of threads; the training images are evaluated after each epoch.
here    What main calls.

An epoch includes its share of what is done once per task: M M^T, or PMNIST's projected images. Both
forms are faster with the settings of the allocator in run_experiments.sh.
"""

import argparse
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts
THREADS = torch.get_num_threads()
BENCHMARKS = {  # shape of an image, images in an epoch, steps that are timed together
    "pmnist": ((784,), 54_000, 200),
    "cifar100": ((3, 32, 32), 4_750, 2),
    "cifar100_superclass": ((3, 32, 32), 2_375, 2),
    "five_datasets": ((3, 32, 32), 1_280, 2),  # a whole epoch would have up to 70,000
}


# The plain implementation -------------------------------------------------------------------------
def plain_mlp(net, x, task):
    """Logits (B, 10) of PMNIST's network."""
    return net.fc3(F.relu(net.fc2(F.relu(net.fc1(x)))))


def plain_alexnet(net, x, task):
    """Logits (B, 10), with ReLU, dropout and pooling in this order."""

    def dropped(x, drop):
        return F.dropout(F.relu(x), drop.p, net.training)

    x = F.max_pool2d(dropped(net.bn1(net.conv1(x)), net.drop1), 2)
    x = F.max_pool2d(dropped(net.bn2(net.conv2(x)), net.drop1), 2)
    x = F.max_pool2d(dropped(net.bn3(net.conv3(x)), net.drop2), 2)
    x = dropped(net.bn4(net.fc1(x.flatten(1))), net.drop2)
    return net.heads[task](dropped(net.bn5(net.fc2(x)), net.drop2))


class AllHeads(nn.ModuleList):
    """Task heads that are all computed for the logits of one."""

    def __getitem__(self, task):
        return lambda x: [head(x) for head in self][task]


def plain_layer(layer):
    """An nn.Linear or nn.Conv2d with the weight of a projected layer."""
    rows, d = layer.weight.shape[:2]
    if isinstance(layer, nn.Linear):
        plain = nn.Linear(d, rows, bias=False)
    else:
        geometry = layer.kernel_size, layer.stride, layer.padding
        plain = nn.Conv2d(d, rows, *geometry, bias=False)
    plain.weight = layer.weight
    return plain


def make_plain(net, name, layers):
    """Replace in a script's network what the script does in a clever way."""
    for layer_name, layer in layers.items():
        net.set_submodule(layer_name, plain_layer(layer))
    if name == "pmnist":
        net.forward = lambda x, task: plain_mlp(net, x, task)
    else:
        net.heads = AllHeads(net.heads)
    if name == "cifar100":
        net.forward = lambda x, task: plain_alexnet(net, x, task)
    if name == "cifar100_superclass":
        for norm in "lrn1", "lrn2":
            setattr(net, norm, nn.LocalResponseNorm(4, alpha=0.001 / 9, beta=0.75, k=1.0))


@torch.no_grad()
def plain_inputs(net, layers, x, task):
    """The input of each layer, {name: tensor}."""
    inputs, hooks = {}, []
    for name, layer in layers.items():

        def keep(_, args, name=name):
            inputs[name] = args[0]

        hooks.append(layer.register_forward_pre_hook(keep))
    net.eval()
    net(x, task)
    for hook in hooks:
        hook.remove()
    return inputs


def plain_matrix(layer, x):
    """R (d, n): the layer's inputs x as columns; for a convolution its patches, one by one."""
    if isinstance(layer, nn.Linear):
        return torch.stack([sample.flatten() for sample in x], dim=1)
    k, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    x = F.pad(x, [padding] * 4)
    corners = range(0, x.shape[2] - k + 1, stride)  # images are square
    columns = []
    for sample in x:
        for i in corners:
            for j in corners:
                columns.append(sample[:, i : i + k, j : j + k].flatten())
    return torch.stack(columns, dim=1)


def plain_update(M, R, eps):
    """M (d, r) and the directions that Eq. 8-9 append to it."""
    energy = torch.linalg.svd(R, full_matrices=False).S.square().sum()
    U, S, _ = torch.linalg.svd(R - M @ M.T @ R, full_matrices=False)
    gain = S.square()
    held_before = energy - gain.sum() + gain.cumsum(0) - gain  # by M and the columns before each
    k = (held_before < eps * energy).sum()
    return torch.cat([M, U[:, :k]], dim=1)


# Both forms ---------------------------------------------------------------------------------------
class Assignment(NamedTuple):
    """A task to be learned: its number, images x, labels y, and the bases at its start."""

    task: int
    x: torch.Tensor
    y: torch.Tensor
    bases: dict  # {layer: M}


class Form:
    """A benchmark's network at work: by its script's functions or, if plain, by those above."""

    def __init__(self, name, plain, device, dtype=torch.float32):
        torch.set_num_threads(THREADS)
        torch.manual_seed(0)  # the same weights in both forms
        self.script = importlib.import_module(f"main_{name}")
        self.name, self.plain = name, plain
        self.args = self.script.parse_args(["--device", "cpu"])
        self.net = self.script.build_model(self.args)
        self.threads = THREADS if plain else torch.get_num_threads()  # PMNIST's script takes one
        self.layers = self.script.projected_layers(self.net)
        self.M = {layer_name: layer.M for layer_name, layer in self.layers.items()}
        layout = torch.preserve_format
        if plain:
            make_plain(self.net, name, self.layers)
            self.layers = {layer: self.net.get_submodule(layer) for layer in self.layers}
        elif device.type == "cpu":
            layout = torch.channels_last
        self.net.to(device, dtype, memory_format=layout)

    def start(self, task, x, y, bases):
        """Begin a task: do what is done once, before its first epoch."""
        net, args = self.net, self.args
        W = next(net.parameters())  # device and type
        self.task, self.x, self.y = task, x.to(W), y.to(W.device)
        self.M = {name: M.to(W) for name, M in bases.items()}
        if task > 0:
            self.script.freeze_batchnorm(net)
        self.optimizer = torch.optim.SGD(net.parameters(), args.lr, args.momentum)
        if not self.plain:
            for name, layer in self.layers.items():
                layer.M = self.M[name]
            if self.name == "pmnist":
                self.x_hat = self.script.projected_images(net, self.x)
        elif task > 0:
            self.project_each_gradient()

    def project_each_gradient(self):
        """From now on G - G M M^T is computed after each backward pass (Eq. 6-7)."""
        dense = {name: M @ M.T for name, M in self.M.items()}

        def project(*_):
            for name, layer in self.layers.items():
                G = layer.weight.grad.flatten(1)
                layer.weight.grad.sub_((G @ dense[name]).view_as(layer.weight))

        self.optimizer.register_step_pre_hook(project)

    def train(self):
        """One pass over the images."""
        # PMNIST's own loop has an SGD of its own.
        script = importlib.import_module("main_cifar100") if self.plain else self.script
        batch_size = self.args.batch_size_train
        arguments = self.net, self.task, self.x, self.y, self.optimizer, batch_size
        if self.name == "pmnist" and not self.plain:
            arguments += (self.x_hat,)
        script.train_epoch(*arguments)

    def epoch(self):
        """What an epoch consists of, validation aside."""
        self.train()
        if self.plain:
            batch_size = self.args.batch_size_test
            self.script.evaluate(self.net, self.task, self.x, self.y, batch_size)

    def inputs(self):
        """What reaches the layers after the task, {name: tensor}."""
        x = self.x[: max(self.args.n_samples)]
        if self.plain:
            return plain_inputs(self.net, self.layers, x, self.task)
        inputs = self.script.layer_inputs(self.net, x, self.task)
        return {name: torch.cat(calls) for name, calls in inputs.items()}

    def update(self, inputs):
        """({name: R}, {name: M}) after the task."""
        n_layers = len(self.layers)
        thresholds = self.script.thresholds(self.args, self.task)
        thresholds = thresholds * (n_layers // len(thresholds))
        n_samples = self.args.n_samples * (n_layers // len(self.args.n_samples))
        matrices, bases = {}, {}
        for (name, layer), eps, n in zip(self.layers.items(), thresholds, n_samples, strict=True):
            x, M = inputs[name][:n], self.M[name]
            if self.plain:
                matrices[name] = plain_matrix(layer, x)
                bases[name] = plain_update(M, matrices[name], eps)
            else:
                matrices[name] = layer.representation(x)
                bases[name] = self.script.update_basis(M, matrices[name], eps)
        return matrices, bases


def reference_ranks(name):
    """Ranks after the last task of a committed run, {layer: r}, and the run's name."""
    path = min((ROOT / "models" / "reference" / name).glob("*/results.json"))
    ranks = json.loads(path.read_text(encoding="utf-8"))["ranks"]
    return ranks[-1], path.parent.name


def assignments(name):
    """The first task, the last one with random bases of realistic ranks, and a note on these."""
    shape, n_images, _ = BENCHMARKS[name]
    form = Form(name, False, torch.device("cpu"))
    ranks, run = reference_ranks(name)
    bases = {
        layer: torch.linalg.qr(torch.randn(len(M), ranks[layer]).double())[0]
        for layer, M in form.M.items()
    }
    x, y = torch.randn(n_images, *shape), torch.arange(n_images) % 5
    first = Assignment(0, x, y, form.M)
    last = Assignment(form.args.n_tasks - 1, x, y, bases)
    return first, last, f"{name}: {n_images:,} images in an epoch, ranks of {run}"


# Check and measurement ----------------------------------------------------------------------------
def check(name, tasks, device):
    """End the program with status 1 unless both forms come to the same numbers without dropout."""
    forms = [Form(name, plain, device, torch.float64) for plain in (False, True)]
    for assignment in tasks:
        here, plain = (numbers_of(form, assignment) for form in forms)
        for quantity, expected in plain.items():
            for layer, tensor in expected.items():
                found = here[quantity][layer]
                if not agree(found, tensor):
                    raise SystemExit(
                        f"benchmark.py: error: the two forms of {name} differ on task "
                        f"{assignment.task + 1}: {quantity}, {layer}"
                    )


def numbers_of(form, assignment):
    """{quantity: {layer: tensor}} after one step on three images."""
    for module in form.net.modules():
        module.p = 0.0  # of dropout
    task, x, y, bases = assignment
    few = {layer: M[:, : len(M) // 8] for layer, M in bases.items()}  # so that some space is left
    form.start(task, x[:3], y[:3], few)
    form.train()
    R, M = form.update(form.inputs())
    return {
        "weight after a step": {key: W.detach().clone() for key, W in form.net.named_parameters()},
        "representation matrix": R,
        "space of the basis": {layer: basis @ basis.T for layer, basis in M.items()},
    }


def agree(a, b):
    """Whether two tensors are equal up to rounding in float64."""
    return a.shape == b.shape and torch.linalg.norm(a - b) <= 1e-9 * torch.linalg.norm(b)


def race(work, forms, device):
    """Median seconds of work(form), for each form, in at least 4 rounds and 2 seconds.

    The first round is not counted.
    """
    rounds = []
    while len(rounds) < 4 or sum(map(sum, rounds)) < 2:
        seconds = []
        for form in forms:
            torch.set_num_threads(form.threads)
            start = time.perf_counter()
            work(form)
            if device.type == "cuda":
                torch.cuda.synchronize()  # so the next one begins with nothing to wait for
            seconds.append(time.perf_counter() - start)
        rounds.append(seconds)
    return [statistics.median(seconds) for seconds in zip(*rounds[1:], strict=True)]


def measure(name, device):
    """Cells {row: text} of the benchmark's column, and a note."""
    first, last, note = assignments(name)
    check(name, [first, last], device)
    forms = [Form(name, plain, device) for plain in (True, False)]
    args = forms[0].args
    cells = {}
    for row, (task, x, y, bases) in ("step of task 1", first), ("step of the last task", last):
        n = min(BENCHMARKS[name][-1] * args.batch_size_train, len(x))
        for form in forms:
            form.start(task, x[:n], y[:n], bases)
        seconds = race(lambda form: form.train(), forms, device)
        n_steps = n / args.batch_size_train
        cells[row] = cell(*(1e3 * s / n_steps for s in seconds), "ms")
    once = race(lambda form: form.start(*last), forms, device)
    epoch = race(lambda form: form.epoch(), forms, device)
    seconds = (e + o / args.n_epochs for e, o in zip(epoch, once, strict=True))
    cells["epoch of the last task"] = cell(*seconds, "s")
    inputs = {form: form.inputs() for form in forms}
    seconds = race(lambda form: form.update(inputs[form]), forms, device)
    cells["update of the bases"] = cell(*seconds, "s")
    return cells, note


def cell(plain, here, unit):
    """Text of the table: both times and their ratio."""
    return f"{plain:.3g} / {here:.3g} {unit} = {plain / here:.1f}"


# Main ---------------------------------------------------------------------------------------------
def parse_args():
    """Read the flags. Invalid values exit with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"benchmark.py: error: {message}\n")
    names = list(BENCHMARKS)
    parser.add_argument("--benchmarks", nargs="+", choices=names, default=names, help="which ones")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda cannot be used: torch sees no GPU")
    return args


def commit():
    """The commit of the checkout, and whether its Python files have changed since."""
    git = "git rev-parse --short HEAD && git status --porcelain -- '*.py'"
    output = subprocess.run(git, shell=True, cwd=ROOT, capture_output=True, text=True).stdout
    number, _, changes = output.partition("\n")
    return (number or "unknown") + " with changes" * bool(changes)


def device_name(device):
    """The name of the GPU, or of the processor where the system tells it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def main():
    """Print a table with a column per benchmark."""
    args = parse_args()
    torch.backends.cudnn.deterministic = True  # these three as in the scripts
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    measured = [measure(name, torch.device(args.device)) for name in args.benchmarks]
    columns, notes = zip(*measured, strict=True)
    print(
        f"{device_name(args.device)}, threads: {THREADS}, torch {torch.__version__}, "
        f"commit {commit()}\n"
    )
    print("| plain / here = ratio |", " | ".join(args.benchmarks), "|")
    print("|---|" + "---|" * len(columns))
    for row in columns[0]:
        print(f"| {row} |", " | ".join(column[row] for column in columns), "|")
    print("", *notes, sep="\n")


if __name__ == "__main__":
    main()
