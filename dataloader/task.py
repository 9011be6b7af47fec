"""A task: train, validation and test tensors, made on demand from uint8 images that tasks share."""

import hashlib

import numpy as np
import torch

from dataloader.raw import DataError

CHUNK = 512  # images converted at once: little memory beside the result, and it fits the cache


class Task:
    """A classification task on some of the images of a Raw, whose labels are those of the task.

    train, valid, test: (x, y). x: float32 inputs ready for the network, (n, ...). y: int64 (n,).
        Each is made anew whenever it is asked for: ten tasks on MNIST cost the memory of one.
    n_train, n_valid, n_test: their lengths.
    summary: what a result says about its data: set, source, complete, digest, and the lengths.
    """

    def __init__(self, name, raw, to_input, train, valid, test):
        """Raises DataError if there are no training or no test images.

        to_input: function from uint8 images (n, ...) to inputs.
        train, valid, test: positions in the training or test images of raw.
        """
        for positions, kind in (train, "training"), (test, "test"):
            if len(positions) == 0:
                origin = f"{raw.name} ({raw.source})"
                raise DataError(f"{origin} has no {kind} images for the task {name!r}")
        self.name = name
        self.n_train, self.n_valid, self.n_test = len(train), len(valid), len(test)
        self.summary = {
            "set": raw.name,
            "source": raw.source,
            "complete": raw.complete,
            "digest": raw.digest,
            "train": self.n_train,
            "valid": self.n_valid,
            "test": self.n_test,
        }
        self._raw = raw
        self._to_input = to_input
        self._train, self._valid, self._test = train, valid, test

    @property
    def train(self):
        """The training part."""
        return self._tensors(self._raw.x_train, self._raw.y_train, self._train)

    @property
    def valid(self):
        """The validation part, taken from the training images."""
        return self._tensors(self._raw.x_train, self._raw.y_train, self._valid)

    @property
    def test(self):
        """The test part."""
        return self._tensors(self._raw.x_test, self._raw.y_test, self._test)

    def _tensors(self, images, labels, positions):
        # Indexing with an array or a list copies: torch warns about read-only arrays.
        shape = self._to_input(images[[0]]).shape[1:]
        x = torch.empty(len(positions), *shape)
        for start in range(0, len(x), CHUNK):
            chunk = slice(start, start + CHUNK)
            x[chunk] = self._to_input(images[positions[chunk]])
        return x, torch.from_numpy(labels[positions])


def normalise(images, mean, std):
    """(x / 255 - mean) / std, bit for bit as torchvision's ToTensor and Normalize compute it.

    images: uint8 (n, H, W) or (n, H, W, C). mean, std: lists with one number per channel.
    Returns float32 (n, C, H, W).
    """
    with_channels = images.reshape(*images.shape[:3], -1)
    x = torch.from_numpy(with_channels).permute(0, 3, 1, 2)
    x = x.to(torch.float32, memory_format=torch.contiguous_format)
    mean = torch.tensor(mean).view(-1, 1, 1)
    std = torch.tensor(std).view(-1, 1, 1)
    return x.div_(255).sub_(mean).div_(std)


def canonical_order(x, y):
    """Positions that sort images x (N, ...) by a digest of their bytes, equal ones by label y (N,).

    This order mixes the classes and does not depend on how a file stores the images. BatchNorm
    normalises a test batch with its own statistics, so in the order of a file that is sorted by
    class the accuracy would be far lower.
    """
    digests = [hashlib.blake2b(image, digest_size=16).digest() for image in x]
    return np.array(sorted(range(len(x)), key=lambda i: (digests[i], y[i])))


def split(positions, pc_valid):
    """Split positions into a training part and a validation part, which comes first in them.

    pc_valid: fraction for validation, between 0 and 1. DataError if it amounts to no image.
    """
    n = len(positions)
    n_valid = int(pc_valid * n)
    if n > 0 and n_valid == 0:
        images = f"a task's {n} training images"
        raise DataError(f"a validation share of {pc_valid} is less than one of {images}")
    return positions[n_valid:], positions[:n_valid]


def random_split(positions, pc_valid, seed, task):
    """Like split, after a shuffle that depends only on the seed and the number of the task."""
    return split(np.random.default_rng([seed, task]).permutation(positions), pc_valid)
