"""Wrong input, a full disk and a full GPU end a script in one line that says what to do."""

import os
import re
from unittest.mock import Mock

import pytest
import torch
from bench import ROOT, Bench, assert_refused, load_script, results_of


@pytest.fixture
def pmnist(tmp_path):
    return Bench("main_pmnist", tmp_path)


# Flags --------------------------------------------------------------------------------------------
OUT_OF_RANGE = [
    "--threshold 1.01",
    "--threshold nan",
    "--threshold_increment -0.1",
    "--n_samples 0",
    "--n_epochs 0",
    "--batch_size_train -3",
    "--batch_size_test 0",
    "--pc_valid 0",
    "--pc_valid 1",
    "--lr 0",
    "--lr nan",
    "--lr inf",
    "--lr_factor 0.5",
    "--lr_patience -1",
    "--momentum 1",
    "--seed -1",
    "--n_tasks 0",
    "--n_tasks 11",
    "--n_hidden 0",
]
WRONG = {
    "--threshold 0.9 0.9": "--threshold takes one value, or one for each of the 3 layers fc1 fc2",
    "--n_samples 5 5": "--n_samples takes one value, or one for each of the 3 layers fc1 fc2 fc3",
    "--threshold 0.9 --threshold_increment 0.2": "--threshold_increment reach 1 within 2 tasks",
    "--n_samples 1": "--n_samples: the largest must lie between 2 and 270",
    "--n_samples 100000": "--n_samples: the largest must lie between 2 and 270",
    "--pc_valid 0.001": "validation share of 0.001 is less than one of",
    "--lr 1e-7": "--lr_min 1e-05 is above --lr 1e-07",
    "--lr fast": "argument --lr: invalid float value: 'fast'",
    "--device cuda:77": "--device: cuda:77 cannot be used",
    "--device meta": "--device: meta cannot be used",
    "--epochs 3": "unrecognized arguments: --epochs 3",
}


@pytest.mark.parametrize("flags", OUT_OF_RANGE)
def test_a_flag_out_of_range(flags, capsys):
    flag, value = flags.split()
    parse_args = load_script(ROOT / "main_pmnist.py").parse_args
    assert_refused(capsys, 2, f"argument {flag}: {value} is not in", parse_args, [flag, value])


@pytest.mark.parametrize("flags, pattern", WRONG.items(), ids=list(WRONG))
def test_wrong_flags(pmnist, flags, pattern, monkeypatch, capsys):
    assert_refused(capsys, 2, pattern, pmnist.program, monkeypatch, *flags.split())
    assert not (pmnist.folder / "models").exists()


def test_an_unknown_order_of_tasks(capsys):
    superclass = load_script(ROOT / "main_cifar100_superclass.py")
    pattern = "--t_order: invalid choice: '?5"
    assert_refused(capsys, 2, pattern, superclass.parse_args, ["--t_order", "5"])


def test_batches_of_one_image(tmp_path, capsys):
    """BatchNorm1d cannot normalise them."""
    cifar100 = Bench("main_cifar100", tmp_path)
    # A task has 200 images: 190 for training and 10 for validation; and 40 for the test.
    pattern = "--batch_size_train 63 leaves a batch of one image of classes 0-9"
    assert_refused(capsys, 2, pattern, cifar100.run, "--batch_size_train", "63")
    for size in "9", "39":
        pattern = f"--batch_size_test {size} leaves a batch of one image of classes 0-9"
        assert_refused(capsys, 2, pattern, cifar100.run, "--batch_size_test", size)


def test_a_learning_rate_that_diverges(pmnist, monkeypatch, capsys):
    pattern = r"the loss became (nan|inf): try an --lr below 1e\+30"
    assert_refused(capsys, 1, pattern, pmnist.program, monkeypatch, "--lr", "1e30")
    assert not (pmnist.run_folder() / "checkpoint.pt").exists()


# Folders ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flag", ["--models_dir", "--data_dir"])
@pytest.mark.parametrize("path", ["README.md", "README.md/below", "README.md/far/below"])
def test_a_folder_that_is_a_file(pmnist, flag, path, monkeypatch, capsys):
    monkeypatch.chdir(pmnist.folder)
    (pmnist.folder / "README.md").touch()
    pattern = f"argument {flag}: .*README.md is a file, not a folder"
    out = assert_refused(capsys, 2, pattern, pmnist.program, monkeypatch, flag, path)
    assert out == ""  # before any work


def test_the_home_folder(pmnist, monkeypatch):
    elsewhere = pmnist.folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(pmnist.folder))
    pmnist.run("--data_dir=~/data", "--models_dir=~/my models")
    assert results_of(pmnist.run_folder(models="my models"))["finished"]
    assert not list(elsewhere.iterdir())


# A full disk and a full GPU -----------------------------------------------------------------------
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("name", ["results.json", "checkpoint.pt"])
def test_a_full_disk(pmnist, name, monkeypatch, capsys):
    folder = pmnist.stop(monkeypatch)
    before = (folder / "checkpoint.pt").read_bytes()
    part = folder / f"{name}.part"
    part.symlink_to("/dev/full")
    pattern = f"No space left on device: '{folder / name}'"
    assert_refused(capsys, 1, pattern, pmnist.program, monkeypatch)
    assert (folder / "checkpoint.pt").read_bytes() == before
    part.unlink()
    assert results_of(pmnist.run())["finished"]


FULL_GPU = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore lines"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported late."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
]


@pytest.mark.parametrize("error", FULL_GPU, ids=[f"error {i}" for i in range(len(FULL_GPU))])
def test_a_full_gpu(pmnist, error, monkeypatch, capsys):
    monkeypatch.setattr(torch, "manual_seed", Mock(side_effect=error))
    first_line = re.escape(str(error).splitlines()[0])
    assert_refused(capsys, 1, first_line, pmnist.program, monkeypatch)


def test_a_gpu_that_is_full_when_a_run_resumes(pmnist, monkeypatch, capsys):
    """It has no room for the bases, which does not mean that they are of a different network."""
    pmnist.stop(monkeypatch)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", Mock(side_effect=FULL_GPU[0]))
    assert_refused(capsys, 1, "CUDA out of memory", pmnist.program, monkeypatch)


def test_another_error_keeps_its_traceback(pmnist, monkeypatch):
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied (10x784 and 100x10)")
    monkeypatch.setattr(torch, "manual_seed", Mock(side_effect=error))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pmnist.program(monkeypatch)
