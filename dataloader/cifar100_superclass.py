"""CIFAR-100 Superclass: twenty tasks in one of five orders.

A task is a coarse class of CIFAR-100 with its five fine classes. The images of the released code
are scrambled: it reads rows of 3x32x32 values as 32x32x3, so 0.07 % of the values land where they
belong. The paper's number probably rests on these images; args.official_data asks for them.
"""

import numpy as np

from dataloader.raw import load_raw
from dataloader.task import Task, canonical_order, normalise, random_split

# The coarse classes in CIFAR-100's order, with their fine labels in ascending order.
SUPERCLASSES = (
    ("aquatic mammals", (4, 30, 55, 72, 95)),
    ("fish", (1, 32, 67, 73, 91)),
    ("flowers", (54, 62, 70, 82, 92)),
    ("food containers", (9, 10, 16, 28, 61)),
    ("fruit and vegetables", (0, 51, 53, 57, 83)),
    ("household electrical devices", (22, 39, 40, 86, 87)),
    ("household furniture", (5, 20, 25, 84, 94)),
    ("insects", (6, 7, 14, 18, 24)),
    ("large carnivores", (3, 42, 43, 88, 97)),
    ("large man-made outdoor things", (12, 17, 37, 68, 76)),
    ("large natural outdoor scenes", (23, 33, 49, 60, 71)),
    ("large omnivores and herbivores", (15, 19, 21, 31, 38)),
    ("medium-sized mammals", (34, 63, 64, 66, 75)),
    ("non-insect invertebrates", (26, 45, 77, 79, 99)),
    ("people", (2, 11, 35, 46, 98)),
    ("reptiles", (27, 29, 44, 78, 93)),
    ("small mammals", (36, 50, 65, 74, 80)),
    ("trees", (47, 52, 56, 59, 96)),
    ("vehicles 1", (8, 13, 48, 58, 90)),
    ("vehicles 2", (41, 69, 81, 85, 89)),
)

ORDERS = (
    tuple(range(20)),
    (15, 12, 5, 9, 7, 16, 18, 17, 1, 0, 3, 8, 11, 14, 10, 6, 2, 4, 13, 19),
    (17, 1, 19, 18, 12, 7, 6, 0, 11, 15, 10, 5, 13, 3, 9, 16, 4, 14, 2, 8),
    (11, 9, 6, 5, 12, 4, 0, 10, 13, 7, 14, 3, 15, 16, 8, 1, 2, 19, 18, 17),
    (6, 14, 0, 11, 12, 17, 13, 4, 9, 1, 7, 19, 8, 10, 3, 15, 18, 5, 2, 16),
)


def load(data_dir, args):
    """Return args.n_tasks tasks with inputs (n, 3, 32, 32).

    Reads args.seed, args.pc_valid, args.t_order and args.official_data. Raises DataError.
    """
    raw = load_raw("cifar100", data_dir)
    test_order = canonical_order(raw.x_test, raw.y_test)
    preprocess = scrambled if args.official_data else to_input
    tasks = []
    for t, superclass in enumerate(ORDERS[args.t_order][: args.n_tasks]):
        name, fine_labels = SUPERCLASSES[superclass]
        of_task = np.flatnonzero(np.isin(raw.y_train, fine_labels))
        train, valid = random_split(of_task, args.pc_valid, args.seed, t)
        test = test_order[np.isin(raw.y_test[test_order], fine_labels)]
        within_task = raw._replace(
            y_train=np.searchsorted(fine_labels, raw.y_train),  # the rank of the fine label
            y_test=np.searchsorted(fine_labels, raw.y_test),
        )
        tasks.append(Task(name, within_task, preprocess, train, valid, test))
    return tasks


def to_input(images):
    """Scale uint8 images (n, 32, 32, 3) to [0, 1]. Returns float32 (n, 3, 32, 32)."""
    return normalise(images, mean=[0.0], std=[1.0])


def scrambled(images):
    """Like to_input, but with the values where the released loader puts them."""
    channels_first = images.transpose(0, 3, 1, 2)
    return to_input(channels_first.reshape(images.shape))
