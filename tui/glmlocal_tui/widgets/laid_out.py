"""Widgets that grow with a streamed answer, and are laid out once for each new height."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.containers import Vertical
from textual.geometry import Size
from textual.widgets import Static

if TYPE_CHECKING:
    from textual.widget import Widget as _Base
else:  # no widget: Textual would take its CSS, which it has none of, for that of the widgets it is mixed into
    _Base = object


class LaidOutOnce(_Base):
    """Textual asks for a second layout of the whole screen when the first one gave a widget another size. It would
    find nothing to do here: children's heights do not depend on their parent's, and scrollbars ask for themselves."""

    def _size_updated(self, size: Size, virtual_size: Size, container_size: Size, layout: bool = True) -> bool:
        return super()._size_updated(size, virtual_size, container_size, layout=False)


class Column(LaidOutOnce, Vertical):
    """A Vertical that grows."""


class Words(LaidOutOnce, Static):
    """A Static as wide as its parent and as high as its text."""
