"""Gradient Projection Memory on 5-Datasets (Saha, Garg, Roy, ICLR 2021).

    python main_five_datasets.py --seed 37 --official_data

benchmark   5 tasks of 10 classes: CIFAR-10, MNIST, SVHN, Fashion-MNIST, notMNIST; one head each
network     reduced ResNet18: 20 convolutions of 20 to 160 filters, 1.1 M parameters
paper       arXiv 2103.09762: ACC 91.22 ± 0.20, BWT -1 ± 0
measured    --official_data: 90.85 / -1.46 (1 seed), 7.8 h (CPU, 2 threads)
output      models/five_datasets/<run name>/results.json; the same command continues a stopped run
code        4b52a8e0aabb853d, the digest of this script and its loaders before any edit

The weight W of a linear map y = W x has the gradient G = delta x^T (Eq. 1-2), so SGD moves W only
within the span of its inputs. Steps orthogonal to the inputs of old tasks leave the old outputs
unchanged. GPM keeps an orthonormal basis M (d, r) of those inputs for each layer:

    after a task      R (d, n): the layer's inputs as columns
                      R_hat = R - M M^T R = U S V^T: what is new in them          (Eq. 8)
                      M <- [M, U_1 .. U_k], with the smallest k for which
                      the new M holds a share eps: ||M^T R||^2 >= eps ||R||^2     (Eq. 9)
    on the next task  G <- G - G M M^T before each step of SGD                    (Eq. 6-7)

The first task starts from an empty M, for which Eq. 8-9 are Eq. 5. (||.|| is the Frobenius norm.)

--official_data: the released code means to load Fashion-MNIST but loads MNIST a second time, which
is the easier task. The paper's numbers probably rest on that. Without the flag it is Fashion-MNIST.

Changes relative to main_cifar100.py: ResNet18 in place of AlexNet; --official_data, also listed in
VARIANT; defaults of the flags (--n_samples: 10 for the layers up to stage2.1.conv1, 50 up to
stage3.0, then 100).
"""

# 1. Imports ---------------------------------------------------------------------------------------
import argparse
import errno
import hashlib
import io
import json
import math
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from filelock import FileLock, Timeout
from tqdm import tqdm

from dataloader import five_datasets as benchmark
from dataloader.raw import DataError

# 2. Configuration ---------------------------------------------------------------------------------
N_TASKS = 5
PAPER = {"ACC": "91.22 ± 0.20", "BWT": "-1 ± 0"}
SAVE_SECONDS = 30  # a killed run loses at most this much, or one epoch if that takes longer
WHERE = ("device", "data_dir", "models_dir", "run_name")  # flags that do not change the experiment
VARIANT = ("seed", "official_data")  # flags that choose one of the published runs


