import numpy as np
import pytest
import torch
from cifar_set import PER_FILE, TEST_SIZE, needs_cifar10, write_set
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import functional as TF

from lib import cifar


def test_loads_the_format_on_disk(tmp_path, monkeypatch):
    root = write_set(tmp_path, monkeypatch)
    images = cifar.load(train=True)
    reference = CIFAR10(root, train=True)
    assert images.pixels.shape == (5 * PER_FILE, 3, 32, 32)
    assert images.pixels.dtype == torch.uint8
    assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), reference.data)
    assert images.labels.tolist() == reference.targets
    assert len(cifar.load(train=False)) == TEST_SIZE
    assert len(cifar.load(train=False, limit=7)) == 7


def test_missing_and_damaged_sets_get_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(cifar.DataNotFoundError, match=r"nowhere: put the folder cifar-10-batches-py .* CIFAR10_ROOT"):
        cifar.load(train=True)
    assert not (tmp_path / "nowhere").exists()  # a folder that is given is never written to

    root = write_set(tmp_path / "set", monkeypatch)
    damaged = root / CIFAR10.base_folder / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(cifar.DataNotFoundError, match="not found whole"):
        cifar.load(train=True)


def test_failed_download_says_where_to_put_the_set(tmp_path, monkeypatch):
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.setattr(cifar.paths, "ROOT", tmp_path)
    monkeypatch.setattr(CIFAR10, "download", lambda self: (_ for _ in ()).throw(OSError("no route to host")))
    with pytest.raises(cifar.DataNotFoundError, match=r"the download failed \(no route to host\): put the folder"):
        cifar.load(train=True)


def test_augmentation_is_border_crop_flip_of_each_image():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (162, 3, 32, 32), generator=generator, dtype=torch.uint8)
    # Every shift with and without flip.
    shifts = torch.cartesian_prod(torch.arange(9), torch.arange(9)).repeat(2, 1)
    flips = torch.arange(162) >= 81
    augmented = cifar.augment(pixels, shifts, flips)
    for image, (row, column), flip, result in zip(pixels, shifts.tolist(), flips, augmented, strict=True):
        expected = TF.crop(TF.pad(image, 4), row, column, 32, 32)
        assert torch.equal(result, TF.hflip(expected) if flip else expected)


def test_normalisation_is_the_usual_one():
    pixels = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    expected = TF.normalize(TF.to_tensor(picture), cifar.MEAN, cifar.STD)
    torch.testing.assert_close(cifar.normalise(pixels)[0], expected, rtol=0, atol=2e-6)


def test_choices_of_an_epoch_are_uniform_and_seeded():
    size = 81 * 2 * 100
    epoch = cifar.draw_epoch(size, torch.Generator().manual_seed(3))
    assert torch.equal(epoch.order.sort().values, torch.arange(size))
    cell = (epoch.shifts[:, 0] * 9 + epoch.shifts[:, 1]) * 2 + epoch.flips
    counts = torch.bincount(cell, minlength=162).double()
    # Pearson's statistic: chi-square with 161 degrees of freedom, standard deviation 18 around 161.
    assert abs(((counts - 100).square() / 100).sum() - 161) < 5 * 18
    again = cifar.draw_epoch(size, torch.Generator().manual_seed(3))
    other = cifar.draw_epoch(size, torch.Generator().manual_seed(4))
    assert torch.equal(epoch.order, again.order)
    assert torch.equal(epoch.shifts, again.shifts)
    assert not torch.equal(epoch.order, other.order)


def test_batches_cover_the_set_once():
    n = 50
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 32, 32).contiguous()
    images = cifar.Images(pixels, torch.arange(n))
    epoch = cifar.draw_epoch(n, torch.Generator().manual_seed(0))
    batches = [cifar.batch(images, epoch, start, 16) for start in range(0, n, 16)]
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    assert torch.cat([labels for _, labels in batches]).sort().values.tolist() == list(range(n))
    # The centre pixel, which no crop can lose, still belongs to its label.
    for chosen, labels in batches:
        level = (chosen[:, 0, 16, 16] * cifar.STD[0] + cifar.MEAN[0]) * 255
        torch.testing.assert_close(level, labels.float(), rtol=0, atol=1e-3)


@needs_cifar10
def test_the_real_set():
    train, test = cifar.load(train=True, download=False), cifar.load(train=False, download=False)
    assert (len(train), len(test)) == (50_000, 10_000)
    assert torch.bincount(train.labels).tolist() == [5000] * 10
    # The normalisation's mean is the training set's.
    mean = train.pixels[::10].float().mean(dim=(0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor(cifar.MEAN), rtol=0, atol=5e-3)
