"""The five sites: each one changes what a frozen model computes, and undoes it bit for bit.

Each site is a context manager. Entering it reaches into the model, leaving it takes everything
back, whatever happened in between. Nothing here knows any method. Here so far:

    InputEmbeddings     virtual tokens among the embedded input, or anew at every layer
    KeysValues          virtual keys and values in attention
    LinearWeight        a delta beside one linear weight W
    CodedWeight         the weight of one linear module held as codes of four bits
    MaskedWeight        some entries of W held at zero
    SublayerOutput      a small module after or beside attention or the MLP
    Scale               factors on what one linear weight gives, or reads
    ExistingParameters  some of the model's own parameters unfrozen
"""

from peftlab.sites.codes import CodedProduct, CodedWeight
from peftlab.sites.embeddings import InputEmbeddings, Read
from peftlab.sites.keys_values import KeysValues
from peftlab.sites.linear import Deltas, Kept, LinearWeight
from peftlab.sites.masked import MaskedWeight
from peftlab.sites.outputs import Scale, SublayerOutput
from peftlab.sites.parameters import ExistingParameters

__all__ = [
    "CodedProduct",
    "CodedWeight",
    "Deltas",
    "ExistingParameters",
    "InputEmbeddings",
    "Kept",
    "KeysValues",
    "LinearWeight",
    "MaskedWeight",
    "Read",
    "Scale",
    "SublayerOutput",
]
