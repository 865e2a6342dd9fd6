"""The objectives by the value of `objective.name`."""

from lljax.objectives.objective import Objective
from lljax.objectives.sft import SFT

OBJECTIVES: dict[str, Objective] = {row.name: row for row in (SFT,)}
