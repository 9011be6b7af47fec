"""The scripts on a GPU: a pretended one of fake tensors, and a real one where there is one.

Fake tensors have no values and run no kernels. On them every operation must find its tensors on
one device, and a training epoch must not wait for the GPU. Tests that need a real GPU have "cuda"
in their names.
"""

import importlib
from unittest import mock

import benchmark
import pytest
import torch
from bench import SHORT, Bench, assert_equal_runs, checkpoint_of, results_of
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Fake tensors on "cuda" cannot run a backward pass in a torch without CUDA; those on "meta" can.
GPU = torch.device("meta")
MOMENTUM = ("--momentum", "0.9")  # so that the optimizer has tensors, too
no_gpu = not torch.cuda.is_available()


@pytest.fixture(params=SHORT)
def bench(request, tmp_path):
    return Bench(request.param, tmp_path)


# A pretended GPU ----------------------------------------------------------------------------------
class OneDevice(TorchDispatchMode):
    """Fail where an operation other than a copy mixes devices.

    Fake tensors by themselves overlook convolutions and x[index].
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # A number on the CPU may meet tensors on the GPU.
        devices = {t.device for t in tensors if t.dim() > 0 or t.device == GPU}
        is_copy = operation is torch.ops.aten.copy_.default
        assert len(devices) < 2 or is_copy, f"{operation} of tensors on {devices}"
        return operation(*args, **(kwargs or {}))


def real(function):
    """The function on real tensors, for what happens on the CPU in any case."""

    def call(*args, **more):
        with unset_fake_temporarily():
            return function(*args, **more)

    return call


def pretend_values(patch, waits):
    """Give fake tensors a value where one is asked for.

    A program would wait for the device there, so its device is appended to waits.
    """
    for name, value in ("item", 0.5), ("__bool__", True), ("__index__", 3):

        def wait(self, *_, value=value):
            waits.append(self.device)
            return value

        patch.setattr(torch.Tensor, name, wait)


def run_on_pretended_gpu(bench, monkeypatch, *more):
    """Run main on the pretended GPU, with a checkpoint after each epoch.

    Returns the checkpoints, and how often each training epoch waited for the GPU.
    """
    script = bench.script
    saved, waits, waits_of_epochs = [], [], []
    train = script.train_epoch

    def train_epoch(*args):
        waits.clear()
        loss = train(*args)
        waits_of_epochs.append(waits.count(GPU))
        return loss

    args = bench.args(*MOMENTUM, *more)
    args.device = GPU
    with monkeypatch.context() as patch:
        patch.setattr(script, "build_model", real(script.build_model))
        patch.setattr(script, "train_epoch", train_epoch)
        patch.setattr(script, "SAVE_SECONDS", 0)
        patch.setattr(torch, "load", real(torch.load))
        patch.setattr(torch, "save", lambda checkpoint, _: saved.append(checkpoint))
        patch.setattr(torch, "default_generator", mock.Mock())
        pretend_values(patch, waits)
        with FakeTensorMode(allow_non_fake_inputs=True), OneDevice():
            script.main(args)
    return saved, waits_of_epochs


def assert_on_gpu(values):
    """There are tensors among the values, and all are on the pretended GPU."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    assert {tensor.device for tensor in tensors} == {GPU}


def check_run_on_pretended_gpu(bench, monkeypatch, models, n_done):
    """Run main from where models has a run, with n_done epochs, and look at what is saved."""
    saved, waits = run_on_pretended_gpu(
        bench, monkeypatch, "--models_dir", str(bench.folder / models)
    )
    n_epochs = 2 * bench.args().n_tasks
    assert waits == [1] * (n_epochs - n_done)  # for the loss, however many batches there are
    assert saved[-1]["results"]["finished"]
    weights = saved[-1]["model"]
    assert_on_gpu(weights)
    bases = [M for name, M in weights.items() if name.endswith("_extra_state")]
    assert len(bases) == len(saved[-1]["results"]["widths"])
    assert all(M.shape[1] > 0 for M in bases)
    for state in saved[0]["progress"]["optimizer"]["state"].values():
        assert_on_gpu(state["momentum_buffer"])
    assert saved[0]["progress"]["optimizer"]["state"]
    assert_on_gpu(saved[0]["progress"]["best_weights"])


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_all_tensors_are_on_the_gpu(bench, monkeypatch):
    """From the start, and from a checkpoint within task 2, which is read on the CPU."""
    check_run_on_pretended_gpu(bench, monkeypatch, "new", n_done=0)
    bench.stop(monkeypatch, *MOMENTUM, models="resumed")
    check_run_on_pretended_gpu(bench, monkeypatch, "resumed", n_done=3)


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_on_the_cpu_is_found(tmp_path, monkeypatch):
    bench = Bench("main_cifar100_superclass", tmp_path)

    def move_to_cpu(model):
        model.lrn1.one = torch.ones(20)

    monkeypatch.setattr(bench.script, "freeze_batchnorm", move_to_cpu)
    with pytest.raises(AssertionError, match="convolution.* of tensors on"):
        run_on_pretended_gpu(bench, monkeypatch)


