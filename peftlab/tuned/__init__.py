"""A base with methods attached, and what becomes of it: kept, saved, exported, taken to PEFT.

tuned     attach, call, generate, count, merge, detach
kept      several adapters on one base: keep, use, rows, weighted sums
saving    folders: written, read with suspicion; plain models
layouts   where the tensors of each method stand in PEFT's files
interop   adapters out to PEFT and in from it
"""

from peftlab.tuned.tuned import Count, Tuned, attach

__all__ = ["Count", "Tuned", "attach"]
