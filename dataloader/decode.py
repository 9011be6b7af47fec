"""Decoders of the file formats that the data sets are released in: bytes in, arrays out.

Images come out as uint8, (N, H, W) or (N, H, W, 3), labels as integers, (N,). Damaged content ends in an exception of some
kind (ValueError where it is noticed here); only the caller knows the file and can name it.
"""
import io
import math
import pickle
import zipfile

import numpy as np


def idx(content):
    """Return the array of an idx file of unsigned bytes (MNIST's format), of whatever shape its header says."""
    if content[:3] != b"\0\0\x08":
        raise ValueError("not an idx file of unsigned bytes")
    n_dims = content[3]
    start = 4 + 4 * n_dims
    shape = [int(n) for n in np.frombuffer(content[4:start], ">u4")]
    if len(content) != start + math.prod(shape):
        raise ValueError(f"{len(content):,} bytes where its header announces {start + math.prod(shape):,}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def cifar(content):
    """Return images and labels (CIFAR-100: fine labels) of a batch of CIFAR, a pickle with rows of 3x32x32 values."""
    batch = unpickle(content)
    labels = batch["fine_labels"] if "fine_labels" in batch else batch["labels"]
    return batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.asarray(labels)


def svhn(content):
    """Return images and labels of an SVHN .mat file. The digit 0 is stored there as class 10."""
    from scipy.io import loadmat  # slow to import, and needed once in the life of a data folder

    mat = loadmat(io.BytesIO(content))
    labels = mat["y"].ravel().astype(np.int64)
    labels[labels == 10] = 0
    return mat["X"].transpose(3, 0, 1, 2), labels


def notmnist(content, split):
    """Return images and labels of one split ("train" or "test") of the released notmnist.zip.

    Its pickles hold `features`: grey values 0..255 (or 0..1) of any number type, one image of 28x28 or 32x32 each, with or
    without an axis for the channel, flat or not; and `labels`: classes 0..9. Which of these the file holds is not verified.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        part = unpickle(archive.read(f"notmnist_{split}.pkl"))
    features, labels = np.asarray(part["features"]), np.asarray(part["labels"]).ravel()
    if features.dtype != np.uint8:
        scale = 255 if features.dtype.kind == "f" and features.max() <= 1 else 1
        features = np.rint(features * scale)
        if not (features.min() >= 0 and features.max() <= 255):  # NaN fails as well
            raise ValueError(f"grey values from {features.min()} to {features.max()}")
    side = math.isqrt(features[0].size)
    return features.astype(np.uint8).reshape(-1, side, side), labels.astype(np.int64)


def unpickle(content):
    """Return what a pickle holds: numpy's arrays and numbers in Python's containers, else an UnpicklingError."""
    return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()


class _ArrayUnpickler(pickle.Unpickler):
    """A pickle may name any function to be called on loading: only those that numpy names for its arrays are let in."""

    admitted = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy.core.multiarray", "scalar"): np.float64(0).__reduce__()[0],
        ("numpy.core.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],
        # Bytes, as Python 3 writes them in the protocols that Python 2 can read.
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
    }

    def find_class(self, module, name):
        key = module.replace("numpy._core", "numpy.core"), name  # numpy 2 renamed it
        if key not in self.admitted:
            raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}, which is no numpy array")
        return self.admitted[key]
