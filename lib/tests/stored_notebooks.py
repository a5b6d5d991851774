"""A plugin of pytest: nbval runs the stored notebooks as `make` does, unattended, writing into the build folder.

What they read of trained networks and of other figures is what ships, whatever a user has added. A notebook with a
cell tagged ``needs-cifar10`` is skipped, with the reason, if the images are missing.
"""

import os

import pytest

from lib import paths
from lib.cifar import dataset
from lib.project import notebooks


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    if item.path.suffix != ".ipynb":
        return (yield)
    from lib.tests import shipped

    # nbval starts a notebook's kernel in the set-up of its first cell.
    with notebooks.unattended_environment(paths.BUILD / "nbval"):
        os.environ["RESULTS_ROOT"] = str(shipped.ROOT)
        return (yield)


def pytest_collection_modifyitems(items):
    def needs_images(item: pytest.Item) -> bool:
        return any("needs-cifar10" in cell.metadata.get("tags", ()) for cell in item.parent.nb.cells)

    needing = [item for item in items if item.path.suffix == ".ipynb" and needs_images(item)]
    if needing and not dataset.available():
        reason = f"CIFAR-10 is not in {paths.cifar10_root()}: set CIFAR10_ROOT to the folder that holds it"
        for item in needing:
            item.add_marker(pytest.mark.skip(reason=reason))
