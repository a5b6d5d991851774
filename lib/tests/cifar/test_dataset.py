import hashlib
import http.server
import re
import shutil
import tarfile
import threading

import numpy as np
import pytest
import torch
from cifar_set import PER_FILE, TEST_SIZE, needs_cifar10, write_set
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms import functional as TF

from lib.cifar import dataset


def test_loads_the_format_on_disk(tmp_path, monkeypatch):
    root = write_set(tmp_path, monkeypatch)
    images = dataset.load(train=True)
    reference = CIFAR10(root, train=True)
    assert images.pixels.shape == (5 * PER_FILE, 3, 32, 32)
    assert images.pixels.dtype == torch.uint8
    assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), reference.data)
    assert images.labels.tolist() == reference.targets
    assert len(dataset.load(train=False)) == TEST_SIZE
    assert len(dataset.load(train=False, limit=7)) == 7


def test_missing_and_damaged_sets_get_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(dataset.DataNotFoundError, match=r"nowhere: put the folder cifar-10-batches-py .* CIFAR10_ROOT"):
        dataset.load(train=True)
    assert not (tmp_path / "nowhere").exists()  # nothing is written into a folder that the user names

    root = write_set(tmp_path / "set", monkeypatch)
    damaged = root / CIFAR10.base_folder / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(dataset.DataNotFoundError, match="not found complete"):
        dataset.load(train=True)


