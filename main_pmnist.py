"""Gradient Projection Memory on Permuted MNIST (Saha, Garg, Roy, ICLR 2021, arXiv 2103.09762).

    python main_pmnist.py --seed 2

benchmark   10 tasks, each with its own permutation of the pixels of MNIST; one head for all
network     MLP 784-100-100-10, 89,400 parameters
paper       ACC 93.91 ± 0.16, BWT -3
measured    93.54 ± 0.18 / -3.42 (5 seeds), 109 s (CPU x86_64, 1 thread)

A layer is y = W x, x of width d. Its gradient G = delta x^T (Eq. 1-2) moves W only within the span of its inputs: a step
orthogonal to the inputs of old tasks leaves their outputs alone. M (d, r), orthonormal columns, spans those inputs:

    after a task       R (d, n): inputs of the layer as columns; R_hat = R - M M^T R = U S V^T    (Eq. 8)
                       M <- [M, U_1 .. U_k], the fewest with which ||M^T R||^2 >= eps ||R||^2     (Eq. 9; M empty: Eq. 5)
    on the next task   G <- G - G M M^T before each step of SGD                                   (Eq. 6-7)

Changes relative to main_cifar100.py: the MLP in place of AlexNet, with one head that is projected like every other layer;
--n_hidden; defaults of the flags (constant learning rate, so the last weights are kept); one thread on a CPU. For its steps
of ten images, in sections 4 and 5: ProjectedLinear takes an image with its projection, which train_task computes once per
task for the first layer, and train_epoch calls sgd_step.
"""
# 1. Imports -----------------------------------------------------------------------------------------------------------
import argparse
import fcntl
import io
import json
import math
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from dataloader import pmnist as benchmark
from dataloader.raw import DataError

# 2. Configuration -----------------------------------------------------------------------------------------------------
PAPER = {"ACC": "93.91 ± 0.16", "BWT": "-3 ± 0"}
N_TASKS = 10
PLACES = ("device", "data_dir", "models_dir", "run_name")  # flags that say where, not what
SAVE_SECONDS = 30  # a killed run loses no more than this, or one epoch if that takes longer


def parse_args(argv=None):
    """Read the flags; every default is the paper's. Wrong values end in one line and exit status 2."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter, description=__doc__.split("\n")[0])
    parser.error = fail
    parser.add_argument("--seed", type=number(int, 0, 2**32), default=2, help="of weights, permutations and batches")
    parser.add_argument("--n_epochs", type=number(int, 1), default=5, help="epochs per task, at most")
    parser.add_argument("--batch_size_train", type=number(int, 1), default=10, help="images per training step")
    parser.add_argument("--batch_size_test", type=number(int, 1), default=64, help="images per test batch")
    parser.add_argument("--pc_valid", type=number(float, 1e-6, 1), default=0.1, help="share of training images for validation")
    parser.add_argument("--lr", type=number(float, 1e-9), default=0.01, help="learning rate at the start of a task")
    parser.add_argument("--momentum", type=number(float, 0, 1), default=0.0, help="momentum of SGD")
    parser.add_argument("--lr_min", type=number(float, 1e-9), default=1e-5, help="a task ends when its rate is below this")
    parser.add_argument("--lr_patience", type=number(int, 0), default=0, help="epochs without gain before lr falls; 0: never")
    parser.add_argument("--lr_factor", type=number(float, 1), default=2.0, help="what the learning rate is divided by")
    parser.add_argument("--threshold", type=number(float, 0, 1), nargs="+", default=[0.95, 0.99, 0.99],
                        help="eps of the first task: one value, or one per layer; 0: no projection")
    parser.add_argument("--threshold_increment", type=number(float, 0, 1), default=0.0, help="what eps grows by with a task")
    parser.add_argument("--n_samples", type=number(int, 1), nargs="+", default=[300],
                        help="training images that a layer's R is taken from: one value, or one per layer")
    parser.add_argument("--n_tasks", type=number(int, 1, N_TASKS + 1), default=N_TASKS, help="train on the first tasks only")
    parser.add_argument("--n_hidden", type=number(int, 1), default=100, help="units in each of the two hidden layers")
    parser.add_argument("--device", type=usable_device, default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--data_dir", default="data", help="where data sets are looked for and cached")
    parser.add_argument("--models_dir", default="models", help="where the folder of the run is made")
    parser.add_argument("--run_name", help="name of the run's folder; made from seed and changed flags if not given")
    args = parser.parse_args(argv)
    if args.lr_min > args.lr:
        fail(f"--lr_min {args.lr_min} is above --lr {args.lr}: no epoch would be trained")
    if max(eps and eps + (args.n_tasks - 1) * args.threshold_increment for eps in args.threshold) >= 1:
        fail(f"--threshold and --threshold_increment reach 1 within {args.n_tasks} tasks")
    args.changed = {flag: value for flag, value in vars(args).items()
                    if flag not in ("seed", *PLACES) and value != parser.get_default(flag)}
    args.run_name = args.run_name or re.sub(r"[^\w.-]+", "_", f"seed_{args.seed} {args.changed}").strip("_")  # seed_1_lr_0.02
    return args


def number(kind, low, high=math.inf):
    """An argparse type: a number of this kind in [low, high)."""
    def convert(text):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")
        return value
    convert.__name__ = kind.__name__  # for argparse's "invalid float value"
    return convert


def usable_device(name):
    """An argparse type: a torch.device that this machine has."""
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).sum().item()  # a GPU that this torch was not built for fails here, at its first kernel
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be used: {str(error).splitlines()[0].split('. ')[0]}") from None


def fail(message, status=2):
    """End the program with one line that says what is wrong: status 2 for wrong input, 1 for a run that went wrong."""
    print(f"{Path(__file__).name}: error: {message}", file=sys.stderr)
    raise SystemExit(status)


# 3. Network -----------------------------------------------------------------------------------------------------------
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


# 4. Gradient projection memory ----------------------------------------------------------------------------------------
def projected_layers(model):
    """Layers whose gradient is projected, {name: module}: every Linear and Conv2d except the task heads."""
    return {name: layer for name, layer in model.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and not name.startswith("heads")}


@torch.no_grad()
def layer_inputs(model, x, task):
    """What reaches each projected layer, {name: tensor}, when x passes through the network as one batch in eval mode."""
    inputs = {}
    hooks = [layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
             for name, layer in projected_layers(model).items()]
    model.eval()(x, task)
    for hook in hooks:
        hook.remove()
    return inputs


def representation_matrix(layer, x):
    """R (d, n): the layer's inputs x as columns; for a convolution its patches, n = samples * output positions."""
    if isinstance(layer, nn.Conv2d):
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (samples, d, positions)
        return patches.transpose(0, 1).flatten(1)
    return x.flatten(1).T