def parse_args(argv=None):
    """Read the flags. Defaults are the published protocol, but for --official_data."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.error = fail  # one line, without the usage
    add = parser.add_argument
    # fmt: off
    add("--seed", type=number(int, 0, 2**32), default=37, help="seeds weights, split and batches")
    add("--n_epochs", type=number(int, 1), default=100, help="maximum number of epochs per task")
    add("--batch_size_train", type=number(int, 1), default=64, help="images per training step")
    add("--batch_size_test", type=number(int, 1), default=64, help="images per test batch")
    add("--pc_valid", type=number(float, 1e-6, 1), default=0.05,
        help="fraction of the training images that is held out for validation")
    add("--lr", type=number(float, 1e-9), default=0.1, help="learning rate at the start of a task")
    add("--momentum", type=number(float, 0, 1), default=0.0, help="momentum of SGD")
    add("--lr_min", type=number(float, 1e-9), default=1e-3, help="a task ends once lr is below")
    add("--lr_patience", type=number(int, 0), default=5, help="epochs without a lower validation "
        "loss before lr is divided; 0: constant lr, and the last weights are kept")
    add("--lr_factor", type=number(float, 1), default=3.0, help="lr is divided by this")
    add("--threshold", type=number(float, 0, 1), nargs="+", default=[0.965],
        help="eps on the first task, one value or one per layer; 0: no projection")
    add("--threshold_increment", type=number(float, 0, 1), default=0.0,
        help="added to eps on each further task")
    add("--n_samples", type=number(int, 1), nargs="+", default=[10] * 9 + [50] * 4 + [100] * 7,
        help="training images from which R is computed, one value or one per layer")
    add("--n_tasks", type=number(int, 1, N_TASKS + 1), default=N_TASKS, help="first n tasks")
    add("--official_data", action="store_true", help="MNIST twice, as in the released code")
    add("--device", type=usable_device, default="auto", help="auto: cuda if there is one, else cpu")
    add("--data_dir", type=folder, default="data", help="where data sets are cached")
    add("--models_dir", type=folder, default="models", help="where runs are kept")
    add("--run_name", help="name of the run's folder; None: seed, data and changed flags")
    # fmt: on
    args = parser.parse_args(argv)
    if args.lr_min > args.lr:
        fail(f"--lr_min {args.lr_min} is above --lr {args.lr}: no epoch would be trained")
    if max(thresholds(args, args.n_tasks - 1)) >= 1:
        fail(f"--threshold and --threshold_increment reach 1 within {args.n_tasks} tasks")
    args.changed = changed_flags(args, parser)
    name = f"seed_{args.seed} {'official_data' * args.official_data}"
    args.run_name = args.run_name or name_of_run(name, args.changed)
    return args


def thresholds(args, task):
    """eps of each --threshold on the task: it grows by the increment, but 0 stays 0."""
    return [eps + task * args.threshold_increment if eps else 0 for eps in args.threshold]


# 3. Gradient projection memory --------------------------------------------------------------------
# The layers below keep their own basis and project their own gradient. A network is protected by
# building it from them; layers that must stay free, such as the task heads, are plain nn.Linear.
#
# To use it elsewhere: train each task with a new SGD optimizer, then call update_bases; before the
# second task call freeze_batchnorm. Adam and weight decay would also move the weights in protected
# directions. Call the layers as modules: F.linear(x, layer.weight) would bypass the projection.
# The projection must be exact to float32: switch TF32 off, and with autocast call backward outside
# its context, as PyTorch advises.


def project(G, M):
    """G - G M M^T: the part of each row of G (rows, d) orthogonal to the columns of M (d, r)."""
    return G - G @ M @ M.T


class Projected(nn.Module):
    """Mixin before nn.Linear or nn.Conv2d: a layer without bias that keeps a basis M (d, r).

    M: orthonormal directions of old tasks' inputs. While it is empty, nothing is projected. It is
    saved as extra state, since load_state_dict refuses a buffer whose shape has changed.
    """

    def __init__(self, *args):
        super().__init__(*args, bias=False)
        d = self.weight[0].numel()
        self.register_buffer("M", self.weight.new_zeros(d, 0), persistent=False)

    def get_extra_state(self):
        return self.M

    def set_extra_state(self, M):
        self.M = M.to(self.weight)


class ProjectedLinear(Projected, nn.Linear):
    """y = x W^T for x (n, d) or (n, ..., d); W receives G - G M M^T in place of G (Eq. 6-7)."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)

    def forward(self, x):
        return LinearWithProjectedInput.apply(x, self.weight, self.M)

    def representation(self, x):
        """R (d, n): the inputs x as columns."""
        return x.flatten(0, -2).T


class LinearWithProjectedInput(torch.autograd.Function):
    """y = x W^T. W receives delta^T (x - x M M^T), where delta is the gradient of y.

    With samples as rows G = delta^T x (Eq. 2), so this equals G - G M M^T, as for a convolution
    below, but it projects one row per sample (64) instead of one per output (2048). On the last
    tasks, where M is large, a step takes less than half the time.
    """

    @staticmethod
    def forward(ctx, x, W, M):
        ctx.save_for_backward(x, W, M)
        return x @ W.T

    @staticmethod
    def backward(ctx, delta):
        x, W, M = ctx.saved_tensors
        x, delta = x.to(W.dtype), delta.to(W.dtype)  # autocast may have made them bfloat16
        G = delta.flatten(0, -2).T @ project(x.flatten(0, -2), M)
        return delta @ W, G, None


