"""What the tests of the explorers share: small networks, and functions that drive an explorer from Python."""

import asyncio
import dataclasses
import threading
import zlib

import numpy as np

from lib.dense.network import NetworkConfig
from lib.explore import explorer as module
from lib.explore.depth_training import DepthsConfig

NETWORK = NetworkConfig(width=4, dimension=4, samples=10, seed=3)
SMALL = DepthsConfig(NETWORK, [4, 8, 16], iterations=30, learning_rate=0.05)
IID = dataclasses.replace(NETWORK, initialisation="iid")


def sketch(frames, dpi=100):
    """Return one pixel that depends on all data of a figure. It is faster than a picture, which draws tick labels."""
    data = [line.get_xydata() for panel in frames.figure.axes for line in panel.lines]
    data += [np.ma.filled(image.get_array(), 0) for panel in frames.figure.axes for image in panel.collections]
    checksum = zlib.crc32(b"".join(np.asarray(each, dtype=float).tobytes() for each in data))
    return np.frombuffer(checksum.to_bytes(4)[:3], dtype=np.uint8).reshape(1, 1, 3)


def find_axes(explorer):
    return {panel.get_label(): panel for panel in explorer._frames.figure.axes}


def finish(explorer):
    while explorer.live.advance(1.0):
        pass
    explorer._show(module.STILL)


async def wait_until(condition, seconds=20.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def count_threads():
    return sum(thread.name == "explorer" for thread in threading.enumerate())


def read_iteration(explorer):
    return explorer.live.state.iteration
