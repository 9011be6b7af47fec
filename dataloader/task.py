"""A task: train, validation and test tensors, made on demand from uint8 images that all tasks of a set share."""
import hashlib

import numpy as np
import torch

from dataloader.raw import DataError

CHUNK = 512  # images converted at once: what is needed beside the result stays small, and in the processor's cache


class Task:
    """A classification task: some of the images of raw, a Raw whose labels are those within the task.

    train, valid, test: (x, y), float32 inputs ready for the network, (n, ...), and int64 labels, (n,). A part is made anew each
    time it is asked for and not kept: ten tasks on MNIST's images cost what one does. n_train, n_valid, n_test: their lengths.
    summary: what a result says of them: the set, from where, whether complete, its digest, and the three lengths.
    """

    def __init__(self, name, raw, to_input, train, valid, test):
        """to_input: function from uint8 images (n, ...) to inputs. train, valid, test: positions in raw. Raises DataError."""
        for index, kind in (train, "training"), (test, "test"):
            if len(index) == 0:
                raise DataError(f"{raw.name} ({raw.source}) has no {kind} images for the task {name!r}")
        self.name, self._raw, self._to_input = name, raw, to_input
        self._index = {"train": train, "valid": valid, "test": test}
        self.n_train, self.n_valid, self.n_test = len(train), len(valid), len(test)
        self.summary = {**raw.info, "train": self.n_train, "valid": self.n_valid, "test": self.n_test}

    train = property(lambda self: self._tensors("train"))
    valid = property(lambda self: self._tensors("valid"))
    test = property(lambda self: self._tensors("test"))

    def _tensors(self, part):
        index, raw = self._index[part], self._raw
        images, labels = (raw.x_test, raw.y_test) if part == "test" else (raw.x_train, raw.y_train)
        # Indexing with a list copies the images: torch warns of arrays that are read-only, as a reader may leave them
        x = torch.empty(len(index), *self._to_input(images[[0]]).shape[1:])
        for start in range(0, len(x), CHUNK):
            x[start:start + CHUNK] = self._to_input(images[index[start:start + CHUNK]])
        return x, torch.from_numpy(labels[index])


def normalise(images, mean, std):
    """(x / 255 - mean) / std, bit for bit what torchvision's ToTensor and Normalize give.

    images: uint8 (n, H, W) or (n, H, W, C); mean, std: numbers, one per channel. Returns float32 (n, C, H, W).
    """
    x = torch.from_numpy(images.reshape(*images.shape[:3], -1)).permute(0, 3, 1, 2)
    x = x.to(torch.float32, memory_format=torch.contiguous_format)
    return x.div_(255).sub_(torch.tensor(mean).view(-1, 1, 1)).div_(torch.tensor(std).view(-1, 1, 1))


def canonical_order(x, y):
    """Positions that sort images x (N, ...) by a digest of their bytes, equal images by label y (N,).

    The order mixes the classes and does not depend on how a file stores the images. BatchNorm normalises a test batch with
    its own statistics, so with the file's order a file sorted by class would give another accuracy, and a far worse one.
    """
    digests = [hashlib.blake2b(image, digest_size=16).digest() for image in x]
    return np.array(sorted(range(len(x)), key=lambda i: (digests[i], y[i])))


def split(order, pc_valid):
    """Split positions into a training part and, first in order, a validation part of the share pc_valid, 0 < pc_valid < 1.

    Raises DataError where the share is so small that it comes to no image.
    """
    n_valid = int(pc_valid * len(order))
    if n_valid == 0 < pc_valid * len(order):
        raise DataError(f"a validation share of {pc_valid} is less than one of a task's {len(order)} training images")
    return order[n_valid:], order[:n_valid]


def random_split(index, pc_valid, seed, task):
    """Like split, after a shuffle that depends on the seed and the number of the task only."""
    return split(np.random.default_rng([seed, task]).permutation(index), pc_valid)
