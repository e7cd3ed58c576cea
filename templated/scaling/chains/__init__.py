"""Call chains: which function leads to which, after how long and how often.

`Chains` learns and answers, an `Agenda` keeps the answers until their time has passed.
"""

from templated.scaling.chains.agenda import Agenda, Wanted
from templated.scaling.chains.chains import Bounds, Chains
from templated.scaling.chains.edges import Edge
from templated.scaling.chains.expected import Expected

__all__ = ["Agenda", "Bounds", "Chains", "Edge", "Expected", "Wanted"]
