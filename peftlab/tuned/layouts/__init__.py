"""Hugging Face PEFT's two files for an adapter: our adapters in them, and theirs as ours."""

from peftlab.tuned.layouts.read import Fill, read
from peftlab.tuned.layouts.write import KNOWN, Layout, Unknown, check_shapes

__all__ = ["KNOWN", "Fill", "Layout", "Unknown", "check_shapes", "read"]