def test_a_wait_within_an_epoch_is_counted(tmp_path, monkeypatch):
    bench = Bench("main_pmnist", tmp_path)
    step = bench.script.sgd_step

    def waiting_step(optimizer):
        optimizer.param_groups[0]["params"][0].sum().item()
        step(optimizer)

    monkeypatch.setattr(bench.script, "sgd_step", waiting_step)
    _, waits = run_on_pretended_gpu(bench, monkeypatch)
    assert waits == [1 + 27] * 4  # 270 images in batches of ten


# Random numbers of several GPUs -------------------------------------------------------------------
class Machine:
    """A machine with pretended GPUs, i.e. generators, on which a run is started and saved."""

    def __init__(self, bench, monkeypatch, n_gpus, seed):
        self.bench = bench
        self.generators = tuple(torch.Generator() for _ in range(n_gpus))
        for number, generator in enumerate(self.generators):
            generator.manual_seed(seed + number)
        monkeypatch.setattr(torch.cuda, "default_generators", self.generators)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"pretended {device}")

    def states(self):
        """The states of all GPUs."""
        return [generator.get_state() for generator in self.generators]

    def open_run(self, device):
        """The run on this device, with its network on the CPU."""
        script, args = self.bench.script, self.bench.args()
        args.device = torch.device(device)
        model = script.build_model(args)
        tasks = script.benchmark.load(args.data_dir, args)
        return script.Run(args, model, tasks)


def test_a_checkpoint_of_one_gpu_goes_on_on_another(tmp_path, monkeypatch):
    """It was saved on the second GPU, and resumes where that is the only one."""
    bench = Bench("main_pmnist", tmp_path)
    machine = Machine(bench, monkeypatch, n_gpus=2, seed=10)
    with machine.open_run("cuda:1") as run:
        run.save()
    cpu_state, saved = torch.default_generator.get_state(), machine.states()[1]
    assert len(checkpoint_of(bench.run_folder())["random"]) == 2  # the CPU's and one GPU's

    for device, n_gpus, used in ("cuda:0", 1, 0), ("cuda", 1, 0), ("cuda:1", 3, 1):
        machine = Machine(bench, monkeypatch, n_gpus, seed=20)
        before = machine.states()
        torch.default_generator.manual_seed(99)
        with machine.open_run(device):
            assert torch.equal(torch.default_generator.get_state(), cpu_state)
        for number, state in enumerate(machine.states()):
            expected = saved if number == used else before[number]
            assert torch.equal(state, expected), (device, number)


def test_a_checkpoint_of_the_cpu_goes_on_on_a_gpu_and_back(tmp_path, monkeypatch):
    bench = Bench("main_pmnist", tmp_path)
    machine = Machine(bench, monkeypatch, n_gpus=1, seed=10)
    untouched = machine.states()[0]
    for device, n_states in ("cpu", 1), ("cuda", 2), ("cpu", 1):
        with machine.open_run(device) as run:
            run.save()
        assert len(checkpoint_of(bench.run_folder())["random"]) == n_states
        assert torch.equal(machine.states()[0], untouched)
    names = [origin["device"]["name"] for origin in results_of(bench.run_folder())["origins"]]
    assert names[1] == "pretended cuda"
    assert len(names) == 2


# The benchmark ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["pmnist", "cifar100"])
def test_the_benchmark_on_the_gpu(name, monkeypatch):
    """Each thing that it times is done once, on two images.

    Its check is left out: it does the same in float64.
    """
    script = importlib.import_module(f"main_{name}")
    monkeypatch.setattr(script, "build_model", real(script.build_model))
    shape = benchmark.BENCHMARKS[name][0]
    monkeypatch.setitem(benchmark.BENCHMARKS, name, (shape, 2, 1))

    def once(work, forms, device):
        for form in forms:
            work(form)
        return [1.0 for _ in forms]

    monkeypatch.setattr(benchmark, "check", lambda *_: None)
    monkeypatch.setattr(benchmark, "race", once)
    pretend_values(monkeypatch, [])
    with FakeTensorMode(allow_non_fake_inputs=True), OneDevice():
        cells, _ = benchmark.measure(name, GPU)
    assert len(cells) == 4
    assert cells["update of the bases"] == "1 / 1 s = 1.0"


# A real GPU ---------------------------------------------------------------------------------------
@pytest.mark.skipif(no_gpu, reason="torch finds no CUDA GPU on this machine")
def test_a_run_on_cuda_resumes_bit_for_bit(bench, monkeypatch):
    """Stopped within task 2, where bases, momentum and the GPU's random numbers matter."""
    flags = ("--device", "cuda", *MOMENTUM)
    whole = bench.run(*flags, models="whole")
    bench.stop(monkeypatch, *flags)
    resumed = bench.run(*flags)
    (origin,) = results_of(resumed)["origins"]
    assert origin["device"]["type"] == "cuda"
    assert origin["device"]["name"] == torch.cuda.get_device_name()
    assert len(checkpoint_of(resumed)["random"]) == 2
    assert_equal_runs(whole, resumed)
