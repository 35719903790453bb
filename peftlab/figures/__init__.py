"""Data in, Plotly figure out. Each method keeps one colour and one marker in the whole course.

No figure loads a script from anywhere. Drawings, which explain, share one vocabulary (`sheet.py`)
and show real tensors; `draw` shows what is attached. Each has a text for those who cannot see it:
`alt_text(figure)`.
"""

from peftlab.figures.attention import attention_pair, attention_parts, token_bars
from peftlab.figures.curves import (
    bars_by_method,
    counts_figure,
    heat_map,
    learning_curves,
    small_multiples,
    spectrum,
    strengths,
)
from peftlab.figures.draw import describe, draw
from peftlab.figures.lora_runs import (
    forgotten_by_size,
    kept_by_rank,
    learned_and_forgotten,
    seeds_by_row,
)
from peftlab.figures.low_rank import (
    first_steps,
    gradient_road,
    hand_product,
    merge_and_swap,
    narrow_road,
)
from peftlab.figures.memory import PARTS, by_layer, memory_bars, memory_traces
from peftlab.figures.relatives import relatives, sum_of_factors
from peftlab.figures.sheet import alt_text
from peftlab.figures.sites import SITES, five_sites
from peftlab.figures.style import (
    BLACK,
    BLUE,
    COLOURS,
    DASHES,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    method_key,
    use_template,
)
from peftlab.figures.weights import (
    CODE_TYPES,
    code_errors,
    code_levels,
    pruning_curve,
    pruning_parts,
)