class ProjectedConv2d(Projected, nn.Conv2d):
    """A convolution, i.e. a linear map of patches of d values, whose weight receives G - G M M^T.

    d = channels * kernel height * kernel width. It takes the first six arguments of nn.Conv2d;
    padding must be a number or a pair.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1):
        if isinstance(padding, str):
            raise ValueError(f"padding must be a number or a pair, not {padding!r}")
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation)

    def forward(self, x):
        W = WeightWithProjectedGradient.apply(self.weight, self.M)
        return F.conv2d(x, W, None, self.stride, self.padding, self.dilation)

    def representation(self, x):
        """R (d, n): the patches of the images x as columns, n = images * output positions."""
        patches = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        return patches.transpose(0, 1).flatten(1)


class WeightWithProjectedGradient(torch.autograd.Function):
    """The weight W (out, ...) itself; in the backward pass its gradient G becomes G - G M M^T."""

    @staticmethod
    def forward(ctx, W, M):
        ctx.save_for_backward(M)
        return W.view_as(W)  # a new tensor, as autograd needs it, without a copy

    @staticmethod
    def backward(ctx, G):
        (M,) = ctx.saved_tensors
        return project(G.flatten(1), M).view_as(G), None


def projected_layers(model):
    """The layers that keep a basis, {name: layer}, in the order of the network's definition."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, Projected)}


def unprotected_layers(model):
    """Names of the modules whose own parameters or running statistics are free to change.

    BatchNorm without running statistics is not among them: freeze_batchnorm takes care of it.
    """
    cared_for = (Projected, nn.BatchNorm1d, nn.BatchNorm2d)
    names = []
    for name, module in model.named_modules():
        has_statistics = getattr(module, "running_mean", None) is not None
        has_parameters = any(True for _ in module.parameters(recurse=False))
        if has_statistics or (has_parameters and not isinstance(module, cared_for)):
            names.append(name or "the model itself")
    return names


def update_basis(M, R, eps):
    """Append to M (d, r) the fewest directions that keep a share eps of R's energy (Eq. 8-9).

    R: (d, n). Its energy is ||R||^2. Computed in float64 on the CPU. eps = 0 appends nothing.
    """
    basis, R = M.cpu().double(), R.cpu().double()
    R = torch.linalg.qr(R.T, mode="r").R.T  # the same U and S, but at most d columns
    R_hat = R - basis @ (basis.T @ R)
    R_hat = R_hat - basis @ (basis.T @ R_hat)  # again: M is orthonormal only to float32 precision
    U, S = left_singular_vectors(R_hat)
    energy = R.square().sum()
    gain = S.square()  # the energy that each U_i would add
    held_by_M = (energy - gain.sum()).clamp(min=0)
    held_before = held_by_M + gain.cumsum(0) - gain  # by M, U_1 .. U_(i-1)
    is_needed = (held_before < eps * energy) & (gain > 1e-12 * energy)  # a smaller gain is rounding
    k = is_needed.sum()  # the needed ones come first
    return torch.cat([M, U[:, :k].to(M)], dim=1)


def left_singular_vectors(A):
    """U and S of the SVD A = U S V^T. Where LAPACK's gesdd does not converge, gesvd does."""
    try:
        U, S, _ = torch.linalg.svd(A, full_matrices=False)
    except torch.linalg.LinAlgError:
        from scipy.linalg import svd

        U, S, _ = svd(A.numpy(), full_matrices=False, lapack_driver="gesvd")
    return torch.as_tensor(U), torch.as_tensor(S)


@torch.no_grad()
def layer_inputs(model, x, task):
    """The inputs of each projected layer, {name: [one tensor per call]}, for x as one batch."""
    inputs, hooks = {}, []
    for name, layer in projected_layers(model).items():
        inputs[name] = []

        def keep(_, args, name=name):
            inputs[name].append(args[0].clone())  # the network may go on to change it in place

        hooks.append(layer.register_forward_pre_hook(keep))
    try:
        model.eval()
        model(x, task)
    finally:
        for hook in hooks:
            hook.remove()
    if not any(inputs.values()):
        raise RuntimeError("no layer was called: pass the model itself, not torch.compile's")
    return inputs


def update_bases(model, task, x, eps, n_samples):
    """After a task, add to each layer's basis what the task's training images x need (Eq. 8-9).

    eps, n_samples: one value per layer; ValueError if there are more or fewer. All layers see the
    same random images, of which each uses its first n_samples. A layer that the task does not call
    keeps its basis. Leaves the model in eval mode.
    """
    layers = projected_layers(model)
    if not len(eps) == len(n_samples) == len(layers):
        raise ValueError(f"eps and n_samples need a value for each of the layers {[*layers]}")
    images = x[torch.randperm(len(x))[: max(n_samples)].to(x.device)]
    inputs = layer_inputs(model, images, task)
    for (name, layer), layer_eps, n in zip(layers.items(), eps, n_samples, strict=True):
        if inputs[name]:
            R = torch.cat([layer.representation(call[:n]) for call in inputs[name]], dim=1)
            layer.M = update_basis(layer.M, R, layer_eps)


