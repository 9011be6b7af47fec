"""5-Datasets: CIFAR-10, MNIST, SVHN, Fashion-MNIST and notMNIST A-J, ten classes each.

The released code trains on MNIST a second time where the paper says Fashion-MNIST, normalised as Fashion-MNIST would be;
args.official_data does the same.
"""
from functools import partial

import numpy as np

from dataloader.raw import DataError, load_raw
from dataloader.task import Task, canonical_order, normalise, random_split

# Name of the task, data set, mean and standard deviation (those of the 28x28 sets are applied to the padding as well).
DATASETS = (
    ("CIFAR-10", "cifar10", [125.3 / 255, 123.0 / 255, 113.9 / 255], [63.0 / 255, 62.1 / 255, 66.7 / 255]),
    ("MNIST", "mnist", [0.1], [0.2752]),
    ("SVHN", "svhn", [0.4377, 0.4438, 0.4728], [0.198, 0.201, 0.197]),
    ("Fashion-MNIST", "fashion_mnist", [0.2190], [0.3318]),
    ("notMNIST", "notmnist", [0.4254], [0.4501]),
)


def load(data_dir, args):
    """Return args.n_tasks tasks, inputs (n, 3, 32, 32). Reads args.seed, pc_valid, official_data. Raises DataError."""
    datasets = list(DATASETS)
    if args.official_data:
        datasets[3] = "MNIST again", "mnist", *DATASETS[3][2:]
    raw, errors = {}, []
    for name in dict.fromkeys(name for _, name, _, _ in datasets[: args.n_tasks]):
        try:
            raw[name] = load_raw(name, data_dir)
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(errors))
    tasks = []
    for t, (title, name, mean, std) in enumerate(datasets[: args.n_tasks]):
        train, valid = random_split(np.arange(len(raw[name].x_train)), args.pc_valid, args.seed, t)
        test = canonical_order(raw[name].x_test, raw[name].y_test)
        tasks.append(Task(title, raw[name], partial(to_input, mean=mean, std=std), train, valid, test))
    return tasks


def to_input(images, mean, std):
    """float32 (n, 3, 32, 32) of uint8 (n, 32, 32, 3), or of grey (n, 28, 28), (n, 32, 32): zero-padded first, repeated last."""
    if images.ndim == 3:
        border = (32 - images.shape[1]) // 2
        images = np.pad(images, ((0, 0), (border, border), (border, border)))
    return normalise(images, mean, std).expand(-1, 3, -1, -1)
