"""Time and memory of the scripts against a plain implementation of the same mathematics, side by side on the same inputs.

    python tests/benchmark.py
    python tests/benchmark.py --benchmarks pmnist cifar100 --device cuda --data_dir data

The plain implementation, sections 2 and 3, is the method as its equations read: the gradient is multiplied by a dense d x d
matrix after the backward pass, patches are gathered in loops, a basis takes two SVDs, images pass one by one through a DataLoader
and torchvision's transforms and are all kept, every head is computed, and each epoch ends with an evaluation of the training
images. First both forms must come to the same numbers, in float64 so that rounding hides nothing, with dropout off; the program
ends where they do not.

Images are those in --data_dir or, for a data set that is not there, random ones, as many as the official set has. The last
task has random bases with the ranks at the end of a run in models/ or, without one, typical shares of each layer's width.

Each form has the threads it would run with: the plain one PyTorch's default; the script's the same, or what its build_model
sets, which is one for PMNIST. Times are medians over rounds in which the forms take turns, the first round not counted unless
it took LIMIT seconds and is the only one. An epoch's time includes its share of what the epochs of a task have in common: the
matrices M M^T in the plain form, the inputs that are projected beforehand here. Representation matrices and bases are timed
from the layers' inputs on, which both forms get by the same forward pass. Loading and peak memory are those of a process of its
own, which loads all tasks, then makes ten steps on the last one and updates its bases; the plain form's memory includes torchvision.
"""
# ----------------------------------------------------------------------------------------------------------------------
# 1. Imports
# ----------------------------------------------------------------------------------------------------------------------
import argparse
import contextlib
import io
import json
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import main_cifar100  # noqa: E402
import main_cifar100_superclass  # noqa: E402
import main_five_datasets  # noqa: E402
import main_pmnist  # noqa: E402
from dataloader import cifar100, cifar100_superclass, five_datasets, pmnist  # noqa: E402
from dataloader.raw import SETS, DataError, load_raw, torchvision_datasets  # noqa: E402

THREADS = torch.get_num_threads()
LEAST, LIMIT = 2.0, 30.0  # seconds that the rounds of a comparison take at least; after which no other round begins


# ----------------------------------------------------------------------------------------------------------------------
# 2. Plain networks: the scripts' parameters, the paper's order of operations
# ----------------------------------------------------------------------------------------------------------------------
class PlainAlexNet(main_cifar100.AlexNet):
    """Each layer followed by BatchNorm, ReLU, dropout and pooling."""

    def __init__(self):
        super().__init__(main_cifar100.N_TASKS, n_classes=10)
        self.drop1, self.drop2 = nn.Dropout(0.2), nn.Dropout(0.5)

    def forward(self, x, task):
        """Logits (B, 10) for images x (B, 3, 32, 32)."""
        x = F.max_pool2d(self.drop1(F.relu(self.bn1(self.conv1(x)))), 2)
        x = F.max_pool2d(self.drop1(F.relu(self.bn2(self.conv2(x)))), 2)
        x = F.max_pool2d(self.drop2(F.relu(self.bn3(self.conv3(x)))), 2)
        x = self.drop2(F.relu(self.bn4(self.fc1(x.flatten(1)))))
        x = self.drop2(F.relu(self.bn5(self.fc2(x))))
        return [head(x) for head in self.heads][task]


class PlainLeNet(main_cifar100_superclass.LeNet):
    """With PyTorch's LocalResponseNorm."""

    def __init__(self):
        super().__init__(main_cifar100_superclass.N_TASKS, n_classes=5)
        self.lrn1 = self.lrn2 = nn.LocalResponseNorm(4, alpha=0.001 / 9, beta=0.75, k=1.0)

    def forward(self, x, task):
        """Logits (B, 5) for images x (B, 3, 32, 32)."""
        x = F.max_pool2d(self.lrn1(F.relu(self.conv1(x))), 3, stride=2, padding=1)
        x = F.max_pool2d(self.lrn2(F.relu(self.conv2(x))), 3, stride=2, padding=1)
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return [head(x) for head in self.heads][task]


