"""10-split CIFAR-100: ten tasks. Task t has the fine labels 10t .. 10t+9 as its classes 0 .. 9."""

import numpy as np

from dataloader.raw import load_raw
from dataloader.task import Task, canonical_order, normalise, random_split

MEAN = [125.3 / 255, 123.0 / 255, 113.9 / 255]
STD = [63.0 / 255, 62.1 / 255, 66.7 / 255]


def load(data_dir, args):
    """Return args.n_tasks tasks with inputs (n, 3, 32, 32). Reads args.seed and args.pc_valid.

    Raises DataError.
    """
    raw = load_raw("cifar100", data_dir)
    test_order = canonical_order(raw.x_test, raw.y_test)
    within_task = raw._replace(y_train=raw.y_train % 10, y_test=raw.y_test % 10)
    tasks = []
    for t in range(args.n_tasks):
        name = f"classes {10 * t}-{10 * t + 9}"
        of_task = np.flatnonzero(raw.y_train // 10 == t)
        train, valid = random_split(of_task, args.pc_valid, args.seed, t)
        test = test_order[raw.y_test[test_order] // 10 == t]
        tasks.append(Task(name, within_task, to_input, train, valid, test))
    return tasks


def to_input(images):
    """Normalise uint8 images (n, 32, 32, 3). Returns float32 (n, 3, 32, 32)."""
    return normalise(images, MEAN, STD)
