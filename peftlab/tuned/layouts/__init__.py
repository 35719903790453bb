"""Hugging Face PEFT's two files for an adapter: our adapters in them, and theirs as ours."""

from peftlab.tuned.layouts.read import read
from peftlab.tuned.layouts.write import KNOWN, Layout, Unknown

__all__ = ["KNOWN", "Layout", "Unknown", "read"]