class PlainResNet18(main_five_datasets.ResNet18):
    """With all heads."""

    def __init__(self):
        super().__init__(main_five_datasets.N_TASKS, n_classes=10, n_filters=20)

    def forward(self, x, task):
        """Logits (B, 10) for images x (B, 3, 32, 32)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        x = F.avg_pool2d(x, 2).flatten(1)
        return [head(x) for head in self.heads][task]


class PlainMLP(main_pmnist.MLP):
    """The same: there is one head, and nothing to put in another order."""

    def __init__(self):
        super().__init__(n_hidden=100, n_classes=10)


# ----------------------------------------------------------------------------------------------------------------------
# 3. Plain method
# ----------------------------------------------------------------------------------------------------------------------
def plain_train(model, task, x, y, projections, optimizer, batch_size):
    """One pass over x in random order. projections: {name of a layer: M M^T}, (d, d)."""
    model.train()
    layers = dict(model.named_modules())
    for batch in torch.randperm(len(x)).to(x.device).split(batch_size):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch], task), y[batch]).backward()
        for name, P in projections.items():
            G = layers[name].weight.grad
            G.sub_((G.flatten(1) @ P).view_as(G))  # Eq. 6-7
        optimizer.step()


@torch.no_grad()
def plain_evaluate(model, task, x, y, batch_size):
    """(Mean loss, accuracy) of images x with labels y."""
    model.eval()
    loss = correct = 0
    for images, labels in zip(x.split(batch_size), y.split(batch_size)):
        logits = model(images, task)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
    return loss / len(x), 100 * correct / len(x)


def plain_representation_matrix(layer, x):
    """R (d, n): the layer's inputs x as columns; for a convolution its patches, one after another."""
    if isinstance(layer, nn.Linear):
        return torch.stack([sample.flatten() for sample in x], dim=1)
    (k, _), (stride, _), (padding, _) = layer.kernel_size, layer.stride, layer.padding
    columns = []
    for sample in F.pad(x, [padding] * 4):
        for i in range(0, sample.shape[1] - k + 1, stride):
            for j in range(0, sample.shape[2] - k + 1, stride):
                columns.append(sample[:, i : i + k, j : j + k].flatten())
    return torch.stack(columns, dim=1)


def plain_update_basis(M, R, eps):
    """M (d, r) and the directions that Eq. 8-9 append to it."""
    total = torch.linalg.svd(R, full_matrices=False).S.square().sum()
    R_hat = R - M @ M.T @ R
    U, S, _ = torch.linalg.svd(R_hat, full_matrices=False)
    held, r = total - S.square().sum(), 0
    while held < eps * total and r < len(S):
        held, r = held + S[r] ** 2, r + 1
    return torch.cat([M, U[:, :r]], dim=1)


