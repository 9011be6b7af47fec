"""Gradient Projection Memory on Permuted MNIST (Saha, Garg, Roy, ICLR 2021, arXiv 2103.09762).

    python main_pmnist.py --seed 2

benchmark   10 tasks, each with its own permutation of the pixels of MNIST; one head for all
network     MLP 784-100-100-10, 89,400 parameters
paper       ACC 93.91 ± 0.16, BWT -3
measured    93.56 ± 0.15 / -3.45 (3 seeds), 2 min (CPU x86_64, 1 thread)
with        torch 2.13.0+cpu, Python 3.11.7

Changes relative to main_cifar100.py: the MLP in place of AlexNet, with one head that is projected like every other layer;
--n_hidden; defaults of the flags (constant learning rate, so the last weights are kept). One thread on a CPU.

One of four standalone scripts; they repeat each other on purpose, so that a diff of two of them shows what differs between
the benchmarks. Equation numbers are the paper's. Symbols: a layer's input has width d; its representation matrix R is
(d, n), its basis M (d, r) with orthonormal columns; W and its gradient G are (out, d); eps is the threshold.
"""
# ----------------------------------------------------------------------------------------------------------------------
# 1. Imports
# ----------------------------------------------------------------------------------------------------------------------
import argparse
import contextlib
import ctypes
import fcntl
import functools
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

from dataloader import pmnist as benchmark
from dataloader.raw import DataError

# ----------------------------------------------------------------------------------------------------------------------
# 2. Configuration
# ----------------------------------------------------------------------------------------------------------------------
PAPER = {"ACC": "93.91 ± 0.16", "BWT": "-3 ± 0"}
N_TASKS = 10


def parse_args(argv=None):
    """Read the flags; every default is the published run. Wrong values end in one line and exit status 2."""
    parser = argparse.ArgumentParser(description="GPM on Permuted MNIST",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    parser.add_argument("--seed", type=int, default=2, help="seed of weights, permutations and batches")
    parser.add_argument("--n_epochs", type=int, default=5, help="epochs per task, at most")
    parser.add_argument("--batch_size_train", type=int, default=10, help="images per training step")
    parser.add_argument("--batch_size_test", type=int, default=64, help="images per evaluation batch")
    parser.add_argument("--pc_valid", type=float, default=0.1, help="share of the training images kept for validation")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate at the start of a task")
    parser.add_argument("--momentum", type=float, default=0.0, help="momentum of SGD")
    parser.add_argument("--lr_min", type=float, default=1e-5, help="a task ends when its learning rate falls below this")
    parser.add_argument("--lr_patience", type=int, default=0,
                        help="epochs without a better validation loss before the rate falls; 0: constant rate, last weights kept")
    parser.add_argument("--lr_factor", type=float, default=2.0, help="what the learning rate is divided by")
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.95, 0.99, 0.99],
                        help="eps of the first task: one value, or one per layer")
    parser.add_argument("--threshold_increment", type=float, default=0.0, help="what eps grows by with each task")
    parser.add_argument("--n_samples", type=int, nargs="+", default=[300],
                        help="training images that a layer's representation is taken from: one value, or one per layer")
    parser.add_argument("--n_tasks", type=int, default=N_TASKS, help="train on the first tasks only")
    parser.add_argument("--n_hidden", type=int, default=100, help="units in each of the two hidden layers")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--data_dir", default="data", help="where data sets are looked for and cached")
    parser.add_argument("--models_dir", default="models", help="where the folder of the run is made")
    parser.add_argument("--run_name", help="name of the run's folder; made from seed and changed flags if not given")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--overwrite", action="store_true", help="start anew, replacing a run of the same name")
    what.add_argument("--evaluate", action="store_true", help="load the run's weights and print their accuracies")
    args = parser.parse_args(argv)
    check_args(args)
    if args.n_hidden < 1:
        fail(f"--n_hidden must be at least 1, not {args.n_hidden}")
    if args.run_name is None:
        changed = [word.removeprefix("--") for word in changed_flags(vars(args), vars(parser.parse_args([])))]
        args.run_name = "_".join([f"seed_{args.seed}", *changed])
    return args


