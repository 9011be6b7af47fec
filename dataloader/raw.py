"""Raw images: `load_raw(name, data_dir)` gives the uint8 arrays of a data set, from the first of these that has them.

1. `<data_dir>/<name>.npz`, prepared arrays: the user's own, or the cache that any of the next steps leaves;
2. the set's own files in data_dir, where torchvision looks for them (notMNIST: the released `notmnist.zip`);
3. the same files, downloaded by torchvision (notMNIST's zip: from NOTMNIST_URL) and not kept;
4. a package that carries the same images, see packages.py.

Files that are there but damaged are an error that names them, never a reason to go on with the next step. Of all but prepared
arrays a digest is compared with that of the released data, and nothing is unpickled before.
"""
import contextlib
import hashlib
import os
import pickle
import socket
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np

from dataloader.packages import PACKAGES, read_package, released

KEYS = "x_train", "y_train", "x_test", "y_test"
NOTMNIST_URL = "https://github.com/nkundiushuti/notmnist_convert/raw/master/notmnist.zip"
NOTMNIST_BLOB = "7ee09830b8e387acc5bc730276f14650b1e08437"  # git blob id


class Spec(NamedTuple):
    """What is known of a data set."""
    n_train: int
    n_test: int
    n_classes: int
    shapes: tuple  # that one image may have
    dataset: str | None  # torchvision's class
    files: str  # pattern of its own files in data_dir


SETS = {
    "mnist": Spec(60_000, 10_000, 10, ((28, 28),), "MNIST", "MNIST/raw/*-ubyte"),
    "fashion_mnist": Spec(60_000, 10_000, 10, ((28, 28),), "FashionMNIST", "FashionMNIST/raw/*-ubyte"),
    "cifar10": Spec(50_000, 10_000, 10, ((32, 32, 3),), "CIFAR10", "cifar-10-batches-py/*"),
    "cifar100": Spec(50_000, 10_000, 100, ((32, 32, 3),), "CIFAR100", "cifar-100-python/*"),
    "svhn": Spec(73_257, 26_032, 10, ((32, 32, 3),), "SVHN", "t*_32x32.mat"),
    "notmnist": Spec(16_853, 1_873, 10, ((28, 28), (32, 32)), None, "notmnist.zip"),
}


class DataError(Exception):
    """Images cannot be had, or must not be used as they are. The message is meant for the user."""


class Raw(NamedTuple):
    """A data set: contiguous uint8 images (N, H, W) or (N, H, W, 3) and int64 labels (N,)."""
    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    source: str  # where the images come from; the same whether they were cached in between or not
    complete: bool  # as many training images as the official set has
    digest: str  # of its content, see digest_of

    @property
    def info(self):
        """What a result needs to say about its data."""
        return {"set": self.name, "source": self.source, "complete": self.complete, "digest": self.digest}


def load_raw(name, data_dir):
    """Return the data set called name as Raw, and print what was used. Raises DataError where it cannot be had or used."""
    spec, npz = SETS[name], Path(data_dir) / f"{name}.npz"
    if os.path.exists(npz):
        with refusing(npz), np.load(npz, allow_pickle=False) as content:
            arrays = checked(name, [content[key] for key in KEYS])
            source = one_line(content["note"]) if "note" in content else f"prepared arrays {npz.name}"
        used = f"{npz}: {source}"
    else:
        arrays, source = find(name, npz.parent)
        # In a private folder first, so that the cache never exists half-written; where nothing can be written, there is none.
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix=".download-", dir=npz.parent) as folder:
            np.savez(Path(folder) / npz.name, **arrays, note=source)
            os.replace(Path(folder) / npz.name, npz)
        used = f"{source}, {'now' if os.path.exists(npz) else 'not cached in'} {npz}"
    n_train, n_test = len(arrays["x_train"]), len(arrays["x_test"])
    slack = 0.01 if name == "notmnist" else 0  # how many images its released file holds is known roughly
    complete = abs(n_train - spec.n_train) <= slack * spec.n_train
    print(f"{name}: {n_train:,} train / {n_test:,} test images from {used}")
    if not complete:
        print(f"{name}: not the official {spec.n_train:,} training images: results are not comparable with the paper")
    elif abs(n_test - spec.n_test) > slack * spec.n_test:
        print(f"{name}: not the official {spec.n_test:,} test images: its accuracy is measured on those that are there")
    return Raw(name, **arrays, source=source, complete=complete, digest=digest_of(**arrays))


