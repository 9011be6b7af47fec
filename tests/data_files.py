"""Small data sets in the files that the real ones come in, for tests."""

import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
from scipy.io import savemat

from dataloader import official, packages, raw


def small_arrays(name, n_train, n_test, seed=0):
    """Arrays as load_raw returns them, {key: array}.

    The classes are of equal size and easy to tell apart. No two images are alike.
    """
    spec = raw.SETS[name]
    shape = spec.shapes[0]
    rng = np.random.default_rng(seed)
    prototypes = rng.integers(0, 192, (spec.n_classes, *shape))
    arrays = {}
    for split, n in ("train", n_train), ("test", n_test):
        y = rng.permutation(n) % spec.n_classes
        x = prototypes[y] + rng.integers(0, 64, (n, *shape))
        arrays[f"x_{split}"] = x.astype(np.uint8)
        arrays[f"y_{split}"] = y
    return arrays


def write_npz(folder, name, arrays, **more):
    """Write prepared arrays; returns the path."""
    path = folder / f"{name}.npz"
    np.savez(path, **arrays, **more)
    return path


def write_own_files(folder, name, arrays, monkeypatch):
    """Write the set's released files into folder, unpacked, and have their digests expected."""
    contents = released_files(name, arrays)
    expect_package(name, arrays, monkeypatch)
    expect_files(name, contents, monkeypatch)
    if name != "notmnist":
        contents |= expect_in_torchvision(name, contents, monkeypatch)
    for file, content in contents.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def pack(folder, name):
    """Replace the released files by the archives that they come in; returns the archives."""
    release = official.RELEASES[name]
    archives = []
    if release.archive.endswith(".tar.gz"):
        archives = [folder / release.archive]
        with tarfile.open(archives[0], "w:gz", compresslevel=1) as archive:
            for file in release.files:
                archive.add(folder / file, file)
    for file in release.files:
        if release.archive == "{}.gz":
            archives.append(folder / f"{file}.gz")
            archives[-1].write_bytes(gzip.compress((folder / file).read_bytes(), 1))
        (folder / file).unlink()
    return archives


def released_files(name, arrays):
    """{file: content} of a data set."""
    x, y, x_test, y_test = (arrays[key] for key in raw.KEYS)
    if name == "notmnist":
        train = {"features": x[:, None], "labels": y}
        test = {"features": x_test[:, None], "labels": y_test}
        contents = [notmnist(train, test)]
    elif name == "svhn":
        contents = [svhn(x, y), svhn(x_test, y_test)]
    elif name == "cifar100":
        contents = [cifar(x, y, "fine_labels"), cifar(x_test, y_test, "fine_labels")]
    elif name == "cifar10":
        batches = zip(np.array_split(x, 5), np.array_split(y, 5), strict=True)
        contents = [cifar(*batch, "labels") for batch in batches]
        contents.append(cifar(x_test, y_test, "labels"))
    else:
        contents = [idx(array) for array in (x, y, x_test, y_test)]
    return dict(zip(official.RELEASES[name].files, contents, strict=True))


def expect_files(name, contents, monkeypatch):
    """Make the digests of these contents those of the released files."""
    release = official.RELEASES[name]
    digests = {file: release.digest(content) for file, content in contents.items()}
    monkeypatch.setitem(official.RELEASES, name, release._replace(files=digests))


def expect_package(name, arrays, monkeypatch):
    """Make the digest of these arrays that of the package."""
    if name in packages.PACKAGES:
        sha256 = packages.sha256([arrays[key] for key in raw.KEYS])
        package = packages.PACKAGES[name]._replace(sha256=sha256)
        monkeypatch.setitem(packages.PACKAGES, name, package)


def expect_in_torchvision(name, contents, monkeypatch):
    """Make torchvision expect these contents; returns the files that it alone needs."""
    dataset = getattr(raw.torchvision_datasets(), raw.SETS[name].dataset)
    md5 = [(file.split("/")[-1], official.md5(content)) for file, content in contents.items()]
    if name == "svhn":
        splits = {"train": ["no host", *md5[0]], "test": ["no host", *md5[1]]}
        monkeypatch.setattr(dataset, "split_list", splits)
    elif name in ("cifar10", "cifar100"):
        meta = pickle.dumps({dataset.meta["key"]: []})
        monkeypatch.setattr(dataset, "train_list", md5[:-1])
        monkeypatch.setattr(dataset, "test_list", md5[-1:])
        monkeypatch.setitem(dataset.meta, "md5", official.md5(meta))
        return {f"{dataset.base_folder}/{dataset.meta['filename']}": meta}
    return {}  # it compares no digests of MNIST's unpacked files


def notmnist(train, test):
    """A zip of the two pickles that hold train and test."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("notmnist_train.pkl", pickle.dumps(train, protocol=2))
        archive.writestr("notmnist_test.pkl", pickle.dumps(test, protocol=2))
    return file.getvalue()


def idx(array):
    """An idx file: two zeros, 8 for unsigned bytes, the number of dimensions, these, the bytes."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def cifar(x, y, key):
    """A pickle of rows of 3072 values (red, green, blue), as Python 2 wrote it."""
    rows = x.transpose(0, 3, 1, 2).reshape(len(x), 3072)
    return pickle.dumps({"data": rows, key: y.tolist()}, protocol=2)


def svhn(x, y):
    """A .mat file of X (32, 32, 3, N) and y (N, 1), the digit 0 as class 10."""
    file = io.BytesIO()
    labels = np.where(y == 0, 10, y).astype(np.uint8)[:, None]
    savemat(file, {"X": x.transpose(1, 2, 3, 0), "y": labels})
    return file.getvalue()
