# SPDX-License-Identifier: Apache-2.0
"""What benches find."""

import typing


class Result(typing.NamedTuple):
    """One figure.

    :param limit: the largest value that is good enough; None for any
    """

    name: str
    value: float
    unit: str
    limit: float | None = None

    @property
    def short(self):
        """Whether it misses its limit."""
        return self.limit is not None and self.value > self.limit
