"""10-split CIFAR-100: ten tasks, task t has the fine labels 10t .. 10t+9 as its classes 0 .. 9."""
import numpy as np

from dataloader.raw import load_raw
from dataloader.task import Part, Task, canonical_order, normalise, random_split

MEAN, STD = [125.3 / 255, 123.0 / 255, 113.9 / 255], [63.0 / 255, 62.1 / 255, 66.7 / 255]


def load(data_dir, args):
    """Return the first args.n_tasks tasks; inputs are (n, 3, 32, 32). Also reads args.seed and args.pc_valid. Raises DataError."""
    raw = load_raw("cifar100", data_dir)
    test_order = canonical_order(raw.x_test, raw.y_test)
    task_train, y_train = np.divmod(raw.y_train, 10)
    task_test, y_test = np.divmod(raw.y_test, 10)
    tasks = []
    for t in range(args.n_tasks):
        train, valid = random_split(np.flatnonzero(task_train == t), args.pc_valid, args.seed, t)
        test = test_order[task_test[test_order] == t]
        tasks.append(Task(f"classes {10 * t}-{10 * t + 9}", raw.info, to_input, Part(raw.x_train, y_train, train),
                          Part(raw.x_train, y_train, valid), Part(raw.x_test, y_test, test)))
    return tasks


def to_input(images):
    """float32 (n, 3, 32, 32) of uint8 images (n, 32, 32, 3), normalised."""
    return normalise(images, MEAN, STD)
