"""Packages that have the name of a public function: calling the package calls the function.

`from sd_unlearn import report` gives the package `sd_unlearn.report` once any of its modules has been imported,
whatever `sd_unlearn.__getattr__` says. So the package itself must behave as the function.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A package that calls the function of its name in `sd_unlearn.api`, with its signature and documentation."""

    @property
    def _function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(import_module("sd_unlearn.api"), self.__name__.rpartition(".")[2])
        return function

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    # Also shown by help(); in place of the docstring of this class and of the package.
    __doc__ = property(lambda self: self._function.__doc__)
