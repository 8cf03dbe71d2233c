"""The layouts that data sets come in. To add one: a file here, a line in ``LAYOUTS``, a test in tests/unit/test_data.py."""

from __future__ import annotations

from mrpo_scale.data.layouts.base import Layout
from mrpo_scale.data.layouts.conversational import Conversational
from mrpo_scale.data.layouts.hh_strings import HHStrings
from mrpo_scale.data.layouts.sharegpt import ShareGPT
from mrpo_scale.data.layouts.strings import Strings

#: In the order in which they are tried.
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Strings(), Conversational(), ShareGPT(), HHStrings())}

__all__ = ["LAYOUTS", "Layout"]
