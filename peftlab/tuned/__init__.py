"""A base with methods attached: run it, keep several adapters, save, export, convert to PEFT.

tuned     attach, call, generate, count, merge, detach
kept      several adapters on one base: keep, use, rows, weighted sums
saving    adapters written to and read from folders, with checks; plain models
layouts   the places of each method's tensors in PEFT's files
interop   adapters to PEFT and from PEFT
compiled  the batch loss by torch.compile
devices   several processes that train one adapter, and may share out the base
"""

from peftlab.tuned.tuned import Count, Tuned, attach