def fail(message, status=2):
    """End the program with one line that says what is wrong: status 2 for wrong input, 1 for a run that went wrong."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


def flag_words(flags):
    """Words of a command line for flags {name: value}: --lr 0.02 --threshold 0.95 0.99 --official_data."""
    words = []
    for flag, value in flags.items():
        if value is not False:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [] if value is True else [value])]
    return words


def changed_flags(args, published):
    """The flags, as words, in which args (a dict) differ from the published run, but for what the paper varies and places."""
    free = ("seed", "t_order", "official_data", "device", "data_dir", "models_dir", "run_name", "overwrite", "evaluate")
    return flag_words({flag: value for flag, value in args.items() if flag not in free and value != published[flag]})


def check_args(args):
    """Refuse values that no run could work with, before anything is loaded."""
    for flag in ("n_epochs", "batch_size_train", "batch_size_test"):
        if getattr(args, flag) < 1:
            fail(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    for flag in ("lr", "lr_min"):
        if not 0 < getattr(args, flag) < math.inf:
            fail(f"--{flag} must be a positive number, not {getattr(args, flag)}")
    if not 0 <= args.seed < 2**32:
        fail(f"--seed must lie between 0 and 2^32 - 1, not {args.seed}")
    if not 0 < args.pc_valid < 1:
        fail(f"--pc_valid must lie between 0 and 1, not {args.pc_valid}")
    if not 0 <= args.momentum < 1:
        fail(f"--momentum must lie in [0, 1), not {args.momentum}")
    if args.lr_patience < 0:
        fail(f"--lr_patience must be 0 (constant learning rate) or more, not {args.lr_patience}")
    if not 1 < args.lr_factor < math.inf:
        fail(f"--lr_factor must be above 1, not {args.lr_factor}")
    if args.lr_patience and args.lr_min > args.lr:
        fail(f"--lr_min {args.lr_min} is above --lr {args.lr}: no epoch would be trained")
    if not 1 <= args.n_tasks <= N_TASKS:
        fail(f"--n_tasks must lie between 1 and {N_TASKS}, not {args.n_tasks}")
    if min(args.n_samples) < 1:
        fail(f"--n_samples must be at least 1, not {min(args.n_samples)}")
    if not 0 <= args.threshold_increment < math.inf:
        fail(f"--threshold_increment must be 0 or more, not {args.threshold_increment}")
    for eps in args.threshold:
        if not 0 < eps <= 1:
            fail(f"--threshold must lie in (0, 1], not {eps}")
        if eps + (args.n_tasks - 1) * args.threshold_increment > 1:
            fail(f"--threshold {eps} and --threshold_increment {args.threshold_increment} exceed 1 within {args.n_tasks} tasks")
    if args.run_name is not None and (not re.fullmatch(r"[\w.+=-]+", args.run_name) or args.run_name in (".", "..")):
        fail(f"--run_name must be a folder's name of letters, digits and . _ + = -, not {args.run_name!r}")


# ----------------------------------------------------------------------------------------------------------------------
# 3. Network
# ----------------------------------------------------------------------------------------------------------------------
class MLP(nn.Module):
    """Multilayer perceptron without biases; one head for all tasks, which is projected like the other layers."""

    def __init__(self, n_hidden, n_classes):
        super().__init__()
        self.fc1 = nn.Linear(784, n_hidden, bias=False)
        self.fc2 = nn.Linear(n_hidden, n_hidden, bias=False)
        self.fc3 = nn.Linear(n_hidden, n_classes, bias=False)

    def forward(self, x, task):
        """Logits (B, n_classes) for permuted images x (B, 784), whatever the task."""
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def build_model(args):
    """The network with PyTorch's default initialisation. Limits a CPU to one thread for the rest of the process."""
    torch.set_num_threads(1)  # at a batch of 10 a second thread does nothing but wait
    return MLP(args.n_hidden, n_classes=10)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Gradient projection memory
# ----------------------------------------------------------------------------------------------------------------------
def projected_layers(model):
    """Layers whose gradient is projected, {name: module}: every Linear and Conv2d except the task heads."""
    return {name: layer for name, layer in model.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and not name.startswith("heads")}


@torch.no_grad()
def layer_inputs(model, x, task):
    """What reaches each projected layer, {name: tensor}, when x passes through the network as one batch; leaves it in eval mode."""
    inputs = {}
    hooks = [layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
             for name, layer in projected_layers(model).items()]
    model.eval()
    model(x, task)
    for hook in hooks:
        hook.remove()
    return inputs


