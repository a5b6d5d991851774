"""A small generated set in CIFAR-10's own format on disk, and a mark for tests that need the real one."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from lib.cifar import dataset

PER_FILE = 60
TEST_SIZE = 90

needs_cifar10 = pytest.mark.skipif(
    not dataset.is_available(), reason="CIFAR-10 is not on this machine: set CIFAR10_ROOT to the folder that holds it"
)


def write_set(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write five training files and a test file of learnable images, and let torchvision know their md5s.

    An image of class c is noise around a grey level, with a bright square at a place that depends on c.
    """
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    meta = {"label_names": list(dataset.CLASSES), "num_vis": 3072}
    sums = {}

    def dump(name: str, content: dict) -> None:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()

    def draw_images(size: int) -> dict:
        labels = random.integers(10, size=size)
        pixels = random.integers(60, 120, size=(size, 3, 32, 32))
        for image, label in zip(pixels, labels, strict=True):
            row, column = 8 * (label // 4) + 4, 8 * (label % 4)
            image[:, row : row + 8, column : column + 8] += 120
        return {"data": pixels.astype(np.uint8).reshape(size, 3072), "labels": labels.tolist()}

    for number in range(1, 6):
        dump(f"data_batch_{number}", draw_images(PER_FILE))
    dump("test_batch", draw_images(TEST_SIZE))
    dump("batches.meta", meta)
    monkeypatch.setattr(CIFAR10, "train_list", [(name, sums[name]) for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [(name, sums[name]) for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    monkeypatch.setenv("CIFAR10_ROOT", str(root))
    return root
