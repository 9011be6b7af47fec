"""Data of the four benchmarks: `<benchmark>.load(data_dir, args)` returns the list of tasks that a script iterates over.

    pmnist, cifar100, cifar100_superclass, five_datasets   one benchmark each: which images, which split, which labels
    task                                                   what they return: tensors made on demand from shared bytes
    raw                                                    uint8 images of a data set, from wherever they can be had
    packages                                               the last of these places: packages that carry such images
"""