def freeze_batchnorm(model):
    """Stop training the scale and shift of BatchNorm: they are learned on the first task only.

    Running statistics would still change: build it with track_running_stats=False.
    """
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.requires_grad_(False)


# 4. Network ---------------------------------------------------------------------------------------
class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.conv1 = ProjectedConv2d(n_in, n_out, 3, stride, padding=1)
        self.bn1 = nn.BatchNorm2d(n_out, track_running_stats=False)
        self.conv2 = ProjectedConv2d(n_out, n_out, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(n_out, track_running_stats=False)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(
                ProjectedConv2d(n_in, n_out, 1, stride),
                nn.BatchNorm2d(n_out, track_running_stats=False),
            )

    def forward(self, x):
        """x (B, n_in, H, W) -> (B, n_out, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """Reduced ResNet18 without biases and with one head per task.

    BatchNorm keeps no running statistics: it always uses those of the batch, also in evaluation.
    """

    def __init__(self, n_tasks, n_classes, n_filters):
        super().__init__()
        n = n_filters
        self.conv1 = ProjectedConv2d(3, n, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(n, track_running_stats=False)
        self.stage1 = nn.Sequential(BasicBlock(n, n, 1), BasicBlock(n, n, 1))
        self.stage2 = nn.Sequential(BasicBlock(n, 2 * n, 2), BasicBlock(2 * n, 2 * n, 1))
        self.stage3 = nn.Sequential(BasicBlock(2 * n, 4 * n, 2), BasicBlock(4 * n, 4 * n, 1))
        self.stage4 = nn.Sequential(BasicBlock(4 * n, 8 * n, 2), BasicBlock(8 * n, 8 * n, 1))
        n_features = 4 * 8 * n  # 8 n filters at 2 x 2 positions
        self.heads = nn.ModuleList(
            nn.Linear(n_features, n_classes, bias=False) for _ in range(n_tasks)
        )

    def forward(self, x, task):
        """Logits (B, n_classes) of the task's head for images x (B, 3, 32, 32)."""
        x = F.relu(self.bn1(self.conv1(x)))  # (B, 20, 32, 32)
        x = self.stage1(x)  # (B, 20, 32, 32)
        x = self.stage2(x)  # (B, 40, 16, 16)
        x = self.stage3(x)  # (B, 80, 8, 8)
        x = self.stage4(x)  # (B, 160, 4, 4)
        x = F.avg_pool2d(x, 2).flatten(1)  # (B, 640)
        return self.heads[task](x)


def build_model(args):
    """The network with PyTorch's default initialisation.

    It has all heads, so that the weights of a seed do not depend on --n_tasks.
    """
    return ResNet18(n_tasks=N_TASKS, n_classes=10, n_filters=20)


# 5. Training and evaluation -----------------------------------------------------------------------
def train_epoch(model, task, x, y, optimizer, batch_size):
    """One pass in random order over images x (N, ...) with labels y (N,). Returns the mean loss."""
    model.train()
    total = torch.zeros((), device=x.device)
    order = torch.randperm(len(x)).to(x.device)
    # disable=None: no progress bar where the output is not a terminal
    for batch in tqdm(order.split(batch_size), f"task {task + 1}", leave=False, disable=None):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[batch], task), y[batch])
        loss.backward()  # weights of projected layers receive G - G M M^T
        optimizer.step()
        total += loss.detach() * len(batch)  # no .item(): it would wait for the GPU in each step
    return total.item() / len(x)


@torch.no_grad()
def evaluate(model, task, x, y, batch_size):
    """Mean loss and accuracy in percent. BatchNorm makes both depend on the order of x."""
    model.eval()
    logits = torch.cat([model(batch, task) for batch in x.split(batch_size)])
    accuracy = 100 * (logits.argmax(1) == y).sum().item() / len(y)
    return F.cross_entropy(logits, y).item(), accuracy


