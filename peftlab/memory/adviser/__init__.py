"""Which method to take: constraints in, a method out, or why there is none.

    advice = advise(Need(model="llama-3-8b", gpu="RTX 4090 24 GB", task="generation"))
    advice.outcome, advice.method      "method", "QLoRA"
    advice.path                        every question, and what its answer ruled out
    advice.code                        a Hugging Face PEFT configuration to copy

`flow` asks the `questions` of a `need`; `recipes` has what stands at the end of a path, and
`evidence` reads the recorded comparisons.
"""

from peftlab.memory.adviser.evidence import ENOUGH, FAR, comparisons
from peftlab.memory.adviser.flow import FLOW, OUTCOMES, Advice, Step, advise
from peftlab.memory.adviser.need import GOALS, SERVERS, SKILLS, TASKS, Need
from peftlab.memory.adviser.questions import megabytes, size_of
from peftlab.memory.adviser.recipes import RECIPES, Recipe
