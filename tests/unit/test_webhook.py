"""Payload forms of both webhook generations, and what they are about."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.domain.webhook import Hint, Unreadable, parse

ACTIVITY, REVISION = "4b6de6e8-502b-40ed-95eb-4e4f3fc0ab40", "0d0e9f7e-95a3-4a0b-8f0c-3b2b7f0c8b11"


@pytest.mark.parametrize(
    ("payload", "hints"),
    [
        pytest.param(
            {
                "rel": "inputs",
                "inverse_rel": "activities",
                "owner_id": "o",
                "entity_id": ACTIVITY,
                "target_id": REVISION,
            },
            (Hint(ACTIVITY, "Activity", None, gained=REVISION),),
            id="mapped relation",
        ),
        pytest.param(
            {"rel": "procedures", "inverse_rel": "actions", "entity_id": REVISION, "target_id": ACTIVITY},
            (Hint(ACTIVITY, "Activity", None, gained=REVISION),),
            id="mapped relation from the other end",
        ),
        pytest.param(
            {
                "_id": f"{ACTIVITY}--actions-->{REVISION}",
                "type": "Relation",
                "rel": "actions",
                "source_id": ACTIVITY,
                "target_id": REVISION,
                "organization_id": 7,
            },
            (Hint(ACTIVITY, "Activity", 7, gained=REVISION),),
            id="whole relation",
        ),
        pytest.param(
            {"_id": f"{ACTIVITY}--inputs-->{REVISION}", "type": "Relation"},
            (Hint(ACTIVITY, "Activity", None, gained=REVISION),),
            id="relation with its derived id alone",
        ),
        pytest.param(
            {"_id": ACTIVITY, "type": "Activity", "organization_id": 0, "attributes": {"name": "x"}},
            (Hint(ACTIVITY, "Activity", 0),),
            id="whole activity",
        ),
        pytest.param(
            {"id": REVISION, "type": "Revision", "organization": 3},
            (Hint(REVISION, "Revision", 3),),
            id="update notice",
        ),
        pytest.param({"rel": "outputs", "entity_id": ACTIVITY, "target_id": REVISION}, (), id="our own outputs"),
        pytest.param({"rel": "files", "entity_id": "p", "target_id": "f"}, (), id="a file in a folder"),
        pytest.param({"id": "x", "type": "Project"}, (), id="a project"),
    ],
)
def test_what_a_payload_is_about(payload: dict[str, Any], hints: tuple[Hint, ...]) -> None:
    assert parse(payload) == hints


@pytest.mark.parametrize(
    ("payload", "where"),
    [
        ([], "not a JSON object"),
        ("x", "not a JSON object"),
        ({}, "neither rel"),
        ({"id": 3, "type": "Activity"}, "neither rel"),
        ({"id": "../../etc", "type": "Activity"}, "not an Ovation id"),
        ({"rel": "inputs", "entity_id": "a b"}, "source of the inputs relation"),
        ({"rel": "activities", "entity_id": "x"}, "target of the activities relation"),
        ({"rel": 5}, "rel is not a word"),
        ({"id": ACTIVITY, "type": "Activity", "organization": "0"}, "organization is not a number"),
    ],
)
def test_what_cannot_be_read_says_where(payload: Any, where: str) -> None:
    result = parse(payload)
    assert isinstance(result, Unreadable)
    assert where in result.where


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
keys = st.sampled_from(
    ["rel", "_id", "id", "type", "source_id", "target_id", "entity_id", "organization", "organization_id"]
)


@given(st.dictionaries(keys, values | st.sampled_from(["inputs", "Relation", "Activity", ACTIVITY])) | values)
def test_anything_at_all_is_answered(payload: Any) -> None:
    result = parse(json.loads(json.dumps(payload)))
    assert isinstance(result, (tuple, Unreadable))
