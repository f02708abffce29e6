"""What published methods choose, from statistics made up here."""

import numpy as np

from abreast.plan import Group
from abreast.rivals.choose import at_random, by_angle, by_similarity


def test_published_ways_to_choose():
    costs = {Group(layers=(f, f + 1)): 1.0 for f in range(1, 8)}
    inputs = np.eye(11)
    alike = np.ones((11, 11)) * 0.5
    alike[3, 4] = alike[6, 7] = 0.99
    assert by_similarity(alike, 8, costs).shorthand == "3+4 6+7"
    turning = np.ones((11, 11))
    turning[4, 8] = 0.1
    assert by_angle(turning, 8, costs).shorthand == "4+5 6+7"
    drawn = {at_random(10, 8, costs, seed).shorthand for seed in range(20)}
    assert len(drawn) > 5
    assert at_random(10, 8, costs, 3) == at_random(10, 8, dict(reversed(costs.items())), 3)
    for choose in (by_similarity, by_angle):
        assert choose(inputs, 3, costs) is None
