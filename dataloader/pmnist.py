"""Permuted MNIST: ten tasks, the ten digits with their pixels in ten different orders.

All tasks share the labels. The validation part is the first tenth of the training images,
unshuffled: 54,000 / 6,000 / 10,000 by default.
"""

from functools import partial

import numpy as np
import torch

from dataloader.raw import load_raw
from dataloader.task import Task, canonical_order, normalise, split

MEAN, STD = [0.1307], [0.3081]


def load(data_dir, args):
    """Return args.n_tasks tasks with inputs (n, 784). Reads args.seed and args.pc_valid.

    Raises DataError.
    """
    raw = load_raw("mnist", data_dir)
    train, valid = split(np.arange(len(raw.x_train)), args.pc_valid)
    test = canonical_order(raw.x_test, raw.y_test)
    tasks = []
    for t in range(args.n_tasks):
        # A generator per task: the first tasks are the same however many follow.
        pixels = np.random.default_rng([args.seed, t]).permutation(28 * 28)
        to_input = partial(permuted, pixels=torch.from_numpy(pixels))
        tasks.append(Task(f"permutation {t + 1}", raw, to_input, train, valid, test))
    return tasks


def permuted(images, pixels):
    """Normalise uint8 images (n, 28, 28) and permute their pixels. Returns float32 (n, 784).

    pixels: int64 tensor (784,). Input i is pixel pixels[i].
    """
    return normalise(images, MEAN, STD).flatten(1).index_select(1, pixels)
