"""The objectives by the value of `objective.name`."""

from lljax.objectives.objective import Objective
from lljax.objectives.policy import POLICIES
from lljax.objectives.preference import KTO, PAIRS
from lljax.objectives.sft import SFT

OBJECTIVES: dict[str, Objective] = {row.name: row for row in (SFT, *PAIRS, KTO, *POLICIES)}
