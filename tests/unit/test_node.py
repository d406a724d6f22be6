"""What becomes of a job whose batch job is over, and what a batch job is given."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from agent.adapters.node import ORDERS, OrdersGone, take_orders
from agent.domain.container import Ending
from agent.domain.job import FaultClass, Verdict
from agent.domain.node import OWN_MEMORY_BYTES, asked_for, node_over
from agent.domain.resources import Resources


def test_a_batch_job_is_given_more_than_its_container() -> None:
    resources, seconds = asked_for(Resources(2, 1 << 30, 1, 600), 86_400, 3600)
    assert resources == Resources(2, (1 << 30) + OWN_MEMORY_BYTES, 1, 600)
    assert seconds == 4200
    resources, seconds = asked_for(Resources(), 86_400, 3600)
    assert resources == Resources()
    assert seconds == 90_000


@pytest.mark.parametrize(
    ("ending", "fault", "again", "words"),
    [
        (Ending.LOST, FaultClass.NODE, True, "The node on which"),
        (Ending.EXITED, FaultClass.NODE, True, r"ended \(2\) before the run did. It said last: no Apptainer"),
        (Ending.TIME_LIMIT, FaultClass.TIME_LIMIT, False, "AGENT_NODE_MARGIN_SECONDS"),
        (Ending.MEMORY, FaultClass.MEMORY, False, "The node on which"),
        (Ending.OUTSIDE, FaultClass.PLATFORM, False, "The node on which"),
        (Ending.REFUSED, FaultClass.PLATFORM, False, "The node on which"),
    ],
)
def test_what_is_the_nodes_doing_is_done_again(ending: Ending, fault: FaultClass, again: bool, words: str) -> None:
    over = node_over(ending, 2, "The node on which the run was failed.", "no Apptainer", 7200)
    assert (over.verdict, over.fault.cls, over.again) == (Verdict.FAILED, fault, again)
    assert re.search(words, over.fault.message)


@pytest.mark.parametrize("ending", [None, Ending.CANCELLED])
def test_what_was_cancelled_is_not(ending: Ending | None) -> None:
    over = node_over(ending, None, None, "", 7200)
    assert (over.verdict, over.again) == (Verdict.CANCELLED, False)


def test_orders_are_taken_once(tmp_path: Path) -> None:
    (tmp_path / ORDERS).write_text(json.dumps({"place": "here"}))
    assert take_orders(tmp_path) == {"place": "here"}
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OrdersGone):
        take_orders(tmp_path)
