"""What published methods choose, from statistics made up here."""

import numpy as np

from abreast.plan import Group
from abreast.rivals.choose import at_random, by_similarity, least_influence, least_turn

PAIRS = [Group(layers=(first, first + 1)) for first in range(1, 8)]


def test_layers_of_least_influence_are_left_out():
    influence = np.array([0.9, 0.2, 0.1, 0.3, 0.1, 0.8])
    assert least_influence(influence, 1) == (2,)
    assert least_influence(influence, 3) == (1, 2, 4)


def test_the_run_over_which_the_state_turns_least_is_left_out():
    turning = np.ones((11, 11))
    turning[4, 6], turning[0, 2], turning[8, 10] = 0.2, 0.1, 0.3
    assert least_turn(turning, 2) == (0, 1)
    assert least_turn(turning, 2, first=1) == (4, 5)  # a map needs a layer before the run
    assert least_turn(np.where(turning == 0.3, 0.0, turning), 2) == (8, 9)


def test_cqil_groups_the_most_similar_inputs_in_its_own_wiring():
    similarity = np.ones((11, 11)) * 0.5
    similarity[3, 4] = similarity[6, 7] = 0.99
    every = [*PAIRS, *(Group.wired(pair.layers, "cqil-full") for pair in PAIRS)]
    assert by_similarity(similarity, 8, every).shorthand == "3|4 6|7"
    assert by_similarity(np.eye(11), 3, PAIRS) is None


def test_random_plans_depend_on_the_seed_only():
    drawn = {at_random(10, 8, PAIRS, seed).shorthand for seed in range(20)}
    assert len(drawn) > 5
    assert at_random(10, 8, PAIRS, 3) == at_random(10, 8, PAIRS[::-1], 3)
