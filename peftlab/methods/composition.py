"""Which methods cannot be combined on one base, and why: one table for all of them."""

from dataclasses import dataclass

from peftlab.methods.method import Method

PRUNING = ("prune", "prune_structures")
PREFIXES = ("prefix_tuning", "p_tuning_v2", "prompt_and_prefix")
ANY = None

TRAINS_ALL = "it trains every parameter and composes with no other, but for pruning before it"
ON_THE_BASE = "it comes first, for the mask is chosen on W as the base has it"
CODES_MIX = "codes are made anew for whole blocks, and a mask is not kept through that"
SIZES = "it comes first, for the others are made to the sizes that are left"
SAME_HEADS = "a prefix has as many heads in every layer, those of the whole model"


@dataclass(frozen=True)
class Rule:
    """`method` is refused if a method in `before` precedes it or one in `after` follows it.

    ANY stands for every method; the methods in `but` are allowed all the same.
    """

    method: str
    reason: str
    before: tuple[str, ...] | None = ()
    after: tuple[str, ...] | None = ()
    but: tuple[str, ...] = ()


RULES = (
    Rule("full_fine_tuning", TRAINS_ALL, before=ANY, but=PRUNING),
    Rule("full_fine_tuning", TRAINS_ALL, after=ANY),
    Rule("prune", ON_THE_BASE, before=ANY, but=("prune_structures",)),
    Rule("prune", "it splits W into two parts, both dense", after=("pissa",)),
    Rule("prune", CODES_MIX, after=("nf4", "qlora")),
    Rule("prune_structures", SIZES, before=ANY),
    Rule("prune_structures", SAME_HEADS, after=PREFIXES),
)


def check_composition(methods: list[Method]) -> None:
    """Raise ValueError unless these methods can be combined in this order."""
    for i, method in enumerate(methods):
        before, after = methods[:i], methods[i + 1 :]
        for rule in (rule for rule in RULES if rule.method == method.name):
            for others, those in ((rule.before, before), (rule.after, after)):
                named = [m.name for m in those if m.name not in rule.but]
                if any(others is ANY or name in others for name in named):
                    titles = ", ".join(m.title for m in (*before, *after))
                    raise ValueError(f"{method.title} does not go with {titles}: {rule.reason}")
