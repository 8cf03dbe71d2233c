"""The layouts that data sets come in. To add one: a file here, a line in ``LAYOUTS``, a fixture and its pairs in the tests."""

from __future__ import annotations

from mrpo_scale.data.layouts.base import AnyLayout, Layout, RankedLayout
from mrpo_scale.data.layouts.conversational import Conversational
from mrpo_scale.data.layouts.gpt4_llm import GPT4LLM
from mrpo_scale.data.layouts.helpsteer import HelpSteer
from mrpo_scale.data.layouts.hh_strings import HHStrings
from mrpo_scale.data.layouts.nectar import Nectar
from mrpo_scale.data.layouts.nemo_rl import NeMoRL
from mrpo_scale.data.layouts.openai import OpenAI
from mrpo_scale.data.layouts.orca import Orca
from mrpo_scale.data.layouts.sharegpt import ShareGPT
from mrpo_scale.data.layouts.strings import Strings
from mrpo_scale.data.layouts.swift import Swift

#: In the order in which they are tried.
LAYOUTS: dict[str, AnyLayout] = {
    layout.name: layout
    for layout in (
        Strings(),
        Conversational(),
        ShareGPT(),
        HHStrings(),
        Orca(),
        HelpSteer(),
        Nectar(),
        GPT4LLM(),
        Swift(),
        OpenAI(),
        NeMoRL(),
    )
}

__all__ = ["LAYOUTS", "AnyLayout", "Layout", "RankedLayout"]
