"""P-tuning v2: prefix tuning for understanding, with a head, a depth and a length for each task."""

from dataclasses import dataclass

from peftlab.methods.checks import require
from peftlab.methods.prefix_tuning import PrefixTuning


@dataclass(frozen=True)
class PTuningV2(PrefixTuning):
    """P-tuning v2: the keys and values of prefix tuning, in the upper `depth` layers or in all.

        h = softmax(q [P_k; K]ᵀ / √d) [P_v; V]

    Without `prefix_projection` and at full depth it has prefix tuning's own tensors. The paper adds
    their use (tagging and classification by a small head that starts at random, see `heads`), a
    length for each task, no MLP by default, several tasks on one base. The input does not change.

    `depth` counts layers from the last one down, on T5 in each stack.

    Liu et al. 2022, arXiv:2110.07602, section 3.
    """

    depth: int | None = None

    name = "p_tuning_v2"
    title = "P-tuning v2"

    def __post_init__(self):
        super().__post_init__()
        if self.depth is not None:
            require("depth", self.depth, 1)

    def reaches(self, site, layers):
        """Whether the sublayer is in the upper `depth` layers."""
        return self.depth is None or site.layer >= layers - self.depth

    def sublayers(self, shape):
        """Attention sublayers in the upper `depth` layers."""
        if self.depth is None:
            return shape.attentions
        most = max(shape.layers, shape.decoder_layers)
        if self.depth > most:
            raise ValueError(f"depth={self.depth}: {shape.name} allows 1 to {most}")
        decoder = min(self.depth, shape.decoder_layers)
        return min(self.depth, shape.layers) + 2 * decoder
