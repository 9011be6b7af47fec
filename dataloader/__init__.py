"""Data of the four benchmarks: `<benchmark>.load(data_dir, args)` returns a list of tasks.

pmnist, cifar100,
cifar100_superclass,
five_datasets         one benchmark each: which images, which split, which labels
task                  what they return: tensors made on demand from shared uint8 images
raw                   the uint8 images of a data set, wherever they come from
official              reads the files in which a data set was released
packages              reads packages of PyPI and npm that carry such images
"""