def representation_matrix(layer, x):
    """R (d, n): the layer's inputs x as columns; for a convolution its patches, n = samples * output positions."""
    if isinstance(layer, nn.Conv2d):
        (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
        x = F.pad(x.contiguous(), (pw, pw, ph, ph))
        patches = x.unfold(2, kh, sh).unfold(3, kw, sw)  # (samples, C, rows, columns, kh, kw), a view: F.unfold copies twice
        return patches.permute(1, 4, 5, 0, 2, 3).flatten(3).flatten(0, 2)  # (d, n)
    return x.flatten(1).T


def project(G, M):
    """G - (G M) M^T: the part of each row of G that is orthogonal to the basis M (Eq. 6-7)."""
    return torch.addmm(G, G @ M, M.T, alpha=-1)


def update_basis(M, R, eps):
    """Append to M (d, r) the fewest directions with which it holds the share eps of the energy ||R||_F^2 (Eq. 8-9).

    The first task is the case of an empty M, shape (d, 0) (Eq. 5). Returns the new M, orthonormal columns, r <= d.
    """
    device = "cpu" if R.device.type == "mps" else R.device  # MPS has no float64
    basis, R = M.to(device).double(), R.to(device).double()
    energy = torch.linalg.norm(R) ** 2
    # The SVD of R_hat = R - M M^T R = U S V^T (Eq. 8) from the smaller of R_hat R_hat^T = U S^2 U^T and R_hat^T R_hat = V S^2 V^T;
    # in float64, where squaring costs no digit that float32 has
    if R.shape[1] < len(R):
        R_hat = project(R.T, basis).T
        S2, V = torch.linalg.eigh(R_hat.T @ R_hat)
        U = R_hat @ V  # U S: orthogonal columns, which the QR below makes unit vectors
    else:
        S2, U = torch.linalg.eigh(project(project(R @ R.T, basis).T, basis))
    S2, U = S2.flip(0), U.flip(1)  # (min(d, n),) and (d, min(d, n)), largest first
    gained = torch.cat([S2.new_zeros(1), S2.cumsum(0)])  # by 0, 1, 2, ... new columns
    held = energy - S2.sum()  # ||M M^T R||_F^2
    r = (held + gained < eps * energy).sum()  # Eq. 9
    r = min(r, (S2 > 1e-12 * energy).sum())  # smaller ones are float32's rounding noise, not directions
    U = torch.linalg.qr(project(U[:, :r].T, basis).T)[0]  # rid of the trace of M, whose columns are orthonormal to float32 only
    return torch.cat([M, U.to(M.dtype).to(M.device)], dim=1)


def update_bases(model, task, x, bases, eps, n_samples):
    """Bases {name: M} that also hold what the task's training images x give to each layer; eps, n_samples: one per layer."""
    chosen = torch.randperm(len(x))[: max(n_samples)]
    inputs = layer_inputs(model, x[chosen.to(x.device)], task)
    updated = {}
    for (name, layer), layer_eps, n in zip(projected_layers(model).items(), eps, n_samples):
        R = representation_matrix(layer, inputs[name][:n])
        updated[name] = update_basis(bases.get(name, R.new_zeros(len(R), 0)), R, layer_eps)
    return updated


class ProjectedLinear(torch.autograd.Function):
    """y = x W^T, whose weight receives delta^T x_hat, x_hat = x - x M M^T.

    The gradient is delta^T x (Eq. 2), so this is its projection, but of the B rows of x instead of its own out rows.
    """

    @staticmethod
    def forward(ctx, x, x_hat, W):
        """x, x_hat: (B, d); W: (out, d)."""
        ctx.save_for_backward(x_hat, W)
        return x @ W.T

    @staticmethod
    def backward(ctx, delta):
        """delta: (B, out), the gradient of y."""
        x_hat, W = ctx.saved_tensors
        return delta @ W if ctx.needs_input_grad[0] else None, None, delta.T @ x_hat


def projected_inputs(model, task, x, bases):
    """{name: x - x M M^T} for each Linear layer that sees the images x (N, d) as they are: projected once per task, not per step."""
    seen = layer_inputs(model, x[:2], task) if bases else {}
    return {name: torch.addmm(x, x, bases[name] @ bases[name].T, alpha=-1)  # N is far above d: the d x d product is soon paid for
            for name, layer in projected_layers(model).items()
            if name in bases and isinstance(layer, nn.Linear) and torch.equal(seen[name], x[:2])}


@contextlib.contextmanager
def gradient_projection(layers, bases, known):
    """Within this block the weight of each layer that has a basis receives the projected gradient (Eq. 6-7).

    known: {name: x_hat} of the batch at hand, for a Linear layer whose projected input need not be computed.
    """
    def linear_forward(name, layer, x):
        x_hat = known[name] if name in known else project(x.detach(), bases[name])
        return ProjectedLinear.apply(x, x_hat, layer.weight)

    def projected_gradient(M, G):
        return project(G.flatten(1), M).view_as(G)

    linear = {name: layer for name, layer in layers.items() if name in bases and isinstance(layer, nn.Linear)}
    for name, layer in linear.items():
        layer.forward = functools.partial(linear_forward, name, layer)
    hooks = [layer.weight.register_hook(functools.partial(projected_gradient, bases[name]))
             for name, layer in layers.items() if name in bases and name not in linear]
    try:
        yield
    finally:
        for layer in linear.values():
            del layer.forward
        for hook in hooks:
            hook.remove()


def freeze_batchnorm(model):
    """Keep the gain and shift of every BatchNorm as they are: they are learned on the first task only."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Training and evaluation
# ----------------------------------------------------------------------------------------------------------------------
def accuracy(logits, y):
    """Percent of the rows of logits (N, n_classes) whose largest entry is at the label y (N,)."""
    return 100 * (logits.argmax(1) == y).sum().item() / len(y)


@torch.no_grad()
def sgd_step(weights, lr, momentum, velocity):
    """W <- W - lr G, G replaced by its running sum (velocity) if there is momentum. Frees the gradients.

    The same as torch.optim.SGD, whose bookkeeping costs a batch of 10 images a good part of its step.
    """
    for name, W in weights.items():
        if W.grad is not None:  # the heads of other tasks have none
            if momentum:
                velocity[name] = W.grad + momentum * velocity[name] if name in velocity else W.grad
            W.sub_(velocity[name] if momentum else W.grad, alpha=lr)
            W.grad = None


def train_epoch(model, task, x, x_hat, y, bases, lr, momentum, velocity, batch_size):
    """One pass over the training part in random order. Returns (mean loss, accuracy) of the batches as they were trained on.

    x_hat: {name: tensor as long as x}, the projected input of a layer where it is known beforehand.
    """
    model.train()
    weights = {name: W for name, W in model.named_parameters() if W.requires_grad}
    order = torch.randperm(len(x)).to(x.device)
    outputs, known = None, {}
    with gradient_projection(projected_layers(model), bases, known):
        progress = tqdm(order.split(batch_size), f"task {task + 1}", leave=False, disable=None)
        for start, batch in zip(range(0, len(x), batch_size), progress):
            known.update({name: inputs.index_select(0, batch) for name, inputs in x_hat.items()})
            logits = model(x.index_select(0, batch), task)
            F.cross_entropy(logits, y.index_select(0, batch)).backward()
            sgd_step(weights, lr, momentum, velocity)
            if outputs is None:  # one buffer: kept one by one, the small outputs would scatter over the heap and pin it
                outputs = logits.new_empty(len(x), logits.shape[1])
            outputs[start : start + batch_size] = logits.detach()
    y = y[order]
    return F.cross_entropy(outputs, y).item(), accuracy(outputs, y)


@torch.no_grad()
def evaluate(model, task, x, y, batch_size):
    """(Mean loss, accuracy) of images x (N, ...) with labels y (N,). Draws no random numbers.

    BatchNorm normalises a batch with its own statistics: the batches are x's rows in their order, which the loader fixes.
    """
    model.eval()
    logits = torch.cat([model(batch, task) for batch in x.split(batch_size)])
    return F.cross_entropy(logits, y).item(), accuracy(logits, y)


def start_of_task(args):
    """What train_task keeps from one epoch to the next, as it is before the first."""
    return {"epoch": 0, "lr": args.lr, "waited": 0, "best_loss": math.inf, "best": None, "velocity": {}}


def train_task(model, task, train, valid, bases, args, state, seconds, save):
    """Train on one task with projected gradients and leave the network with the weights that the task keeps.

    After lr_patience epochs without a better validation loss the learning rate is divided by lr_factor; the task ends when
    it falls below lr_min, and keeps the weights of the best validation loss. lr_patience 0: constant rate, last weights.
    train, valid: (x, y) on the network's device. state: start_of_task(args), or what save() stored after some epoch.
    """
    x, y = train
    with timed(seconds, "training"):
        x_hat = projected_inputs(model, task, x, bases)
    while state["epoch"] < args.n_epochs and (state["lr"] >= args.lr_min or not args.lr_patience):
        start, lr = time.perf_counter(), state["lr"]
        with timed(seconds, "training"):
            loss, acc = train_epoch(model, task, x, x_hat, y, bases, lr, args.momentum, state["velocity"], args.batch_size_train)
        state["epoch"] += 1
        with timed(seconds, "evaluation"):
            valid_loss, valid_acc = evaluate(model, task, *valid, args.batch_size_test)
        if not math.isfinite(loss + valid_loss):
            fail(f"the loss became {loss + valid_loss} in epoch {state['epoch']} of task {task + 1}: "
                 f"try a smaller --lr than {args.lr}", status=1)
        if args.lr_patience:
            if valid_loss < state["best_loss"]:
                state["best"] = {key: value.clone() for key, value in model.state_dict().items()}
                state["best_loss"], state["waited"] = valid_loss, 0
            else:
                state["waited"] += 1
            if state["waited"] == args.lr_patience:
                state["lr"], state["waited"] = lr / args.lr_factor, 0
        save()
        print(f"task {task + 1:2d} epoch {state['epoch']:3d} | train loss {loss:7.4f} acc {acc:6.2f} | "
              f"valid loss {valid_loss:7.4f} acc {valid_acc:6.2f} | lr {lr:.2e} | {time.perf_counter() - start:6.2f} s")
    if state["best"] is not None:
        model.load_state_dict(state["best"])


# ----------------------------------------------------------------------------------------------------------------------
# 6. Results and checkpoints
# ----------------------------------------------------------------------------------------------------------------------
def average_accuracy(acc):
    """ACC: mean over u of acc[T, u]. acc (T, T): accuracy on task u (column) after training task t (row)."""
    return float(np.mean(np.asarray(acc)[-1]))


def backward_transfer(acc):
    """BWT: mean over u < T of acc[T, u] - acc[u, u]; 0 after one task, when there was nothing to forget."""
    acc = np.asarray(acc)
    return float(np.mean(acc[-1, :-1] - np.diag(acc)[:-1])) if len(acc) > 1 else 0.0


def memory(bases):
    """Floats in all bases, and their share of GPM_Max, the sum of d^2 (percent)."""
    floats = sum(M.numel() for M in bases.values())
    return {"floats": floats, "percent_of_max": 100 * floats / sum(len(M) ** 2 for M in bases.values())}


def widths(layers):
    """Width d of each layer's input, {name: d}."""
    return {name: layer.weight[0].numel() for name, layer in layers.items()}


def provenance(device):
    """Commit, whether this script or the loaders differ from it (None outside a git checkout), versions and device."""
    def git(*command):
        done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", Path(__file__).name, "dataloader")
    except FileNotFoundError:  # no git on this machine
        commit, changes = None, None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"commit": commit, "dirty": None if changes is None else bool(changes),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
            "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()}}


@contextlib.contextmanager
def timed(seconds, what):
    """Add the time that the block takes to seconds[what]."""
    start = time.perf_counter()
    yield
    seconds[what] += time.perf_counter() - start


def write_file(path, write):
    """Write a file under a temporary name and rename it: killed at any moment, the old file or the new one is there, whole."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            write(file)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path}: {error}", status=1)


def random_state(device):
    """State of the random number generators that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state, device):
    """Restore what random_state returned. On another kind of device than before, its generator stays as it is."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def load_checkpoint(folder):
    """The checkpoint of the run in folder, on the CPU, or None if there is none."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not {"args", "finished", "data", "seconds"} <= checkpoint["results"].keys():
            raise ValueError("its results are not those of a run")
        return {key: checkpoint[key] for key in ("results", "model", "bases", "state", "random")}
    except OSError as error:
        fail(f"{path} cannot be read: {error.strerror}")
    except Exception as error:  # a damaged file can fail in many ways, all of them final
        fail(f"{path} cannot be read ({type(error).__name__}): it is damaged or not a checkpoint; use --overwrite to start anew")


