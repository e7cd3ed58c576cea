"""How many initialised instances each function has: demand, forecasts, policy. Pure: no I/O.

The daemon, second by second, and a simulator, on a virtual clock, drive the same `Scaler`:

    scaler = Scaler(Policy(memory=4096))          # MiB for all that is kept
    scaler.add("hello:3", Bounds(mib=30))         # for each version; again to change its bounds
    scaler.under_way("hello:3", now, 1)           # requests under way, at each change
    scaler.under_way("hello:3", now + 0.2, 0)
    scaler.started("hello:3", 0.12)               # how long an instance took to come up
    scaler.expect("b:1", now, 1, now + 5, "hello calls it")   # beside what is under way now
    for decision in scaler.round(now + 1).decisions:          # each second
        decision.key, decision.desired, decision.keep, decision.reason
    data = scaler.saved()                         # plain data, now and then; `load` after a start

A decision holds until the next one for its key: `keep` instances should be there, those that
serve included; of those, what is beyond `desired` may be paused. `Round.failures` names
forecasters that were left out.

Seconds are the business of `reactive`, minutes that of `forecast`. An instance is kept while the
chance that the next minute needs it is worth the memory: `Policy.price`, or more when
`Policy.memory` is short.
"""

from templated.scaling.decision import Decision, Failure, Round
from templated.scaling.demand import Demand
from templated.scaling.policy import Bounds, Policy
from templated.scaling.scaler import Scaler

__all__ = ["Bounds", "Decision", "Demand", "Failure", "Policy", "Round", "Scaler"]