def digest_of(x_train, y_train, x_test, y_test):
    """16 hexadecimal digits of the training images and labels in their order and the test images and labels in any order."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(x_train)
    digest.update(y_train)
    pairs = (hashlib.blake2b(image.tobytes() + label.tobytes(), digest_size=16).digest() for image, label in zip(x_test, y_test))
    digest.update(b"".join(sorted(pairs)))
    return digest.hexdigest()


def find(name, data_dir):
    """Return the arrays of a data set that has no prepared ones, and their source. Raises DataError."""
    files, tried = SETS[name].files, ""
    if any(data_dir.glob(files)):
        with refusing(data_dir / files):
            return checked(name, read_files(name, data_dir)), f"own files {files}"
    sources = {NOTMNIST_URL if name == "notmnist" else "torchvision's download": download}
    if name in PACKAGES:
        sources[f"package {PACKAGES[name][1]}"] = read_package
    for source, read in sources.items():
        print(f"{name}: trying {source} ...", file=sys.stderr)
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            # Private, so that two processes do not meet, and gone afterwards: nobody can take half a download for a whole.
            with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as folder:
                return checked(name, read(name, Path(folder))), source
        except Exception as error:  # whatever goes wrong on the way, the next source may have the images
            tried += f"  {source}: {one_line(error)}\n"
    raise DataError(f"no images of {name} in the data folder {data_dir}, and none from elsewhere:\n{tried}"
                    f"Put {files} there, as released, or {name}.npz with {', '.join(KEYS)} (uint8 images, integer labels)")


def one_line(error):
    """The error's text, short and on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def refusing(path):
    """Turn whatever reading a file raises (damaged bytes may raise anything) into a DataError that names it."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{path} cannot be used ({one_line(error)}): delete or replace it") from error


def checked(name, arrays):
    """Return {key: array}, contiguous, labels as int64. Raises ValueError where a set of that name does not look like this."""
    spec, good = SETS[name], []
    for split, x, y in ("train", *arrays[:2]), ("test", *arrays[2:]):
        x, y = np.ascontiguousarray(x), np.asarray(y)
        if x.dtype != np.uint8 or x.shape[1:] not in spec.shapes or len(x) == 0:
            shapes = " or ".join(map(str, spec.shapes))
            raise ValueError(f"its {split} images are {x.dtype} {x.shape}, not uint8 (N, ...) with images of {shapes}")
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            raise ValueError(f"its {split} labels are {y.dtype} {y.shape}, not {len(x)} integers")
        if y.min() < 0 or y.max() >= spec.n_classes:
            raise ValueError(f"its {split} labels run from {y.min()} to {y.max()}, not from 0 to {spec.n_classes - 1}")
        good += [x, y.astype(np.int64)]
    return dict(zip(KEYS, good))


def torchvision_datasets():
    """Return torchvision.datasets, also where torchvision's compiled operators do not fit the installed torch.

    There (a CPU torch beside the CUDA wheel, say) the import fails as it registers shape functions for operators that were not
    loaded. Data sets need no operators, so the import is repeated without. It takes a second: only where files are to be read.
    """
    try:
        import torchvision.datasets
    except RuntimeError:
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]  # what is left of the first attempt
        with patch("torch.library.register_fake", lambda *args, **kwargs: lambda function: function):
            import torchvision.datasets
    return torchvision.datasets


def read_files(name, folder, download=False):
    """Return [x_train, y_train, x_test, y_test] of the files in folder, where download has torchvision put them first.

    torchvision compares CIFAR's and SVHN's files with their md5 before it reads them, of MNIST's only what it downloads.
    """
    if name == "notmnist":
        return read_notmnist(folder / "notmnist.zip")
    dataset, arrays = getattr(torchvision_datasets(), SETS[name].dataset), []
    for split in ("train", "test"):
        part = dataset(folder, split if name == "svhn" else split == "train", download=download)
        arrays += [part.data.transpose(0, 2, 3, 1), part.labels] if name == "svhn" else [part.data, part.targets]
    return released(name, arrays) if name in ("mnist", "fashion_mnist") else arrays


def read_notmnist(path):
    """Return the arrays of the released zip: features, one image of grey values 0 .. 255 each in whatever shape, and labels."""
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if blob != NOTMNIST_BLOB:
        raise ValueError(f"its git blob id is {blob}, not {NOTMNIST_BLOB}")
    archive, arrays = zipfile.ZipFile(path), []
    for split in ("train", "test"):
        part = pickle.loads(archive.read(f"notmnist_{split}.pkl"), encoding="latin1")
        x = np.asarray(part["features"])
        if not (x.min() >= 0 and 1 < x.max() <= 255):  # NaN fails as well
            raise ValueError(f"grey values from {x.min()} to {x.max()}")
        side = int(x[0].size ** 0.5)
        arrays += [x.astype(np.uint8).reshape(-1, side, side), np.ravel(part["labels"])]
    return arrays


def download(name, folder):
    """Return the arrays of a data set, downloaded from its own host into folder. Raises whatever goes wrong."""
    socket.setdefaulttimeout(15)  # seconds without an answer: a firewall that drops packets must not hang a run
    if name == "notmnist":
        urllib.request.urlretrieve(NOTMNIST_URL, folder / "notmnist.zip")
    return read_files(name, folder, download=True)