def plain_inputs(images, mean, std, side=32, pixels=None):
    """float32 (n, 3, 32, 32) of uint8 images, or (n, 784) with the pixels permuted: each by itself through torchvision's transforms."""
    torchvision_datasets()  # makes the next import work, also where torchvision's compiled operators do not fit
    from torchvision import transforms
    convert = transforms.Compose([
        Image.fromarray,
        transforms.Pad((side - images.shape[1]) // 2),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
        transforms.Lambda(lambda x: x.expand(3, -1, -1) if pixels is None else x.flatten()[pixels]),
    ])
    return torch.stack(list(torch.utils.data.DataLoader(images, batch_size=1, collate_fn=lambda batch: convert(batch[0]))))


# ----------------------------------------------------------------------------------------------------------------------
# 4. The two forms of a benchmark
# ----------------------------------------------------------------------------------------------------------------------
class Benchmark(NamedTuple):
    """A script, its plain network, and what is measured on them."""
    script: object
    network: type
    shares: list  # rank / width of each layer after the last task, or of all layers
    n_steps: int  # timed in one go
    n_epoch: int  # images of the epoch that is timed: all of a task, but for 5-Datasets, where that takes minutes
    inputs: list  # (data set, the loader's conversion of images, the plain one): one for all tasks, or one for each


def convert(name, loader, **how):
    """An entry of Benchmark.inputs."""
    return name, loader, partial(plain_inputs, **how)


PERMUTATIONS = [np.random.default_rng([main_pmnist.parse_args([]).seed, t]).permutation(784) for t in range(main_pmnist.N_TASKS)]
BENCHMARKS = {
    "pmnist": Benchmark(main_pmnist, PlainMLP, [0.69, 0.99, 0.87], 200, 54_000, [
        convert("mnist", partial(pmnist.permuted, pixels=torch.from_numpy(pixels)), mean=pmnist.MEAN, std=pmnist.STD, side=28,
                pixels=torch.from_numpy(pixels)) for pixels in PERMUTATIONS]),
    "cifar100": Benchmark(main_cifar100, PlainAlexNet, [0.83, 0.87, 0.78, 0.59, 0.50], 2, 4_750, [
        convert("cifar100", cifar100.to_input, mean=cifar100.MEAN, std=cifar100.STD)]),
    "cifar100_superclass": Benchmark(main_cifar100_superclass, PlainLeNet, [0.55, 0.60, 0.36, 0.60], 2, 2_375, [
        convert("cifar100", cifar100_superclass.to_input, mean=[0.0], std=[1.0])]),
    "five_datasets": Benchmark(main_five_datasets, PlainResNet18, [0.78], 2, 1_280, [
        convert(name, partial(five_datasets.to_input, mean=mean, std=std), mean=mean, std=std)
        for _, name, mean, std in five_datasets.DATASETS]),
}


class Form:
    """A network at work on task 1 or, after go_to_last_task, on the benchmark's last one."""

    def __init__(self, benchmark, device):
        torch.set_num_threads(THREADS)
        self.script, self.args = benchmark.script, benchmark.script.parse_args([])
        self.script.find_device(str(device))  # no TF32 in either form
        self.model = self.network(benchmark, device).to(device)
        self.threads = torch.get_num_threads()
        self.layers = self.script.projected_layers(self.model)
        self.task, self.bases = 0, {}

    def go_to_last_task(self, bases):
        """The state after many tasks: bases, and a BatchNorm that is frozen."""
        self.task, self.bases = self.args.n_tasks - 1, bases
        self.script.freeze_batchnorm(self.model)

    def matrices(self, inputs):
        """{name: R} of the layers' inputs."""
        return {name: self.representation_matrix(layer, inputs[name]) for name, layer in self.layers.items()}

    def updated(self, matrices):
        """{name: M} after a task with these representation matrices."""
        thresholds = self.script.per_layer("threshold", self.args.threshold, self.layers)
        eps = [threshold + self.task * self.args.threshold_increment for threshold in thresholds]
        return {name: self.update_basis(self.bases.get(name, R.new_zeros(len(R), 0)), R, e) for (name, R), e in zip(matrices.items(), eps)}


class Here(Form):
    """The script's functions, called as its main calls them."""
    representation_matrix = staticmethod(main_cifar100.representation_matrix)  # equal in all scripts, a test sees to it
    update_basis = staticmethod(main_cifar100.update_basis)

    def __init__(self, benchmark, device):
        benchmark.script.tune_memory()
        super().__init__(benchmark, device)

    def network(self, benchmark, device):
        """The script's network, in the layout that its main chooses."""
        return self.script.place_model(self.script.build_model(self.args), device)

    @staticmethod
    def load(benchmark, data_dir):
        """All tensors of all tasks, made in turn and not kept. Returns what is kept, and the training images of the last task."""
        tasks = benchmark.script.benchmark.load(data_dir, benchmark.script.parse_args([]))
        for task in tasks:
            for part in ("train", "valid", "test"):
                getattr(task, part)
        return tasks, tasks[-1].train[0]

    def receive(self, x, y):
        """Training part of the task, (n, ...) and (n,); here the script projects the inputs of a Linear layer that sees them as they are."""
        self.x, self.y = x, y
        self.x_hat = self.script.projected_inputs(self.model, self.task, x, self.bases)

    def train(self, n):
        """One pass over the first n images."""
        self.script.train_epoch(self.model, self.task, self.x[:n], self.x_hat, self.y[:n], self.bases, self.args.lr, self.args.momentum, {},
                                self.args.batch_size_train)

    epoch = train  # it knows loss and accuracy of the training images from the training


class Plain(Form):
    """The plain implementation."""
    representation_matrix = staticmethod(plain_representation_matrix)
    update_basis = staticmethod(plain_update_basis)

    def __init__(self, benchmark, device):
        torchvision_datasets()  # here, so that loading is timed without the import
        super().__init__(benchmark, device)

    def network(self, benchmark, device):
        """The plain network."""
        return benchmark.network()

    @staticmethod
    def load(benchmark, data_dir):
        """All images of all tasks. Returns what is kept, and the training images of the last task."""
        inputs = []
        for name, _, plain in benchmark.inputs:
            with np.load(data_dir / f"{name}.npz") as arrays:
                inputs += [plain(arrays["x_train"]), plain(arrays["x_test"])]
        return inputs, inputs[-2]

    def receive(self, x, y):
        """Training part of the task, (n, ...) and (n,)."""
        self.x, self.y = x, y
        self.projections = {name: M @ M.T for name, M in self.bases.items()}
        self.optimizer = torch.optim.SGD(self.model.parameters(), self.args.lr)

    def train(self, n):
        """One pass over the first n images."""
        plain_train(self.model, self.task, self.x[:n], self.y[:n], self.projections, self.optimizer, self.args.batch_size_train)

    def epoch(self, n):
        """One pass over the first n images, and their evaluation."""
        self.train(n)
        plain_evaluate(self.model, self.task, self.x[:n], self.y[:n], self.args.batch_size_test)


def orthonormal_bases(form, ranks):
    """Random bases {name: M} of these ranks for the form's layers."""
    return {name: torch.linalg.qr(torch.randn(d, ranks[name]))[0].to(next(form.model.parameters()).device)
            for name, d in form.script.widths(form.layers).items()}


def layer_inputs(form, x):
    """What reaches the form's layers, of each as many samples as the script takes."""
    inputs = form.script.layer_inputs(form.model, x, form.task)
    n_samples = form.script.per_layer("n_samples", form.args.n_samples, form.layers)
    return {name: inputs[name][:n] for name, n in zip(inputs, n_samples)}


def late_ranks(name, form):
    """({layer: rank} after the last task, where they are from): a run in models/, or the typical shares."""
    widths = form.script.widths(form.layers)
    for path in sorted((ROOT / "models" / name).glob("*/results.json")):
        ranks = json.loads(path.read_text())["ranks"]
        if len(ranks) == form.args.n_tasks and not path.parent.name.startswith("quick_"):
            return ranks[-1], path.relative_to(ROOT).parent
    shares = form.script.per_layer("threshold", BENCHMARKS[name].shares, form.layers)
    return {layer: round(share * d) for (layer, d), share in zip(widths.items(), shares)}, "typical shares"


# ----------------------------------------------------------------------------------------------------------------------
# 5. Checks and measurements
# ----------------------------------------------------------------------------------------------------------------------
def fail(message, status=2):
    """End the program with one line: status 2 for wrong input, 1 where the two forms differ."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def same(what, here, plain):
    """End the program where tensors of the same name differ. They are float64, so that 1e-6 of the norm leaves no doubt."""
    for name in plain:
        if here[name].shape != plain[name].shape:
            fail(f"the two forms differ: {what} of {name} is {tuple(here[name].shape)}, plain {tuple(plain[name].shape)}", status=1)
        error = torch.linalg.norm(here[name] - plain[name]) / torch.linalg.norm(plain[name]).clamp(min=1e-30)
        if not error < 1e-6:  # not a number is no better
            fail(f"the two forms differ: {what} of {name}, by {error:.1e} of its norm", status=1)


def check(name, data_dir, device):
    """End the program unless both forms give the same inputs, weights after two steps, representation matrices and bases."""
    torch.manual_seed(0)
    benchmark = BENCHMARKS[name]
    for data_set, loader, plain in benchmark.inputs:
        with contextlib.redirect_stdout(io.StringIO()):
            images = load_raw(data_set, data_dir).x_test[:8]
        x = loader(images)
        same("inputs", {data_set: x}, {data_set: plain(images)})

    forms = Here(benchmark, device), Plain(benchmark, device)
    forms[1].model.load_state_dict(forms[0].model.state_dict())
    ranks = {name: 1 + d // 8 for name, d in forms[0].script.widths(forms[0].layers).items()}
    bases = {name: M.double() for name, M in orthonormal_bases(forms[0], ranks).items()}
    x, y = x.double().to(device), torch.arange(len(x), device=device) % 5
    for form in forms:
        form.args.batch_size_train = 4
        for module in form.model.double().modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    for step in ("step on task 1", "step on the last task"):
        moved = []
        for form in forms:
            if step == "step on the last task":
                form.go_to_last_task(bases)
            before = {name: W.detach().clone() for name, W in form.model.named_parameters()}
            form.receive(x, y)
            torch.manual_seed(0)
            form.train(len(x))
            moved.append({name: W.detach() - before[name] for name, W in form.model.named_parameters()})
        same(step, *moved)

    for form in forms:
        form.bases = {}
    for part in x.split(4):
        inputs = layer_inputs(forms[0], part)
        matrices = forms[0].matrices(inputs)
        same("representation matrix", matrices, forms[1].matrices(inputs))
        updated = [form.updated(matrices) for form in forms]
        same("space of the basis", *({name: M @ M.T for name, M in bases.items()} for bases in updated))
        for form in forms:
            form.bases = updated[0]


def synchronize(device):
    """Wait until the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def race(what, forms, device):
    """Median seconds of what(form), for each form."""
    times = [[] for _ in forms]
    while len(times[0]) < 4 or sum(map(sum, times)) < LEAST:
        for form, seconds in zip(forms, times):
            torch.set_num_threads(form.threads)
            synchronize(device)
            start = time.perf_counter()
            what(form)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        if sum(map(sum, times)) > LIMIT:
            break
    return [statistics.median(seconds[1:] or seconds) for seconds in times]


def measure(name, data_dir, device):
    """Check both forms and time them: [(what, seconds of the plain form, seconds here)], and a line on steps and ranks."""
    benchmark = BENCHMARKS[name]
    benchmark.script.tune_memory()  # before the first tensor, and for the whole process: the plain form gains as well
    check(name, data_dir, device)
    torch.manual_seed(0)
    forms = Plain(benchmark, device), Here(benchmark, device)
    args = forms[1].args
    with contextlib.redirect_stdout(io.StringIO()):
        tasks = benchmark.script.benchmark.load(data_dir, args)
    ranks, source = late_ranks(name, forms[1])
    bases, steps = orthonormal_bases(forms[1], ranks), []
    for task in (tasks[0], tasks[-1]):
        x, y = (tensor.to(device) for tensor in task.train)
        if task is tasks[-1]:
            for form in forms:
                form.go_to_last_task(bases)
        once = race(lambda form: form.receive(x, y), forms, device)
        n = min(benchmark.n_steps * args.batch_size_train, len(x))
        steps.append([seconds * args.batch_size_train / n for seconds in race(lambda form: form.train(n), forms, device)])
    n = min(benchmark.n_epoch, len(x))
    epoch = race(lambda form: form.epoch(n), forms, device)
    own = layer_inputs(forms[1], x[: max(args.n_samples)])
    # the same values, laid out as each form's convolutions leave them
    inputs = {forms[0]: {layer: tensor.contiguous() for layer, tensor in own.items()}, forms[1]: own}
    matrices = forms[1].matrices(own)
    rows = [
        ("step of task 1", *steps[0]),
        ("step of the last task", *steps[1]),
        ("epoch of the last task", *(e + o / args.n_epochs for e, o in zip(epoch, once))),
        ("representation matrices", *race(lambda form: form.matrices(inputs[form]), forms, device)),
        ("update of the bases", *race(lambda form: form.updated(matrices), forms, device)),
    ]
    share = forms[1].script.memory(bases)["percent_of_max"]
    return rows, (f"{name}: an epoch of {n:,} images; here a step of the last task takes {steps[1][1] / steps[0][1]:.2f} times one of task 1; "
                  f"bases of {share:.0f} % of GPM_Max, ranks from {source}")


def load_and_work(name, form_class, data_dir, device):
    """Seconds of loading, and peak memory in MB, the host's and the GPU's, of that and some work on the last task."""
    torch.manual_seed(0)
    benchmark = BENCHMARKS[name]
    form = form_class(benchmark, device)  # first, since it sets the number of threads
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        kept, x = form_class.load(benchmark, data_dir)
    seconds = time.perf_counter() - start
    form.go_to_last_task(orthonormal_bases(form, late_ranks(name, form)[0]))
    x = x.to(device)
    form.receive(x, torch.zeros(len(x), dtype=torch.long, device=device))
    form.epoch(10 * form.args.batch_size_train)
    form.updated(form.matrices(layer_inputs(form, x[: max(form.args.n_samples)])))
    del kept
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return (seconds, peak, torch.cuda.max_memory_allocated(device) / 2**20) if device.type == "cuda" else (seconds, peak)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Main
# ----------------------------------------------------------------------------------------------------------------------
def parse_args(argv=None):
    """Read the flags. Wrong values end in one line and exit status 2."""
    parser = argparse.ArgumentParser(description="The scripts against a plain implementation",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    parser.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), help="what to measure")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure it")
    parser.add_argument("--data_dir", default="data", help="where prepared arrays are looked for")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda cannot be used: torch sees no GPU")
    return args


