"""The files in which the data sets were released: where they lie, their digests and formats.

They lie where torchvision puts them. A file that is still packed, as it comes from the set's host,
is read from its archive. Each file is compared with its digest before it is read: CIFAR's and
notMNIST's are pickles, and a pickle can run code.
"""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import numpy as np

from dataloader.errors import DataError, refusing


def locate(name, data_dir):
    """Find the files of a data set. Returns {file: path of the file or of its archive}."""
    release = RELEASES[name]
    found = {}
    for file in release.files:
        for place in file, release.archive.format(file):
            if os.path.exists(data_dir / place):
                found[file] = data_dir / place
                break
    return found


def read_official(name, data_dir):
    """Return [x_train, y_train, x_test, y_test] from the files of a data set.

    Raises DataError, which names the file, if one is damaged or missing.
    """
    release = RELEASES[name]
    found = locate(name, data_dir)
    for file in release.files:
        if file not in found:
            missing = f"{data_dir / file} is missing, unlike other files of {name}"
            raise DataError(f"{missing}: put it there, or delete those")
    arrays = []
    for path, files in groupby(release.files, found.get):  # an archive is unpacked once
        with refusing(path):
            for file, content in unpacked(path, files):
                digest, expected = release.digest(content), release.files[file]
                if digest != expected:
                    raise ValueError(f"its digest is {digest}, that of {file} {expected}")
                arrays += release.read(content)
    *train, x_test, y_test = arrays
    return [np.concatenate(train[0::2]), np.concatenate(train[1::2]), x_test, y_test]


def unpacked(path, files):
    """Yield (file, content) for each of the files. path: the file, or the archive with all."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if path.name.endswith(".tar.gz"):
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for file in files:
                yield file, archive.extractfile(file).read()
    else:
        (file,) = files
        yield file, content


def md5(content):
    """The digest that torchvision uses."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def git_blob_id(content):
    """The digest that git uses."""
    header = b"blob %d\0" % len(content)
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()


def read_idx(content):
    """MNIST, Fashion-MNIST: bytes after a header, which has the shape. Returns [array]."""
    n_dims = content[3]
    shape = np.frombuffer(content, ">u4", n_dims, offset=4)
    return [np.frombuffer(content, np.uint8, offset=4 + 4 * n_dims).reshape(shape)]


def read_cifar(content):
    """CIFAR: a pickle with rows of 3 x 32 x 32 values. Returns [images, labels]."""
    batch = pickle.loads(content, encoding="latin1")
    labels = batch["fine_labels"] if "fine_labels" in batch else batch["labels"]
    return [batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels]


def read_svhn(content):
    """SVHN: X (32, 32, 3, N) and y (N, 1), in which 10 is the digit 0. Returns [images, labels]."""
    from scipy.io import loadmat

    mat = loadmat(io.BytesIO(content))
    return [mat["X"].transpose(3, 0, 1, 2), mat["y"].ravel() % 10]


def read_notmnist(content):
    """notMNIST: a zip of two pickles. Returns [x_train, y_train, x_test, y_test].

    The features are grey values 0 .. 255 of square images, of any type and layout.
    """
    archive = zipfile.ZipFile(io.BytesIO(content))
    arrays = []
    for split in "train", "test":
        part = pickle.loads(archive.read(f"notmnist_{split}.pkl"), encoding="latin1")
        x = np.asarray(part["features"])
        if not (x.min() >= 0 and 1 < x.max() <= 255):  # NaN fails as well
            raise ValueError(f"grey values from {x.min()} to {x.max()}")
        side = int(x[0].size ** 0.5)
        arrays += [x.astype(np.uint8).reshape(-1, side, side), np.ravel(part["labels"])]
    return arrays


class Release(NamedTuple):
    """The files of a data set."""

    files: dict[str, str]  # {path below the data folder: digest}, training files first
    archive: str  # path of the archive; {} stands for the file's path
    summary: str  # the files and archives in words, for messages
    read: Callable  # from a file's content to its arrays, images before labels
    digest: Callable = md5


RELEASES = {
    "mnist": Release(
        files={
            "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
        archive="{}.gz",
        summary="MNIST/raw/*-ubyte or *-ubyte.gz",
        read=read_idx,
    ),
    "fashion_mnist": Release(
        files={
            "FashionMNIST/raw/train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "FashionMNIST/raw/train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
            "FashionMNIST/raw/t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
            "FashionMNIST/raw/t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
        },
        archive="{}.gz",
        summary="FashionMNIST/raw/*-ubyte or *-ubyte.gz",
        read=read_idx,
    ),
    "cifar10": Release(
        files={
            "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
            "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
            "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
        },
        archive="cifar-10-python.tar.gz",
        summary="cifar-10-python.tar.gz or cifar-10-batches-py/*",
        read=read_cifar,
    ),
    "cifar100": Release(
        files={
            "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
            "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        },
        archive="cifar-100-python.tar.gz",
        summary="cifar-100-python.tar.gz or cifar-100-python/*",
        read=read_cifar,
    ),
    "svhn": Release(
        files={
            "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
        },
        archive="{}",  # released unpacked
        summary="train_32x32.mat and test_32x32.mat",
        read=read_svhn,
    ),
    "notmnist": Release(
        files={"notmnist.zip": "7ee09830b8e387acc5bc730276f14650b1e08437"},
        archive="{}",
        summary="notmnist.zip",
        read=read_notmnist,
        digest=git_blob_id,
    ),
}
