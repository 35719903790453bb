"""Data in, Plotly figure out. Each method keeps one colour and one marker in the whole course.

No figure loads a script from anywhere. Drawings, which explain, share one vocabulary (`sheet.py`)
and show real tensors; `draw` shows what is attached. Each has a text for those who cannot see it:
`alt_text(figure)`.
"""

from peftlab.figures.adapters import (
    factors_by_layer,
    forward_costs,
    hand_bend,
    idle_bias,
    norm_folded,
    reads_and_adds,
)
from peftlab.figures.adviser import decision_lanes
from peftlab.figures.attention import attention_pair, attention_parts, token_bars
from peftlab.figures.backward import kept_in_block, linear_backward, rounded_steps
from peftlab.figures.before_after import before_after
from peftlab.figures.bell import bell
from peftlab.figures.block import block_of_weights
from peftlab.figures.calculator import STEP_PARTS, fits_bars, step_parts
from peftlab.figures.card import (
    fused_adapter,
    names_and_form,
    paid_tokens,
    sure_of_names,
    told_and_asked,
    ways_out,
)
from peftlab.figures.clinic import counted_labels, decision_order, gradient_reach, stations
from peftlab.figures.coded_runs import code_shares, lost_by_way, what_arrives
from peftlab.figures.contest import score_intervals
from peftlab.figures.curves import (
    bars_by_method,
    counts_figure,
    heat_map,
    learning_curves,
    small_multiples,
    spectrum,
    strengths,
)
from peftlab.figures.definitions import soft_definitions
from peftlab.figures.described import Box, Drawing, describe
from peftlab.figures.draw import draw
from peftlab.figures.encoder import (
    hand_step,
    kept_of_encoder,
    moved_by_step,
    prompt_maker,
    row_kernels,
    seeds_in_rows,
    template_places,
)
from peftlab.figures.films import frozen_backward, lora_step, weight_to_code
from peftlab.figures.forgetting import forgetting_by_rate, leaks, learned_and_lost
from peftlab.figures.gate import gate_road
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
from peftlab.figures.masks import masked_matrix, usual_masks
from peftlab.figures.memory import PARTS, memory_bars, memory_traces
from peftlab.figures.prefix import (
    positions,
    prefix_shapes,
    prefix_shares,
    rates,
    runs_by_row,
    thrown_away,
    within_and_through,
)
from peftlab.figures.prompt import (
    prompt_layers,
    rows_with_prompts,
    seeds_by_rate,
    share_by_layer,
    share_strips,
)
from peftlab.figures.pruned import (
    damage_by_layer,
    hand_masks,
    loss_by_sparsity,
    loud_inputs,
    neurons_out,
    runs_in_rows,
    times_by_row,
)
from peftlab.figures.quantiser import coded_road, pages, quantile_steps
from peftlab.figures.relatives import relatives, sum_of_factors
from peftlab.figures.roads import adapter_places, bottleneck
from peftlab.figures.scores import score_matrix
from peftlab.figures.sheet import Sheet, alt_text
from peftlab.figures.showdown import (
    apart_from,
    best_under,
    contest_course,
    domination,
    paired_seeds,
    pareto,
    rate_search,
    tenants,
    turned,
)
from peftlab.figures.site_map import site_map
from peftlab.figures.sites import SITES, five_sites
from peftlab.figures.spoken import spoken
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
from peftlab.figures.tagging import definition_columns, moved_words, scores_by_size, tagger
from peftlab.figures.timeline import step_timeline
from peftlab.figures.to_scale import to_scale
from peftlab.figures.weights import (
    CODE_TYPES,
    code_errors,
    code_levels,
    pruning_curve,
    pruning_parts,
)