def test_a_file_that_cannot_be_read_is_not_taken_for_a_missing_one(tmp_path, monkeypatch):
    write_set(tmp_path, monkeypatch)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: (_ for _ in ()).throw(OSError(116, "Stale handle")))
    with pytest.raises(OSError, match="Stale handle") as error:
        dataset.load(train=True)
    assert not isinstance(error.value, dataset.DataNotFoundError)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A server on this machine with the archive of a small set.

    ``host.address(kind)`` is an address that fails in that way. ``host.asked`` lists the addresses that were asked for.
    """
    source = write_set(tmp_path / "source", monkeypatch)
    with tarfile.open(tmp_path / CIFAR10.filename, "w:gz") as archive:
        archive.add(source / CIFAR10.base_folder, CIFAR10.base_folder)
    content = (tmp_path / CIFAR10.filename).read_bytes()
    over = threading.Event()

    class Host(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            if self.path == "/missing":
                return self.send_error(404)
            if self.path == "/hanging":
                return over.wait()
            body = {"/wrong": content[:-4] + b"abcd", "/cut": content[:1000]}.get(self.path, content)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            return self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.daemon_threads, server.asked, server.archive = True, [], tmp_path / CIFAR10.filename
    server.address = lambda kind: f"http://127.0.0.1:{server.server_port}/{kind}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(dataset.paths, "ROOT", tmp_path)
    monkeypatch.delenv("CIFAR10_ROOT")
    monkeypatch.delenv("CIFAR10_URLS", raising=False)
    monkeypatch.delenv("NOTEBOOK_UNATTENDED", raising=False)
    yield server
    over.set()
    server.shutdown()
    server.server_close()


FAILURES = {
    "missing": "HTTP 404 Not Found",
    "wrong": "it is another file, with md5 [0-9a-f]{32}",
    "cut": r"cut off after 1000 of \d+ bytes",
    "hanging": "timed out",
    "slow": r"it sends \d+ kB a second",
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_host_that_fails_is_left_for_the_next(host, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(dataset, "TIMEOUT", 0.3 if kind == "hanging" else 10)
    if kind == "slow":  # every host is slow here; the last one is waited for
        monkeypatch.setattr(dataset, "SLOW_AFTER", 0)
        monkeypatch.setattr(dataset, "SLOWEST", 1e12)
    monkeypatch.setattr(CIFAR10, "url", host.address(kind))
    monkeypatch.setattr(dataset, "MIRRORS", (host.address("good"),))
    assert len(dataset.load(train=True)) == 5 * PER_FILE
    assert host.asked == [f"/{kind}", "/good"]
    assert re.search(rf"could not be fetched from {host.address(kind)} \({FAILURES[kind]}\)", capsys.readouterr().err)
    assert [path.name for path in (tmp_path / ".data").iterdir()] == [CIFAR10.base_folder]
    whole = {path.name: path.read_bytes() for path in (tmp_path / "source" / CIFAR10.base_folder).iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / ".data" / CIFAR10.base_folder).iterdir()} == whole
    assert len(dataset.load(train=False)) == TEST_SIZE
    assert len(host.asked) == 2  # files that are there are not fetched again


def test_if_no_host_has_it_one_sentence_says_what_was_tried(host, tmp_path, monkeypatch):
    kinds = [kind for kind in FAILURES if kind != "slow"]
    monkeypatch.setattr(dataset, "TIMEOUT", 0.3)
    monkeypatch.setenv("CIFAR10_URLS", " ".join([*map(host.address, kinds), "nonsense"]))
    with pytest.raises(dataset.DataNotFoundError) as error:
        dataset.load(train=True)
    sentence = str(error.value)
    for kind in kinds:
        assert re.search(rf"{host.address(kind)} \([^)]*{FAILURES[kind]}\)", sentence)
    assert "nonsense (unknown url type: 'nonsense')" in sentence
    assert CIFAR10.tgz_md5 in sentence
    assert f"put the folder {CIFAR10.base_folder} (the set's python version) there" in sentence
    assert list((tmp_path / ".data").iterdir()) == []


def test_an_archive_put_there_by_hand_is_unpacked(host, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_URLS", host.address("missing"))
    (tmp_path / ".data" / CIFAR10.base_folder).mkdir(parents=True)
    (tmp_path / ".data" / CIFAR10.base_folder / "data_batch_2").write_bytes(b"a damaged file")
    shutil.copy(host.archive, tmp_path / ".data")
    assert len(dataset.load(train=True)) == 5 * PER_FILE
    assert host.asked == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.setattr(dataset.paths, "ROOT", tmp_path)
    (tmp_path / ".data").write_text("a file in the folder's place")
    with pytest.raises(
        dataset.DataNotFoundError, match=r"complete in \S*\.data, and cannot be downloaded there .*exists"
    ):
        dataset.load(train=True)


def test_the_addresses_are_those_of_the_archive(monkeypatch):
    monkeypatch.delenv("CIFAR10_URLS", raising=False)
    first, *mirrors = dataset.addresses()
    assert first == CIFAR10.url
    assert len(mirrors) in (1, 2)
    assert all(address.startswith("https://") and address.endswith("/" + CIFAR10.filename) for address in mirrors)
    assert CIFAR10.tgz_md5 == "c58f30108f718f92721af3b95e74349a"


def test_augmentation_is_border_crop_flip_of_each_image():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (162, 3, 32, 32), generator=generator, dtype=torch.uint8)
    # Every shift with and without flip.
    shifts = torch.cartesian_prod(torch.arange(9), torch.arange(9)).repeat(2, 1)
    flips = torch.arange(162) >= 81
    augmented = dataset.augment(pixels, shifts, flips)
    for image, (row, column), flip, result in zip(pixels, shifts.tolist(), flips, augmented, strict=True):
        expected = TF.crop(TF.pad(image, 4), row, column, 32, 32)
        assert torch.equal(result, TF.hflip(expected) if flip else expected)


def test_normalisation_is_that_of_torchvision():
    pixels = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    expected = TF.normalize(TF.to_tensor(picture), dataset.MEAN, dataset.STD)
    torch.testing.assert_close(dataset.normalise(pixels)[0], expected, rtol=0, atol=2e-6)


def test_choices_of_an_epoch_are_uniform_and_seeded():
    size = 81 * 2 * 100
    epoch = dataset.draw_epoch(size, torch.Generator().manual_seed(3))
    assert torch.equal(epoch.order.sort().values, torch.arange(size))
    cell = (epoch.shifts[:, 0] * 9 + epoch.shifts[:, 1]) * 2 + epoch.flips
    counts = torch.bincount(cell, minlength=162).double()
    # Pearson's statistic: chi-square with 161 degrees of freedom, standard deviation 18 around 161.
    assert abs(((counts - 100).square() / 100).sum() - 161) < 5 * 18
    again = dataset.draw_epoch(size, torch.Generator().manual_seed(3))
    other = dataset.draw_epoch(size, torch.Generator().manual_seed(4))
    assert torch.equal(epoch.order, again.order)
    assert torch.equal(epoch.shifts, again.shifts)
    assert not torch.equal(epoch.order, other.order)


def test_batches_cover_the_set_once():
    n = 50
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 32, 32).contiguous()
    images = dataset.Images(pixels, torch.arange(n))
    epoch = dataset.draw_epoch(n, torch.Generator().manual_seed(0))
    batches = [dataset.batch(images, epoch, start, 16) for start in range(0, n, 16)]
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    assert torch.cat([labels for _, labels in batches]).sort().values.tolist() == list(range(n))
    # No crop loses the centre pixel. It still belongs to its label.
    for chosen, labels in batches:
        level = (chosen[:, 0, 16, 16] * dataset.STD[0] + dataset.MEAN[0]) * 255
        torch.testing.assert_close(level, labels.float(), rtol=0, atol=1e-3)


@pytest.mark.slow
@needs_cifar10
def test_the_real_set_has_its_sizes_labels_and_mean():
    train, test = dataset.load(train=True, download=False), dataset.load(train=False, download=False)
    assert (len(train), len(test)) == (50_000, 10_000)
    assert torch.bincount(train.labels).tolist() == [5000] * 10
    # The normalisation's mean is the training set's.
    mean = train.pixels[::10].float().mean(dim=(0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor(dataset.MEAN), rtol=0, atol=5e-3)
