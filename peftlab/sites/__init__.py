"""The five sites: each changes what a frozen model computes, and undoes the change bit for bit.

`Site` is their common interface. No code here depends on a method.

    InputEmbeddings     virtual tokens in the embedded input, or new ones at every layer
    KeysValues          virtual keys and values in attention
    LinearWeight        a delta beside one linear weight W
    CodedWeight         the weight of one linear module held as codes of four bits
    MaskedWeight        some entries of W held at zero
    SmallerModel        heads, neurons or layers taken out
    SublayerOutput      a small module after or beside attention or the MLP
    Scale               factors on the output or the input of one linear weight
    ExistingParameters  some of the model's own parameters unfrozen
    Source              the module that makes a soft prompt, run once a forward pass
"""

from peftlab.sites.codes import CodedWeight
from peftlab.sites.embeddings import InputEmbeddings
from peftlab.sites.keys_values import KeysValues
from peftlab.sites.linear import LinearWeight
from peftlab.sites.masked import MaskedWeight
from peftlab.sites.outputs import Scale, SublayerOutput
from peftlab.sites.parameters import ExistingParameters
from peftlab.sites.site import Shown, Site, sweep
from peftlab.sites.source import Source
from peftlab.sites.structures import SmallerModel
