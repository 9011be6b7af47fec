"""5-Datasets: CIFAR-10, MNIST, SVHN, Fashion-MNIST and notMNIST A-J, ten classes each.

The released code trains on MNIST a second time where the paper says Fashion-MNIST, normalised as
Fashion-MNIST would be; args.official_data does the same.
"""

from functools import partial

import numpy as np

from dataloader.raw import DataError, load_raw
from dataloader.task import Task, canonical_order, normalise, random_split

# Name of the task, data set, mean and standard deviation.
CIFAR10 = (
    "CIFAR-10",
    "cifar10",
    [125.3 / 255, 123.0 / 255, 113.9 / 255],
    [63.0 / 255, 62.1 / 255, 66.7 / 255],
)
MNIST = ("MNIST", "mnist", [0.1], [0.2752])
SVHN = ("SVHN", "svhn", [0.4377, 0.4438, 0.4728], [0.198, 0.201, 0.197])
FASHION_MNIST = ("Fashion-MNIST", "fashion_mnist", [0.2190], [0.3318])
MNIST_AGAIN = ("MNIST again", "mnist", [0.2190], [0.3318])
NOTMNIST = ("notMNIST", "notmnist", [0.4254], [0.4501])


def load(data_dir, args):
    """Return args.n_tasks tasks with inputs (n, 3, 32, 32).

    Reads args.seed, args.pc_valid and args.official_data. Raises DataError.
    """
    fourth = MNIST_AGAIN if args.official_data else FASHION_MNIST
    datasets = [CIFAR10, MNIST, SVHN, fourth, NOTMNIST][: args.n_tasks]
    raw = load_all([name for _, name, _, _ in datasets], data_dir)
    tasks = []
    for t, (title, name, mean, std) in enumerate(datasets):
        images = raw[name]
        everything = np.arange(len(images.x_train))
        train, valid = random_split(everything, args.pc_valid, args.seed, t)
        test = canonical_order(images.x_test, images.y_test)
        preprocess = partial(to_input, mean=mean, std=std)
        tasks.append(Task(title, images, preprocess, train, valid, test))
    return tasks


def load_all(names, data_dir):
    """Return {name: Raw}. Raises one DataError that lists all sets that cannot be used."""
    raw, errors = {}, []
    for name in dict.fromkeys(names):  # MNIST may come twice
        try:
            raw[name] = load_raw(name, data_dir)
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(errors))
    return raw


def to_input(images, mean, std):
    """Normalise uint8 images. Returns float32 (n, 3, 32, 32).

    images: (n, 32, 32, 3), or grey (n, 28, 28) or (n, 32, 32), which are padded with zeros before
    they are normalised, and then repeated.
    """
    if images.ndim == 3:
        border = (32 - images.shape[1]) // 2
        images = np.pad(images, ((0, 0), (border, border), (border, border)))
    return normalise(images, mean, std).expand(-1, 3, -1, -1)