def write_results(results, folder):
    """Write results.json: everything that is known of the run, for people and models/report.py."""
    write_file(folder / "results.json", lambda file: file.write(json.dumps(results, indent=1).encode()))


def load_results(folder):
    """What is known of the run in folder from its results.json, or None: there is none, or none that can be read."""
    try:
        results = json.loads((folder / "results.json").read_text())
        return results if isinstance(results["args"], dict) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def restore_weights(model, weights, folder):
    """Give the network the weights of the run in folder; another network's are refused."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        fail(f"{folder} holds the weights of another network ({' '.join(str(error).split())}): choose another --run_name")


def check_arguments(args, old, folder):
    """Refuse to go on with a run that was started with other arguments (old); where things lie may differ."""
    places = ("device", "data_dir", "models_dir", "run_name", "overwrite", "evaluate")
    new = vars(args)
    differing = [f"--{key} {old.get(key)} there, {new.get(key)} here"
                 for key in {**old, **new} if key not in places and old.get(key) != new.get(key)]
    if differing:
        fail(f"{folder} holds a run with other arguments ({'; '.join(differing)}): choose another --run_name, or --overwrite it")


def write_figure(results, path):
    """Accuracy matrix as a heat map, ACC over tasks, and rank / width of each layer over tasks."""
    acc = np.array(results["accuracy_matrix"])
    tasks = np.arange(1, len(acc) + 1)
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    matrix, means, ranks = figure.subplots(1, 3)
    image = matrix.imshow(np.where(np.tri(len(acc), dtype=bool), acc, np.nan), extent=(0.5, len(acc) + 0.5, len(acc) + 0.5, 0.5))
    figure.colorbar(image, ax=matrix, label="test accuracy (%)")
    matrix.set(title="Accuracy on a task (column) after training (row)", xlabel="task", ylabel="trained up to task")
    means.plot(tasks, [average_accuracy(acc[:t, :t]) for t in tasks], marker="o")
    means.set(title=f"ACC {results['ACC']:.2f}, BWT {results['BWT']:.2f}", xlabel="trained up to task", ylabel="ACC so far (%)")
    for name, d in results["widths"].items():
        ranks.plot(tasks, [100 * r[name] / d for r in results["ranks"]], marker=".", label=f"{name} ({d})")
    ranks.set(title="Rank of the bases", xlabel="trained up to task", ylabel="rank / width (%)", ylim=(0, 103))
    ranks.legend(fontsize="small", ncols=1 + len(results["widths"]) // 8)
    for axis in (matrix.xaxis, matrix.yaxis, means.xaxis, ranks.xaxis):
        axis.get_major_locator().set_params(integer=True)
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=100))


class Tee(io.TextIOBase):
    """What is printed goes to the terminal and to the run's log."""

    def __init__(self, *files):
        self.files = files

    def write(self, text):
        """Write the text to all files at once, so that a killed run's log is up to date."""
        for file in self.files:
            file.write(text)
            file.flush()
        return len(text)


