"""What comes fast goes together: nothing is lost, nothing overtakes, the first and the last wait for nobody."""

import math

from hypothesis import given
from hypothesis import strategies as st

from optikit.runtime.speculation.decoding_loop import Step
from optikit.serving.completion import Bundle


def steps(count, ended=True):
    finish = [None] * (count - 1) + ["length" if ended else None]
    return [Step((number,), 0, 0, "", each) for number, each in enumerate(finish)]


@given(st.integers(1, 20), st.sampled_from([0.0, 1e-9, 1e-6, math.inf]), st.booleans())
def test_all_of_a_text_comes_in_its_order(count, interval_s, failed):
    sent = []
    bundle = Bundle(sent.append, interval_s)
    told = [*steps(count, ended=not failed), *[ValueError("not numbers")] * failed]
    for each in told:
        bundle.tell(each, ())
    assert [one for held in sent for one, _ in held] == told
    assert len(sent[0]) == 1
    assert all(sent)


def test_an_interval_is_kept_but_for_the_first_and_the_last():
    sent = []
    bundle = Bundle(sent.append, math.inf)
    for each in steps(9):
        bundle.tell(each, ())
        if each.finish is None:
            assert len(sent) == 1
    assert [len(held) for held in sent] == [1, 8]
    sent.clear()
    bundle = Bundle(sent.append, 0.0)
    for each in steps(9):
        bundle.tell(each, ())
    assert [len(held) for held in sent] == [1] * 9
