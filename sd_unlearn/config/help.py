"""How --help and --help_all show the options. Imports no torch."""

from __future__ import annotations

from typing import Any

from cyclopts.help.formatters import DefaultFormatter

from sd_unlearn.config.options import START


class Help(DefaultFormatter):
    """cyclopts' help, in which the name of an option is never broken over two lines."""

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        self.column_specs = _parameter_columns if panel.format == "parameter" else None
        super().__call__(console, options, panel)


class ShortHelp(Help):
    """Help of a command with many options: --help shows the group "Start here", --help_all every group."""

    show_all = False

    def __init__(self, others: str) -> None:
        """others: what the other groups are about."""
        super().__init__()
        self.others = others

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        if self.show_all or str(panel.title) == START.name:
            super().__call__(console, options, panel)
        if not self.show_all and str(panel.title) == START.name:
            console.print(f"More: {self.others}: --help_all", highlight=False)


def _parameter_columns(console: Any, options: Any, entries: Any) -> Any:
    """cyclopts' columns of a table of options; the first is wide enough for the longest name, up to half the width."""
    from cyclopts.help.specs import NameRenderer, get_default_parameter_columns

    labels = [" ".join(entry.display_labels_with_metavar).split() for entry in entries]
    longest = max(len(word) + 2 * (i > 0) for words in labels for i, word in enumerate(words))  # later lines: indented
    columns = get_default_parameter_columns(console, options, entries)
    width = min(longest, console.width // 2)
    return tuple(
        column.copy(renderer=NameRenderer(max_width=width), max_width=width)
        if isinstance(column.renderer, NameRenderer) and column.max_width < width
        else column
        for column in columns
    )
