"""An attacker for the contracts: random calls on the compiled contracts and on `protocol.escrow`, compared after each.

It may use any amount, any key, a foreign chain, contract or channel, a damaged signature, a replay, any order and any
time, and brings hostile resolvers and jurors. At most one thing is wrong with a signed step, because two wrongs would hide
each other. Both sides must agree: accepted, or refused with the same error name, and every number equal. Beside the model
stand checks that do not trust it, each naming its invariant (contracts/INVARIANTS.md).

    crowd.py       who takes part, what they sign
    reads.py       every number that the contracts hold, read at once
    judge.py       one step on both sides, compared
    seen.py        one accepted call and what it changed
    invariants.py invariants_jobs.py invariants_stake.py invariants_jury.py   what must hold whatever the model says
    money.py keys.py work.py jury.py rules.py   what is tried
    attacker.py    who does what next; hostile resolvers; replays
    drain.py       everybody gets out
    fuzz.py        many sequences, in several processes; the shortest replay of a failure
"""

from node.testing.attacker.attacker import Attacker
from node.testing.attacker.crowd import Dice
from node.testing.attacker.judge import Disagreement

__all__ = ["Attacker", "Dice", "Disagreement"]
