"""Hugging Face PEFT's two files for an adapter: our adapters in them, and theirs as ours."""

from peftlab.tuned.layouts.read import Fill, read
from peftlab.tuned.layouts.write import CODES, KNOWN, Layout, Unknown, check_shapes

__all__ = ["CODES", "KNOWN", "Fill", "Layout", "Unknown", "check_shapes", "read"]