# ----------------------------------------------------------------------------------------------------------------------
# 7. Main
# ----------------------------------------------------------------------------------------------------------------------
def find_device(name):
    """The torch.device that the --device flag asks for."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("only auto, cpu, cuda, cuda:N and mps are known")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name} cannot be used: {str(error).splitlines()[0]}")
    # A projected step leaves old outputs alone to float32's precision, not to TF32's three digits
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device


def place_model(model, device):
    """The network on the device, on a CPU in the memory layout that convolutions are fastest in there."""
    return model.to(device, memory_format=torch.channels_last if device.type == "cpu" else torch.preserve_format)


def tune_memory():
    """Make Linux give large tensors huge pages, and glibc reuse the memory of freed ones, which each step would fetch anew."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch's own; it looks when the first tensor is made
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes free at the end of the heap before it shrinks
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: bytes from which on a tensor is not taken from the heap, 32 MiB at most


def check_layers(layers):
    """Refuse a layer that is more than W x, or a W over plain patches: the projection would treat it as if it were that."""
    for name, layer in layers.items():
        form = (layer.groups, layer.dilation, layer.padding_mode) if isinstance(layer, nn.Conv2d) else None
        if layer.bias is not None or form not in (None, (1, (1, 1), "zeros")) or isinstance(getattr(layer, "padding", 0), str):
            fail(f"layer {name} cannot be projected: it must have no bias, groups or dilation, and a number of zeros as padding")


