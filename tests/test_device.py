"""The scripts' main on a pretended GPU, for machines without one: fake tensors, which have no values, on the device "meta".

Every operation must find its tensors on one device, and a training epoch must not wait for the GPU. Kernels are not run.
"""
import importlib
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import benchmark
from test_scripts import Bench, bench  # noqa: F401

GPU = torch.device("meta")  # fake tensors on "cuda" cannot run a backward pass in a torch without CUDA


class OneDevice(TorchDispatchMode):
    """Fail where an operation other than a copy mixes devices; fake tensors alone overlook convolutions and x[index]."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device for t in tensors if t.dim() > 0 or t.device == GPU}
        assert len(devices) < 2 or operation is torch.ops.aten.copy_.default, f"{operation} of tensors on {devices}"
        return operation(*args, **(kwargs or {}))


def real(function):
    """The function on real tensors: what happens on the CPU anyway."""
    def run(*args, **more):
        with unset_fake_temporarily():
            return function(*args, **more)
    return run


def pretend(patch, waits):
    """Give fake tensors a value where one is asked for, which a program would wait for; each such time is noted in waits."""
    for name, value in (("item", 0.5), ("__bool__", True), ("__index__", 3)):
        patch.setattr(torch.Tensor, name, lambda self, *_, value=value: waits.append(self.device) or value)


def run_on_gpu(bench, monkeypatch, *more):
    """Run main on the pretended GPU. Returns what it would have saved, and how often each training epoch waited for the GPU."""
    script, saved, waits, epochs = bench.script, [], [], []

    def train_epoch(*args, train_epoch=script.train_epoch):
        waits.clear()
        result = train_epoch(*args)
        epochs.append(waits.count(GPU))
        return result

    args = script.parse_args(bench.flags("--momentum", "0.9", *more))
    args.device = GPU
    with monkeypatch.context() as patch:
        patch.setattr(script, "build_model", real(script.build_model))
        patch.setattr(script, "train_epoch", train_epoch)
        patch.setattr(script, "SAVE_SECONDS", 0)
        patch.setattr(torch, "load", real(torch.load))
        patch.setattr(torch, "save", lambda run, _: saved.append(run))
        patch.setattr(torch, "default_generator", mock.Mock())
        pretend(patch, waits)
        with FakeTensorMode(allow_non_fake_inputs=True), OneDevice():
            script.main(args)
    return saved, epochs


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_all_tensors_are_on_the_gpu(bench, monkeypatch):
    """From the start, and going on within task 2 from a checkpoint, which is read on the CPU."""
    n_epochs = 2 * bench.script.parse_args(bench.flags()).n_tasks
    bench.stopped(monkeypatch, "--momentum", "0.9", models="resumed")
    for models, done in ("new", 0), ("resumed", 3):
        saved, epochs = run_on_gpu(bench, monkeypatch, "--models_dir", str(bench.folder / models))
        assert epochs == [1] * (n_epochs - done)  # waits for the loss, however many batches
        momenta = [state["momentum_buffer"] for state in saved[0]["optimizer"]["state"].values()]
        tensors = *saved[-1]["model"].values(), *saved[-1]["bases"].values(), *momenta
        assert momenta and {tensor.device for tensor in tensors} == {GPU}
        assert saved[-1]["results"]["finished"] and all(M.shape[1] > 0 for M in saved[-1]["bases"].values())


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_on_the_cpu_is_found(tmp_path, monkeypatch):
    bench = Bench("main_cifar100_superclass", tmp_path)
    monkeypatch.setattr(bench.script, "freeze_batchnorm", lambda model: setattr(model.lrn1, "one", torch.ones(20)))
    with pytest.raises(AssertionError, match="convolution.* of tensors on"):
        run_on_gpu(bench, monkeypatch)


@pytest.mark.parametrize("name", ["pmnist", "cifar100"])
def test_the_benchmark_on_the_gpu(name, monkeypatch):
    """Each thing that it times is done once, on two images."""
    script = importlib.import_module(f"main_{name}")
    monkeypatch.setattr(script, "build_model", real(script.build_model))
    monkeypatch.setitem(benchmark.BENCHMARKS, name, (benchmark.BENCHMARKS[name][0], 2, 1))
    monkeypatch.setattr(benchmark, "race", lambda work, forms, device: [(work(form), 1.0)[1] for form in forms])
    pretend(monkeypatch, [])
    with FakeTensorMode(allow_non_fake_inputs=True), OneDevice():
        cells, _ = benchmark.measure(name, GPU)
    assert len(cells) == 4 and cells["update of the bases"] == "1 / 1 s = 1.0"
