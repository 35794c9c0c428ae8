"""A made-up model whose scores are normal in each class: what is true of it is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from finetune.applications.monitor.records import Tally
from finetune.applications.monitor.shares import Quantifier, fit_quantifier

DISTANCE = 2.5
"""Of the classes' means, in standard deviations: an area under the curve of .96."""


class MadeModel:
    """Its probabilities are calibrated where a share of .2 is negative."""

    def draw(self, generator, size, share):
        """Probabilities and truths, (size,), of which exactly a share is negative."""
        truths = np.arange(size) < round(size * share)
        scores = generator.normal(size=size) + DISTANCE * truths
        return expit(np.log(0.2 / 0.8) + DISTANCE * scores - DISTANCE**2 / 2), truths

    def count(self, known):
        """Their tally."""
        tally = Tally()
        for each in known:
            tally.add(float(each), bool(each > 0.5))
        return tally

    def draw_tally(self, generator, size, share):
        """A window's, from a source with this share."""
        return self.count(self.draw(generator, size, generator.binomial(size, share) / max(size, 1))[0])


@pytest.fixture(scope="session")
def made() -> MadeModel:
    return MadeModel()


@pytest.fixture(scope="session")
def validation(made):
    """Probabilities and truths of 1,000 rows."""
    return made.draw(np.random.default_rng(7), 1000, 0.2)


@pytest.fixture(scope="session")
def quantifier(validation) -> Quantifier:
    return fit_quantifier(*validation)