def project(G, M):
    """G - G M M^T: the part of each row of G (rows, d) that is orthogonal to the basis M (d, r) (Eq. 6-7)."""
    return G - G @ M @ M.T


def update_basis(M, R, eps):
    """Append to M (d, r) the fewest directions with which it holds the share eps of the energy ||R||_F^2 (Eq. 8-9).

    The first task is the case of an empty M, shape (d, 0) (Eq. 5). Computed in float64 on the CPU; eps = 0 adds nothing.
    """
    basis, R = M.cpu().double(), R.cpu().double()
    R = torch.linalg.qr(R.T, mode="r").R.T  # (d, min(d, n)), which has the same U and S: n is often far above d
    R_hat = project(project(R.T, basis), basis).T  # R - M M^T R (Eq. 8); twice, as M is orthonormal to float32 only
    try:
        U, S, _ = torch.linalg.svd(R_hat, full_matrices=False)
    except torch.linalg.LinAlgError:  # LAPACK's gesdd may fail to converge; gesvd is slower, and sure
        from scipy.linalg import svd
        U, S, _ = map(torch.from_numpy, svd(R_hat.numpy(), full_matrices=False, lapack_driver="gesvd"))
    energy, gained = R.square().sum(), S.square()
    held = (energy - gained.sum()).clamp(min=0) + gained.cumsum(0) - gained  # energy in [M, U_1 .. U_i]
    k = ((held < eps * energy) & (gained > 1e-12 * energy)).sum()  # the first ones; smaller gains are rounding noise
    return torch.cat([M, U[:, :k].to(M)], dim=1)


def update_bases(model, task, x, bases, eps, n_samples):
    """Extend the bases {name: M} by what the task's training images x give to each layer; eps, n_samples: one per layer."""
    inputs = layer_inputs(model, x[torch.randperm(len(x))[: max(n_samples)].to(x.device)], task)
    for (name, layer), layer_eps, n in zip(projected_layers(model).items(), eps, n_samples):
        bases[name] = update_basis(bases[name], representation_matrix(layer, inputs[name][:n]), layer_eps)


