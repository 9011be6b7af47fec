"""Small data sets in the files that the real ones come in, for tests."""
import gzip
import hashlib
import io
import pickle
import zipfile

import numpy as np
from scipy.io import savemat

from dataloader import raw


def small_arrays(name, n_train, n_test, seed=0):
    """Arrays as load_raw returns them: as many images of each class as of any other, no two alike, a class easy to tell."""
    rng = np.random.default_rng(seed)
    spec = raw.SETS[name]
    prototypes = rng.integers(0, 192, (spec.n_classes, *spec.shapes[0]))
    arrays = {}
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


def write_own_files(folder, name, arrays, monkeypatch, packed=False):
    """Write the set's own files into folder, and have their digests expected. packed: idx.gz instead of idx. Returns the paths."""
    if name == "notmnist":
        return [write_notmnist(folder, arrays, monkeypatch)]
    dataset = getattr(raw.torchvision_datasets(), raw.SETS[name].dataset)
    if name in ("mnist", "fashion_mnist"):
        folder, suffix = folder / dataset.__name__ / "raw", ".gz" if packed else ""
        pack = gzip.compress if packed else bytes
        contents = {file + suffix: pack(idx(arrays[key])) for key, file in raw.IDX_FILES.items()}
        if packed:
            monkeypatch.setattr(dataset, "resources", [(file, md5(content)) for file, content in contents.items()])
    elif name == "svhn":
        contents = {f"{split}_32x32.mat": svhn(*xy) for split, xy in splits(arrays)}
        monkeypatch.setattr(dataset, "split_list", {file.split("_")[0]: ["no host", file, md5(content)]
                                                    for file, content in contents.items()})
    else:
        folder = folder / dataset.base_folder
        (_, (x, y)), (_, test) = splits(arrays)
        if name == "cifar10":
            batches = zip(np.array_split(x, 5), np.array_split(y, 5))
            contents = {f"data_batch_{i}": cifar(*batch, "labels") for i, batch in enumerate(batches, start=1)}
            contents["test_batch"] = cifar(*test, "labels")
        else:
            contents = {"train": cifar(x, y, "fine_labels"), "test": cifar(*test, "fine_labels")}
        digests = [[file, md5(content)] for file, content in contents.items()]
        monkeypatch.setattr(dataset, "train_list", digests[:-1])
        monkeypatch.setattr(dataset, "test_list", digests[-1:])
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    return [folder / file for file in contents]


def write_notmnist(folder, arrays, monkeypatch, **pickles):
    """Write notmnist.zip and have its blob id expected. pickles: what to store in place of a split's features and labels."""
    path = folder / "notmnist.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, (x, y) in splits(arrays):
            part = pickles.get(split, {"features": x[:, None].astype(np.float32), "labels": y})
            archive.writestr(f"notmnist_{split}.pkl", pickle.dumps(part, protocol=2))
    content = path.read_bytes()
    monkeypatch.setattr(raw, "NOTMNIST_BLOB", hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
    return path


def splits(arrays):
    return [(split, (arrays[f"x_{split}"], arrays[f"y_{split}"])) for split in ("train", "test")]


def md5(content):
    return hashlib.md5(content).hexdigest()


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