@dataclass
class Progress:
    """Where the training stands between two epochs."""

    task: int = 0  # the one being learned
    epoch: int = 0  # epochs of this task so far
    lr: float = 0.0
    waited: int = 0  # epochs since the validation loss was lowest, or since lr was divided
    best_loss: float = math.inf
    best_weights: dict | None = None  # with best_loss
    optimizer: dict | None = None  # its state_dict


def train_task(model, train, valid, args, progress, end_epoch):
    """Learn one task. The network is left with the weights of the lowest validation loss.

    After lr_patience epochs without a lower one, lr is divided by lr_factor; the task ends when lr
    falls below lr_min. With lr_patience 0, lr is constant and the last weights are kept.
    train, valid: (x, y). progress: where to begin; it is kept up to date. end_epoch: called after
    each epoch with lr, train loss, validation loss and accuracy, and seconds.
    """
    optimizer = torch.optim.SGD(model.parameters(), progress.lr, args.momentum)
    if progress.optimizer:
        optimizer.load_state_dict(progress.optimizer)
    while progress.epoch < args.n_epochs and progress.lr >= args.lr_min:
        start, lr = time.perf_counter(), progress.lr
        optimizer.param_groups[0]["lr"] = lr
        loss = train_epoch(model, progress.task, *train, optimizer, args.batch_size_train)
        progress.epoch += 1
        mixed = shuffled(valid, args.seed, progress.task, progress.epoch)
        valid_loss, accuracy = evaluate(model, progress.task, *mixed, args.batch_size_test)
        if not math.isfinite(loss + valid_loss):
            fail(f"the loss became {loss + valid_loss}: try an --lr below {args.lr}", status=1)
        if valid_loss < progress.best_loss or args.lr_patience == 0:
            progress.best_loss, progress.waited = valid_loss, 0
            state = model.state_dict()
            progress.best_weights = {key: value.clone() for key, value in state.items()}
        else:
            progress.waited += 1
            if progress.waited == args.lr_patience:
                progress.lr, progress.waited = lr / args.lr_factor, 0
        progress.optimizer = optimizer.state_dict()
        end_epoch(lr, loss, valid_loss, accuracy, seconds=time.perf_counter() - start)
    model.load_state_dict(progress.best_weights)


def shuffled(part, *seed):
    """Images and labels in random order, drawn independently of the training's random numbers.

    With BatchNorm the validation loss depends on which images share a batch. As in the released
    code, each epoch draws the batches anew. With fixed batches another epoch would be the best.
    """
    x, y = part
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x))).to(x.device)
    return x[order], y[order]


def average_accuracy(acc):
    """ACC: mean over u of acc[T, u]. acc (T, T): accuracy on task u (column) after task t (row).

    Where task u has not been learned yet (u > t), acc is None.
    """
    return float(np.mean(np.array(acc, dtype=float)[-1]))


def backward_transfer(acc):
    """BWT: mean over u < T of acc[T, u] - acc[u, u]; 0 after the first task."""
    acc = np.array(acc, dtype=float)
    return float(np.mean(acc[-1, :-1] - np.diag(acc)[:-1])) if len(acc) > 1 else 0.0


# 6. Main ------------------------------------------------------------------------------------------
def main(args):
    """Learn the tasks one after another, and report ACC and BWT."""
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True  # so that a resumed run repeats the stopped one
    torch.backends.cudnn.allow_tf32 = False  # its error of 1e-3 would change old outputs
    torch.backends.cuda.matmul.allow_tf32 = False
    on_cpu = args.device.type == "cpu"
    layout = torch.channels_last if on_cpu else torch.preserve_format  # a fifth faster on a CPU
    model = build_model(args).to(args.device, memory_format=layout)
    values_per_layer(args, model)
    tasks = benchmark.load(args.data_dir, args)
    check_sizes(args, model, tasks)

    with Run(args, model, tasks) as run:
        for t in range(run.progress.task, args.n_tasks):
            train = on_device(tasks[t].train, args.device)
            valid = on_device(tasks[t].valid, args.device)
            if t > 0:
                freeze_batchnorm(model)
            train_task(model, train, valid, args, run.progress, run.end_epoch)
            update_bases(model, t, train[0], thresholds(args, t), args.n_samples)
            accuracies = []
            for u, task in enumerate(tasks[: t + 1]):
                test = on_device(task.test, args.device)
                accuracies.append(evaluate(model, u, *test, args.batch_size_test)[1])
            run.end_task(accuracies)
        run.report()