class ProjectedLinear(torch.autograd.Function):
    """y = x W^T (B, out), whose W receives delta^T (x - x M M^T), delta being the gradient of y.

    With samples as rows G = delta^T x (Eq. 2): this is G - G M M^T (Eq. 6-7), on the B rows of x instead of the out rows of G.
    In training x of the first layer is (B, 2, d): images, each with its projection.
    """

    @staticmethod
    def forward(ctx, x, W, M):
        x, x_hat = x.unbind(1) if x.dim() == 3 else (x, None)
        ctx.save_for_backward(x, W, M, x_hat)
        return x @ W.T

    @staticmethod
    def backward(ctx, delta):
        x, W, M, x_hat = ctx.saved_tensors
        G = delta.T @ (project(x, M) if x_hat is None else x_hat)
        return delta @ W if ctx.needs_input_grad[0] else None, G, None


def project_gradients(model):
    """From now on let each layer's weight receive G - G M M^T in place of G (Eq. 6-7), M as bases holds it at each step.

    Returns bases, {name: M}, every M without columns as yet: (d, 0), which projects nothing.
    """
    bases = {}
    for name, layer in projected_layers(model).items():
        bases[name] = layer.weight.new_zeros(layer.weight[0].numel(), 0)
        if isinstance(layer, nn.Linear):
            layer.forward = lambda x, layer=layer, name=name: ProjectedLinear.apply(x, layer.weight, bases[name])
        else:
            layer.weight.register_hook(lambda G, name=name: project(G.flatten(1), bases[name]).view_as(G))
    return bases


def freeze_batchnorm(model):
    """Keep the gain and shift of every BatchNorm as they are: they are learned on the first task only."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.requires_grad_(False)


# 5. Training and evaluation -------------------------------------------------------------------------------------------
@torch.no_grad()
def sgd_step(optimizer):
    """What step and zero_grad of torch.optim.SGD do, whose bookkeeping takes a fifth of the time of a batch of ten images."""
    group = optimizer.param_groups[0]
    if group["momentum"]:
        optimizer.step()
        return optimizer.zero_grad()
    for W in group["params"]:
        W.sub_(W.grad, alpha=group["lr"])
        W.grad = None


def train_epoch(model, task, x, y, optimizer, batch_size):
    """One pass over the images x (N, ...) with labels y (N,) in random order. Returns the mean loss."""
    model.train()
    total = torch.zeros((), device=x.device)
    order = torch.randperm(len(x)).to(x.device)
    for batch in tqdm(order.split(batch_size), f"task {task + 1}", leave=False, disable=None):
        loss = F.cross_entropy(model(x.index_select(0, batch), task), y.index_select(0, batch))
        loss.backward()
        sgd_step(optimizer)
        total += loss.detach() * len(batch)
    return total.item() / len(x)


@torch.no_grad()
def evaluate(model, task, x, y, batch_size):
    """(Mean loss, accuracy in percent) on images x (N, ...), in their order: BatchNorm depends on what is in a batch."""
    model.eval()
    logits = torch.cat([model(batch, task) for batch in x.split(batch_size)])
    return F.cross_entropy(logits, y).item(), 100 * (logits.argmax(1) == y).sum().item() / len(y)


START_OF_TASK = {"epoch": 0, "waited": 0, "best_loss": math.inf, "best": None, "optimizer": None}  # before the first epoch


def train_task(model, task, train, valid, args, run, folder):
    """Train on one task, and leave the network with the weights of the lowest validation loss (lr_patience 0: the last ones).

    After lr_patience epochs without a lower one the learning rate is divided by lr_factor; the task ends when it falls below
    lr_min. train, valid: (x, y). run: where the training stands (see main), saved to the folder as it goes.
    """
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum)
    optimizer.load_state_dict(run["optimizer"] or optimizer.state_dict())
    train = torch.stack([train[0], project(train[0], run["bases"]["fc1"])], dim=1), train[1]  # once, not in every step
    while run["epoch"] < args.n_epochs and run["lr"] >= args.lr_min:
        start, lr = time.perf_counter(), run["lr"]
        optimizer.param_groups[0]["lr"] = lr
        loss = train_epoch(model, task, *train, optimizer, args.batch_size_train)
        valid_loss, valid_acc = evaluate(model, task, *valid, args.batch_size_test)
        run["epoch"] += 1
        if not math.isfinite(loss + valid_loss):
            fail(f"the loss became {loss + valid_loss} in task {task + 1}: try a smaller --lr than {args.lr}", status=1)
        if valid_loss < run["best_loss"] or not args.lr_patience:
            run.update(best_loss=valid_loss, best={key: W.clone() for key, W in model.state_dict().items()}, waited=0)
        else:
            run["waited"] += 1
            if run["waited"] == args.lr_patience:
                run.update(lr=lr / args.lr_factor, waited=0)
        run["optimizer"] = optimizer.state_dict()
        run["results"]["history"].append([task + 1, run["epoch"], lr, *np.round((loss, valid_loss, valid_acc), 4).tolist()])
        print(f"task {task + 1:2d} epoch {run['epoch']:3d} | train loss {loss:7.4f} | valid loss {valid_loss:7.4f} "
              f"acc {valid_acc:6.2f} | lr {lr:.2e} | {time.perf_counter() - start:6.2f} s", flush=True)
        save_run(folder, run, model, if_older_than=SAVE_SECONDS - (time.perf_counter() - start))  # the next epoch counts
    model.load_state_dict(run["best"])


# 6. Results and checkpoints -------------------------------------------------------------------------------------------
def average_accuracy(acc):
    """ACC: mean over u of acc[T, u]. acc (T, T): accuracy on task u (column) after training task t (row)."""
    return float(np.mean(np.asarray(acc)[-1]))


def backward_transfer(acc):
    """BWT: mean over u < T of acc[T, u] - acc[u, u]; 0 after one task, when there was nothing to forget."""
    acc = np.asarray(acc)
    return float(np.mean(acc[-1, :-1] - np.diag(acc)[:-1])) if len(acc) > 1 else 0.0


def provenance(device):
    """Commit, whether this script or the loaders differ from it, versions, device. The commit is "" outside of a checkout."""
    git = f"git rev-parse HEAD && git status --porcelain -- {Path(__file__).name} dataloader"
    printed = subprocess.run(git, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True).stdout
    commit, _, changes = printed.partition("\n")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"commit": commit, "dirty": bool(changes),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
            "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()}}


def claim(folder):
    """Make the run's folder and refuse a second process there. Returns an open file whose lock ends when it is closed."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is at work in {folder}: wait for it, or choose another --run_name")
    except OSError:
        pass  # a file system without locks, where a run is possible too
    return lock