def per_layer(flag, values, layers):
    """One value for each layer from the values of a flag: as many as there are layers, or one for all."""
    if len(values) not in (1, len(layers)):
        fail(f"--{flag} takes one value or one for each of the {len(layers)} layers ({' '.join(layers)}), not {len(values)}")
    return values * len(layers) if len(values) == 1 else values


def load_tasks(args, model):
    """The benchmark's tasks, after a look at the sizes that would otherwise fail in the middle of the run."""
    try:
        tasks = benchmark.load(args.data_dir, args)
    except DataError as error:
        fail(str(error))
    smallest = min(task.n_train for task in tasks)
    if max(args.n_samples) > smallest:
        fail(f"--n_samples {max(args.n_samples)} is more than the {smallest} training images of the smallest task")
    if any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        if max(args.n_samples) == 1:
            fail("--n_samples 1 is a batch of one image, which BatchNorm cannot normalise")
        for flag, sizes in (("batch_size_train", {task.n_train for task in tasks}),
                            ("batch_size_test", {n for task in tasks for n in (task.n_valid, task.n_test)})):
            for n in sizes:
                if getattr(args, flag) == 1 or n % getattr(args, flag) == 1:
                    fail(f"--{flag} {getattr(args, flag)} leaves a batch of one of {n} images, which BatchNorm cannot normalise")
    return tasks


def describe(tasks):
    """What each task is made of, as results.json keeps it: the data set, where it came from, and numbers of images."""
    return [{"task": task.name, "train": task.n_train, "valid": task.n_valid, "test": task.n_test, **task.data} for task in tasks]


