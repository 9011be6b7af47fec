"""Small data sets in the files that the real ones come in, for tests."""
import hashlib
import io
import pickle
import zipfile

import numpy as np
from scipy.io import savemat

from dataloader import raw

IDX_FILES = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def small_arrays(name, n_train, n_test, seed=0):
    """Arrays as load_raw returns them: as many images of each class as of any other, no two alike, a class easy to tell."""
    spec, rng, arrays = raw.SETS[name], np.random.default_rng(seed), {}
    prototypes = rng.integers(0, 192, (spec.n_classes, *spec.shapes[0]))
    for split, n in ("train", n_train), ("test", n_test):
        y = rng.permutation(n) % spec.n_classes
        arrays[f"x_{split}"] = (prototypes[y] + rng.integers(0, 64, (n, *spec.shapes[0]))).astype(np.uint8)
        arrays[f"y_{split}"] = y
    return arrays


def write_npz(folder, name, arrays, **more):
    """Write prepared arrays; returns the path."""
    path = folder / f"{name}.npz"
    np.savez(path, **arrays, **more)
    return path


def write_own_files(folder, name, arrays, monkeypatch):
    """Write the set's own files into folder, and have their digests expected."""
    x, y, x_test, y_test = (arrays[key] for key in raw.KEYS)
    if name == "notmnist":
        pickles = ({"features": images[:, None], "labels": labels} for images, labels in ((x, y), (x_test, y_test)))
        return write_notmnist(folder, *pickles, monkeypatch)
    if name in raw.PACKAGES:
        sha256 = hashlib.sha256(b"".join(arrays[key].astype(np.uint8).tobytes() for key in raw.KEYS)).hexdigest()
        monkeypatch.setitem(raw.PACKAGES, name, (*raw.PACKAGES[name][:-1], sha256))
    dataset = getattr(raw.torchvision_datasets(), raw.SETS[name].dataset)
    if name in ("mnist", "fashion_mnist"):
        contents = {file: idx(arrays[key]) for file, key in zip(IDX_FILES, raw.KEYS)}
    elif name == "svhn":
        contents = {"train_32x32.mat": svhn(x, y), "test_32x32.mat": svhn(x_test, y_test)}
    else:
        n = len(dataset.train_list)
        parts = zip([*dataset.train_list, *dataset.test_list], [*np.array_split(x, n), x_test], [*np.array_split(y, n), y_test])
        contents = {file: cifar(x, y, "labels" if name == "cifar10" else "fine_labels") for (file, _), x, y in parts}
        contents[dataset.meta["filename"]] = pickle.dumps({dataset.meta["key"]: []})
    md5 = [(file, hashlib.md5(content).hexdigest()) for file, content in contents.items()]
    if name == "svhn":
        monkeypatch.setattr(dataset, "split_list", dict(train=["no host", *md5[0]], test=["no host", *md5[1]]))
    elif "cifar" in name:
        monkeypatch.setattr(dataset, "train_list", md5[:-2])
        monkeypatch.setattr(dataset, "test_list", md5[-2:-1])
        monkeypatch.setitem(dataset.meta, "md5", md5[-1][1])
    folder = (folder / raw.SETS[name].files).parent
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        (folder / file).write_bytes(content)


def write_notmnist(folder, train, test, monkeypatch):
    """Write notmnist.zip, with what the pickle of each split is to hold, and have its blob id expected."""
    path = folder / "notmnist.zip"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("notmnist_train.pkl", pickle.dumps(train, protocol=2))
        archive.writestr("notmnist_test.pkl", pickle.dumps(test, protocol=2))
    content = path.read_bytes()
    monkeypatch.setattr(raw, "NOTMNIST_BLOB", hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def idx(array):
    """An idx file: two zeros, 8 for unsigned bytes, the number of dimensions, the dimensions, the bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def cifar(x, y, key):
    """A pickle of rows of 3072 values (red, green, blue), as Python 2 wrote it."""
    return pickle.dumps({"data": x.transpose(0, 3, 1, 2).reshape(len(x), 3072), key: y.tolist()}, protocol=2)


def svhn(x, y):
    """A .mat file of X (32, 32, 3, N) and y (N, 1), the digit 0 as class 10."""
    file = io.BytesIO()
    savemat(file, {"X": x.transpose(1, 2, 3, 0), "y": np.where(y == 0, 10, y).astype(np.uint8)[:, None]})
    return file.getvalue()