def save_run(folder, run, model, if_older_than=0):
    """Write results.json and checkpoint.pt, under another name first: a kill leaves the old file or the new one, whole."""
    passed = time.perf_counter() - run["saved"]
    if passed < if_older_than:
        return
    run["saved"] += passed
    run["results"]["seconds"] += passed
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in run["results"].items())
    random = [generator.get_state() for generator in (torch.default_generator, *torch.cuda.default_generators)]
    checkpoint = io.BytesIO()  # as torch reports a full disk in many ways
    torch.save({**run, "model": model.state_dict(), "random": random}, checkpoint)
    for name, content in ("results.json", f"{{\n{lines}\n}}\n".encode()), ("checkpoint.pt", checkpoint.getbuffer()):
        (folder / f"{name}.part").write_bytes(content)
        (folder / f"{name}.part").replace(folder / name)


def load_run(folder, run, model):
    """Bring run and model to where the folder's checkpoint was written. Other arguments or data than there are refused."""
    try:
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in many ways
        fail(f"{folder}/checkpoint.pt cannot be read ({type(error).__name__}): remove the folder to start anew")
    for part in "args", "data", "widths":
        old, new = saved["results"].get(part, {}), run["results"][part]
        other = [f"{key} {old.get(key)} there, {new.get(key)} here" for key in {**old, **new} if old.get(key) != new.get(key)]
        if other:
            fail(f"{folder} holds a run with other {part} ({'; '.join(other[:3])}): choose another --run_name")
    model.load_state_dict(saved.pop("model"))
    for generator, state in zip((torch.default_generator, *torch.cuda.default_generators), saved.pop("random")):
        generator.set_state(state)
    run["bases"].update({name: M.to(run["bases"][name]) for name, M in saved.pop("bases").items()})
    run.update(saved)


# 7. Main --------------------------------------------------------------------------------------------------------------
def load_tasks(args, model):
    """The benchmark's tasks (dataloader.task.Task), once it is clear that the flags fit the network and the data."""
    layers = projected_layers(model)
    for flag in "threshold", "n_samples":
        if len(getattr(args, flag)) not in (1, len(layers)):
            fail(f"--{flag} takes one value, or one for each of the {len(layers)} layers {' '.join(layers)}")
    batchnorm = any(isinstance(module, nn.BatchNorm1d) for module in model.modules())  # 2d: an image has many positions
    tasks = benchmark.load(args.data_dir, args)
    for task in tasks:
        if not 1 < max(args.n_samples) <= task.n_train:
            fail(f"--n_samples: the largest must lie between 2 and {task.n_train}, the training images of {task.name}")
        for flag, n in ("batch_size_train", task.n_train), ("batch_size_test", task.n_valid), ("batch_size_test", task.n_test):
            if batchnorm and (n - 1) % getattr(args, flag) == 0:
                fail(f"--{flag} leaves a batch of one of {n} images, which BatchNorm cannot normalise: choose another")
    return tasks