def check_data(tasks, results, folder):
    """Refuse to go on with other data sets or numbers of images than the run was started with."""
    parts = ("task", "set", "train", "valid", "test")
    for new, old in zip(describe(tasks), results["data"]):
        differing = [f"{part} {old[part]} there, {new[part]} here" for part in parts if new[part] != old[part]]
        if differing:
            fail(f"{folder} was trained on other data: {', '.join(differing)}")


def to_device(part, device):
    """(x, y) of a part of a task on the device."""
    return tuple(tensor.to(device) for tensor in part)


def open_log(folder):
    """Make the run's folder and open its log for as long as the program runs; a second process on the same run is refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder / "log.txt", "a", encoding="utf-8")
    except OSError as error:
        fail(f"cannot write to {folder}: {error.strerror}; choose another --models_dir")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is at work on {folder}: wait for it, or choose another --run_name")
    except OSError as error:  # some network file systems know no locks; a run is possible all the same
        print(f"{folder} cannot be locked ({error.strerror}): do not start the same run twice", file=sys.stderr)
    return log


def print_task(results, tasks):
    """The block of lines after a task."""
    acc, ranks, used = (results[key][-1] for key in ("accuracy_matrix", "ranks", "memory"))
    task = tasks[len(acc) - 1]
    print(f"task {len(acc):2d} ({task.name}) learned in {results['epochs'][-1]} epochs")
    print("  accuracy " + " ".join(f"{a:6.2f}" for a in acc) + f" | ACC so far {np.mean(acc):.2f}")
    print("  rank     " + "  ".join(f"{name} {r}/{results['widths'][name]}" for name, r in ranks.items()))
    print(f"  memory   {used['floats']:,} floats, {used['percent_of_max']:.1f} % of GPM_Max")


def print_result(results):
    """The last lines of a run: where the time went, and the two metrics, which grep finds by their names."""
    partial = {data["set"] for data in results["data"] if not data["complete"]}
    if partial:
        print(f"not comparable with the paper: {', '.join(sorted(partial))} with other than the official number of images")
    changed = changed_flags(results["args"], vars(parse_args([])))
    if changed:
        print(f"not comparable with the paper: {' '.join(changed)}")
    seconds = results["seconds"]
    print(f"time {sum(seconds.values()):.0f} s: " + ", ".join(f"{what} {s:.1f}" for what, s in seconds.items()))
    for metric in ("ACC", "BWT"):
        print(f"{metric} {results[metric]:.2f}   (paper: {PAPER[metric]})")


def evaluate_run(args, folder):
    """Print the accuracies that the weights of a run, finished or not, have on the tasks that it has trained on."""
    checkpoint = load_checkpoint(folder)
    if checkpoint is None:
        fail(f"there is no checkpoint in {folder}: train first, with the same command without --evaluate")
    results, state = checkpoint["results"], checkpoint["state"]
    if results["args"].keys() != vars(args).keys():
        fail(f"{folder} holds a run of another script, or of another version of this one")
    published = vars(parse_args([]))
    asked = {flag: value for flag, value in vars(args).items() if value != published[flag]}
    check_arguments(argparse.Namespace(**{**results["args"], **asked}), results["args"], folder)
    print(f"{folder}: python {Path(__file__).name} {shlex.join(flag_words(results['args']))}")
    args = argparse.Namespace(**{**results["args"], "device": args.device, "data_dir": args.data_dir})
    device = find_device(args.device)
    model = place_model(build_model(args), device)
    restore_weights(model, checkpoint["model"], folder)
    tasks = load_tasks(args, model)
    check_data(tasks, results, folder)
    for u in range(min(len(results["accuracy_matrix"]) + (state["epoch"] > 0), args.n_tasks)):
        x, y = to_device(tasks[u].test, device)
        print(f"task {u + 1:2d} ({tasks[u].name}) accuracy {evaluate(model, u, x, y, args.batch_size_test)[1]:.2f}")


def main(args):
    """Train on the tasks one after another and report ACC and BWT; with --evaluate only print the accuracies of a run."""
    folder = Path(args.models_dir) / Path(__file__).stem.removeprefix("main_") / args.run_name
    if args.evaluate:
        evaluate_run(args, folder)
        return
    device = find_device(args.device)
    torch.manual_seed(args.seed)
    model = place_model(build_model(args), device)
    layers = projected_layers(model)
    check_layers(layers)
    thresholds = per_layer("threshold", args.threshold, layers)
    n_samples = per_layer("n_samples", args.n_samples, layers)

    with open_log(folder) as log:
        checkpoint = results = None
        if not args.overwrite:
            checkpoint = load_checkpoint(folder)
            results = checkpoint["results"] if checkpoint else load_results(folder)
        if results:
            check_arguments(args, results["args"], folder)
        if checkpoint and results["finished"]:
            if load_results(folder) != results:  # replaced or gone since, by a git checkout for example
                write_results(results, folder)
            print(f"{folder} is finished")
            print_result(results)
            return

        with contextlib.redirect_stdout(Tee(sys.stdout, log)):
            origin = provenance(device)
            print(f"{folder}: python {Path(__file__).name} {shlex.join(flag_words(vars(args)))}")
            changes = " with changes" if origin["dirty"] else ""
            print(f"commit {origin['commit']}{changes}, torch {torch.__version__}, {origin['device']}")
            start = time.perf_counter()
            tasks = load_tasks(args, model)
            if args.overwrite:  # only now that nothing can be refused any more
                for name in ("checkpoint.pt", "results.json", "accuracy.png"):
                    (folder / name).unlink(missing_ok=True)
            bases, state = {}, start_of_task(args)
            if checkpoint:
                check_data(tasks, results, folder)
                restore_weights(model, checkpoint["model"], folder)
                bases = {name: M.to(device) for name, M in checkpoint["bases"].items()}
                state = checkpoint["state"]
                state["velocity"] = {name: v.to(device) for name, v in state["velocity"].items()}
                set_random_state(checkpoint["random"], device)
                at = {"task": len(results["accuracy_matrix"]) + 1, "epoch": state["epoch"]}
                last = results.get("resumed_with", [results])[-1]
                if any(last[key] != value for key, value in origin.items()):
                    results.setdefault("resumed_with", []).append({**at, **origin})
                print(f"going on with task {at['task']} after epoch {at['epoch']}")
            else:
                if results:
                    print(f"{folder} holds a result without its checkpoint: training anew")
                results = {"args": vars(args), **origin, "data": describe(tasks), "widths": widths(layers), "accuracy_matrix": [],
                           "ACC": None, "BWT": None, "ranks": [], "memory": [], "epochs": [], "finished": False,
                           "seconds": dict.fromkeys(("data", "training", "evaluation", "bases", "saving"), 0.0)}
            seconds = results["seconds"]
            seconds["data"] += time.perf_counter() - start

            def save():
                with timed(seconds, "saving"):
                    kept = {"results": results, "model": model.state_dict(), "bases": bases, "state": state,
                            "random": random_state(device)}
                    write_file(folder / "checkpoint.pt", lambda file: torch.save(kept, file))

            for t in range(len(results["accuracy_matrix"]), args.n_tasks):
                with timed(seconds, "data"):
                    train, valid = to_device(tasks[t].train, device), to_device(tasks[t].valid, device)
                if t > 0:
                    freeze_batchnorm(model)
                train_task(model, t, train, valid, bases, args, state, seconds, save)

                with timed(seconds, "bases"):
                    eps = [threshold + t * args.threshold_increment for threshold in thresholds]
                    bases = update_bases(model, t, train[0], bases, eps, n_samples)
                del train, valid  # one part at a time in memory

                row = []
                for u in range(t + 1):
                    with timed(seconds, "data"):
                        x, y = to_device(tasks[u].test, device)
                    with timed(seconds, "evaluation"):
                        row.append(evaluate(model, u, x, y, args.batch_size_test)[1])
                    del x, y

                results["accuracy_matrix"] = [[*old, 0.0] for old in results["accuracy_matrix"]] + [row]
                results["ACC"] = average_accuracy(results["accuracy_matrix"])
                results["BWT"] = backward_transfer(results["accuracy_matrix"])
                results["ranks"].append({name: M.shape[1] for name, M in bases.items()})
                results["memory"].append(memory(bases))
                results["epochs"].append(state["epoch"])
                results["finished"] = t + 1 == args.n_tasks
                state = start_of_task(args)
                print_task(results, tasks)
                write_results(results, folder)
                if results["finished"]:
                    write_figure(results, folder / "accuracy.png")
                save()  # last: from here on the task counts as done
            print_result(results)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for terminals that do not know ±
    tune_memory()
    try:
        main(parse_args())
    except KeyboardInterrupt:
        print("\ninterrupted: the same command, without --overwrite, goes on after the last full epoch", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        fail(f"{str(error).splitlines()[0]} The same command, without --overwrite, goes on after the last full epoch", status=1)
    except OSError as error:  # the disk is full, say, or the terminal is gone
        fail(str(error), status=1)