def on_device(part, device):
    """(x, y) on the device."""
    return [tensor.to(device) for tensor in part]


# 7. Runs: results and checkpoints -----------------------------------------------------------------
HISTORY = ["task", "epoch", "lr", "train_loss", "valid_loss", "valid_accuracy"]


class Run:
    """A run in its folder <models_dir>/<benchmark>/<run_name>, entered by one process at a time.

    results: what results.json holds. progress: where the training stands. Both are saved together
    with weights, bases and random numbers. A run whose folder has a checkpoint goes on from it.
    """

    def __init__(self, args, model, tasks):
        self.args, self.model = args, model
        self.layers = projected_layers(model)
        self.names = [task.name for task in tasks]
        self.folder = args.models_dir / Path(__file__).stem.removeprefix("main_") / args.run_name
        self.progress = Progress(lr=args.lr)
        self.saved_at = time.perf_counter()
        self.results = {
            "format": 2,
            "benchmark": benchmark.__name__.removeprefix("dataloader."),
            "script": Path(__file__).stem,
            "args": {flag: v for flag, v in vars(args).items() if flag not in ("changed", *WHERE)},
            "changed": args.changed,
            "data": {task.name: task.summary for task in tasks},
            "origins": [],  # code, commit, versions and device of each process that worked on it
            "widths": {name: len(layer.M) for name, layer in self.layers.items()},
            "accuracy_matrix": [],
            "ACC": None,
            "BWT": None,
            "ranks": [],  # {layer: r} after each task
            "memory": [],  # share of GPM_Max after each task, in percent
            "history_columns": HISTORY,
            "history": [],  # a row per epoch
            "seconds": 0.0,
            "finished": False,
        }

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / "lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            fail(f"another process is at work in {self.folder}: wait, or choose another --run_name")
        except (NotImplementedError, OSError) as error:
            # A file system without locks is used without one.
            if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        if (self.folder / "checkpoint.pt").exists():
            self.resume()
        self.announce()
        return self

    def __exit__(self, *_):
        self.lock.release()

    def resume(self):
        """Continue from the checkpoint, unless it has different arguments, data or network."""
        path = self.folder / "checkpoint.pt"
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail in many ways
            fail(f"{path} cannot be read ({type(error).__name__}): remove the folder to start over")
        for part in "args", "data", "widths":
            here, there = self.results[part], saved["results"].get(part, {})
            if part == "data":  # the same images may come from another place
                here, there = digests(here), digests(there)
            if here != there:
                change = f"different {part} ({differences(there, here)})"
                fail(f"{self.folder} holds a run with {change}: choose another --run_name")
        try:
            self.model.load_state_dict(saved["model"])
            self.progress = Progress(**saved["progress"])
        except (RuntimeError, TypeError) as error:
            if gpu_is_full(error):
                raise
            reason = " ".join(str(error).split()[:20])
            change = f"a different network ({reason} ...)"
            fail(f"{self.folder} holds a run with {change}: choose another --run_name")
        self.results = saved["results"]
        generators = random_generators(self.args.device)
        for generator, state in zip(generators, saved["random"], strict=False):  # GPU or not
            generator.set_state(state)

    def announce(self):
        """Print what is going to happen, and record what this process works with."""
        results, progress = self.results, self.progress
        origin, origins = provenance(self.args.device), results["origins"]
        if any(other["code"] != origin["code"] for other in origins):
            print("note: this run began with different code: to run this code, choose a --run_name")
        if origin not in origins and not results["finished"]:
            origins.append(origin)
        position = f"from task {progress.task + 1}, epoch {progress.epoch + 1}"
        names = [re.sub(r"\.\d+$", ".*", name) for name in unprotected_layers(self.model)]
        print(
            f"{self.folder}: {self.args.changed or 'default flags'}, "
            f"{'finished' if results['finished'] else position}\n"
            f"{time.strftime('%Y-%m-%d %H:%M')} on {platform.node()}, {origin['device']['name']}\n"
            f"without a basis: {', '.join(dict.fromkeys(names)) or 'no layer'}",
            flush=True,
        )

    def save(self):
        """Write results.json and checkpoint.pt."""
        now = time.perf_counter()
        self.results["seconds"] += now - self.saved_at
        self.saved_at = now
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in self.results.items()]
        checkpoint = io.BytesIO()  # in memory first, because torch reports a full disk in many ways
        torch.save(
            {
                "results": self.results,
                "progress": vars(self.progress),
                "model": self.model.state_dict(),  # with the bases
                "random": [g.get_state() for g in random_generators(self.args.device)],
            },
            checkpoint,
        )
        write(self.folder / "results.json", ("{\n" + ",\n".join(lines) + "\n}\n").encode())
        write(self.folder / "checkpoint.pt", checkpoint.getbuffer())

    def end_epoch(self, lr, loss, valid_loss, accuracy, seconds):
        """Log an epoch; save if a kill during the next one could cost more than SAVE_SECONDS."""
        progress = self.progress
        print(
            f"task {progress.task + 1:2d} epoch {progress.epoch:3d} | train loss {loss:7.4f} | "
            f"valid loss {valid_loss:7.4f} acc {accuracy:6.2f} | lr {lr:.2e} | {seconds:6.2f} s",
            flush=True,
        )
        numbers = [round(value, 4) for value in (loss, valid_loss, accuracy)]
        self.results["history"].append([progress.task + 1, progress.epoch, lr, *numbers])
        if time.perf_counter() - self.saved_at + seconds >= SAVE_SECONDS:
            self.save()

    def end_task(self, accuracies):
        """Log what the network knows after a task, and save. accuracies: on each task so far."""
        results, t = self.results, self.progress.task
        rows = [[*row, None] for row in results["accuracy_matrix"]]  # None: not learned yet
        acc = results["accuracy_matrix"] = [*rows, accuracies]
        ranks = {name: layer.M.shape[1] for name, layer in self.layers.items()}
        widths = results["widths"]
        used = sum(r * widths[name] for name, r in ranks.items())
        memory = 100 * used / sum(d**2 for d in widths.values())
        results["ranks"].append(ranks)
        results["memory"].append(memory)
        results.update(ACC=average_accuracy(acc), BWT=backward_transfer(acc))
        results["finished"] = t + 1 == self.args.n_tasks
        print(
            f"task {t + 1:2d} ({self.names[t]}) learned in {self.progress.epoch} epochs, "
            f"ACC so far {results['ACC']:.2f}, bases {memory:.1f} % of GPM_Max\n"
            f"  accuracy {' '.join(f'{a:6.2f}' for a in accuracies)}\n"
            f"  rank     {'  '.join(f'{name} {r}/{widths[name]}' for name, r in ranks.items())}",
            flush=True,
        )
        self.progress = Progress(task=t + 1, lr=self.args.lr)
        self.save()

    def report(self):
        """Print ACC and BWT: beside the paper's, or with the reasons why they do not compare."""
        reasons = [f"--{flag}" for flag in self.args.changed]
        data = self.results["data"].values()
        reasons += sorted({f"incomplete {part['set']}" for part in data if not part["complete"]})
        if not getattr(self.args, "official_data", True):  # a flag of two of the scripts
            reasons.append("no --official_data")
        if any(origin["code"] not in __doc__ for origin in self.results["origins"]):
            reasons.append("edited code")
        if reasons:
            print("not comparable with the paper:", ", ".join(reasons))
        for metric in "ACC", "BWT":
            paper = "" if reasons else f"   (paper: {PAPER[metric]})"
            print(f"{metric} {self.results[metric]:.2f}{paper}")


