"""What the modules of hosts share: each is the module of another library's name, which can also be called.

A host is a module of this package that ends with these lines, and whose docstring says what it changes:

    _switch = Switch(__name__, _redirections)
    install: Callable[[], None] = _switch.install
    uninstall: Callable[[], None] = _switch.uninstall
    make_callable(__name__)
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType

from ._redirect import Redirection


class Switch:
    """Puts detops in the place of functions of a library, and takes it out again.

    Args:
        name: of the host's module.
        redirections: makes them, once it is switched on. What it raises leaves all as it was.
    """

    def __init__(self, name: str, redirections: Callable[[], list[Redirection]]) -> None:
        self._name = name
        self._redirections = redirections
        self._lock = threading.RLock()
        self._installed = False
        self._blocks = 0
        self._running: list[Redirection] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Installed within a block; also a decorator."""
        with self._lock:
            self._switch(self._installed, self._blocks + 1)
        try:
            yield
        finally:
            with self._lock:
                self._switch(self._installed, self._blocks - 1)

    def install(self) -> None:
        """Until `uninstall`."""
        with self._lock:
            self._switch(True, self._blocks)

    def uninstall(self) -> None:
        """Undoes `install`; blocks that still run keep what they asked for."""
        with self._lock:
            self._switch(False, self._blocks)

    def __repr__(self) -> str:
        return f"<{self._name}: {'in place' if self._running else 'not in place'}>"

    def _switch(self, installed: bool, blocks: int) -> None:
        wanted = installed or blocks > 0
        if wanted and not (self._installed or self._blocks):
            self._stop()  # what a stop that was interrupted has left
            redirections = self._redirections()
            try:
                for each in redirections:
                    self._running.append(each)  # before it starts, which may be interrupted half-way
                    each.start()
            except BaseException:
                self._stop()
                raise
        self._installed, self._blocks = installed, blocks
        if not wanted:
            self._stop()

    def _stop(self) -> None:
        """All of them, also where one raises or is interrupted; that one stays, for the next switch."""
        left, raised = [], None
        for each in self._running:
            try:
                each.stop()
            except BaseException as error:
                left.append(each)
                raised = error
        self._running = left
        if raised is not None:
            raise raised


class _CallableModule(ModuleType):
    def __call__(self) -> contextlib.AbstractContextManager[None]:
        return self._switch()

    def __repr__(self) -> str:
        return repr(self._switch)


def make_callable(name: str) -> None:
    """Lets `with detops.compat.NAME():` work, NAME being a module that can be imported."""
    module = sys.modules[name]
    module.__class__ = _CallableModule
