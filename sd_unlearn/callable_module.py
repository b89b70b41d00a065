"""Packages that have the name of a public function: calling the package calls the function.

`from sd_unlearn import report` gives the package `sd_unlearn.report` once any of its modules has been imported,
whatever `sd_unlearn.__getattr__` says. So the package itself must behave as the function.
"""

from importlib import import_module
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A package that calls the function of its name in `sd_unlearn.api`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        function = getattr(import_module("sd_unlearn.api"), self.__name__.rpartition(".")[2])
        return function(*args, **options)