def own_process(function, *args):
    """Call the function in a fresh process, whose memory and threads nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def gather_data(names, data_dir, folder):
    """(Where <name>.npz of every data set is, the sets that are random images): data_dir if it has all, or else folder."""
    absent = [name for name in names if not (data_dir / f"{name}.npz").exists()]
    for name in names if absent else ():
        path, spec = data_dir / f"{name}.npz", SETS[name]
        if name not in absent:
            (folder / path.name).symlink_to(path.resolve())
            continue
        rng, arrays = np.random.default_rng(0), {}
        for split, n in ("train", spec.n_train), ("test", spec.n_test):
            arrays[f"x_{split}"] = rng.integers(0, 256, (n, *spec.shapes[-1]), dtype=np.uint8)
            arrays[f"y_{split}"] = np.arange(n) % spec.n_classes
        np.savez(folder / path.name, **arrays)
    return folder if absent else data_dir, absent


def device_name(device):
    """What the figures are measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # where it is not there, no other place names the processor either
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def duration(seconds):
    """The time with its unit."""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1e3 * seconds:.4g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.4g} µs"


def main(args):
    """Check, measure and print a table."""
    device, commit = torch.device(args.device), main_cifar100.provenance(torch.device("cpu"))["commit"]
    status = ["git", "status", "--porcelain", "--", "*.py", "models"]  # the ranks are from models/
    changed = commit and subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    columns, notes = {}, []
    for name in args.benchmarks:
        print(f"measuring {name} ...", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            sets = list(dict.fromkeys(data_set for data_set, _, _ in BENCHMARKS[name].inputs))
            data_dir, absent = gather_data(sets, Path(args.data_dir), Path(folder))
            rows, note = own_process(measure, name, data_dir, device)
            plain, here = (own_process(load_and_work, name, form, data_dir, device) for form in (Plain, Here))
        rows = [("loading all tasks", plain[0], here[0]), *rows]
        columns[name] = {what: f"{duration(p)} / {duration(h)} = {p / h:.1f}" for what, p, h in rows}
        for what, p, h in zip(("peak memory", "peak memory of the GPU"), plain[1:], here[1:]):
            columns[name][what] = f"{p:,.0f} / {h:,.0f} MB = {p / h:.1f}"
        notes.append(note + (f"; random images for {', '.join(absent)}" if absent else ""))
    print(f"{device_name(device)}, threads: {THREADS}, torch {torch.__version__}, commit {(commit or 'unknown')[:7]}"
          + " with changes" * bool(changed) + "; plain / here = ratio\n")
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for what in next(iter(columns.values())):
        print(f"| {what} | " + " | ".join(column[what] for column in columns.values()) + " |")
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    try:
        main(parse_args())
    except DataError as error:
        fail(str(error))
