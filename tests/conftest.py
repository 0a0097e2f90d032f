"""What every test gets: a marker by folder, a quiet environment, and the leak check.

The leak check compares what this process and its descendants hold before a test's
set-up with what they hold after its teardown: threads, processes, open files, tasks,
socket files, shared memory. In integration/ it is made for each test, in e2e/ for each
module or folder, since engines are shared there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import inspect
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import hypothesis
import psutil
import pytest
import uvloop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

TESTS = Path(__file__).parent
FOLDERS = ("unit", "property", "integration", "e2e", "native", "typing")
E2E_TIMEOUT_S = 600
SHARING = ("tests/e2e/pair",)  # folders whose tests share engines
# What is ending may take this long to be gone.
GRACE_S = 5.0
# Inherited by every process a test starts, however deep, also when its parent is gone.
MARK = f"ASEER_TEST_RUN={uuid.uuid4().hex}"
SHARED_MEMORY = Path("/dev/shm")

# Of Linux's <sched.h> and <sys/mount.h>.
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 1 << 14, 1 << 18

# Each run tries other examples than the last, but in CI, so that few are enough.
hypothesis.settings.register_profile("default", deadline=None, max_examples=30)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)

# A shell has what it runs in the background ignore Ctrl-C, and so all processes of
# tests, of which some are told to end by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def folder_of(path: Path) -> str:
    """The folder of tests/ that a file is in; empty if it is in none."""
    parts = path.relative_to(TESTS).parts if path.is_relative_to(TESTS) else ()
    return parts[0] if len(parts) > 1 else ""


def own_shared_memory() -> bool:
    """Give this process and its children a /dev/shm that nobody else sees.

    Returns:
        Whether it may have one, which only root may.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    tmpfs, folder = b"tmpfs", os.fsencode(SHARED_MEMORY)
    return (
        libc.unshare(_CLONE_NEWNS) == 0
        and libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None) == 0
        and libc.mount(tmpfs, folder, tmpfs, 0, None) == 0
    )


