"""5-Datasets: CIFAR-10, MNIST, SVHN, Fashion-MNIST and notMNIST A-J, ten classes each.

The released code trains on MNIST a second time where the paper says Fashion-MNIST, normalised as Fashion-MNIST would be;
args.official_data does the same.
"""
from functools import partial

import numpy as np

from dataloader.raw import DataError, load_raw
from dataloader.task import Part, Task, canonical_order, normalise, random_split

# Name of the task, data set, mean and standard deviation (those of the 28x28 sets are applied to the padding as well).
DATASETS = (
    ("CIFAR-10", "cifar10", [125.3 / 255, 123.0 / 255, 113.9 / 255], [63.0 / 255, 62.1 / 255, 66.7 / 255]),
    ("MNIST", "mnist", [0.1], [0.2752]),
    ("SVHN", "svhn", [0.4377, 0.4438, 0.4728], [0.198, 0.201, 0.197]),
    ("Fashion-MNIST", "fashion_mnist", [0.2190], [0.3318]),
    ("notMNIST", "notmnist", [0.4254], [0.4501]),
)
OFFICIAL = {"fashion_mnist": ("MNIST again", "mnist", [0.2190], [0.3318])}


def load(data_dir, args):
    """Return the first args.n_tasks tasks, of whose data sets no others are needed; inputs are (n, 3, 32, 32).

    Also reads args.seed, args.pc_valid and args.official_data. Raises DataError, which says what was found of each data set,
    where one is missing.
    """
    datasets = [OFFICIAL.get(dataset[1], dataset) if args.official_data else dataset for dataset in DATASETS[: args.n_tasks]]
    raw = load_all([name for _, name, _, _ in datasets], data_dir)
    tasks = []
    for t, (title, name, mean, std) in enumerate(datasets):
        x_train, y_train, x_test, y_test = raw[name].x_train, raw[name].y_train, raw[name].x_test, raw[name].y_test
        train, valid = random_split(np.arange(len(x_train)), args.pc_valid, args.seed, t)
        tasks.append(Task(title, raw[name].info, partial(to_input, mean=mean, std=std), Part(x_train, y_train, train),
                          Part(x_train, y_train, valid), Part(x_test, y_test, canonical_order(x_test, y_test))))
    return tasks


def load_all(names, data_dir):
    """Return {name: Raw}. Raises DataError with a line on each data set where one cannot be had."""
    raw, lines = {}, []
    for name in dict.fromkeys(names):
        try:
            raw[name] = load_raw(name, data_dir)
            lines.append(f"{name}: {len(raw[name].x_train):,} / {len(raw[name].x_test):,} images, {raw[name].source}")
        except DataError as error:
            lines.append(f"{name}: {error}")
    if len(raw) < len(lines):
        raise DataError(f"{len(lines) - len(raw)} of {len(lines)} data sets cannot be had:\n" + "\n".join(lines))
    return raw


def to_input(images, mean, std):
    """float32 (n, 3, 32, 32) of uint8 images (n, 28, 28), (n, 32, 32) or (n, 32, 32, 3).

    Grey images are zero-padded to 32x32, normalised and repeated to three channels.
    """
    if images.ndim == 3:
        border = (32 - images.shape[1]) // 2
        images = np.pad(images, ((0, 0), (border, border), (border, border)))
    return normalise(images, mean, std).expand(-1, 3, -1, -1)
