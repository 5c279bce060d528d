# SPDX-License-Identifier: Apache-2.0
"""How much of a scan process one instance may have while others want it."""

import time

#: Seconds of scan time that an instance may have saved: more than the boot
#: of a guest takes.
_SAVED = 1.0
#: Instances that are remembered after their last session.
_REMEMBERED = 1024


class Budget:
    """A token bucket of scan time.

    :param share: of one processor, 0 to 1.
    :ivar sessions: how many share it.
    """

    __slots__ = ('_at', '_left', '_rate', 'sessions')

    def __init__(self, share: float) -> None:
        self._rate = share
        self._left = _SAVED * 1e9
        self._at = time.monotonic_ns()
        self.sessions = 0

    def spend(self, duration: int) -> None:
        """Take time from it; what is not there is owed.

        :param duration: in ns.
        """
        # What comes in while it is full is lost, or it would count twice.
        self._refill()
        self._left -= duration

    def left(self) -> bool:
        """:returns: whether there is any."""
        if self._left > 0:
            return True
        # Only asked for the clock when it is in doubt.
        self._refill()
        return self._left > 0

    def full(self) -> bool:
        """:returns: whether it is as good as new."""
        self._refill()
        return self._left >= _SAVED * 1e9

    def _refill(self) -> None:
        now = time.monotonic_ns()
        self._left = min(self._left + (now - self._at) * self._rate,
                         _SAVED * 1e9)
        self._at = now


class Budgets:
    """The budgets of all instances that a scan process serves.

    :param share: of one processor that each has, 0 to 1.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._budgets: dict[str, Budget] = {}

    def open(self, instance: str) -> Budget:
        """:returns: the budget of an instance with one more session."""
        budget = self._budgets.get(instance)
        if budget is None:
            self._forget()
            budget = self._budgets[instance] = Budget(self._share)
        budget.sessions += 1
        return budget

    def _forget(self) -> None:
        # Not at the end of its last session: who connects again would have
        # a new one each time.
        if len(self._budgets) < _REMEMBERED:
            return
        for instance, budget in list(self._budgets.items()):
            if not budget.sessions and budget.full():
                del self._budgets[instance]
