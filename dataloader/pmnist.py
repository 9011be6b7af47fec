"""Permuted MNIST: ten tasks, the ten digits with the pixels in ten different orders. One label space for all.

The validation part is the first share of the training images, unshuffled: 54,000 / 6,000 / 10,000 by default.
"""
import numpy as np
import torch

from dataloader.raw import load_raw
from dataloader.task import Task, canonical_order, normalise, split

MEAN, STD = [0.1307], [0.3081]


def load(data_dir, args):
    """Return args.n_tasks tasks, inputs (n, 784). Reads args.seed, pc_valid. Raises DataError."""
    raw = load_raw("mnist", data_dir)
    train, valid = split(np.arange(len(raw.x_train)), args.pc_valid)
    test = canonical_order(raw.x_test, raw.y_test)
    tasks = []
    for t in range(args.n_tasks):
        # A generator per task: the first tasks are the same however many follow.
        pixels = torch.from_numpy(np.random.default_rng([args.seed, t]).permutation(28 * 28))
        tasks.append(Task(f"permutation {t + 1}", raw, lambda x, pixels=pixels: permuted(x, pixels), train, valid, test))
    return tasks


def permuted(images, pixels):
    """float32 (n, 784) of uint8 images (n, 28, 28): normalised, then input i is pixel pixels[i] (int64 tensor)."""
    return normalise(images, MEAN, STD).flatten(1).index_select(1, pixels)
