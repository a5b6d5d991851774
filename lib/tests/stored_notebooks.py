"""A plugin of pytest: nbval runs the stored notebooks as `make` does, unattended, and writes into the build folder.

The notebooks read the networks and figures that ship, without what a user has added. A notebook with a cell tagged
``needs-cifar10`` is skipped, with the reason, if the images are missing.

Every notebook has a kernel of its own. The kernels are forked from one process that has imported the libraries of all
notebooks, and nothing of the project: the imports take longer than the computations of most notebooks.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence

import nbformat
import pytest
from jupyter_client.provisioning import local_provisioner

from lib import paths
from lib.cifar import dataset
from lib.project import notebooks

# matplotlib chooses its backend when it is imported. A kernel chooses this one.
INLINE = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
LIBRARIES = ["ipykernel.kernelapp", "ipywidgets", "matplotlib.pyplot", "scipy.linalg", "torch"]


def read_notebook(name: str) -> nbformat.NotebookNode:
    """The stored notebook of that name."""
    return nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4)


def _kernel(arguments: Sequence[str], folder: str, environment: Mapping[str, str]) -> None:
    # In the forked process: what a new process would begin with.
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    from ipykernel import kernelapp

    kernelapp.launch_new_instance(argv=arguments, parent_handle=os.getppid())


class ForkedKernel:
    """A kernel's process for jupyter_client, with the methods of `subprocess.Popen` that it calls."""

    stdin = stdout = stderr = None

    def __init__(self, command: Sequence[str], *, cwd: str, env: Mapping[str, str], **_):
        forks = multiprocessing.get_context("forkserver")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in INLINE.items():
                patch.setenv(name, value)
            forks.set_forkserver_preload(LIBRARIES)
            arguments = command[command.index("ipykernel_launcher") + 1 :]
            self.process = forks.Process(target=_kernel, args=(arguments, cwd, env))
            self.process.start()
        self.pid = self.process.pid
        # A kernel is ended with its process group, which must not be the group of this process.
        while os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    if item.path.suffix != ".ipynb":
        return (yield)
    from lib.tests import shipped

    # nbval starts a notebook's kernel in the set-up of its first cell.
    with notebooks.unattended_environment(paths.BUILD / "nbval"), pytest.MonkeyPatch.context() as patch:
        os.environ["RESULTS_ROOT"] = str(shipped.ROOT)
        if sys.platform == "linux":  # other systems' libraries may not survive a fork
            patch.setattr(local_provisioner, "launch_kernel", ForkedKernel)
        return (yield)


def pytest_collection_modifyitems(items):
    def needs_images(item: pytest.Item) -> bool:
        return any("needs-cifar10" in cell.metadata.get("tags", ()) for cell in item.parent.nb.cells)

    needing = [item for item in items if item.path.suffix == ".ipynb" and needs_images(item)]
    if needing and not dataset.is_available():
        reason = f"CIFAR-10 is not in {paths.cifar10_root()}: set CIFAR10_ROOT to the folder that holds it"
        for item in needing:
            item.add_marker(pytest.mark.skip(reason=reason))
