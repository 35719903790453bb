"""Hugging Face PEFT's two files for an adapter: what ours are there, and what theirs are here."""

from peftlab.tuned.layouts.read import read
from peftlab.tuned.layouts.write import KNOWN, Layout, Unknown

__all__ = ["KNOWN", "Layout", "Unknown", "read"]
