"""Reports of results.json as HTML, Markdown and CSV."""

import sys

from sd_unlearn.callable_module import CallableModule

sys.modules[__name__].__class__ = CallableModule