def digests(data):
    """{task: digest of its images and labels}."""
    return {task: summary.get("digest") for task, summary in data.items()}


def differences(old, new):
    """The first three keys whose values differ, as text."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "; ".join(f"{key} {old.get(key)} there, {new.get(key)} here" for key in keys[:3])


def write(path, content):
    """Write a file under another name first: a kill leaves the old file or the new one, whole."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # with the file's name


def random_generators(device):
    """The generators that PyTorch draws from: the CPU's, and that of the run's GPU."""
    if device.type != "cuda":
        return [torch.default_generator]
    return [torch.default_generator, torch.cuda.default_generators[device.index or 0]]


def provenance(device):
    """What produced a result: code, versions and device. The commit is "" outside a checkout."""
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", Path(__file__).name, "dataloader")
    cpu = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return {
        "code": digest_of_code(),
        "commit": commit,
        "dirty": bool(changes),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
    }


def git(*words):
    """What git prints in the folder of this script; "" outside a checkout or without git."""
    options = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    try:
        return subprocess.run(["git", *words], **options).stdout.strip()
    except FileNotFoundError:
        return ""


def digest_of_code():
    """Digest of the loaders that this script imported and of itself, but for its docstring.

    The docstring holds the digest of the unedited code, and what was measured.
    """
    names = sorted(name for name in sys.modules if name.split(".")[0] == "dataloader")
    files = [__file__, *(sys.modules[name].__file__ for name in names)]
    script, *loaders = [Path(file).read_text(encoding="utf-8") for file in files]
    script = script.replace(__doc__, "")
    return hashlib.sha256("".join([script, *loaders]).encode()).hexdigest()[:16]


