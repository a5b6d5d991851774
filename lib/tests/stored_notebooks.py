"""A plugin of pytest: nbval runs the stored notebooks as `make` does, unattended, writing into the build folder.

What they read of trained networks and of other figures is what ships, whatever a user has added. A notebook with a
cell tagged ``needs-cifar10`` is skipped, with the reason, if the images are missing.

Every notebook has a kernel of its own. They are forked from one process that has imported the libraries of all
notebooks, and nothing of the project: importing them anew takes longer than what most notebooks compute.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence

import pytest
from jupyter_client.provisioning import local_provisioner

from lib import paths
from lib.cifar import dataset
from lib.project import notebooks

# matplotlib's backend is chosen when it is imported: as a kernel would.
INLINE = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
LIBRARIES = ["ipykernel.kernelapp", "ipywidgets", "matplotlib.pyplot", "scipy.linalg", "torch"]


def _kernel(arguments: Sequence[str], folder: str, environment: Mapping[str, str]) -> None:
    # In the forked process: what a process of its own would begin with.
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ |= environment
    from ipykernel import kernelapp

    kernelapp.launch_new_instance(argv=arguments, parent_handle=os.getppid())


class ForkedKernel:
    """A kernel's process as jupyter_client wants it, with the methods of `subprocess.Popen` that it calls."""

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
        # A kernel is ended with its group of processes, which must not be this one's.
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
        if sys.platform == "linux":  # elsewhere the system's own libraries may not survive a fork
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