def main(args):
    """Train on the tasks one after another and report ACC and BWT."""
    folder = Path(args.models_dir) / Path(__file__).stem.removeprefix("main_") / args.run_name
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # its error of 1e-3 would move old outputs
    torch.backends.cudnn.deterministic = True  # so that a resumed run can repeat the stopped one on a GPU too
    torch.manual_seed(args.seed)
    layout = torch.channels_last if args.device.type == "cpu" else torch.preserve_format  # saves 20 % of a CPU's step
    model = build_model(args).to(args.device, memory_format=layout)
    bases = project_gradients(model)
    tasks = load_tasks(args, model)
    thresholds, n_samples = (v if len(v) > 1 else v * len(bases) for v in (args.threshold, args.n_samples))  # one for all
    run = {"bases": bases, "lr": args.lr, **START_OF_TASK, "results": {  # what a checkpoint keeps beside the weights
        "args": {flag: value for flag, value in vars(args).items() if flag != "changed" and flag not in PLACES},
        "changed": args.changed,
        "data": {task.name: {**task.data, "train": task.n_train, "valid": task.n_valid, "test": task.n_test} for task in tasks},
        "origins": [], "widths": {name: len(M) for name, M in bases.items()}, "accuracy_matrix": [], "ACC": None, "BWT": None,
        "ranks": [], "memory": [], "history": [], "seconds": 0.0, "finished": False}}
    with claim(folder):
        if (folder / "checkpoint.pt").exists():
            load_run(folder, run, model)
        run["saved"], results, origin = time.perf_counter(), run["results"], provenance(args.device)
        if origin not in results["origins"]:
            results["origins"].append(origin)
        print(f"{folder}: {args.changed or 'as published'}, {origin}, after task {len(results['ranks'])}, epoch {run['epoch']}")
        for t in range(len(results["ranks"]), args.n_tasks):
            train, valid = ([tensor.to(args.device) for tensor in part] for part in (tasks[t].train, tasks[t].valid))
            if t > 0:
                freeze_batchnorm(model)
            train_task(model, t, train, valid, args, run, folder)
            eps = [threshold and threshold + t * args.threshold_increment for threshold in thresholds]
            update_bases(model, t, train[0], bases, eps, n_samples)
            tests = ([tensor.to(args.device) for tensor in task.test] for task in tasks[: t + 1])
            row = [evaluate(model, u, *test, args.batch_size_test)[1] for u, test in enumerate(tests)]
            acc = [[*old, 0.0] for old in results["accuracy_matrix"]] + [row]  # 0: not learned yet
            ranks = {name: M.shape[1] for name, M in bases.items()}
            used = 100 * sum(M.numel() for M in bases.values()) / sum(len(M) ** 2 for M in bases.values())
            results.update(accuracy_matrix=acc, ACC=average_accuracy(acc), BWT=backward_transfer(acc),
                           ranks=[*results["ranks"], ranks], memory=[*results["memory"], used], finished=t + 1 == args.n_tasks)
            print(f"task {t + 1:2d} ({tasks[t].name}) learned in {run['epoch']} epochs, bases {used:.1f} % of GPM_Max\n"
                  f"  accuracy {' '.join(f'{a:6.2f}' for a in row)} | ACC so far {results['ACC']:.2f}\n"
                  f"  rank     {'  '.join(f'{name} {r}/{len(bases[name])}' for name, r in ranks.items())}", flush=True)
            run.update(START_OF_TASK, lr=args.lr)
            save_run(folder, run, model)  # from here on the task counts as done
    partial = sorted({f"{data['set']} in part" for data in results["data"].values() if not data["complete"]})
    if args.changed or partial:
        print("not comparable with the paper:", ", ".join([*(f"--{flag}" for flag in args.changed), *partial]))
    for metric in "ACC", "BWT":
        print(f"{metric} {results[metric]:.2f}   (paper: {PAPER[metric]})")


if __name__ == "__main__":
    try:
        main(parse_args())
    except DataError as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted: the same command goes on from the last checkpoint", status=1)
    except (OSError, torch.OutOfMemoryError) as error:  # the disk or the GPU is full, say
        fail(str(error).splitlines()[0], status=1)
