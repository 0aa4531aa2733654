"""Adapters of a model's weights: LoRA and its relatives.

`merge` adds a file's changes to weights that are loaded. `keys` reads how tools spell
their tensors, `strengths` how strong they are, `patterns` the patterns in settings,
`modules` what the tensors of a module mean together, and `formulas` computes it.
`few_steps` tells adapters that are made for few steps.
"""

from models.checkpoints.lora.few_steps import FewSteps, find_few_steps
from models.checkpoints.lora.formulas import MergedArray
from models.checkpoints.lora.merge import MergedWeights, merge_lora

__all__ = ["FewSteps", "MergedArray", "MergedWeights", "find_few_steps", "merge_lora"]