# 8. Flags: types and checks -----------------------------------------------------------------------
def changed_flags(args, parser):
    """{flag: value} of the flags that define the experiment and are not at their defaults.

    One value for all layers is the same as that value for each layer.
    """
    changed = {}
    for flag, value in vars(args).items():
        default = parser.get_default(flag)
        if isinstance(value, list) and len(default) == 1:
            default = default * len(value)
        if flag not in (*VARIANT, *WHERE) and value != default:
            changed[flag] = value
    return changed


def name_of_run(prefix, changed):
    """seed_1 {'lr': 0.02} -> seed_1_lr_0.02, cut where a file system would refuse it."""
    name = re.sub(r"[^\w.-]+", "_", f"{prefix} {changed}").strip("_")
    if len(name) <= 120:
        return name
    return f"{name[:100]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def number(kind, low, high=math.inf):
    """An argparse type: an int or float in [low, high)."""

    def convert(text):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")
        return value

    convert.__name__ = kind.__name__  # argparse says "invalid float value"
    return convert


def folder(text):
    """An argparse type: the path of a folder, made later if it does not exist; ~ is the home."""
    path = Path(text).expanduser()
    existing = next(p for p in [path, *path.absolute().parents] if p.exists())
    if not existing.is_dir():
        raise argparse.ArgumentTypeError(f"{existing} is a file, not a folder")
    return path


def usable_device(name):
    """An argparse type: a torch.device on which this machine can compute."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).sum().item()  # fails where torch was not built for this GPU
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise argparse.ArgumentTypeError(f"{name} cannot be used: {reason}") from None


def values_per_layer(args, model):
    """Give each layer its threshold and n_samples. Refuses a number of values that does not fit."""
    layers = projected_layers(model)
    for flag in "threshold", "n_samples":
        values = getattr(args, flag)
        if len(values) not in (1, len(layers)):
            names = " ".join(layers)
            fail(f"--{flag} takes one value, or one for each of the {len(layers)} layers {names}")
        setattr(args, flag, values if len(values) > 1 else values * len(layers))


def check_sizes(args, model, tasks):
    """Refuse flags that do not fit the number of images."""
    smallest = min(task.n_train for task in tasks)
    if not 1 < max(args.n_samples) <= smallest:
        fail(f"--n_samples: the largest must lie between 2 and {smallest}, a task's images")
    if not any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        return  # BatchNorm2d has many values per channel even in a single image
    for task in tasks:
        sizes = {"train": [task.n_train], "test": [task.n_valid, task.n_test]}
        for part, numbers in sizes.items():
            batch_size = getattr(args, f"batch_size_{part}")
            if any((n - 1) % batch_size == 0 for n in numbers):
                fail(f"--batch_size_{part} {batch_size} leaves a batch of one image of {task.name}")


def gpu_is_full(error):
    """Whether an error comes from a full GPU. cuBLAS and cuDNN have no exception of their own."""
    # The last two: no room for the handle of a library, or for the workspace of a convolution.
    words = r"out of memory|ALLOC\w*_F|STATUS_NOT_INITIALIZED|unable to find an engine"
    return bool(re.search(words, str(error)))


def fail(message, status=2):
    """End the program with one line: status 2 for wrong input, 1 for a run that went wrong."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show ± must not end a run
    try:
        main(parse_args())
    except DataError as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)  # so that a shell loop over seeds ends too
    except (OSError, RuntimeError) as error:  # a full disk, or a full GPU
        if isinstance(error, RuntimeError) and not gpu_is_full(error):
            raise
        fail(str(error).partition("\n")[0] or type(error).__name__, status=1)