def scope_of(nodeid: str) -> str:
    """Tests of one scope share what they have started: a file, or a folder."""
    file = nodeid.split("::")[0]
    folder = file.rpartition("/")[0]
    return folder if folder in SHARING else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep what is shared in one process, where several share the tests."""
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    return ByScope(config, log)


def pytest_configure(config: pytest.Config) -> None:
    # One of several processes that run tests at once.
    if hasattr(config, "workerinput") and not own_shared_memory():
        Held.sees_shared_memory = False
    profile = "ci" if os.environ.get("CI") else "default"
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", profile))
    name, value = MARK.split("=")
    old = tempfile.gettempdir()
    # A folder of our own, so that what is left there is left by us; short, since a
    # socket's path may have 107 characters.
    folder = tempfile.mkdtemp(prefix="aseer-t-", dir="/tmp")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    patch.setenv(name, value)
    patch.setenv("TMPDIR", folder)
    patch.setattr(tempfile, "tempdir", folder)
    # What is worth keeping stays where it was: tmp_path of failed tests, compiled code.
    for variable, kept in [
        ("PYTEST_DEBUG_TEMPROOT", old),
        ("TORCHINDUCTOR_CACHE_DIR", f"{old}/aseer-torchinductor"),
    ]:
        if variable not in os.environ:
            patch.setenv(variable, kept)
    # Hundreds of processes import aseer; each would compile it anew.
    patch.setattr(sys, "dont_write_bytecode", False)
    patch.setenv("PYTHONDONTWRITEBYTECODE", "")
    # Processes that rename themselves keep their environment readable.
    patch.setenv("SPT_NOENV", "1")
    patch.setenv("VLLM_NO_USAGE_STATS", "1")
    patch.setenv("HF_HUB_OFFLINE", "1")
    # Every rollout of a test compares its books, those of other processes too.
    patch.setenv("ASEER_CHECK", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = folder_of(item.path)
        if folder in FOLDERS:
            item.add_marker(folder)
        if folder == "e2e" and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(E2E_TIMEOUT_S))


def pytest_collection_finish() -> None:
    """Take what was imported out of the garbage collector's sight.

    A collection looks at a million objects of torch's and others otherwise: 0.7 s for
    each test whose leaks are looked for, on a slow machine.
    """
    gc.collect()
    gc.freeze()


# -- leaks -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """What is held: what tells each thing from others, with words for it."""

    threads: dict[int | None, str]
    processes: dict[int, str]
    files: dict[str, str]
    sockets: dict[str, str]
    shared_memory: dict[int, str]

    sees_shared_memory: ClassVar[bool] = True  # whether it is nobody else's

    @classmethod
    def now(cls) -> Held:
        """What this process and its descendants hold."""
        return cls(
            threads={t.ident: t.name for t in threading.enumerate()},
            processes=dict(_processes()),
            files={text: text for text in _open_files()},
            sockets={path: path for path in _socket_files()},
            shared_memory=dict(_shared_memory() if cls.sees_shared_memory else ()),
        )

    def leaked_since(self, before: Held) -> Held:
        """What is held now and was not before."""
        leaked = Held(
            **{
                kind: {key: now[key] for key in now.keys() - vars(before)[kind].keys()}
                for kind, now in vars(self).items()
            }
        )
        if leaked.shared_memory:
            mapped = _mapped_inodes()
            for inode in leaked.shared_memory.keys() & mapped:
                del leaked.shared_memory[inode]
        return leaked

    def lines(self) -> list[str]:
        """Words for each thing; empty if nothing is held."""
        return [
            f"{kind}: {text}"
            for kind in vars(self)
            for text in vars(self)[kind].values()
        ]


def _processes() -> Iterator[tuple[int, str]]:
    """Descendants, and processes that inherited the mark from one that is gone."""
    name, value = MARK.split("=")
    ours = {p.pid for p in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid():
                continue
            if process.pid in ours or process.environ().get(name) == value:
                what = " ".join(process.cmdline()).strip() or process.name()
                yield process.pid, f"{process.pid} ({process.status()}) {what[:200]}"
        except psutil.Error:
            continue


def _open_files() -> Iterator[str]:
    """Open file descriptors, as number and target."""
    folder = Path("/proc/self/fd")
    for name in _names(folder):
        try:
            yield f"{name} -> {(folder / name).readlink()}"
        except OSError:
            continue  # the one that lists the folder


def _socket_files() -> Iterator[str]:
    """Unix sockets in the temporary folder, open or forgotten."""
    for root, _, names in os.walk(tempfile.gettempdir()):
        for name in names:
            path = os.path.join(root, name)
            try:
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    yield path
            except OSError:
                continue


def _shared_memory() -> Iterator[tuple[int, str]]:
    """Shared memory and semaphores, whoever made them: inode and name."""
    for name in _names(SHARED_MEMORY):
        try:
            yield (SHARED_MEMORY / name).stat().st_ino, name
        except OSError:
            continue


def _mapped_inodes() -> set[int]:
    """Shared memory that a living process has mapped, ours or another's.

    By inode: a semaphore is mapped under the name it had while it was made.
    """
    mapped = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines = (folder / "maps").read_text().splitlines()
        except OSError:
            continue
        mapped |= {int(li.split()[4]) for li in lines if f" {SHARED_MEMORY}/" in li}
    return mapped


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def leaks_since(before: Held, grace_s: float = GRACE_S) -> list[str]:
    """What is still held after `grace_s` and was not before; processes are killed."""
    gc.collect()
    gc.freeze()  # what a test has imported stays
    deadline = time.monotonic() + grace_s
    while lines := (leaked := Held.now().leaked_since(before)).lines():
        if time.monotonic() >= deadline:
            break
        time.sleep(0.05)
    for pid in leaked.processes:
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).kill()
    return lines


_before = pytest.StashKey[Held]()


def _leak_scope(item: pytest.Item | None) -> str:
    """Tests of one scope are checked together; empty = not checked."""
    folder = folder_of(item.path) if item else ""
    if item is None or folder not in ("integration", "e2e"):
        return ""
    return item.nodeid if folder == "integration" else scope_of(item.nodeid)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    scope = _leak_scope(item)
    stash = item.session.stash
    if scope and _before not in stash:
        # Made by the standard library and by libuv at their first need, and kept.
        resource_tracker.ensure_running()
        uvloop.new_event_loop().close()
        stash[_before] = Held.now()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Iterator[None]:
    stash = item.session.stash
    scope = _leak_scope(item)
    is_last = bool(scope) and scope != _leak_scope(nextitem)
    try:
        result = yield
        if is_last and (leaked := leaks_since(stash[_before])):
            pytest.fail("left behind:\n  " + "\n  ".join(leaked), pytrace=False)
    finally:
        if is_last:
            del stash[_before]
    return result


@pytest.fixture
async def _no_leaked_tasks() -> AsyncIterator[None]:
    """Fails if the test leaves an asyncio task behind on its loop."""
    before = asyncio.all_tasks()
    yield
    for _ in range(20):
        leaked = asyncio.all_tasks() - before - {asyncio.current_task()}
        if not leaked:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"tasks left behind: {leaked}", pytrace=False)


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """What a test, or a library it imports, puts into the environment goes with it."""
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    for each in (before, after):
        each.pop("PYTEST_CURRENT_TEST", None)  # pytest's own, by test and phase
    for name in after.keys() - before.keys():
        del os.environ[name]
    os.environ.update(dict(before.items() - after.items()))


@pytest.fixture(autouse=True)
def _leaked_tasks_fail(request: pytest.FixtureRequest) -> None:
    """Ask for `_no_leaked_tasks` if the test is a coroutine, which has a loop."""
    test: Callable[..., object] | None = getattr(request.node, "obj", None)
    if test is not None and inspect.iscoroutinefunction(inspect.unwrap(test)):
        request.getfixturevalue("_no_leaked_tasks")
